package place_test

import (
	"slices"
	"sync"
	"testing"

	"troth.dev/troth/internal/place"
)

// Any stretch is even by itself: no two places are close, none is far from the
// next, and at any scale there are few too many or too few in a part of the window.
func TestStretchesAreEven(t *testing.T) {
	const whole = 1 << 32
	for _, count := range []int{1, 2, 3, 10, 100, 999, 10_000, 60_000} {
		s := place.New() // begins elsewhere each time
		for range 5 {
			var places []uint64
			for range count {
				places = append(places, uint64(s.Next()))
			}
			slices.Sort(places)
			places = append(places, places[0]+whole)
			mean := float64(whole) / float64(count)
			for n := range count {
				gap := float64(places[n+1]-places[n]) / mean
				if gap < 0.38 && count > 1 || gap > 1.9 {
					t.Fatalf("of %d places two neighbours are %.2f of the mean gap apart, want 0.38 to 1.9", count, gap)
				}
			}
		}
	}
}

// What many ask for at once has no place twice.
func TestNextIsForOneAlone(t *testing.T) {
	const callers, each = 8, 1000
	s := place.New()
	var taken [callers][]uint32
	var group sync.WaitGroup
	for n := range callers {
		group.Go(func() {
			for range each {
				taken[n] = append(taken[n], s.Next())
			}
		})
	}
	group.Wait()
	all := slices.Concat(taken[:]...)
	slices.Sort(all)
	if distinct := len(slices.Compact(all)); distinct != callers*each {
		t.Errorf("%d of %d places are distinct", distinct, callers*each)
	}
}

// Sequences of two replicas are not the same.
func TestSequencesDiffer(t *testing.T) {
	first := place.New().Next()
	for range 10 {
		if place.New().Next() != first {
			return
		}
	}
	t.Error("ten sequences began at the same place")
}
