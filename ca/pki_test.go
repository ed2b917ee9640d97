package ca_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"io"
	"log/slog"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"troth.dev/troth/ca"
	"troth.dev/troth/handshake"
	"troth.dev/troth/storage"
)

var (
	trustDomain = spiffeid.RequireTrustDomainFromString("example.test")
	web         = spiffeid.RequireFromString("spiffe://example.test/ns/shop/sa/web")
)

// newConfig returns all that Open needs, with a store and a ledger of its own in
// memory.
func newConfig(t testing.TB) ca.Config {
	t.Helper()
	memory := storage.NewMemory()
	return ca.Config{
		TrustDomain: trustDomain,
		Keys:        newKeys(t),
		Authorities: memory,
		Ledger:      memory,
		Audit:       slog.New(slog.DiscardHandler),
	}
}

func newKeys(t testing.TB) *ca.SealedKeys {
	t.Helper()
	kek := make([]byte, ca.KeySize)
	rand.Read(kek)
	keys, err := ca.NewSealedKeys(kek)
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

func newProfile(t testing.TB, c ca.ProfileConfig) *ca.Profile {
	t.Helper()
	profile, err := ca.NewProfile(c)
	if err != nil {
		t.Fatal(err)
	}
	return profile
}

func open(t testing.TB, config ca.Config) *ca.Issuer {
	t.Helper()
	issuer, err := ca.Open(t.Context(), config)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	return issuer
}

// issue issues one SVID for a request that has to be accepted.
func issue(t testing.TB, issuer *ca.Issuer, request ca.Request) ca.SVID {
	t.Helper()
	results, err := issuer.Issue(t.Context(), request)
	if err != nil {
		t.Fatalf("Issue: %v", err)
	}
	if len(results) != 1 || results[0].Err != nil {
		t.Fatalf("Issue = %d results, the first with error %v; want one SVID", len(results), results[0].Err)
	}
	return results[0].SVID
}

func parseLeaf(t testing.TB, svid ca.SVID) *x509.Certificate {
	t.Helper()
	leaf, err := x509.ParseCertificate(svid.Certificates[0])
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

// checkVerifies fails unless all the peers that we know accept the SVID: plain
// crypto/x509 in both roles, go-spiffe, and our own handshake.
func checkVerifies(t testing.TB, bundle ca.Bundle, svid ca.SVID) {
	t.Helper()
	var chain []*x509.Certificate
	above := x509.NewCertPool()
	for n, der := range svid.Certificates {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		if chain = append(chain, c); n > 0 {
			above.AddCert(c)
		}
	}
	leaf := chain[0]
	roots := x509.NewCertPool()
	for _, a := range bundle.Authorities {
		roots.AddCert(a.Certificate)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: above, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
			t.Fatalf("x509 verification for usage %d: %v", usage, err)
		}
	}
	if id, _, err := x509svid.Verify(chain, bundle.X509Bundle()); err != nil || id != svid.ID {
		t.Fatalf("x509svid.Verify = %v, %v; want %v", id, err, svid.ID)
	}
	if peer, err := handshake.Verify(chain, bundle.X509Bundle(), time.Now()); err != nil || peer.ID != svid.ID {
		t.Fatalf("handshake.Verify = %v, %v; want %v", peer.ID, err, svid.ID)
	}
}

func currentBundle(issuer *ca.Issuer) ca.Bundle {
	bundle, _ := issuer.Bundle().Load()
	return bundle
}

// Kinds of keys that workloads may have.
const (
	p256    = "P-256"
	p384    = "P-384"
	ed      = "Ed25519"
	rsa2048 = "RSA 2048"
)

var acceptedKeys = []string{p256, p384, ed, rsa2048}

func newKey(t testing.TB, kind string) crypto.Signer {
	t.Helper()
	var key crypto.Signer
	var err error
	switch kind {
	case p256:
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case p384:
		key, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case ed:
		_, key, err = ed25519.GenerateKey(rand.Reader)
	case rsa2048:
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	default:
		t.Fatalf("unknown kind of key %q", kind)
	}
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newCSR(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	return csrOf(t, &x509.CertificateRequest{}, key)
}

func csrOf(t testing.TB, template *x509.CertificateRequest, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// requestFor returns a request for web with a fresh P-256 key.
func requestFor(t testing.TB) ca.Request {
	t.Helper()
	return ca.Request{ID: web, CSR: newCSR(t, newKey(t, p256)), Caller: "spiffe://example.test/troth/server"}
}

// document is the stored form of the authorities, written down a second time:
// a change of it would lock out every deployment.
type document struct {
	Format      int         `json:"format"`
	TrustDomain string      `json:"trust_domain"`
	Revision    uint64      `json:"revision"`
	Authorities []authority `json:"authorities"`
}

type authority struct {
	ID          string `json:"id"`
	State       string `json:"state"`
	Certificate []byte `json:"certificate"`
	Key         []byte `json:"key,omitempty"`
}

func (d document) encode(t testing.TB) []byte {
	t.Helper()
	data, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func stored(t testing.TB, store storage.AuthorityStore) document {
	t.Helper()
	doc, err := store.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var d document
	if err := json.Unmarshal(doc.Data, &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// replace stores data over whatever is there, as another replica would.
func replace(t testing.TB, store storage.AuthorityStore, data []byte) {
	t.Helper()
	doc, err := store.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Swap(t.Context(), doc.Version, data); err != nil {
		t.Fatal(err)
	}
}

// anotherAuthority returns an authority of the same trust domain under the same
// keys, in the state given.
func anotherAuthority(t testing.TB, config ca.Config, state string) authority {
	t.Helper()
	config.Authorities = storage.NewMemory()
	open(t, config)
	a := stored(t, config.Authorities).Authorities[0]
	a.State = state
	return a
}

// rotated returns the document after another replica activated next.
func rotated(d document, next authority) document {
	authorities := []authority{next}
	for _, a := range d.Authorities {
		if a.State == "active" {
			a.State = "old"
		}
		authorities = append(authorities, a)
	}
	d.Revision++
	d.Authorities = authorities
	return d
}

// signingKeys are Keys whose opened keys sign through sign.
type signingKeys struct {
	ca.Keys
	sign func(key crypto.Signer, digest []byte, opts crypto.SignerOpts) ([]byte, error)
}

func (k signingKeys) Open(ctx context.Context, id string, handle []byte) (crypto.Signer, error) {
	key, err := k.Keys.Open(ctx, id, handle)
	return signingKey{key, k.sign}, err
}

type signingKey struct {
	crypto.Signer
	sign func(key crypto.Signer, digest []byte, opts crypto.SignerOpts) ([]byte, error)
}

func (k signingKey) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return k.sign(k.Signer, digest, opts)
}
