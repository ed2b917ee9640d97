// Package agent is Troth on one node: it proves itself to the control plane,
// learns which pods the node has and whom to trust, keeps an SVID for each
// service account of those pods, and serves them on the SPIFFE Workload API.
//
// Start with [New] and [Agent.Run]. session.go has the conversation with the
// control plane, identities.go what the agent holds, trust.go when an SVID is
// replaced, probe.go how the trust in an authority is proved, and package workload,
// below this one, the socket.
//
// It guarantees that the last good state keeps serving: whatever happens to the
// control plane, no SVID is dropped before its replacement is there, and no
// trust bundle but for a newer one. It refuses bundles that go backwards, and
// SVIDs that are not what it asked for. What it reports to have applied and proved
// is so already, on every stream of the node, and no SVID that it knows of is left
// out of its count. Keys are made here, live in memory, and
// leave only through the socket, to the pod that they belong to.
package agent

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"troth.dev/troth/agent/cni"
	"troth.dev/troth/agent/directory"
	"troth.dev/troth/agent/pods"
	"troth.dev/troth/agent/proxy"
	"troth.dev/troth/agent/workload"
	"troth.dev/troth/internal/health"
	"troth.dev/troth/internal/latest"
)

// Config is what an Agent needs. Every field is required unless it says
// otherwise.
type Config struct {
	// Server is the control plane's HOST:PORT.
	Server      string
	TrustDomain spiffeid.TrustDomain
	// Anchor reads the trust bundle that was mounted for the agent. It is asked
	// at the start, and again whenever the server cannot be verified by the
	// newest bundle that it sent.
	Anchor func() (*x509bundle.Bundle, error)
	// Token reads the agent's own service-account token.
	Token func() (string, error)
	// Listener is the Workload API's socket, made by workload.Listen. Run closes
	// it.
	Listener net.Listener
	// PodOf says which pod a process belongs to; nil means by its cgroup.
	PodOf func(workload.Peer) (podUID string, err error)
	// Kubelet is the addresses that this node's health probes come from, which
	// reach workloads in plaintext whatever their policy; optional.
	Kubelet *latest.Value[[]netip.Addr]
	// Drain is for how long the connections of a pod may go on when ServePod ends;
	// zero is not at all. When Run ends, new ones are taken for nine tenths of it: until
	// whoever comes after this agent is there, nobody else takes them.
	Drain time.Duration
	// DataPath is how the node's pods are captured; nil for not at all.
	DataPath *DataPath
	Log      *slog.Logger
	Metrics  prometheus.Registerer
}

// Agent is one node's agent.
type Agent struct {
	config     Config // immutable after New
	identities *identities
	workload   *workload.Server
	metrics    *metrics
	peers      *proxy.Peers // who reaches the node's workloads in plaintext
	proxied    *proxy.Metrics
	pods       *pods.Pods // nil if none are captured
	directory  *directory.Directory
	balancer   *proxy.Balancer
	pool       *proxy.Pool // the node's tunnels to others; nil if no pods are captured
	begun      time.Time   // when New made it

	mu     sync.Mutex
	served map[*served]struct{} // guarded by mu
}

// maxAffine is for how many clients of the node it is remembered which endpoint of a
// Service they stay with.
const maxAffine = 16 << 10

// maxPeers is how many plaintext peers the agent remembers: as many as a report
// may have.
const maxPeers = 256

// New checks the config. It starts nothing.
func New(c Config) (*Agent, error) {
	switch {
	case c.Server == "", c.Listener == nil, c.TrustDomain.IsZero():
		return nil, errors.New("agent: Server, Listener and TrustDomain are required")
	case c.Anchor == nil, c.Token == nil, c.Log == nil, c.Metrics == nil:
		return nil, errors.New("agent: Anchor, Token, Log and Metrics are required")
	}
	a := &Agent{config: c, identities: newIdentities(c.TrustDomain), begun: time.Now(), served: make(map[*served]struct{})}
	var err error
	a.workload, err = workload.New(workload.Config{Source: a.identities, PodOf: c.PodOf, Log: c.Log})
	if err != nil {
		return nil, err
	}
	if a.metrics, err = newMetrics(c.Metrics, a); err != nil {
		return nil, err
	}
	if a.proxied, err = proxy.NewMetrics(c.Metrics); err != nil {
		return nil, err
	}
	a.peers = proxy.NewPeers(maxPeers)
	if c.DataPath == nil {
		return a, nil
	}
	asked, err := directory.NewMetrics(c.Metrics)
	if err != nil {
		return nil, err
	}
	if a.directory, err = directory.New(directory.Config{Log: c.Log, Metrics: asked}); err != nil {
		return nil, err
	}
	a.balancer = proxy.NewBalancer(maxAffine)
	if a.pool, err = proxy.NewPool(proxy.PoolConfig{Log: c.Log, Metrics: a.proxied, Registerer: c.Metrics}); err != nil {
		return nil, err
	}
	if a.pods, err = a.newPods(c.DataPath); err != nil {
		return nil, err
	}
	return a, a.capturedMetrics(c.Metrics)
}

// Run serves the Workload API and keeps it supplied until ctx ends, and captures
// the node's pods if it is to. It fails if a socket cannot be served. A control plane that cannot be reached is no
// error: Run tries again, and serves what it has.
func (a *Agent) Run(ctx context.Context) error {
	if a.pods != nil {
		lingering, ended := a.linger(ctx)
		defer ended()
		ctx = lingering
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return a.workload.Serve(ctx, a.config.Listener) })
	group.Go(func() error { return a.converse(ctx) })
	if a.pods != nil {
		group.Go(func() error {
			err := a.pods.Run(ctx)
			// Nothing is left in the tunnels: every pod's traffic has ended.
			return errors.Join(err, a.pool.Shutdown(context.WithoutCancel(ctx)))
		})
		group.Go(func() error { return cni.Serve(ctx, a.config.DataPath.CNI, a.pods, a.config.Log) })
	}
	return group.Wait()
}

// Health returns the handler of the plain HTTP port: /livez says that the process
// runs, /readyz whether it knows its node's workloads, and /metrics what it did.
func (a *Agent) Health(metrics prometheus.Gatherer) http.Handler {
	return health.Handler(a.ready, metrics)
}

func (a *Agent) ready() error {
	if !a.identities.inSync() {
		return errors.New("agent: the control plane has not said yet what runs on this node")
	}
	return nil
}
