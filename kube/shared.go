package kube

import (
	"context"
	"sync"
)

// shared lets all who want the same thing at the same time share one call. The
// zero value is ready to use.
//
// It is not x/sync/singleflight because of who owns the call: here, all who wait
// for it. One who gives up leaves it to the others; the last one ends it and
// waits for its end, so that no goroutine is left behind.
type shared[K comparable, V any] struct {
	mu    sync.Mutex
	calls map[K]*call[V] // guarded by mu; those that have not ended
}

type call[V any] struct {
	waiting int // guarded by shared.mu
	cancel  context.CancelFunc
	done    chan struct{} // closed when value and err are final
	value   V
	err     error
}

// do returns what f returns, called by this or another do with the same key, or
// ctx's error. f's context ends after requestTimeout, or when nobody waits any
// more; it has the values of the ctx that came first.
func (s *shared[K, V]) do(ctx context.Context, key K, f func(context.Context) (V, error)) (V, error) {
	s.mu.Lock()
	c := s.calls[key]
	if c == nil {
		c = s.begin(ctx, key, f)
	}
	c.waiting++
	s.mu.Unlock()

	select {
	case <-c.done:
	case <-ctx.Done():
		s.leave(key, c)
		var none V
		return none, ctx.Err()
	}
	return c.value, c.err
}

// begin starts a call. s.mu is held.
func (s *shared[K, V]) begin(ctx context.Context, key K, f func(context.Context) (V, error)) *call[V] {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTimeout)
	c := &call[V]{cancel: cancel, done: make(chan struct{})}
	if s.calls == nil {
		s.calls = make(map[K]*call[V])
	}
	s.calls[key] = c
	go func() {
		defer close(c.done)
		defer cancel()
		c.value, c.err = f(ctx)
		s.mu.Lock()
		s.drop(key, c)
		s.mu.Unlock()
	}()
	return c
}

// leave gives up a call.
func (s *shared[K, V]) leave(key K, c *call[V]) {
	s.mu.Lock()
	c.waiting--
	last := c.waiting == 0
	if last {
		// Whoever comes from now on must not share a call that is being ended.
		s.drop(key, c)
	}
	s.mu.Unlock()
	if last {
		c.cancel()
		<-c.done
	}
}

// drop makes the next do with that key begin a call of its own. s.mu is held.
func (s *shared[K, V]) drop(key K, c *call[V]) {
	if s.calls[key] == c {
		delete(s.calls, key)
	}
}
