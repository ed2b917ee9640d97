// Package token verifies the bearer tokens that callers of the control plane
// present: Kubernetes service-account tokens that are bound to a pod.
//
// Start with [New], [Verifier.Verify] and [Claims.Matches]. Verify says what
// the issuer signed, Matches whether it is still true. Both are needed: a
// signature outlives the pod, the service account and the node that it speaks
// of. For tokens of other issuers there is the half that is about signatures:
// [Parse] and [Keys].
//
// A token is accepted if it is small, signed with one of four algorithms by a
// key that its issuer publishes, made for this audience and no other, in force,
// short-lived and bound to a pod. Everything else is refused with an [Error]
// that has a [Reason]. Keys come from the issuer's JWKS alone: whatever key, or
// address of a key, a token carries in itself is ignored. Refusals are never
// remembered; what is remembered of an accepted token ends with its time and
// with its key: a key that the issuer withdraws is accepted for 5 minutes while
// tokens keep coming, for 10 at most, and longer only while the issuer cannot be
// asked.
package token

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
)

// Config is what a [Verifier] needs to know.
type Config struct {
	// Issuers are the accepted values of "iss", compared exactly. At least one.
	Issuers []string

	// Audience is the one audience that tokens have to be made for, compared
	// exactly. It must not be an issuer's name: that is the API server's own
	// audience unless it was given another, and the tokens that are mounted into
	// every pod carry it for a year.
	Audience string

	// Keys fetches the issuers' JWKS document (RFC 7517 §5), of at most 1 MiB,
	// and must return when ctx ends. It is called when the first token comes, and
	// then while tokens come: every 5 minutes, and for an unknown key at most
	// every 30 seconds. It is never called twice at a time. ctx ends 10 seconds
	// after the call at the latest.
	Keys func(ctx context.Context) ([]byte, error)

	// MaxLifetime is the longest accepted life of a token, "exp" less "iat": at
	// most 24 h, and 2 h if it is 0. The kubelet asks for 1 h unless the pod's
	// projected volume says otherwise; automounted tokens live a year.
	MaxLifetime time.Duration

	// Leeway is by how much the issuer's clock may differ: at most 1 min, and
	// 30 s if it is 0.
	Leeway time.Duration

	// CacheSize is how many verified tokens are remembered, 16,384 if it is 0.
	CacheSize int
}

// Verifier verifies tokens. It may be used from many goroutines.
type Verifier struct {
	// Immutable after New.
	issuers     []string
	audience    string
	maxLifetime time.Duration
	leeway      time.Duration

	keys     *keyring
	verified *lru.Cache[[sha256.Size]byte, verifiedToken] // by the token's hash
}

// verifiedToken is what a token said, and the key that proved it.
type verifiedToken struct {
	claims Claims
	keyID  string
	key    publicKey
}

// New checks the configuration. It fetches nothing. The caller closes the
// Verifier.
func New(c Config) (*Verifier, error) {
	if c.MaxLifetime == 0 {
		c.MaxLifetime = 2 * time.Hour
	}
	if c.Leeway == 0 {
		c.Leeway = 30 * time.Second
	}
	if c.CacheSize == 0 {
		c.CacheSize = 16384
	}
	switch {
	case len(c.Issuers) == 0 || slices.Contains(c.Issuers, ""):
		return nil, errors.New("token: no issuer, or an empty one")
	case c.Audience == "":
		return nil, errors.New("token: no audience")
	case slices.Contains(c.Issuers, c.Audience):
		return nil, fmt.Errorf("token: audience %q is the API server's own; choose one that only this service has", c.Audience)
	case c.Keys == nil:
		return nil, errors.New("token: no source of keys")
	case c.MaxLifetime < 0 || c.MaxLifetime > 24*time.Hour:
		return nil, fmt.Errorf("token: maximum lifetime %v is not within 24h", c.MaxLifetime)
	case c.Leeway < 0 || c.Leeway > time.Minute:
		return nil, fmt.Errorf("token: leeway %v is not within 1m", c.Leeway)
	}
	verified, err := lru.New[[sha256.Size]byte, verifiedToken](c.CacheSize)
	if err != nil {
		return nil, fmt.Errorf("token: cache of %d tokens: %w", c.CacheSize, err)
	}
	return &Verifier{
		issuers:     slices.Clone(c.Issuers),
		audience:    c.Audience,
		maxLifetime: c.MaxLifetime,
		leeway:      c.Leeway,
		keys:        &keyring{fetch: c.Keys},
		verified:    verified,
	}, nil
}

// Verify returns what the token says if all of it is proved and in force now,
// and an [*Error] if not. It does not know whether the pod still lives: ask
// [Claims.Matches] each time.
//
// Verify blocks, until ctx ends at the latest, only while keys are fetched that
// the token cannot be judged without: the first ever, the first after an idle
// time, and those for an unknown key.
func (v *Verifier) Verify(ctx context.Context, raw string) (Claims, error) {
	// 1. Size, before anything is spent on it.
	if len(raw) > maxToken {
		return Claims{}, refuse(TooLarge, "%d bytes, more than %d", len(raw), maxToken)
	}
	now := time.Now()

	// 2. A token verified before needs no second proof while the issuer still
	// publishes the very key that proved it. Its time goes on all the same.
	hash := sha256.Sum256([]byte(raw))
	if known, ok := v.verified.Get(hash); ok {
		key, err := v.keys.find(ctx, known.keyID, now)
		if err != nil {
			return Claims{}, err
		}
		if key.equal(known.key) {
			if err := v.inForce(known.claims, now); err != nil {
				return Claims{}, err
			}
			return known.claims, nil
		}
	}

	// 3. Form and header: nothing here is proved yet.
	signed, err := parseCompact(raw)
	if err != nil {
		return Claims{}, err
	}

	// 4. The signature.
	key, err := v.keys.prove(ctx, signed, now)
	if err != nil {
		return Claims{}, err
	}

	// 5. The claims, which are the issuer's words from here on.
	claims, err := v.check(signed.payload, now)
	if err != nil {
		return Claims{}, err
	}
	v.verified.Add(hash, verifiedToken{claims: claims, keyID: signed.keyID, key: key})
	return claims, nil
}

// Close ends the fetch of keys that is under way, if any, and waits for it. No
// other begins afterwards. A Verifier that holds keys goes on verifying with
// them, so that Close may come before the last Verify of a server that drains.
func (v *Verifier) Close() {
	v.keys.close()
}

// maxToken bounds a token, in bytes. A pod-bound token has about 1,200.
const maxToken = 8 << 10
