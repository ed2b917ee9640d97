package storagetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"troth.dev/troth/storage"
)

// TestFleetStore runs the contract of [storage.FleetStore]. open returns a store
// that nobody has published in, and closes it when its test ends.
func TestFleetStore(t *testing.T, open func(t *testing.T) storage.FleetStore) {
	tests := []struct {
		name string
		run  func(*testing.T, storage.FleetStore)
	}{
		{"publish, replace, withdraw", testPublish},
		{"names of replicas", testReplicaNames},
		{"summary size", testSummarySize},
		{"summaries are not aliased", testSummaryAliasing},
		{"replicas at the same time", testReplicasAtOnce},
		{"ended context", testFleetEndedContext},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) { test.run(t, open(t)) })
	}
}

func testPublish(t *testing.T, s storage.FleetStore) {
	checkSummaries(t, s)
	publish(t, s, "b", "of b")
	checkSummaries(t, s, "b", "of b")
	publish(t, s, "a", "\x00\xff binary")
	checkSummaries(t, s, "a", "\x00\xff binary", "b", "of b")
	publish(t, s, "b", "")
	checkSummaries(t, s, "a", "\x00\xff binary", "b", "")
	for range 2 { // the second time there is none
		if err := s.Withdraw(t.Context(), "a"); err != nil {
			t.Errorf("Withdraw(a) = %v", err)
		}
		checkSummaries(t, s, "b", "")
	}
	publish(t, s, "a", "again")
	checkSummaries(t, s, "a", "again", "b", "")
}

func testReplicaNames(t *testing.T, s storage.FleetStore) {
	longest := strings.Repeat("r", 200)
	for _, name := range []string{"0", "troth-server-0", "troth.server.7", longest} {
		publish(t, s, name, "x")
	}
	checkSummaries(t, s, "0", "x", longest, "x", "troth-server-0", "x", "troth.server.7", "x")
	for _, name := range []string{"", longest + "r", "-a", "a-", ".a", "a.", "a..b", "a.-b", "a-.b", "A", "a b", "a/b", "a\x00", "ä", "a_b", "'; --"} {
		if err := s.Publish(t.Context(), name, []byte("x")); !errors.Is(err, storage.ErrReplicaName) {
			t.Errorf("Publish(%q) = %v, want ErrReplicaName", name, err)
		}
		if err := s.Withdraw(t.Context(), name); !errors.Is(err, storage.ErrReplicaName) {
			t.Errorf("Withdraw(%q) = %v, want ErrReplicaName", name, err)
		}
	}
	checkSummaries(t, s, "0", "x", longest, "x", "troth-server-0", "x", "troth.server.7", "x")
}

func testSummarySize(t *testing.T, s storage.FleetStore) {
	largest := strings.Repeat("\xa5", storage.MaxDocument)
	publish(t, s, "a", largest)
	if err := s.Publish(t.Context(), "a", []byte(largest+"x")); !errors.Is(err, storage.ErrDocumentSize) {
		t.Errorf("Publish(%d bytes) = %v, want ErrDocumentSize", len(largest)+1, err)
	}
	checkSummaries(t, s, "a", largest)
}

func testSummaryAliasing(t *testing.T, s storage.FleetStore) {
	given := []byte("abc")
	if err := s.Publish(t.Context(), "a", given); err != nil {
		t.Fatal(err)
	}
	returned, err := s.Summaries(t.Context())
	if err != nil || len(returned) != 1 {
		t.Fatalf("Summaries() = %v, %v", returned, err)
	}
	for _, data := range [][]byte{given, returned[0].Data} {
		data[0] = 'X'
		checkSummaries(t, s, "a", "abc")
	}
}

// No replica loses what it published to another, and each sees its own at once.
func testReplicasAtOnce(t *testing.T, s storage.FleetStore) {
	const replicas, rounds = 4, 20
	var all sync.WaitGroup
	for r := range replicas {
		name := fmt.Sprintf("replica-%d", r)
		all.Go(func() {
			for round := range rounds {
				data := fmt.Appendf(nil, "%d", round)
				if err := s.Publish(t.Context(), name, data); err != nil {
					t.Errorf("Publish(%q) = %v", name, err)
					return
				}
				summaries, err := s.Summaries(t.Context())
				if err != nil {
					t.Errorf("Summaries() = %v", err)
					return
				}
				found := false
				for _, one := range summaries {
					found = found || one.Replica == name && bytes.Equal(one.Data, data)
				}
				if !found {
					t.Errorf("Summaries() after Publish(%q, %q) = %v", name, data, summaries)
					return
				}
			}
		})
	}
	all.Wait()
	last := fmt.Sprint(rounds - 1)
	checkSummaries(t, s, "replica-0", last, "replica-1", last, "replica-2", last, "replica-3", last)
}

func testFleetEndedContext(t *testing.T, s storage.FleetStore) {
	publish(t, s, "a", "before")
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Publish(ended, "a", []byte("after")); !errors.Is(err, context.Canceled) {
		t.Errorf("Publish with an ended context = %v, want context.Canceled", err)
	}
	if err := s.Withdraw(ended, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("Withdraw with an ended context = %v, want context.Canceled", err)
	}
	if _, err := s.Summaries(ended); !errors.Is(err, context.Canceled) {
		t.Errorf("Summaries with an ended context = %v, want context.Canceled", err)
	}
	checkSummaries(t, s, "a", "before")
}

func publish(t *testing.T, s storage.FleetStore, replica, data string) {
	t.Helper()
	if err := s.Publish(t.Context(), replica, []byte(data)); err != nil {
		t.Fatalf("Publish(%q) = %v", replica, err)
	}
}

// checkSummaries wants these replicas and what they published, in turn.
func checkSummaries(t *testing.T, s storage.FleetStore, want ...string) {
	t.Helper()
	summaries, err := s.Summaries(t.Context())
	if err != nil {
		t.Fatalf("Summaries() = %v", err)
	}
	var got []string
	for _, one := range summaries {
		got = append(got, one.Replica, string(one.Data))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Summaries() (-want +got):\n%s", diff)
	}
}
