package ca

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"troth.dev/troth/internal/latest"
)

// action is what the schedule does next; the zero action is nothing.
type action struct {
	do string // "prepare", "activate", "revoke", "forget"
	id string
}

// step decides what the schedule does now, when it has to look again if nothing
// else changes, and what is in the way of what is overdue. It does nothing itself.
//
// Of a set's active authority, the successor is prepared at half of its life, and
// activated as soon as that may be; it is overdue from two thirds of its life on,
// or at once if the active one is to be tainted. The gates are those of the
// operations. An overdue change stays refused: then somebody has to look.
//
// An upstream issues the successors by a schedule of its own. Then awaited says what
// is in the way of another one, and is empty otherwise. What the upstream has issued
// is activated as soon as that may be, because it may have reasons; and its schedule
// is given more time before anything is overdue: cert-manager renews at two thirds.
func step(now time.Time, set Set, known evidence, life time.Duration, awaited string) (next action, wake time.Time, overdue *Blocked) {
	const longest = 10 * time.Minute
	wake = now.Add(longest)
	look := func(at time.Time) {
		if at.After(now) && at.Before(wake) {
			wake = at
		}
	}
	d := &draft{now: now, operation: "activate", life: life, evidence: known, set: set}

	active, ok := set.Active()
	successor, prepared := set.Successor()
	due, late := !ok || active.TaintPending, !ok || active.TaintPending
	if ok {
		begins, ends := active.Certificate.NotBefore, active.NotAfter()
		half, deadline := begins.Add(ends.Sub(begins)/2), ends.Add(-ends.Sub(begins)/3)
		if len(active.Upstream) > 0 || awaited != "" {
			const enough = 30 * 24 * time.Hour
			deadline = ends.Add(-min(ends.Sub(begins)/4, enough))
		}
		due = due || prepared && len(successor.Upstream) > 0
		due, late = due || !now.Before(half), late || !now.Before(deadline)
		look(half)
		look(deadline)
	}
	switch {
	case !due:
	case (!prepared || d.endsTooSoon(successor)) && awaited != "":
		if late {
			overdue = awaitUpstream(active.ID, awaited)
		}
	case !prepared, d.endsTooSoon(successor):
		return action{do: "prepare"}, wake, nil
	default:
		blockers := d.mayActivate(successor)
		if len(blockers) == 0 {
			return action{do: "activate", id: successor.ID}, wake, nil
		}
		for _, b := range blockers {
			look(b.Until)
		}
		if late {
			overdue = d.blocked("activate", successor, blockers)
		}
	}

	for _, a := range set.Authorities {
		switch a.State {
		case Old, Tainted:
			blockers := d.mayRevoke(a)
			if len(blockers) == 0 {
				return action{do: "revoke", id: a.ID}, wake, overdue
			}
			for _, b := range blockers {
				look(b.Until.Add(time.Second)) // an SVID is valid up to its very end
			}
		case Revoked:
			if d.mayForget(a) {
				return action{do: "forget", id: a.ID}, wake, overdue
			}
			look(a.Changed.At.Add(remembered))
		case Prepared, Active:
		}
	}
	return action{}, wake, overdue
}

// Rotate keeps the trust domain in an authority until ctx ends: it prepares,
// activates and revokes by the schedule of this package, as what agents prove and
// hold permits. It overrides nothing. What an operator has prepared early it
// leaves alone until half of the active authority's life.
//
// All replicas may Rotate at the same time: one of them is first with each change,
// and the others see that it is done. Run has to run beside it.
func (i *Issuer) Rotate(ctx context.Context, agents *latest.Value[Propagation]) error {
	const retry = 3 * time.Second
	var alarmed time.Time
	for {
		set, setChanged := i.set.Load()
		known, agentsChanged := agents.Load()
		_, publishedChanged := i.published.Load()
		now := time.Now()
		next, wake, overdue := step(now, set, i.evidence(ctx, now, set, known), i.profile.life, i.awaited())
		alarmed = i.alarm(ctx, now, overdue, alarmed)
		switch err := i.carryOut(ctx, next, known); {
		case ctx.Err() != nil:
			return nil //nolint:nilerr // the end that was asked for is no error
		case err != nil:
			// A gate that closed since is no failure: what closed it will be news.
			if blocked := (*Blocked)(nil); !errors.As(err, &blocked) {
				i.config.Audit.LogAttrs(ctx, slog.LevelError, "authority not changed by schedule",
					slog.String("operation", next.do), slog.Any("err", err))
			}
			wake = now.Add(retry)
			setChanged, agentsChanged, publishedChanged = nil, nil, nil // not faster, whatever happens
		case next != action{}:
			continue
		}
		timer := time.NewTimer(time.Until(wake))
		select {
		case <-ctx.Done():
		case <-setChanged:
		case <-agentsChanged:
		case <-publishedChanged:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// Overdue returns what is in the way of a change that Rotate should have made by
// now, or nil if there is none: the alarm for whoever watches Troth.
func (i *Issuer) Overdue() *latest.Value[*Blocked] { return &i.overdue }

// alarm raises or clears what is overdue, and logs it every few minutes. It
// returns when it last did.
func (i *Issuer) alarm(ctx context.Context, now time.Time, overdue *Blocked, last time.Time) time.Time {
	const every = 10 * time.Minute
	if before, _ := i.overdue.Load(); before != nil || overdue != nil {
		i.overdue.Set(overdue)
	}
	switch {
	case overdue == nil:
		return time.Time{}
	case !last.IsZero() && now.Sub(last) < every:
		return last
	}
	i.config.Audit.LogAttrs(ctx, slog.LevelError, "rotation is overdue and blocked", slog.Any("err", overdue))
	return now
}

// carryOut has the operations do what step decided, which decide again on what is
// stored by then.
func (i *Issuer) carryOut(ctx context.Context, next action, known Propagation) error {
	order := Order{Actor: "schedule", Evidence: known}
	var err error
	switch next.do {
	case "prepare":
		// Another replica may have prepared one meanwhile, and activated it: then this
		// one would be the next but one, half of whose life has passed by then.
		_, err = i.change(ctx, next.do, order, func(d *draft) (string, error) {
			if again, _, _ := step(d.now, d.set, d.evidence, d.life, i.awaited()); again != next {
				return "", nil
			}
			return i.ensurePrepared(ctx, d)
		})
	case "activate":
		_, err = i.Activate(ctx, next.id, order)
	case "revoke":
		_, err = i.Revoke(ctx, next.id, order)
	case "forget":
		err = i.forget(ctx, next.id, order)
	}
	return err
}
