package handshake_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

var (
	domain   = spiffeid.RequireTrustDomainFromString("example.org")
	idA      = spiffeid.RequireFromString("spiffe://example.org/ns/shop/sa/cart")
	idB      = spiffeid.RequireFromString("spiffe://example.org/ns/shop/sa/stock")
	stranger = spiffeid.RequireFromString("spiffe://example.org/ns/shop/sa/stranger")
)

// authority is a certificate authority of the test's own.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key := newKey(t)
	template := caTemplate("test authority")
	return &authority{cert: sign(t, template, template, key.Public(), key), key: key}
}

// intermediate returns an authority below a.
func (a *authority) intermediate(t testing.TB, edit func(*x509.Certificate)) *authority {
	t.Helper()
	key := newKey(t)
	template := caTemplate("test intermediate")
	if edit != nil {
		edit(template)
	}
	return &authority{cert: sign(t, template, a.cert, key.Public(), a.key), key: key}
}

// svid issues an SVID for id, whose certificate edit may spoil.
func (a *authority) svid(t testing.TB, id spiffeid.ID, edit func(*x509.Certificate)) *x509svid.SVID {
	t.Helper()
	key := newKey(t)
	template := leafTemplate(id)
	if edit != nil {
		edit(template)
	}
	leaf := sign(t, template, a.cert, key.Public(), a.key)
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{leaf}, PrivateKey: key}
}

func (a *authority) bundle() *x509bundle.Bundle {
	return x509bundle.FromX509Authorities(domain, []*x509.Certificate{a.cert})
}

func caTemplate(name string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(48 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
}

func leafTemplate(id spiffeid.ID) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber:          serial(),
		NotBefore:             time.Now().Add(-time.Minute),
		NotAfter:              time.Now().Add(time.Hour),
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs:                  []*url.URL{id.URL()},
	}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func serial() *big.Int {
	b := make([]byte, 16)
	rand.Read(b)
	b[0] = b[0]&0x7f | 1
	return new(big.Int).SetBytes(b)
}

func sign(t testing.TB, template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// rotating is an x509svid.Source whose SVID can be replaced; none at first.
type rotating struct {
	mu   sync.Mutex
	svid *x509svid.SVID
}

func (r *rotating) set(svid *x509svid.SVID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.svid = svid
}

func (r *rotating) GetX509SVID() (*x509svid.SVID, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.svid == nil {
		return nil, errors.New("no SVID yet")
	}
	return r.svid, nil
}

// tlsCertificate is the SVID as crypto/tls wants it, for peers that are bare
// crypto/tls.
func tlsCertificate(svid *x509svid.SVID) tls.Certificate {
	cert := tls.Certificate{PrivateKey: svid.PrivateKey, Leaf: svid.Certificates[0]}
	for _, c := range svid.Certificates {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	return cert
}
