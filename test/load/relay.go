package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
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
		t := newTuned(c, func(c net.Conn) *tls.Conn { return tls.Server(c, p.server) })
		if err := t.HandshakeContext(ctx); err != nil {
			return err
		}
		out, err := dial(ctx, p.spec.To)
		if err != nil {
			return err
		}
		t.join(out)
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
	t := newTuned(out, func(c net.Conn) *tls.Conn { return tls.Client(c, p.client) })
	defer out.Close()
	if err := t.HandshakeContext(ctx); err != nil {
		return err
	}
	t.join(c)
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

// tuned is crypto/tls as well as it can be had: what lies beneath reads and writes
// many records at once, and what lies above 256 KB. Its large buffers come from a
// pool, since 512 KB that are new cost a connection more than its handshake.
type tuned struct {
	*tls.Conn

	below *coalescing
}

type coalescing struct {
	*net.TCPConn

	in        []byte
	r, w      int
	remaining int // of the record that is being read
	out       []byte
	coalesce  bool
}

const largeBuffer = 288 << 10

func newTuned(c *net.TCPConn, secure func(net.Conn) *tls.Conn) *tuned {
	below := &coalescing{TCPConn: c}
	return &tuned{secure(below), below}
}

// Read returns bytes of one record, so that ready can tell whether the next is here.
func (c *coalescing) Read(p []byte) (int, error) {
	for c.r == c.w || c.remaining == 0 && c.w-c.r < 5 {
		if c.in == nil {
			c.in = large.Get().([]byte)
		}
		c.w = copy(c.in, c.in[c.r:c.w])
		c.r = 0
		n, err := c.TCPConn.Read(c.in[c.w:])
		if n == 0 {
			return 0, err
		}
		c.w += n
	}
	if c.remaining == 0 {
		c.remaining = c.next()
	}
	n := copy(p, c.in[c.r:min(c.w, c.r+c.remaining)])
	c.r += n
	c.remaining -= n
	return n, nil
}

func (c *coalescing) next() int { return 5 + int(binary.BigEndian.Uint16(c.in[c.r+3:])) }

func (c *coalescing) ready() bool {
	held := c.w - c.r
	return c.remaining == 0 && held >= 5 && held >= c.next()
}

func (c *coalescing) Write(p []byte) (int, error) {
	if !c.coalesce {
		return c.TCPConn.Write(p)
	}
	c.out = append(c.out, p...)
	return len(p), nil
}

var large = sync.Pool{New: func() any { return make([]byte, largeBuffer) }}

// send writes what TLS makes of b at once.
func (t *tuned) send(b []byte) error {
	t.below.coalesce = true
	t.below.out = large.Get().([]byte)[:0]
	_, err := t.Write(b)
	if err == nil {
		_, err = t.below.TCPConn.Write(t.below.out)
	}
	large.Put(t.below.out[:cap(t.below.out)]) //nolint:staticcheck // a slice's header is little beside it
	t.below.out, t.below.coalesce = nil, false
	return err
}

// join relays between t and a connection.
func (t *tuned) join(c *net.TCPConn) {
	var both sync.WaitGroup
	both.Go(func() {
		b := large.Get().([]byte)
		defer large.Put(b) //nolint:staticcheck // a slice's header is little beside it
		for {
			n, err := c.Read(b[:256<<10])
			if n > 0 {
				err = errors.Join(err, t.send(b[:n]))
			}
			if err != nil {
				break
			}
		}
		t.CloseWrite()
	})
	b := large.Get().([]byte)
	for {
		n, err := t.Read(b)
		for err == nil && n <= 256<<10-16<<10 && t.below.ready() {
			var m int
			m, err = t.Read(b[n:])
			n += m
		}
		if n > 0 {
			if _, err := c.Write(b[:n]); err != nil {
				break
			}
		}
		if err != nil {
			break
		}
	}
	large.Put(b) //nolint:staticcheck // a slice's header is little beside it
	c.CloseWrite()
	both.Wait()
	t.below.Close()
	c.Close()
	if t.below.in != nil {
		large.Put(t.below.in) //nolint:staticcheck // a slice's header is little beside it
	}
}
