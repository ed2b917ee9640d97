// Package latest holds a value that others wait on. Whoever waits is told that
// there is something newer, never how often it changed in between: a slow
// reader skips what it missed, and a writer never waits for a reader.
package latest

import "sync"

// Value is a value and the news that it was replaced. The zero Value holds the
// zero T and is ready to use. A Value must not be copied after its first use.
type Value[T any] struct {
	mu      sync.Mutex
	value   T             // guarded by mu
	changed chan struct{} // guarded by mu; closed and renewed by Set
}

// New returns a Value that holds v.
func New[T any](v T) *Value[T] {
	return &Value[T]{value: v}
}

// Set replaces the value and wakes all who wait for a newer one.
func (v *Value[T]) Set(value T) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.value = value
	if v.changed != nil {
		close(v.changed)
		v.changed = nil
	}
}

// Load returns the newest value, and a channel that is closed as soon as there
// is a newer one.
func (v *Value[T]) Load() (value T, changed <-chan struct{}) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.changed == nil {
		v.changed = make(chan struct{})
	}
	return v.value, v.changed
}
