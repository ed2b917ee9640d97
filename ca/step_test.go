package ca_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"troth.dev/troth/ca"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/storage"
)

// What the schedule does, by the state of the set and the age of the active
// authority, which lives for 30 days. Times are since it began.
func TestStep(t *testing.T) {
	const day = 24 * time.Hour
	life := 30*day + 10*time.Minute // with what it is backdated by
	config := newConfig(t)
	open(t, config)
	base := stored(t, config.Authorities)
	second, third := anotherAuthority(t, config, "prepared"), anotherAuthority(t, config, "old")
	decode := func(t *testing.T, states string) ca.Set {
		d := base
		d.Authorities = nil
		for n, state := range strings.Fields(states) {
			a := []authority{base.Authorities[0], second, third}[n]
			a.State = strings.TrimSuffix(state, "+taint")
			d.Authorities = append(d.Authorities, a)
		}
		set, err := ca.DecodeSet(d.encode(t))
		if err != nil {
			t.Fatal(err)
		}
		for n, state := range strings.Fields(states) {
			set.Authorities[n].TaintPending = strings.HasSuffix(state, "+taint")
		}
		return set
	}
	const (
		nobody   = iota // no evidence
		all             // have proved it and hold nothing
		notAll          // have proved it
		settled         // and the ledger lists nothing
		expiring        // and the ledger lists what lives for five minutes
	)
	for _, test := range []struct {
		states string
		after  time.Duration
		known  int
		do     string // and on which of the authorities
		on     int
		wake   time.Duration // from then
		late   bool
		await  string // an upstream
	}{
		{"active", 0, nobody, "", 0, 10 * time.Minute, false, ""},
		{"active", life/2 - time.Minute, nobody, "", 0, time.Minute, false, ""},
		{"active", life / 2, nobody, "prepare", 0, 0, false, ""},
		{"active", life / 2, all, "", 0, 10 * time.Minute, false, "nothing"}, // it is for the upstream
		{"active", life * 2 / 3, all, "", 0, 10 * time.Minute, false, "nothing"},
		{"active", life*3/4 - time.Minute, all, "", 0, time.Minute, false, "nothing"},
		{"active", life * 3 / 4, all, "", 0, 10 * time.Minute, true, "nothing"},
		{"active+taint", 0, all, "", 0, 10 * time.Minute, true, "nothing"},
		{"active prepared", life - time.Hour, all, "", 0, 10 * time.Minute, true, "nothing"},
		{"active prepared", life / 2, all, "activate", 1, 0, false, "nothing"},
		{"active prepared", life/2 - 1, all, "", 0, 1, false, ""},
		{"active prepared", life / 2, all, "activate", 1, 0, false, ""},
		{"active prepared", life / 2, notAll, "", 0, 10 * time.Minute, false, ""},
		{"active prepared", life / 2, nobody, "", 0, 10 * time.Minute, false, ""},
		{"active prepared", life*2/3 - time.Minute, notAll, "", 0, time.Minute, false, ""},
		{"active prepared", life * 2 / 3, notAll, "", 0, 10 * time.Minute, true, ""},
		{"active prepared", life * 2 / 3, nobody, "", 0, 10 * time.Minute, true, ""},
		{"active prepared", life * 2 / 3, all, "activate", 1, 0, false, ""},
		{"active prepared", life - time.Hour, all, "prepare", 0, 0, false, ""}, // its successor ends as soon
		{"active+taint", 0, all, "prepare", 0, 0, false, ""},
		{"active+taint prepared", 0, notAll, "", 0, 10 * time.Minute, true, ""},
		{"active+taint prepared", 0, all, "activate", 1, 0, false, ""},
		{"old", 0, nobody, "prepare", 0, 0, false, ""},
		{"old prepared", 0, all, "activate", 1, 0, false, ""},
		{"old prepared", 0, notAll, "", 0, 10 * time.Minute, true, ""},
		{"active revoked old", 0, all, "", 0, 10 * time.Minute, false, ""}, // not known to be quiet
		{"active revoked old", 0, settled, "revoke", 2, 0, false, ""},
		{"active revoked tainted", 0, settled, "revoke", 2, 0, false, ""},
		{"active revoked old", 0, expiring, "", 0, 5*time.Minute + time.Second, false, ""},
		{"active prepared old", life / 2, settled, "revoke", 2, 0, false, ""}, // while the successor is not proved
		{"active revoked", 0, nobody, "", 0, 10 * time.Minute, false, ""},
		{"active revoked", 7 * day, nobody, "forget", 1, 0, false, ""},
		{"active revoked", 7*day - time.Minute, nobody, "", 0, time.Minute, false, ""},
	} {
		t.Run(fmt.Sprintf("%s after %v, evidence %d", test.states, test.after, test.known), func(t *testing.T) {
			set := decode(t, test.states)
			begins := set.Authorities[0].Certificate.NotBefore
			for n := range set.Authorities {
				if set.Authorities[n].State == ca.Revoked {
					set.Authorities[n].Changed.At = begins
				}
			}
			now := begins.Add(test.after)
			if test.states == "active revoked old" || test.states == "active revoked tainted" {
				set.Authorities[1].Changed.At = now
			}
			next, _ := set.Successor()
			k := ca.Known{Agents: ca.Propagation{At: now, Expected: 2, Received: 2, Applied: 2, Proved: 2, Authority: next.ID, Revision: set.Revision}}
			k.Awaited = test.await
			switch test.known {
			case nobody:
				k.Agents = ca.Propagation{}
			case notAll, settled, expiring:
				k.Agents.Proved = 1
			}
			if test.known >= settled {
				id := set.Authorities[2].ID
				k.Quiet = map[string]time.Time{id: now.Add(-ca.Settle)}
				k.Left = map[string]time.Time{id: {}}
				if test.known == expiring {
					k.Left[id] = now.Add(5 * time.Minute)
				}
			}
			do, id, wake, overdue := ca.Step(now, set, k, time.Hour)
			if do != test.do {
				t.Fatalf("does %q, want %q", do, test.do)
			}
			wantID := ""
			if test.do != "" && test.do != "prepare" {
				wantID = set.Authorities[test.on].ID
			}
			if id != wantID {
				t.Errorf("%s %s, want %s", do, id, wantID)
			}
			if (overdue != nil) != test.late {
				t.Errorf("overdue: %v, want %t", overdue, test.late)
			}
			if test.do == "" && wake.Sub(now) != test.wake {
				t.Errorf("wakes after %v, want %v", wake.Sub(now), test.wake)
			}
		})
	}
}

// fleet is agents that follow the bundle of an issuer, replace what they hold when
// they are told to, and report the truth.
type fleet struct {
	agents  int
	offline atomic.Int32
	known   latest.Value[ca.Propagation]
}

const agentID = "spiffe://example.test/troth/agent/n/6f1d2ab2-7c1b-4e34-9d0c-0f5cf6f5a0a1/p/6f1d2ab2-7c1b-4e34-9d0c-0f5cf6f5a0a2"

// run reports every 30 seconds, and issues one SVID in 5 minutes as each of the
// issuers in turn. It ends with ctx.
func (f *fleet) run(t *testing.T, ctx context.Context, issuers []*ca.Issuer) {
	type held struct {
		svid ca.SVID
		at   time.Time
	}
	var svids []held
	request := requestFor(t)
	request.Caller = agentID
	for n := 0; ctx.Err() == nil; n++ {
		issuer := issuers[n%len(issuers)]
		bundle := currentBundle(issuer)
		if n%10 == 0 {
			svid := issue(t, issuer, request)
			svids = append(svids, held{svid, time.Now()})
		}
		trusted := make(map[string]bool)
		reissue := make(map[string]bool)
		for _, a := range bundle.Authorities {
			trusted[a.ID] = true
			reissue[a.ID] = !a.ReissueBy.IsZero() && !time.Now().Before(a.ReissueBy)
		}
		svids = slices.DeleteFunc(svids, func(h held) bool {
			return reissue[h.svid.AuthorityID] || time.Since(h.at) > 45*time.Minute
		})
		uses := make(map[string]ca.Use)
		for _, h := range svids {
			if !trusted[h.svid.AuthorityID] {
				t.Errorf("%v: an agent holds an SVID under %s, which is not in the bundle", time.Now(), h.svid.AuthorityID)
				return
			}
			use := uses[h.svid.AuthorityID]
			use.SVIDs++
			uses[h.svid.AuthorityID] = use
		}
		set := currentSet(issuer)
		p := proved(set, f.agents)
		p.Proved -= int(f.offline.Load())
		p.Uses = uses
		f.known.Set(p)
		select {
		case <-ctx.Done():
		case <-time.After(30 * time.Second):
		}
	}
}

// Three replicas rotate for days with nobody to help them: what they issue
// always verifies, and nothing piles up.
func TestRotate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := newConfig(t)
		config.AuthorityLife = 8 * time.Hour
		ctx, cancel := context.WithCancel(t.Context())
		issuers := []*ca.Issuer{open(t, config), open(t, config), open(t, config)}
		f := &fleet{agents: 3}
		ended := make(chan error, 2*len(issuers)+1)
		for _, issuer := range issuers {
			go func() { ended <- issuer.Run(ctx) }()
			go func() { ended <- issuer.Rotate(ctx, &f.known) }()
		}
		go func() { f.run(t, ctx, issuers); ended <- nil }()

		seen := make(map[string]bool)
		for range 3 * 24 {
			time.Sleep(time.Hour)
			set := currentSet(issuers[0])
			active, ok := set.Active()
			if !ok {
				t.Fatal("none is active")
			}
			seen[active.ID] = true
			if len(currentBundle(issuers[0]).Authorities) > 3 {
				t.Fatalf("%v: the bundle has %q", time.Now(), states(set))
			}
			if active.Changed.Actor != "" && active.Changed.Actor != "schedule" || active.Changed.Forced {
				t.Fatalf("activated by %+v", active.Changed)
			}
		}
		if len(seen) < 17 || len(seen) > 19 {
			t.Errorf("%d authorities were active in 3 days, want one every 4 hours", len(seen))
		}
		cancel()
		for range cap(ended) {
			if err := <-ended; err != nil {
				t.Errorf("ended with %v", err)
			}
		}
	})
}

// One agent does not come back: nothing is overridden, somebody is told from two
// thirds of a life on, and all goes on when it returns.
func TestRotateIsBlocked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := newConfig(t)
		config.AuthorityLife = 24 * time.Hour
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		issuer := open(t, config)
		first := currentSet(issuer).Authorities[0]
		life := first.Certificate.NotAfter.Sub(first.Certificate.NotBefore)
		f := &fleet{agents: 3}
		f.offline.Store(1)
		ended := make(chan error, 3)
		go func() { ended <- issuer.Run(ctx) }()
		go func() { ended <- issuer.Rotate(ctx, &f.known) }()
		go func() { f.run(t, ctx, []*ca.Issuer{issuer}); ended <- nil }()

		time.Sleep(time.Until(first.Certificate.NotBefore.Add(life*2/3)) - time.Minute)
		if overdue, _ := issuer.Overdue().Load(); overdue != nil || states(currentSet(issuer)) != "active prepared" {
			t.Errorf("%q, overdue %v; want it not yet", states(currentSet(issuer)), overdue)
		}
		time.Sleep(2 * time.Minute)
		overdue, _ := issuer.Overdue().Load()
		if overdue == nil || overdue.Blockers[0].Detail != "proved 2/3" {
			t.Errorf("overdue %v, want proved 2/3", overdue)
		}
		time.Sleep(3 * time.Hour)
		if got := states(currentSet(issuer)); got != "active prepared" {
			t.Errorf("became %q without proof", got)
		}
		f.offline.Store(0)
		_, changed := issuer.Overdue().Load()
		for {
			<-changed
			if overdue, changed = issuer.Overdue().Load(); overdue == nil {
				break
			}
		}
		synctest.Wait()
		if got := states(currentSet(issuer)); got != "old active" {
			t.Errorf("became %q, want the successor active", got)
		}
		cancel()
		for range cap(ended) {
			if err := <-ended; err != nil {
				t.Errorf("ended with %v", err)
			}
		}
	})
}

// Taint of the active authority is finished by the schedule, however often the
// process starts anew in between.
func TestRotateFinishesATaint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := newConfig(t)
		issuer := open(t, config)
		first := currentSet(issuer).Authorities[0].ID
		a, err := issuer.Taint(t.Context(), first, by(proved(currentSet(issuer), 3)))
		if err != nil || a.State != ca.Active || !a.TaintPending || states(currentSet(issuer)) != "active+taint prepared" {
			t.Fatalf("Taint = %v, %v: %q", a.State, err, states(currentSet(issuer)))
		}
		issuer = open(t, config)
		ctx, cancel := context.WithCancel(t.Context())
		var known latest.Value[ca.Propagation]
		ended := make(chan error, 1)
		go func() { ended <- issuer.Rotate(ctx, &known) }()
		synctest.Wait()
		if overdue, _ := issuer.Overdue().Load(); overdue == nil {
			t.Error("a pending taint without evidence is not overdue")
		}
		known.Set(proved(currentSet(issuer), 3))
		synctest.Wait()
		if got := states(currentSet(issuer)); got != "tainted active" {
			t.Errorf("became %q", got)
		}
		old := currentBundle(issuer).Authorities[0]
		if window := old.ReissueBy.Sub(old.ReissueFrom); old.ID != first || window != 5*time.Minute {
			t.Errorf("reissue within %v, want 5m", window)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if got := states(currentSet(issuer)); got != "revoked active" {
			t.Errorf("became %q an hour later", got)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// A store that is always changed by somebody else, or so it says.
type contended struct{ storage.AuthorityStore }

func (contended) Swap(context.Context, string, []byte) (storage.Document, error) {
	return storage.Document{}, storage.ErrConflict
}

func TestChangeGivesUp(t *testing.T) {
	config := newConfig(t)
	open(t, config)
	config.Authorities = contended{config.Authorities}
	if _, err := open(t, config).Prepare(t.Context(), operator); !errors.Is(err, storage.ErrConflict) {
		t.Errorf("Prepare = %v, want %v in the end", err, storage.ErrConflict)
	}
}
