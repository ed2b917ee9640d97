// Package oidc is a small OpenID Connect issuer for tests: HTTPS on a loopback port,
// with a discovery document, a key set and real tokens. Start with [Start] and
// [Issuer.Token].
package oidc

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	jose "github.com/go-jose/go-jose/v4"
	"github.com/google/uuid"
)

// Issuer is a running issuer. The test ends it.
type Issuer struct {
	URL string // what it calls itself
	// CAFile is a PEM file of who vouches for its certificate.
	CAFile string

	mu      sync.Mutex
	keys    []jose.JSONWebKey                                 // guarded by mu; the first one signs
	answer  func(w http.ResponseWriter, r *http.Request) bool // guarded by mu
	fetches map[string]int                                    // guarded by mu; by path
}

const (
	discoveryPath = "/.well-known/openid-configuration"
	// KeysPath is where the keys are.
	KeysPath = "/keys"
)

// Start starts an issuer with one key, for ES256.
func Start(t testing.TB) *Issuer {
	t.Helper()
	i := &Issuer{fetches: make(map[string]int)}
	i.Rotate(t, "first")
	server := httptest.NewUnstartedServer(i)
	// Tests have clients that do not trust it, on purpose.
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	t.Cleanup(server.Close)
	i.URL = server.URL
	i.CAFile = filepath.Join(t.TempDir(), "ca.pem")
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	if err := os.WriteFile(i.CAFile, certificate, 0o600); err != nil {
		t.Fatal(err)
	}
	return i
}

// ServeHTTP answers as an issuer does.
func (i *Issuer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	i.mu.Lock()
	i.fetches[r.URL.Path]++
	answer := i.answer
	var set jose.JSONWebKeySet
	for _, key := range i.keys {
		set.Keys = append(set.Keys, key.Public())
	}
	i.mu.Unlock()
	if answer != nil && answer(w, r) {
		return
	}
	switch r.URL.Path {
	case discoveryPath:
		json.NewEncoder(w).Encode(map[string]any{"issuer": i.URL, "jwks_uri": i.URL + KeysPath})
	case KeysPath:
		json.NewEncoder(w).Encode(set)
	default:
		http.NotFound(w, r)
	}
}

// Answer lets answer answer requests; it returns false for those that it leaves alone.
// Nil ends that.
func (i *Issuer) Answer(answer func(w http.ResponseWriter, r *http.Request) bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.answer = answer
}

// Fetches is how often the keys were asked for.
func (i *Issuer) Fetches() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.fetches[KeysPath]
}

// Rotate has the issuer sign with a new key of that ID from now on. It publishes it
// alone.
func (i *Issuer) Rotate(t testing.TB, id string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.keys = []jose.JSONWebKey{{Key: key, KeyID: id, Algorithm: string(jose.ES256), Use: "sig"}}
}

// Key is what the issuer signs with.
func (i *Issuer) Key() jose.JSONWebKey {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.keys[0]
}

// Claims returns those that every token has, issued now for five minutes and for that
// audience, and more beside them. A value of nil leaves a claim out.
func (i *Issuer) Claims(audience string, more map[string]any) map[string]any {
	now := time.Now().Unix()
	claims := map[string]any{
		"iss": i.URL, "aud": audience, "jti": uuid.NewString(), "iat": now, "nbf": now, "exp": now + 300,
	}
	maps.Copy(claims, more)
	maps.DeleteFunc(claims, func(_ string, value any) bool { return value == nil })
	return claims
}

// Token signs the claims.
func (i *Issuer) Token(t testing.TB, claims map[string]any) string {
	t.Helper()
	payload, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	return Sign(t, jose.ES256, i.Key(), payload)
}

// Sign signs whatever payload it is given.
func Sign(t testing.TB, algorithm jose.SignatureAlgorithm, key jose.JSONWebKey, payload []byte) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: algorithm, Key: jose.JSONWebKey{Key: key.Key, KeyID: key.KeyID}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}
