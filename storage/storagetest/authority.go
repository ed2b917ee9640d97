// Package storagetest is the conformance suite of package storage: every sentence
// of the contracts that a test can check. Each store runs it on the real thing,
// through [TestAuthorityStore], [TestLedger], [TestFleetStore] and [TestTokenStore], and
// [TestReopen] if what it holds outlives the process.
//
// The suite sleeps nowhere and assumes no speed, so that it can run against a
// store behind a network. It cannot see durability: a store has to kill itself for
// that, see the tests of storage/sqlite.
package storagetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"troth.dev/troth/storage"
)

// TestAuthorityStore runs the contract of [storage.AuthorityStore]. open returns
// a store that nothing was stored in, and closes it when its test ends.
func TestAuthorityStore(t *testing.T, open func(t *testing.T) storage.AuthorityStore) {
	tests := []struct {
		name string
		run  func(*testing.T, storage.AuthorityStore)
	}{
		{"never stored", testNeverStored},
		{"swap", testSwap},
		{"conflict changes nothing", testConflict},
		{"document size", testDocumentSize},
		{"data is not aliased", testAliasing},
		{"racing first swaps", testRacingFirstSwaps},
		{"no increment is lost", testCounter},
		{"watch wakes", testWatchWakes},
		{"watch skips", testWatchSkips},
		{"watch waits", testWatchWaits},
		{"ended context", testEndedContext},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) { test.run(t, open(t)) })
	}
}

func testNeverStored(t *testing.T, s storage.AuthorityStore) {
	checkDocument(t, s, storage.Document{})
	if _, err := s.Swap(t.Context(), "no such version", []byte("x")); !errors.Is(err, storage.ErrConflict) {
		t.Errorf("Swap(a version that never was) = %v, want ErrConflict", err)
	}
	checkDocument(t, s, storage.Document{})
}

func testSwap(t *testing.T, s storage.AuthorityStore) {
	seen := map[string]bool{"": true}
	current := ""
	// The same data again, and no data, are new documents too.
	for _, data := range []string{"one", "two", "two", "", "\x00\xff binary", "one"} {
		next := swap(t, s, current, data)
		if seen[next.Version] {
			t.Fatalf("Swap returned version %q, which was used before", next.Version)
		}
		seen[next.Version] = true
		if string(next.Data) != data {
			t.Fatalf("Swap(%q) returned the document %q", data, next.Data)
		}
		checkDocument(t, s, next)
		current = next.Version
	}
}

func testConflict(t *testing.T, s storage.AuthorityStore) {
	first := swap(t, s, "", "first")
	second := swap(t, s, first.Version, "second")
	for _, old := range []string{"", first.Version, second.Version + "x", " " + second.Version} {
		d, err := s.Swap(t.Context(), old, []byte("third"))
		if !errors.Is(err, storage.ErrConflict) {
			t.Errorf("Swap(%q) while %q is current = %v, want ErrConflict", old, second.Version, err)
		}
		if d.Version != "" || d.Data != nil {
			t.Errorf("Swap returned %v with its error, want the zero Document", d)
		}
		checkDocument(t, s, second)
	}
}

func testDocumentSize(t *testing.T, s storage.AuthorityStore) {
	largest := bytes.Repeat([]byte{0xa5}, storage.MaxDocument)
	stored, err := s.Swap(t.Context(), "", largest)
	if err != nil {
		t.Fatalf("Swap(%d bytes) = %v, want nil", len(largest), err)
	}
	checkDocument(t, s, storage.Document{Version: stored.Version, Data: largest})
	if _, err := s.Swap(t.Context(), stored.Version, append(largest, 0)); !errors.Is(err, storage.ErrDocumentSize) {
		t.Errorf("Swap(%d bytes) = %v, want ErrDocumentSize", len(largest)+1, err)
	}
	checkDocument(t, s, storage.Document{Version: stored.Version, Data: largest})
}

func testAliasing(t *testing.T, s storage.AuthorityStore) {
	given := []byte("abc")
	swapped, err := s.Swap(t.Context(), "", given)
	if err != nil {
		t.Fatal(err)
	}
	version := swapped.Version
	loaded := load(t, s)
	watched, err := s.Watch(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, data := range [][]byte{given, swapped.Data, loaded.Data, watched.Data} {
		data[0] = 'X'
		checkDocument(t, s, storage.Document{Version: version, Data: []byte("abc")})
	}
}

func testRacingFirstSwaps(t *testing.T, s storage.AuthorityStore) {
	const racers = 8
	won := make(chan storage.Document, racers)
	start := make(chan struct{})
	var all sync.WaitGroup
	for n := range racers {
		all.Go(func() {
			<-start
			d, err := s.Swap(t.Context(), "", []byte(strconv.Itoa(n)))
			switch {
			case err == nil:
				won <- d
			case !errors.Is(err, storage.ErrConflict):
				t.Errorf("Swap = %v, want nil or ErrConflict", err)
			}
		})
	}
	close(start)
	all.Wait()
	if len(won) != 1 {
		t.Fatalf("%d of %d racing first Swaps succeeded, want 1", len(won), racers)
	}
	checkDocument(t, s, <-won)
}

// If Swaps were not totally ordered, two increments would start from the same
// number, and one of them would be lost. The documents are large, to give a store
// that compares first and swaps then the time to fail.
func testCounter(t *testing.T, s storage.AuthorityStore) {
	const writers, increments = 8, 25
	start := make(chan struct{})
	var all sync.WaitGroup
	for range writers {
		all.Go(func() {
			<-start
			for done := 0; done < increments; {
				d, err := s.Load(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				count := counter(d)
				next, err := s.Swap(t.Context(), d.Version, fmt.Appendf(nil, "%16384d", count+1))
				switch {
				case errors.Is(err, storage.ErrConflict):
					continue
				case err != nil:
					t.Error(err)
					return
				}
				done++
				// A Load that begins now sees this count or a later one.
				later, err := s.Load(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				if n := counter(later); n < count+1 {
					t.Errorf("Load() after Swap(%d) had returned %q = %d", count+1, next.Version, n)
					return
				}
			}
		})
	}
	close(start)
	all.Wait()
	if got := counter(load(t, s)); got != writers*increments {
		t.Errorf("the counter is %d after %d increments", got, writers*increments)
	}
}

// counter returns the number in d, 0 if nothing was stored.
func counter(d storage.Document) int {
	n, _ := strconv.Atoi(strings.TrimSpace(string(d.Data)))
	return n
}

func testWatchWakes(t *testing.T, s storage.AuthorityStore) {
	const watchers, last = 4, 20
	var all sync.WaitGroup
	for range watchers {
		all.Go(func() {
			seen := storage.Document{}
			for count := 0; count < last; {
				d, err := s.Watch(t.Context(), seen.Version)
				if err != nil {
					t.Errorf("Watch(%q) = %v", seen.Version, err)
					return
				}
				n := counter(d)
				if n <= count {
					t.Errorf("Watch went from document %d to %d, version %q to %q", count, n, seen.Version, d.Version)
					return
				}
				count, seen = n, d
			}
		})
	}
	version := ""
	for n := 1; n <= last; n++ {
		version = swap(t, s, version, strconv.Itoa(n)).Version
	}
	all.Wait()
}

func testWatchSkips(t *testing.T, s storage.AuthorityStore) {
	first := swap(t, s, "", "first")
	second := swap(t, s, first.Version, "second")
	third := swap(t, s, second.Version, "third")
	for _, seen := range []string{"", first.Version, second.Version, "no such version"} {
		d, err := s.Watch(t.Context(), seen)
		if err != nil || d.Version != third.Version || string(d.Data) != "third" {
			t.Errorf("Watch(%q) = %q %q, %v, want the current document at once", seen, d.Version, d.Data, err)
		}
	}
}

func testWatchWaits(t *testing.T, s storage.AuthorityStore) {
	waits := func(seen string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if d, err := s.Watch(ctx, seen); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Watch(the current version %q) = %q, %v, want to wait until the deadline", seen, d.Version, err)
		}
	}
	waits("")
	stored := swap(t, s, "", "x")
	waits(stored.Version)
}

func testEndedContext(t *testing.T, s storage.AuthorityStore) {
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Load(ended); !errors.Is(err, context.Canceled) {
		t.Errorf("Load(ended context) = %v, want context.Canceled", err)
	}
	if _, err := s.Swap(ended, "", []byte("x")); !errors.Is(err, context.Canceled) {
		t.Errorf("Swap(ended context) = %v, want context.Canceled", err)
	}
	if _, err := s.Watch(ended, ""); !errors.Is(err, context.Canceled) {
		t.Errorf("Watch(ended context) = %v, want context.Canceled", err)
	}
}

func swap(t *testing.T, s storage.AuthorityStore, old, data string) storage.Document {
	t.Helper()
	d, err := s.Swap(t.Context(), old, []byte(data))
	if err != nil {
		t.Fatalf("Swap(%q, %q) = %v", old, data, err)
	}
	return d
}

func load(t *testing.T, s storage.AuthorityStore) storage.Document {
	t.Helper()
	d, err := s.Load(t.Context())
	if err != nil {
		t.Fatalf("Load() = %v", err)
	}
	return d
}

func checkDocument(t *testing.T, s storage.AuthorityStore, want storage.Document) {
	t.Helper()
	if got := load(t, s); got.Version != want.Version || !bytes.Equal(got.Data, want.Data) {
		t.Fatalf("Load() = version %q, %d bytes %.20q, want version %q, %d bytes %.20q",
			got.Version, len(got.Data), got.Data, want.Version, len(want.Data), want.Data)
	}
}
