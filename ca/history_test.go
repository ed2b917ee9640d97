package ca_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"troth.dev/troth/ca"
	"troth.dev/troth/storage"
)

// What became of authorities is there after a restart, also of those that are
// forgotten, and says the same as the audit.
func TestHistory(t *testing.T) {
	forEachStore(t, func(t *testing.T, config ca.Config) {
		log := new(bytes.Buffer)
		config.Audit = slog.New(slog.NewJSONHandler(log, nil))
		issuer := open(t, config)
		first := currentSet(issuer).Authorities[0].ID
		if n := len(currentSet(issuer).History); n != 0 {
			t.Errorf("%d changes before anything changed", n)
		}
		second, err := issuer.Prepare(t.Context(), operator)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := issuer.Activate(t.Context(), second.ID, by(proved(currentSet(issuer), 2))); err != nil {
			t.Fatal(err)
		}
		third, err := issuer.Prepare(t.Context(), ca.Order{Actor: "bob"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := issuer.Abort(t.Context(), third.ID, operator); err != nil {
			t.Fatal(err)
		}
		if _, err := issuer.Taint(t.Context(), first, operator); err != nil {
			t.Fatal(err)
		}
		if _, err := issuer.Revoke(t.Context(), first, forced); err != nil {
			t.Fatal(err)
		}
		time.Sleep(7*24*time.Hour + time.Second)
		for range 2 {
			if did, err := issuer.StepOnce(t.Context(), ca.Propagation{}); did != "forget" || err != nil {
				t.Fatalf("the schedule did %q, %v", did, err)
			}
		}

		set := currentSet(open(t, config))
		var got []string
		for _, c := range set.History {
			name := map[string]string{first: "first", second.ID: "second", third.ID: "third"}[c.AuthorityID]
			got = append(got, fmt.Sprintf("%d %s %s %v by %s, forced %t", c.Revision, c.Operation, name, c.State, c.Actor, c.Forced))
			if c.At.IsZero() || len(c.BundleSHA256) != 64 || c.Operation == "activate" && !strings.HasPrefix(c.Evidence, "proved 2/2") {
				t.Errorf("the history has %+v", c)
			}
		}
		want := []string{
			"2 prepare second prepared by alice, forced false",
			"3 activate first old by alice, forced false",
			"3 activate second active by alice, forced false",
			"4 prepare third prepared by bob, forced false",
			"5 abort third revoked by alice, forced false",
			"6 taint first tainted by alice, forced false",
			"7 revoke first revoked by alice, forced true",
			"8 forget first revoked by schedule, forced false",
			"9 forget third revoked by schedule, forced false",
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("the history: %s", diff)
		}
		if len(set.Authorities) != 1 || set.Authorities[0].Changed != set.History[2] {
			t.Errorf("%q, the active one changed by %+v", states(set), set.Authorities[0].Changed)
		}

		bundles := make(map[uint64]string)
		for line := range strings.Lines(log.String()) {
			var entry struct {
				Revision uint64
				Bundle   string `json:"bundle_sha256"`
			}
			if err := json.Unmarshal([]byte(line), &entry); err != nil {
				t.Fatal(err)
			}
			bundles[entry.Revision] = entry.Bundle
		}
		for _, c := range set.History {
			if bundles[c.Revision] != c.BundleSHA256 {
				t.Errorf("revision %d: bundle %s in the audit, %s in the history", c.Revision, bundles[c.Revision], c.BundleSHA256)
			}
		}
		if got := currentBundle(issuer).SHA256(); got != set.History[8].BundleSHA256 {
			t.Errorf("the bundle is %s, by the history %s", got, set.History[8].BundleSHA256)
		}
	})
}

// However often and with whatever words authorities are changed, the document
// stays one that a store takes, and the history keeps what is newest.
func TestHistoryIsBounded(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		text   string
		before int // changes that are there already
		rounds int
		kept   int // changes, at least
	}{
		{"of what JSON spells with six letters", strings.Repeat("<", 512), 0, 64, 25},
		{"of few words", "planned", 197, 3, 200},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				config := newConfig(t)
				issuer := open(t, config)
				order := ca.Order{Actor: test.text, Reason: test.text}
				set := currentSet(issuer)
				for range test.before {
					set.History = append(set.History, ca.Change{AuthorityID: "0123", State: ca.Revoked, At: time.Now().UTC(), Revision: 1, Operation: "forget", Actor: "schedule"})
				}
				if set.Revision++; test.before > 0 {
					data, err := ca.EncodeSet(set)
					if err != nil {
						t.Fatal(err)
					}
					replace(t, config.Authorities, data)
				}
				for range test.rounds {
					a, err := issuer.Prepare(t.Context(), order)
					if err != nil {
						t.Fatal(err)
					}
					if _, err := issuer.Abort(t.Context(), a.ID, order); err != nil {
						t.Fatal(err)
					}
				}
				doc, err := config.Authorities.Load(t.Context())
				if err != nil || len(doc.Data) > storage.MaxDocument*7/8 {
					t.Errorf("a document of %d bytes, %v", len(doc.Data), err)
				}
				set = currentSet(open(t, config))
				n := len(set.History)
				if n < test.kept || n > 200 || set.History[n-1].Revision != set.Revision {
					t.Errorf("%d changes, the last of revision %d of %d", n, set.History[max(0, n-1)].Revision, set.Revision)
				}
				t.Logf("%d bytes, %d authorities, %d changes", len(doc.Data), len(set.Authorities), n)
			})
		})
	}
}

// What the next step of each authority waits for is what the step itself would say.
func TestObstacles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := newConfig(t)
		issuer := open(t, config)
		if got := issuer.Obstacles(t.Context(), ca.Propagation{}); len(got) != 0 {
			t.Errorf("a lone active authority has %v in its way", got)
		}
		first := issue(t, issuer, requestFor(t)).AuthorityID
		second, err := issuer.Prepare(t.Context(), operator)
		if err != nil {
			t.Fatal(err)
		}
		known := proved(currentSet(issuer), 3)
		known.Proved, known.Waiting = 2, []ca.Waiting{{Node: "node-17", Lacks: "offline"}}
		check := func(p ca.Propagation, want ...string) {
			t.Helper()
			var got []string
			for _, b := range issuer.Obstacles(t.Context(), p) {
				got = append(got, fmt.Sprintf("%s %s: %s, %d waiting", b.Operation, b.Authority, obstacles(b), len(b.Waiting)))
				operation := map[string]func() (ca.Authority, error){
					"activate": func() (ca.Authority, error) { return issuer.Activate(t.Context(), b.Authority, by(p)) },
					"revoke":   func() (ca.Authority, error) { return issuer.Revoke(t.Context(), b.Authority, by(p)) },
				}[b.Operation]
				if _, err := operation(); err == nil || err.Error() != b.Error() {
					t.Errorf("refused for %v, and the obstacles are %v", err, b)
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("the obstacles: %s", diff)
			}
		}
		check(known, "activate "+second.ID+": AGENTS_MISSING, 1 waiting")
		check(ca.Propagation{}, "activate "+second.ID+": EVIDENCE_MISSING, 0 waiting")
		check(proved(currentSet(issuer), 3))

		if _, err := issuer.Activate(t.Context(), second.ID, by(proved(currentSet(issuer), 3))); err != nil {
			t.Fatal(err)
		}
		third, err := issuer.Prepare(t.Context(), operator)
		if err != nil {
			t.Fatal(err)
		}
		check(ca.Propagation{}, "revoke "+first+": REPLICAS_MAY_SIGN, 0 waiting", "activate "+third.ID+": EVIDENCE_MISSING, 0 waiting")
		time.Sleep(ca.Settle)
		check(proved(currentSet(issuer), 3), "revoke "+first+": SVIDS_LIVE EVIDENCE_MISSING, 0 waiting")
		time.Sleep(time.Hour)
		check(ca.Propagation{}, "activate "+third.ID+": EVIDENCE_MISSING, 0 waiting")
	})
}
