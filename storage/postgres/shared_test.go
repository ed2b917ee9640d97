package postgres_test

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"troth.dev/troth/storage"
	"troth.dev/troth/storage/postgres"
)

// No increment is lost between two replicas, and each sees at once what the other
// has swapped.
func TestSwapsOfTwoReplicas(t *testing.T) {
	const writers, increments = 4, 25
	url := server.Database(t)
	replicas := []*postgres.Store{openAt(t, url), openAt(t, url)}
	var all sync.WaitGroup
	for w := range writers {
		own, other := replicas[w%2], replicas[1-w%2]
		all.Go(func() {
			for done := 0; done < increments; {
				d, err := own.Load(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				n, _ := strconv.Atoi(string(d.Data))
				_, err = own.Swap(t.Context(), d.Version, []byte(strconv.Itoa(n+1)))
				if errors.Is(err, storage.ErrConflict) {
					continue
				}
				later, errLoad := other.Load(t.Context())
				if err := errors.Join(err, errLoad); err != nil {
					t.Error(err)
					return
				}
				if seen, _ := strconv.Atoi(string(later.Data)); seen < n+1 {
					t.Errorf("the other replica loaded %d after Swap(%d) had returned", seen, n+1)
				}
				done++
			}
		})
	}
	all.Wait()
	if d, err := replicas[0].Load(t.Context()); string(d.Data) != strconv.Itoa(writers*increments) || err != nil {
		t.Errorf("the counter is at %q, %v after %d increments", d.Data, err, writers*increments)
	}
}

// Replicas answer each other's Swaps, in far less time than it would take them to
// find each by looking: 5 seconds, or up to 3 while notifications are cut.
func TestWatchIsNotified(t *testing.T) {
	const swaps = 20
	url := server.Database(t)
	replicas := []*postgres.Store{openAt(t, url), openAt(t, url)}
	const listening = "FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN %'"
	await(t, url, "SELECT count(*) = 2 "+listening)
	began := time.Now()
	ctx, fail := context.WithCancel(t.Context()) // for nobody to wait for who failed
	defer fail()
	var all sync.WaitGroup
	for r, replica := range replicas {
		all.Go(func() {
			var d storage.Document
			for n := range swaps {
				var err error
				if n%2 == r {
					d, err = replica.Swap(ctx, d.Version, []byte{byte(n)})
				} else {
					d, err = replica.Watch(ctx, d.Version)
				}
				if err != nil || len(d.Data) != 1 || int(d.Data[0]) != n {
					t.Errorf("replica %d has document %v, %v, want %d", r, d.Data, err, n)
					fail()
					return
				}
			}
		})
	}
	all.Wait()
	if took := time.Since(began); took > swaps*time.Second {
		t.Errorf("%d Swaps were watched in %s", swaps, took)
	}
}

// Notifications are cut, and cannot come back: this role may not have one more
// connection. Watch looks for itself. When they may, they are back.
func TestWatchWithoutNotifications(t *testing.T) {
	url := server.Database(t)
	other := openAt(t, url)
	server.Execute(t, url, "CREATE ROLE limited LOGIN; GRANT ALL ON SCHEMA troth TO limited; GRANT ALL ON ALL TABLES IN SCHEMA troth TO limited")
	t.Cleanup(func() { server.Execute(t, url, "DROP OWNED BY limited; DROP ROLE limited") })
	s := openAt(t, as(url, "limited"))
	const listening = "FROM pg_stat_activity WHERE usename = 'limited' AND query LIKE 'LISTEN %'"
	await(t, url, "SELECT count(*) = 1 "+listening)
	server.Execute(t, url, "ALTER ROLE limited CONNECTION LIMIT 0; SELECT pg_terminate_backend(pid) "+listening)
	await(t, url, "SELECT count(*) = 0 "+listening)

	version := ""
	for n := range 2 {
		next, err := other.Swap(t.Context(), version, []byte{byte(n)})
		if err != nil {
			t.Fatal(err)
		}
		if d, err := s.Watch(t.Context(), version); d.Version != next.Version || err != nil {
			t.Fatalf("Watch without notifications = %q, %v, want %q", d.Version, err, next.Version)
		}
		version = next.Version
		watched := make(chan error, 1)
		go func() {
			_, err := s.Watch(t.Context(), version)
			watched <- err
		}()
		// It waits by now, or not yet: each is a way to lose a change.
		if next, err = other.Swap(t.Context(), version, nil); err != nil {
			t.Fatal(err)
		}
		if err := <-watched; err != nil {
			t.Errorf("Watch without notifications = %v", err)
		}
		version = next.Version
	}
	server.Execute(t, url, "ALTER ROLE limited CONNECTION LIMIT -1")
	await(t, url, "SELECT count(*) = 1 "+listening)
}

// Somebody restores a document by hand, and notifies nobody.
func TestWatchOfSilentChange(t *testing.T) {
	url := server.Database(t)
	s := openAt(t, url)
	await(t, url, "SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN %'")
	watched := make(chan storage.Document, 1)
	go func() {
		d, err := s.Watch(t.Context(), "")
		if err != nil {
			t.Error(err)
		}
		watched <- d
	}()
	server.Execute(t, url, "UPDATE troth.document SET version = 'by hand', data = 'x'")
	if d := <-watched; d.Version != "by hand" {
		t.Errorf("Watch = %q, want the document that was put there by hand", d.Version)
	}
}

// Two replicas share the ledger. They record the same serial numbers at the same
// time, in opposite orders, and each number is one call's: no deadlock is anybody's
// error.
func TestLedgerOfTwoReplicas(t *testing.T) {
	const rounds, size = 20, 200
	url := server.Database(t)
	replicas := []*postgres.Store{openAt(t, url), openAt(t, url)}
	var want []string
	for range rounds {
		batch := make([]storage.Issuance, size)
		for n := range batch {
			batch[n] = issuance()
			want = append(want, batch[n].Serial)
		}
		start, results := make(chan struct{}), make(chan error, 2)
		for _, replica := range replicas {
			own := slices.Clone(batch)
			slices.Reverse(batch)
			go func() {
				<-start
				results <- replica.Record(t.Context(), own...)
			}()
		}
		close(start)
		first, second := <-results, <-results
		if first != nil {
			first, second = second, first
		}
		if first != nil || !errors.Is(second, storage.ErrDuplicateSerial) {
			t.Fatalf("two Records of the same = %v and %v, want nil and ErrDuplicateSerial", first, second)
		}
	}
	for _, replica := range replicas {
		checkRecorded(t, replica, want)
	}

	pruned := make(chan int, 2)
	for _, replica := range replicas {
		go func() {
			n, err := replica.Prune(t.Context(), time.Now().Add(2*time.Hour))
			if err != nil {
				t.Errorf("Prune beside Prune = %v", err)
			}
			pruned <- n
		}()
	}
	if sum := <-pruned + <-pruned; sum != rounds*size {
		t.Errorf("two Prunes removed %d, want %d", sum, rounds*size)
	}
}

// Each replica sees what the other has published, in the order of bytes, although
// the database sorts by the rules of a language.
func TestFleetOfTwoReplicas(t *testing.T) {
	url := server.Database(t)
	replicas := []*postgres.Store{openAt(t, url), openAt(t, url)}
	want := []string{"a-b", "a.c", "ab"}
	for n, name := range want {
		if err := replicas[n%2].Publish(t.Context(), name, []byte(name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, replica := range replicas {
		all, err := replica.Summaries(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, one := range all {
			got = append(got, one.Replica)
		}
		if !slices.Equal(got, want) {
			t.Errorf("Summaries() = %q, want %q", got, want)
		}
	}
}
