package token_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"encoding/json"
	"testing"
	"time"

	jose "github.com/go-jose/go-jose/v4"

	"troth.dev/troth/identity"
)

// FuzzVerify holds Verify against another reader of the same token: what it
// accepts, go-jose accepts too, and reads the same pod in it.
func FuzzVerify(f *testing.F) {
	key := fuzzKey(f)
	for _, raw := range []string{
		sign(f, jose.ES256, key, goodClaims().json(f)),
		sign(f, jose.ES256, key, goodClaims().json(f), "crit", []string{"x"}, "x", 1),
		sign(f, jose.ES256, key, `{"iss":1e400}`),
		signed(f, jose.ES256, key, "{}").FullSerialize(),
		"", "..", "e30.e30.", "eyJhbGciOiJub25lIn0.e30.", "bnVsbA.bnVsbA.bnVsbA",
	} {
		f.Add(raw)
	}
	var i issuer
	i.publish(key)
	v := i.verifier(f)
	f.Fuzz(func(t *testing.T, raw string) {
		got, err := v.Verify(t.Context(), raw)
		if err != nil {
			if reasonOf(t, err) == "" {
				t.Fatalf("Verify(%q) = %v, without a reason", raw, err)
			}
			return
		}
		jws, err := jose.ParseSignedCompact(raw, []jose.SignatureAlgorithm{jose.ES256})
		if err != nil {
			t.Fatalf("Verify(%q) = nil, and go-jose: %v", raw, err)
		}
		payload, err := jws.Verify(key.Public())
		if err != nil {
			t.Fatalf("Verify(%q) = nil, and go-jose: %v", raw, err)
		}
		var read struct {
			Kubernetes struct {
				Pod struct{ UID string }
			} `json:"kubernetes.io"`
		}
		if err := json.Unmarshal(payload, &read); err != nil || read.Kubernetes.Pod.UID != got.Pod.UID {
			t.Fatalf("Verify(%q) read pod %q, and encoding/json %q, %v", raw, got.Pod.UID, read.Kubernetes.Pod.UID, err)
		}
	})
}

// FuzzClaims signs whatever it is given: what comes through keeps every promise
// of Claims.
func FuzzClaims(f *testing.F) {
	f.Add(goodClaims().json(f))
	f.Add(goodClaims().with("aud", audience).withK8s("node", nil).json(f))
	f.Add(`{"iss":"` + issuerName + `","aud":["` + audience + `"],"iat":1,"nbf":1,"exp":253402300799}`)
	f.Add(`{"exp":9223372036854775807,"iat":-9223372036854775808,"nbf":1e9}`)
	f.Add(`{"iss":null,"aud":null,"kubernetes.io":null}`)
	key := fuzzKey(f)
	var i issuer
	i.publish(key)
	v := i.verifier(f)
	f.Fuzz(func(t *testing.T, payload string) {
		now := time.Now()
		c, err := v.Verify(t.Context(), sign(t, jose.ES256, key, payload))
		if err != nil {
			if reasonOf(t, err) == "" {
				t.Fatalf("Verify(%s) = %v, without a reason", payload, err)
			}
			return
		}
		account, err := identity.ParseServiceAccountName(c.ServiceAccount.String())
		switch life := c.Expiry.Sub(c.IssuedAt); {
		case c.Issuer != issuerName, c.Audience != audience:
			t.Errorf("Verify(%s) accepted issuer %q and audience %q", payload, c.Issuer, c.Audience)
		case life <= 0, life > 2*time.Hour, c.Expiry.Before(now.Add(-time.Minute)):
			t.Errorf("Verify(%s) accepted a life from %v to %v", payload, c.IssuedAt, c.Expiry)
		case c.Pod.Name == "", c.Pod.UID == "", c.Pod.Namespace != c.ServiceAccount.Namespace:
			t.Errorf("Verify(%s) accepted pod %q", payload, c.Pod)
		case err != nil, account != c.ServiceAccount, c.ServiceAccountUID == "":
			t.Errorf("Verify(%s) accepted service account %q, UID %q", payload, c.ServiceAccount, c.ServiceAccountUID)
		}
	})
}

// fuzzKey is the same in every process: the one that makes the seeds and those
// that vary them.
func fuzzKey(f *testing.F) jose.JSONWebKey {
	f.Helper()
	scalar := sha256.Sum256([]byte("a key that everybody knows"))
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), scalar[:])
	if err != nil {
		f.Fatal(err)
	}
	return jose.JSONWebKey{Key: key, KeyID: "fuzz", Use: "sig"}
}
