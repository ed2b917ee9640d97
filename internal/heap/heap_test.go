package heap_test

import (
	"context"
	"runtime"
	"runtime/metrics"
	"testing"
	"time"

	"troth.dev/troth/internal/heap"
)

// With room, garbage of 32 MB is not collected. Without, a heap of a few MB is,
// several times.
func TestKeepRoom(t *testing.T) {
	runtime.GC()
	if n := collections(32 << 20); n < 2 {
		t.Fatalf("32 MB of garbage were collected %d times without KeepRoom: this test shows nothing", n)
	}

	runtime.GC() // what is alive decides how much room there is
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		heap.KeepRoom(ctx)
	}()
	for deadline := time.Now().Add(10 * time.Second); percent() == 100; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatal("GOGC is still 100 after 10 s")
		}
	}
	if n := collections(32 << 20); n > 1 {
		t.Errorf("32 MB of garbage were collected %d times", n)
	}

	stop()
	<-ended
	if got := percent(); got != 100 {
		t.Errorf("GOGC is %d after KeepRoom, want what it was before, 100", got)
	}
}

func TestKeepRoomLeavesGOGC(t *testing.T) {
	t.Setenv("GOGC", "100")
	heap.KeepRoom(t.Context()) // returns at once
	if got := percent(); got != 100 {
		t.Errorf("GOGC is %d, want what somebody has set, 100", got)
	}
}

var garbage []byte

// collections returns how often the collector runs while so many bytes are
// allocated and dropped.
func collections(bytes int) uint32 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	const chunk = 64 << 10
	for range bytes / chunk {
		garbage = make([]byte, chunk)
	}
	runtime.ReadMemStats(&after)
	return after.NumGC - before.NumGC
}

func percent() uint64 {
	sample := []metrics.Sample{{Name: "/gc/gogc:percent"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}
