package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/agent/hbone"
	"troth.dev/troth/handshake"
	"troth.dev/troth/policy"
)

// tunnels is the tunnels into one pod that came to one listener.
type tunnels struct {
	i     *Inbound
	live  *live // of the connections in them
	order handshake.Order
	own   uint16             // the port that they came to
	stop  context.CancelFunc // ends the handshakes that are under way

	mu      sync.Mutex
	all     map[*tunnel]struct{} // guarded by mu
	secrets map[string]*tunnel   // by which the caller names each; guarded by mu
	retired bool                 // guarded by mu; a tunnel that comes about is one to be left
	stopped bool                 // guarded by mu; no tunnel comes about any more
}

// tunnel is one tunnel whose handshake succeeded.
type tunnel struct {
	proof  *proof
	conn   *handshake.Conn
	secret string
	begun  time.Time
	close  context.CancelFunc // ends it and all that is in it
	retire func()             // has the caller open no more connections in it

	ended policy.Reason // guarded by live.mu; why nothing passes in it any more
	err   error         // guarded by live.mu
}

// handshakeLimit is how many handshakes are under way at a time for one pod: each
// costs a millisecond of CPU time to whoever asks for it and to us.
const handshakeLimit = 256

// Why a tunnel does not come about, if it is not the handshake's own reason.
const (
	identityMissing policy.Reason = "IDENTITY_MISSING" // the pod has no SVID, and nobody can be shown one
	handshakeFailed policy.Reason = "HANDSHAKE_FAILED"
)

// ServeTunnels takes the tunnels that peers open to l, with the pod's identity and
// in the order given, and passes on the connections in them that the policy allows:
// to the pod, at the address that the tunnel came to, and nowhere else. It ends as
// ServePlaintext does. A tunnel ends, with all that is in it, when what its ends have
// shown each other no longer holds.
func (i *Inbound) ServeTunnels(ctx context.Context, l net.Listener, order handshake.Order) error {
	live := newLive(&i.config)
	// The end of ctx is no end of a handshake: what has arrived may finish.
	shakes, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	t := &tunnels{
		i: i, live: live, order: order, own: portOf(l), stop: stop,
		all: make(map[*tunnel]struct{}), secrets: make(map[string]*tunnel),
	}
	protocol := t.protocol()
	overflow := flood{log: i.log, message: "tunnels reset"}
	failures := flood{log: i.log, message: "tunnels that did not come about"}
	shaking := make(chan struct{}, handshakeLimit)
	return i.serve(ctx, l, live, t, func(caller stream, running *sync.WaitGroup) {
		var full bool
		select {
		case shaking <- struct{}{}:
			full = i.tunnels.Add(1) > int64(i.config.Limit)
		default:
			full = true
			i.tunnels.Add(1)
		}
		if full {
			i.tunnels.Add(-1)
			i.config.Metrics.turnedAway(DirectionInbound, protocol, limitReached)
			reset(caller)
			overflow.note("limit", i.config.Limit, "reason", limitReached)
			return
		}
		running.Go(func() {
			defer i.tunnels.Add(-1)
			one, reason, err := t.shake(shakes, caller)
			<-shaking
			if err != nil {
				i.config.Metrics.turnedAway(DirectionInbound, protocol, reason)
				failures.note("protocol", protocol.String(), "source", addressOf(caller.RemoteAddr()), "reason", reason, "err", err)
				return
			}
			t.carry(ctx, one)
		})
	})
}

func (t *tunnels) protocol() Protocol {
	if t.order == handshake.CallerFirst {
		return Troth
	}
	return HBONE
}

// shake performs the handshake. caller is closed if it fails.
func (t *tunnels) shake(ctx context.Context, caller stream) (*tunnel, policy.Reason, error) {
	identity, _ := t.i.config.Identity.Load()
	if identity.SVID == nil || identity.Bundles == nil {
		reset(caller)
		return nil, identityMissing, errors.New("the pod has no SVID")
	}
	conn, err := handshake.Accept(ctx, hbone.Buffer(caller), &handshake.Config{
		Order: t.order, SVID: identity.SVID, Bundles: identity.Bundles,
	}, anyPeer)
	t.i.config.Metrics.shook(DirectionInbound, t.order, err)
	if err != nil {
		return nil, handshakeFailed, err
	}
	one := &tunnel{proof: newProof(conn, identity), conn: conn, begun: time.Now()}
	if one.secret, err = one.proof.secret(renewedByCaller); err != nil {
		conn.Close()
		return nil, handshakeFailed, err
	}
	return one, "", nil
}

// anyPeer lets everybody have a tunnel whose SVID is good. Which connections pass in
// it is decided for each.
func anyPeer(spiffeid.ID) error { return nil }

// carry serves a tunnel until it ends.
func (t *tunnels) carry(ctx context.Context, one *tunnel) {
	ctx, one.close = context.WithCancel(context.WithoutCancel(ctx))
	defer one.close()
	retired := make(chan struct{})
	one.retire = sync.OnceFunc(func() { close(retired) })
	if !t.add(one) {
		one.conn.Close()
		return
	}
	t.i.config.Metrics.tunnels.WithLabelValues(string(DirectionInbound)).Inc()
	err := hbone.Serve(ctx, one.conn, hbone.Config{Drain: retired}, func(r *hbone.Request) { t.request(ctx, one, r) })
	t.remove(one)
	t.i.config.Metrics.tunnels.WithLabelValues(string(DirectionInbound)).Dec()
	reason, cause := t.live.tunnelEnd(one)
	if cause != nil {
		err = cause
	}
	attrs := []slog.Attr{
		slog.String("protocol", t.protocol().String()), slog.String("peer", one.proof.peer.String()),
		slog.String("source", one.conn.RemoteAddr().String()), slog.Duration("duration", time.Since(one.begun)),
	}
	if reason != "" {
		attrs = append(attrs, slog.String("reason", string(reason)))
	}
	if err != nil {
		attrs = append(attrs, slog.Any("err", err))
	}
	t.i.log.LogAttrs(ctx, slog.LevelDebug, "tunnel ended", attrs...)
}

func (t *tunnels) add(one *tunnel) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.stopped {
		return false
	}
	t.all[one] = struct{}{}
	t.secrets[one.secret] = one
	if t.retired {
		one.retire()
	}
	return true
}

func (t *tunnels) remove(one *tunnel) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.all, one)
	delete(t.secrets, one.secret)
}

// request takes one CONNECT to its end.
func (t *tunnels) request(ctx context.Context, one *tunnel, r *hbone.Request) {
	if r.Authority == renewAuthority && t.order == handshake.CallerFirst {
		t.renew(one, r)
		return
	}
	q := &requested{t: t, one: one, r: r}
	c := &connection{
		protocol: t.protocol(), source: addressOf(one.conn.RemoteAddr()), peer: one.proof.peer,
		tunnel: one, begun: time.Now(), abort: q.abort,
	}
	if !t.i.begin(c) {
		q.refuse(limitReached)
		return
	}
	t.i.carry(ctx, t.live, c, q)
}

// requested is a connection that came in a tunnel.
type requested struct {
	t   *tunnels
	one *tunnel
	r   *hbone.Request

	mu       sync.Mutex
	answered bool          // guarded by mu
	stream   *hbone.Stream // guarded by mu; nil before it is accepted
}

// destination is what the caller names, which has to be the pod: a tunnel is proved
// to be between the caller and this pod.
func (q *requested) destination() (netip.AddrPort, policy.Reason, error) {
	destination, err := netip.ParseAddrPort(q.r.Authority)
	if err != nil {
		return netip.AddrPort{}, destinationUnknown, fmt.Errorf("the caller names %.100q", q.r.Authority)
	}
	destination = netip.AddrPortFrom(destination.Addr().Unmap(), destination.Port())
	if err := q.t.i.check(destination, q.t.own); err != nil {
		return destination, destinationRefused, err
	}
	if here := addressOf(q.one.conn.LocalAddr()).Addr(); destination.Addr() != here {
		return destination, destinationRefused, fmt.Errorf("the caller names %v in a tunnel to %v", destination, here)
	}
	return destination, "", nil
}

func (q *requested) refuse(reason policy.Reason) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.answered {
		return
	}
	q.answered = true
	status := http.StatusUnauthorized
	switch reason {
	case destinationUnknown, destinationRefused:
		status = http.StatusBadRequest
	case dialFailed, limitReached, agentStopped:
		status = http.StatusServiceUnavailable
	}
	_ = q.r.Refuse(status) // fails only if the tunnel has ended, and then nobody waits for it
}

// abort ends it whatever it is waiting for.
func (q *requested) abort() {
	q.mu.Lock()
	accepted := q.stream
	q.mu.Unlock()
	if accepted != nil {
		_ = accepted.Reset() // fails only if it has ended
		return
	}
	q.refuse(policyChanged)
}

func (q *requested) relay(app stream, in, out func(n int64)) error {
	q.mu.Lock()
	if q.answered {
		q.mu.Unlock()
		reset(app)
		return nil // it was cut, and whoever did it has said why
	}
	q.answered = true
	accepted, err := q.r.Accept(nil)
	q.stream = accepted
	q.mu.Unlock()
	if err != nil {
		reset(app)
		return err
	}
	return accepted.Relay(app, out, in)
}

// keep holds every tunnel to what its ends have shown each other, until ctx ends.
func (t *tunnels) keep(ctx context.Context) {
	for {
		identity, changed := t.i.config.Identity.Load()
		again := time.NewTimer(t.check(identity))
		select {
		case <-changed:
		case <-again.C:
		case <-ctx.Done():
			again.Stop()
			return
		}
		again.Stop()
	}
}

// nap is how long a wait for a time of the wall clock may be, before that clock is
// looked at again: timers stand still while a machine sleeps.
const nap = 5 * time.Second

// check ends what no longer holds, has callers leave tunnels that were made with an
// SVID which is not the newest, and returns when to look again.
func (t *tunnels) check(identity Identity) time.Duration {
	t.mu.Lock()
	all := make([]*tunnel, 0, len(t.all))
	for one := range t.all {
		all = append(all, one)
	}
	t.mu.Unlock()
	next := nap
	for _, one := range all {
		now := time.Now()
		reason, err := one.proof.check(identity, now)
		if reason == "" {
			if !one.proof.madeBy(identity.SVID) {
				one.retire()
			}
			next = min(next, one.proof.until().Sub(now))
			continue
		}
		t.live.cutTunnel(one, reason, err)
		one.close()
	}
	return next
}

// retire has the callers of all tunnels open no more connections in them, now and from
// now on. A tunnel ends with the last connection in it.
func (t *tunnels) retire() {
	if t == nil {
		return // plaintext has none
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.retired = true
	for one := range t.all {
		one.retire()
	}
}

// closeAll ends every tunnel, now and from now on.
func (t *tunnels) closeAll() {
	if t == nil {
		return // plaintext has none
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.stopped = true
	t.stop()
	for one := range t.all {
		one.close()
	}
}

// renewAuthority is what the caller of a tunnel names to renew another tunnel by it.
const renewAuthority = "renew"

// The headers of a renewal and of its answer.
const (
	renewHeader   = "troth-renew"
	renewedHeader = "troth-renewed"
)

// renew moves what this tunnel has proved to an older one, which the caller names by
// what only the two ends of that one know. The connections in it are the same two's as
// before: both have shown anew who they are.
func (t *tunnels) renew(by *tunnel, r *hbone.Request) {
	t.mu.Lock()
	older := t.secrets[r.Header[renewHeader]]
	t.mu.Unlock()
	if older == nil || !older.proof.renew(by.proof) {
		_ = r.Refuse(http.StatusNotFound) // fails only if the tunnel has ended
		return
	}
	answer, err := older.proof.secret(renewedByCallee)
	if err != nil {
		_ = r.Refuse(http.StatusInternalServerError)
		return
	}
	if s, err := r.Accept(hbone.Header{renewedHeader: answer}); err == nil {
		s.Close()
	}
}

// list returns the tunnels as whoever looks at the node sees them.
func (t *tunnels) list() []Tunnel {
	carried := t.live.carried()
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]Tunnel, 0, len(t.all))
	for one := range t.all {
		out = append(out, Tunnel{
			Direction: DirectionInbound, Order: t.order.String(), Pod: t.i.config.Pod,
			Remote: one.conn.RemoteAddr().String(), Own: one.proof.own.String(), Peer: one.proof.peer.String(),
			Begun: one.begun, Until: one.proof.until(), Authorities: one.proof.authorities(),
			Connections: carried[one],
		})
	}
	return out
}
