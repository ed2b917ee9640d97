package proxy_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"troth.dev/troth/agent/proxy"
)

var (
	domain = spiffeid.RequireTrustDomainFromString("example.org")
	cart   = spiffeid.RequireFromString("spiffe://example.org/ns/shop/sa/cart")
	stock  = spiffeid.RequireFromString("spiffe://example.org/ns/shop/sa/stock")
	web    = spiffeid.RequireFromString("spiffe://example.org/ns/shop/sa/web")
)

// authority is a certificate authority of the test's own.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	id   string // by which agents count what it signed
}

func newAuthority(tb testing.TB) *authority {
	tb.Helper()
	a := &authority{key: newKey(tb)}
	point, err := x509.MarshalPKIXPublicKey(a.key.Public())
	if err != nil {
		tb.Fatal(err)
	}
	name := sha256.Sum256(point)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: hex.EncodeToString(name[:4])},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(48 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, SubjectKeyId: name[:20],
	}
	a.cert = sign(tb, template, template, a.key, a.key)
	a.id = hex.EncodeToString(a.cert.SubjectKeyId)
	return a
}

// svid issues an SVID that lives for as long as life.
func (a *authority) svid(tb testing.TB, id spiffeid.ID, life time.Duration) *x509svid.SVID {
	tb.Helper()
	serial := make([]byte, 16)
	rand.Read(serial)
	key := newKey(tb)
	leaf := sign(tb, &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial),
		NotBefore:    time.Now().Add(-time.Minute), NotAfter: time.Now().Add(life),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs:        []*url.URL{id.URL()},
	}, a.cert, key, a.key)
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{leaf}, PrivateKey: key}
}

// identity is a pod's, under a, with an hour to live.
func (a *authority) identity(tb testing.TB, id spiffeid.ID) proxy.Identity {
	tb.Helper()
	return proxy.Identity{SVID: a.svid(tb, id, time.Hour), Bundles: trusting(a)}
}

// trusting is bundles in which the trust domain has these authorities.
func trusting(authorities ...*authority) *x509bundle.Set {
	bundle := x509bundle.New(domain)
	for _, a := range authorities {
		bundle.AddX509Authority(a.cert)
	}
	return x509bundle.NewSet(bundle)
}

func newKey(tb testing.TB) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

func sign(tb testing.TB, template, parent *x509.Certificate, key, signer *ecdsa.PrivateKey) *x509.Certificate {
	tb.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		tb.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	return cert
}
