// Package proxy is the L4 data path, in the order the bytes flow: what reaches a
// pod on its captured ports is judged by the pod's mTLS policy, and passed on to
// the application or turned away.
//
// Start with [NewInbound] and [Inbound.ServePlaintext], which is the way into a pod
// for those who speak no mTLS. inbound.go takes a connection from its arrival to
// its end, live.go holds those that live to the policy, and relay.go moves the
// bytes. [Peers] remembers who speaks plaintext: whom STRICT would turn away.
//
// It guarantees that the application does not hear of a connection before it may
// pass, and that a connection lives only while it may: it is decided again on every
// change of the policy, and cut if it no longer passes. What the two ends do to
// each other goes through, an end as an end and a reset as a reset, so that
// nobody takes half an answer for a whole one.
//
// It refuses whatever it does not know: the policy, the source, the destination.
// Whoever is turned away gets a reset, and not a byte.
package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"troth.dev/troth/internal/latest"
	"troth.dev/troth/policy"
)

// InboundConfig is what an [Inbound] is made of. Every field is required unless it
// says otherwise.
type InboundConfig struct {
	// Policy is the one in force for the pod. A nil Effective refuses everything.
	Policy *latest.Value[*policy.Effective]
	// Kubelet is the addresses that the node's own probes come from, which pass
	// under STRICT too. Optional; without any, no probe is exempt.
	Kubelet []netip.Addr
	// Destination says which address and container port the caller of a captured
	// connection meant. It is called once for each, from many goroutines.
	Destination func(net.Conn) (netip.AddrPort, error)
	// Dial connects to the application. Its context ends after 5 seconds, or as
	// soon as the connection no longer passes. What it returns must be of TCP.
	Dial func(ctx context.Context, destination netip.AddrPort) (net.Conn, error)
	// Limit is how many connections are open at a time. One beyond it is reset.
	// Zero means 4096. Each takes up to six file descriptors.
	Limit int
	// Peers is told of the plaintext that passes. Optional.
	Peers *Peers
	// Pod is the UID of the pod, for Peers and the log. Optional.
	Pod string
	// Log gets one line for each connection, at its end. Those beyond Limit share
	// a line in a second.
	Log     *slog.Logger
	Metrics *Metrics
}

// Inbound is the way into one pod.
type Inbound struct {
	config InboundConfig // immutable after NewInbound
	log    *slog.Logger
	open   atomic.Int64 // connections, never more than config.Limit
}

// NewInbound checks the config. It starts nothing.
func NewInbound(c InboundConfig) (*Inbound, error) {
	switch {
	case c.Policy == nil, c.Destination == nil, c.Dial == nil:
		return nil, errors.New("proxy: Policy, Destination and Dial are required")
	case c.Log == nil, c.Metrics == nil:
		return nil, errors.New("proxy: Log and Metrics are required")
	case c.Limit < 0:
		return nil, fmt.Errorf("proxy: negative Limit %d", c.Limit)
	case c.Limit == 0:
		c.Limit = 4096
	}
	return &Inbound{config: c, log: c.Log.With("pod", c.Pod)}, nil
}

// ServePlaintext passes on the connections that l accepts and the policy allows,
// until ctx ends. Then it closes l, resets every connection, and returns nil once
// the last has ended. An error of l makes it wait and try again. It fails only if l
// is closed by somebody else; then too every connection is reset. It may be called
// for several listeners, which share the limit.
func (i *Inbound) ServePlaintext(ctx context.Context, l net.Listener) error {
	ctx, end := context.WithCancel(ctx)
	defer end()
	own, _ := l.Addr().(*net.TCPAddr)
	live := &live{config: &i.config, all: make(map[*connection]struct{})}

	var running sync.WaitGroup
	running.Go(func() {
		live.keep(ctx)
		l.Close()
		live.cutAll()
	})
	var overflow int      // connections beyond the limit that no line was written for
	var written time.Time // when the last such line was
	err := i.accept(ctx, l, func(caller stream) {
		if i.open.Add(1) > int64(i.config.Limit) {
			i.open.Add(-1)
			i.config.Metrics.connections.WithLabelValues(string(limitReached)).Inc()
			reset(caller)
			overflow++
			if time.Since(written) >= time.Second {
				i.log.Warn("plaintext connections reset", "count", overflow, "limit", i.config.Limit, "reason", limitReached)
				overflow, written = 0, time.Now()
			}
			return
		}
		i.config.Metrics.open.Inc()
		running.Go(func() { i.plaintext(ctx, live, caller, own.AddrPort().Port()) })
	})
	end()
	running.Wait()
	return err
}

// accept hands over what l accepts until ctx ends or l is closed.
func (i *Inbound) accept(ctx context.Context, l net.Listener, handle func(stream)) error {
	var pause time.Duration
	for {
		caller, err := acceptStream(l)
		switch {
		case err == nil:
			pause = 0
			handle(caller)
			continue
		case ctx.Err() != nil:
			return nil //nolint:nilerr // l was closed because ctx ended
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("proxy: accept: %w", err)
		}
		// Most likely the process or the node is out of file descriptors. To try
		// again at once would only burn what the open connections need to end.
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		i.log.Warn("cannot accept connections", "err", err, "pause", pause)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
	}
}

func acceptStream(l net.Listener) (stream, error) {
	c, err := l.Accept()
	if err != nil {
		return nil, err
	}
	return asStream(c)
}

// Why a connection ended as it did, where that is not the policy's reason.
const (
	limitReached       policy.Reason = "LIMIT_REACHED"       // too many were open when it came
	destinationUnknown policy.Reason = "DESTINATION_UNKNOWN" // nobody can say whom it is for
	dialFailed         policy.Reason = "DIAL_FAILED"         // the application cannot be reached
	policyChanged      policy.Reason = "POLICY_CHANGED"      // it passed, and no longer does
	connectionBroken   policy.Reason = "CONNECTION_BROKEN"   // an end reset it, or the network failed
	agentStopped       policy.Reason = "AGENT_STOPPED"       // the proxy ended
)

// dialTimeout bounds what a connection waits for the application, in the same pod.
const dialTimeout = 5 * time.Second

// plaintext takes one connection from its arrival to its end. own is the port that
// it was captured on. Whoever calls it has counted the connection as open.
func (i *Inbound) plaintext(ctx context.Context, live *live, caller stream, own uint16) {
	// The end of ctx ends a connection through live alone, which knows the reason.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	begun := time.Now()
	c := &connection{caller: caller, stop: cancel, source: sourceOf(caller)}
	in, out := i.carry(ctx, live, c, own)
	reason, by, err := live.leave(c)

	i.open.Add(-1)
	i.config.Metrics.open.Dec()
	i.config.Metrics.connections.WithLabelValues(string(reason)).Inc()
	level := slog.LevelInfo // to turn away whom the policy turns away is no fault
	if reason == destinationUnknown || reason == dialFailed {
		level = slog.LevelWarn
	}
	attrs := []slog.Attr{
		slog.String("source", c.source.String()), slog.String("destination", c.destination.String()),
		slog.Int64("bytes_in", in), slog.Int64("bytes_out", out),
		slog.Duration("duration", time.Since(begun)),
		slog.String("reason", string(reason)), slog.String("policy", by.String()),
	}
	if err != nil {
		attrs = append(attrs, slog.Any("err", err))
	}
	i.log.LogAttrs(ctx, level, "plaintext connection ended", attrs...)
}

// carry returns the bytes that went into the pod and out of it. Both ends of the
// connection are closed when it returns, and c says why.
func (i *Inbound) carry(ctx context.Context, live *live, c *connection, own uint16) (in, out int64) {
	// 1. Whom the caller means.
	destination, err := i.config.Destination(c.caller)
	if err == nil {
		err = check(destination, own)
	}
	if err != nil {
		live.fail(c, destinationUnknown, err)
		reset(c.caller)
		return 0, 0
	}
	c.destination = netip.AddrPortFrom(destination.Addr().Unmap(), destination.Port())

	// 2. Whether it may pass, now and on every change from here on.
	if !live.admit(c) {
		reset(c.caller)
		return 0, 0
	}

	// 3. The application, which has not heard of it until now.
	app, err := i.dial(ctx, c.destination)
	if err != nil {
		live.fail(c, dialFailed, err)
		reset(c.caller)
		return 0, 0
	}
	if !live.connect(c, app) {
		reset(app)
		return 0, 0
	}

	// 4. The bytes.
	r := relay{caller: c.caller, app: app, in: i.config.Metrics.in, out: i.config.Metrics.out}
	in, out, err = r.run()
	if err != nil {
		live.fail(c, connectionBroken, err)
	}
	return in, out
}

// check returns why a connection that was captured on the port own cannot be for
// destination.
func check(destination netip.AddrPort, own uint16) error {
	switch {
	case !destination.IsValid() || destination.Port() == 0:
		return fmt.Errorf("%v is no destination", destination)
	case destination.Port() == own:
		// Somebody called the port of the proxy itself, where nothing was captured.
		// To dial it would be to call ourselves without end.
		return errors.New("it was meant for the proxy")
	}
	return nil
}

func (i *Inbound) dial(ctx context.Context, destination netip.AddrPort) (stream, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	app, err := i.config.Dial(ctx, destination)
	if err != nil {
		return nil, err
	}
	return asStream(app)
}

// sourceOf returns where a connection comes from, and nothing if it is not TCP.
func sourceOf(c net.Conn) netip.AddrPort {
	remote, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	from := remote.AddrPort()
	return netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
}
