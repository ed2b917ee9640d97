package handshake_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"

	"troth.dev/troth/handshake"
)

// BenchmarkHandshakeRatio compares our handshakes with a bare one of crypto/tls:
// mutual, TLS 1.3 without tickets, same keys, same curve, ordinary chain
// verification on both sides. Both sides run in this process over loopback TCP.
//
// Each round runs all three, so that noise hits all alike. cpu-us/op is the CPU
// time of both sides for one connection, median over the rounds; x-floor is the
// median of the ratio to the floor of the same round.
func BenchmarkHandshakeRatio(b *testing.B) {
	const perRound = 50
	ca := newAuthority(b)
	svidA, svidB := ca.svid(b, idA, nil), ca.svid(b, idB, nil)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer listener.Close()

	roots := bundlePool(ca)
	bare := func() *tls.Config {
		return &tls.Config{
			MinVersion: tls.VersionTLS13, CurvePreferences: []tls.CurveID{tls.X25519MLKEM768}, SessionTicketsDisabled: true,
			InsecureSkipVerify: true, ClientAuth: tls.RequireAnyClientCert, NextProtos: []string{"h2"},
			VerifyConnection: func(state tls.ConnectionState) error {
				_, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{
					Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
				return err
			},
		}
	}
	bareA, bareB := bare(), bare()
	bareA.Certificates, bareB.Certificates = []tls.Certificate{tlsCertificate(svidA)}, []tls.Certificate{tlsCertificate(svidB)}
	floor := kind{
		func(_ context.Context, conn net.Conn) error { return tls.Client(conn, bareA).Handshake() },
		func(_ context.Context, conn net.Conn) error { return tls.Server(conn, bareB).Handshake() },
	}
	ours := func(order handshake.Order) kind {
		a := &handshake.Config{Order: order, SVID: svidA, Bundles: ca.bundle()}
		b := &handshake.Config{Order: order, SVID: svidB, Bundles: ca.bundle()}
		authorize := only(idA)
		return kind{
			func(ctx context.Context, conn net.Conn) error {
				_, err := handshake.Initiate(ctx, conn, a, idB)
				return err
			},
			func(ctx context.Context, conn net.Conn) error {
				_, err := handshake.Accept(ctx, conn, b, authorize)
				return err
			},
		}
	}
	kinds := []kind{floor, ours(handshake.Standard), ours(handshake.CallerFirst)}
	names := []string{"floor", "standard", "caller-first"}
	cpu, ratio := make([][]float64, 3), make([][]float64, 3)
	for b.Loop() {
		var round [3]float64
		for i, k := range kinds {
			before := cpuTime(b)
			for range perRound {
				k.run(b, listener)
			}
			round[i] = float64((cpuTime(b) - before).Microseconds()) / perRound
		}
		for i := range kinds {
			cpu[i] = append(cpu[i], round[i])
			ratio[i] = append(ratio[i], round[i]/round[0])
		}
	}
	b.ReportMetric(0, "ns/op")
	for i, name := range names {
		b.ReportMetric(median(cpu[i]), name+"-cpu-us/op")
		b.ReportMetric(median(ratio[i]), name+"-x-floor")
	}
}

// kind is one kind of handshake, from both sides.
type kind struct {
	initiate, accept func(context.Context, net.Conn) error
}

func (k kind) run(b *testing.B, listener net.Listener) {
	accepted := make(chan error, 1) // one result
	go func() {
		conn, err := listener.Accept()
		if err == nil {
			err = k.accept(b.Context(), conn)
			conn.Close()
		}
		accepted <- err
	}()
	conn, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	err = k.initiate(b.Context(), conn)
	if acceptErr := <-accepted; err != nil || acceptErr != nil {
		b.Fatal(err, acceptErr)
	}
	conn.Close()
}

// BenchmarkVerify is what Verify costs of a handshake: two signatures for a
// chain with an intermediate, and one more for each further authority in the
// bundle that has the issuer's very name, because x509 tries them all.
func BenchmarkVerify(b *testing.B) {
	ca := newAuthority(b)
	chain := chained(b, ca, nil).Certificates
	namesake := newAuthority(b).cert
	key := newKey(b)
	template := caTemplate("another name")
	other := sign(b, template, template, key.Public(), key)
	for _, tt := range []struct {
		name        string
		authorities []*x509.Certificate
	}{
		{"1 authority", []*x509.Certificate{ca.cert}},
		{"with another", []*x509.Certificate{ca.cert, other}},
		{"with a namesake", []*x509.Certificate{ca.cert, namesake}},
	} {
		b.Run(tt.name, func(b *testing.B) {
			bundle := x509bundle.FromX509Authorities(domain, tt.authorities)
			now := time.Now()
			for b.Loop() {
				if _, err := handshake.Verify(chain, bundle, now); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkVerifyLabyrinth is what somebody with no credentials can make Verify
// spend.
func BenchmarkVerifyLabyrinth(b *testing.B) {
	ca := newAuthority(b)
	chain := labyrinth(b, ca).Certificates
	now := time.Now()
	for b.Loop() {
		if _, err := handshake.Verify(chain, ca.bundle(), now); err == nil {
			b.Fatal("Verify(labyrinth) = nil")
		}
	}
}

func bundlePool(ca *authority) *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	return pool
}

func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

func median(values []float64) float64 {
	slices.Sort(values)
	return values[len(values)/2]
}
