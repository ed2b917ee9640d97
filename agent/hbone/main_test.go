package hbone_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"net/url"
	"sync"
	"testing"
	"time"

	"troth.dev/troth/agent/hbone"
)

// patience is how long a test waits for what must happen.
const patience = 20 * time.Second

// tlsPair makes a connection mutually authenticated, the caller as the TLS server:
// it shows itself first. Both ends have to read and write for it to come about.
type identity struct {
	caller, callee *tls.Config
}

var identities = sync.OnceValue(func() identity {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs:        []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/ns/shop/sa/cart"}},
		DNSNames:    []string{"peer"},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	roots := x509.NewCertPool()
	leaf, _ := x509.ParseCertificate(der)
	roots.AddCert(leaf)
	own := []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}}
	return identity{
		caller: &tls.Config{
			MinVersion: tls.VersionTLS13, Certificates: own, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: roots,
			SessionTicketsDisabled: true, NextProtos: []string{"troth/1"},
		},
		callee: &tls.Config{
			MinVersion: tls.VersionTLS13, Certificates: own, RootCAs: roots, ServerName: "peer", NextProtos: []string{"troth/1"},
		},
	}
})

// socketPair returns the two ends of a TCP connection.
func socketPair(tb testing.TB) (caller, callee *net.TCPConn) {
	tb.Helper()
	l := listen(tb)
	defer l.Close()
	var accepting sync.WaitGroup
	var err error
	accepting.Go(func() { callee, err = l.AcceptTCP() })
	c, dialErr := net.Dial("tcp", l.Addr().String())
	if dialErr != nil {
		l.Close()
	}
	accepting.Wait()
	if err := errors.Join(err, dialErr); err != nil {
		tb.Fatal(err)
	}
	caller = c.(*net.TCPConn)
	tb.Cleanup(func() { caller.Close(); callee.Close() })
	return caller, callee
}

func listen(tb testing.TB) *net.TCPListener {
	tb.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { l.Close() })
	return l
}

// securePair is a socketPair with TLS, on wires or not.
func securePair(tb testing.TB, buffer func(net.Conn) net.Conn) (caller, callee *tls.Conn) {
	tb.Helper()
	a, b := socketPair(tb)
	caller = tls.Server(buffer(a), identities().caller)
	callee = tls.Client(buffer(b), identities().callee)
	var both sync.WaitGroup
	var err error
	both.Go(func() { err = caller.Handshake() })
	calleeErr := callee.Handshake()
	both.Wait()
	if err := errors.Join(err, calleeErr); err != nil {
		tb.Fatal(err)
	}
	return caller, callee
}

func unbuffered(c net.Conn) net.Conn { return c }

// tunnel serves the callee's end of a new tunnel with handle, and returns the caller's.
func tunnel(tb testing.TB, c hbone.Config, handle func(*hbone.Request)) *hbone.Tunnel {
	tb.Helper()
	caller, callee := securePair(tb, hbone.Buffer)
	return tunnelOn(tb, caller, callee, c, handle)
}

func tunnelOn(tb testing.TB, caller, callee net.Conn, c hbone.Config, handle func(*hbone.Request)) *hbone.Tunnel {
	tb.Helper()
	serve(tb, callee, c, handle)
	t, err := hbone.Open(caller, c)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { t.Close() })
	return t
}

// serve runs Serve until the test ends, and returns what it returned once it has.
func serve(tb testing.TB, callee net.Conn, c hbone.Config, handle func(*hbone.Request)) (result <-chan error) {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	ended := make(chan error, 1)
	go func() {
		defer close(done)
		ended <- hbone.Serve(ctx, callee, c, handle)
	}()
	tb.Cleanup(func() {
		cancel()
		<-done
	})
	return ended
}

func connect(tb testing.TB, t *hbone.Tunnel, authority string) *hbone.Stream {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s, _, err := t.Connect(ctx, authority, nil)
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

// echo answers with what it is sent.
func echo(r *hbone.Request) {
	s, err := r.Accept(nil)
	if err != nil {
		return
	}
	if _, err := io.Copy(s, s); err == nil {
		s.CloseWrite()
	}
}
