package token_test

import (
	"context"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	jose "github.com/go-jose/go-jose/v4"

	"troth.dev/troth/token"
)

func verify(t *testing.T, v *token.Verifier, raw, when string, want token.Reason) {
	t.Helper()
	if _, err := v.Verify(t.Context(), raw); reasonOf(t, err) != want {
		t.Errorf("Verify %s = %v, want reason %q", when, err, want)
	}
}

func TestFirstVerifiesShareOneFetch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var i issuer
		key := newECKey(t, elliptic.P256(), "p256")
		document := mustJWKS(t, key)
		i.answerWith(func(context.Context) ([]byte, error) {
			time.Sleep(time.Second)
			return document, nil
		})
		v := i.verifier(t)
		var verifies sync.WaitGroup
		for range 100 {
			raw := sign(t, jose.ES256, key, goodClaims().json(t))
			verifies.Go(func() { verify(t, v, raw, "at once", "") })
		}
		verifies.Wait()
		if got := i.fetched(); got != 1 {
			t.Errorf("100 first Verifies fetched the keys %d times, want once", got)
		}
	})
}

func TestNewKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var i issuer
		before, after := newECKey(t, elliptic.P256(), "before"), newECKey(t, elliptic.P256(), "after")
		i.publish(before)
		v := i.verifier(t)
		verify(t, v, sign(t, jose.ES256, before, goodClaims().json(t)), "by the first key", "")

		time.Sleep(10 * time.Second)
		i.publish(before, after)
		raw := sign(t, jose.ES256, after, goodClaims().json(t))
		_, err := v.Verify(t.Context(), raw)
		if got, want := retryAfter(t, err), 20*time.Second; reasonOf(t, err) != token.UnknownKey || got != want {
			t.Fatalf("Verify by a key newer than the fetch 10 s ago = %v, to be tried after %v; want %q after %v", err, got, token.UnknownKey, want)
		}
		time.Sleep(20 * time.Second)
		verify(t, v, raw, "by the new key, when it was to be tried again", "")
		verify(t, v, sign(t, jose.ES256, before, goodClaims().json(t)), "by the old key still published", "")
		if got := i.fetched(); got != 2 {
			t.Errorf("fetched the keys %d times, want twice", got)
		}

		// The issuer was asked for this very key: waiting is of no use.
		time.Sleep(30 * time.Second)
		_, err = v.Verify(t.Context(), sign(t, jose.ES256, newECKey(t, elliptic.P256(), "never"), goodClaims().json(t)))
		if reasonOf(t, err) != token.UnknownKey || retryAfter(t, err) != 0 {
			t.Errorf("Verify by a key that was asked for in vain = %v, to be tried after %v; want %q, never", err, retryAfter(t, err), token.UnknownKey)
		}
	})
}

func TestWithdrawnKey(t *testing.T) {
	tests := []struct {
		name    string
		publish func(t *testing.T, old jose.JSONWebKey) []jose.JSONWebKey
		want    token.Reason
	}{
		{"replaced by another", func(t *testing.T, _ jose.JSONWebKey) []jose.JSONWebKey {
			return []jose.JSONWebKey{newECKey(t, elliptic.P256(), "new")}
		}, token.UnknownKey},
		{"replaced by another of the same ID", func(t *testing.T, old jose.JSONWebKey) []jose.JSONWebKey {
			return []jose.JSONWebKey{newECKey(t, elliptic.P256(), old.KeyID)}
		}, token.BadSignature},
		{"replaced by another algorithm", func(t *testing.T, old jose.JSONWebKey) []jose.JSONWebKey {
			return []jose.JSONWebKey{newECKey(t, elliptic.P384(), old.KeyID)}
		}, token.WrongAlgorithm},
		{"all keys withdrawn", func(*testing.T, jose.JSONWebKey) []jose.JSONWebKey {
			return []jose.JSONWebKey{}
		}, token.UnknownKey},
		{"kept", func(t *testing.T, old jose.JSONWebKey) []jose.JSONWebKey {
			return []jose.JSONWebKey{newECKey(t, elliptic.P256(), "new"), old}
		}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var i issuer
				old := newECKey(t, elliptic.P256(), "old")
				i.publish(old)
				v := i.verifier(t)
				remembered := sign(t, jose.ES256, old, goodClaims().json(t))
				verify(t, v, remembered, "before", "")

				document := mustJWKS(t, tt.publish(t, old)...)
				i.answerWith(func(context.Context) ([]byte, error) {
					time.Sleep(time.Second)
					return document, nil
				})
				time.Sleep(5*time.Minute - time.Second)
				verify(t, v, remembered, "while the keys are fresh", "")
				time.Sleep(time.Second)
				start := time.Now()
				verify(t, v, remembered, "as it begins the next fetch", "")
				if waited := time.Since(start); waited != 0 {
					t.Errorf("Verify with stale keys waited %v for the fetch", waited)
				}
				time.Sleep(time.Second)
				synctest.Wait()
				verify(t, v, remembered, "after the next fetch, remembered", tt.want)
				verify(t, v, sign(t, jose.ES256, old, goodClaims().json(t)), "after the next fetch, another token", tt.want)
				if got := i.fetched(); got != 2 {
					t.Errorf("fetched the keys %d times, want twice", got)
				}
			})
		})
	}
}

// After an idle time nobody is let in by what was true before it.
func TestWithdrawnKeyAfterAnIdleTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var i issuer
		old, next := newECKey(t, elliptic.P256(), "old"), newECKey(t, elliptic.P256(), "new")
		i.publish(old)
		v := i.verifier(t)
		remembered := sign(t, jose.ES256, old, goodClaims().json(t))
		verify(t, v, remembered, "before", "")

		document := mustJWKS(t, next)
		i.answerWith(func(context.Context) ([]byte, error) {
			time.Sleep(time.Second)
			return document, nil
		})
		time.Sleep(10 * time.Minute)
		var verifies sync.WaitGroup
		for range 10 {
			verifies.Go(func() { verify(t, v, remembered, "by a key withdrawn meanwhile", token.UnknownKey) })
		}
		verifies.Wait()
		if got := i.fetched(); got != 2 {
			t.Errorf("fetched the keys %d times, want twice", got)
		}
	})
}

func TestNeverFetched(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var i issuer
		down := errors.New("the API server is down")
		i.answerWith(func(context.Context) ([]byte, error) { return nil, down })
		v := i.verifier(t)
		key := newECKey(t, elliptic.P256(), "p256")
		raw := sign(t, jose.ES256, key, goodClaims().json(t))
		for range 100 {
			_, err := v.Verify(t.Context(), raw)
			if reasonOf(t, err) != token.KeysUnavailable || !errors.Is(err, down) || retryAfter(t, err) != time.Second {
				t.Fatalf("Verify = %v, to be tried after %v; want %q and the cause, after 1 s", err, retryAfter(t, err), token.KeysUnavailable)
			}
		}
		if got := i.fetched(); got != 1 {
			t.Errorf("100 Verifies within a moment fetched the keys %d times, want once", got)
		}
		i.publish(key)
		time.Sleep(time.Second)
		verify(t, v, raw, "when it was to be tried again", "")
	})
}

// The last good keys serve for as long as no better ones come.
func TestLastGoodKeysServe(t *testing.T) {
	tests := map[string]func(ctx context.Context) ([]byte, error){
		"failing": func(context.Context) ([]byte, error) { return nil, errors.New("the API server is down") },
		"garbage": func(context.Context) ([]byte, error) { return []byte("<html>"), nil },
		"hanging": func(ctx context.Context) ([]byte, error) { <-ctx.Done(); return nil, ctx.Err() },
	}
	for name, answer := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var i issuer
				key := newECKey(t, elliptic.P256(), "p256")
				i.publish(key)
				v := i.verifier(t)
				remembered := sign(t, jose.ES256, key, goodClaims().json(t))
				verify(t, v, remembered, "before", "")
				i.answerWith(answer)
				for range 55 {
					time.Sleep(time.Minute)
					start := time.Now()
					verify(t, v, remembered, "remembered", "")
					verify(t, v, sign(t, jose.ES256, key, goodClaims().json(t)), "new", "")
					if waited := time.Since(start); waited != 0 {
						t.Fatalf("Verify with good keys waited %v", waited)
					}
				}
				synctest.Wait()
				if got := i.fetched(); got != 1+51 {
					t.Errorf("fetched the keys %d times in 55 min, want once before and once a minute after the fifth", got)
				}
				// Nobody can say whether there is such a key.
				verify(t, v, sign(t, jose.ES256, newECKey(t, elliptic.P256(), "new"), goodClaims().json(t)), "by a new key", token.KeysUnavailable)
			})
		})
	}
}

func TestBadJWKS(t *testing.T) {
	key := newECKey(t, elliptic.P256(), "p256")
	good := string(mustJWKS(t, key))
	entry := strings.TrimSuffix(strings.TrimPrefix(good, `{"keys":[`), `]}`)
	tests := []struct {
		name, document string
		want           token.Reason
	}{
		{"good", good, ""},
		{"100 keys", `{"keys":[` + strings.Repeat(`{},`, 99) + entry + `]}`, ""},
		{"101 keys", `{"keys":[` + strings.Repeat(`{},`, 100) + entry + `]}`, token.KeysUnavailable},
		{"1 MiB", good + strings.Repeat(" ", 1<<20-len(good)), ""},
		{"1 MiB and a byte", good + strings.Repeat(" ", 1<<20-len(good)+1), token.KeysUnavailable},
		{"empty", "", token.KeysUnavailable},
		{"not JSON", "<html>", token.KeysUnavailable},
		{"another object", `{"kind":"Status","code":403}`, token.KeysUnavailable},
		{"keys null", `{"keys":null}`, token.KeysUnavailable},
		{"keys twice", `{"keys":[],` + good[1:], token.KeysUnavailable},
		{"good and more", good + `{}`, token.KeysUnavailable},
		{"no key", `{"keys":[]}`, token.UnknownKey},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var i issuer
				i.answerWith(func(context.Context) ([]byte, error) { return []byte(tt.document), nil })
				verify(t, i.verifier(t), sign(t, jose.ES256, key, goodClaims().json(t)), "with these keys", tt.want)
			})
		})
	}
}

// A key that is of no use here is as good as absent, and spoils no other.
func TestUnusableKeys(t *testing.T) {
	good := newECKey(t, elliptic.P256(), "good")
	weak := newRSAKey(t, 1024, "k")
	_, edPrivate, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p256, p384 := newECKey(t, elliptic.P256(), "k"), newECKey(t, elliptic.P384(), "k")
	publicEntry := func(key jose.JSONWebKey, change func(k *jose.JSONWebKey)) jose.JSONWebKey {
		key = key.Public()
		change(&key)
		return key
	}
	same := func(*jose.JSONWebKey) {}
	tests := []struct {
		name      string
		entries   []any
		algorithm jose.SignatureAlgorithm
		key       jose.JSONWebKey
		want      token.Reason
	}{
		{"usable", []any{publicEntry(p256, same)}, jose.ES256, p256, ""},
		{"the same twice", []any{publicEntry(p256, same), publicEntry(p256, same)}, jose.ES256, p256, ""},
		{"without use", []any{publicEntry(p256, func(k *jose.JSONWebKey) { k.Use = "" })}, jose.ES256, p256, ""},
		{"with its algorithm", []any{publicEntry(p256, func(k *jose.JSONWebKey) { k.Algorithm = "ES256" })}, jose.ES256, p256, ""},
		{"for encryption", []any{publicEntry(p256, func(k *jose.JSONWebKey) { k.Use = "enc" })}, jose.ES256, p256, token.UnknownKey},
		{"for another algorithm", []any{publicEntry(p256, func(k *jose.JSONWebKey) { k.Algorithm = "ES384" })}, jose.ES256, p256, token.UnknownKey},
		{"without ID", []any{publicEntry(p256, func(k *jose.JSONWebKey) { k.KeyID = "" })}, jose.ES256, p256, token.UnknownKey},
		{"private", []any{p256}, jose.ES256, p256, token.UnknownKey},
		{"two keys of one ID", []any{publicEntry(p256, same), publicEntry(p384, same)}, jose.ES256, p256, token.UnknownKey},
		{"two keys of one ID, thrice", []any{publicEntry(p256, same), publicEntry(p384, same), publicEntry(p256, same)}, jose.ES256, p256, token.UnknownKey},
		{"RSA of 1024 bits", []any{publicEntry(weak, same)}, jose.RS256, weak, token.UnknownKey},
		{"symmetric", []any{jose.JSONWebKey{Key: []byte(strings.Repeat("s", 32)), KeyID: "k"}}, jose.HS256, jose.JSONWebKey{Key: []byte(strings.Repeat("s", 32)), KeyID: "k"}, token.WrongAlgorithm},
		{"symmetric, the token ES256", []any{jose.JSONWebKey{Key: []byte(strings.Repeat("s", 32)), KeyID: "k"}}, jose.ES256, p256, token.UnknownKey},
		{"Ed25519", []any{jose.JSONWebKey{Key: edPrivate.Public(), KeyID: "k"}}, jose.EdDSA, jose.JSONWebKey{Key: edPrivate, KeyID: "k"}, token.WrongAlgorithm},
		{"off its curve", []any{json.RawMessage(`{"kty":"EC","crv":"P-256","kid":"k","x":"` + strings.Repeat("A", 43) + `","y":"` + strings.Repeat("A", 43) + `"}`)}, jose.ES256, p256, token.UnknownKey},
		{"of no known type", []any{json.RawMessage(`{"kty":"PQ","kid":"k"}`), "k", 7, nil}, jose.ES256, p256, token.UnknownKey},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				document, err := json.Marshal(map[string]any{"keys": append(tt.entries, good.Public())})
				if err != nil {
					t.Fatal(err)
				}
				var i issuer
				i.answerWith(func(context.Context) ([]byte, error) { return document, nil })
				v := i.verifier(t)
				verify(t, v, sign(t, jose.ES256, good, goodClaims().json(t)), "by the good key beside it", "")
				verify(t, v, sign(t, tt.algorithm, tt.key, goodClaims().json(t)), "by the key", tt.want)
			})
		})
	}
}

func TestSlowKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var i issuer
		key := newECKey(t, elliptic.P256(), "p256")
		document := mustJWKS(t, key)
		i.answerWith(func(ctx context.Context) ([]byte, error) {
			select {
			case <-time.After(5 * time.Second):
				return document, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		})
		v := i.verifier(t)
		raw := sign(t, jose.ES256, key, goodClaims().json(t))

		// The one who came first and hung up does not take the fetch along.
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := v.Verify(ctx, raw)
		if reasonOf(t, err) != token.KeysUnavailable || !errors.Is(err, context.DeadlineExceeded) || retryAfter(t, err) == 0 {
			t.Errorf("Verify for a second = %v, want %q, to be tried again, and the end of its time", err, token.KeysUnavailable)
		}
		if waited := time.Since(start); waited != time.Second {
			t.Errorf("Verify for a second waited %v", waited)
		}
		verify(t, v, raw, "by one who waits", "")
		if waited := time.Since(start); waited != 5*time.Second {
			t.Errorf("Verify waited %v, want until the fetch ended after 5s", waited)
		}
		if got := i.fetched(); got != 1 {
			t.Errorf("fetched the keys %d times, want once", got)
		}
	})
}

// A fetch that hangs is given up.
func TestHangingKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var i issuer
		i.answerWith(func(ctx context.Context) ([]byte, error) { <-ctx.Done(); return nil, ctx.Err() })
		v := i.verifier(t)
		key := newECKey(t, elliptic.P256(), "p256")
		start := time.Now()
		verify(t, v, sign(t, jose.ES256, key, goodClaims().json(t)), "while the API server hangs", token.KeysUnavailable)
		if waited := time.Since(start); waited != 10*time.Second {
			t.Errorf("Verify waited %v, want 10s", waited)
		}
	})
}

// Made-up key IDs cost the issuer a fetch in 30 s at most, and do not keep a new
// key from being found within these 30 s.
func TestFloodOfUnknownKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var i issuer
		old, next := newECKey(t, elliptic.P256(), "old"), newECKey(t, elliptic.P256(), "new")
		attacker := newECKey(t, elliptic.P256(), "")
		i.publish(old)
		v := i.verifier(t)
		good := sign(t, jose.ES256, old, goodClaims().json(t))
		rotated := sign(t, jose.ES256, next, goodClaims().json(t))
		verify(t, v, good, "before", "")

		const second = 10 // tokens
		accepted := 0
		for n := range 600 * second {
			if n == 301*second {
				i.publish(old, next)
			}
			attacker.KeyID = fmt.Sprint("made-up-", n)
			ctx, cancel := context.WithCancel(t.Context())
			if n%2 == 0 {
				cancel() // hangs up at once
			}
			if _, err := v.Verify(ctx, sign(t, jose.ES256, attacker, "{}")); err == nil {
				t.Fatal("Verify by a made-up key = nil")
			}
			cancel()
			verify(t, v, good, "by the known key", "")
			if n >= 331*second {
				verify(t, v, rotated, "by a key published 30 s ago", "")
				accepted++
			}
			time.Sleep(time.Second / second)
		}
		if accepted == 0 {
			t.Error("the new key was never tried")
		}
		synctest.Wait()
		if got := i.fetched(); got < 2 || got > 1+600/30 {
			t.Errorf("fetched the keys %d times in 10 min, want at most once before and once in 30 s", got)
		}
	})
}

func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var i issuer
		key := newECKey(t, elliptic.P256(), "p256")
		i.answerWith(func(ctx context.Context) ([]byte, error) { <-ctx.Done(); return nil, ctx.Err() })
		v := i.verifier(t)
		raw := sign(t, jose.ES256, key, goodClaims().json(t))
		start := time.Now()
		var verifies sync.WaitGroup
		verifies.Go(func() { verify(t, v, raw, "while it is closed", token.KeysUnavailable) })
		synctest.Wait()
		v.Close()
		v.Close()
		verifies.Wait()
		if waited := time.Since(start); waited != 0 {
			t.Errorf("Close waited %v, want that it ends the fetch", waited)
		}
		i.publish(key)
		time.Sleep(time.Hour)
		verify(t, v, raw, "closed and without keys", token.KeysUnavailable)
		if got := i.fetched(); got != 1 {
			t.Errorf("fetched the keys %d times, want none after Close", got)
		}

		// It waits for a fetch that takes its time to end.
		i.answerWith(func(ctx context.Context) ([]byte, error) {
			<-ctx.Done()
			time.Sleep(time.Second)
			return nil, ctx.Err()
		})
		slow := i.verifier(t)
		verifies.Go(func() { verify(t, slow, raw, "while it is closed", token.KeysUnavailable) })
		synctest.Wait()
		start = time.Now()
		slow.Close()
		if waited := time.Since(start); waited != time.Second {
			t.Errorf("Close waited %v for a fetch that ends in 1s", waited)
		}
		verifies.Wait()

		i.publish(key)
		unused := i.verifier(t)
		unused.Close()
		verify(t, unused, raw, "closed before the first token", token.KeysUnavailable)

		drained := i.verifier(t)
		verify(t, drained, sign(t, jose.ES256, key, goodClaims().json(t)), "before", "")
		drained.Close()
		time.Sleep(time.Hour)
		verify(t, drained, sign(t, jose.ES256, key, goodClaims().json(t)), "closed, with keys", "")
	})
}

func mustJWKS(t *testing.T, keys ...jose.JSONWebKey) []byte {
	t.Helper()
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
	for _, key := range keys {
		set.Keys = append(set.Keys, key.Public())
	}
	document, err := json.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	return document
}
