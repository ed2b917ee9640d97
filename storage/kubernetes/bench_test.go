package kubernetes_test

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"troth.dev/troth/storage"
)

// BenchmarkRecord has each goroutine record one issuance after the other. The floor
// is what the API server does with one ConfigMap for each, of the same size.
func BenchmarkRecord(b *testing.B) {
	for _, goroutines := range []int{1, 64} {
		b.Run(fmt.Sprintf("goroutines=%d", goroutines), func(b *testing.B) {
			s := open(b)
			concurrently(b, goroutines, func() error { return s.Record(b.Context(), issuance()) })
		})
		b.Run(fmt.Sprintf("floor/goroutines=%d", goroutines), func(b *testing.B) {
			cfg := config(b, cluster.Admin(), cluster.CreateNamespace(b, "troth-"))
			random := make([]byte, 280) // what one issuance is under gzip
			rand.Read(random)
			concurrently(b, goroutines, func() error {
				_, err := cfg.Client.CoreV1().ConfigMaps(cfg.Namespace).Create(b.Context(), &corev1.ConfigMap{
					ObjectMeta: metav1.ObjectMeta{Name: "floor-" + string(bytes.ToLower([]byte(rand.Text())))},
					BinaryData: map[string][]byte{"issuance": random},
				}, metav1.CreateOptions{})
				return err
			})
		})
	}
}

// BenchmarkQuery reads 1,000 of 100,000 issuances: all that a query can select by
// times, and a hundredth of them.
func BenchmarkQuery(b *testing.B) {
	const rows, call = 100_000, 100
	s := open(b)
	var first, last storage.Issuance
	for n := range rows / call {
		batch := make([]storage.Issuance, call)
		for i := range batch {
			batch[i] = issuance()
		}
		if n == 0 {
			first = batch[0]
		}
		if n == rows/call/100 {
			last = batch[0]
		}
		if err := s.Record(b.Context(), batch...); err != nil {
			b.Fatal(err)
		}
	}
	for name, q := range map[string]storage.Query{
		"all":   {},
		"times": {IssuedFrom: first.IssuedAt, IssuedUntil: last.IssuedAt},
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				found, err := s.Query(b.Context(), q)
				if err != nil || len(found) == 0 {
					b.Fatalf("Query = %d issuances, %v", len(found), err)
				}
			}
		})
	}
}

func concurrently(b *testing.B, goroutines int, do func() error) {
	var left atomic.Int64
	left.Store(int64(b.N))
	var all sync.WaitGroup
	b.ResetTimer()
	for range goroutines {
		all.Go(func() {
			for left.Add(-1) >= 0 {
				if err := do(); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "rows/s")
}
