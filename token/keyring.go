package token

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	jose "github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json"
)

// keyring holds the keys that the issuers publish and keeps them current while
// tokens come, one fetch at a time. The last good keys serve until better ones
// arrive.
type keyring struct {
	fetch func(ctx context.Context) ([]byte, error) // immutable

	held atomic.Pointer[keySet] // replaced whole; nil before the first good fetch

	mu     sync.Mutex
	latest *flight // guarded by mu; under way or over; nil before the first
	closed bool    // guarded by mu
}

// keySet is what one JWKS document said. It is never changed.
type keySet struct {
	byID      map[string]publicKey
	fetchedAt time.Time
}

// flight is one fetch.
type flight struct {
	began time.Time
	// awaited says that no token is judged before the fetch is over: no keys
	// were held when it began, or too old ones.
	awaited bool
	cancel  context.CancelFunc
	done    chan struct{} // closed when the fetch is over
	err     error         // to be read once done is closed
}

const (
	// refreshAfter is how old keys may be before the next token has newer ones
	// fetched. That token does not wait for them.
	refreshAfter = 5 * time.Minute

	// idleAfter is how long no fetch may have begun before tokens wait for the
	// next one. Without it, the first token after a quiet night could be signed
	// by a key that was withdrawn in the evening.
	idleAfter = 2 * refreshAfter

	// fetchPause lies between the beginnings of two fetches. It is the same for
	// all, so that tokens with made-up key IDs neither cause more fetches nor
	// delay by more than this the one that a new key is waiting for.
	fetchPause = 30 * time.Second

	// firstPause stands in for fetchPause while there are no keys at all.
	firstPause = time.Second

	fetchTimeout = 10 * time.Second

	maxDocument = 1 << 20 // bytes
	maxKeys     = 100
)

// find returns the key of that ID, now being the time of the call. It blocks
// only if a fetch has to decide.
func (r *keyring) find(ctx context.Context, id string, now time.Time) (publicKey, error) {
	key, fresh := r.held.Load().find(id, now)
	if key.key != nil && fresh {
		return key, nil
	}
	f := r.refresh(ctx, now)
	if key.key != nil && !f.awaited {
		return key, nil
	}
	select {
	case <-f.done:
	case <-ctx.Done():
		return publicKey{}, &Error{
			Reason:     KeysUnavailable,
			RetryAfter: time.Second,
			Err:        fmt.Errorf("waiting for the issuer's keys: %w", ctx.Err()),
		}
	}
	key, _ = r.held.Load().find(id, now)
	switch {
	case key.key != nil:
		return key, nil
	case f.err != nil:
		return publicKey{}, &Error{
			Reason:     KeysUnavailable,
			RetryAfter: r.untilNext(f),
			Err:        fmt.Errorf("fetch the issuer's keys: %w", f.err),
		}
	case f.began.Before(now):
		// The keys were fetched before this token came: its key may be newer.
		return publicKey{}, &Error{
			Reason:     UnknownKey,
			RetryAfter: r.untilNext(f),
			Err:        fmt.Errorf("the issuer had not published key %.80q when last asked", id),
		}
	default:
		return publicKey{}, refuse(UnknownKey, "the issuer does not publish key %.80q", id)
	}
}

// refresh returns the newest fetch: the one under way, one begun just now, or
// the last if that is too recent for another.
func (r *keyring) refresh(ctx context.Context, now time.Time) *flight {
	r.mu.Lock()
	defer r.mu.Unlock()
	last := r.latest
	if r.closed || last != nil && (!last.over() || now.Before(last.began.Add(r.pause()))) {
		return last
	}
	// A fetch serves all who wait for it, and outlives the one who came first:
	// a caller that hangs up must not spend the only fetch of half a minute.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), fetchTimeout)
	f := &flight{
		began:   time.Now(),
		awaited: r.held.Load() == nil || now.Sub(last.began) >= idleAfter,
		cancel:  cancel,
		done:    make(chan struct{}),
	}
	r.latest = f
	go r.fly(ctx, f)
	return f
}

// fly makes one fetch.
func (r *keyring) fly(ctx context.Context, f *flight) {
	defer close(f.done)
	defer f.cancel()
	document, err := r.fetch(ctx)
	if err != nil {
		f.err = err
		return
	}
	byID, err := parseJWKS(document)
	if err != nil {
		f.err = err
		return
	}
	r.held.Store(&keySet{byID: byID, fetchedAt: f.began})
}

// close ends the fetch under way and waits for it.
func (r *keyring) close() {
	r.mu.Lock()
	r.closed = true
	if r.latest == nil {
		r.latest = &flight{
			cancel: func() {},
			done:   make(chan struct{}),
			err:    errors.New("the verifier was closed"),
		}
		close(r.latest.done)
	}
	last := r.latest
	r.mu.Unlock()

	last.cancel()
	<-last.done
}

func (r *keyring) pause() time.Duration {
	if r.held.Load() == nil {
		return firstPause
	}
	return fetchPause
}

// untilNext returns how long it takes until another fetch than f may begin.
func (r *keyring) untilNext(f *flight) time.Duration {
	return max(time.Until(f.began.Add(r.pause())), firstPause)
}

func (f *flight) over() bool {
	select {
	case <-f.done:
		return true
	default:
		return false
	}
}

// find returns the zero publicKey if there is no key of that ID. A set that
// does not exist has none.
func (s *keySet) find(id string, now time.Time) (key publicKey, fresh bool) {
	if s == nil {
		return publicKey{}, false
	}
	return s.byID[id], now.Sub(s.fetchedAt) < refreshAfter
}

// parseJWKS reads a JWK Set. An entry that is of no use here is ignored (RFC
// 7517 §5), and so are all entries that share an ID but not the key: nobody
// could say which one a token means. A set without any key is a valid answer:
// it withdraws them all.
func parseJWKS(document []byte) (map[string]publicKey, error) {
	if len(document) > maxDocument {
		return nil, fmt.Errorf("a JWKS of %d bytes, more than %d", len(document), maxDocument)
	}
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(document, &set); err != nil {
		return nil, fmt.Errorf("parse the JWKS: %w", err)
	}
	if set.Keys == nil {
		return nil, errors.New("a JWKS without keys")
	}
	if len(set.Keys) > maxKeys {
		return nil, fmt.Errorf("a JWKS of %d keys, more than %d", len(set.Keys), maxKeys)
	}
	byID := make(map[string]publicKey)
	seen := make(map[string]publicKey)
	for _, entry := range set.Keys {
		var jwk jose.JSONWebKey
		if err := jwk.UnmarshalJSON(entry); err != nil || jwk.Use != "" && jwk.Use != "sig" {
			continue
		}
		key, ok := newPublicKey(jwk.Key)
		if !ok || jwk.Algorithm != "" && jwk.Algorithm != key.algorithm {
			continue
		}
		if first, ok := seen[jwk.KeyID]; ok {
			if !first.equal(key) {
				delete(byID, jwk.KeyID)
			}
			continue
		}
		seen[jwk.KeyID] = key
		byID[jwk.KeyID] = key
	}
	return byID, nil
}
