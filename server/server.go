// Package server speaks the protocol troth.v1: it authenticates the caller of
// each call, checks that this kind of caller may make it, calls the one domain
// method behind it, and translates what comes back. There is one file for each
// RPC service.
//
// Start with [New] and [Server.Serve]. methods.go says who may call what,
// caller.go how a caller is known, and errors.go what refusals look like.
//
// It guarantees that a method without a row in the table is refused, that
// limits come before the work that they limit, and that every call is decided
// on the API server's present record of the caller's pod, never on an earlier
// decision.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/ca"
	"troth.dev/troth/fleet"
	"troth.dev/troth/identity"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/internal/place"
	"troth.dev/troth/kube/directory"
	"troth.dev/troth/policy"
	"troth.dev/troth/storage"
	"troth.dev/troth/token"
)

// Pods is what the server needs to know about pods. Package kube answers from a
// cluster, and the development mode from its own memory.
type Pods interface {
	// Pod returns the present record of the pod with the reference's UID, under
	// whatever name it has. It fails with identity.ErrPodNotFound or
	// identity.ErrPodReplaced when that was the API server's answer just now;
	// every other error means that there was no answer.
	Pod(ctx context.Context, ref identity.PodReference) (identity.Pod, error)
	// OnNode returns the node's live pods with the policy in force for each,
	// ordered by UID and kept current until release is called.
	OnNode(node string) (pods *latest.Value[[]policy.Assignment], release func())
	// Directory returns a reader of who is behind addresses, for the pods of a node.
	// The caller closes it.
	Directory(node string) *directory.Reader
	// Synced is closed once all pods, Services and policies are known.
	Synced() <-chan struct{}
	// Of and Occupied tell which agents there should be.
	fleet.Pods
}

// Config is what a Server needs. Every field is required unless it says
// otherwise.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Issuer      *ca.Issuer
	Tokens      *token.Verifier
	Pods        Pods
	// Agents is the one service account that node agents run as.
	Agents identity.ServiceAccount
	// Uncaptured is the namespaces whose pods are not captured; optional. Pods has to
	// have been made with the same.
	Uncaptured map[string]bool
	// Fleet is where replicas share what they heard of agents, and Replica this
	// one's name there.
	Fleet   storage.FleetStore
	Replica string
	// AgentReturn is how long the workloads of a node may take to come back to an
	// agent that was restarted; 0 means the default of package fleet.
	AgentReturn time.Duration
	// ReviewToken, if it is there, has the last word on each token: the API
	// server's own. It fails with identity.ErrTokenRefused or because there was
	// no answer.
	ReviewToken func(ctx context.Context, raw string) error
	// Operator says which user's token raw is, if that user has the right; without
	// it no operator may do anything. It fails with
	// identity.ErrTokenRefused, identity.ErrForbidden, or because there was no
	// answer.
	Operator func(ctx context.Context, raw string, right Right) (user string, err error)
	// Mint, if it is there, lets CI jobs have identities of a trust domain for tests.
	Mint    *Mint
	Log     *slog.Logger
	Metrics prometheus.Registerer
	// Limits may be zero.
	Limits Limits
}

// Limits bounds what callers can make the server do. Zero fields mean the
// defaults.
type Limits struct {
	// PerCaller is how many calls an agent may make in a second, on average; by
	// default 200, with bursts of twice as many.
	PerCaller rate.Limit
	// Unproven is how many calls in a second, on average, the server takes from
	// callers who have yet to prove who they are, all together; by default 500,
	// with bursts of twice as many.
	Unproven rate.Limit
	// PerConnection is the same for one connection; by default 20.
	PerConnection rate.Limit
	// AnonymousStreams is how many streams callers without an identity may hold
	// open, all together; by default 1,000.
	AnonymousStreams int
	// AgentStreams is how many streams one agent may hold open; by default 8, of which
	// it needs two, so that it can open new ones before it closes the old.
	AgentStreams int
	// MintCalls is how many calls of CI jobs in a second, on average, the server looks
	// at; by default 50, with bursts of twice as many. They count as Unproven too.
	MintCalls rate.Limit
	// MintSVIDs is how many SVIDs in a second, on average, CI jobs get, all together;
	// by default 100, with bursts of 10. Others wait.
	MintSVIDs rate.Limit
}

func (l Limits) withDefaults() Limits {
	if l.PerCaller == 0 {
		l.PerCaller = 200
	}
	if l.Unproven == 0 {
		l.Unproven = 500
	}
	if l.PerConnection == 0 {
		l.PerConnection = 20
	}
	if l.AnonymousStreams == 0 {
		l.AnonymousStreams = 1000
	}
	if l.AgentStreams == 0 {
		l.AgentStreams = 8
	}
	if l.MintCalls == 0 {
		l.MintCalls = 50
	}
	if l.MintSVIDs == 0 {
		l.MintSVIDs = 100
	}
	return l
}

// Server is one replica of the control plane.
type Server struct {
	Config   // immutable after New
	metrics  *metrics
	own      *ownSVID
	places   *place.Sequence                   // of the SVIDs handed out
	callers  *lru.Cache[string, *callerLimits] // by agent
	unproven *rate.Limiter
	// anonymous counts the open streams of callers without an identity.
	anonymous atomic.Int64
	plaintext *lru.Cache[string, []*trothv1.PlaintextPeer] // the newest report of each agent, checked
	fleet     *fleet.Fleet
	spelled   *lru.Cache[*directory.Behind, *trothv1.Service] // Services that several agents are told of
	trust     latest.Value[*trust]                            // what agents are told
	minter    *minter                                         // nil without Mint
	draining  chan struct{}                                   // closed when Serve begins to stop
	drained   atomic.Bool                                     // true from the moment that draining is closed
}

// maxAgents is for how many agents the server remembers limits and reports.
const maxAgents = 20_000

// New checks the config. It starts nothing.
func New(c Config) (*Server, error) {
	switch {
	case c.TrustDomain.IsZero():
		return nil, errors.New("server: no trust domain")
	case c.Issuer == nil, c.Tokens == nil, c.Pods == nil, c.Fleet == nil, c.Log == nil, c.Metrics == nil:
		return nil, errors.New("server: Issuer, Tokens, Pods, Fleet, Log and Metrics are required")
	}
	if _, err := c.Agents.ID(c.TrustDomain); err != nil {
		return nil, fmt.Errorf("server: the agents' service account: %w", err)
	}
	own, err := newOwnSVID(c.TrustDomain, c.Issuer)
	if err != nil {
		return nil, err
	}
	c.Limits = c.Limits.withDefaults()
	callers, err := lru.New[string, *callerLimits](maxAgents)
	if err != nil {
		return nil, err
	}
	plaintext, err := lru.New[string, []*trothv1.PlaintextPeer](maxAgents)
	if err != nil {
		return nil, err
	}
	spelled, err := lru.New[*directory.Behind, *trothv1.Service](maxSpelled)
	if err != nil {
		return nil, err
	}
	agents, err := fleet.New(fleet.Config{
		Agents: c.Agents, Pods: c.Pods, Authorities: c.Issuer.Authorities(), Store: c.Fleet, Replica: c.Replica,
		SVIDLife: c.Issuer.SVIDLife(), Return: c.AgentReturn, Log: c.Log,
	})
	if err != nil {
		return nil, err
	}
	s := &Server{
		Config:    c,
		own:       own,
		places:    place.New(),
		callers:   callers,
		unproven:  rate.NewLimiter(c.Limits.Unproven, 2*int(c.Limits.Unproven)),
		plaintext: plaintext,
		fleet:     agents,
		spelled:   spelled,
		draining:  make(chan struct{}),
	}
	if c.Mint != nil {
		if s.minter, err = newMinter(c); err != nil {
			return nil, err
		}
	}
	if s.metrics, err = newMetrics(c.Metrics, s); err != nil {
		return nil, err
	}
	return s, nil
}

// Propagation is what the agents are known to have and to hold, kept current while
// Serve runs.
func (s *Server) Propagation() *latest.Value[ca.Propagation] { return s.fleet.Propagation() }

const (
	// maxRequest is the largest message that a caller may send: 100 requests of
	// the largest size, with room.
	maxRequest = 1 << 20
	// drainPatience is how long calls in flight may take once the server stops.
	drainPatience = 10 * time.Second
)

// Serve answers calls on l, keeps the server's own SVID fresh, and follows and
// rotates the authorities, until ctx ends. Then it tells its streams to go elsewhere, lets
// the calls in flight finish for at most ten seconds, and returns. It closes l.
// A Server serves once.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	if err := s.own.renew(ctx); err != nil {
		err = errors.Join(fmt.Errorf("server: own SVID: %w", err), l.Close())
		if ctx.Err() != nil {
			return nil //nolint:nilerr // it was ended before it began
		}
		return err
	}
	g := grpc.NewServer(
		grpc.Creds(&connectionCredentials{TransportCredentials: s.tls(), perConnection: s.Limits.PerConnection}),
		grpc.ConnectionTimeout(10*time.Second),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxConcurrentStreams(64),
		// 10,000 agents are as many connections, most of them idle: small buffers
		// save 10 KB each and cost nothing at messages of this size. Without a read
		// buffer gRPC reads from crypto/tls, which has a whole record anyway: 5 KB.
		grpc.ReadBufferSize(0),
		grpc.WriteBufferSize(4<<10),
		// Clients ping every 15 s to notice a server that vanished.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Minute, Timeout: 20 * time.Second}),
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(s.stream),
	)
	s.register(g)
	bundle, _ := s.Issuer.Bundle().Load()
	s.trust.Set(newTrust(bundle, nil))

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return s.Issuer.Run(ctx) })
	group.Go(func() error { return s.fleet.Run(ctx) })
	group.Go(func() error { return s.Issuer.Rotate(ctx, s.fleet.Propagation()) })
	group.Go(func() error { return s.keepTrust(ctx) })
	group.Go(func() error { return s.own.run(ctx, s.Log) })
	if m := s.minter; m != nil {
		group.Go(func() error { return m.Issuer.Run(ctx) })
		group.Go(func() error { return m.Issuer.Rotate(ctx, &m.propagation) })
		group.Go(func() error { m.keepEvidence(ctx); return nil })
		group.Go(func() error { m.pruneSpent(ctx, s.Log); return nil })
	}
	group.Go(func() error {
		<-ctx.Done()
		s.drained.Store(true)
		close(s.draining)
		force := time.AfterFunc(drainPatience, g.Stop)
		defer force.Stop()
		g.GracefulStop()
		return nil
	})
	group.Go(func() error {
		if err := g.Serve(l); !errors.Is(err, grpc.ErrServerStopped) {
			return err // nil if it was stopped while it served
		}
		return nil
	})
	return group.Wait()
}

func (s *Server) register(g grpc.ServiceRegistrar) {
	trothv1.RegisterAttestationServiceServer(g, &attestationService{server: s})
	trothv1.RegisterSVIDServiceServer(g, &svidService{server: s})
	trothv1.RegisterBundleServiceServer(g, &bundleService{server: s})
	trothv1.RegisterNodeServiceServer(g, &nodeService{server: s})
	trothv1.RegisterDirectoryServiceServer(g, &directoryService{server: s})
	s.registerForOperators(g)
}

func (s *Server) registerForOperators(g grpc.ServiceRegistrar) {
	trothv1.RegisterPolicyServiceServer(g, &policyService{server: s})
	trothv1.RegisterAuthorityServiceServer(g, &authorityService{server: s})
	trothv1.RegisterMintServiceServer(g, &mintService{server: s}) // of which one method is
}
