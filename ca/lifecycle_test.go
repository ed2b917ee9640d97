package ca_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/ca"
	"troth.dev/troth/storage"
	"troth.dev/troth/storage/sqlite"
)

// proved is the evidence of a fleet in which everybody has proved the successor
// and holds nothing.
func proved(set ca.Set, agents int) ca.Propagation {
	next, _ := set.Successor()
	now := time.Now()
	return ca.Propagation{
		At: now, Expected: agents,
		Revision: set.Revision, Authority: next.ID, Received: agents, Applied: agents, Proved: agents,
		Reporting: agents, Reported: now,
	}
}

func currentSet(issuer *ca.Issuer) ca.Set {
	set, _ := issuer.Authorities().Load()
	return set
}

func states(set ca.Set) string {
	var s []string
	for _, a := range set.Authorities {
		state := a.State.String()
		if a.TaintPending {
			state += "+taint"
		}
		s = append(s, state)
	}
	return strings.Join(s, " ")
}

func obstacles(err error) string {
	var blocked *ca.Blocked
	if !errors.As(err, &blocked) {
		return fmt.Sprint(err)
	}
	var s []string
	for _, b := range blocked.Blockers {
		s = append(s, string(b.Obstacle))
	}
	return strings.Join(s, " ")
}

var operator = ca.Order{Actor: "alice", Reason: "planned"}

func by(p ca.Propagation) ca.Order {
	o := operator
	o.Evidence = p
	return o
}

var forced = ca.Order{Actor: "alice", Reason: "the key was stolen", Force: true}

// forEachStore runs a test in a bubble for each store.
func forEachStore(t *testing.T, test func(t *testing.T, config ca.Config)) {
	t.Run("memory", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) { test(t, newConfig(t)) })
	})
	t.Run("sqlite", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "troth.db")
		synctest.Test(t, func(t *testing.T) {
			store, err := sqlite.Open(t.Context(), sqlite.Config{Path: path})
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := store.Close(); err != nil {
					t.Error(err)
				}
			}()
			config := newConfig(t)
			config.Authorities, config.Ledger = store, store
			test(t, config)
		})
	})
}

// A rotation by hand, from the first authority to the end of its traces, on two
// replicas that take turns.
func TestRotationByHand(t *testing.T) {
	forEachStore(t, func(t *testing.T, config ca.Config) {
		log := new(bytes.Buffer)
		config.Audit = slog.New(slog.NewJSONHandler(log, nil))
		one, two := open(t, config), open(t, config)
		stopOne, stopTwo := run(t, one), run(t, two)
		defer stopOne()
		defer stopTwo()
		first := currentSet(one).Authorities[0]
		early := issue(t, one, requestFor(t))
		log.Reset()

		next, err := one.Prepare(t.Context(), operator)
		if err != nil || next.State != ca.Prepared {
			t.Fatalf("Prepare = %v, %v", next.State, err)
		}
		synctest.Wait()
		if got := issue(t, two, requestFor(t)).AuthorityID; got != first.ID {
			t.Errorf("signed by %s before its successor is active, want %s", got, first.ID)
		}
		if n := len(currentBundle(two).Authorities); n != 2 {
			t.Errorf("the bundle of the other replica has %d authorities, want 2", n)
		}
		if _, err := two.Activate(t.Context(), next.ID, operator); obstacles(err) != "EVIDENCE_MISSING" {
			t.Errorf("Activate without evidence = %v", err)
		}

		active, err := two.Activate(t.Context(), next.ID, by(proved(currentSet(two), 3)))
		if err != nil || active.State != ca.Active {
			t.Fatalf("Activate = %v, %v", active.State, err)
		}
		synctest.Wait()
		if got := issue(t, one, requestFor(t)).AuthorityID; got != next.ID {
			t.Errorf("signed by %s, want %s", got, next.ID)
		}
		bundle := currentBundle(one)
		checkVerifies(t, bundle, early)
		if old := bundle.Authorities[0]; old.ReissueFrom.IsZero() || old.ReissueBy.Sub(old.ReissueFrom) != 30*time.Minute {
			t.Errorf("reissue from %v to %v, want half an hour", old.ReissueFrom, old.ReissueBy)
		}

		activated := time.Now()
		for _, want := range []string{"REPLICAS_MAY_SIGN", "SVIDS_LIVE HELD_ELSEWHERE"} {
			_, err = one.Revoke(t.Context(), first.ID, by(proved(currentSet(one), 3)))
			if got := obstacles(err); got != want {
				t.Errorf("Revoke after %v = %v, want %s", time.Since(activated), err, want)
			}
			var blocked *ca.Blocked
			if errors.As(err, &blocked) {
				time.Sleep(time.Until(blocked.Blockers[0].Until) + ca.Settle + time.Minute)
			}
		}
		gone, err := one.Revoke(t.Context(), first.ID, operator)
		if err != nil || gone.State != ca.Revoked || gone.Key != nil {
			t.Fatalf("Revoke after %v = %v, key %x, %v", time.Since(activated), gone.State, gone.Key, err)
		}
		synctest.Wait()
		if b := currentBundle(two); len(b.Authorities) != 1 || b.Authorities[0].ID != next.ID {
			t.Errorf("the bundle has %v, want %s alone", b.Authorities, next.ID)
		}

		var operations []string
		for line := range strings.Lines(log.String()) {
			var entry struct {
				Msg, Operation, Actor, Reason string
				Authority                     string `json:"authority_id"`
				At                            time.Time
				Bundle                        string `json:"bundle_sha256"`
				Evidence                      string
				Revision                      uint64
			}
			if err := json.Unmarshal([]byte(line), &entry); err != nil {
				t.Fatal(err)
			}
			if entry.Msg != "authority changed" {
				continue
			}
			operations = append(operations, entry.Operation)
			if entry.Actor != "alice" || entry.Reason != "planned" || entry.At.IsZero() || len(entry.Bundle) != 64 || entry.Revision == 0 {
				t.Errorf("audit line %s", line)
			}
			if entry.Operation == "activate" && !strings.HasPrefix(entry.Evidence, fmt.Sprintf("proved 3/3 of %q at revision 2", next.ID)) {
				t.Errorf("activated by evidence %q", entry.Evidence)
			}
		}
		if got := strings.Join(operations, " "); got != "prepare activate revoke" {
			t.Errorf("audited %q, each once wanted", got)
		}
	})
}

// What each operation makes of each state, with and without force.
func TestOperationsByState(t *testing.T) {
	const first, second = 0, 1
	operations := map[string]func(*ca.Issuer, string, ca.Order) (ca.Authority, error){
		"activate": func(i *ca.Issuer, id string, o ca.Order) (ca.Authority, error) {
			return i.Activate(context.Background(), id, o)
		},
		"taint": func(i *ca.Issuer, id string, o ca.Order) (ca.Authority, error) {
			return i.Taint(context.Background(), id, o)
		},
		"revoke": func(i *ca.Issuer, id string, o ca.Order) (ca.Authority, error) {
			return i.Revoke(context.Background(), id, o)
		},
		"abort": func(i *ca.Issuer, id string, o ca.Order) (ca.Authority, error) {
			return i.Abort(context.Background(), id, o)
		},
	}
	for _, test := range []struct {
		operation  string
		states     string // of two authorities at first
		on         int
		force      bool
		want       string // the states after it, or
		wantRefuse string // the obstacles
	}{
		{"activate", "active prepared", first, false, "active prepared", ""},
		{"activate", "active prepared", second, false, "old active", ""},
		{"activate", "active prepared", second, true, "old active", ""},
		{"activate", "active old", second, false, "", "WRONG_STATE"},
		{"activate", "active old", second, true, "", "WRONG_STATE"},
		{"activate", "active tainted", second, true, "", "WRONG_STATE"},
		{"activate", "active revoked", second, true, "", "WRONG_STATE"},
		{"activate", "old prepared", second, false, "old active", ""},

		{"taint", "active old", first, false, "active+taint old prepared", ""},
		{"taint", "active old", first, true, "tainted old active", ""},
		{"taint", "active prepared", first, false, "tainted active", ""},
		{"taint", "active prepared", first, true, "tainted active", ""},
		{"taint", "active prepared", second, true, "", "WRONG_STATE"},
		{"taint", "active old", second, false, "active tainted", ""},
		{"taint", "active tainted", second, false, "active tainted", ""},
		{"taint", "active revoked", second, false, "active revoked", ""},

		{"revoke", "active prepared", first, true, "", "WRONG_STATE"},
		{"revoke", "active prepared", second, true, "", "WRONG_STATE"},
		{"revoke", "active old", second, false, "", "REPLICAS_MAY_SIGN"},
		{"revoke", "active old", second, true, "active revoked", ""},
		{"revoke", "active tainted", second, false, "", "REPLICAS_MAY_SIGN"},
		{"revoke", "active tainted", second, true, "active revoked", ""},
		{"revoke", "active revoked", second, false, "active revoked", ""},

		{"abort", "active prepared", first, true, "", "WRONG_STATE"},
		{"abort", "active prepared", second, false, "active revoked", ""},
		{"abort", "active old", second, true, "", "WRONG_STATE"},
		{"abort", "active tainted", second, true, "", "WRONG_STATE"},
		{"abort", "active revoked", second, false, "active revoked", ""},
	} {
		name := fmt.Sprintf("%s %d of %s, force %t", test.operation, test.on, test.states, test.force)
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				config := newConfig(t)
				open(t, config)
				d := stored(t, config.Authorities)
				both := strings.Fields(test.states)
				d.Authorities[0].State = both[0]
				d.Authorities = append(d.Authorities, anotherAuthority(t, config, both[1]))
				d.Revision++
				replace(t, config.Authorities, d.encode(t))
				issuer := open(t, config)
				before := currentSet(issuer)

				order := by(proved(before, 2))
				if order.Force = test.force; test.force {
					order.Evidence = ca.Propagation{}
				}
				id := before.Authorities[test.on].ID
				a, err := operations[test.operation](issuer, id, order)
				after := currentSet(issuer)
				if test.wantRefuse != "" {
					if got := obstacles(err); got != test.wantRefuse {
						t.Errorf("refused for %v, want %s", err, test.wantRefuse)
					}
					if after.Revision != before.Revision {
						t.Errorf("the set changed to %q", states(after))
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				if got := states(after); got != test.want {
					t.Errorf("became %q, want %q", got, test.want)
				}
				if now, _ := after.Authority(id); a.ID != id || a.State != now.State {
					t.Errorf("returned %s %v, want %s %v", a.ID, a.State, id, now.State)
				}
				wantRevision := before.Revision + 1
				if states(before) == states(after) {
					wantRevision = before.Revision
				}
				if after.Revision != wantRevision {
					t.Errorf("revision %d, want %d", after.Revision, wantRevision)
				}
				checkChanges(t, before, after, order)

				// Again, it is so already. (Taint of an active one waits on.)
				if again, err := operations[test.operation](issuer, id, order); err != nil || again.State != a.State {
					t.Errorf("again: %v, %v; want %v", again.State, err, a.State)
				}
				if now := currentSet(issuer); now.Revision != after.Revision {
					t.Errorf("again: became %q at revision %d", states(now), now.Revision)
				}
				if reopened := currentSet(open(t, config)); !cmp.Equal(after, reopened, cmpopts.EquateComparable(after.TrustDomain)) {
					t.Errorf("the stored set is another: %s", cmp.Diff(after, reopened, cmpopts.EquateComparable(after.TrustDomain)))
				}
			})
		})
	}
}

// checkChanges fails unless each authority that is not as before says who changed
// it and when, and has the hints and keys of its state.
func checkChanges(t *testing.T, before, after ca.Set, order ca.Order) {
	t.Helper()
	for _, a := range after.Authorities {
		was, ok := before.Authority(a.ID)
		if ok && was.State == a.State && was.TaintPending == a.TaintPending {
			continue
		}
		c := a.Changed
		if c.Actor != order.Actor || c.Reason != order.Reason || c.Forced != order.Force || c.Revision != after.Revision || !c.At.Equal(time.Now().Truncate(time.Millisecond)) {
			t.Errorf("%v: changed by %+v, want it by %+v now", a.State, c, order)
		}
		window := map[ca.State]time.Duration{ca.Old: 30 * time.Minute, ca.Tainted: 5 * time.Minute}[a.State]
		if got := a.ReissueBy; window == 0 != got.IsZero() || window != 0 && got.Sub(c.At) != window {
			t.Errorf("%v: reissue by %v, want %v after %v", a.State, got, window, c.At)
		}
		if (a.Key == nil) != (a.State == ca.Revoked) {
			t.Errorf("%v with a key of %d bytes", a.State, len(a.Key))
		}
	}
}

func TestPrepare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := newConfig(t)
		issuer := open(t, config)
		first, err := issuer.Prepare(t.Context(), operator)
		if err != nil {
			t.Fatal(err)
		}
		again, err := issuer.Prepare(t.Context(), operator)
		if err != nil || again.ID != first.ID || currentSet(issuer).Revision != 2 {
			t.Errorf("Prepare again = %s, %v at revision %d; want %s at 2", again.ID, err, currentSet(issuer).Revision, first.ID)
		}
		// It lives for 30 days; with an hour and a bit left it cannot be activated.
		time.Sleep(30*24*time.Hour - 2*time.Hour + time.Second)
		next, err := issuer.Prepare(t.Context(), operator)
		if err != nil || next.ID == first.ID {
			t.Errorf("Prepare beside one that ends = %s, %v; want another", next.ID, err)
		}
		if got := states(currentSet(issuer)); got != "active revoked prepared" {
			t.Errorf("became %q, want the one that ends revoked", got)
		}
	})
}

func TestOrderIsRefused(t *testing.T) {
	issuer := open(t, newConfig(t))
	for _, test := range []struct {
		name  string
		order ca.Order
		want  string
	}{
		{"nothing", ca.Order{}, "ca: the order names no actor"},
		{"force without reason", ca.Order{Actor: "alice", Force: true}, "ca: the order has force and no reason"},
		{"force with a blank reason", ca.Order{Actor: "alice", Force: true, Reason: " "}, "ca: the order has force and no reason"},
		{"long reason", ca.Order{Actor: "alice", Reason: strings.Repeat("x", 513)}, "which is longer than 512 bytes or no line of text"},
		{"lines", ca.Order{Actor: "alice\nbob"}, `has "alice\nbob", which is longer`},
		{"not UTF-8", ca.Order{Actor: "\xff"}, `has "\xff", which is longer`},
	} {
		t.Run(test.name, func(t *testing.T) {
			if _, err := issuer.Prepare(t.Context(), test.order); !errors.Is(err, ca.ErrOrder) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("Prepare = %v, want %q", err, test.want)
			}
		})
	}
	for _, id := range []string{"", "0123", strings.Repeat("f", 1<<20)} {
		if _, err := issuer.Activate(t.Context(), id, operator); !errors.Is(err, ca.ErrUnknownAuthority) || len(err.Error()) > 200 {
			t.Errorf("Activate(%.10q...) = %.200v, want %v", id, err, ca.ErrUnknownAuthority)
		}
	}
	if got := currentSet(issuer).Revision; got != 1 {
		t.Errorf("revision %d after refusals, want 1", got)
	}
}

// Every way in which evidence does not carry an activation, and what an operator
// is told.
func TestActivateIsBlocked(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(p *ca.Propagation)
		want   string
		detail string
	}{
		{"no evidence", func(p *ca.Propagation) { *p = ca.Propagation{} }, "EVIDENCE_MISSING", "nothing is known of the agents"},
		{"old evidence", func(p *ca.Propagation) { p.At = p.At.Add(-61 * time.Second) }, "EVIDENCE_MISSING", "what is known of the agents is 1m1s old"},
		{"evidence from the future", func(p *ca.Propagation) { p.At = p.At.Add(31 * time.Second) }, "EVIDENCE_MISSING", "what is known of the agents is 31s ahead of the clock"},
		{"more proved than expected", func(p *ca.Propagation) { p.Expected = 1999 }, "EVIDENCE_MISSING", "contradicts itself"},
		{"more proved than applied", func(p *ca.Propagation) { p.Applied = 1999 }, "EVIDENCE_MISSING", "contradicts itself"},
		{"negative", func(p *ca.Propagation) { p.Proved = -1 }, "EVIDENCE_MISSING", "contradicts itself"},
		{"too many names", func(p *ca.Propagation) { p.Waiting = make([]ca.Waiting, ca.MaxWaiting+1) }, "EVIDENCE_MISSING", "contradicts itself"},
		{"earlier revision", func(p *ca.Propagation) { p.Revision-- }, "AGENTS_MISSING", "proved 0/2,000: nothing is known of it yet"},
		{"another authority", func(p *ca.Propagation) { p.Authority = "0123" }, "AGENTS_MISSING", "proved 0/2,000: nothing is known of it yet"},
		{"one is missing", func(p *ca.Propagation) { p.Proved-- }, "AGENTS_MISSING", "proved 1,999/2,000"},
		{"three are missing", func(p *ca.Propagation) {
			p.Proved -= 3
			p.Waiting = []ca.Waiting{
				{Node: "node-17", Lacks: "offline", Since: p.At.Add(-3*time.Minute - time.Second)},
				{Node: "node-88", Lacks: "at revision 41"},
				{Node: "node-89", Lacks: "not applied", Since: p.At.Add(-59 * time.Second)},
			}
		}, "AGENTS_MISSING", "proved 1,997/2,000, waiting: node-17 offline 3m, node-88 at revision 41, node-89 not applied 59s"},
		{"all are missing", func(p *ca.Propagation) {
			p.Proved = 0
			for n := range ca.MaxWaiting {
				p.Waiting = append(p.Waiting, ca.Waiting{Node: fmt.Sprint("n", n), Lacks: "offline", Since: p.At.Add(-25 * time.Hour)})
			}
		}, "AGENTS_MISSING", "proved 0/2,000, waiting: n0 offline 25h, n1 offline 25h, n2 offline 25h, n3 offline 25h, n4 offline 25h and 1,995 more"},
		{"nobody expected, but an SVID lives", func(p *ca.Propagation) { *p = ca.Propagation{At: p.At} }, "HELD_ELSEWHERE", "no agent is expected, but SVIDs are alive until 2000-01-01T01:00:00Z"},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				issuer := open(t, newConfig(t))
				issue(t, issuer, ca.Request{ID: web, CSR: newCSR(t, newKey(t, p256)), Caller: "agent", Node: "n"})
				next, err := issuer.Prepare(t.Context(), operator)
				if err != nil {
					t.Fatal(err)
				}
				order := by(proved(currentSet(issuer), 2000))
				test.change(&order.Evidence)
				_, err = issuer.Activate(t.Context(), next.ID, order)
				if got := obstacles(err); got != test.want {
					t.Fatalf("Activate = %v, want %s", err, test.want)
				}
				if !strings.Contains(err.Error(), test.detail) || !strings.HasPrefix(err.Error(), "ca: activate authority "+next.ID+": ") {
					t.Errorf("Activate = %v, want %q", err, test.detail)
				}
				var blocked *ca.Blocked
				if errors.As(err, &blocked); !blocked.Forcible() {
					t.Error("force would not do it")
				}
				if test.want == "AGENTS_MISSING" && len(blocked.Waiting) != len(order.Evidence.Waiting) {
					t.Errorf("%d agents named, want %d", len(blocked.Waiting), len(order.Evidence.Waiting))
				}
				order.Force = true
				if a, err := issuer.Activate(t.Context(), next.ID, order); err != nil || a.State != ca.Active || !a.Changed.Forced {
					t.Errorf("Activate by force = %v, %v", a.State, err)
				}
			})
		})
	}
}

// An authority that ends too soon is not activated, whoever wants it how much.
func TestActivateEndsTooSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		issuer := open(t, newConfig(t))
		next, err := issuer.Prepare(t.Context(), operator)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Until(next.Certificate.NotAfter) - 2*time.Hour)
		order := by(proved(currentSet(issuer), 1))
		order.Force = true
		time.Sleep(time.Second)
		_, err = issuer.Activate(t.Context(), next.ID, order)
		if got := obstacles(err); got != "LIFE_TOO_SHORT" {
			t.Errorf("Activate = %v, want LIFE_TOO_SHORT", err)
		}
	})
}

// In a fresh cluster nobody can be cut off: no agent is expected, and only the
// servers have SVIDs.
func TestActivateInAFreshCluster(t *testing.T) {
	forEachStore(t, func(t *testing.T, config ca.Config) {
		issuer := open(t, config)
		server := spiffeid.RequireFromString("spiffe://example.test/troth/server")
		issue(t, issuer, ca.Request{ID: server, CSR: newCSR(t, newKey(t, p256)), Caller: "server"})
		next, err := issuer.Prepare(t.Context(), operator)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := issuer.Probe(t.Context()); err != nil {
			t.Fatal(err)
		}
		if a, err := issuer.Activate(t.Context(), next.ID, by(ca.Propagation{At: time.Now()})); err != nil || a.State != ca.Active {
			t.Errorf("Activate = %v, %v", a.State, err)
		}
	})
}

// What keeps an old authority in the bundle.
func TestRevokeIsBlocked(t *testing.T) {
	agent := "spiffe://example.test/troth/agent/n/6f1d2ab2-7c1b-4e34-9d0c-0f5cf6f5a0a1/p/6f1d2ab2-7c1b-4e34-9d0c-0f5cf6f5a0a2"
	for _, test := range []struct {
		name   string
		caller string
		after  time.Duration // since the activation
		change func(p *ca.Propagation, id string)
		want   string
	}{
		{"another replica may sign", agent, ca.Settle - time.Second, nil, "REPLICAS_MAY_SIGN"},
		{"reports from before that", agent, ca.Settle, nil, "SVIDS_LIVE EVIDENCE_MISSING"},
		{"no reports", agent, ca.Settle + time.Minute, func(p *ca.Propagation, _ string) { *p = ca.Propagation{} }, "SVIDS_LIVE EVIDENCE_MISSING"},
		{"no agents", agent, ca.Settle + time.Minute, func(p *ca.Propagation, _ string) { *p = ca.Propagation{At: p.At} }, "SVIDS_LIVE EVIDENCE_MISSING"},
		{"not all report", agent, ca.Settle + time.Minute, func(p *ca.Propagation, _ string) { p.Reporting-- }, "SVIDS_LIVE EVIDENCE_MISSING"},
		{"an SVID", agent, ca.Settle + time.Minute, func(p *ca.Propagation, id string) { p.Uses = map[string]ca.Use{id: {SVIDs: 1}} }, "SVIDS_LIVE HELD_BY_AGENTS"},
		{"a connection", agent, ca.Settle + time.Minute, func(p *ca.Propagation, id string) { p.Uses = map[string]ca.Use{id: {Connections: 1}} }, "SVIDS_LIVE HELD_BY_AGENTS"},
		{"a workload that asked itself", "pod", ca.Settle + time.Minute, nil, "SVIDS_LIVE HELD_ELSEWHERE"},
		{"the server", "server", ca.Settle + time.Minute, nil, "SVIDS_LIVE HELD_ELSEWHERE"},
		{"the last second of it", "server", time.Hour, nil, "SVIDS_LIVE HELD_ELSEWHERE"},
		{"all replaced", agent, ca.Settle + time.Minute, func(p *ca.Propagation, _ string) { p.Uses = map[string]ca.Use{"0123": {SVIDs: 1}} }, ""},
		{"all expired, whoever holds what", "server", time.Hour + time.Second, func(p *ca.Propagation, id string) { p.Uses = map[string]ca.Use{id: {SVIDs: 1}} }, ""},
		{"all expired, and nothing known", agent, time.Hour + time.Second, func(p *ca.Propagation, _ string) { *p = ca.Propagation{} }, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			forEachStore(t, func(t *testing.T, config ca.Config) {
				issuer := open(t, config)
				request := requestFor(t)
				request.Caller = test.caller
				first := issue(t, issuer, request).AuthorityID
				next, err := issuer.Prepare(t.Context(), operator)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := issuer.Activate(t.Context(), next.ID, by(proved(currentSet(issuer), 2))); err != nil {
					t.Fatal(err)
				}
				time.Sleep(test.after)
				order := by(proved(currentSet(issuer), 2))
				if test.change != nil {
					test.change(&order.Evidence, first)
				}
				a, err := issuer.Revoke(t.Context(), first, order)
				if test.want != "" {
					if got := obstacles(err); got != test.want {
						t.Errorf("Revoke = %v, want %s", err, test.want)
					}
					order.Force = true
					a, err = issuer.Revoke(t.Context(), first, order)
				}
				if err != nil || a.State != ca.Revoked || a.Changed.Forced != (test.want != "") {
					t.Errorf("Revoke = %v, forced %t, %v", a.State, a.Changed.Forced, err)
				}
			})
		})
	}
}

// Thousands of SVIDs of one instant are more than one answer of the ledger.
func TestRevokeCountsAllOfABatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := newConfig(t)
		issuer := open(t, config)
		first := currentSet(issuer).Authorities[0].ID
		begin := time.Now().UTC()
		record := func(n int, at time.Time, life time.Duration) {
			issuances := make([]storage.Issuance, n)
			for k := range issuances {
				issuances[k] = storage.Issuance{
					Serial: fmt.Sprintf("%x%08x", at.UnixMilli(), k+1), ID: web, AuthorityID: first, Caller: "pod",
					NotBefore: at, NotAfter: at.Add(life), IssuedAt: at,
				}
			}
			if err := config.Ledger.Record(t.Context(), issuances...); err != nil {
				t.Fatal(err)
			}
		}
		record(1, begin, 3*time.Hour) // the one that counts, issued first
		for k := range 5 {
			record(700, begin.Add(time.Duration(k+1)*time.Millisecond), 2*time.Hour)
		}
		if _, err := issuer.Taint(t.Context(), first, forced); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2*time.Hour + time.Minute)
		_, err := issuer.Revoke(t.Context(), first, operator)
		if got := obstacles(err); got != "SVIDS_LIVE EVIDENCE_MISSING" || !strings.Contains(err.Error(), "until 2000-01-01T03:00:00Z") {
			t.Errorf("Revoke = %v, want it to wait for the longest", err)
		}
		time.Sleep(time.Hour)
		if _, err := issuer.Revoke(t.Context(), first, operator); err != nil {
			t.Errorf("Revoke = %v after all expired", err)
		}
	})
}

// A page that is full of one millisecond hides what else that millisecond has: it
// is taken to live as long as any SVID may.
func TestRevokeAssumesTheWorst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := newConfig(t)
		issuer := open(t, config)
		first := currentSet(issuer).Authorities[0].ID
		at := time.Now().UTC()
		issuances := make([]storage.Issuance, storage.MaxQuery+1)
		for k := range issuances {
			issuances[k] = storage.Issuance{
				Serial: fmt.Sprintf("%x", k+1), ID: web, AuthorityID: first, Caller: "pod",
				NotBefore: at, NotAfter: at.Add(time.Hour), IssuedAt: at,
			}
		}
		if err := config.Ledger.Record(t.Context(), issuances...); err != nil {
			t.Fatal(err)
		}
		if _, err := issuer.Taint(t.Context(), first, forced); err != nil {
			t.Fatal(err)
		}
		time.Sleep(ca.Settle)
		_, err := issuer.Revoke(t.Context(), first, operator)
		if err == nil || !strings.Contains(err.Error(), "until 2000-01-02T00:00:00Z") {
			t.Errorf("Revoke = %v, want it to wait for a day", err)
		}
	})
}

// The issuers that see a change late, or not at all.
func TestIssueWithinItsLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := newConfig(t)
		behind, ahead := open(t, config), open(t, config)
		first := currentSet(ahead).Authorities[0].ID
		next, err := ahead.Prepare(t.Context(), operator)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ahead.Activate(t.Context(), next.ID, by(proved(currentSet(ahead), 1))); err != nil {
			t.Fatal(err)
		}
		time.Sleep(ca.Lease)
		if got := issue(t, behind, requestFor(t)).AuthorityID; got != first {
			t.Errorf("signed by %s within the lease of %s", got, first)
		}
		time.Sleep(time.Nanosecond)
		if got := issue(t, behind, requestFor(t)).AuthorityID; got != next.ID {
			t.Errorf("signed by %s after the lease, want %s", got, next.ID)
		}
	})
}

// slowLedger is stopped for a while after it recorded.
type slowLedger struct {
	storage.Ledger
	stop time.Duration
}

func (l slowLedger) Record(ctx context.Context, issuances ...storage.Issuance) error {
	err := l.Ledger.Record(ctx, issuances...)
	time.Sleep(l.stop)
	return err
}

func TestIssueReleasesNothingAfterItsLease(t *testing.T) {
	for _, test := range []struct {
		stop time.Duration
		want error
	}{{ca.Lease, nil}, {ca.Lease + time.Nanosecond, ca.ErrUnconfirmed}} {
		synctest.Test(t, func(t *testing.T) {
			config := newConfig(t)
			config.Ledger = slowLedger{config.Ledger, test.stop}
			results, err := open(t, config).Issue(t.Context(), requestFor(t))
			if !errors.Is(err, test.want) || (results == nil) != (test.want != nil) {
				t.Errorf("Issue that stood still for %v = %d results, %v; want %v", test.stop, len(results), err, test.want)
			}
		})
	}
}

// down is a store that cannot be loaded while it is down.
type down struct {
	storage.AuthorityStore
	err *error
}

func (s down) Load(ctx context.Context) (storage.Document, error) {
	if *s.err != nil {
		return storage.Document{}, *s.err
	}
	return s.AuthorityStore.Load(ctx)
}

func TestIssueUnconfirmed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := newConfig(t)
		var err error
		config.Authorities = down{config.Authorities, &err}
		issuer := open(t, config)
		err = errors.New("connection refused")
		time.Sleep(ca.Lease)
		issue(t, issuer, requestFor(t))
		time.Sleep(time.Second)
		if _, got := issuer.Issue(t.Context(), requestFor(t)); !errors.Is(got, ca.ErrUnconfirmed) || !errors.Is(got, err) {
			t.Errorf("Issue = %v, want %v and %v", got, ca.ErrUnconfirmed, err)
		}
		err = nil
		issue(t, issuer, requestFor(t))
	})
}

// A store that was set back does not bring back what was revoked.
func TestRunRefusesARestoredStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := newConfig(t)
		log := new(bytes.Buffer)
		config.Audit = slog.New(slog.NewTextHandler(log, nil))
		issuer := open(t, config)
		backup := stored(t, config.Authorities).encode(t)
		first := currentSet(issuer).Authorities[0].ID
		if _, err := issuer.Taint(t.Context(), first, forced); err != nil {
			t.Fatal(err)
		}
		if _, err := issuer.Revoke(t.Context(), first, forced); err != nil {
			t.Fatal(err)
		}
		stop := run(t, issuer)
		replace(t, config.Authorities, backup)
		time.Sleep(time.Minute)
		stop()
		if b := currentBundle(issuer); len(b.Authorities) != 1 || b.Authorities[0].ID == first {
			t.Errorf("the bundle has %v", b.Authorities)
		}
		if want := "those of revision 1, after 3 was in use"; !strings.Contains(log.String(), want) {
			t.Errorf("log %q, want it to say %q", log, want)
		}
		if _, err := issuer.Prepare(t.Context(), operator); err == nil || !strings.Contains(err.Error(), "was the store restored?") {
			t.Errorf("Prepare = %v", err)
		}
		open(t, config)
	})
}

func TestProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := newConfig(t)
		issuer := open(t, config)
		if _, err := issuer.Probe(t.Context()); !errors.Is(err, ca.ErrNothingPrepared) {
			t.Errorf("Probe = %v, want %v", err, ca.ErrNothingPrepared)
		}
		next, err := issuer.Prepare(t.Context(), operator)
		if err != nil {
			t.Fatal(err)
		}
		probe, err := issuer.Probe(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if probe.Authority != next.ID || probe.Revision != 2 || !probe.NotAfter.Equal(time.Now().Add(time.Hour)) {
			t.Errorf("Probe = %+v", probe)
		}
		id := spiffeid.RequireFromString("spiffe://example.test/troth/probe")
		checkVerifies(t, currentBundle(issuer), ca.SVID{ID: id, Certificates: probe.Trusted})
		untrusted := parseLeaf(t, ca.SVID{Certificates: probe.Untrusted})
		if untrusted.URIs[0].String() != id.String() {
			t.Errorf("the untrusted leaf is of %v", untrusted.URIs)
		}
		for _, a := range currentBundle(issuer).Authorities {
			if untrusted.CheckSignatureFrom(a.Certificate) == nil {
				t.Errorf("the untrusted leaf is signed by %s", a.ID)
			}
		}
		listed, err := config.Ledger.Query(t.Context(), storage.Query{})
		if err != nil || len(listed) != 1 || listed[0].AuthorityID != next.ID || listed[0].ID != id {
			t.Errorf("the ledger has %v, %v; want the trusted one", listed, err)
		}
	})
}

// What a replica that is behind signs while another asks the ledger is not missed,
// nor is what one signs whose clock is ahead.
func TestRevokeMissesNothing(t *testing.T) {
	for _, test := range []struct {
		name string
		late func(t *testing.T, config ca.Config, behind *ca.Issuer, first string)
	}{
		{"signed after it was asked", func(t *testing.T, _ ca.Config, behind *ca.Issuer, first string) {
			if got := issue(t, behind, requestFor(t)).AuthorityID; got != first {
				t.Fatalf("signed by %s, want %s", got, first)
			}
		}},
		{"signed by a clock that is ahead", func(t *testing.T, config ca.Config, _ *ca.Issuer, first string) {
			ahead := time.Now().UTC().Add(time.Hour)
			if err := config.Ledger.Record(t.Context(), storage.Issuance{
				Serial: "1", ID: web, AuthorityID: first, Caller: "pod",
				NotBefore: ahead, NotAfter: ahead.Add(time.Hour), IssuedAt: ahead,
			}); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			forEachStore(t, func(t *testing.T, config ca.Config) {
				behind, issuer := open(t, config), open(t, config)
				first := currentSet(issuer).Authorities[0].ID
				if _, err := issuer.Taint(t.Context(), first, forced); err != nil {
					t.Fatal(err)
				}
				if _, err := issuer.Revoke(t.Context(), first, operator); obstacles(err) != "REPLICAS_MAY_SIGN" {
					t.Errorf("Revoke at once = %v", err)
				}
				test.late(t, config, behind, first)
				time.Sleep(ca.Settle + time.Minute)
				if _, err := issuer.Revoke(t.Context(), first, by(proved(currentSet(issuer), 2))); obstacles(err) != "SVIDS_LIVE HELD_ELSEWHERE" {
					t.Errorf("Revoke = %v, want SVIDS_LIVE HELD_ELSEWHERE", err)
				}
			})
		})
	}
}

// Replicas that prepare at the same time agree on one authority, and each of them
// hears which.
func TestPrepareFromManyReplicas(t *testing.T) {
	config := newConfig(t)
	ids := make([]string, 8)
	var all sync.WaitGroup
	start := make(chan struct{})
	for n := range ids {
		issuer := open(t, config)
		all.Go(func() {
			<-start
			a, err := issuer.Prepare(t.Context(), operator)
			if err != nil {
				t.Errorf("Prepare of replica %d: %v", n, err)
			}
			ids[n] = a.ID
		})
	}
	close(start)
	all.Wait()
	for n, id := range ids {
		if id != ids[0] {
			t.Errorf("replica %d prepared %s, replica 0 %s", n, id, ids[0])
		}
	}
	if d := stored(t, config.Authorities); d.Revision != 2 || len(d.Authorities) != 2 {
		t.Errorf("%d authorities at revision %d, want 2 at 2", len(d.Authorities), d.Revision)
	}
}

// overtaken is a store in which somebody else is always faster the first time.
type overtaken struct {
	storage.AuthorityStore
	first func()
}

func (s *overtaken) Swap(ctx context.Context, old string, data []byte) (storage.Document, error) {
	if first := s.first; first != nil {
		s.first = nil
		first()
	}
	return s.AuthorityStore.Swap(ctx, old, data)
}

// After a conflict the decision is made anew: what was aborted meanwhile is not
// activated.
func TestChangeDecidesAnew(t *testing.T) {
	config := newConfig(t)
	other := open(t, config)
	next, err := other.Prepare(t.Context(), operator)
	if err != nil {
		t.Fatal(err)
	}
	store := &overtaken{AuthorityStore: config.Authorities}
	config.Authorities = store
	issuer := open(t, config)
	store.first = func() {
		if _, err := other.Abort(t.Context(), next.ID, operator); err != nil {
			t.Error(err)
		}
	}
	_, err = issuer.Activate(t.Context(), next.ID, by(proved(currentSet(issuer), 1)))
	if obstacles(err) != "WRONG_STATE" {
		t.Errorf("Activate of what was aborted meanwhile = %v, want WRONG_STATE", err)
	}
}

// A Swap that took effect and said otherwise is a change like any other.
func TestChangeLearnsThatItWasStored(t *testing.T) {
	config := newConfig(t)
	log := new(bytes.Buffer)
	config.Audit = slog.New(slog.NewTextHandler(log, nil))
	f := &faulty{store: config.Ledger.(*storage.Memory)}
	config.Authorities = f
	issuer := open(t, config)
	f.count, f.at = 0, 4 // before and after Load, before and after Swap
	a, err := issuer.Prepare(t.Context(), operator)
	if err != nil || f.hit != "after Swap" || a.State != ca.Prepared {
		t.Errorf("Prepare = %v, %v after a fault %s", a.State, err, f.hit)
	}
	if n := strings.Count(log.String(), "operation=prepare"); n != 1 {
		t.Errorf("%d lines of audit, want 1", n)
	}
}
