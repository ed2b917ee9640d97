package workload

import (
	"maps"
	"slices"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/internal/latest"
)

// Delivered says what the open streams have been sent. A stream that still waits
// for something to be sent is not counted: it will begin with the newest. It counts
// with its first message from just before that is sent.
//
// "Sent" means handed to the connection. The Workload API has no acknowledgement,
// so that a client which does not read what it is sent is not noticed.
type Delivered struct {
	// Streams is the number of open streams that have been sent something, or are
	// being sent the first message.
	Streams int
	// Revisions has, by trust domain, the lowest bundle revision among the newest
	// that each open stream has been sent. A trust domain that some stream has not
	// been sent is not in it. It is never changed.
	Revisions map[spiffeid.TrustDomain]uint64
}

func (s State) revisions() map[spiffeid.TrustDomain]uint64 {
	revisions := make(map[spiffeid.TrustDomain]uint64, len(s.Bundles))
	for _, bundle := range s.Bundles {
		revisions[bundle.TrustDomain()] = bundle.Revision
	}
	return revisions
}

// deliveries keeps Delivered. It counts the streams by revision, of which there are
// hardly ever more than two or three, so that a new bundle for a thousand streams
// does not mean a million comparisons.
type deliveries struct {
	newest *latest.Value[Delivered]

	mu      sync.Mutex
	streams int                                     // guarded by mu
	at      map[spiffeid.TrustDomain]map[uint64]int // guarded by mu: how many streams are at a revision
}

func newDeliveries() *deliveries {
	return &deliveries{
		newest: latest.New(Delivered{}),
		at:     make(map[spiffeid.TrustDomain]map[uint64]int),
	}
}

// replace records that a stream which had been sent the revisions of before has
// now been sent those of after. Nil means a stream that is not open.
func (d *deliveries) replace(before, after map[spiffeid.TrustDomain]uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if before != nil {
		d.streams--
	}
	if after != nil {
		d.streams++
	}
	for td, revision := range after {
		if d.at[td] == nil {
			d.at[td] = make(map[uint64]int)
		}
		d.at[td][revision]++
	}
	for td, revision := range before {
		d.at[td][revision]--
		if d.at[td][revision] == 0 {
			delete(d.at[td], revision)
		}
		if len(d.at[td]) == 0 {
			delete(d.at, td)
		}
	}

	now := Delivered{Streams: d.streams, Revisions: make(map[spiffeid.TrustDomain]uint64, len(d.at))}
	for td, counts := range d.at {
		streams := 0
		for _, count := range counts {
			streams += count
		}
		if streams == d.streams {
			now.Revisions[td] = slices.Min(slices.Collect(maps.Keys(counts)))
		}
	}
	if last, _ := d.newest.Load(); last.Streams != now.Streams || !maps.Equal(last.Revisions, now.Revisions) {
		d.newest.Set(now)
	}
}
