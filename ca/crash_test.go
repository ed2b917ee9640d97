package ca_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
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

// faulty is a store that fails at one point: at the at-th time that a call of it
// begins or ends. If it dies there, it fails from then on, as all does for a
// process that is no more.
type faulty struct {
	store
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
	sound    store
	released []ca.SVID
}

// a step of an ordeal is repeated until it succeeds, so each may be.
type step struct {
	name string
	run  func(t *testing.T, o *ordeal, issuer *ca.Issuer) error
	want string // the states of the document after it
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
	{"issue", func(t *testing.T, o *ordeal, i *ca.Issuer) error { return o.issue(t, i) }, "active"},
	{"prepare", prepareOnce, "active prepared"},
	{"probe", func(t *testing.T, _ *ordeal, i *ca.Issuer) error { _, err := i.Probe(t.Context()); return err }, "active prepared"},
	{"activate", on("prepared", (*ca.Issuer).Activate), "old active"},
	{"issue under the next", func(t *testing.T, o *ordeal, i *ca.Issuer) error { return o.issue(t, i) }, "old active"},
	{"taint the old one", on("old", (*ca.Issuer).Taint), "tainted active"},
	{"revoke", on("tainted", (*ca.Issuer).Revoke), "revoked active"},
	{"prepare another", prepareOnce, "revoked active prepared"},
	{"abort", on("prepared", (*ca.Issuer).Abort), "revoked active revoked"},
	{"replace what is to be tainted", func(t *testing.T, o *ordeal, i *ca.Issuer) error {
		// Its first half prepares, its second activates.
		if len(stored(t, o.sound).Authorities) == 4 && o.in(t, "tainted") != "" {
			return nil
		}
		if err := on("active", (*ca.Issuer).Taint)(t, o, i); err != nil {
			return err
		}
		return on("prepared", (*ca.Issuer).Activate)(t, o, i)
	}, "revoked tainted revoked active"},
	{"forget", func(t *testing.T, o *ordeal, i *ca.Issuer) error {
		time.Sleep(7 * 24 * time.Hour)
		for len(stored(t, o.sound).Authorities) > 2 {
			if err := i.Refresh(t.Context()); err != nil {
				return err
			}
			do, err := i.StepOnce(t.Context(), ca.Propagation{})
			if err != nil {
				return err
			}
			if do != "forget" && do != "revoke" {
				return errFault // the ledger could not say
			}
		}
		return nil
	}, ""},
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
	return set
}

// The store fails, or the process dies, before and after each call of each
// transition, and each transition is completed by whoever comes next.
func TestFaultAtEveryPoint(t *testing.T) {
	for _, kind := range []string{"memory", "sqlite"} {
		t.Run(kind, func(t *testing.T) {
			points := make(map[string]bool)
			for _, dies := range []bool{false, true} {
				if kind == "sqlite" && !dies {
					continue // it shares all that matters here with the other
				}
				for n := range steps {
					for at := 1; ; at++ {
						point := ""
						folder := t.TempDir()
						synctest.Test(t, func(t *testing.T) {
							config := newConfig(t)
							sound := store(storage.NewMemory())
							if kind == "sqlite" {
								file, err := sqlite.Open(t.Context(), sqlite.Config{Path: filepath.Join(folder, "troth.db")})
								if err != nil {
									t.Fatal(err)
								}
								defer file.Close()
								sound = file
							}
							point = runWithFault(t, config, sound, n, at, dies)
						})
						if point == "" || t.Failed() {
							break
						}
						points[steps[n].name+", "+point] = true
					}
				}
			}
			t.Logf("%d points", len(points))
			if len(points) < 30 {
				t.Errorf("failed at %d points, want at least 30", len(points))
			}
		})
	}
}

// runWithFault goes through all steps, with a fault at the at-th point of the n-th,
// and returns which point that was, or "" if the step has fewer.
func runWithFault(t *testing.T, config ca.Config, sound store, n, at int, dies bool) (point string) {
	o := &ordeal{config: config, sound: sound}
	o.config.Authorities, o.config.Ledger = sound, sound
	issuer := open(t, o.config)
	for k, s := range steps {
		if k == n {
			f := &faulty{store: sound, at: at, dies: dies}
			broken := o.config
			broken.Authorities, broken.Ledger = f, f
			at0 := f.at
			f.at = 0 // not while it opens
			struck := open(t, broken)
			f.count, f.at = 0, at0
			err := s.run(t, o, struck)
			if f.hit == "" {
				return ""
			}
			point = f.hit
			o.check(t, fmt.Sprintf("%s, %s (%v)", s.name, point, err))
			if !dies {
				issuer = struck
			} else {
				issuer = open(t, o.config)
			}
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
