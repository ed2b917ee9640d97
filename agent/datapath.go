package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"troth.dev/troth/agent/capture"
	"troth.dev/troth/agent/pods"
	"troth.dev/troth/agent/proxy"
	"troth.dev/troth/agent/workload"
	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/handshake"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/policy"
)

// DataPath is what an agent needs to capture the pods of its node. It takes root.
type DataPath struct {
	// CNI is the socket on which troth-cni asks for pods to be captured. Run closes it.
	CNI net.Listener
	// Records is a folder where it is written down which pods are captured.
	Records string
	// HostRoot is where the host's files are; empty means by the host's first process.
	HostRoot string
	// RefuseUnknown is whether pods may call nobody but whom the control plane knows.
	RefuseUnknown bool
	// Keeper keeps the sockets of the pods while no agent runs; optional.
	Keeper *capture.Keeper
}

// newPods is the node's pods, captured as the control plane wants it.
func (a *Agent) newPods(d *DataPath) (*pods.Pods, error) {
	return pods.New(pods.Config{
		Records:  d.Records,
		HostRoot: d.HostRoot,
		Wanted:   a.wanted,
		Changed: func() <-chan struct{} {
			_, changed := a.identities.changed.Load()
			return changed
		},
		Serve: func(ctx context.Context, podUID string, n *capture.Network) error {
			return a.ServePod(ctx, podUID, capturedBy(n))
		},
		Keeper: d.Keeper,
		Log:    a.config.Log,
	})
}

// wanted says whether a pod is to be captured, once the control plane has told of it.
func (a *Agent) wanted(ctx context.Context, podUID string) (want bool, reason string, err error) {
	f, release := a.identities.follow(podUID)
	defer release()
	for {
		w, changed := f.capture.Load()
		if w.here {
			return w.capture == trothv1.Capture_CAPTURE_ENABLED, captureName(w.capture), nil
		}
		// A pod that is not among those of the node may be gone, or so new that the
		// control plane has not told of it yet.
		select {
		case <-changed:
		case <-ctx.Done():
			return false, "", fmt.Errorf("agent: the control plane has not told of pod %q: %w", podUID, ctx.Err())
		}
	}
}

func captureName(c trothv1.Capture) string {
	return strings.ToLower(strings.TrimPrefix(c.String(), "CAPTURE_"))
}

// capturedBy is the traffic of a pod whose network is n.
func capturedBy(n *capture.Network) Captured {
	return Captured{
		Outbound:    n.Listener(capture.OutboundPort),
		Plaintext:   n.Listener(capture.PlaintextPort),
		HBONE:       n.Listener(capture.HBONEPort),
		CallerFirst: n.Listener(capture.CallerFirstPort),
		Destination: capture.Destination,
		ResetOlder:  n.ResetOlder,
		Dial: func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
			return orNil(n.Dial(ctx, to))
		},
		DialFrom: func(ctx context.Context, from netip.Addr, to netip.AddrPort) (net.Conn, error) {
			return orNil(n.DialFrom(ctx, from, to))
		},
	}
}

// orNil keeps a nil *net.TCPConn out of an interface.
func orNil(c *net.TCPConn, err error) (net.Conn, error) {
	if err != nil {
		return nil, err
	}
	return c, nil
}

// Captured is a pod's traffic. Each listener is optional, and is closed by ServePod.
type Captured struct {
	// Outbound accepts what the pod sends. It takes a DataPath to know where to.
	Outbound net.Listener
	// Plaintext accepts what reaches the pod outside of a tunnel.
	Plaintext net.Listener
	// HBONE and CallerFirst accept tunnels, in the order of their names.
	HBONE, CallerFirst net.Listener
	// Destination says which address and port the caller of a captured connection
	// meant.
	Destination func(net.Conn) (netip.AddrPort, error)
	// Dial connects from the pod to anywhere, uncaptured. Only Outbound needs it.
	Dial func(ctx context.Context, destination netip.AddrPort) (net.Conn, error)
	// ResetOlder resets connections into the pod that are older than its capture, and
	// returns how many; optional. Nothing else is known of them.
	ResetOlder func() (int, error)
	// DialFrom connects to the pod's application, which sees source as its caller.
	DialFrom func(ctx context.Context, source netip.Addr, destination netip.AddrPort) (net.Conn, error)
}

// ServePod carries the pod's traffic, as its identity and its policy let it, and cuts
// what they no longer let through, until ctx ends. Then connections may go on for as
// long as Config.Drain, and it returns. Of both the agent learns from the control
// plane; before it has, and after the pod is gone, nothing passes.
func (a *Agent) ServePod(ctx context.Context, podUID string, c Captured) error {
	f, release := a.identities.follow(podUID)
	defer release()
	inbound, err := proxy.NewInbound(proxy.InboundConfig{
		Identity:    &f.identity,
		Policy:      &f.policy,
		Kubelet:     a.config.Kubelet,
		Destination: c.Destination,
		Dial:        c.DialFrom,
		Own:         ownPorts(),
		Drain:       a.lastDrain(),
		Peers:       a.peers,
		Pod:         podUID,
		Log:         a.config.Log,
		Metrics:     a.proxied,
	})
	if err != nil {
		return err
	}
	var outbound *proxy.Outbound
	if c.Outbound != nil && a.directory != nil {
		outbound, err = proxy.NewOutbound(proxy.OutboundConfig{
			Identity:      &f.identity,
			Directory:     a.directory,
			Balancer:      a.balancer,
			Pool:          a.pool,
			Destination:   c.Destination,
			Dial:          c.Dial,
			RefuseUnknown: a.config.DataPath.RefuseUnknown,
			Own:           ownPorts(),
			Drain:         a.lastDrain(),
			Pod:           podUID,
			Log:           a.config.Log,
			Metrics:       a.proxied,
		})
		if err != nil {
			return err
		}
	}
	f.settle(ctx)
	defer a.serving(inbound, outbound)()
	group, ctx := errgroup.WithContext(ctx)
	if c.ResetOlder != nil {
		group.Go(func() error { a.resetOlder(ctx, podUID, &f.policy, c.ResetOlder); return nil })
	}
	if c.Plaintext != nil {
		group.Go(func() error { return inbound.ServePlaintext(ctx, c.Plaintext) })
	}
	if c.HBONE != nil {
		group.Go(func() error { return inbound.ServeTunnels(ctx, c.HBONE, handshake.Standard) })
	}
	if c.CallerFirst != nil {
		group.Go(func() error { return inbound.ServeTunnels(ctx, c.CallerFirst, handshake.CallerFirst) })
	}
	if outbound != nil {
		group.Go(func() error { return outbound.Serve(ctx, c.Outbound) })
	}
	return group.Wait()
}

// lastDrain is for how long connections may go on while no new ones are taken. What is
// served by Run has had the rest of Config.Drain before.
func (a *Agent) lastDrain() time.Duration {
	if a.pods == nil {
		return a.config.Drain
	}
	return a.config.Drain / 10
}

// linger returns a context that ends after ctx: when the node carries no connection, or
// the time to drain is up but for the last of it. Connections wait while nobody takes
// them, and that is to be short.
func (a *Agent) linger(ctx context.Context) (lingering context.Context, ended func()) {
	const look = 50 * time.Millisecond
	lingering, ended = context.WithCancel(context.WithoutCancel(ctx))
	go func() {
		defer ended()
		select {
		case <-ctx.Done():
		case <-lingering.Done():
			return
		}
		poll := time.NewTicker(look)
		defer poll.Stop()
		end := time.Now().Add(a.config.Drain - a.lastDrain())
		for time.Now().Before(end) && len(a.Connections()) > 0 {
			select {
			case <-poll.C:
			case <-lingering.Done():
				return
			}
		}
	}()
	return lingering, ended
}

// resetOlder ends what was connected to the pod before it was captured, whenever its
// policy becomes one that might not have let it in.
func (a *Agent) resetOlder(ctx context.Context, podUID string, inForce *latest.Value[*policy.Effective], reset func() (int, error)) {
	for {
		effective, changed := inForce.Load()
		strict := func(m policy.PortMode) bool { return m.Mode == policy.Strict }
		if effective != nil && (effective.Mode == policy.Strict || slices.ContainsFunc(effective.Ports, strict)) {
			count, err := reset()
			if count > 0 || err != nil {
				a.config.Log.LogAttrs(ctx, slog.LevelInfo, "connections older than the capture were reset",
					slog.String("pod", podUID), slog.Int("count", count), slog.Any("err", err))
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// settleTimeout bounds what connections wait for the pod's identity. The other end of a
// tunnel waits no longer for a handshake.
const settleTimeout = 8 * time.Second

// settle returns once it is known who the pod is and what its policy, or settleTimeout
// later, or when ctx ends. An agent that has just started, or a pod, is without for a
// moment: what arrives meanwhile waits at its socket, and is not refused for that.
func (f *follower) settle(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	for {
		state, changed := f.state.Load()
		if state.Status != workload.StatusUnknown && state.Status != workload.StatusPending {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

func ownPorts() []uint16 {
	return []uint16{capture.OutboundPort, capture.PlaintextPort, capture.HBONEPort, capture.CallerFirstPort}
}

// served is the traffic of one pod, while it is served.
type served struct {
	inbound  *proxy.Inbound
	outbound *proxy.Outbound // nil if what the pod sends is not captured
}

// serving has the agent know of what is served, until done is called.
func (a *Agent) serving(in *proxy.Inbound, out *proxy.Outbound) (done func()) {
	s := &served{in, out}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.served[s] = struct{}{}
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.served, s)
	}
}
