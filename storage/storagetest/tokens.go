package storagetest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"troth.dev/troth/storage"
)

// TestTokenStore runs the contract of [storage.TokenStore]. open returns two stores of
// one memory in which nothing was spent, as two replicas have them, or one of them
// twice where there can be no second; it closes them when its test ends.
func TestTokenStore(t *testing.T, open func(t *testing.T) (a, b storage.TokenStore)) {
	tests := []struct {
		name string
		run  func(t *testing.T, a, b storage.TokenStore)
	}{
		{"once", testSpendOnce},
		{"names are not confused", testTokenNames},
		{"one of many at once", testSpendAtOnce},
		{"prune", testPruneSpent},
		{"prune beside spend", testPruneBesideSpend},
		{"ended context", testSpendEndedContext},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			a, b := open(t)
			test.run(t, a, b)
		})
	}
}

// tokenExpiry is when the tokens of the suite end.
var tokenExpiry = time.Date(2030, time.March, 1, 12, 0, 0, int(250*time.Millisecond), time.UTC)

func testSpendOnce(t *testing.T, a, b storage.TokenStore) {
	checkSpend(t, a, "issuer", "token", nil)
	checkSpend(t, a, "issuer", "token", storage.ErrSpent)
	checkSpend(t, b, "issuer", "token", storage.ErrSpent)
	checkSpend(t, b, "issuer", "another", nil)
	checkSpend(t, a, "issuer", "another", storage.ErrSpent)
	// Another time of expiry makes no other token.
	if err := a.Spend(t.Context(), "issuer", "token", tokenExpiry.Add(time.Hour)); !errors.Is(err, storage.ErrSpent) {
		t.Errorf("Spend(until another time) = %v, want ErrSpent", err)
	}
}

// Whatever issuers call their tokens, each is another.
func testTokenNames(t *testing.T, a, b storage.TokenStore) {
	long := strings.Repeat("x", 4096)
	names := [][2]string{
		{"https://a.test", "1"}, {"https://a.test1", ""}, {"https://a.test", ""}, {"", "https://a.test"}, {"", ""},
		{"https://b.test", "1"}, {"https://a.test", "1 "}, {"https://a.test", "1\x00"}, {"https://a.test", "\xff\xfe"},
		{"https://a.test", "'; DROP TABLE spent; --"}, {"https://a.test", long}, {"https://a.test", long + "x"}, {"A", "b"}, {"a", "B"}, {"a", "b"},
	}
	for _, name := range names {
		checkSpend(t, a, name[0], name[1], nil)
	}
	for _, name := range names {
		checkSpend(t, b, name[0], name[1], storage.ErrSpent)
	}
}

// A race for each of a few tokens, of callers of both replicas.
func testSpendAtOnce(t *testing.T, a, b storage.TokenStore) {
	const tokens, callers = 10, 8
	for n := range tokens {
		id := fmt.Sprint(n)
		var won, lost atomic.Int64
		start := make(chan struct{})
		var all sync.WaitGroup
		for c := range callers {
			s := []storage.TokenStore{a, b}[c%2]
			all.Go(func() {
				<-start
				switch err := s.Spend(t.Context(), "issuer", id, tokenExpiry); {
				case err == nil:
					won.Add(1)
				case errors.Is(err, storage.ErrSpent):
					lost.Add(1)
				default:
					t.Errorf("Spend = %v, want nil or ErrSpent", err)
				}
			})
		}
		close(start)
		all.Wait()
		if won.Load() != 1 || lost.Load() != callers-1 {
			t.Fatalf("of %d Spends of one token %d succeeded and %d found it spent, want 1 and %d", callers, won.Load(), lost.Load(), callers-1)
		}
	}
}

func testPruneSpent(t *testing.T, a, b storage.TokenStore) {
	const each = 3
	spend := func(name string, until time.Time) {
		for n := range each {
			if err := a.Spend(t.Context(), name, fmt.Sprint(n), until); err != nil {
				t.Fatalf("Spend = %v", err)
			}
		}
	}
	spend("before", tokenExpiry.Add(-time.Millisecond))
	spend("at", tokenExpiry)
	spend("after", tokenExpiry.Add(time.Hour))
	if n, err := b.PruneSpent(t.Context(), tokenExpiry); n != each || err != nil {
		t.Errorf("PruneSpent(the expiry of some) = %d, %v, want the %d that expired before", n, err, each)
	}
	for n := range each {
		checkSpend(t, a, "at", fmt.Sprint(n), storage.ErrSpent)
		checkSpend(t, b, "after", fmt.Sprint(n), storage.ErrSpent)
		checkSpend(t, b, "before", fmt.Sprint(n), nil) // forgotten
	}
	for _, want := range []int{2 * each, 0} {
		if n, err := a.PruneSpent(t.Context(), tokenExpiry.Add(time.Minute)); n != want || err != nil {
			t.Errorf("PruneSpent = %d, %v, want %d", n, err, want)
		}
	}
	checkSpend(t, a, "after", "0", storage.ErrSpent)
}

// Prunes of two replicas beside Spends: nobody fails, nothing that lives is
// forgotten, and nothing is counted twice.
func testPruneBesideSpend(t *testing.T, a, b storage.TokenStore) {
	const tokens = 40
	for n := range tokens {
		if err := a.Spend(t.Context(), "old", fmt.Sprint(n), tokenExpiry.Add(-time.Hour)); err != nil {
			t.Fatal(err)
		}
	}
	var pruned atomic.Int64
	var all sync.WaitGroup
	for _, s := range []storage.TokenStore{a, b} {
		all.Go(func() {
			n, err := s.PruneSpent(t.Context(), tokenExpiry)
			if err != nil {
				t.Errorf("PruneSpent = %v", err)
			}
			pruned.Add(int64(n))
		})
	}
	all.Go(func() {
		for n := range tokens {
			if err := b.Spend(t.Context(), "new", fmt.Sprint(n), tokenExpiry); err != nil {
				t.Errorf("Spend beside PruneSpent = %v", err)
				return
			}
		}
	})
	all.Wait()
	// What one Prune found locked by the other, it passed over.
	n, err := a.PruneSpent(t.Context(), tokenExpiry)
	if sum := int(pruned.Load()) + n; sum != tokens || err != nil {
		t.Errorf("three Prunes removed %d, %v, want %d", sum, err, tokens)
	}
	for n := range tokens {
		checkSpend(t, a, "new", fmt.Sprint(n), storage.ErrSpent)
	}
}

func testSpendEndedContext(t *testing.T, a, b storage.TokenStore) {
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := a.Spend(ended, "issuer", "token", tokenExpiry); !errors.Is(err, context.Canceled) {
		t.Errorf("Spend with an ended context = %v, want context.Canceled", err)
	}
	if _, err := a.PruneSpent(ended, tokenExpiry); !errors.Is(err, context.Canceled) {
		t.Errorf("PruneSpent with an ended context = %v, want context.Canceled", err)
	}
	checkSpend(t, b, "issuer", "token", nil)
}

// checkSpend wants the error, or none.
func checkSpend(t *testing.T, s storage.TokenStore, issuer, id string, want error) {
	t.Helper()
	if err := s.Spend(t.Context(), issuer, id, tokenExpiry); !errors.Is(err, want) {
		t.Errorf("Spend(%.40q, %.40q) = %v, want %v", issuer, id, err, want)
	}
}
