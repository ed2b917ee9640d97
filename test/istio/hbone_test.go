// Package istio_test has the agent's proxies talk HBONE with Istio's own
// implementation of it, in both directions: what Istio's tests take for a ztunnel.
package istio_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"istio.io/istio/pkg/hbone"

	"troth.dev/troth/agent/proxy"
	"troth.dev/troth/handshake"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/policy"
)

// domain is the trust domain of a mesh as Istio installs it.
var domain = spiffeid.RequireTrustDomainFromString("cluster.local")

// mesh is an authority that both sides trust.
type mesh struct {
	root *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newMesh(t *testing.T) *mesh {
	t.Helper()
	m := &mesh{key: newKey(t)}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{domain.ID().URL()},
	}
	m.root = sign(t, template, template, &m.key.PublicKey, m.key)
	return m
}

// svid is as istiod issues them.
func (m *mesh) svid(t *testing.T, path string) *x509svid.SVID {
	t.Helper()
	id, err := spiffeid.FromPath(domain, path)
	if err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	leaf := sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}, URIs: []*url.URL{id.URL()},
	}, m.root, &key.PublicKey, m.key)
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{leaf}, PrivateKey: key}
}

func (m *mesh) identity(svid *x509svid.SVID) *latest.Value[proxy.Identity] {
	return latest.New(proxy.Identity{SVID: svid, Bundles: x509bundle.NewSet(x509bundle.FromX509Authorities(domain, []*x509.Certificate{m.root}))})
}

// tls is how a ztunnel speaks TLS as svid: each side verifies the other.
func (m *mesh) tls(svid *x509svid.SVID) *tls.Config {
	roots := x509.NewCertPool()
	roots.AddCert(m.root)
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		Certificates:       []tls.Certificate{{Certificate: [][]byte{svid.Certificates[0].Raw}, PrivateKey: svid.PrivateKey}},
		NextProtos:         []string{"h2"},
		ClientAuth:         tls.RequireAndVerifyClientCert,
		ClientCAs:          roots,
		InsecureSkipVerify: true, // an SVID has no name: below is what verifies
		VerifyConnection: func(s tls.ConnectionState) error {
			_, err := s.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
			return err
		},
	}
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func sign(t *testing.T, template, parent *x509.Certificate, key *ecdsa.PublicKey, by *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key, by)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return certificate
}

func listen(t *testing.T) *net.TCPListener {
	t.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func address(l net.Listener) netip.AddrPort { return l.Addr().(*net.TCPAddr).AddrPort() }

// echo is an application that sends back what it got once its caller is done.
func echo(t *testing.T) netip.AddrPort {
	t.Helper()
	l := listen(t)
	var serving sync.WaitGroup
	t.Cleanup(func() { l.Close(); serving.Wait() })
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer c.Close()
				io.Copy(c, c)
			})
		}
	})
	return address(l)
}

// serve runs until the test ends, and has ended then.
func serve(t *testing.T, f func(context.Context) error) {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- f(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

func dialTCP(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "tcp", to.String())
}

func metrics(t *testing.T) *proxy.Metrics {
	t.Helper()
	m, err := proxy.NewMetrics(prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// inbound is a pod of ours, STRICT, and where it takes tunnels of the standard order.
func inbound(t *testing.T, m *mesh, mode policy.Mode) netip.AddrPort {
	t.Helper()
	in, err := proxy.NewInbound(proxy.InboundConfig{
		Identity: m.identity(m.svid(t, "/ns/shop/sa/web")), Policy: latest.New(&policy.Effective{Mode: mode}),
		Destination: func(net.Conn) (netip.AddrPort, error) { return netip.AddrPort{}, errors.New("no plaintext") },
		Dial:        func(ctx context.Context, _ netip.Addr, to netip.AddrPort) (net.Conn, error) { return dialTCP(ctx, to) },
		Log:         slog.New(slog.NewJSONHandler(t.Output(), nil)), Metrics: metrics(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	l := listen(t)
	serve(t, func(ctx context.Context) error { return in.ServeTunnels(ctx, l, handshake.Standard) })
	return address(l)
}

// exchange sends size bytes and wants them back.
func exchange(t *testing.T, c net.Conn, size int) {
	t.Helper()
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	sent := make([]byte, size)
	rand.Read(sent)
	var sending sync.WaitGroup
	sending.Go(func() {
		if _, err := c.Write(sent); err != nil {
			t.Errorf("send: %v", err)
		}
	})
	defer sending.Wait()
	got := make([]byte, size)
	if _, err := io.ReadFull(c, got); err != nil {
		t.Fatalf("receive: %v", err)
	}
	if string(got) != string(sent) {
		t.Error("what came back is not what was sent")
	}
}

func TestIstioCallsUs(t *testing.T) {
	m := newMesh(t)
	app, front := echo(t), inbound(t, m, policy.Strict)
	d := hbone.NewDialer(hbone.Config{ProxyAddress: front.String(), TLS: m.tls(m.svid(t, "/ns/shop/sa/cart"))})
	for _, size := range []int{1, 100_000, 3 << 20} {
		c, err := d.Dial("tcp", app.String())
		if err != nil {
			t.Fatal(err)
		}
		exchange(t, c, size)
		c.Close()
	}
}

// What we refuse, Istio's client understands as refused.
func TestIstioIsRefused(t *testing.T) {
	m, stranger := newMesh(t), newMesh(t)
	app := echo(t)
	closed := listen(t)
	nobody := address(closed)
	closed.Close()
	trusted := m.svid(t, "/ns/shop/sa/cart")
	for _, tt := range []struct {
		name string
		mode policy.Mode
		svid *x509svid.SVID
		to   string
		want string
	}{
		{"no policy is known", policy.Unset, trusted, app.String(), "401 Unauthorized"},
		{"an application that is not there", policy.Strict, trusted, nobody.String(), "503 Service Unavailable"},
		{"another pod's address", policy.Strict, trusted, "127.0.0.9:80", "400 Bad Request"},
		{"an SVID of nobody we trust", policy.Strict, stranger.svid(t, "/ns/shop/sa/cart"), app.String(), "round trip"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := hbone.NewDialer(hbone.Config{ProxyAddress: inbound(t, m, tt.mode).String(), TLS: m.tls(tt.svid)})
			c, err := d.Dial("tcp", tt.to)
			if err == nil {
				c.Close()
				t.Fatal("it was let through")
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("it is told %q, want %q", err, tt.want)
			}
		})
	}
}

// known is a directory that knows one pod.
type known struct{ destination *proxy.Destination }

func (k known) Resolve(context.Context, netip.AddrPort) (*proxy.Destination, error) {
	return k.destination, nil
}

func TestWeCallIstio(t *testing.T) {
	m := newMesh(t)
	app := echo(t)
	theirs := m.svid(t, "/ns/shop/sa/ztunnel")
	server := hbone.NewServer()
	server.Protocols.SetHTTP2(true)
	server.TLSConfig = m.tls(theirs)
	peer := listen(t)
	serve(t, func(ctx context.Context) error {
		defer context.AfterFunc(ctx, func() { server.Close() })()
		err := server.ServeTLS(peer, "", "")
		if errors.Is(err, http.ErrServerClosed) || errors.Is(err, net.ErrClosed) {
			return nil
		}
		return err
	})

	quiet, registry := slog.New(slog.NewJSONHandler(t.Output(), nil)), prometheus.NewRegistry()
	measured := metrics(t)
	pool, err := proxy.NewPool(proxy.PoolConfig{Log: quiet, Metrics: measured, Registerer: registry})
	if err != nil {
		t.Fatal(err)
	}
	out, err := proxy.NewOutbound(proxy.OutboundConfig{
		Identity: m.identity(m.svid(t, "/ns/shop/sa/cart")), Balancer: proxy.NewBalancer(1), Pool: pool, Pod: "caller",
		Directory:   known{&proxy.Destination{Endpoints: []proxy.Endpoint{{Address: app, Protocol: proxy.HBONE, ID: theirs.ID}}}},
		Destination: func(net.Conn) (netip.AddrPort, error) { return app, nil },
		Dial:        func(ctx context.Context, _ netip.AddrPort) (net.Conn, error) { return dialTCP(ctx, address(peer)) },
		Log:         quiet, Metrics: measured,
	})
	if err != nil {
		t.Fatal(err)
	}
	front := listen(t)
	serve(t, func(ctx context.Context) error { return out.Serve(ctx, front) })

	for _, size := range []int{1, 100_000, 3 << 20} {
		c, err := dialTCP(t.Context(), address(front))
		if err != nil {
			t.Fatal(err)
		}
		exchange(t, c, size)
		// A half-close goes through, to the application and back.
		if err := c.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("after the end, %d bytes and %v, want an end", n, err)
		}
		c.Close()
	}
	if n := len(pool.Tunnels()); n != 1 {
		t.Errorf("%d tunnels for three connections, want 1", n)
	}
}
