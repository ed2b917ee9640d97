package ca

import (
	"context"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/identity"
	"troth.dev/troth/storage"
)

// When is it known that nothing will ever be signed by an authority again, and
// what lives that was? Replicas learn of a change one after the other, and one
// that was stopped for an hour still holds the document of an hour ago. No time
// that is written into the document says when the last of them stopped: who
// writes it may be stopped between reading the clock and storing. So:
//
//   - A replica releases a certificate only within a lease after the store last
//     confirmed that its document was the current one (Issue, steps 0 and 7).
//   - A replica that has loaded a document in which the authority is not active
//     knows that no confirmation after that says otherwise. A lease later, by its
//     own clock, no replica releases anything under the authority any more.
//   - All that was released was recorded before. So whoever queries the ledger
//     then sees all that there will ever be, and the latest NotAfter in it is
//     exact, whatever the clocks of the replicas said.
//
// A replica waits anew after a restart, because only it knows when it looked. The
// clocks of two machines never meet in this, only the speeds at which they run.
// What it does not see is a machine whose clocks all stand still between the
// confirmation and Record, as under a hypervisor that stops it: for that, a store
// would have to refuse a Record by the version of the document. Such an SVID
// verifies nowhere, and its agent asks for another.

// settleOf is how long a replica waits after it saw that an authority is not active
// before it believes that nothing is released under it: a lease, and what clocks
// that run unequally and a release on its way need.
func settleOf(svidLife time.Duration) time.Duration { return leaseOf(svidLife) * 4 / 3 }

// evidence is all that a change is decided by.
type evidence struct {
	Propagation
	quiet  map[string]time.Time // since when this replica knows the authority not to sign
	left   map[string]leaves    // what the ledger lists, of those that are settled
	others *leaves              // what the ledger lists but the servers' own, if no agent is expected
	failed error                // why the ledger said less

	longest     time.Duration        // that an SVID may live
	publication time.Duration        // as Config has it
	published   map[string]time.Time // since when the bundle that has the authority is published
}

// leaves says how long what somebody signed lives: the latest NotAfter of all, and
// of those that no agent reports on. Zero is a time at which nothing lives.
type leaves struct {
	until, elsewhere time.Time
}

// observe remembers since when authorities are known not to sign.
func (i *Issuer) observe(set Set) {
	now := time.Now()
	i.mu.Lock()
	defer i.mu.Unlock()
	known := make(map[string]time.Time, len(set.Authorities))
	for _, a := range set.Authorities {
		if a.State == Prepared || a.State == Active {
			continue
		}
		if known[a.ID] = now; !i.quiet[a.ID].IsZero() {
			known[a.ID] = i.quiet[a.ID]
		}
	}
	i.quiet = known
	for id := range i.left {
		if known[id].IsZero() {
			delete(i.left, id)
		}
	}
}

// evidence adds to what is known of agents what this replica and the ledger know.
// Where the ledger cannot be asked, the gates that need it stay closed and say so.
func (i *Issuer) evidence(ctx context.Context, now time.Time, set Set, agents Propagation) evidence {
	e := evidence{
		Propagation: agents, quiet: make(map[string]time.Time), left: make(map[string]leaves),
		longest: i.config.LongestLife, publication: i.config.Publication,
	}
	e.published, _ = i.published.Load()
	for _, a := range set.Authorities {
		i.mu.Lock()
		quiet, settled := i.quiet[a.ID]
		left, known := i.left[a.ID]
		i.mu.Unlock()
		if !settled || a.State == Revoked {
			continue
		}
		e.quiet[a.ID] = quiet
		if !known && now.Sub(quiet) >= settleOf(i.profile.life) {
			// Once: there will be no more.
			if left, e.failed = i.alive(ctx, now, a.ID, reportedByAgent); e.failed != nil {
				continue
			}
			known = true
			i.mu.Lock()
			i.left[a.ID] = left
			i.mu.Unlock()
		}
		if known {
			e.left[a.ID] = left
		}
	}
	if agents.Expected != 0 || agents.check(now) != nil {
		return e
	}
	server, err := identity.ServerID(set.TrustDomain)
	if err != nil {
		e.failed = err
		return e
	}
	others, err := i.alive(ctx, now, "", func(l storage.Issuance) bool {
		// Who has one from the kubelet is told by what is published, for which there is
		// a gate of its own. The ledger may be another trust domain's too: that for tests
		// has the same.
		return l.ID == server || l.Caller == probeCaller || l.Caller == KubeletCaller && e.publication > 0 ||
			!l.ID.MemberOf(set.TrustDomain)
	})
	if err != nil {
		e.failed = err
		return e
	}
	e.others = &leaves{until: others.elsewhere}
	return e
}

// alive asks the ledger how long what an authority signed lives, or what all did.
// It reads all of it, page by page: SVIDs of different lives do not expire in the
// order in which they were issued.
func (i *Issuer) alive(ctx context.Context, now time.Time, authorityID string, reported func(storage.Issuance) bool) (leaves, error) {
	var found leaves
	for _, q := range []storage.Query{
		{AuthorityID: authorityID, ValidAt: now, IssuedFrom: now.Add(-maxLife - time.Second)},
		{AuthorityID: authorityID, IssuedFrom: now}, // by replicas whose clocks are ahead
	} {
		for {
			page, err := i.config.Ledger.Query(ctx, q)
			if err != nil {
				return leaves{}, fmt.Errorf("ca: ask the ledger what is alive: %w", err)
			}
			for _, l := range page {
				found.until = later(found.until, l.NotAfter)
				if !reported(l) {
					found.elsewhere = later(found.elsewhere, l.NotAfter)
				}
			}
			if len(page) < q.Max() {
				break
			}
			// What the page holds of its last millisecond comes again, lest the rest
			// be missed. If that is all it holds, what else there is of it cannot be
			// asked for: it lives for as long as it might.
			last := page[len(page)-1].IssuedAt
			if next := last.Add(time.Millisecond); !next.Equal(q.IssuedUntil) {
				q.IssuedUntil = next
				continue
			}
			q.IssuedUntil = last
			found.until = later(found.until, last.Add(maxLife))
			found.elsewhere = later(found.elsewhere, last.Add(maxLife))
		}
	}
	return found, nil
}

// reportedByAgent says whether an agent knows of an SVID: its own, or one that it
// asked for. Nobody holds a probe's key.
func reportedByAgent(l storage.Issuance) bool {
	if l.Caller == probeCaller {
		return true
	}
	if _, err := identity.ParseAgent(l.ID); err == nil {
		return true
	}
	caller, err := spiffeid.FromString(l.Caller)
	if err != nil {
		return false
	}
	_, err = identity.ParseAgent(caller)
	return err == nil
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// text is the evidence in one line, for the record.
func (e evidence) text() string {
	if e.At.IsZero() {
		return ""
	}
	return fmt.Sprintf("proved %d/%d of %.64q at revision %d, %d reporting, known at %s", e.Proved, e.Expected, e.Authority, e.Revision,
		e.Reporting, e.At.UTC().Format(time.RFC3339))
}
