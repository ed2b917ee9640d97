package token_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"math/big"
	"strings"
	"testing"
	"time"

	jose "github.com/go-jose/go-jose/v4"

	"troth.dev/troth/token"
)

// BenchmarkVerify sets Verify beside its floor: the bare verification of the
// signature over a digest that is there already. The bars are 1.5 times the
// floor uncached, and 10 us cached.
//
// Every Verify is timed next to a floor of its own, and x-floor is the ratio of
// the sums: on a shared machine, two loops one after the other differ by more
// than what is to be measured.
func BenchmarkVerify(b *testing.B) {
	tests := []struct {
		algorithm jose.SignatureAlgorithm
		key       jose.JSONWebKey
	}{
		{jose.RS256, newRSAKey(b, 2048, "2m9vBFKdWpIrUuHPj9VqgnzIyqGUmGnrRVBBMpTjVAI")},
		{jose.ES256, newECKey(b, elliptic.P256(), "2m9vBFKdWpIrUuHPj9VqgnzIyqGUmGnrRVBBMpTjVAI")},
	}
	for _, tt := range tests {
		b.Run(string(tt.algorithm), func(b *testing.B) {
			var i issuer
			i.publish(tt.key)
			// A cache of one, and two tokens in turn: none is ever remembered.
			uncached, err := token.New(token.Config{Issuers: []string{issuerName}, Audience: audience, Keys: i.jwks, CacheSize: 1})
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(uncached.Close)
			cached := i.verifier(b)
			c := goodClaims().with("exp", time.Now().Unix()+7200)
			tokens := []string{
				sign(b, tt.algorithm, tt.key, c.json(b)),
				sign(b, tt.algorithm, tt.key, c.with("jti", "8f14c9d3-6a0e-4a65-9a3c-7f5d1f0b2e44").json(b)),
			}

			floor := bareVerification(b, tokens[0], tt.key)
			b.Run("floor", func(b *testing.B) {
				for b.Loop() {
					if !floor() {
						b.Fatal("the signature does not hold")
					}
				}
			})
			b.Run("uncached", func(b *testing.B) { besideFloor(b, floor, uncached, tokens) })
			b.Run("cached", func(b *testing.B) { besideFloor(b, floor, cached, tokens) })
		})
	}
}

// besideFloor reports what one Verify takes, and its ratio to the floor.
func besideFloor(b *testing.B, floor func() bool, v *token.Verifier, tokens []string) {
	for _, raw := range tokens {
		if _, err := v.Verify(b.Context(), raw); err != nil {
			b.Fatal(err)
		}
	}
	var bare, whole time.Duration
	for n := 0; b.Loop(); n++ {
		start := time.Now()
		if !floor() {
			b.Fatal("the signature does not hold")
		}
		between := time.Now()
		if _, err := v.Verify(b.Context(), tokens[n%len(tokens)]); err != nil {
			b.Fatal(err)
		}
		bare += between.Sub(start)
		whole += time.Since(between)
	}
	b.ReportMetric(float64(whole.Nanoseconds())/float64(b.N), "ns/op")
	b.ReportMetric(float64(whole)/float64(bare), "x-floor")
}

func bareVerification(b *testing.B, raw string, key jose.JSONWebKey) func() bool {
	b.Helper()
	end := strings.LastIndexByte(raw, '.')
	signature, err := base64.RawURLEncoding.DecodeString(raw[end+1:])
	if err != nil {
		b.Fatal(err)
	}
	digest := sha256.Sum256([]byte(raw[:end]))
	switch key := key.Public().Key.(type) {
	case *rsa.PublicKey:
		return func() bool { return rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], signature) == nil }
	case *ecdsa.PublicKey:
		r, s := new(big.Int).SetBytes(signature[:32]), new(big.Int).SetBytes(signature[32:])
		return func() bool { return ecdsa.Verify(key, digest[:], r, s) }
	default:
		b.Fatalf("no floor for %T", key)
		return nil
	}
}
