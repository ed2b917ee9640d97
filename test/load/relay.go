package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"troth.dev/troth/agent/hbone"
	"troth.dev/troth/handshake"
	"troth.dev/troth/test/tuned"
)

// relayCommand is the argument with which the command runs itself as one of a pair
// of proxies.
const relayCommand = "relay"

// relaySpec says what a proxy is to be.
type relaySpec struct {
	Kind   string // plain, tls or hbone
	Callee bool   // the one beside the application
	To     string // whom it connects to
	Proxy  string // the other proxy, for a kind whose To is the application
	// Fresh has each connection get a tunnel of its own.
	Fresh     bool
	SVID, Key []byte // DER
	Authority []byte // DER
}

// relay is a proxy. It ends when its standard input does.
func relay(ctx context.Context, stdin io.Reader, stdout io.Writer) error {
	var s relaySpec
	requests := json.NewDecoder(stdin)
	if err := requests.Decode(&s); err != nil {
		return err
	}
	p, err := newProxy(s)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go p.carry(ctx, c.(*net.TCPConn))
		}
	}()
	if err := json.NewEncoder(stdout).Encode(l.Addr().String()); err != nil {
		return err
	}
	if err := requests.Decode(new(string)); !errors.Is(err, io.EOF) {
		return fmt.Errorf("standard input: %w", err)
	}
	return nil
}

// proxy is one of a pair.
type proxy struct {
	spec      relaySpec
	svid      *x509svid.SVID
	handshake *handshake.Config
	client    *tls.Config
	server    *tls.Config

	mu     sync.Mutex
	tunnel *hbone.Tunnel
}

func newProxy(s relaySpec) (*proxy, error) {
	p := &proxy{spec: s}
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
	p.handshake = &handshake.Config{
		Order: handshake.CallerFirst, SVID: p.svid,
		Bundles: x509bundle.FromX509Authorities(trustDomain, []*x509.Certificate{root}),
	}
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
func (p *proxy) carry(ctx context.Context, c *net.TCPConn) error {
	defer c.Close()
	switch {
	case p.spec.Kind == "hbone" && p.spec.Callee:
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
	case p.spec.Kind == "hbone":
		t, err := p.open(ctx)
		if err != nil {
			return err
		}
		if p.spec.Fresh {
			defer t.Close()
		}
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

// open returns the tunnel, or a new one.
func (p *proxy) open(ctx context.Context) (*hbone.Tunnel, error) {
	if !p.spec.Fresh {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.tunnel != nil {
			return p.tunnel, nil
		}
	}
	// The callee's application is behind its proxy, whose address comes first.
	out, err := dial(ctx, p.spec.Proxy)
	if err != nil {
		return nil, err
	}
	conn, err := handshake.Initiate(ctx, hbone.Buffer(out), p.handshake, p.svid.ID)
	if err != nil {
		return nil, err
	}
	t, err := hbone.Open(conn, hbone.Config{MaxStreams: 1000})
	if err == nil && !p.spec.Fresh {
		p.tunnel = t
	}
	return t, err
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
