package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// rehearsed is an application as people write them with go-spiffe, for
// testdata/script/rehearse.txtar: a service with mutual TLS at a Unix socket, that also
// calls whoever TROTH_PEER_ADDRESS names. Its first argument says which mistake it makes:
//
//	good     none
//	once     it loads its SVID and its bundle at its start, and never again
//	hoards   it keeps every root that it ever had
//	fragile  it ends when the Workload API does
//	idle     it asks for nothing and does nothing
//	brief    it ends at once
func rehearsed() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	mistake := os.Args[1]
	switch mistake {
	case "brief":
		return
	case "idle":
		<-ctx.Done()
		return
	}
	if err := serveRehearsed(ctx, mistake, os.Args[2:]); err != nil && ctx.Err() == nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(7)
	}
}

func serveRehearsed(ctx context.Context, mistake string, listen []string) error {
	source, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		return err
	}
	defer source.Close()
	var svids x509svid.Source = source
	var bundles x509bundle.Source = source
	ended := make(chan error, 3) // one for each that may end
	switch mistake {
	case "once":
		svid, err := source.GetX509SVID()
		if err != nil {
			return err
		}
		bundle, err := source.GetX509BundleForTrustDomain(svid.ID.TrustDomain())
		if err != nil {
			return err
		}
		svids, bundles = svid, bundle
		source.Close()
	case "hoards":
		bundles = &hoard{source: source}
	case "fragile":
		go func() { ended <- workloadapi.WatchX509Context(ctx, fragile{ended}) }()
	}

	var work sync.WaitGroup
	defer work.Wait()
	if len(listen) > 0 {
		l, err := net.Listen("unix", listen[0])
		if err != nil {
			return err
		}
		server := &http.Server{
			Handler:           http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "here") }),
			TLSConfig:         tlsconfig.MTLSServerConfig(svids, bundles, tlsconfig.AuthorizeMemberOf(domainOf(svids))),
			ReadHeaderTimeout: 10 * time.Second,
			ErrorLog:          log.New(io.Discard, "", 0),
		}
		work.Go(func() { ended <- server.ServeTLS(l, "", "") })
		defer server.Close()
	}
	if peer := os.Getenv("TROTH_PEER_ADDRESS"); peer != "" {
		work.Go(func() { keepCalling(ctx, peer, svids, bundles) })
	}
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
		return nil
	}
}

func keepCalling(ctx context.Context, peer string, svids x509svid.Source, bundles x509bundle.Source) {
	dialer := tls.Dialer{Config: tlsconfig.MTLSClientConfig(svids, bundles, tlsconfig.AuthorizeAny())}
	client := http.Client{Transport: &http.Transport{DialTLSContext: dialer.DialContext}}
	every := time.NewTicker(50 * time.Millisecond)
	defer every.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-every.C:
		}
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+peer, http.NoBody)
		if err != nil {
			return
		}
		if response, err := client.Do(request); err == nil {
			response.Body.Close()
		}
	}
}

func domainOf(svids x509svid.Source) spiffeid.TrustDomain {
	svid, err := svids.GetX509SVID()
	if err != nil {
		return spiffeid.TrustDomain{}
	}
	return svid.ID.TrustDomain()
}

// hoard is a bundle source that adds and never takes away.
type hoard struct {
	source x509bundle.Source

	mu   sync.Mutex
	kept *x509bundle.Bundle // guarded by mu
}

func (h *hoard) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	now, err := h.source.GetX509BundleForTrustDomain(td)
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.kept == nil {
		h.kept = x509bundle.New(td)
	}
	for _, authority := range now.X509Authorities() {
		h.kept.AddX509Authority(authority)
	}
	return h.kept, nil
}

// fragile takes the end of a stream for its own.
type fragile struct{ ended chan<- error }

func (fragile) OnX509ContextUpdate(*workloadapi.X509Context) {}

func (f fragile) OnX509ContextWatchError(err error) {
	if !strings.Contains(err.Error(), "context canceled") {
		select {
		case f.ended <- err:
		default:
		}
	}
}
