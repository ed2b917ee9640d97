// Package directory is the agent's memory of who is behind which address. It asks
// the control plane about an address when a pod first calls it, and is told of every
// change for as long as it remembers.
//
// Start with [New], [Directory.Resolve], which the data path calls for each
// connection, and [Directory.Run], which holds one session with the control plane.
// directory.go is what is remembered, session.go how it is kept current, and
// answer.go what is made of what the control plane says.
//
// It guarantees that what is known outlives the session by which it was learnt, so
// that no outage of the control plane stops a pod from calling whom it calls; that
// all who want to know the same address share one question; and that what is
// remembered has a bound.
//
// It refuses what it does not know: an address that nobody has answered for, an
// answer that makes no sense, a protocol that is newer than this agent. Who gets an
// error must send nothing.
package directory

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"github.com/prometheus/client_golang/prometheus"

	"troth.dev/troth/agent/proxy"
)

// Config is what a [Directory] is made of. Every field is required unless it says
// otherwise.
type Config struct {
	// Size is how many addresses are remembered, at most 61,440. Zero means 8192.
	Size int
	// Log is told of answers that make no sense.
	Log     *slog.Logger
	Metrics *Metrics
}

// Directory implements [proxy.Directory]. It is safe for concurrent use.
type Directory struct {
	config Config // immutable after New

	mu      sync.Mutex
	known   *simplelru.LRU[netip.Addr, *entry] // guarded by mu; what was answered
	asked   map[netip.Addr]*question           // guarded by mu; what somebody waits for
	session *session                           // guarded by mu; nil while there is none
}

// entry is what is known of an address.
type entry struct {
	answer *answer  // the newest; guarded by Directory.mu
	from   *session // that it came by; guarded by Directory.mu
}

// question is an address that somebody waits for.
type question struct {
	waiting int           // guarded by Directory.mu
	done    chan struct{} // closed when answer is set
	answer  *answer       // final once done is closed
}

const (
	// maxHeld is the most addresses that the control plane keeps for an agent.
	maxHeld = 65_536
	// maxAsked is how many addresses are waited for at a time.
	maxAsked    = 4096
	defaultSize = 8192
)

// New checks the config. It starts nothing.
func New(c Config) (*Directory, error) {
	switch {
	case c.Log == nil, c.Metrics == nil:
		return nil, errors.New("directory: Log and Metrics are required")
	case c.Size < 0 || c.Size > maxHeld-maxAsked:
		return nil, fmt.Errorf("directory: Size %d is not between 0 and %d", c.Size, maxHeld-maxAsked)
	case c.Size == 0:
		c.Size = defaultSize
	}
	d := &Directory{config: c, asked: make(map[netip.Addr]*question)}
	known, err := simplelru.NewLRU(c.Size, func(address netip.Addr, _ *entry) { d.forget(address) })
	if err != nil {
		return nil, fmt.Errorf("directory: %w", err)
	}
	d.known = known
	return d, nil
}

const (
	// patience is how long an address is waited for that nothing is known of.
	patience = 5 * time.Second
	// nobodyLife is for how long it counts that nobody had an address, once the
	// session has ended that said so. Addresses are given to new pods: what is sent
	// in plaintext because nobody had the address must not reach one for long.
	nobodyLife = 5 * time.Minute
)

// Resolve implements [proxy.Directory]. An address that something is known of is
// answered at once, also while there is no session. For any other it waits at most 5
// seconds. An IPv4 address is the same one when it is mapped into IPv6.
func (d *Directory) Resolve(ctx context.Context, destination netip.AddrPort) (*proxy.Destination, error) {
	address := destination.Addr().Unmap().WithZone("")
	if !destination.IsValid() || destination.Port() == 0 {
		return nil, fmt.Errorf("directory: %v is no destination", destination)
	}
	a, outcome, err := d.answer(ctx, address)
	if err == nil && a.refused != nil {
		outcome, err = failed, a.refused
	}
	d.config.Metrics.resolved.WithLabelValues(outcome).Inc()
	if err != nil {
		return nil, fmt.Errorf("directory: who has %v: %w", address, err)
	}
	return a.at(netip.AddrPortFrom(destination.Addr().Unmap(), destination.Port())), nil
}

// answer returns what is known of an address, or waits for it.
func (d *Directory) answer(ctx context.Context, address netip.Addr) (a *answer, outcome string, err error) {
	d.mu.Lock()
	if e, ok := d.known.Get(address); ok {
		current := e.from == d.session
		if current || !e.answer.nobody() || time.Since(e.from.ended) < nobodyLife {
			defer d.mu.Unlock()
			if current {
				return e.answer, fresh, nil
			}
			return e.answer, stale, nil
		}
	}
	q := d.asked[address]
	if q == nil {
		if len(d.asked) >= maxAsked {
			d.mu.Unlock()
			return nil, failed, fmt.Errorf("%d others are waited for already", maxAsked)
		}
		q = &question{done: make(chan struct{})}
		d.asked[address] = q
		d.ask(address)
	}
	q.waiting++
	d.mu.Unlock()

	ctx, cancel := context.WithTimeoutCause(ctx, patience, errNotInTime)
	defer cancel()
	select {
	case <-q.done:
		return q.answer, asked, nil
	case <-ctx.Done():
		return nil, failed, d.leave(ctx, address, q)
	}
}

var (
	errNotInTime = fmt.Errorf("the control plane has not answered in %v", patience)
	errNoSession = fmt.Errorf("there is no session with the control plane, and was none in %v", patience)
)

// leave gives up waiting, and returns why. The last to leave takes the question
// back.
func (d *Directory) leave(ctx context.Context, address netip.Addr, q *question) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	q.waiting--
	if q.waiting == 0 && d.asked[address] == q {
		delete(d.asked, address)
		if !d.known.Contains(address) {
			d.forget(address)
		}
	}
	err := context.Cause(ctx)
	if errors.Is(err, errNotInTime) && d.session == nil {
		return errNoSession
	}
	return err
}

// ask has the session ask about an address, if there is a session. The caller holds
// mu.
func (d *Directory) ask(address netip.Addr) {
	if s := d.session; s != nil {
		delete(s.forget, address)
		s.resolve[address] = struct{}{}
		s.nudge()
	}
}

// forget has the session forget an address that is neither known nor asked for any
// more. The caller holds mu.
func (d *Directory) forget(address netip.Addr) {
	s := d.session
	if s == nil || d.asked[address] != nil {
		return
	}
	delete(s.resolve, address)
	if _, ok := s.held[address]; ok {
		s.forget[address] = struct{}{}
		s.nudge()
	}
}

// take learns an answer that came by s, and reports whether anybody wanted it.
func (d *Directory) take(s *session, address netip.Addr, a *answer) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	e, wanted := d.known.Peek(address)
	if wanted {
		e.answer, e.from = a, s
	}
	if q := d.asked[address]; q != nil {
		delete(d.asked, address)
		q.answer = a
		close(q.done)
		if !wanted {
			d.known.Add(address, &entry{answer: a, from: s})
		}
		wanted = true
	}
	d.config.Metrics.addresses.Set(float64(d.known.Len()))
	return wanted
}

// Metrics are the questions that an operator asks of a node's directory.
type Metrics struct {
	resolved  *prometheus.CounterVec // how were destinations resolved?
	refused   prometheus.Counter     // how many answers made no sense?
	addresses prometheus.Gauge       // how many addresses are remembered?
	connected prometheus.Gauge       // is there a session?
}

// How a destination was resolved.
const (
	fresh  = "current" // what the session keeps current
	stale  = "stale"   // what was known when a session ended
	asked  = "asked"   // the control plane was asked
	failed = "failed"  // not at all
)

// NewMetrics registers the metrics. It fails if r has metrics of their names.
func NewMetrics(r prometheus.Registerer) (*Metrics, error) {
	m := &Metrics{
		resolved: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "troth_agent_directory_resolves_total",
			Help: "Destinations that were looked up, by outcome: current, stale, asked, failed.",
		}, []string{"outcome"}),
		refused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "troth_agent_directory_refused_answers_total", Help: "Answers of the control plane that made no sense.",
		}),
		addresses: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "troth_agent_directory_addresses", Help: "Addresses that are remembered.",
		}),
		connected: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "troth_agent_directory_connected", Help: "Whether there is a session with the control plane.",
		}),
	}
	for _, outcome := range []string{fresh, stale, asked, failed} {
		m.resolved.WithLabelValues(outcome)
	}
	for _, c := range []prometheus.Collector{m.resolved, m.refused, m.addresses, m.connected} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}
