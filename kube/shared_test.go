package kube

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// These are inside the package because shared is: time has to be driven, which a
// connection to a real API server does not let a test do. A bubble does not end
// before every goroutine in it has.

func TestSharedBoundsTheCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s shared[string, int]
		begin := time.Now()
		_, err := s.do(t.Context(), "key", func(ctx context.Context) (int, error) {
			<-ctx.Done()
			return 0, ctx.Err()
		})
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) != requestTimeout {
			t.Errorf("a call that never ends: %v after %s, want a deadline after %s", err, time.Since(begin), requestTimeout)
		}
	})
}

func TestSharedOutlivesItsFirstCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s shared[string, int]
		var calls atomic.Int32
		f := func(ctx context.Context) (int, error) {
			calls.Add(1)
			select {
			case <-time.After(time.Second):
				return 7, nil
			case <-ctx.Done():
				return 0, ctx.Err()
			}
		}
		first, leave := context.WithCancel(t.Context())
		var callers sync.WaitGroup
		callers.Go(func() {
			if _, err := s.do(first, "key", f); !errors.Is(err, context.Canceled) {
				t.Errorf("the caller who left: %v, want its context's error", err)
			}
		})
		synctest.Wait()
		for range 10 {
			callers.Go(func() {
				if got, err := s.do(t.Context(), "key", f); got != 7 || err != nil {
					t.Errorf("a caller who stayed: %d, %v, want 7", got, err)
				}
			})
		}
		callers.Go(func() { s.do(t.Context(), "other", f) })
		synctest.Wait()
		leave()
		callers.Wait()
		if n := calls.Load(); n != 2 {
			t.Errorf("11 callers for one key and one for another made %d calls, want 2", n)
		}
		if len(s.calls) != 0 {
			t.Errorf("%d calls are kept after their end", len(s.calls))
		}
	})
}

// The last one to leave ends the call, waits for its end, and spoils it for
// nobody who comes after.
func TestSharedEndsWithItsLastCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s shared[string, int]
		ctx, leave := context.WithCancel(t.Context())
		var ended atomic.Bool
		left := make(chan struct{})
		go func() {
			defer close(left)
			s.do(ctx, "key", func(ctx context.Context) (int, error) {
				<-ctx.Done()
				time.Sleep(time.Second) // of the bubble: the call takes a while to end
				ended.Store(true)
				return 0, ctx.Err()
			})
			if !ended.Load() {
				t.Error("the last caller left before the call had ended")
			}
		}()
		synctest.Wait()
		leave()
		synctest.Wait()
		got, err := s.do(t.Context(), "key", func(context.Context) (int, error) { return 7, nil })
		if got != 7 || err != nil {
			t.Errorf("a caller who came after all had left: %d, %v, want a call of its own", got, err)
		}
		<-left
	})
}
