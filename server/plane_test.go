package server_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"troth.dev/troth/api"
	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/ca"
	"troth.dev/troth/identity"
	"troth.dev/troth/internal/dev"
	"troth.dev/troth/server"
	"troth.dev/troth/storage"
	"troth.dev/troth/token"
)

var (
	trustDomain = spiffeid.RequireTrustDomainFromString("example.org")
	agents      = identity.ServiceAccount{Namespace: "troth-system", Name: "troth-agent"}
	web         = identity.ServiceAccount{Namespace: "shop", Name: "web"}
	audience    = trustDomain.IDString()
)

// plane is a running server.
type plane struct {
	server  *server.Server
	issuer  *ca.Issuer
	store   *storage.Memory
	address string
	stop    func() error // ends Serve and returns what it returned
}

// startPlane serves until the test ends, or stop is called.
func startPlane(t testing.TB, pods server.Pods, keys func(context.Context) ([]byte, error), issuer string, change func(*server.Config)) *plane {
	t.Helper()
	sealed, err := ca.NewSealedKeys(bytes.Repeat([]byte{7}, ca.KeySize))
	if err != nil {
		t.Fatal(err)
	}
	p := &plane{store: storage.NewMemory()}
	profile, err := ca.NewProfile(ca.ProfileConfig{Life: svidLife(t)})
	if err != nil {
		t.Fatal(err)
	}
	discard := slog.New(slog.DiscardHandler)
	p.issuer, err = ca.Open(t.Context(), ca.Config{
		TrustDomain: trustDomain, Keys: sealed, Authorities: p.store, Ledger: p.store, Audit: discard, Profile: profile,
	})
	if err != nil {
		t.Fatal(err)
	}
	verifier, err := token.New(token.Config{Issuers: []string{issuer}, Audience: audience, Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	config := server.Config{
		TrustDomain: trustDomain, Issuer: p.issuer, Tokens: verifier, Pods: pods, Agents: agents,
		Fleet: p.store, Replica: "test", AgentReturn: time.Millisecond, Log: discard, Metrics: prometheus.NewRegistry(),
		Limits: server.Limits{PerConnection: 1000, Unproven: 10_000},
	}
	if change != nil {
		change(&config)
	}
	if p.server, err = server.New(config); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p.address = l.Addr().String()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	served := make(chan error, 1) // Serve ends though nobody listens any more
	go func() { served <- p.server.Serve(ctx, l) }()
	var result error
	stopped := false
	p.stop = func() error {
		if !stopped {
			stopped = true
			cancel()
			result = <-served
			verifier.Close()
		}
		return result
	}
	t.Cleanup(func() {
		if err := p.stop(); err != nil {
			t.Errorf("Serve() = %v", err)
		}
	})
	return p
}

// svidLife is short for the tests that wait for an expiry.
func svidLife(t testing.TB) time.Duration {
	if t.Name() == "TestWatchEndsWithTheSVID" || t.Name() == "TestResolveEndsWithTheSVID" {
		return 10 * time.Second
	}
	return time.Hour
}

func (p *plane) bundle() *x509bundle.Bundle {
	bundle, _ := p.issuer.Bundle().Load()
	return bundle.X509Bundle()
}

func (p *plane) dial(t testing.TB, svid x509svid.Source, tok string) *grpc.ClientConn {
	t.Helper()
	c := api.Config{Address: p.address, TrustDomain: trustDomain, Bundles: p.bundle(), SVID: svid}
	if tok != "" {
		c.Token = func() (string, error) { return tok, nil }
	}
	conn, err := api.Dial(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// attest returns the agent's SVID for an agent's token.
func (p *plane) attest(t testing.TB, tok string) *x509svid.SVID {
	t.Helper()
	key, csr := newCSR(t)
	conn := p.dial(t, nil, tok)
	out, err := trothv1.NewAttestationServiceClient(conn).AttestAgent(t.Context(), &trothv1.AttestAgentRequest{Csr: csr})
	if err != nil {
		t.Fatalf("AttestAgent: %v", err)
	}
	return assemble(t, key, out.GetSvid())
}

func assemble(t testing.TB, key *ecdsa.PrivateKey, issued *trothv1.X509SVID) *x509svid.SVID {
	t.Helper()
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	svid, err := x509svid.ParseRaw(bytes.Join(issued.GetCertificates(), nil), pkcs8)
	if err != nil {
		t.Fatalf("the SVID issued: %v", err)
	}
	return svid
}

func newCSR(t testing.TB) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return key, csr
}

// refusal is what a status says, in one line: CODE REASON, and "retry" if it
// comes with a RetryInfo.
func refusal(err error) string {
	st, ok := status.FromError(err)
	if !ok {
		return err.Error()
	}
	if st.Code() == codes.OK {
		return "OK"
	}
	text := st.Code().String()
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			if d.GetDomain() == "troth.dev" {
				text += " " + d.GetReason()
			}
		case *errdetails.RetryInfo:
			if d.GetRetryDelay().AsDuration() > 0 {
				text += " retry"
			}
		}
	}
	return text
}

// itemRefusal is the same for an item of a batch.
func itemRefusal(r *trothv1.X509SVIDResult) string {
	if r.GetSvid() != nil {
		return "OK"
	}
	refused := r.GetRefusal()
	text := codes.Code(refused.GetCode()).String() + " " + refused.GetReason()
	if refused.GetRetryAfter().AsDuration() > 0 {
		text += " retry"
	}
	return text
}

func reference(pod identity.Pod) *trothv1.PodReference {
	return &trothv1.PodReference{Uid: pod.UID, Namespace: pod.Namespace, Name: pod.Name, ServiceAccount: pod.ServiceAccount}
}

// startDev starts a plane on a cluster in memory with one agent pod.
func startDev(t testing.TB, change func(*server.Config)) (*plane, *dev.Cluster, identity.Pod) {
	t.Helper()
	cluster, err := dev.NewCluster(identity.ServiceAccount{})
	if err != nil {
		t.Fatal(err)
	}
	p := startPlane(t, cluster, cluster.Keys, dev.Issuer, change)
	return p, cluster, cluster.AddPod(agents, "agent")
}

func tokenFor(t testing.TB, c *dev.Cluster, pod identity.Pod) string {
	t.Helper()
	tok, err := c.Token(pod.UID, audience, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return tok
}
