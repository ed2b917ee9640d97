// Package place hands out the places at which SVIDs are replaced: each is a point
// of a window, and those of any stretch of issuance are spread evenly over it.
//
// Start with [New]. Places that were drawn by lot would not do: of 10,000 in the
// 1,800 seconds of a window, chance puts three times as many as the mean into one
// second. These are the multiples of the golden ratio, modulo 1. However many of
// them follow one another, and wherever one begins, the gaps between them have at
// most three lengths, and no two neighbours are closer than 0.38 of the mean gap.
// That nothing but the next number decides is what makes it work where SVIDs come
// and go: those which are alive at one moment are the last few stretches issued.
package place

import (
	"crypto/rand"
	"encoding/binary"
	"sync/atomic"
)

// golden is the golden ratio's fractional part in units of 2⁻³². It is odd, so all
// places come before any comes again.
const golden = 0x9e3779b9

// Sequence is a sequence of places. It is safe for concurrent use.
type Sequence struct {
	last atomic.Uint32
}

// New returns a sequence that begins anywhere. That of another replica, or of the
// same one before it was restarted, has another beginning and need not be known.
func New() *Sequence {
	var start [4]byte
	rand.Read(start[:])
	s := &Sequence{}
	s.last.Store(binary.NativeEndian.Uint32(start[:]))
	return s
}

// Next returns the next place, in units of 2⁻³² of a window.
func (s *Sequence) Next() uint32 { return s.last.Add(golden) }
