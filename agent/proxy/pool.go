package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/agent/hbone"
	"troth.dev/troth/handshake"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/policy"
)

// PoolConfig is what a [Pool] is made of. Every field is optional
// but Log and Metrics.
type PoolConfig struct {
	// Streams is how many connections a tunnel carries at a time. Zero means 100.
	Streams int
	// PerPeer is how many tunnels there are between a pod and one peer that take more
	// connections. Zero means 64.
	PerPeer int
	// Limit is how many tunnels the node's pods have opened at a time. Zero means 4096.
	Limit int
	// Idle is for how long a tunnel without a connection is kept. Zero means 5 minutes.
	Idle    time.Duration
	Log     *slog.Logger
	Metrics *Metrics
	// Registerer gets the metrics that are the pool's own.
	Registerer prometheus.Registerer
}

// Pool is the tunnels that the pods of a node have opened. A tunnel is of one pod, by
// one of its identities, to one peer, and is never anybody else's. Each [Outbound] of
// the node takes its tunnels from there. A Pool is safe for concurrent use.
type Pool struct {
	config  PoolConfig // immutable after NewPool
	metrics *poolMetrics
	running sync.WaitGroup // of what keeps tunnels, and makes them; none begins once closed is set

	mu     sync.Mutex
	routes map[route]*tunnelsOf // guarded by mu; without empty ones
	count  int                  // guarded by mu; tunnels, and those under way
	closed bool                 // guarded by mu
}

// origin is a pod whose connections leave it.
type origin struct {
	pod      string
	identity *latest.Value[Identity]
	dial     func(ctx context.Context, to netip.AddrPort) (stream, error)
	running  sync.WaitGroup // as Pool.running, of this pod
	left     bool           // guarded by Pool.mu; it opens no tunnel any more
}

// route is what tunnels are alike in.
type route struct {
	from  *origin
	own   spiffeid.ID
	to    netip.AddrPort // where the peer accepts tunnels
	order handshake.Order
	peer  spiffeid.ID // whom the handshake has to find
}

// tunnelsOf is the tunnels of one route.
type tunnelsOf struct {
	open     []*pooled
	underWay []*underWay
}

// pooled is one tunnel.
type pooled struct {
	route  route
	tunnel *hbone.Tunnel
	proof  *proof
	remote string
	wake   chan struct{} // for its keeper to look at it

	// All that follows is guarded by Pool.mu.
	identity  Identity      // that the proof was made by
	made      time.Time     // when the proof was
	due       time.Time     // when the proof is to be renewed, and new connections have a newer tunnel
	connected int           // connections in it, and those that may come to be
	idle      time.Time     // since when there is none
	retired   bool          // the peer takes no more connections in it
	gone      bool          // it is in the pool no more
	refused   bool          // the peer has not accepted us, and that was counted
	ended     policy.Reason // why it was closed here; "" if it was not
	err       error
	renewal
}

// underWay is a tunnel that does not exist yet, and that all wait for who need one
// like it.
type underWay struct {
	identity Identity
	cancel   context.CancelFunc
	waiting  int           // guarded by Pool.mu
	done     chan struct{} // closed when tunnel or err are final
	tunnel   *pooled
	err      *failure
}

// failure is why a connection could not be opened.
type failure struct {
	reason policy.Reason
	err    error
	safe   bool // nobody has acted on it: another endpoint may be asked
}

// NewPool checks the config. It starts nothing.
func NewPool(c PoolConfig) (*Pool, error) {
	if c.Log == nil || c.Metrics == nil {
		return nil, errors.New("proxy: Log and Metrics are required")
	}
	if c.Streams < 0 || c.PerPeer < 0 || c.Limit < 0 || c.Idle < 0 {
		return nil, errors.New("proxy: a limit is negative")
	}
	c.Streams = orElse(c.Streams, 100)
	c.PerPeer = orElse(c.PerPeer, 64)
	c.Limit = orElse(c.Limit, 4096)
	c.Idle = orElse(c.Idle, 5*time.Minute)
	metrics, err := newPoolMetrics(c.Registerer)
	if err != nil {
		return nil, fmt.Errorf("proxy: %w", err)
	}
	return &Pool{config: c, metrics: metrics, routes: make(map[route]*tunnelsOf)}, nil
}

func orElse[T comparable](value, otherwise T) T {
	var zero T
	if value == zero {
		return otherwise
	}
	return value
}

// Why a connection does not come about in a tunnel, where inbound.go and tunnels.go
// have no word for it.
const (
	policyDeniedByPeer policy.Reason = "POLICY_DENIED_BY_PEER" // the peer's policy does not let us
	refusedByPeer      policy.Reason = "REFUSED_BY_PEER"       // the peer does not do it for anybody
	peerUnavailable    policy.Reason = "PEER_UNAVAILABLE"      // the peer cannot reach its application
	tunnelBroken       policy.Reason = "TUNNEL_BROKEN"         // it ended before the peer had answered
)

// connectTimeout bounds what the peer takes to reach its application.
const connectTimeout = 15 * time.Second

var errSilent = fmt.Errorf("the peer has not answered in %v", connectTimeout)

// connect opens a connection to authority in a tunnel of the route. Whoever gets a
// stream calls release with the tunnel once the stream has ended.
func (p *Pool) connect(ctx context.Context, r route, authority string) (*hbone.Stream, *pooled, *failure) {
	for tries := 1; ; tries++ {
		t, failed := p.take(ctx, r, func(*pooled) bool { return tries == 1 })
		if failed != nil {
			return nil, nil, failed
		}
		s, _, err := t.call(ctx, authority, nil)
		if err == nil {
			return s, t, nil
		}
		p.release(t)
		// A tunnel that was there before may have been about to end, and one that was
		// just made may be to an agent that is: the next one is to its successor.
		if tries == maxTunnels || !errors.Is(err, hbone.ErrUnprocessed) {
			return nil, nil, p.failureOf(ctx, t, err)
		}
	}
}

// maxTunnels is how many tunnels to one peer are tried for one connection.
const maxTunnels = 3

func (t *pooled) call(ctx context.Context, authority string, h hbone.Header) (*hbone.Stream, hbone.Header, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, connectTimeout, errSilent)
	defer cancel()
	return t.tunnel.Connect(ctx, authority, h)
}

// failureOf says what it means that a connection in a tunnel failed.
func (p *Pool) failureOf(ctx context.Context, t *pooled, err error) *failure {
	var status *hbone.StatusError
	var refused *handshake.Error
	switch {
	case errors.As(err, &status):
		switch status.Status {
		case http.StatusUnauthorized, http.StatusForbidden:
			return &failure{policyDeniedByPeer, err, false}
		case http.StatusServiceUnavailable:
			return &failure{peerUnavailable, err, true}
		default:
			return &failure{refusedByPeer, err, false}
		}
	case errors.As(err, &refused):
		// In the standard order this is how the peer says that it has not accepted us.
		p.mu.Lock()
		if !t.refused {
			t.refused = true
			p.config.Metrics.shook(DirectionOutbound, t.route.order, refused)
		}
		p.mu.Unlock()
		return &failure{handshakeFailed, err, true}
	case ctx.Err() != nil:
		return &failure{agentStopped, context.Cause(ctx), false}
	}
	reason, why := p.why(t)
	if reason == "" {
		reason, why = tunnelBroken, err
	}
	return &failure{reason, why, errors.Is(err, hbone.ErrUnprocessed)}
}

// take returns a tunnel with room for one more connection, which counts as open from
// then on. Of those that exist it takes only what suits.
func (p *Pool) take(ctx context.Context, r route, suits func(*pooled) bool) (*pooled, *failure) {
	identity, _ := r.from.identity.Load()
	if identity.SVID == nil || identity.Bundles == nil || identity.SVID.ID != r.own {
		return nil, &failure{identityMissing, errors.New("the pod has no SVID"), false}
	}
	p.mu.Lock()
	if t := p.available(r, identity, suits); t != nil {
		t.connected++
		p.mu.Unlock()
		return t, nil
	}
	w, failed := p.awaited(ctx, r, identity)
	if failed != nil {
		p.mu.Unlock()
		return nil, failed
	}
	w.waiting++
	p.mu.Unlock()
	select {
	case <-w.done:
		return w.tunnel, w.err
	case <-ctx.Done():
		p.leave(w)
		return nil, &failure{agentStopped, context.Cause(ctx), false}
	}
}

// available returns a tunnel with room. The caller holds mu.
func (p *Pool) available(r route, identity Identity, suits func(*pooled) bool) *pooled {
	of := p.routes[r]
	if of == nil {
		return nil
	}
	now := time.Now()
	for _, t := range of.open {
		if t.retired || t.identity != identity || !now.Before(t.due) || t.connected >= p.config.Streams || !suits(t) {
			continue
		}
		if !t.tunnel.Available() {
			// The peer wants a newer one, most likely because it has a newer SVID.
			t.retired = true
			t.nudge()
			continue
		}
		return t
	}
	return nil
}

// awaited returns a tunnel that is under way, with room for one more who waits. The
// caller holds mu.
func (p *Pool) awaited(ctx context.Context, r route, identity Identity) (*underWay, *failure) {
	of := p.routes[r]
	if of == nil {
		of = new(tunnelsOf)
	}
	for _, w := range of.underWay {
		if w.identity == identity && w.waiting < p.config.Streams {
			return w, nil
		}
	}
	if p.closed || r.from.left {
		return nil, &failure{agentStopped, errors.New("no tunnel is opened any more"), false}
	}
	usable := len(of.underWay)
	for _, t := range of.open {
		if !t.retired && t.identity == identity && time.Now().Before(t.due) {
			usable++
		}
	}
	if usable >= p.config.PerPeer {
		return nil, &failure{limitReached, fmt.Errorf("%d tunnels to the peer", usable), false}
	}
	if p.count >= p.config.Limit && !p.spare() {
		return nil, &failure{limitReached, fmt.Errorf("%d tunnels", p.count), false}
	}
	// It is not one waiter's: whoever gives up leaves it to the others.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	w := &underWay{identity: identity, cancel: cancel, done: make(chan struct{})}
	of.underWay = append(of.underWay, w)
	p.routes[r] = of
	p.count++
	p.run(r.from, func() { p.makeAndKeep(ctx, r, w) })
	return w, nil
}

// run runs f beside others. The caller holds mu, and neither the pool nor the origin
// is closed unless something of it runs.
func (p *Pool) run(from *origin, f func()) {
	p.running.Add(1)
	from.running.Go(func() {
		defer p.running.Done()
		f()
	})
}

// spare closes a tunnel that carries nothing, and reports whether there was one. The
// caller holds mu.
func (p *Pool) spare() bool {
	for _, of := range p.routes {
		for _, t := range of.open {
			if t.connected == 0 && !t.renewing {
				p.drop(t)
				t.nudge()
				return true
			}
		}
	}
	return false
}

// leave gives up waiting. The last who does ends it.
func (p *Pool) leave(w *underWay) {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-w.done:
		if w.err == nil {
			p.releaseLocked(w.tunnel)
		}
		return
	default:
	}
	if w.waiting--; w.waiting == 0 {
		w.cancel()
	}
}

// makeAndKeep makes a tunnel for all who wait for it, and keeps it until its end.
func (p *Pool) makeAndKeep(ctx context.Context, r route, w *underWay) {
	t, failed := p.establish(ctx, r, w.identity)
	w.cancel()
	p.mu.Lock()
	of := p.routes[r]
	of.underWay = slices.DeleteFunc(of.underWay, func(other *underWay) bool { return other == w })
	if failed == nil && (p.closed || r.from.left) {
		failed = &failure{agentStopped, errors.New("no tunnel is opened any more"), false}
	}
	if failed != nil {
		p.count--
		p.forget(r, of)
	} else {
		t.connected, t.idle = w.waiting, time.Now()
		of.open = append(of.open, t)
	}
	w.tunnel, w.err = t, failed
	close(w.done)
	p.mu.Unlock()
	switch {
	case failed == nil:
		p.config.Metrics.tunnels.WithLabelValues(string(DirectionOutbound)).Inc()
		p.keep(t)
		p.config.Metrics.tunnels.WithLabelValues(string(DirectionOutbound)).Dec()
	case t != nil:
		t.tunnel.Close()
	}
}

// establish opens a tunnel. No lock is held.
func (p *Pool) establish(ctx context.Context, r route, i Identity) (*pooled, *failure) {
	conn, err := r.from.dial(ctx, r.to)
	if err != nil {
		return nil, &failure{dialFailed, err, true}
	}
	c, err := handshake.Initiate(ctx, hbone.Buffer(conn), &handshake.Config{
		Order: r.order, SVID: i.SVID, Bundles: i.Bundles,
	}, r.peer)
	p.config.Metrics.shook(DirectionOutbound, r.order, err)
	if err != nil {
		return nil, &failure{handshakeFailed, err, true}
	}
	t := &pooled{
		route: r, proof: newProof(c, i), remote: conn.RemoteAddr().String(), wake: make(chan struct{}, 1),
		identity: i, made: time.Now(),
	}
	t.due = t.proof.due(t.made)
	// What is trusted may have changed in the meantime.
	now, _ := r.from.identity.Load()
	if reason, err := t.proof.check(now, time.Now()); reason != "" {
		c.Close()
		return nil, &failure{reason, err, true}
	}
	// A connection more than the pool counts is for renewals.
	if t.tunnel, err = hbone.Open(c, hbone.Config{MaxStreams: uint32(p.config.Streams) + 1}); err != nil {
		return nil, &failure{tunnelBroken, err, true}
	}
	return t, nil
}

// release ends what take began.
func (p *Pool) release(t *pooled) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.releaseLocked(t)
}

func (p *Pool) releaseLocked(t *pooled) {
	if t.connected--; t.connected == 0 {
		t.idle = time.Now()
		t.nudge()
	}
}

// nudge has the keeper of t look at it.
func (t *pooled) nudge() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// keep holds a tunnel to what its ends have shown each other, renews that, and closes
// the tunnel when it is of no more use. It returns when the tunnel has ended.
func (p *Pool) keep(t *pooled) {
	for {
		identity, changed := t.route.from.identity.Load()
		again := p.look(t, identity, time.Now())
		if again == 0 {
			t.tunnel.Close()
			break
		}
		timer := time.NewTimer(min(again, nap))
		select {
		case <-changed:
		case <-t.wake:
		case <-timer.C:
		case <-t.tunnel.Done():
		}
		timer.Stop()
		if t.tunnel.Err() != nil {
			break
		}
	}
	p.mu.Lock()
	p.drop(t)
	reason, err := t.ended, t.err
	p.mu.Unlock()
	if err == nil {
		err = t.tunnel.Err()
	}
	p.config.Log.LogAttrs(context.Background(), slog.LevelDebug, "tunnel ended",
		slog.String("direction", string(DirectionOutbound)), slog.String("protocol", protocolOf(t.route.order).String()),
		slog.String("pod", t.route.from.pod), slog.String("destination", t.remote),
		slog.String("peer", t.route.peer.String()), slog.String("reason", string(reason)), slog.Any("err", err))
}

// look decides what becomes of a tunnel, and returns when to look again: 0 if it is to
// be closed.
func (p *Pool) look(t *pooled, identity Identity, now time.Time) time.Duration {
	reason, err := t.proof.check(identity, now)
	until := t.proof.until()
	p.mu.Lock()
	defer p.mu.Unlock()
	if reason != "" && t.ended == "" {
		t.ended, t.err = reason, err
	}
	if t.ended != "" {
		p.drop(t)
		return 0
	}
	again := until.Sub(now)
	if t.connected == 0 && !t.renewing {
		left := t.idle.Add(p.config.Idle).Sub(now)
		if t.gone || t.retired || t.identity != identity || left <= 0 {
			p.drop(t)
			return 0
		}
		return min(again, left)
	}
	return min(again, p.renewIfDue(t, identity, now, until))
}

// drop takes a tunnel out of the pool. The caller holds mu.
func (p *Pool) drop(t *pooled) {
	if t.gone {
		return
	}
	t.gone = true
	p.count--
	of := p.routes[t.route]
	of.open = slices.DeleteFunc(of.open, func(other *pooled) bool { return other == t })
	p.forget(t.route, of)
}

// forget forgets a route that has nothing. The caller holds mu.
func (p *Pool) forget(r route, of *tunnelsOf) {
	if len(of.open)+len(of.underWay) == 0 {
		delete(p.routes, r)
	}
}

// why returns why a tunnel was closed here, and "" if it was not.
func (p *Pool) why(t *pooled) (policy.Reason, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return t.ended, t.err
}

// Tunnels returns the tunnels that are open now, in no order.
func (p *Pool) Tunnels() []Tunnel {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make([]Tunnel, 0, p.count)
	for _, of := range p.routes {
		for _, t := range of.open {
			out = append(out, Tunnel{
				Direction: DirectionOutbound, Order: t.route.order.String(), Pod: t.route.from.pod,
				Remote: t.remote, Own: t.proof.own.String(), Peer: t.proof.peer.String(),
				Begun: t.made, Until: t.proof.until(), Authorities: t.proof.authorities(), Connections: t.connected,
			})
		}
	}
	return out
}

// end closes all tunnels of a pod, and returns when they have ended.
func (p *Pool) end(from *origin) {
	p.mu.Lock()
	from.left = true
	for r, of := range p.routes {
		if r.from == from {
			p.closeAll(of)
		}
	}
	p.mu.Unlock()
	from.running.Wait()
}

// closeAll has the tunnels of a route closed. The caller holds mu.
func (p *Pool) closeAll(of *tunnelsOf) {
	for _, w := range of.underWay {
		w.cancel()
	}
	for _, t := range of.open {
		if t.ended == "" {
			t.ended = agentStopped
		}
		t.nudge()
	}
}

// Shutdown opens no more tunnels, lets the connections in those that are open go on
// until ctx ends, and returns when every tunnel has ended: ctx's error if connections
// had to be cut.
func (p *Pool) Shutdown(ctx context.Context) error {
	p.mu.Lock()
	p.closed = true
	var open []*pooled
	for _, of := range p.routes {
		open = append(open, of.open...)
		for _, w := range of.underWay {
			w.cancel()
		}
	}
	p.mu.Unlock()
	var closing sync.WaitGroup
	var mu sync.Mutex
	var cut error
	for _, t := range open {
		closing.Go(func() {
			if err := t.tunnel.Shutdown(ctx); err != nil {
				mu.Lock()
				cut = err
				mu.Unlock()
			}
		})
	}
	closing.Wait()
	p.running.Wait()
	return cut
}

// protocolOf returns the protocol of tunnels in an order.
func protocolOf(o handshake.Order) Protocol {
	if o == handshake.CallerFirst {
		return Troth
	}
	return HBONE
}

// jitter returns a time between zero and d.
func jitter(d time.Duration) time.Duration { return rand.N(d + 1) }
