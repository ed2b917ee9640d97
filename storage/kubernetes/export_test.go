package kubernetes

import (
	"context"
	"hash/maphash"
	"time"

	corev1 "k8s.io/api/core/v1"

	"troth.dev/troth/storage"
	"troth.dev/troth/storage/kubernetes/internal/batch"
)

// Batch returns the issuances as the ConfigMap in which the ledger keeps them.
func (s *Store) Batch(name string, all ...storage.Issuance) (*corev1.ConfigMap, error) {
	var lines []byte
	times := spanOf(all[0])
	for _, i := range all {
		encoded, err := batch.Encode(i)
		if err != nil {
			return nil, err
		}
		lines = append(lines, encoded...)
		times = times.join(spanOf(i))
	}
	return s.batchOf(name, lines, times)
}

// PruneBatch prunes a batch as it was when a list brought it.
func (s *Store) PruneBatch(ctx context.Context, o *corev1.ConfigMap, before time.Time) (int, error) {
	return s.pruneBatch(ctx, o, before)
}

// Knows reports whether this replica knows where to look for a serial number.
func (s *Store) Knows(serial string) bool { return s.index.find(serial) != "" }

// Suspect makes the index say that a known batch may have a serial number.
func (s *Store) Suspect(serial, name string) {
	s.index.mu.Lock()
	defer s.index.mu.Unlock()
	s.index.serials[maphash.String(s.index.seed, serial)] = s.index.batches[name]
}

// Known returns of how many batches and serial numbers the index knows.
func (s *Store) Known() (batches, serials int) {
	s.index.mu.Lock()
	defer s.index.mu.Unlock()
	return len(s.index.batches), len(s.index.serials)
}

// Forget makes the index forget all.
func (s *Store) Forget() {
	s.index.mu.Lock()
	defer s.index.mu.Unlock()
	clear(s.index.batches)
	clear(s.index.serials)
}

// FollowFrom follows the ledger from a resource version on, until ctx ends, by
// watches of a second.
func (s *Store) FollowFrom(ctx context.Context, version string) {
	s.followLedger(ctx, version, time.Second)
}
