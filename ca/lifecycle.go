package ca

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"troth.dev/troth/storage"
)

// The operations on authorities. Each is one compare-and-swap of the whole
// document, decided anew on what the store holds whenever another replica was
// faster, and each may be repeated: what is so already is left alone and returned.
//
// A crash before the Swap leaves everything as it was; a key that was made for a
// new authority is lost, and nobody has seen it. A crash after it leaves the
// change complete, with its Change in the history, and only the audit line is
// missing. No key signs before the Swap that made its authority active: this
// replica takes it from the document, like every other.

// Order says who wants a change, why, and by what evidence.
type Order struct {
	// Actor is who: a SPIFFE ID or a user's name. Required.
	Actor string
	// Reason is why, in a line. Required with Force.
	Reason string
	// Force carries out what evidence speaks against: agents that have not proved
	// that they trust an authority fail, and so does what is held under one that
	// is revoked. It is recorded. It never activates an authority that ends too
	// soon, and never leaves a trust domain without an active one.
	Force bool
	// Evidence is what is known of the agents. Prepare and Abort need none.
	Evidence Propagation
}

// maxOrderText bounds Actor and Reason, in bytes: every authority keeps them.
const maxOrderText = 512

func (o Order) check() error {
	if o.Actor == "" {
		return fmt.Errorf("%w names no actor", ErrOrder)
	}
	if o.Force && strings.TrimSpace(o.Reason) == "" {
		return fmt.Errorf("%w has force and no reason", ErrOrder)
	}
	for _, text := range []string{o.Actor, o.Reason} {
		if len(text) > maxOrderText || !utf8.ValidString(text) || strings.ContainsFunc(text, unicode.IsControl) {
			return fmt.Errorf("%w has %.64q, which is longer than %d bytes or no line of text", ErrOrder, text, maxOrderText)
		}
	}
	return nil
}

// Prepare adds an authority to the bundle that signs nothing yet, and returns it.
// If there is a prepared one that lives for long enough, it returns that; one that
// does not is revoked in the same step. With an upstream, the authority is what that
// has delivered, and Prepare returns [*Blocked] if that is nothing new: only the
// upstream can issue another.
func (i *Issuer) Prepare(ctx context.Context, order Order) (Authority, error) {
	return i.change(ctx, "prepare", order, func(d *draft) (string, error) {
		return i.ensurePrepared(ctx, d)
	})
}

// Activate lets a prepared authority sign, in the place of the active one, which
// is Old from then on, or Tainted if that was pending. It returns the authority,
// or [*Blocked] unless
//
//   - every expected agent has proved that it trusts this very authority. Where
//     none is expected, no SVID may live but the servers' own and, if the bundle is
//     published, those of [KubeletCaller]: then there is nobody who could be cut off;
//   - if the bundle is published, it has been so with this authority in it for as long
//     as Config.Publication says;
//   - it lives for at least two more lives of an SVID, which no Force overrides.
func (i *Issuer) Activate(ctx context.Context, id string, order Order) (Authority, error) {
	return i.change(ctx, "activate", order, func(d *draft) (string, error) {
		switch a, err := d.find(id); {
		case err != nil || a.State == Active:
			return id, err
		case a.State != Prepared:
			return "", d.wrongState(a, "only a prepared one can be activated")
		default:
			if err := d.gate(a, d.mayActivate(a)); err != nil {
				return "", err
			}
		}
		d.activate(id, Old)
		return id, nil
	})
}

// Taint has agents replace what an authority signed, within a twelfth of an SVID's
// life, and drop it after. It returns the authority as it is then.
//
// The active authority is replaced first: at once if its successor may be
// activated, or by Force. Otherwise it stays active with TaintPending, a successor
// is prepared if there is none, and Rotate replaces it as soon as that may be. A
// successor that an upstream has yet to issue is waited for, and no Force replaces it.
//
// If the key of an authority under an upstream root is stolen, this is half of what is
// to be done: see [Upstream]. Move to another root, or open the Issuer without an
// upstream, and Taint then.
//
// Taint of a prepared one is [*Blocked]: nothing was signed by it; abort it.
func (i *Issuer) Taint(ctx context.Context, id string, order Order) (Authority, error) {
	return i.change(ctx, "taint", order, func(d *draft) (string, error) {
		a, err := d.find(id)
		if err != nil {
			return "", err
		}
		switch a.State {
		case Tainted, Revoked:
			return id, nil
		case Prepared:
			return "", d.wrongState(a, "it signed nothing: abort it")
		case Old:
			d.move(id, Tainted)
			return id, nil
		}
		next, ok := d.set.Successor()
		if !ok || d.endsTooSoon(next) {
			next.ID, err = i.ensurePrepared(ctx, d)
			if blocked := (*Blocked)(nil); errors.As(err, &blocked) && !order.Force {
				if !a.TaintPending {
					d.edit(id, func(a *Authority) { a.TaintPending = true })
				}
				return id, nil
			}
			if err != nil {
				return "", err
			}
			next, _ = d.next.Authority(next.ID)
		}
		if order.Force || len(d.mayActivate(next)) == 0 {
			d.activate(next.ID, Tainted)
		} else if !a.TaintPending {
			d.edit(id, func(a *Authority) { a.TaintPending = true })
		}
		return id, nil
	})
}

// Revoke drops an old or tainted authority from the bundle, and its key. It
// returns the authority, or [*Blocked] unless nothing depends on it any more:
// no replica can still take it for the active one, and
//
//   - every SVID that the ledger lists under it has expired, or
//   - every expected agent reports that neither it nor its workloads hold an SVID
//     or a connection under it, and whatever else holds one has expired.
//
// An active authority is never revoked: taint it. A prepared one is aborted.
func (i *Issuer) Revoke(ctx context.Context, id string, order Order) (Authority, error) {
	return i.change(ctx, "revoke", order, func(d *draft) (string, error) {
		switch a, err := d.find(id); {
		case err != nil || a.State == Revoked:
			return id, err
		case a.State == Active:
			return "", d.wrongState(a, "taint it, so that another takes its place first")
		case a.State == Prepared:
			return "", d.wrongState(a, "it signed nothing: abort it")
		default:
			if err := d.gate(a, d.mayRevoke(a)); err != nil {
				return "", err
			}
		}
		d.move(id, Revoked)
		return id, nil
	})
}

// Abort drops a prepared authority from the bundle, and its key: nothing was ever
// signed by it. It returns the authority, or [*Blocked] if it is in another state.
func (i *Issuer) Abort(ctx context.Context, id string, order Order) (Authority, error) {
	return i.change(ctx, "abort", order, func(d *draft) (string, error) {
		switch a, err := d.find(id); {
		case err != nil || a.State == Revoked:
			return id, err
		case a.State != Prepared:
			return "", d.wrongState(a, "only a prepared one can be aborted")
		}
		d.move(id, Revoked)
		return id, nil
	})
}

// Obstacles returns what is in the way of the next step of each authority of the
// present set, for who shows it: of the activation of each prepared one, and of the
// revocation of each that is old or tainted. One whose next step would be carried
// out now is left out. It decides nothing and changes nothing, but it may ask the
// ledger, and blocks for as long as that takes.
func (i *Issuer) Obstacles(ctx context.Context, known Propagation) []*Blocked {
	set, _ := i.set.Load()
	now := time.Now()
	d := &draft{now: now, life: i.profile.life, evidence: i.evidence(ctx, now, set, known), set: set}
	var all []*Blocked
	for _, a := range set.Authorities {
		operation, blockers := "", []Blocker(nil)
		switch a.State {
		case Prepared:
			operation, blockers = "activate", d.mayActivate(a)
		case Old, Tainted:
			operation, blockers = "revoke", d.mayRevoke(a)
		case Active, Revoked:
		}
		if len(blockers) > 0 {
			all = append(all, d.blocked(operation, a, blockers))
		}
	}
	return all
}

// forget removes from the document what was revoked a while ago.
func (i *Issuer) forget(ctx context.Context, id string, order Order) error {
	_, err := i.change(ctx, "forget", order, func(d *draft) (string, error) {
		if a, ok := d.set.Authority(id); ok && d.mayForget(a) {
			d.drop(id)
		}
		return id, nil
	})
	return err
}

// change carries out an operation: load, decide, swap, and again from the start
// whenever somebody else was faster. edit decides on the draft and returns whose
// change it is; it may be called many times.
func (i *Issuer) change(ctx context.Context, operation string, order Order, edit func(*draft) (id string, err error)) (Authority, error) {
	if err := order.check(); err != nil {
		return Authority{}, err
	}
	// As often as somebody else gets something done, and no more: a store that
	// always answers conflict must not keep us busy for ever.
	const tries = 100
	made := Authority{} // a key is made once for all tries
	for range tries {
		state, err := i.refresh(ctx)
		if err != nil {
			return Authority{}, fmt.Errorf("%w: %s an authority: %w", ErrStore, operation, err)
		}
		now := time.Now()
		d := &draft{
			now: now, operation: operation, order: order, life: i.profile.life,
			evidence: i.evidence(ctx, now, state.set, order.Evidence), set: state.set, made: made,
		}
		id, err := edit(d)
		made = d.made
		if err != nil {
			return Authority{}, err
		}
		if d.next.Revision == 0 { // it is so already
			a, _ := state.set.Authority(id)
			return a, nil
		}
		if err := d.record(); err != nil {
			return Authority{}, err
		}
		err = i.swap(ctx, state.version, d.next)
		if errors.Is(err, storage.ErrConflict) {
			continue
		}
		if err != nil {
			return Authority{}, fmt.Errorf("%w: %s an authority: %w", ErrStore, operation, err)
		}
		d.audit(ctx, i.config.Audit, id)
		a, _ := d.next.Authority(id)
		return a, nil
	}
	return Authority{}, fmt.Errorf("%w: %s an authority: %d tries: %w", ErrStore, operation, tries, storage.ErrConflict)
}

// swap stores the next set in the place of the version given, and uses it.
func (i *Issuer) swap(ctx context.Context, version string, next Set) error {
	data, err := next.encode()
	if err != nil {
		return err
	}
	asked := time.Now()
	doc, err := i.config.Authorities.Swap(ctx, version, data)
	if err != nil && !errors.Is(err, storage.ErrConflict) && !errors.Is(err, storage.ErrDocumentSize) {
		// It may have been stored all the same. Whether it was decides over the
		// audit line, and what the caller is told.
		now, loadErr := i.config.Authorities.Load(ctx)
		if loadErr != nil || !bytes.Equal(now.Data, data) {
			return err
		}
		doc, err = now, nil
	}
	if err != nil {
		return err
	}
	select {
	case i.using <- struct{}{}:
		defer func() { <-i.using }()
	case <-ctx.Done():
		return nil // stored it is; Run takes it up
	}
	if state, _ := i.state.Load(); state.set.Revision < next.Revision {
		if _, err := i.use(ctx, doc, asked); err != nil {
			// The change is stored and stands; Run takes it up, and says so if it
			// goes on to fail.
			i.config.Audit.LogAttrs(ctx, slog.LevelError, "the changed authorities are not in use yet", slog.Any("err", err))
		}
	}
	return nil
}

// ensurePrepared makes sure that the draft has a prepared authority that lives for
// long enough, and returns its ID.
func (i *Issuer) ensurePrepared(ctx context.Context, d *draft) (string, error) {
	if next, ok := d.set.Successor(); ok && !d.endsTooSoon(next) {
		return next.ID, nil
	}
	var err error
	switch {
	case i.config.Upstream != nil:
		if d.made, err = i.delivered(ctx, d.now, d.set); err != nil {
			blocked := awaitUpstream("", detail(err))
			blocked.Operation = d.operation
			if a, ok := d.set.Active(); ok {
				blocked.Authority = a.ID
			}
			return "", blocked
		}
	case d.made.Certificate == nil:
		if d.made, err = i.newAuthority(ctx, d.now, d.set); err != nil {
			return "", err
		}
	}
	d.prepare(d.made)
	return d.made.ID, nil
}

// draft is a change of a set in the making: what it is decided by, and what the
// set becomes.
type draft struct {
	now       time.Time
	operation string
	order     Order
	life      time.Duration // of an SVID
	evidence  evidence
	set       Set       // what is stored; never changed
	next      Set       // of revision 0 until something changes
	made      Authority // by ensurePrepared, perhaps for an earlier draft
	dropped   []Change  // of those that are not in next any more
	bundle    string    // the hash of the bundle of next; by record
}

// begin makes next a copy that may be changed.
func (d *draft) begin() {
	if d.next.Revision == 0 {
		d.next = d.set
		d.next.Revision++
		d.next.Authorities = append([]Authority(nil), d.set.Authorities...)
	}
}

// prepare adds a prepared authority in the place of those that are prepared.
func (d *draft) prepare(made Authority) {
	d.begin()
	for _, a := range d.set.Authorities {
		if a.State == Prepared {
			d.move(a.ID, Revoked)
		}
	}
	d.next.Authorities = append(d.next.Authorities, made)
	d.move(made.ID, Prepared)
}

func (d *draft) find(id string) (Authority, error) {
	a, ok := d.set.Authority(id)
	if !ok {
		return Authority{}, fmt.Errorf("%w: %.64q", ErrUnknownAuthority, id)
	}
	return a, nil
}

// edit changes one authority and records who did.
func (d *draft) edit(id string, change func(*Authority)) {
	d.begin()
	for n := range d.next.Authorities {
		a := &d.next.Authorities[n]
		if a.ID != id {
			continue
		}
		a.Changed = d.change(*a)
		change(a)
		a.Changed.State = a.State
	}
}

// change returns the record of a change of the authority, as it is.
func (d *draft) change(a Authority) Change {
	return Change{
		AuthorityID: a.ID, State: a.State, At: d.now.UTC().Truncate(time.Millisecond), Revision: d.next.Revision,
		Operation: d.operation, Actor: d.order.Actor, Reason: d.order.Reason, Forced: d.order.Force, Evidence: d.evidence.text(),
	}
}

// drop removes a revoked authority from the document. Its history stays.
func (d *draft) drop(id string) {
	d.begin()
	kept := d.next.Authorities[:0]
	for _, a := range d.next.Authorities {
		if a.ID != id {
			kept = append(kept, a)
			continue
		}
		c := d.change(a)
		c.Operation = "forget"
		d.dropped = append(d.dropped, c)
	}
	d.next.Authorities = kept
}

// record adds all that the draft changes to the history, and keeps the document
// within what a store has to take.
func (d *draft) record() error {
	d.bundle = d.next.Bundle().SHA256()
	d.next.History = append([]Change(nil), d.set.History...)
	for n := range d.next.Authorities {
		if a := &d.next.Authorities[n]; a.Changed.Revision == d.next.Revision {
			a.Changed.BundleSHA256 = d.bundle
			d.next.History = append(d.next.History, a.Changed)
		}
	}
	for {
		for _, c := range d.dropped {
			c.BundleSHA256 = d.bundle // what is revoked is not in it
			d.next.History = append(d.next.History, c)
		}
		d.dropped = nil
		var err error
		if d.next.History, err = newest(d.next.History); err != nil {
			return err
		}
		data, err := d.next.encode()
		if err != nil {
			return err
		}
		// Who prepares and aborts all day must not make all that is revoked since a
		// week fill the document.
		const room = storage.MaxDocument * 7 / 8
		oldest := d.next.longestRevoked()
		if len(data) <= room || oldest.ID == "" || oldest.Changed.Revision == d.next.Revision {
			return nil
		}
		d.drop(oldest.ID)
	}
}

// newest returns as many of the last changes as a history holds.
func newest(history []Change) ([]Change, error) {
	first, size := len(history), 0
	for first > 0 && len(history)-first < maxHistory {
		one, err := json.Marshal(storedChange(history[first-1]))
		if err != nil {
			return nil, fmt.Errorf("ca: record a change: %w", err)
		}
		if size += len(one) + len(","); size > maxHistoryBytes {
			break
		}
		first--
	}
	return history[first:], nil
}

// move puts an authority into another state.
func (d *draft) move(id string, to State) {
	d.edit(id, func(a *Authority) {
		a.State, a.TaintPending, a.ReissueBy = to, false, time.Time{}
		switch to {
		case Old:
			a.ReissueBy = a.Changed.At.Add(d.life / 2)
		case Tainted:
			a.ReissueBy = a.Changed.At.Add(d.life / 12)
		case Revoked:
			a.Key, a.Upstream = nil, nil
		}
	})
}

// activate makes an authority the active one; the one before it becomes what was
// given, or tainted if that was pending.
func (d *draft) activate(id string, before State) {
	if a, ok := d.set.Active(); ok {
		if a.TaintPending {
			before = Tainted
		}
		d.move(a.ID, before)
	}
	d.move(id, Active)
}

// gate returns what is in the way, unless the order has force enough.
func (d *draft) gate(a Authority, blockers []Blocker) error {
	if len(blockers) == 0 {
		return nil
	}
	blocked := d.blocked(d.operation, a, blockers)
	if d.order.Force && blocked.Forcible() {
		return nil
	}
	return blocked
}

func (d *draft) blocked(operation string, a Authority, blockers []Blocker) *Blocked {
	blocked := &Blocked{Operation: operation, Authority: a.ID, Blockers: blockers}
	for _, b := range blockers {
		if b.Obstacle == AgentsMissing {
			blocked.Waiting = d.evidence.Waiting
		}
	}
	return blocked
}

func (d *draft) wrongState(a Authority, advice string) error {
	return &Blocked{Operation: d.operation, Authority: a.ID, Blockers: []Blocker{
		{Obstacle: WrongState, Detail: fmt.Sprintf("it is %v; %s", a.State, advice)},
	}}
}

// endsTooSoon says whether an authority would need a successor before it has
// signed for as long as an SVID lives.
func (d *draft) endsTooSoon(a Authority) bool {
	return a.NotAfter().Sub(d.now) < 2*max(d.life, d.evidence.longest)
}

// mayActivate returns what keeps a prepared authority from being activated.
func (d *draft) mayActivate(a Authority) []Blocker {
	if d.endsTooSoon(a) {
		return []Blocker{{Obstacle: LifeTooShort, Detail: fmt.Sprintf("it ends at %s, before two lives of an SVID of %v have passed: abort it, and prepare another",
			a.NotAfter().UTC().Format(time.RFC3339), max(d.life, d.evidence.longest))}}
	}
	e, blockers := d.evidence, d.unpublished(a)
	if err := e.check(d.now); err != nil {
		return append(blockers, Blocker{Obstacle: EvidenceMissing, Detail: err.Error()})
	}
	switch {
	case e.Expected == 0 && e.others == nil:
		return append(blockers, Blocker{Obstacle: EvidenceMissing, Detail: fmt.Sprintf("no agent is expected, and the ledger does not say who else there is: %v", e.failed)})
	case e.Expected == 0 && !d.now.Before(e.others.until):
		return blockers
	case e.Expected == 0:
		return append(blockers, Blocker{Obstacle: HeldElsewhere, Until: e.others.until,
			Detail: "no agent is expected, but SVIDs are alive until " + e.others.until.UTC().Format(time.RFC3339)})
	case e.Authority != a.ID, e.Revision < a.Changed.Revision:
		return append(blockers, Blocker{Obstacle: AgentsMissing, Detail: fmt.Sprintf("proved 0/%s: nothing is known of it yet", grouped(e.Expected))})
	case e.Proved < e.Expected:
		return append(blockers, Blocker{Obstacle: AgentsMissing, Detail: e.Progress(d.now)})
	}
	return blockers
}

// unpublished says that those who have no agent may not have got the bundle with this
// authority yet, or nothing if nobody gets it from where it is published.
func (d *draft) unpublished(a Authority) []Blocker {
	e := d.evidence
	if e.publication == 0 {
		return nil
	}
	since, ok := e.published[a.ID]
	if !ok {
		return []Blocker{{Obstacle: BundleUnpublished, Detail: "the bundle with it is not published at every place yet"}}
	}
	if ripe := since.Add(e.publication); d.now.Before(ripe) {
		return []Blocker{{Obstacle: BundleUnpublished, Until: ripe,
			Detail: "the bundle with it is published, and whoever reads it there has until " + ripe.UTC().Format(time.RFC3339) + " to do so"}}
	}
	return nil
}

// mayRevoke returns what keeps an authority, which is not active, from being
// revoked.
func (d *draft) mayRevoke(a Authority) []Blocker {
	e := d.evidence
	quiet, ok := e.quiet[a.ID]
	settled := quiet.Add(settleOf(d.life))
	if !ok || d.now.Before(settled) {
		return []Blocker{{Obstacle: ReplicasMaySign, Until: settled,
			Detail: "a replica may take it for the active one until " + settled.UTC().Format(time.RFC3339)}}
	}
	left, ok := e.left[a.ID]
	if !ok {
		return []Blocker{{Obstacle: EvidenceMissing, Detail: fmt.Sprintf("the ledger does not say what it signed: %v", e.failed)}}
	}
	if d.now.After(left.until) {
		return nil
	}
	blockers := []Blocker{{Obstacle: SVIDsLive, Until: left.until,
		Detail: "SVIDs that it signed live until " + left.until.UTC().Format(time.RFC3339)}}
	switch err := e.check(d.now); {
	case err != nil:
		return append(blockers, Blocker{Obstacle: EvidenceMissing, Detail: err.Error()})
	case e.Expected == 0, e.Reporting < e.Expected:
		return append(blockers, Blocker{Obstacle: EvidenceMissing, Detail: fmt.Sprintf("%s of %s agents have said all that they hold: one that was started less than %v ago cannot know what was handed out before",
			grouped(e.Reporting), grouped(e.Expected), d.life)})
	case e.Reported.Before(settled.Add(maxSkew)):
		return append(blockers, Blocker{Obstacle: EvidenceMissing, Detail: fmt.Sprintf("the oldest report of what an agent holds is of %s, and has to be of %s or later",
			e.Reported.UTC().Format(time.RFC3339), settled.Add(maxSkew).UTC().Format(time.RFC3339))})
	case e.Uses[a.ID] != Use{}:
		use := e.Uses[a.ID]
		return append(blockers, Blocker{Obstacle: HeldByAgents, Detail: fmt.Sprintf("agents hold %s SVIDs and %s connections under it",
			grouped(use.SVIDs), grouped(use.Connections))})
	case !d.now.After(left.elsewhere):
		return append(blockers, Blocker{Obstacle: HeldElsewhere, Until: left.elsewhere,
			Detail: "somebody whom no agent reports holds an SVID under it until " + left.elsewhere.UTC().Format(time.RFC3339)})
	}
	return nil
}

// remembered is how long a revoked authority stays in the document.
const remembered = 7 * 24 * time.Hour

func (d *draft) mayForget(a Authority) bool {
	return a.State == Revoked && d.now.Sub(a.Changed.At) >= remembered
}

// audit writes one line for each operation that changed something.
func (d *draft) audit(ctx context.Context, log *slog.Logger, id string) {
	attrs := []slog.Attr{
		slog.String("operation", d.operation),
		slog.String("actor", d.order.Actor),
		slog.String("reason", d.order.Reason),
		slog.Bool("forced", d.order.Force),
		slog.Time("at", d.now),
		slog.String("authority_id", id),
		slog.Uint64("revision", d.next.Revision),
		slog.String("bundle_sha256", d.bundle),
		slog.String("evidence", d.evidence.text()),
	}
	var changed []any
	for _, a := range d.next.Authorities {
		if a.Changed.Revision == d.next.Revision {
			changed = append(changed, slog.String(a.ID, a.State.String()))
		}
	}
	attrs = append(attrs, slog.Group("states", changed...))
	log.LogAttrs(ctx, slog.LevelInfo, "authority changed", attrs...)
}
