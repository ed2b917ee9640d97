// Package proxy is the L4 data path, in the order the bytes flow: what a pod sends is
// carried to whom it means, and nobody else; what reaches it is judged by the pod's
// mTLS policy, and passed on to the application or turned away.
//
// Start with [NewOutbound], which is the way out of a pod, and [NewInbound], which is the
// way into one: [Inbound.ServePlaintext] for those who speak no mTLS,
// [Inbound.ServeTunnels] for those who do. outbound.go takes what a pod sends from its
// arrival to its end, balance.go chooses among endpoints, pool.go has the tunnels to
// them and renew.go renews their proofs. inbound.go takes what reaches a pod, tunnels.go
// what comes in tunnels; live.go holds connections to the policy and proof.go tunnels to
// what their two ends have shown each other. relay.go moves the bytes. [Peers] remembers
// who speaks plaintext: whom STRICT would turn away.
//
// It guarantees that the application does not hear of a connection before it may
// pass, and that a connection lives only while it may: it is decided again on every
// change of the policy, of the trust in the peer and of the pod's own identity, and cut
// if it no longer passes. What the two ends do to each other goes through, an end as
// an end and a reset as a reset, so that nobody takes half an answer for a whole one.
//
// It refuses whatever it does not know: the policy, the source, the destination, the
// peer. Whoever is turned away gets a reset, and not a byte.
package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"troth.dev/troth/internal/latest"
	"troth.dev/troth/policy"
)

// InboundConfig is what an [Inbound] is made of. Every field is required unless it
// says otherwise.
type InboundConfig struct {
	// Identity is who the pod is. ServeTunnels needs it; without, nobody gets a tunnel.
	Identity *latest.Value[Identity]
	// Policy is the one in force for the pod. A nil Effective refuses everything.
	Policy *latest.Value[*policy.Effective]
	// Kubelet is the addresses that the node's own probes come from, which pass
	// under STRICT too. Optional; without any, no probe is exempt.
	Kubelet *latest.Value[[]netip.Addr]
	// Destination says which address and container port the caller of a captured
	// connection meant. It is called once for each, from many goroutines.
	Destination func(net.Conn) (netip.AddrPort, error)
	// Dial connects to the application, which sees source as the address of its
	// caller. Its context ends after 5 seconds, or as soon as the connection no longer
	// passes. What it returns must be of TCP.
	Dial func(ctx context.Context, source netip.Addr, destination netip.AddrPort) (net.Conn, error)
	// Own is the ports that the data path itself has in the pod: nothing is passed on
	// to them, or it would call itself without end. Optional: the port of a listener is
	// one of them anyway.
	Own []uint16
	// Limit is how many connections are open at a time, and how many tunnels. One
	// beyond it is reset. Zero means 4096. Each takes up to six file descriptors.
	Limit int
	// Drain is for how long connections may go on when serving ends. Zero is not at
	// all.
	Drain time.Duration
	// Peers is told of the plaintext that passes. Optional.
	Peers *Peers
	// Pod is the UID of the pod, for Peers and the log. Optional.
	Pod string
	// Log gets one line for each connection, at its end, and one for each tunnel that
	// did not come about. Those beyond Limit share a line in a second.
	Log     *slog.Logger
	Metrics *Metrics
}

// Inbound is the way into one pod.
type Inbound struct {
	config  InboundConfig // immutable after NewInbound
	log     *slog.Logger
	open    atomic.Int64 // connections, never more than config.Limit
	tunnels atomic.Int64 // never more than config.Limit

	mu      sync.Mutex
	serving map[*live]*tunnels // what is being served; the tunnels of plaintext are nil; guarded by mu
}

// NewInbound checks the config. It starts nothing.
func NewInbound(c InboundConfig) (*Inbound, error) {
	switch {
	case c.Policy == nil, c.Destination == nil, c.Dial == nil:
		return nil, errors.New("proxy: Policy, Destination and Dial are required")
	case c.Log == nil, c.Metrics == nil:
		return nil, errors.New("proxy: Log and Metrics are required")
	case c.Limit < 0, c.Drain < 0:
		return nil, fmt.Errorf("proxy: negative Limit %d or Drain %v", c.Limit, c.Drain)
	case c.Limit == 0:
		c.Limit = 4096
	}
	if c.Identity == nil {
		c.Identity = latest.New(Identity{})
	}
	if c.Kubelet == nil {
		c.Kubelet = new(latest.Value[[]netip.Addr])
	}
	return &Inbound{
		config: c, serving: make(map[*live]*tunnels),
		log: c.Log.With("direction", DirectionInbound, "pod", c.Pod),
	}, nil
}

// ServePlaintext passes on the connections that l accepts and the policy allows,
// until ctx ends. Then it closes l, lets connections go on for as long as
// InboundConfig.Drain, resets those that are left, and returns nil once the last has
// ended. An error of l makes it wait and try again. It fails only if l is closed by
// somebody else; then every connection is reset at once. It may be called for several
// listeners, which share the limit.
func (i *Inbound) ServePlaintext(ctx context.Context, l net.Listener) error {
	live := newLive(&i.config)
	own := portOf(l)
	overflow := flood{log: i.log, message: "plaintext connections reset"}
	return i.serve(ctx, l, live, nil, func(caller stream, running *sync.WaitGroup) {
		c := &connection{
			protocol: Plaintext, source: addressOf(caller.RemoteAddr()), begun: time.Now(),
			abort: func() { reset(caller) },
		}
		if !i.begin(c) {
			reset(caller)
			overflow.note("limit", i.config.Limit, "reason", limitReached)
			return
		}
		running.Go(func() { i.carry(ctx, live, c, &arrival{i: i, caller: caller, own: own}) })
	})
}

// serve hands over what l accepts, and sees to its end.
func (i *Inbound) serve(ctx context.Context, l net.Listener, live *live, tunnels *tunnels,
	handle func(caller stream, running *sync.WaitGroup),
) error {
	i.mu.Lock()
	i.serving[live] = tunnels
	i.mu.Unlock()
	keeping, stop := context.WithCancel(context.WithoutCancel(ctx))
	var keepers sync.WaitGroup
	keepers.Go(func() { live.keep(keeping) })
	if tunnels != nil {
		keepers.Go(func() { tunnels.keep(keeping) })
	}
	err := serve(ctx, l, i.log, i.config.Drain, handle, tunnels.retire, func() {
		live.cutAll()
		tunnels.closeAll()
	})
	stop()
	keepers.Wait()
	i.mu.Lock()
	delete(i.serving, live)
	i.mu.Unlock()
	return err
}

// Why a connection ended as it did, where that is not the policy's reason.
const (
	limitReached       policy.Reason = "LIMIT_REACHED"       // too many were open when it came
	destinationUnknown policy.Reason = "DESTINATION_UNKNOWN" // nobody can say whom it is for
	destinationRefused policy.Reason = "DESTINATION_REFUSED" // it is for somebody else, or for the proxy itself
	dialFailed         policy.Reason = "DIAL_FAILED"         // the application cannot be reached
	policyChanged      policy.Reason = "POLICY_CHANGED"      // it passed, and no longer does
	connectionBroken   policy.Reason = "CONNECTION_BROKEN"   // an end reset it, or the network failed
	agentStopped       policy.Reason = "AGENT_STOPPED"       // the proxy ended
)

// dialTimeout bounds what a connection waits for the application, in the same pod.
const dialTimeout = 5 * time.Second

// way is how a connection came, and what its caller is told.
type way interface {
	// destination says whom the caller means, or why that cannot be said.
	destination() (netip.AddrPort, policy.Reason, error)
	// refuse turns the caller away.
	refuse(reason policy.Reason)
	// relay tells the caller that the application is there, and moves the bytes until
	// both have ended.
	relay(app stream, in, out func(n int64)) error
}

// arrival is a connection that came by itself, in plaintext.
type arrival struct {
	i      *Inbound
	caller stream
	own    uint16 // the port that it was captured on
}

func (a *arrival) destination() (netip.AddrPort, policy.Reason, error) {
	destination, err := a.i.config.Destination(a.caller)
	if err != nil {
		return netip.AddrPort{}, destinationUnknown, err
	}
	if err := a.i.check(destination, a.own); err != nil {
		return netip.AddrPort{}, destinationUnknown, err
	}
	return netip.AddrPortFrom(destination.Addr().Unmap(), destination.Port()), "", nil
}

func (a *arrival) refuse(policy.Reason) { reset(a.caller) }

func (a *arrival) relay(app stream, in, out func(n int64)) error {
	r := relay{caller: a.caller, app: app, in: in, out: out}
	return r.run()
}

// begin counts a connection as open, unless there are too many.
func (i *Inbound) begin(c *connection) bool {
	if i.open.Add(1) > int64(i.config.Limit) {
		i.open.Add(-1)
		i.config.Metrics.turnedAway(DirectionInbound, c.protocol, limitReached)
		return false
	}
	i.config.Metrics.began(DirectionInbound)
	return true
}

// carry takes a connection that has begun to its end.
func (i *Inbound) carry(ctx context.Context, live *live, c *connection, w way) {
	// The end of ctx ends a connection through live alone, which knows the reason.
	ctx, c.stop = context.WithCancel(context.WithoutCancel(ctx))
	defer c.stop()
	i.pass(ctx, live, c, w)
	reason, by, err := live.leave(c)

	i.open.Add(-1)
	i.config.Metrics.ended(DirectionInbound, c.protocol, reason)
	level := slog.LevelInfo // to turn away whom the policy turns away is no fault
	if reason == destinationUnknown || reason == dialFailed {
		level = slog.LevelWarn
	}
	attrs := make([]slog.Attr, 0, 12)
	attrs = append(attrs,
		slog.String("protocol", c.protocol.String()),
		slog.String("source", c.source.String()), slog.String("destination", c.destination.String()))
	if !c.peer.IsZero() {
		attrs = append(attrs, slog.String("peer", c.peer.String()))
	}
	attrs = append(attrs,
		slog.Int64("bytes_in", c.in.Load()), slog.Int64("bytes_out", c.out.Load()),
		slog.Duration("duration", time.Since(c.begun)),
		slog.String("reason", string(reason)), slog.String("policy", by.String()))
	if err != nil {
		attrs = append(attrs, slog.Any("err", err))
	}
	i.log.LogAttrs(ctx, level, "connection ended", attrs...)
}

// pass takes a connection from its arrival to its end. Both ends of it are closed when
// it returns, and c says why.
func (i *Inbound) pass(ctx context.Context, live *live, c *connection, w way) {
	// 1. Whom the caller means.
	destination, reason, err := w.destination()
	if reason != "" {
		live.fail(c, reason, err)
		w.refuse(reason)
		return
	}
	c.destination = destination

	// 2. Whether it may pass, now and on every change from here on.
	if reason := live.admit(c); reason != "" {
		w.refuse(reason)
		return
	}

	// 3. The application, which has not heard of it until now.
	app, err := i.dial(ctx, c)
	if err != nil {
		live.fail(c, dialFailed, err)
		w.refuse(dialFailed)
		return
	}
	if !live.connect(c, app) {
		reset(app)
		return
	}

	// 4. The bytes.
	err = w.relay(app,
		func(n int64) { c.in.Add(n); i.config.Metrics.in.Add(float64(n)) },
		func(n int64) { c.out.Add(n); i.config.Metrics.out.Add(float64(n)) })
	if err != nil {
		live.fail(c, connectionBroken, err)
	}
}

// check returns why a connection that came to the port own cannot be for destination.
func (i *Inbound) check(destination netip.AddrPort, own uint16) error {
	switch {
	case !destination.IsValid() || destination.Port() == 0:
		return fmt.Errorf("%v is no destination", destination)
	case destination.Port() == own || slices.Contains(i.config.Own, destination.Port()):
		// Somebody called a port of the proxy itself, where nothing was captured. To
		// dial it would be to call ourselves without end.
		return errors.New("it was meant for the proxy")
	}
	return nil
}

func (i *Inbound) dial(ctx context.Context, c *connection) (stream, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	app, err := i.config.Dial(ctx, c.source.Addr(), c.destination)
	if err != nil {
		return nil, err
	}
	return asStream(app)
}

// Connections returns the connections that are open now, in no order.
func (i *Inbound) Connections() []Connection {
	i.mu.Lock()
	defer i.mu.Unlock()
	var out []Connection
	for live := range i.serving {
		out = append(out, live.list()...)
	}
	return out
}

// Tunnels returns the tunnels that are open now, in no order.
func (i *Inbound) Tunnels() []Tunnel {
	i.mu.Lock()
	defer i.mu.Unlock()
	var out []Tunnel
	for _, tunnels := range i.serving {
		if tunnels != nil {
			out = append(out, tunnels.list()...)
		}
	}
	return out
}

// flood is a kind of event of which there may be any number: it is logged once in a
// second, with how many there were.
type flood struct {
	log     *slog.Logger
	message string

	mu      sync.Mutex
	count   int       // that no line was written for; guarded by mu
	written time.Time // when the last line was; guarded by mu
}

func (f *flood) note(attrs ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.count++
	if time.Since(f.written) >= time.Second {
		f.log.Warn(f.message, append(attrs, "count", f.count)...)
		f.count, f.written = 0, time.Now()
	}
}

// addressOf returns an address of TCP, and nothing of any other.
func addressOf(a net.Addr) netip.AddrPort {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	from := tcp.AddrPort()
	return netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
}

func portOf(l net.Listener) uint16 { return addressOf(l.Addr()).Port() }
