package token_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"maps"
	"sync"
	"testing"
	"time"

	jose "github.com/go-jose/go-jose/v4"

	"troth.dev/troth/identity"
	"troth.dev/troth/token"
)

const (
	issuerName = "https://kubernetes.default.svc.cluster.local"
	audience   = "spiffe://example.org"
)

// issuer publishes keys and signs with them, as an API server does.
type issuer struct {
	mu      sync.Mutex
	keys    []jose.JSONWebKey                         // guarded by mu; what it publishes, the public halves of
	answer  func(ctx context.Context) ([]byte, error) // guarded by mu; in place of keys if not nil
	fetches int                                       // guarded by mu
}

func (i *issuer) publish(keys ...jose.JSONWebKey) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.keys, i.answer = keys, nil
}

func (i *issuer) answerWith(answer func(ctx context.Context) ([]byte, error)) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.answer = answer
}

func (i *issuer) fetched() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.fetches
}

// jwks is a [token.Config.Keys].
func (i *issuer) jwks(ctx context.Context) ([]byte, error) {
	i.mu.Lock()
	i.fetches++
	answer := i.answer
	var set jose.JSONWebKeySet
	for _, key := range i.keys {
		set.Keys = append(set.Keys, key.Public())
	}
	i.mu.Unlock()
	if answer != nil {
		return answer(ctx)
	}
	return json.Marshal(set)
}

// verifier returns a Verifier of the issuer's tokens. The test ends it.
func (i *issuer) verifier(t testing.TB) *token.Verifier {
	t.Helper()
	v, err := token.New(token.Config{Issuers: []string{issuerName}, Audience: audience, Keys: i.jwks})
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	t.Cleanup(v.Close)
	return v
}

func newECKey(t testing.TB, curve elliptic.Curve, id string) jose.JSONWebKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return jose.JSONWebKey{Key: key, KeyID: id, Use: "sig"}
}

func newRSAKey(t testing.TB, bits int, id string) jose.JSONWebKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return jose.JSONWebKey{Key: key, KeyID: id, Use: "sig"}
}

// claims are a token's claims before they are signed. Members of kubernetes.io
// stand in [kubernetes].
type claims map[string]any

type kubernetes map[string]any

// goodClaims are those of a projected, pod-bound token, issued now for 1 h.
func goodClaims() claims {
	now := time.Now().Unix()
	return claims{
		"iss": issuerName,
		"sub": "system:serviceaccount:shop:web",
		"aud": []string{audience},
		"jti": "5f3c1f0e-2a49-4e0c-93f2-0d4b9f1a7c11",
		"iat": now,
		"nbf": now,
		"exp": now + 3600,
		"kubernetes.io": kubernetes{
			"namespace":      "shop",
			"serviceaccount": object{"web", "sa-uid"},
			"pod":            object{"web-0", "pod-uid"},
			"node":           object{"node-1", "node-uid"},
		},
	}
}

type object struct {
	Name string `json:"name,omitempty"`
	UID  string `json:"uid,omitempty"`
}

// with returns the claims with one changed, or left out if value is nil.
func (c claims) with(name string, value any) claims {
	c = maps.Clone(c)
	if value == nil {
		delete(c, name)
	} else {
		c[name] = value
	}
	return c
}

// withK8s is with for the members of kubernetes.io.
func (c claims) withK8s(name string, value any) claims {
	k := claims(c["kubernetes.io"].(kubernetes)).with(name, value)
	return c.with("kubernetes.io", kubernetes(k))
}

func (c claims) json(t testing.TB) string {
	t.Helper()
	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// podOf is the API server's record of the pod in goodClaims.
func podOf() identity.Pod {
	return identity.Pod{
		PodReference:      identity.PodReference{Namespace: "shop", Name: "web-0", UID: "pod-uid"},
		ServiceAccount:    "web",
		ServiceAccountUID: "sa-uid",
		Node:              identity.Node{Name: "node-1", UID: "node-uid"},
		Phase:             identity.PodRunning,
	}
}

// sign signs a payload. The headers are name and value in turn.
func sign(t testing.TB, algorithm jose.SignatureAlgorithm, key jose.JSONWebKey, payload string, headers ...any) string {
	t.Helper()
	raw, err := signed(t, algorithm, key, payload, headers...).CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func signed(t testing.TB, algorithm jose.SignatureAlgorithm, key jose.JSONWebKey, payload string, headers ...any) *jose.JSONWebSignature {
	t.Helper()
	var options jose.SignerOptions
	for i := 0; i < len(headers); i += 2 {
		options.WithHeader(jose.HeaderKey(headers[i].(string)), headers[i+1])
	}
	// The signer would refuse a key whose own algorithm differs.
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: algorithm, Key: jose.JSONWebKey{Key: key.Key, KeyID: key.KeyID}}, &options)
	if err != nil {
		t.Fatal(err)
	}
	jws, err := signer.Sign([]byte(payload))
	if err != nil {
		t.Fatal(err)
	}
	return jws
}

// reasonOf returns the reason of a refusal, "" for nil.
func reasonOf(t testing.TB, err error) token.Reason {
	t.Helper()
	if err == nil {
		return ""
	}
	e, ok := errors.AsType[*token.Error](err)
	if !ok {
		t.Fatalf("error %v (%T) is no *token.Error", err, err)
	}
	return e.Reason
}

func retryAfter(t testing.TB, err error) time.Duration {
	t.Helper()
	e, ok := errors.AsType[*token.Error](err)
	if !ok {
		t.Fatalf("error %v (%T) is no *token.Error", err, err)
	}
	return e.RetryAfter
}
