package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"troth.dev/troth/trothtest"
)

// protocols are what is offered to applications and by them: a gRPC server talks to
// nobody who does not name h2.
func protocols() []string { return []string{"h2", "http/1.1"} }

// callApplication calls the application by mutual TLS, as one who has an SVID and
// trusts a bundle. It returns the certificate that
// it presented, nil if there was none that verifies, and whether it accepted ours.
func callApplication(ctx context.Context, address string, svid x509svid.Source, bundle x509bundle.Source, app spiffeid.ID) (presented *x509.Certificate, accepted bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	network := "tcp"
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		network, address = "unix", path
	}
	var dialer net.Dialer
	raw, err := dialer.DialContext(ctx, network, address)
	if err != nil {
		return nil, false, err
	}
	defer raw.Close()
	config := tlsconfig.MTLSClientConfig(svid, bundle, tlsconfig.AuthorizeID(app))
	config.NextProtos = protocols()
	c := tls.Client(raw, config)
	if err := c.HandshakeContext(ctx); err != nil {
		return nil, false, err
	}
	presented = c.ConnectionState().PeerCertificates[0]
	// A client of TLS 1.3 is done before the server has looked at its certificate
	// (RFC 8446 §4.4): a refusal is the first thing to read. Who accepts us says
	// nothing, or something of its own, or goodbye.
	const refusalDelay = 300 * time.Millisecond
	if err := c.SetReadDeadline(time.Now().Add(refusalDelay)); err != nil {
		return presented, false, err
	}
	_, err = c.Read(make([]byte, 1))
	if err == nil || errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, io.EOF) {
		return presented, true, nil
	}
	return presented, false, err
}

// nameOf tells an SVID from others of the same identity.
func nameOf(c *x509.Certificate) string {
	serial := hex.EncodeToString(c.SerialNumber.Bytes())
	return fmt.Sprintf("%s (of authority %.8s, valid until %s)",
		serial[max(0, len(serial)-8):], hex.EncodeToString(c.AuthorityKeyId), c.NotAfter.UTC().Format(time.RFC3339))
}

// callers is whoever calls us, in HTTP or in anything else on TLS.
type callers struct {
	listener net.Listener
	server   *http.Server
	served   sync.WaitGroup

	mu   sync.Mutex
	last *x509.Certificate // of the last call since forget; guarded by mu
	why  string            // of the last call that failed since forget; guarded by mu
}

// listenForCalls serves as an identity to one caller. Each call has a handshake of its
// own: a connection that stays open would show nothing of what has changed since.
func listenForCalls(ctx context.Context, address string, as *trothtest.Identity, app spiffeid.ID) (*callers, error) {
	var config net.ListenConfig
	l, err := config.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, inputErrorf("--call: %w", err)
	}
	c := &callers{listener: l}
	secure := as.TLSServer(tlsconfig.AuthorizeID(app))
	secure.NextProtos = protocols()
	secure.SessionTicketsDisabled = true
	secure.VerifyConnection = func(state tls.ConnectionState) error {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.last = state.PeerCertificates[0]
		return nil
	}
	c.server = &http.Server{
		Handler:           http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "rehearsing") }),
		TLSConfig:         secure,
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          log.New(failedCalls{c}, "", 0),
	}
	c.server.SetKeepAlivesEnabled(false)
	c.served.Go(func() {
		c.server.ServeTLS(l, "", "") //nolint:errcheck // it ends because it is closed
	})
	return c, nil
}

// failedCalls takes what an http.Server logs: why handshakes fail.
type failedCalls struct{ *callers }

func (r failedCalls) Write(line []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.why = strings.TrimSpace(string(line))
	return len(line), nil
}

func (c *callers) address() string { return c.listener.Addr().String() }

func (c *callers) close() {
	c.server.Close()
	c.served.Wait()
}

// forget begins anew.
func (c *callers) forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last, c.why = nil, ""
}

// sawCallBy returns an error unless the last call was with this certificate.
func (c *callers) sawCallBy(newest *x509.Certificate) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.last == nil && c.why != "":
		return fmt.Errorf("its calls fail: %s", c.why)
	case c.last == nil:
		return errors.New("it has not called")
	case !c.last.Equal(newest):
		return fmt.Errorf("it calls with an SVID that is not its newest: %s instead of %s", nameOf(c.last), nameOf(newest))
	}
	return nil
}
