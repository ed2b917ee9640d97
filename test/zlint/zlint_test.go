// Package zlint holds Troth's certificates against the lints of zlint, which
// public certificate authorities use. Of its sources only RFC 5280 applies: the
// others are rules of the Web PKI.
package zlint_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	stdx509 "crypto/x509"
	"log/slog"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/zmap/zcrypto/x509"
	"github.com/zmap/zlint/v3"
	"github.com/zmap/zlint/v3/lint"

	"troth.dev/troth/ca"
	"troth.dev/troth/storage"
)

func TestRFC5280(t *testing.T) {
	registry, err := lint.GlobalRegistry().Filter(lint.FilterOptions{IncludeSources: lint.SourceList{lint.RFC5280}})
	if err != nil {
		t.Fatal(err)
	}
	keys, err := ca.NewSealedKeys(make([]byte, ca.KeySize))
	if err != nil {
		t.Fatal(err)
	}
	memory := storage.NewMemory()
	issuer, err := ca.Open(t.Context(), ca.Config{
		TrustDomain: spiffeid.RequireTrustDomainFromString("example.test"),
		Keys:        keys, Authorities: memory, Ledger: memory,
		Audit: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}

	bundle, _ := issuer.Bundle().Load()
	t.Run("authority", func(t *testing.T) { check(t, registry, bundle.Authorities[0].Certificate.Raw) })
	for _, kind := range []string{"P-256", "P-384", "Ed25519", "RSA 2048"} {
		t.Run("leaf with "+kind, func(t *testing.T) {
			csr, err := stdx509.CreateCertificateRequest(rand.Reader, &stdx509.CertificateRequest{}, newKey(t, kind))
			if err != nil {
				t.Fatal(err)
			}
			results, err := issuer.Issue(t.Context(), ca.Request{
				ID: spiffeid.RequireFromString("spiffe://example.test/ns/shop/sa/web"), CSR: csr, Caller: "test",
			})
			if err != nil || results[0].Err != nil {
				t.Fatalf("Issue: %v, %v", err, results)
			}
			check(t, registry, results[0].SVID.Certificates[0])
		})
	}
}

// check fails for each error that zlint finds. No exception is allowed.
func check(t *testing.T, registry lint.Registry, der []byte) {
	t.Helper()
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatalf("zcrypto: %v", err)
	}
	passed := 0
	for name, result := range zlint.LintCertificateEx(certificate, registry).Results {
		switch result.Status {
		case lint.Error, lint.Fatal:
			t.Errorf("%s: %v %s", name, result.Status, result.Details)
		case lint.Warn, lint.Notice:
			t.Logf("%s: %v %s", name, result.Status, result.Details)
		case lint.Pass:
			passed++
		}
	}
	// A registry without lints would find nothing either: some 45 apply.
	if passed < 30 {
		t.Errorf("only %d lints passed", passed)
	}
	t.Logf("%d lints passed", passed)
}

func newKey(t *testing.T, kind string) crypto.Signer {
	t.Helper()
	var key crypto.Signer
	var err error
	switch kind {
	case "P-256":
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "P-384":
		key, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case "Ed25519":
		_, key, err = ed25519.GenerateKey(rand.Reader)
	default:
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	}
	if err != nil {
		t.Fatal(err)
	}
	return key
}
