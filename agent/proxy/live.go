package proxy

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"time"

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
	caller      stream
	source      netip.AddrPort
	destination netip.AddrPort     // zero until it is known
	stop        context.CancelFunc // ends the dialling

	app     stream         // guarded by live.mu; nil until dialled
	verdict policy.Verdict // guarded by live.mu
	end     policy.Reason  // guarded by live.mu; the first reason to end, if not the verdict's
	err     error          // guarded by live.mu; what end is about, if there is more to say
}

// admit decides c for the first time, and reports whether it passes.
//
// c is decided and becomes one of all under one lock, under which keep reads the
// policy too: whatever policy comes after the one that c was decided by, keep will
// find c.
func (l *live) admit(c *connection) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopped {
		c.end = agentStopped
		return false
	}
	effective, _ := l.config.Policy.Load()
	c.verdict = l.decide(effective, c)
	if !c.verdict.Allowed {
		return false
	}
	l.all[c] = struct{}{}
	l.note(c)
	return true
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
		delete(l.all, c)
		l.note(c)
	}
	if c.end != "" {
		return c.end, c.verdict.Policy, c.err
	}
	return c.verdict.Reason, c.verdict.Policy, nil
}

// noteEvery is how often a connection that stays open is noted anew.
const noteEvery = time.Minute

// keep decides all connections again whenever the policy changes, until ctx ends.
func (l *live) keep(ctx context.Context) {
	tick := time.NewTicker(noteEvery)
	defer tick.Stop()
	for {
		changed := l.decideAgain()
		select {
		case <-changed:
		case <-tick.C:
			l.noteAll()
		case <-ctx.Done():
			return
		}
	}
}

// decideAgain cuts what no longer passes. The channel is closed when there is a
// newer policy to decide by.
func (l *live) decideAgain() (changed <-chan struct{}) {
	l.mu.Lock()
	effective, changed := l.config.Policy.Load()
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
	return changed
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
	var ends []stream
	for _, c := range connections {
		delete(l.all, c)
		l.note(c)
		ends = append(ends, c.caller)
		if c.app != nil {
			ends = append(ends, c.app)
		}
	}
	return func() {
		for _, c := range connections {
			c.stop()
		}
		for _, end := range ends {
			reset(end)
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
	return effective.Decide(policy.Connection{
		Port:   c.destination.Port(),
		Source: c.source.Addr(),
	}, l.config.Kubelet...)
}
