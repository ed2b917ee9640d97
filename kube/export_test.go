package kube

import (
	"time"

	"troth.dev/troth/identity"
)

// Waiting returns how many calls of Pod wait for a look-up of ref.
func (p *Pods) Waiting(ref identity.PodReference) int {
	s := &p.lookups.shared
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.calls[ref]; c != nil {
		return c.waiting
	}
	return 0
}

// Age makes all that was accepted older.
func (r *TokenReviewer) Age(by time.Duration) {
	for _, key := range r.accepted.Keys() {
		if known, ok := r.accepted.Peek(key); ok {
			known.until = known.until.Add(-by)
			r.accepted.Add(key, known)
		}
	}
}

var ReadReview = readReview
