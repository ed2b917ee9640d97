package postgres_test

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/storage"
)

var epoch = time.Date(2031, 2, 3, 4, 5, 6, 0, time.UTC)

// issuance returns an issuance as big as real ones are, with a random serial
// number and one of 10,000 SPIFFE IDs.
func issuance() storage.Issuance {
	now := time.Now()
	workload := mathrand.IntN(10_000)
	node := "node-" + strconv.Itoa(workload%1000)
	return storage.Issuance{
		Serial:      randomSerial(),
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

func TestConcurrentRecordsShareCommits(t *testing.T) {
	const writers, calls = 64, 10
	at := server.Database(t)
	s := openAt(t, at)
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
	// xmin is the transaction that inserted a row.
	await(t, at, fmt.Sprintf("SELECT count(*) = %d AND count(DISTINCT xmin::text) <= %d FROM troth.issuance", writers*calls, writers*calls/4))
}

// While somebody else has the table, Records wait for as long as their context
// allows, and reads of the document do not wait. Who gave up in the queue is not
// recorded when the others are.
func TestWhileWritingIsBlocked(t *testing.T) {
	at := server.Database(t)
	s := openAt(t, at)
	unlock := lock(t, at, "LOCK TABLE troth.issuance IN SHARE MODE")
	const waiting = "SELECT count(*) = %d FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
	blocked := make(chan error, 2)
	for n := range cap(blocked) {
		go func() { blocked <- s.Record(t.Context(), issuance()) }()
		await(t, at, fmt.Sprintf(waiting, n+1))
	}
	late := issuance()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := s.Record(ctx, late); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Record while it cannot commit = %v, want its context's error", err)
	}
	if _, err := s.Load(t.Context()); err != nil {
		t.Errorf("Load while nobody can record = %v, want nil", err)
	}
	unlock()
	for range cap(blocked) {
		if err := <-blocked; err != nil {
			t.Errorf("Record that had waited = %v", err)
		}
	}
	if err := s.Record(t.Context(), issuance()); err != nil {
		t.Errorf("Record after the lock was released = %v", err)
	}
	if found, err := s.Query(t.Context(), storage.Query{Serial: late.Serial}); len(found) != 0 || err != nil {
		t.Errorf("Query(a Record that gave up in the queue) = %d rows, %v, want none", len(found), err)
	}
}

// The floor is the same rows in the same table, by pgx and nothing else: of one
// writer a row in each statement; of 64, what 64 Records could make of it at best,
// 64 rows in each statement, through unnest.
func BenchmarkRecord(b *testing.B) {
	for _, goroutines := range []int{1, 64} {
		b.Run(fmt.Sprintf("%d", goroutines), func(b *testing.B) {
			s := openAt(b, filled(b))
			floor := floorOf(b, goroutines)
			b.ResetTimer()
			var all sync.WaitGroup
			for g := range goroutines {
				all.Go(func() {
					for n := g; n < b.N; n += goroutines {
						if err := s.Record(b.Context(), issuance()); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			all.Wait()
			perSecond := float64(b.N) / b.Elapsed().Seconds()
			b.ReportMetric(perSecond, "issuances/s")
			b.ReportMetric(floor, "floor/s")
			b.ReportMetric(perSecond/floor, "of-floor")
		})
	}
}

func BenchmarkRecordBatches(b *testing.B) {
	s := openAt(b, filled(b))
	batch := make([]storage.Issuance, 100)
	for b.Loop() {
		for n := range batch {
			batch[n] = issuance()
		}
		if err := s.Record(b.Context(), batch...); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N*len(batch))/b.Elapsed().Seconds(), "issuances/s")
}

func BenchmarkQuery(b *testing.B) {
	s := openAt(b, filled(b))
	nobody := spiffeid.RequireFromString("spiffe://cluster.local/nobody")
	for _, query := range []struct {
		name string
		q    storage.Query
	}{
		{"newest 100", storage.Query{Limit: 100}},
		{"valid now, newest 100", storage.Query{ValidAt: time.Now(), Limit: 100}},
		{"serial", storage.Query{Serial: randomSerial()}},
		{"ID of none", storage.Query{ID: nobody}},
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

// filled returns the URL of a store with 100,000 issuances, so that its indexes are
// many pages.
func filled(b *testing.B) string {
	b.Helper()
	url := server.Database(b)
	s := openAt(b, url)
	batch := make([]storage.Issuance, 1000)
	for range 100 {
		for n := range batch {
			batch[n] = issuance()
		}
		if err := s.Record(b.Context(), batch...); err != nil {
			b.Fatal(err)
		}
	}
	return url
}

// floorOf returns how many rows a second pgx inserts, so many in each statement.
func floorOf(b *testing.B, size int) float64 {
	b.Helper()
	pool, err := pgxpool.New(b.Context(), filled(b))
	if err != nil {
		b.Fatal(err)
	}
	defer pool.Close()
	var rows int
	began := time.Now()
	for time.Since(began) < time.Second {
		insert(b, pool, size)
		rows += size
	}
	return float64(rows) / time.Since(began).Seconds()
}

func insert(b *testing.B, pool *pgxpool.Pool, size int) {
	var serials [][]byte
	var texts [5][]string
	var times [3][]int64
	for range size {
		i := issuance()
		var serial [20]byte
		rand.Read(serial[:])
		serials = append(serials, serial[:])
		for n, text := range []string{i.ID.String(), i.AuthorityID, i.Caller, i.Node, i.PodUID} {
			texts[n] = append(texts[n], text)
		}
		for n, at := range []int64{i.NotBefore.Unix(), i.NotAfter.Unix(), i.IssuedAt.UnixMilli()} {
			times[n] = append(times[n], at)
		}
	}
	_, err := pool.Exec(b.Context(), `
		INSERT INTO troth.issuance (serial, id, authority, caller, node, pod_uid, not_before, not_after, issued_at_ms)
		SELECT * FROM unnest($1::bytea[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::bigint[], $8::bigint[], $9::bigint[])`,
		serials, texts[0], texts[1], texts[2], texts[3], texts[4], times[0], times[1], times[2])
	if err != nil {
		b.Fatal(err)
	}
}
