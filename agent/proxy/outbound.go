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

	"troth.dev/troth/agent/hbone"
	"troth.dev/troth/handshake"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/policy"
)

// OutboundConfig is what an [Outbound] is made of. Every field is required unless it
// says otherwise.
type OutboundConfig struct {
	// Identity is who the pod is. Without an SVID nothing leaves that has to be proved.
	Identity *latest.Value[Identity]
	// Directory says who is behind an address.
	Directory Directory
	// Balancer and Pool are those of the node.
	Balancer *Balancer
	Pool     *Pool
	// Destination says which address and port the pod meant by a captured connection.
	// It is called once for each, from many goroutines.
	Destination func(net.Conn) (netip.AddrPort, error)
	// Dial connects from inside the pod's network namespace to anywhere, uncaptured.
	// Its context ends after 5 seconds, or when serving ends. What it returns must be of
	// TCP.
	Dial func(ctx context.Context, destination netip.AddrPort) (net.Conn, error)
	// RefuseUnknown turns away what is for nobody that the directory knows. Otherwise
	// it leaves as it is.
	RefuseUnknown bool
	// Own is the ports that the data path itself has in the pod. Nothing that is for one
	// of them at an address of the pod is passed on, or it would call itself without
	// end. Optional: the port of a listener is one of them anyway.
	Own []uint16
	// Limit is how many connections are open at a time. One beyond it is reset. Zero
	// means 4096.
	Limit int
	// Drain is for how long connections may go on when serving ends. Zero is not at
	// all.
	Drain time.Duration
	// Pod is the UID of the pod, for its affinity and the log.
	Pod string
	// Log gets one line for each connection, at its end.
	Log     *slog.Logger
	Metrics *Metrics
}

// Outbound is the way out of one pod.
type Outbound struct {
	config OutboundConfig // immutable after NewOutbound
	log    *slog.Logger

	mu      sync.Mutex
	all     map[*outgoing]struct{} // guarded by mu; the connections that are open
	stopped bool                   // guarded by mu; every connection is cut
}

// NewOutbound checks the config. It starts nothing.
func NewOutbound(c OutboundConfig) (*Outbound, error) {
	switch {
	case c.Identity == nil, c.Directory == nil, c.Balancer == nil, c.Pool == nil:
		return nil, errors.New("proxy: Identity, Directory, Balancer and Pool are required")
	case c.Destination == nil, c.Dial == nil, c.Pod == "":
		return nil, errors.New("proxy: Destination, Dial and Pod are required")
	case c.Log == nil, c.Metrics == nil:
		return nil, errors.New("proxy: Log and Metrics are required")
	case c.Limit < 0, c.Drain < 0:
		return nil, fmt.Errorf("proxy: negative Limit %d or Drain %v", c.Limit, c.Drain)
	case c.Limit == 0:
		c.Limit = 4096
	}
	return &Outbound{
		config: c, all: make(map[*outgoing]struct{}),
		log: c.Log.With("direction", DirectionOutbound, "pod", c.Pod),
	}, nil
}

// outgoing is one connection that leaves the pod.
type outgoing struct {
	caller      stream
	source      netip.AddrPort
	destination netip.AddrPort     // zero until it is known
	stop        context.CancelFunc // ends whatever it waits for
	begun       time.Time
	in, out     atomic.Int64 // bytes, into the pod and out of it

	// All that follows is guarded by Outbound.mu, and written by the connection's own
	// goroutine alone but for end and err.
	service  string
	endpoint Endpoint      // zero until one is chosen
	remote   stream        // the other end in plaintext
	tunnel   *hbone.Stream // the other end in a tunnel
	passes   policy.Reason // once there is another end
	end      policy.Reason // the first reason to end that was not the two ends' own
	err      error         // what end is about, if there is more to say
}

// Why a connection that leaves a pod ended as it did, where no other file has a word
// for it.
const (
	mtlsSent        policy.Reason = "MTLS_SENT"        // both ends have ended it, and both were proved
	plaintextSent   policy.Reason = "PLAINTEXT_SENT"   // both ends have ended it
	egressRefused   policy.Reason = "EGRESS_REFUSED"   // the directory knows nobody there, and that is refused
	noEndpoint      policy.Reason = "NO_ENDPOINT"      // the Service has none
	protocolUnknown policy.Reason = "PROTOCOL_UNKNOWN" // this agent does not know how to call it
)

// Serve takes the connections that l accepts to whom the pod means, until ctx ends.
// Then it closes l, lets connections go on for as long as OutboundConfig.Drain, resets
// those that are left, closes the pod's tunnels and returns nil once all has ended. An
// error of l makes it wait and try again. It fails only if l is closed by somebody else;
// then every connection is reset at once. It is called once.
//
// A connection that is turned away, or whose other end breaks, is reset.
func (o *Outbound) Serve(ctx context.Context, l net.Listener) error {
	own := append(slices.Clone(o.config.Own), portOf(l))
	from := &origin{pod: o.config.Pod, identity: o.config.Identity, dial: o.dial}
	overflow := flood{log: o.log, message: "connections reset"}
	err := serve(ctx, l, o.log, o.config.Drain, func(caller stream, running *sync.WaitGroup) {
		// The end of ctx ends a connection through cutAll alone, which says so.
		ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		c := &outgoing{caller: caller, source: addressOf(caller.RemoteAddr()), begun: time.Now(), stop: cancel}
		if !o.begin(c) {
			cancel()
			o.config.Metrics.turnedAway(DirectionOutbound, 0, limitReached)
			reset(caller)
			overflow.note("limit", o.config.Limit, "reason", limitReached)
			return
		}
		running.Go(func() { o.carry(ctx, c, from, own) })
	}, func() {}, o.cutAll)
	o.config.Pool.end(from)
	return err
}

// begin makes c one of those that are open, unless there are too many.
func (o *Outbound) begin(c *outgoing) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.all) >= o.config.Limit {
		return false
	}
	o.all[c] = struct{}{}
	o.config.Metrics.began(DirectionOutbound)
	return true
}

// carry takes a connection from its arrival to its end.
func (o *Outbound) carry(ctx context.Context, c *outgoing, from *origin, own []uint16) {
	defer c.stop()
	release, failed := o.open(ctx, c, from, own)
	if failed != nil {
		o.fail(c, failed.reason, failed.err)
		reset(c.caller)
	} else {
		o.relay(c)
		release()
	}

	o.mu.Lock()
	delete(o.all, c)
	reason, err := c.end, c.err
	if reason == "" {
		reason = c.passes
	}
	o.mu.Unlock()
	o.config.Metrics.ended(DirectionOutbound, c.endpoint.Protocol, reason)
	o.report(ctx, c, reason, err)
}

// open connects c to whom the pod means.
func (o *Outbound) open(ctx context.Context, c *outgoing, from *origin, own []uint16) (release func(), failed *failure) {
	// 1. Whom the pod means.
	destination, err := o.config.Destination(c.caller)
	if err == nil && (!destination.IsValid() || destination.Port() == 0) {
		err = fmt.Errorf("%v is no destination", destination)
	}
	if err != nil {
		return nil, &failure{destinationUnknown, err, false}
	}
	destination = netip.AddrPortFrom(destination.Addr().Unmap(), destination.Port())
	o.edit(func() { c.destination = destination })
	if c.isOwn(destination, own) {
		return nil, &failure{destinationRefused, errors.New("it was meant for the proxy"), false}
	}

	// 2. Who that is.
	d, err := o.config.Directory.Resolve(ctx, destination)
	switch {
	case err != nil:
		return nil, &failure{destinationUnknown, err, false}
	case d.outside() && o.config.RefuseUnknown:
		return nil, &failure{egressRefused, nil, false}
	case len(d.Endpoints) == 0:
		o.edit(func() { c.service = d.Service })
		return nil, &failure{noEndpoint, nil, false}
	}
	o.edit(func() { c.service = d.Service })

	// 3. One of them that can be reached. Nothing that the pod sends has been read yet.
	failed = &failure{protocolUnknown, errors.New("no endpoint is called by a protocol that this agent knows"), false}
	var tried []Endpoint
	for len(tried) < maxTried {
		e, free, ok := o.config.Balancer.choose(o.config.Pod, d, destination.Port(), tried)
		if !ok {
			break
		}
		if len(tried) > 0 {
			o.config.Pool.metrics.retries.Inc()
		}
		o.edit(func() { c.endpoint = e })
		var hangUp func()
		if hangUp, failed = o.reach(ctx, c, from, own); failed == nil {
			return func() { hangUp(); free() }, nil
		}
		free()
		if !failed.safe || ctx.Err() != nil {
			break
		}
		tried = append(tried, e)
	}
	return nil, failed
}

// maxTried is how many endpoints are asked for one connection.
const maxTried = 3

// outside reports whether it is for nobody that the directory knows.
func (d *Destination) outside() bool {
	return d.Service == "" && len(d.Endpoints) == 1 && d.Endpoints[0].Pod == "" && d.Endpoints[0].Protocol == Plaintext
}

// isOwn reports whether an address is one of the proxy's own: it has none but at the
// pod's addresses.
func (c *outgoing) isOwn(address netip.AddrPort, own []uint16) bool {
	at := address.Addr().WithZone("")
	here := at.IsLoopback() || at.IsUnspecified() ||
		at == c.source.Addr().WithZone("") || at == addressOf(c.caller.LocalAddr()).Addr().WithZone("")
	return here && slices.Contains(own, address.Port())
}

// reach connects c to its endpoint, as that is called.
func (o *Outbound) reach(ctx context.Context, c *outgoing, from *origin, own []uint16) (hangUp func(), failed *failure) {
	e := c.endpoint
	if c.isOwn(e.Address, own) {
		return nil, &failure{destinationRefused, errors.New("it was meant for the proxy"), false}
	}
	r := route{from: from, peer: e.ID}
	switch e.Protocol {
	case Plaintext:
		remote, err := o.dial(ctx, e.Address)
		if err != nil {
			return nil, &failure{dialFailed, err, true}
		}
		if !o.connected(c, func() { c.remote, c.passes = remote, plaintextSent }) {
			reset(remote)
			return nil, &failure{agentStopped, nil, false}
		}
		return func() {}, nil
	case HBONE:
		r.order, r.to = handshake.Standard, netip.AddrPortFrom(e.Address.Addr(), hbonePort)
	case Troth:
		r.order, r.to = handshake.CallerFirst, netip.AddrPortFrom(e.Address.Addr(), callerFirstPort)
	default:
		return nil, &failure{protocolUnknown, nil, false}
	}
	identity, _ := from.identity.Load()
	if identity.SVID == nil {
		return nil, &failure{identityMissing, errors.New("the pod has no SVID"), false}
	}
	r.own = identity.SVID.ID
	s, t, failed := o.config.Pool.connect(ctx, r, e.Address.String())
	if failed != nil {
		return nil, failed
	}
	if !o.connected(c, func() { c.tunnel, c.passes = s, mtlsSent }) {
		_ = s.Reset() // fails only if it has ended
		o.config.Pool.release(t)
		return nil, &failure{agentStopped, nil, false}
	}
	return func() {
		// Who has closed the tunnel, if it was us, is why what is in it broke.
		if reason, err := o.config.Pool.why(t); reason != "" {
			o.edit(func() {
				if c.end == connectionBroken {
					c.end, c.err = reason, err
				}
			})
		}
		o.config.Pool.release(t)
	}, nil
}

// Where peers accept tunnels.
const (
	hbonePort       = 15008
	callerFirstPort = 15009
)

func (o *Outbound) dial(ctx context.Context, to netip.AddrPort) (stream, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	c, err := o.config.Dial(ctx, to)
	if err != nil {
		return nil, err
	}
	return asStream(c)
}

// relay moves the bytes until both ends have ended.
func (o *Outbound) relay(c *outgoing) {
	out := func(n int64) { c.out.Add(n); o.config.Metrics.out.Add(float64(n)) }
	in := func(n int64) { c.in.Add(n); o.config.Metrics.in.Add(float64(n)) }
	var err error
	if c.tunnel != nil {
		err = c.tunnel.Relay(c.caller, out, in)
	} else {
		r := relay{caller: c.caller, app: c.remote, in: out, out: in}
		err = r.run()
	}
	if err != nil {
		o.fail(c, connectionBroken, err)
	}
}

// edit changes a connection that others may be looking at.
func (o *Outbound) edit(change func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	change()
}

// connected gives c its other end, unless it was cut meanwhile.
func (o *Outbound) connected(c *outgoing, set func()) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if c.end != "" || o.stopped {
		return false
	}
	set()
	return true
}

// fail says why c ends. If it was cut, what follows from that is no reason.
func (o *Outbound) fail(c *outgoing, reason policy.Reason, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if c.end == "" {
		c.end, c.err = reason, err
	}
}

// cutAll cuts every connection, now and from now on.
func (o *Outbound) cutAll() {
	o.mu.Lock()
	o.stopped = true
	var cut []func()
	for c := range o.all {
		if c.end != "" {
			continue
		}
		c.end = agentStopped
		remote, tunnel := c.remote, c.tunnel
		cut = append(cut, func() {
			c.stop()
			reset(c.caller)
			if tunnel != nil {
				_ = tunnel.Reset() // fails only if it has ended
			}
			if remote != nil {
				reset(remote)
			}
		})
	}
	o.mu.Unlock()
	for _, end := range cut {
		end()
	}
}

// report writes the line about the end of a connection.
func (o *Outbound) report(ctx context.Context, c *outgoing, reason policy.Reason, err error) {
	level := slog.LevelWarn
	switch reason { // what goes as it should, and what somebody's policy turns away
	case mtlsSent, plaintextSent, connectionBroken, policyDeniedByPeer, egressRefused, agentStopped:
		level = slog.LevelInfo
	}
	attrs := make([]slog.Attr, 0, 14)
	attrs = append(attrs,
		slog.String("protocol", c.endpoint.Protocol.String()),
		slog.String("source", c.source.String()), slog.String("destination", c.destination.String()))
	add := func(key, value string) {
		if value != "" {
			attrs = append(attrs, slog.String(key, value))
		}
	}
	add("service", c.service)
	if c.endpoint.Address.IsValid() && c.endpoint.Address != c.destination {
		add("endpoint", c.endpoint.Address.String())
	}
	if !c.endpoint.ID.IsZero() {
		add("peer", c.endpoint.ID.String())
	}
	add("peer_pod", c.endpoint.Pod)
	attrs = append(attrs,
		slog.Int64("bytes_in", c.in.Load()), slog.Int64("bytes_out", c.out.Load()),
		slog.Duration("duration", time.Since(c.begun)), slog.String("reason", string(reason)))
	var stopped *handshake.Error
	if errors.As(err, &stopped) {
		add("code", string(stopped.Code))
	}
	if err != nil {
		attrs = append(attrs, slog.Any("err", err))
	}
	o.log.LogAttrs(ctx, level, "connection ended", attrs...)
}

// Connections returns the connections that are open now, in no order.
func (o *Outbound) Connections() []Connection {
	o.mu.Lock()
	defer o.mu.Unlock()
	out := make([]Connection, 0, len(o.all))
	for c := range o.all {
		shown := Connection{
			Direction: DirectionOutbound, Protocol: c.endpoint.Protocol.String(), Pod: o.config.Pod,
			Source: c.source.String(), Destination: c.destination.String(), Service: c.service,
			PeerPod: c.endpoint.Pod, Reason: string(c.passes),
			Begun: c.begun, In: c.in.Load(), Out: c.out.Load(),
		}
		if !c.endpoint.ID.IsZero() {
			shown.Peer = c.endpoint.ID.String()
		}
		out = append(out, shown)
	}
	return out
}
