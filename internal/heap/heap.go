// Package heap lets a small heap grow to a useful size before it is collected.
//
// Go collects garbage when the heap has doubled. A server that keeps little and
// allocates much, as one that issues certificates, then collects every few
// megabytes: a twelfth of its CPU time. [KeepRoom] spends a fixed amount of memory
// on that instead, and gives it back as soon as what is alive needs it.
package heap

import (
	"context"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// room is the size in bytes below which nothing is collected.
const room = 64 << 20

// KeepRoom has the garbage collector wait until the heap has 64 MiB, or has
// doubled, whichever is more. It returns when ctx ends, and leaves the collector as
// it found it. Where somebody set GOGC it does nothing: they know better. A limit
// by GOMEMLIMIT holds as always.
func KeepRoom(ctx context.Context) {
	if os.Getenv("GOGC") != "" {
		return
	}
	set := percent(scanned())
	found := debug.SetGCPercent(set)
	defer debug.SetGCPercent(found)
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
		// To set it stops the world for some microseconds.
		if want := percent(scanned()); want < set*9/10 || want > set*11/10 {
			debug.SetGCPercent(want)
			set = want
		}
	}
}

// percent is the GOGC at which a heap of which the collector scans that many bytes
// is collected when it has room, and what Go does by itself if it would have as
// much anyway.
func percent(scanned uint64) int {
	const (
		usual = 100
		// Before the first collection, and below, Go takes this for the size that
		// the percentage is one of.
		smallest = 4 << 20
	)
	scanned = max(scanned, smallest)
	if 2*scanned >= room {
		return usual
	}
	return int((room - scanned) * 100 / scanned)
}

// scanned returns what the percentage is one of: the bytes that the last
// collection found alive, and those of stacks and globals, which it scans too.
func scanned() uint64 {
	samples := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/gc/scan/stack:bytes"}, {Name: "/gc/scan/globals:bytes"}}
	metrics.Read(samples)
	var sum uint64
	for _, s := range samples {
		if s.Value.Kind() == metrics.KindUint64 {
			sum += s.Value.Uint64()
		}
	}
	return sum
}
