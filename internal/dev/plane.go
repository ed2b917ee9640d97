// Package dev is Troth on a laptop: a whole control plane and one node agent in
// one process, with a [Cluster] in memory in the place of Kubernetes and SQLite
// in a folder. What is left out is Kubernetes alone: tokens are verified, agents
// attested and SVIDs issued by the same code as in a cluster.
//
// Start with [Open] and [Plane.Run]. It serves whoever may connect to a Unix
// socket of the user who runs it, and is not made for more.
package dev

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"troth.dev/troth/agent"
	"troth.dev/troth/agent/workload"
	"troth.dev/troth/ca"
	"troth.dev/troth/identity"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/policy"
	"troth.dev/troth/server"
	"troth.dev/troth/storage/sqlite"
	"troth.dev/troth/token"
)

// Config is what a Plane needs. Every field is required unless it says
// otherwise.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	// Dir is where the sockets, the database and the key-encryption key are. It
	// has to exist.
	Dir string
	// Fallback is the account of processes that nobody gave one; zero for none.
	Fallback identity.ServiceAccount
	// SVIDLife is how long SVIDs live; 0 means the default of package ca.
	SVIDLife time.Duration
	// AgentReturn is how long workloads may take to come back to the agent after a
	// start; 0 means the default of package fleet.
	AgentReturn time.Duration
	// Policies are files and folders of PeerAuthentication manifests, which are
	// followed while the Plane runs; optional.
	Policies []string
	// PolicyNamespace is the namespace of policies that name none. Required with
	// Policies.
	PolicyNamespace string
	Log             *slog.Logger
	Audit           *slog.Logger
}

// Plane is a control plane with its agent.
type Plane struct {
	Cluster  *Cluster
	config   Config
	issuer   *ca.Issuer
	store    *sqlite.Store
	server   *server.Server
	agent    *agent.Agent
	tokens   *token.Verifier
	listener net.Listener // of the control plane, on loopback
	admin    net.Listener
	// operators is where whoever may connect is an operator.
	operators net.Listener
	policies  fingerprint // of those that Open put in force
}

// Open makes a plane whose sockets accept connections, which are answered once
// Run runs. Run closes what Open opened.
func Open(ctx context.Context, c Config) (_ *Plane, err error) {
	p := &Plane{config: c}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close())
		}
	}()
	if p.Cluster, err = NewCluster(c.Fallback); err != nil {
		return nil, err
	}
	files, used, err := p.policyFiles()
	if err == nil {
		p.policies, err = used, p.usePolicies(ctx, files)
	}
	if err != nil {
		return nil, fmt.Errorf("dev: policies: %w", err)
	}
	kek, err := keyEncryptionKey(filepath.Join(c.Dir, "key-encryption-key"))
	if err != nil {
		return nil, err
	}
	keys, err := ca.NewSealedKeys(kek)
	if err != nil {
		return nil, err
	}
	if p.store, err = sqlite.Open(ctx, sqlite.Config{Path: filepath.Join(c.Dir, "troth.db")}); err != nil {
		return nil, err
	}
	profile, err := ca.NewProfile(ca.ProfileConfig{Life: c.SVIDLife})
	if err != nil {
		return nil, err
	}
	p.issuer, err = ca.Open(ctx, ca.Config{
		TrustDomain: c.TrustDomain, Keys: keys, Authorities: p.store, Ledger: p.store, Audit: c.Audit, Profile: profile,
	})
	if err != nil {
		return nil, err
	}
	audience := c.TrustDomain.IDString()
	p.tokens, err = token.New(token.Config{Issuers: []string{Issuer}, Audience: audience, Keys: p.Cluster.Keys})
	if err != nil {
		return nil, err
	}
	agents := Agents()
	metrics := prometheus.NewRegistry()
	p.server, err = server.New(server.Config{
		TrustDomain: c.TrustDomain, Issuer: p.issuer, Tokens: p.tokens, Pods: p.Cluster, Agents: agents,
		Fleet: p.store, Replica: "dev", AgentReturn: c.AgentReturn, Log: c.Log, Metrics: metrics,
	})
	if err != nil {
		return nil, err
	}
	if p.listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return nil, err
	}
	if p.admin, err = listenPrivate(filepath.Join(c.Dir, adminSocket)); err != nil {
		return nil, err
	}
	if p.operators, err = listenPrivate(filepath.Join(c.Dir, operatorSocket)); err != nil {
		return nil, err
	}
	socket, err := workload.Listen(filepath.Join(c.Dir, workloadSocket))
	if err != nil {
		return nil, err
	}
	self := p.Cluster.AddPod(agents, "troth-agent")
	p.agent, err = agent.New(agent.Config{
		Server:      p.listener.Addr().String(),
		TrustDomain: c.TrustDomain,
		Anchor: func() (*x509bundle.Bundle, error) {
			bundle, _ := p.issuer.Bundle().Load()
			return bundle.X509Bundle(), nil
		},
		Token:    func() (string, error) { return p.Cluster.Token(self.UID, audience, time.Hour) },
		Listener: socket,
		PodOf:    p.Cluster.PodOf,
		Log:      c.Log,
		Metrics:  metrics,
	})
	if err != nil {
		return nil, errors.Join(err, socket.Close())
	}
	return p, nil
}

const (
	workloadSocket = "workload.sock"
	adminSocket    = "admin.sock"
	operatorSocket = "operator.sock"
)

// Socket returns the path of the Workload API's socket.
func (p *Plane) Socket() string { return filepath.Join(p.config.Dir, workloadSocket) }

// Address returns the control plane's HOST:PORT.
func (p *Plane) Address() string { return p.listener.Addr().String() }

// ServePlaintext is the agent's part in the traffic of a pod that knows nothing of
// TLS: it passes on to the application's address what arrives at l and the pod's
// policy lets through, until ctx ends. It closes l.
func (p *Plane) ServePlaintext(ctx context.Context, podUID string, l net.Listener, application netip.AddrPort) error {
	return p.agent.ServePod(ctx, podUID, agent.Captured{
		Plaintext:   l,
		Destination: func(net.Conn) (netip.AddrPort, error) { return application, nil },
		DialFrom: func(ctx context.Context, _ netip.Addr, destination netip.AddrPort) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", destination.String())
		},
	})
}

// Policy returns the mTLS policy that the agent holds for a pod, kept current until
// release is called.
func (p *Plane) Policy(podUID string) (value *latest.Value[*policy.Effective], release func()) {
	return p.agent.Policy(podUID)
}

// Run serves until ctx ends.
func (p *Plane) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return p.server.Serve(ctx, p.listener) })
	group.Go(func() error { return p.agent.Run(ctx) })
	group.Go(func() error { return p.serveAdmin(ctx) })
	group.Go(func() error { return p.server.ServeOperators(ctx, p.operators) })
	if len(p.config.Policies) > 0 {
		group.Go(func() error { return p.followPolicies(ctx, p.policies) })
	}
	err := group.Wait()
	p.tokens.Close()
	return errors.Join(err, p.store.Close())
}

// close closes what was opened before Open failed.
func (p *Plane) close() error {
	if p.tokens != nil {
		p.tokens.Close()
	}
	var err error
	if p.store != nil {
		err = p.store.Close()
	}
	for _, l := range []net.Listener{p.listener, p.admin, p.operators} {
		if l != nil {
			err = errors.Join(err, l.Close())
		}
	}
	return err
}

// keyEncryptionKey reads the key in the file, or makes both.
func keyEncryptionKey(path string) ([]byte, error) {
	key, err := os.ReadFile(path)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	key = make([]byte, ca.KeySize)
	rand.Read(key)
	if err := os.WriteFile(path, key, 0o600); err != nil {
		return nil, fmt.Errorf("dev: make a key-encryption key: %w", err)
	}
	return key, nil
}
