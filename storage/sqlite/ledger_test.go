package sqlite_test

import (
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/storage"
	"troth.dev/troth/storage/sqlite"
)

var epoch = time.Date(2031, 2, 3, 4, 5, 6, 0, time.UTC)

// issuance returns an issuance as big as real ones are, with a random serial
// number and one of 10,000 SPIFFE IDs.
func issuance() storage.Issuance {
	return shaped(randomSerial(), mathrand.IntN(10_000))
}

func shaped(serial string, workload int) storage.Issuance {
	now := time.Now()
	node := "node-" + strconv.Itoa(workload%1000)
	return storage.Issuance{
		Serial:      serial,
		ID:          spiffeid.RequireFromString(fmt.Sprintf("spiffe://cluster.local/ns/team-%d/sa/service-%d", workload%100, workload)),
		AuthorityID: authority,
		NotBefore:   now,
		NotAfter:    now.Add(time.Hour),
		IssuedAt:    now,
		Caller:      "spiffe://cluster.local/troth/agent/" + node + "/0b7a8c5e-9d0f-4a52-8a0e-2b8e4a8a3f1b/troth-agent-x7k2p/5d0f7a8c-9d0f-4a52-8a0e-2b8e4a8a3f1b",
		Node:        node,
		PodUID:      "0b7a8c5e-9d0f-4a52-8a0e-2b8e4a8a3f1b",
	}
}

const authority = "3f786850e387550fdab836ed7e6dc881de23001b"

func randomSerial() string {
	var random [16]byte
	rand.Read(random[:])
	random[0] |= 0x10 // no leading zero
	return hex.EncodeToString(random[:])
}

// timedSerial returns 32 bits of time and 128 of chance: the newest is the
// largest, until 2038.
func timedSerial() string {
	return strconv.FormatInt(time.Now().Unix(), 16) + randomSerial()
}

func TestConcurrentRecordsShareCommits(t *testing.T) {
	const writers, calls = 64, 10
	path := filepath.Join(t.TempDir(), "troth.db")
	s := openAt(t, path)
	before := commits(t, path)
	var all sync.WaitGroup
	for range writers {
		all.Go(func() {
			for range calls {
				if err := s.Record(t.Context(), issuance()); err != nil {
					t.Errorf("Record = %v", err)
				}
			}
		})
	}
	all.Wait()
	n := commits(t, path) - before
	t.Logf("%d Records, %d commits", writers*calls, n)
	if n > writers*calls/4 {
		t.Errorf("%d Records by %d goroutines took %d commits, want a quarter at most", writers*calls, writers, n)
	}
}

func TestBatchIsOneCommit(t *testing.T) {
	path := filepath.Join(t.TempDir(), "troth.db")
	s := openAt(t, path)
	before := commits(t, path)
	batch := make([]storage.Issuance, 100)
	for n := range batch {
		batch[n] = issuance()
	}
	if err := s.Record(t.Context(), batch...); err != nil {
		t.Fatal(err)
	}
	if n := commits(t, path) - before; n != 1 {
		t.Errorf("Record(100 issuances) took %d commits, want 1", n)
	}
}

// While somebody else holds the write lock, Records wait for as long as their
// context allows, and reads do not wait.
func TestWhileWritingIsBlocked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "troth.db")
	s := openAt(t, path)
	first := issuance()
	if err := s.Record(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	unlock := blockWrites(t, path)

	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := s.Record(ctx, issuance()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Record while it cannot commit = %v, want its context's error", err)
	}
	if found, err := s.Query(t.Context(), storage.Query{Serial: first.Serial}); len(found) != 1 || err != nil {
		t.Errorf("Query while nobody can write = %d rows, %v, want 1, nil", len(found), err)
	}
	if _, err := s.Load(t.Context()); err != nil {
		t.Errorf("Load while nobody can write = %v, want nil", err)
	}
	unlock()
	if err := s.Record(t.Context(), issuance()); err != nil {
		t.Errorf("Record after the lock was released = %v, want nil", err)
	}
}

// Whatever was acknowledged by the time Close returned is there when the store is
// opened again, and nothing is written to it from then on.
func TestCloseUnderLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "troth.db")
	closing := openAt(t, path)
	var mu sync.Mutex
	var acknowledged []string // guarded by mu
	busy := make(chan struct{}, 1)
	var all sync.WaitGroup
	for range 16 {
		all.Go(func() {
			for {
				i := issuance()
				err := closing.Record(t.Context(), i)
				if errors.Is(err, storage.ErrClosed) {
					return
				}
				if err != nil {
					t.Errorf("Record = %v, want nil or ErrClosed", err)
					return
				}
				mu.Lock()
				acknowledged = append(acknowledged, i.Serial)
				if len(acknowledged) == 200 {
					busy <- struct{}{}
				}
				mu.Unlock()
			}
		})
	}
	var swapped storage.Document // owned by the goroutine, then read after all.Wait
	all.Go(func() {
		for {
			next, err := closing.Swap(t.Context(), swapped.Version, nil)
			if errors.Is(err, storage.ErrClosed) {
				return
			}
			if err != nil {
				t.Errorf("Swap = %v, want nil or ErrClosed", err)
				return
			}
			swapped = next
		}
	})
	all.Go(func() {
		for {
			_, errQuery := closing.Query(t.Context(), storage.Query{Limit: 10})
			_, errPrune := closing.Prune(t.Context(), epoch.AddDate(-20, 0, 0))
			for _, err := range []error{errQuery, errPrune} {
				if err != nil && !errors.Is(err, storage.ErrClosed) {
					t.Errorf("Query or Prune = %v, want nil or ErrClosed", err)
				}
			}
			if errPrune != nil {
				return
			}
		}
	})
	<-busy
	if err := closing.Close(); err != nil {
		t.Errorf("Close() = %v", err)
	}
	s := openAt(t, path)
	d, err := s.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	all.Wait()
	if d.Version != swapped.Version {
		t.Errorf("Load() after Close = version %q, want that of the last Swap, %q", d.Version, swapped.Version)
	}
	checkRecorded(t, s, acknowledged)
}

// Close waits for a write that has begun: nothing may reach the file after the
// lock on it was given up.
func TestCloseWaitsForWrites(t *testing.T) {
	path := filepath.Join(t.TempDir(), "troth.db")
	s := openAt(t, path)
	unlock := blockWrites(t, path)
	swapped, closed := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := s.Swap(t.Context(), "", []byte("x"))
		swapped <- err
	}()
	for !s.Writing() {
		runtime.Gosched()
	}
	go func() { closed <- s.Close() }()
	select {
	case err := <-closed:
		t.Errorf("Close() = %v while a Swap was being written, want it to wait", err)
		closed <- err
	case <-time.After(50 * time.Millisecond):
	}
	unlock()
	if err := <-swapped; err != nil {
		t.Errorf("Swap that had begun before Close = %v, want nil", err)
	}
	if err := <-closed; err != nil {
		t.Errorf("Close() = %v", err)
	}
}

func checkRecorded(t *testing.T, s *sqlite.Store, serials []string) {
	t.Helper()
	for _, serial := range serials {
		found, err := s.Query(t.Context(), storage.Query{Serial: serial})
		if len(found) != 1 || err != nil {
			t.Fatalf("Query(serial %s, which was acknowledged) = %d rows, %v, want 1", serial, len(found), err)
		}
	}
}

// commits counts the transactions in the write-ahead log: the frames whose header
// has the size of the database, which only the last one of a transaction has
// (SQLite, "WAL File Format").
func commits(t *testing.T, path string) int {
	t.Helper()
	const logHeader, frameHeader, page = 32, 24, 4096
	log, err := os.ReadFile(path + "-wal")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for at := logHeader; at+frameHeader+page <= len(log); at += frameHeader + page {
		if binary.BigEndian.Uint32(log[at+4:]) != 0 {
			n++
		}
	}
	return n
}

// blockWrites takes the write lock as another program would, until unlock.
func blockWrites(t *testing.T, path string) (unlock func()) {
	t.Helper()
	db, err := sql.Open("sqlite", "file:"+path+"?_txlock=immediate")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	tx, err := db.BeginTx(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := tx.Rollback(); err != nil {
			t.Error(err)
		}
	}
}

// The ways in which issuances arrive, and the two kinds of serial numbers. CPU is
// user and system time of the whole process, with what it costs to make up the
// issuances, 1 to 2 us each, in it. The ledger has 100,000 rows at the start, so
// that its indexes are many pages.
func BenchmarkRecord(b *testing.B) {
	for _, kind := range []struct {
		name   string
		serial func() string
	}{{"random", randomSerial}, {"timed", timedSerial}} {
		next := func() storage.Issuance { return shaped(kind.serial(), mathrand.IntN(10_000)) }
		b.Run(kind.name+"/1 by each of 64", func(b *testing.B) {
			s := filled(b, 100_000, next)
			b.SetParallelism(64 / runtime.GOMAXPROCS(0))
			before := cpu()
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if err := s.Record(b.Context(), next()); err != nil {
						b.Error(err)
					}
				}
			})
			report(b, b.N, cpu()-before)
		})
		b.Run(kind.name+"/batches of 100", func(b *testing.B) {
			s := filled(b, 100_000, next)
			batch := make([]storage.Issuance, 100)
			before := cpu()
			for b.Loop() {
				for n := range batch {
					batch[n] = next()
				}
				if err := s.Record(b.Context(), batch...); err != nil {
					b.Fatal(err)
				}
			}
			report(b, b.N*len(batch), cpu()-before)
		})
		b.Run(kind.name+"/1 on an idle store", func(b *testing.B) {
			s := filled(b, 100_000, next)
			before := cpu()
			for b.Loop() {
				if err := s.Record(b.Context(), next()); err != nil {
					b.Fatal(err)
				}
			}
			report(b, b.N, cpu()-before)
		})
	}
}

func BenchmarkQuery(b *testing.B) {
	const rows = 100_000
	s := filled(b, rows, issuance)
	nobody := spiffeid.RequireFromString("spiffe://cluster.local/nobody")
	for _, query := range []struct {
		name string
		q    storage.Query
	}{
		{"newest 100", storage.Query{Limit: 100}},
		{"valid now, newest 100", storage.Query{ValidAt: time.Now(), Limit: 100}},
		{"serial", storage.Query{Serial: randomSerial()}},
		{"ID of ten", storage.Query{ID: shaped("1", 77).ID}},
		{"ID of none", storage.Query{ID: nobody}},
		{"ID of none, authority", storage.Query{ID: nobody, AuthorityID: authority}},
		{"authority, valid now, any", storage.Query{AuthorityID: authority, ValidAt: time.Now(), Limit: 1}},
	} {
		b.Run(query.name, func(b *testing.B) {
			for b.Loop() {
				if _, err := s.Query(b.Context(), query.q); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// filled returns a store with that many issuances.
func filled(b *testing.B, rows int, next func() storage.Issuance) *sqlite.Store {
	b.Helper()
	s := open(b)
	batch := make([]storage.Issuance, 1000)
	for range rows / len(batch) {
		for n := range batch {
			batch[n] = next()
		}
		if err := s.Record(b.Context(), batch...); err != nil {
			b.Fatal(err)
		}
	}
	return s
}

func cpu() time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		panic(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

func report(b *testing.B, issuances int, cpu time.Duration) {
	b.ReportMetric(float64(cpu.Nanoseconds())/1000/float64(issuances), "cpu-us/issuance")
	b.ReportMetric(float64(issuances)/b.Elapsed().Seconds(), "issuances/s")
}
