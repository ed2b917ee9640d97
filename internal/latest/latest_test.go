package latest_test

import (
	"sync"
	"testing"

	"troth.dev/troth/internal/latest"
)

func TestLoadReturnsTheNewestOnly(t *testing.T) {
	v := latest.New(1)
	got, changed := v.Load()
	if got != 1 {
		t.Fatalf("Load() = %d, want 1", got)
	}
	select {
	case <-changed:
		t.Fatal("changed is closed before any Set")
	default:
	}

	v.Set(2)
	v.Set(3)
	<-changed
	got, changed = v.Load()
	if got != 3 {
		t.Fatalf("Load() after two Sets = %d, want the newest, 3", got)
	}
	select {
	case <-changed:
		t.Fatal("changed is closed although the newest value was loaded")
	default:
	}
}

func TestZeroValue(t *testing.T) {
	var v latest.Value[string]
	got, changed := v.Load()
	if got != "" {
		t.Fatalf("Load() = %q, want the zero value", got)
	}
	v.Set("set")
	<-changed
}

// Every reader sees the last value, however the Sets and Loads interleave: the
// property that a lost wake-up would break.
func TestNoWakeUpIsLost(t *testing.T) {
	const last = 1000
	v := latest.New(0)
	var readers sync.WaitGroup
	for range 8 {
		readers.Go(func() {
			seen := -1
			for {
				got, changed := v.Load()
				if got < seen {
					t.Errorf("Load() went back from %d to %d", seen, got)
					return
				}
				seen = got
				if got == last {
					return
				}
				<-changed
			}
		})
	}
	for i := 1; i <= last; i++ {
		v.Set(i)
	}
	readers.Wait()
}
