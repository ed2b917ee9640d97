package proxy

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/policy"
)

// live is the connections that pass, each with the verdict that it passes by.
type live struct {
	config *InboundConfig

	mu      sync.Mutex
	all     map[*connection]struct{} // guarded by mu
	stopped bool                     // guarded by mu; nothing passes any more
}

// connection is one connection between a caller and the application.
type connection struct {
	protocol    Protocol
	source      netip.AddrPort
	destination netip.AddrPort // zero until it is known
	peer        spiffeid.ID    // zero in plaintext
	tunnel      *tunnel        // that it is in; nil in plaintext
	begun       time.Time
	in, out     atomic.Int64       // bytes
	stop        context.CancelFunc // ends the dialling
	abort       func()             // resets the caller's end, whatever it is waiting for; may be called twice

	app     stream         // guarded by live.mu; nil until dialled
	verdict policy.Verdict // guarded by live.mu
	end     policy.Reason  // guarded by live.mu; the first reason to end, if not the verdict's
	err     error          // guarded by live.mu; what end is about, if there is more to say
}

func newLive(c *InboundConfig) *live {
	return &live{config: c, all: make(map[*connection]struct{})}
}

// admit decides c for the first time, and returns why it does not pass, or "".
//
// c is decided and becomes one of all under one lock, under which keep reads the
// policy too: whatever policy comes after the one that c was decided by, keep will
// find c.
func (l *live) admit(c *connection) policy.Reason {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.tunnel != nil && c.tunnel.ended != "" {
		c.end, c.err = c.tunnel.ended, c.tunnel.err
		return c.end
	}
	if l.stopped {
		c.end = agentStopped
		return c.end
	}
	effective, _ := l.config.Policy.Load()
	c.verdict = l.decide(effective, c)
	if !c.verdict.Allowed {
		return c.verdict.Reason
	}
	l.all[c] = struct{}{}
	l.note(c)
	return ""
}

// connect gives c its other end, unless it was cut meanwhile.
func (l *live) connect(c *connection, app stream) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.end != "" {
		return false
	}
	c.app = app
	return true
}

// fail says why c ends. If it was cut, what follows from that is no reason.
func (l *live) fail(c *connection, reason policy.Reason, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.end == "" {
		c.end, c.err = reason, err
	}
}

// leave ends the life of c, and returns why it ended and by whose policy.
func (l *live) leave(c *connection) (policy.Reason, policy.Ref, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.all[c]; ok {
		l.remove(c)
	}
	if c.end != "" {
		return c.end, c.verdict.Policy, c.err
	}
	return c.verdict.Reason, c.verdict.Policy, nil
}

// remove takes c out of all. The caller holds l.mu.
func (l *live) remove(c *connection) {
	delete(l.all, c)
	l.note(c)
}

// noteEvery is how often a connection that stays open is noted anew.
const noteEvery = time.Minute

// keep decides all connections again whenever the policy or the kubelet's addresses
// change, until ctx ends.
func (l *live) keep(ctx context.Context) {
	tick := time.NewTicker(noteEvery)
	defer tick.Stop()
	for {
		policy, kubelet := l.decideAgain()
		select {
		case <-policy:
		case <-kubelet:
		case <-tick.C:
			l.noteAll()
		case <-ctx.Done():
			return
		}
	}
}

// decideAgain cuts what no longer passes. One of the channels is closed when there is
// something newer to decide by.
func (l *live) decideAgain() (policy, kubelet <-chan struct{}) {
	l.mu.Lock()
	effective, policy := l.config.Policy.Load()
	_, kubelet = l.config.Kubelet.Load()
	var refused []*connection
	for c := range l.all {
		c.verdict = l.decide(effective, c)
		if !c.verdict.Allowed {
			c.end, c.err = policyChanged, fmt.Errorf("it no longer passes: %s", c.verdict.Reason)
			refused = append(refused, c)
		}
	}
	cut := l.take(refused)
	l.mu.Unlock()
	cut()
	return policy, kubelet
}

// cutTunnel cuts every connection in a tunnel, and those that are yet to come.
func (l *live) cutTunnel(t *tunnel, reason policy.Reason, err error) {
	l.mu.Lock()
	if t.ended == "" {
		t.ended, t.err = reason, err
	}
	var carried []*connection
	for c := range l.all {
		if c.tunnel == t {
			c.end, c.err = reason, err
			carried = append(carried, c)
		}
	}
	cut := l.take(carried)
	l.mu.Unlock()
	cut()
}

// cutAll cuts every connection, now and from now on.
func (l *live) cutAll() {
	l.mu.Lock()
	l.stopped = true
	all := make([]*connection, 0, len(l.all))
	for c := range l.all {
		c.end = agentStopped
		all = append(all, c)
	}
	cut := l.take(all)
	l.mu.Unlock()
	cut()
}

// take takes connections out of all, and returns what resets them, to be called
// without the lock: it asks the kernel, twice for each. The caller holds l.mu.
func (l *live) take(connections []*connection) (cut func()) {
	var apps []stream
	for _, c := range connections {
		l.remove(c)
		if c.app != nil {
			apps = append(apps, c.app)
		}
	}
	return func() {
		for _, c := range connections {
			c.stop()
			c.abort()
		}
		for _, app := range apps {
			reset(app)
		}
	}
}

func (l *live) noteAll() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := range l.all {
		l.note(c)
	}
}

// note tells Peers that c is there, unless c passes even under STRICT: who comes
// from the kubelet's addresses is nobody that a change of policy would turn away.
func (l *live) note(c *connection) {
	strict := &policy.Effective{Mode: policy.Strict}
	if l.config.Peers == nil || l.decide(strict, c).Allowed {
		return
	}
	l.config.Peers.Seen(Peer{
		Pod:    l.config.Pod,
		Port:   c.destination.Port(),
		Source: c.source.Addr(),
		Last:   time.Now(),
	})
}

func (l *live) decide(effective *policy.Effective, c *connection) policy.Verdict {
	kubelet, _ := l.config.Kubelet.Load()
	return effective.Decide(policy.Connection{
		Peer:   c.peer,
		Port:   c.destination.Port(),
		Source: c.source.Addr(),
	}, kubelet...)
}

// list returns the connections as whoever looks at the node sees them.
func (l *live) list() []Connection {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]Connection, 0, len(l.all))
	for c := range l.all {
		shown := Connection{
			Direction: DirectionInbound, Protocol: c.protocol.String(), Pod: l.config.Pod,
			Source: c.source.String(), Destination: c.destination.String(),
			Policy: c.verdict.Policy.String(), Reason: string(c.verdict.Reason),
			Begun: c.begun, In: c.in.Load(), Out: c.out.Load(),
		}
		if !c.peer.IsZero() {
			shown.Peer = c.peer.String()
		}
		out = append(out, shown)
	}
	return out
}

// carried returns how many connections are in each tunnel.
func (l *live) carried() map[*tunnel]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make(map[*tunnel]int)
	for c := range l.all {
		if c.tunnel != nil {
			out[c.tunnel]++
		}
	}
	return out
}

// tunnelEnd returns why a tunnel was cut, or "".
func (l *live) tunnelEnd(t *tunnel) (policy.Reason, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return t.ended, t.err
}
