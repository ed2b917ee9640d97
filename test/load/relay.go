package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sync/errgroup"

	"troth.dev/troth/agent/hbone"
	"troth.dev/troth/agent/proxy"
	"troth.dev/troth/handshake"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/policy"
	"troth.dev/troth/test/tuned"
)

// relayCommand is the argument with which the command runs itself as one of a pair
// of proxies.
const relayCommand = "relay"

// relaySpec says what a proxy is to be.
type relaySpec struct {
	// Kind is plain, tls, troth, or first, which is a tunnel for each connection.
	Kind      string
	Callee    bool   // the one beside the application
	To        string // whom it connects to
	Proxy     string // the other proxy, for a kind whose To is the application
	SVID, Key []byte // DER
	Authority []byte // DER
}

// newRelaySpec returns a spec with an identity of its own, which trusts itself.
func newRelaySpec() (relaySpec, error) {
	own, err := newAuthority()
	if err != nil {
		return relaySpec{}, err
	}
	id, err := spiffeid.FromPath(trustDomain, "/ns/shop/sa/proxy")
	if err != nil {
		return relaySpec{}, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return relaySpec{}, err
	}
	svid, err := own.issue(id.URL(), key.Public())
	if err != nil {
		return relaySpec{}, err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	return relaySpec{SVID: svid, Key: private, Authority: own.certificate.Raw}, err
}

// relayAddresses is where a proxy listens.
type relayAddresses struct {
	Front     string
	Plaintext string // for what is in no tunnel; only of the callee's end of ours
}

// relay is a proxy. Each line of its standard input is the mode of a policy that is in
// force from then on, and is answered when it is. The proxy ends when its standard
// input does.
func relay(ctx context.Context, stdin io.Reader, stdout io.Writer) error {
	var s relaySpec
	requests := json.NewDecoder(stdin)
	if err := requests.Decode(&s); err != nil {
		return err
	}
	p, err := newRelayed(s)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.Close()
	addresses := relayAddresses{Front: l.Addr().String()}
	if s.Kind == "troth" && s.Callee {
		if p.plaintext, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			return err
		}
		defer p.plaintext.Close()
		addresses.Plaintext = p.plaintext.Addr().String()
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return p.serve(ctx, l) })
	group.Go(func() error {
		defer cancel()
		answers := json.NewEncoder(stdout)
		if err := answers.Encode(addresses); err != nil {
			return err
		}
		for {
			var mode string
			if err := requests.Decode(&mode); errors.Is(err, io.EOF) {
				return nil
			} else if err != nil {
				return fmt.Errorf("standard input: %w", err)
			}
			each, err := policy.ParseMode(mode)
			if err != nil {
				return err
			}
			p.policy.Set(&policy.Effective{Mode: each})
			if err := answers.Encode(mode); err != nil {
				return err
			}
		}
	})
	return group.Wait()
}

// serve takes what l accepts until ctx ends.
func (p *relayed) serve(ctx context.Context, l net.Listener) error {
	if p.spec.Kind == "troth" {
		return p.serveTroth(ctx, l)
	}
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for {
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		go p.carry(ctx, c.(*net.TCPConn))
	}
}

// serveTroth is the data path of the agent, but for the capture.
func (p *relayed) serveTroth(ctx context.Context, l net.Listener) error {
	// A line for each connection costs a system call, as it does an agent.
	nowhere, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer nowhere.Close()
	log := slog.New(slog.NewJSONHandler(nowhere, nil))
	registry := prometheus.NewRegistry()
	metrics, err := proxy.NewMetrics(registry)
	if err != nil {
		return err
	}
	bundles := x509bundle.NewSet(p.bundle)
	identity := latest.New(proxy.Identity{SVID: p.svid, Bundles: bundles})
	application, err := netip.ParseAddrPort(p.spec.To)
	if err != nil {
		return err
	}
	destination := func(net.Conn) (netip.AddrPort, error) { return application, nil }
	if p.spec.Callee {
		inbound, err := proxy.NewInbound(proxy.InboundConfig{
			Identity: identity, Policy: p.policy, Destination: destination, Limit: 20_000,
			Dial: func(ctx context.Context, _ netip.Addr, to netip.AddrPort) (net.Conn, error) {
				return dial(ctx, to.String())
			},
			Log: log, Metrics: metrics,
		})
		if err != nil {
			return err
		}
		group, ctx := errgroup.WithContext(ctx)
		group.Go(func() error { return inbound.ServePlaintext(ctx, p.plaintext) })
		group.Go(func() error { return inbound.ServeTunnels(ctx, l, handshake.CallerFirst) })
		return group.Wait()
	}
	pool, err := proxy.NewPool(proxy.PoolConfig{Log: log, Metrics: metrics, Registerer: registry})
	if err != nil {
		return err
	}
	outbound, err := proxy.NewOutbound(proxy.OutboundConfig{
		Identity: identity, Balancer: proxy.NewBalancer(1), Pool: pool, Destination: destination,
		Pod:       "caller",
		Directory: known{&proxy.Destination{Endpoints: []proxy.Endpoint{{Address: application, Protocol: proxy.Troth, ID: p.svid.ID}}}},
		Dial:      func(ctx context.Context, _ netip.AddrPort) (net.Conn, error) { return dial(ctx, p.spec.Proxy) },
		Log:       log, Metrics: metrics,
	})
	if err != nil {
		return err
	}
	return outbound.Serve(ctx, l)
}

// known is a directory that knows one destination.
type known struct{ destination *proxy.Destination }

func (k known) Resolve(context.Context, netip.AddrPort) (*proxy.Destination, error) {
	return k.destination, nil
}

// relayed is one of a pair.
type relayed struct {
	spec      relaySpec
	svid      *x509svid.SVID
	bundle    *x509bundle.Bundle
	handshake *handshake.Config
	client    *tls.Config
	server    *tls.Config
	policy    *latest.Value[*policy.Effective]
	plaintext net.Listener
}

func newRelayed(s relaySpec) (*relayed, error) {
	p := &relayed{spec: s, policy: latest.New(&policy.Effective{Mode: policy.Strict})}
	if s.Kind == "plain" {
		return p, nil
	}
	var err error
	if p.svid, err = x509svid.ParseRaw(s.SVID, s.Key); err != nil {
		return nil, err
	}
	root, err := x509.ParseCertificate(s.Authority)
	if err != nil {
		return nil, err
	}
	p.bundle = x509bundle.FromX509Authorities(trustDomain, []*x509.Certificate{root})
	p.handshake = &handshake.Config{Order: handshake.CallerFirst, SVID: p.svid, Bundles: p.bundle}
	own := tls.Certificate{PrivateKey: p.svid.PrivateKey}
	for _, c := range p.svid.Certificates {
		own.Certificate = append(own.Certificate, c.Raw)
	}
	roots := x509.NewCertPool()
	roots.AddCert(root)
	p.server = &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{own}, SessionTicketsDisabled: true,
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: roots,
	}
	p.client = &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{own},
		InsecureSkipVerify: true, // SVIDs have no names: below is what verifies
		VerifyConnection: func(s tls.ConnectionState) error {
			_, err := s.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
			return err
		},
	}
	return p, nil
}

// carry takes a connection to its end.
func (p *relayed) carry(ctx context.Context, c *net.TCPConn) error {
	defer c.Close()
	switch {
	case p.spec.Kind == "first" && p.spec.Callee:
		conn, err := handshake.Accept(ctx, hbone.Buffer(c), p.handshake, func(spiffeid.ID) error { return nil })
		if err != nil {
			return err
		}
		return hbone.Serve(ctx, conn, hbone.Config{MaxStreams: 1000}, func(r *hbone.Request) {
			app, err := dial(ctx, r.Authority)
			if err != nil {
				r.Refuse(503)
				return
			}
			s, err := r.Accept(nil)
			if err != nil {
				app.Close()
				return
			}
			s.Relay(app, nil, nil)
		})
	case p.spec.Kind == "first":
		t, err := p.open(ctx)
		if err != nil {
			return err
		}
		defer t.Close()
		s, _, err := t.Connect(ctx, p.spec.To, nil)
		if err != nil {
			return err
		}
		return s.Relay(c, nil, nil)
	}
	if p.spec.Kind == "tls" && p.spec.Callee {
		t := tuned.New(c, func(c net.Conn) *tls.Conn { return tls.Server(c, p.server) })
		if err := t.HandshakeContext(ctx); err != nil {
			return err
		}
		out, err := dial(ctx, p.spec.To)
		if err != nil {
			return err
		}
		t.Join(out)
		return nil
	}
	out, err := dial(ctx, p.spec.To)
	if err != nil {
		return err
	}
	if p.spec.Kind == "plain" {
		join(c, out)
		return nil
	}
	t := tuned.New(out, func(c net.Conn) *tls.Conn { return tls.Client(c, p.client) })
	defer out.Close()
	if err := t.HandshakeContext(ctx); err != nil {
		return err
	}
	t.Join(c)
	return nil
}

// open returns a new tunnel.
func (p *relayed) open(ctx context.Context) (*hbone.Tunnel, error) {
	out, err := dial(ctx, p.spec.Proxy)
	if err != nil {
		return nil, err
	}
	conn, err := handshake.Initiate(ctx, hbone.Buffer(out), p.handshake, p.svid.ID)
	if err != nil {
		return nil, err
	}
	return hbone.Open(conn, hbone.Config{MaxStreams: 1000})
}

func dial(ctx context.Context, address string) (*net.TCPConn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// join relays between two connections, which Go splices.
func join(a, b *net.TCPConn) {
	var both sync.WaitGroup
	both.Go(func() {
		io.Copy(a, b)
		a.CloseWrite()
	})
	io.Copy(b, a)
	b.CloseWrite()
	both.Wait()
	b.Close()
}
