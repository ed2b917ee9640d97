package proxy

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"troth.dev/troth/agent/hbone"
	"troth.dev/troth/handshake"
)

// renewal is the state of a tunnel's renewal. All of it is guarded by Pool.mu.
type renewal struct {
	renewing bool
	seen     Identity  // the newest one that a renewal was planned for
	next     time.Time // when to try, if it is due
}

const (
	// renewSpread is over how long the tunnels of a pod are renewed when its identity has
	// changed.
	renewSpread = 10 * time.Second
	// renewPause is the least time between two renewals of a tunnel whose proof ends
	// late enough.
	renewPause = 5 * time.Second
	// renewHaste is the least time between two in any case.
	renewHaste = 100 * time.Millisecond
	// renewTimeout bounds one.
	renewTimeout = 30 * time.Second
)

// due returns when a proof that was made at a time is to be renewed: after three
// quarters of its life, when both ends have got newer SVIDs. If the two ends show two
// authorities of one trust domain, one of them is on its way out, and what depends on
// it is to be renewed sooner.
func (p *proof) due(made time.Time) time.Time {
	left := p.until().Sub(made)
	after := left / 4 * 3
	if len(p.authorities()) > 1 && p.own.TrustDomain() == p.peer.TrustDomain() {
		after = left / 12
	}
	return made.Add(max(after, pause(left)))
}

// pause returns how long after a renewal the next one is, if that is wanted at once and
// the proof ends in left: the peer may not have got its newer SVID when ours came, and
// then the proof is no better than it was.
func pause(left time.Duration) time.Duration {
	return max(min(left/4, renewPause), renewHaste)
}

// renewIfDue begins a renewal if it is time, and returns when it will be. The caller
// holds mu.
//
// Only the caller-first order has renewals: in the standard one a connection ends with
// the proof that it began with.
func (p *Pool) renewIfDue(t *pooled, identity Identity, now, until time.Time) time.Duration {
	if t.route.order != handshake.CallerFirst || t.renewing || p.closed {
		return until.Sub(now)
	}
	if identity != t.identity && identity != t.seen {
		t.seen = identity
		t.next = now.Add(min(jitter(renewSpread), until.Sub(now)/4))
	}
	due := t.due
	if t.retired || identity != t.identity {
		due = now
	}
	if due.Before(t.next) {
		due = t.next
	}
	if wait := due.Sub(now); wait > 0 {
		return wait
	}
	t.renewing = true
	p.run(t.route.from, func() { p.renew(t) })
	return until.Sub(now)
}

// renew moves what a newer tunnel has proved to t. Whoever dies on the way, nothing is
// worse than it was: until the callee has moved its end, t lives as long as it would
// have; after that, both ends of it are as proved as those of the newer tunnel, and the
// one that does not know ends it when it would have.
func (p *Pool) renew(t *pooled) {
	ctx, cancel := context.WithTimeout(context.Background(), renewTimeout)
	defer cancel()
	newer, err := p.renewBy(ctx, t)
	until := t.proof.until()
	p.mu.Lock()
	t.renewing = false
	now := time.Now()
	if err == nil {
		t.identity, t.made, t.retired = newer.identity, newer.made, false
		t.due = t.proof.due(now)
		t.next = now.Add(pause(until.Sub(now)))
	} else {
		t.next = now.Add(min(max(until.Sub(now)/4, renewHaste), time.Minute))
	}
	t.nudge()
	p.mu.Unlock()
	p.metrics.renewed(err)
	if err != nil {
		p.config.Log.LogAttrs(ctx, slog.LevelWarn, "a tunnel's proof was not renewed",
			slog.String("pod", t.route.from.pod), slog.String("destination", t.remote),
			slog.String("peer", t.route.peer.String()), slog.Time("until", until), slog.Any("err", err))
	}
}

func (p *Pool) renewBy(ctx context.Context, t *pooled) (*pooled, error) {
	ours, err := t.proof.secret(renewedByCaller)
	if err != nil {
		return nil, err
	}
	theirs, err := t.proof.secret(renewedByCallee)
	if err != nil {
		return nil, err
	}
	newer, failed := p.take(ctx, t.route, func(other *pooled) bool { return other != t && other.made.After(t.made) })
	if failed != nil {
		return nil, fmt.Errorf("%s: %w", failed.reason, failed.err)
	}
	defer p.release(newer)
	s, h, err := newer.call(ctx, renewAuthority, hbone.Header{renewHeader: ours})
	if err != nil {
		return nil, err
	}
	s.Close()
	if subtle.ConstantTimeCompare([]byte(h[renewedHeader]), []byte(theirs)) != 1 {
		return nil, errors.New("the peer does not know the tunnel")
	}
	if !t.proof.renew(newer.proof) {
		return nil, errors.New("the newer tunnel is between others")
	}
	return newer, nil
}
