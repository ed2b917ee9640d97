package agent_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"troth.dev/troth/agent"
	"troth.dev/troth/agent/workload"
	"troth.dev/troth/api"
	"troth.dev/troth/ca"
	"troth.dev/troth/identity"
	"troth.dev/troth/internal/dev"
	"troth.dev/troth/server"
	"troth.dev/troth/storage"
	"troth.dev/troth/token"
)

var (
	trustDomain = spiffeid.RequireTrustDomainFromString("example.org")
	audience    = trustDomain.IDString()
	agents      = identity.ServiceAccount{Namespace: "troth-system", Name: "troth-agent"}
	web         = identity.ServiceAccount{Namespace: "shop", Name: "web"}
	job         = identity.ServiceAccount{Namespace: "shop", Name: "job"}
	// order is of an operator who knows better than the gates.
	order   = ca.Order{Actor: "test", Reason: "test", Force: true}
	discard = slog.New(slog.DiscardHandler)
)

// A test that needs another process runs its own binary again, as one of these.
func TestMain(m *testing.M) {
	switch os.Getenv("AGENT_TEST_HELPER") {
	case "agent":
		agentHelper()
	case "fetch":
		fetchHelper()
	default:
		os.Exit(m.Run())
	}
}

// agentHelper is an agent until it is told to end. All processes are in one pod.
func agentHelper() {
	server, socket, bundle, tokenFile, podUID := os.Args[1], os.Args[2], os.Args[3], os.Args[4], os.Args[5]
	l, err := workload.Listen(socket)
	if err != nil {
		panic(err)
	}
	a, err := agent.New(agent.Config{
		Server: server, TrustDomain: trustDomain,
		Anchor:   func() (*x509bundle.Bundle, error) { return x509bundle.Load(trustDomain, bundle) },
		Token:    api.TokenFile(tokenFile),
		Listener: l,
		PodOf:    func(workload.Peer) (string, error) { return podUID, nil },
		Log:      discard, Metrics: prometheus.NewRegistry(),
	})
	if err != nil {
		panic(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := a.Run(ctx); err != nil {
		panic(err)
	}
}

// fetchHelper fetches an SVID once, and goes.
func fetchHelper() {
	if _, err := workloadapi.FetchX509SVID(context.Background(), workloadapi.WithAddr("unix://"+os.Args[1])); err != nil {
		panic(err)
	}
}

func helper(t *testing.T, name string, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), "AGENT_TEST_HELPER="+name)
	cmd.Stderr = os.Stderr
	return cmd
}

// newIssuer makes an issuer of SVIDs that live for as long as given.
func newIssuer(t *testing.T, life time.Duration) *ca.Issuer {
	t.Helper()
	keys, err := ca.NewSealedKeys(bytes.Repeat([]byte{7}, ca.KeySize))
	if err != nil {
		t.Fatal(err)
	}
	profile, err := ca.NewProfile(ca.ProfileConfig{Life: life})
	if err != nil {
		t.Fatal(err)
	}
	store := storage.NewMemory()
	issuer, err := ca.Open(t.Context(), ca.Config{
		TrustDomain: trustDomain, Keys: keys, Authorities: store, Ledger: store, Audit: discard, Profile: profile,
	})
	if err != nil {
		t.Fatal(err)
	}
	return issuer
}

func bundleOf(issuer *ca.Issuer) *x509bundle.Bundle {
	bundle, _ := issuer.Bundle().Load()
	return bundle.X509Bundle()
}

// replaceAuthorities replaces the active authority, and drops it at once.
func replaceAuthorities(t *testing.T, issuer *ca.Issuer) {
	t.Helper()
	set, _ := issuer.Authorities().Load()
	old, _ := set.Active()
	next, err := issuer.Prepare(t.Context(), order)
	if err == nil {
		_, err = issuer.Activate(t.Context(), next.ID, order)
	}
	if err == nil {
		_, err = issuer.Revoke(t.Context(), old.ID, order)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// run runs until stop is called, or the test ends, whatever became of it.
func run(t *testing.T, f func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- f(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run() = %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// control is a control plane of the real parts, which can be stopped and started.
type control struct {
	issuer  *ca.Issuer
	cluster *dev.Cluster
	address string
	agent   identity.Pod
	stop    func()
}

func newControl(t *testing.T, life time.Duration) *control {
	t.Helper()
	cluster, err := dev.NewCluster(identity.ServiceAccount{})
	if err != nil {
		t.Fatal(err)
	}
	c := &control{issuer: newIssuer(t, life), cluster: cluster, agent: cluster.AddPod(agents, "agent-1")}
	// An address that nobody else uses, so that the port stays free while the server
	// is down.
	c.address = fmt.Sprintf("127.%d.%d.%d:0", 1+mathrand.N(254), mathrand.N(256), 1+mathrand.N(254))
	c.start(t)
	return c
}

// start serves at the address, at first or again.
func (c *control) start(t *testing.T) {
	t.Helper()
	tokens, err := token.New(token.Config{Issuers: []string{dev.Issuer}, Audience: audience, Keys: c.cluster.Keys})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tokens.Close)
	s, err := server.New(server.Config{
		TrustDomain: trustDomain, Issuer: c.issuer, Tokens: tokens, Pods: c.cluster, Agents: agents,
		Fleet: storage.NewMemory(), Replica: "test", Log: discard, Metrics: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", c.address)
	if err != nil {
		t.Fatal(err)
	}
	c.address = l.Addr().String()
	c.stop = run(t, func(ctx context.Context) error { return s.Serve(ctx, l) })
}

// node is an agent in this process.
type node struct {
	*agent.Agent

	socket  string
	metrics *prometheus.Registry
	anchor  atomic.Pointer[x509bundle.Bundle] // what is mounted
}

func startNode(t *testing.T, address string, anchor *x509bundle.Bundle, tok func() (string, error), podOf func(workload.Peer) (string, error)) *node {
	t.Helper()
	n := &node{socket: filepath.Join(shortDir(t), "s"), metrics: prometheus.NewRegistry()}
	n.anchor.Store(anchor)
	l, err := workload.Listen(n.socket)
	if err != nil {
		t.Fatal(err)
	}
	n.Agent, err = agent.New(agent.Config{
		Server: address, TrustDomain: trustDomain,
		Anchor:   func() (*x509bundle.Bundle, error) { return n.anchor.Load(), nil },
		Token:    tok,
		Listener: l,
		PodOf:    podOf,
		Log:      discard, Metrics: n.metrics,
	})
	if err != nil {
		t.Fatal(err)
	}
	run(t, n.Run)
	return n
}

// count returns the sum of a metric over all its labels.
func (n *node) count(t *testing.T, name string, labels ...string) float64 {
	t.Helper()
	families, err := n.metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, family := range families {
		if family.GetName() != name {
			continue
		}
		for _, m := range family.GetMetric() {
			if len(labels) == 0 || len(m.GetLabel()) == 1 && m.GetLabel()[0].GetValue() == labels[0] {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "agent")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// source is an unmodified client of the Workload API.
func source(t *testing.T, socket string) *workloadapi.X509Source {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	s, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+socket)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func svidOf(t *testing.T, s *workloadapi.X509Source) *x509svid.SVID {
	t.Helper()
	svid, err := s.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	return svid
}

// eventually waits until ok.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(60 * time.Second)
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for !ok() {
		select {
		case <-again.C:
		case <-deadline:
			t.Fatalf("not seen in a minute: %s", what)
		}
	}
}

// serverCertificate is a server's own SVID.
func serverCertificate(t *testing.T, issuer *ca.Issuer) *tls.Certificate {
	t.Helper()
	id, err := identity.ServerID(trustDomain)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	results, err := issuer.Issue(t.Context(), ca.Request{ID: id, CSR: csr, Caller: "test"})
	if err != nil || results[0].Err != nil {
		t.Fatal(err, results)
	}
	return &tls.Certificate{Certificate: results[0].SVID.Certificates, PrivateKey: key}
}
