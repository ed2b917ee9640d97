package ca_test

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"troth.dev/troth/ca"
	"troth.dev/troth/storage"
	"troth.dev/troth/storage/sqlite"
)

// store is both contracts in one.
type store interface {
	storage.AuthorityStore
	storage.Ledger
}

// faulty is all that an issuer calls, the store, the keys and the audit, and fails
// at one point: at the at-th time that a call of it begins or ends. If it dies there,
// it fails from then on, as all does for a process that is no more.
type faulty struct {
	store
	keys  ca.Importer // nil if they are not to fail, and neither is the audit
	at    int
	dies  bool
	count int
	hit   string // the point where it failed
}

var errFault = errors.New("the store failed")

// pass returns an error if the point is the one to fail at.
func (s *faulty) pass(point string) error {
	if s.hit != "" && s.dies {
		return errFault
	}
	if s.count++; s.count == s.at {
		s.hit = point
		return errFault
	}
	return nil
}

func around[T any](s *faulty, call string, do func() (T, error)) (T, error) {
	var none T
	if err := s.pass("before " + call); err != nil {
		return none, err
	}
	result, err := do()
	if err := s.pass("after " + call); err != nil {
		return none, err
	}
	return result, err
}

// into returns the config of an issuer that this is in the way of.
func (s *faulty) into(config ca.Config) ca.Config {
	config.Authorities, config.Ledger = s, s
	if s.keys != nil {
		config.Keys = s
		config.Audit = slog.New(faultyAudit{s, config.Audit.Handler()})
	}
	return config
}

func (s *faulty) Create(ctx context.Context) (key crypto.Signer, handle []byte, err error) {
	handle, err = around(s, "Create", func() ([]byte, error) {
		var made []byte
		var err error
		key, made, err = s.keys.Create(ctx)
		return made, err
	})
	return key, handle, err
}

func (s *faulty) Open(ctx context.Context, id string, handle []byte) (crypto.Signer, error) {
	return around(s, "Open", func() (crypto.Signer, error) { return s.keys.Open(ctx, id, handle) })
}

func (s *faulty) Import(ctx context.Context, id string, key crypto.Signer) ([]byte, error) {
	return around(s, "Import", func() ([]byte, error) { return s.keys.Import(ctx, id, key) })
}

// faultyAudit writes no line where it fails, and so does a process that is no more.
type faultyAudit struct {
	faults *faulty
	slog.Handler
}

func (faultyAudit) Enabled(context.Context, slog.Level) bool { return true }

func (a faultyAudit) Handle(ctx context.Context, r slog.Record) error {
	_, err := around(a.faults, "Audit", func() (any, error) { return nil, a.Handler.Handle(ctx, r) })
	return err
}

func (s *faulty) Load(ctx context.Context) (storage.Document, error) {
	return around(s, "Load", func() (storage.Document, error) { return s.store.Load(ctx) })
}

func (s *faulty) Swap(ctx context.Context, old string, data []byte) (storage.Document, error) {
	return around(s, "Swap", func() (storage.Document, error) { return s.store.Swap(ctx, old, data) })
}

func (s *faulty) Record(ctx context.Context, issuances ...storage.Issuance) error {
	_, err := around(s, "Record", func() (any, error) { return nil, s.store.Record(ctx, issuances...) })
	return err
}

func (s *faulty) Query(ctx context.Context, q storage.Query) ([]storage.Issuance, error) {
	return around(s, "Query", func() ([]storage.Issuance, error) { return s.store.Query(ctx, q) })
}

// ordeal is a trust domain that goes through all transitions on a store that
// outlives its issuers.
type ordeal struct {
	config   ca.Config
	secret   *secret   // what the upstream delivers from some step on
	root     *issuerOf // of the upstream
	sound    store
	released []ca.SVID
	keysToo  bool // fail, and the audit
}

// a step of an ordeal is repeated until it succeeds, so each may be.
type step struct {
	name string
	run  func(t *testing.T, o *ordeal, issuer *ca.Issuer) error
	want string // the states of the document after it

	upstream bool // the issuer has one
}

func (o *ordeal) issue(t *testing.T, issuer *ca.Issuer) error {
	results, err := issuer.Issue(t.Context(), requestFor(t))
	if err == nil && results[0].Err == nil {
		o.released = append(o.released, results[0].SVID)
	}
	return err
}

// in returns the ID of the authority that is in a state, by what is stored.
func (o *ordeal) in(t *testing.T, state string) string {
	for _, a := range stored(t, o.sound).Authorities {
		if a.State == state {
			return a.ID
		}
	}
	return ""
}

// on runs an operation on the authority that is in a state; if none is, that has
// been done.
func on(state string, operation func(*ca.Issuer, context.Context, string, ca.Order) (ca.Authority, error)) func(*testing.T, *ordeal, *ca.Issuer) error {
	return func(t *testing.T, o *ordeal, issuer *ca.Issuer) error {
		id := o.in(t, state)
		if id == "" {
			return nil
		}
		for {
			if err := issuer.Refresh(t.Context()); err != nil {
				return err
			}
			_, err := operation(issuer, t.Context(), id, by(proved(currentSet(issuer), 2)))
			var blocked *ca.Blocked
			if !errors.As(err, &blocked) || blocked.Blockers[0].Until.IsZero() {
				return err
			}
			// An error that the ledger gave while it failed is among these.
			time.Sleep(time.Until(blocked.Blockers[0].Until) + time.Second)
		}
	}
}

var steps = []step{
	{"issue", func(t *testing.T, o *ordeal, i *ca.Issuer) error { return o.issue(t, i) }, "active", false},
	{"prepare", prepareOnce, "active prepared", false},
	{"probe", func(t *testing.T, _ *ordeal, i *ca.Issuer) error { _, err := i.Probe(t.Context()); return err }, "active prepared", false},
	{"activate", on("prepared", (*ca.Issuer).Activate), "old active", false},
	{"issue under the next", func(t *testing.T, o *ordeal, i *ca.Issuer) error { return o.issue(t, i) }, "old active", false},
	{"taint the old one", on("old", (*ca.Issuer).Taint), "tainted active", false},
	{"revoke", on("tainted", (*ca.Issuer).Revoke), "revoked active", false},
	{"prepare another", prepareOnce, "revoked active prepared", false},
	{"abort", on("prepared", (*ca.Issuer).Abort), "revoked active revoked", false},
	{"replace what is to be tainted", func(t *testing.T, o *ordeal, i *ca.Issuer) error {
		// Its first half prepares, its second activates.
		if len(stored(t, o.sound).Authorities) == 4 && o.in(t, "tainted") != "" {
			return nil
		}
		if err := on("active", (*ca.Issuer).Taint)(t, o, i); err != nil {
			return err
		}
		return on("prepared", (*ca.Issuer).Activate)(t, o, i)
	}, "revoked tainted revoked active", false},
	{"move to an upstream root", func(t *testing.T, o *ordeal, i *ca.Issuer) error {
		if o.secret.n == 0 {
			o.secret.deliver(t, o.root)
		}
		if err := i.TakeDelivery(t.Context()); err != nil && obstacles(err) != "UPSTREAM_UNCHANGED" {
			return err
		}
		return on("prepared", (*ca.Issuer).Activate)(t, o, i)
	}, "revoked tainted revoked old active", true},
	{"issue under the upstream root", func(t *testing.T, o *ordeal, i *ca.Issuer) error { return o.issue(t, i) }, "revoked tainted revoked old active", true},
	{"prepare what the upstream issued next", func(t *testing.T, o *ordeal, i *ca.Issuer) error {
		if o.secret.n == 1 {
			o.secret.deliver(t, o.root)
		}
		_, err := i.Prepare(t.Context(), operator)
		return err
	}, "revoked tainted revoked old active prepared", true},
	{"replace one under the same root", on("prepared", (*ca.Issuer).Activate), "revoked tainted revoked old old active", true},
	{"forget", func(t *testing.T, o *ordeal, i *ca.Issuer) error {
		for range 20 {
			if len(stored(t, o.sound).Authorities) == 1 {
				return nil
			}
			if err := i.Refresh(t.Context()); err != nil {
				return err
			}
			do, err := i.StepOnce(t.Context(), ca.Propagation{})
			if err != nil {
				return err
			}
			if do == "" { // it is too early for all that is left, or the ledger could not say
				time.Sleep(24 * time.Hour)
			}
		}
		return errFault
	}, "active", true},
}

func prepareOnce(t *testing.T, _ *ordeal, i *ca.Issuer) error {
	_, err := i.Prepare(t.Context(), operator)
	return err
}

// check fails unless what is stored is a set to go on from, and all that was
// released is in the ledger and by authorities that were active by record.
func (o *ordeal) check(t *testing.T, at string) ca.Set {
	t.Helper()
	doc, err := o.sound.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	set, err := ca.DecodeSet(doc.Data)
	if err != nil {
		t.Fatalf("%s: %v", at, err)
	}
	if active, ok := set.Active(); !ok || set.Revision > 1 && set.Authorities[0].ID != active.ID && active.Changed.Actor != "alice" {
		t.Fatalf("%s: active by %+v in %q", at, active.Changed, states(set))
	}
	for _, svid := range o.released {
		leaf := parseLeaf(t, svid)
		listed, err := o.sound.Query(t.Context(), storage.Query{Serial: fmt.Sprintf("%x", leaf.SerialNumber)})
		if err != nil || len(listed) != 1 || listed[0].AuthorityID != svid.AuthorityID {
			t.Fatalf("%s: released, and in the ledger %v, %v", at, listed, err)
		}
		if time.Now().Before(svid.NotAfter) {
			checkVerifies(t, set.Bundle(), svid)
		}
	}
	// Whatever it is that died, each revision that changed something is recorded, and
	// by whom.
	recorded := make(map[uint64]bool)
	for _, c := range set.History {
		if recorded[c.Revision] = true; c.Actor == "" || c.BundleSHA256 == "" {
			t.Fatalf("%s: the history has %+v", at, c)
		}
	}
	if n := len(recorded); uint64(n) != set.Revision-1 {
		t.Fatalf("%s: %d changes are recorded, and the revision is %d", at, n, set.Revision)
	}
	if last := len(set.History) - 1; last >= 0 && set.History[last].BundleSHA256 != set.Bundle().SHA256() {
		t.Fatalf("%s: the history ends with another bundle", at)
	}
	return set
}

// The store or the keys fail, or the process dies, before and after each call of each
// transition, and each transition is completed by whoever comes next.
func TestFaultAtEveryPoint(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"memory", "sqlite"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			points := make(map[string]bool)
			for _, dies := range []bool{false, true} {
				if kind == "sqlite" && !dies {
					continue // it shares all that matters here with the other
				}
				for n := range steps {
					most := 8 // what follows is the same calls again
					if kind == "memory" && dies {
						most = 20
					} else if kind == "sqlite" {
						most = 4
					}
					for at := 1; at <= most; at++ {
						point := ""
						folder := t.TempDir()
						synctest.Test(t, func(t *testing.T) {
							config := newConfig(t)
							upstream := &secret{path: folder}
							config.Upstream = upstream.upstream()
							sound := store(storage.NewMemory())
							if kind == "sqlite" {
								file, err := sqlite.Open(t.Context(), sqlite.Config{Path: filepath.Join(folder, "troth.db")})
								if err != nil {
									t.Fatal(err)
								}
								defer file.Close()
								sound = file
							}
							upstream.life = year
							o := &ordeal{config: config, sound: sound, secret: upstream, root: newRoot(t), keysToo: kind == "memory"}
							point = o.runWithFault(t, n, at, dies)
						})
						if point == "" || t.Failed() {
							break
						}
						points[steps[n].name+", "+point] = true
					}
				}
			}
			t.Logf("%d points", len(points))
			if want := map[string]int{"memory": 100, "sqlite": 36}[kind]; len(points) < want {
				t.Errorf("failed at %d points, want at least %d:\n%s", len(points), want, strings.Join(slices.Sorted(maps.Keys(points)), "\n"))
			}
			if kind == "sqlite" {
				return // the keys and the audit do not know one store from the other
			}
			for _, point := range []string{
				"prepare, before Create", "prepare, after Create", "prepare, before Swap", "prepare, after Swap",
				"prepare, before Audit", "prepare, after Audit", "prepare, before Open", "activate, after Swap",
				"move to an upstream root, before Import", "move to an upstream root, after Import", "move to an upstream root, after Swap",
				"issue, before Record", "issue, after Record", "revoke, before Query", "forget, after Swap",
			} {
				if !points[point] {
					t.Errorf("never failed at %q", point)
				}
			}
		})
	}
}

// runWithFault goes through all steps, with a fault at the at-th point of the n-th,
// and returns which point that was, or "" if the step has fewer.
func (o *ordeal) runWithFault(t *testing.T, n, at int, dies bool) (point string) {
	o.config.Authorities, o.config.Ledger = o.sound, o.sound
	first := o.config
	first.Upstream = nil // nothing is delivered yet
	issuer := open(t, first)
	config := func(k int) ca.Config {
		if steps[k].upstream {
			return o.config
		}
		return first
	}
	for k, s := range steps[:min(n+2, len(steps))] { // and one more, to see that it goes on
		if k == n {
			f := &faulty{store: o.sound, dies: dies}
			if o.keysToo {
				f.keys = o.config.Keys.(ca.Importer)
			}
			struck := open(t, f.into(config(k))) // where it does not fail yet
			f.count, f.at = 0, at
			err := s.run(t, o, struck)
			if f.hit == "" {
				return ""
			}
			point = f.hit
			o.check(t, fmt.Sprintf("%s, %s (%v)", s.name, point, err))
			if !dies {
				issuer = struck
			} else {
				issuer = open(t, config(k))
			}
		} else if k > 0 && s.upstream != steps[k-1].upstream {
			issuer = open(t, config(k))
		}
		if err := s.run(t, o, issuer); err != nil {
			t.Fatalf("%s after a fault of %s, %s: %v", s.name, steps[n].name, point, err)
		}
		set := o.check(t, s.name)
		if got := states(set); s.want != "" && got != s.want {
			t.Fatalf("%s after a fault of %s, %s: became %q, want %q", s.name, steps[n].name, point, got, s.want)
		}
	}
	return point
}
