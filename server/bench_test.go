package server_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"troth.dev/troth/api"
	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/ca"
	"troth.dev/troth/identity"
	"troth.dev/troth/internal/dev"
	"troth.dev/troth/server"
	"troth.dev/troth/storage"
	"troth.dev/troth/token"
)

// BenchmarkIssueX509SVIDs is one agent that asks for one SVID after the other, or
// for 100 at once, over mutual TLS on loopback, with a ledger in memory. Client and
// server share the process: it is for finding out what a change to this package
// does, to its allocations above all. What a certificate costs the server alone,
// beside its floor, is measured by test/load.
func BenchmarkIssueX509SVIDs(b *testing.B) {
	client, pod := benchmarkAgent(b)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		b.Fatal(err)
	}
	for _, items := range []int{1, 100} {
		b.Run(fmt.Sprintf("items=%d", items), func(b *testing.B) {
			in := &trothv1.IssueX509SVIDsRequest{}
			for range items {
				in.Items = append(in.Items, &trothv1.X509SVIDRequest{Csr: csr, Pod: &trothv1.PodReference{
					Uid: pod.UID, Namespace: pod.Namespace, Name: pod.Name, ServiceAccount: pod.ServiceAccount,
				}})
			}
			b.ReportAllocs()
			for b.Loop() {
				out, err := client.IssueX509SVIDs(b.Context(), in)
				if err != nil {
					b.Fatal(err)
				}
				for _, result := range out.GetResults() {
					if result.GetSvid() == nil {
						b.Fatalf("refused: %v", result.GetRefusal())
					}
				}
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N*items), "us/certificate")
		})
	}
}

// benchmarkAgent starts a server and returns the client of an agent, by its SVID,
// and a pod of its node.
func benchmarkAgent(b *testing.B) (trothv1.SVIDServiceClient, identity.Pod) {
	b.Helper()
	cluster, err := dev.NewCluster(identity.ServiceAccount{})
	if err != nil {
		b.Fatal(err)
	}
	self, pod := cluster.AddPod(agents, "troth-agent"), cluster.AddPod(web, "web")
	keys, err := ca.NewSealedKeys(bytes.Repeat([]byte{7}, ca.KeySize))
	if err != nil {
		b.Fatal(err)
	}
	store, discard := storage.NewMemory(), slog.New(slog.DiscardHandler)
	issuer, err := ca.Open(b.Context(), ca.Config{
		TrustDomain: trustDomain, Keys: keys, Authorities: store, Ledger: store, Audit: discard,
	})
	if err != nil {
		b.Fatal(err)
	}
	verifier, err := token.New(token.Config{Issuers: []string{dev.Issuer}, Audience: audience, Keys: cluster.Keys})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(verifier.Close)
	s, err := server.New(server.Config{
		TrustDomain: trustDomain, Issuer: issuer, Tokens: verifier, Pods: cluster, Agents: agents,
		Log: discard, Metrics: prometheus.NewRegistry(), Limits: server.Limits{PerCaller: 1e6},
	})
	if err != nil {
		b.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(b.Context()))
	served := make(chan error, 1) // Serve ends though nobody listens any more
	go func() { served <- s.Serve(ctx, l) }()
	b.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			b.Errorf("Serve() = %v", err)
		}
	})

	agent := identity.Agent{Node: self.Node, PodName: self.Name, PodUID: self.UID}
	id, err := agent.ID(trustDomain)
	if err != nil {
		b.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		b.Fatal(err)
	}
	issued, err := issuer.Issue(b.Context(), ca.Request{ID: id, CSR: csr, Caller: "benchmark"})
	if err != nil || issued[0].Err != nil {
		b.Fatal(err, issued)
	}
	leaf, err := x509.ParseCertificate(issued[0].SVID.Certificates[0])
	if err != nil {
		b.Fatal(err)
	}
	bundle, _ := issuer.Bundle().Load()
	connection, err := api.Dial(api.Config{
		Address: l.Addr().String(), TrustDomain: trustDomain, Bundles: bundle.X509Bundle(),
		SVID: &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{leaf}, PrivateKey: key},
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { connection.Close() })
	return trothv1.NewSVIDServiceClient(connection), pod
}
