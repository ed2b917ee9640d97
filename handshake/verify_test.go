package handshake_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"troth.dev/troth/handshake"
	"troth.dev/troth/identity"
)

// spoiled is one way in which a peer's certificate is no good.
type spoiled struct {
	name string
	want handshake.Code
	svid func(t testing.TB, ca *authority) *x509svid.SVID
}

func edited(name string, want handshake.Code, edit func(*x509.Certificate)) spoiled {
	return spoiled{name, want, func(t testing.TB, ca *authority) *x509svid.SVID { return ca.svid(t, idA, edit) }}
}

// withURI is a certificate whose one URI is exactly the given bytes, which
// url.URL could not spell.
func withURI(name, uri string) spoiled {
	return edited(name, handshake.NotASPIFFEID, func(c *x509.Certificate) {
		c.URIs = nil
		value, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(uri)}})
		if err != nil {
			panic(err)
		}
		c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: value}}
	})
}

func mustURL(s string) *url.URL {
	u, err := url.Parse(s)
	if err != nil {
		panic(err)
	}
	return u
}

// spoiledCertificates has every reason of Verify that a single handshake can
// show. The leaf claims idA wherever it can.
func spoiledCertificates() []spoiled {
	long := "spiffe://example.org/" + strings.Repeat("a", 2048)
	return []spoiled{
		{"another authority", handshake.CertificateUntrusted, func(t testing.TB, _ *authority) *x509svid.SVID {
			return newAuthority(t).svid(t, idA, nil)
		}},
		{"self-signed", handshake.CertificateUntrusted, func(t testing.TB, _ *authority) *x509svid.SVID {
			key := newKey(t)
			template := leafTemplate(idA)
			leaf := sign(t, template, template, key.Public(), key)
			return &x509svid.SVID{ID: idA, Certificates: []*x509.Certificate{leaf}, PrivateKey: key}
		}},
		{"intermediate left out", handshake.CertificateUntrusted, func(t testing.TB, ca *authority) *x509svid.SVID {
			return ca.intermediate(t, nil).svid(t, idA, nil)
		}},
		{"signed by a leaf", handshake.CertificateUntrusted, func(t testing.TB, ca *authority) *x509svid.SVID {
			parent := ca.svid(t, stranger, func(c *x509.Certificate) { c.Subject.CommonName = "leaf" })
			leaf := &authority{cert: parent.Certificates[0], key: parent.PrivateKey}
			svid := leaf.svid(t, idA, nil)
			svid.Certificates = append(svid.Certificates, leaf.cert)
			return svid
		}},
		{"intermediates upside down", handshake.CertificateUntrusted, func(t testing.TB, ca *authority) *x509svid.SVID {
			svid := nested(t, ca)
			slices.Reverse(svid.Certificates[1:])
			return svid
		}},
		{"intermediates out of order below the last", handshake.CertificateUntrusted, func(t testing.TB, ca *authority) *x509svid.SVID {
			svid := nested(t, ca)
			slices.Reverse(svid.Certificates[1:3])
			return svid
		}},
		{"labyrinth", handshake.CertificateUntrusted, labyrinth},
		edited("expired", handshake.CertificateExpired, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-2 * time.Second) }),
		edited("not yet valid", handshake.CertificateNotYetValid, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }),
		{"expired intermediate", handshake.CertificateExpired, func(t testing.TB, ca *authority) *x509svid.SVID {
			return chained(t, ca, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-2 * time.Second) })
		}},
		{"intermediate not yet valid", handshake.CertificateNotYetValid, func(t testing.TB, ca *authority) *x509svid.SVID {
			return chained(t, ca, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) })
		}},
		{"intermediate for other usages", handshake.KeyUsage, func(t testing.TB, ca *authority) *x509svid.SVID {
			return chained(t, ca, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} })
		}},
		{"intermediate for another domain", handshake.CertificateInvalid, func(t testing.TB, ca *authority) *x509svid.SVID {
			return chained(t, ca, func(c *x509.Certificate) {
				c.PermittedURIDomains = []string{"elsewhere.org"}
				c.PermittedDNSDomainsCritical = true
			})
		}},
		edited("unknown critical extension", handshake.CertificateInvalid, func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}}
		}),
		edited("unknown trust domain", handshake.TrustDomainUnknown, func(c *x509.Certificate) {
			c.URIs = []*url.URL{mustURL("spiffe://elsewhere.org/ns/shop/sa/cart")}
		}),
		edited("two URIs", handshake.NotOneURI, func(c *x509.Certificate) { c.URIs = append(c.URIs, stranger.URL()) }),
		edited("the same URI twice", handshake.NotOneURI, func(c *x509.Certificate) { c.URIs = append(c.URIs, idA.URL()) }),
		edited("a web address beside the ID", handshake.NotOneURI, func(c *x509.Certificate) { c.URIs = append(c.URIs, mustURL("https://example.org")) }),
		edited("no name at all", handshake.NotOneURI, func(c *x509.Certificate) { c.URIs = nil }),
		edited("DNS name only", handshake.NotOneURI, func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"cart.shop.svc"} }),
		edited("another scheme", handshake.NotASPIFFEID, func(c *x509.Certificate) { c.URIs = []*url.URL{mustURL("https://example.org/ns/shop/sa/cart")} }),
		edited("no path", handshake.NotASPIFFEID, func(c *x509.Certificate) { c.URIs = []*url.URL{domain.ID().URL()} }),
		withURI("only a slash for a path", "spiffe://example.org/"),
		withURI("empty fragment", idA.String()+"#"),
		withURI("empty query", idA.String()+"?"),
		withURI("upper-case scheme", strings.Replace(idA.String(), "spiffe", "SPIFFE", 1)),
		withURI("upper-case trust domain", strings.Replace(idA.String(), "example", "Example", 1)),
		withURI("percent-encoded path", strings.Replace(idA.String(), "cart", "c%61rt", 1)),
		withURI("dot segment", "spiffe://example.org/ns/shop/sa/x/../cart"),
		withURI("port", "spiffe://example.org:443/ns/shop/sa/cart"),
		withURI("user", "spiffe://me@example.org/ns/shop/sa/cart"),
		withURI("too long", long),
		edited("authority as leaf", handshake.CAAsLeaf, func(c *x509.Certificate) { c.IsCA = true }),
		edited("may sign certificates", handshake.KeyUsage, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }),
		edited("may sign revocations", handshake.KeyUsage, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }),
		edited("may not sign", handshake.KeyUsage, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }),
		edited("no key usage", handshake.KeyUsage, func(c *x509.Certificate) { c.KeyUsage = 0 }),
		edited("server only", handshake.KeyUsage, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }),
		edited("client only", handshake.KeyUsage, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }),
		edited("code signing", handshake.KeyUsage, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} }),
		edited("unknown extended usage", handshake.KeyUsage, func(c *x509.Certificate) {
			c.ExtKeyUsage, c.UnknownExtKeyUsage = nil, []asn1.ObjectIdentifier{{1, 2, 3}}
		}),
		edited("issued for tests", handshake.TestIdentity, forTests),
		edited("issued for tests, and more", handshake.TestIdentity, func(c *x509.Certificate) {
			c.Policies = []x509.OID{mustOID("2.23.140.1.2.1"), identity.TestPolicy}
		}),
		{"intermediate for tests", handshake.TestIdentity, func(t testing.TB, ca *authority) *x509svid.SVID {
			return chained(t, ca, forTests)
		}},
		{"eleven certificates", handshake.ChainTooLong, func(t testing.TB, ca *authority) *x509svid.SVID {
			svid := ca.svid(t, idA, nil)
			for range 10 {
				svid.Certificates = append(svid.Certificates, ca.cert)
			}
			return svid
		}},
	}
}

func forTests(c *x509.Certificate) { c.Policies = []x509.OID{identity.TestPolicy} }

func mustOID(s string) x509.OID {
	oid, err := x509.ParseOID(s)
	if err != nil {
		panic(err)
	}
	return oid
}

// chained issues idA by an intermediate that edit may spoil.
func chained(t testing.TB, ca *authority, edit func(*x509.Certificate)) *x509svid.SVID {
	t.Helper()
	middle := ca.intermediate(t, edit)
	svid := middle.svid(t, idA, nil)
	svid.Certificates = append(svid.Certificates, middle.cert)
	return svid
}

// nested issues idA by the last of three intermediates.
func nested(t testing.TB, ca *authority) *x509svid.SVID {
	t.Helper()
	top := ca.intermediate(t, nil)
	middle := top.intermediate(t, nil)
	low := middle.intermediate(t, nil)
	svid := low.svid(t, idA, nil)
	svid.Certificates = append(svid.Certificates, low.cert, middle.cert, top.cert)
	return svid
}

// labyrinth issues idA by nine intermediates of one name that sign each other in
// a ring, with the slowest keys there are.
func labyrinth(t testing.TB, _ *authority) *x509svid.SVID {
	t.Helper()
	var ring [9]*authority
	for i := range ring {
		key, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		ring[i] = &authority{cert: caTemplate("ring"), key: key}
		ring[i].cert.PublicKey = key.Public()
	}
	svid := ring[0].svid(t, idA, nil)
	for i := range ring {
		next := ring[(i+1)%len(ring)]
		svid.Certificates = append(svid.Certificates, sign(t, ring[i].cert, next.cert, ring[i].key.Public(), next.key))
	}
	return svid
}

func TestVerifyRefuses(t *testing.T) {
	ca := newAuthority(t)
	for _, tt := range spoiledCertificates() {
		t.Run(tt.name, func(t *testing.T) {
			peer, err := handshake.Verify(tt.svid(t, ca).Certificates, ca.bundle(), time.Now())
			if got := codeOf(err); got != tt.want {
				t.Errorf("Verify() = %v, want %v", err, tt.want)
			}
			if peer != (handshake.Peer{}) {
				t.Errorf("Verify() refused and returned %v", peer)
			}
		})
	}
	t.Run("no certificate", func(t *testing.T) {
		if _, err := handshake.Verify(nil, ca.bundle(), time.Now()); codeOf(err) != handshake.CertificateMissing {
			t.Errorf("Verify(nil) = %v", err)
		}
	})
	t.Run("another domain's bundle", func(t *testing.T) {
		elsewhere := x509bundle.FromX509Authorities(spiffeid.RequireTrustDomainFromString("elsewhere.org"), []*x509.Certificate{ca.cert})
		if _, err := handshake.Verify(ca.svid(t, idA, nil).Certificates, careless{elsewhere}, time.Now()); codeOf(err) != handshake.TrustDomainUnknown {
			t.Errorf("Verify() = %v, want %v", err, handshake.TrustDomainUnknown)
		}
	})
	t.Run("empty bundle", func(t *testing.T) {
		// An empty pool, unlike none, does not mean the system's roots.
		if _, err := handshake.Verify(ca.svid(t, idA, nil).Certificates, x509bundle.New(domain), time.Now()); codeOf(err) != handshake.CertificateUntrusted {
			t.Errorf("Verify() = %v, want %v", err, handshake.CertificateUntrusted)
		}
	})
	t.Run("no bundle and no error", func(t *testing.T) {
		if _, err := handshake.Verify(ca.svid(t, idA, nil).Certificates, careless{nil}, time.Now()); codeOf(err) != handshake.TrustDomainUnknown {
			t.Errorf("Verify() = %v, want %v", err, handshake.TrustDomainUnknown)
		}
	})
}

// An authority for tests in the bundle vouches for nobody: not for what says that it
// is for tests, and not for what its key was made to sign without.
func TestAuthorityForTestsVouchesForNobody(t *testing.T) {
	key := newKey(t)
	template := caTemplate("authority for tests")
	forTests(template)
	ca := &authority{cert: sign(t, template, template, key.Public(), key), key: key}
	for name, edit := range map[string]func(*x509.Certificate){"leaf with the policy": forTests, "leaf without": nil} {
		t.Run(name, func(t *testing.T) {
			chain := ca.svid(t, idA, edit).Certificates
			if peer, err := handshake.Verify(chain, ca.bundle(), time.Now()); codeOf(err) != handshake.TestIdentity || peer != (handshake.Peer{}) {
				t.Errorf("Verify() = %v, %v; want %v", peer, err, handshake.TestIdentity)
			}
			if peer, err := handshake.VerifyAcceptingTests(chain, ca.bundle(), time.Now()); err != nil || peer.ID != idA {
				t.Errorf("VerifyAcceptingTests() = %v, %v; want %v", peer, err, idA)
			}
		})
	}
	t.Run("all other rules hold for tests", func(t *testing.T) {
		for _, tt := range spoiledCertificates() {
			if tt.want == handshake.TestIdentity {
				continue
			}
			if _, err := handshake.VerifyAcceptingTests(tt.svid(t, ca).Certificates, ca.bundle(), time.Now()); codeOf(err) != tt.want {
				t.Errorf("%s: VerifyAcceptingTests() = %v, want %v", tt.name, err, tt.want)
			}
		}
	})
}

// A labyrinth is refused at its far end: crypto/x509, which would search it for
// 130 ms, is not asked.
func TestLabyrinthIsNotSearched(t *testing.T) {
	ca := newAuthority(t)
	_, err := handshake.Verify(labyrinth(t, ca).Certificates, ca.bundle(), time.Now())
	if _, searched := errors.AsType[x509.UnknownAuthorityError](err); err == nil || searched {
		t.Errorf("Verify(labyrinth) = %v, by crypto/x509: %v", err, searched)
	}
}

// careless is a bundle source that answers every trust domain with one bundle.
type careless struct{ bundle *x509bundle.Bundle }

func (c careless) GetX509BundleForTrustDomain(spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return c.bundle, nil
}

func TestVerifyAccepts(t *testing.T) {
	ca, second := newAuthority(t), newAuthority(t)
	both := x509bundle.FromX509Authorities(domain, []*x509.Certificate{second.cert, ca.cert})
	soon := time.Now().Add(10 * time.Minute)
	for _, tt := range []struct {
		name   string
		svid   *x509svid.SVID
		expiry time.Time
	}{
		{"plain", ca.svid(t, idA, nil), time.Time{}},
		{"DNS name beside the ID", ca.svid(t, idA, func(c *x509.Certificate) { c.DNSNames = []string{"cart.shop.svc"} }), time.Time{}},
		{"no extended usage", ca.svid(t, idA, func(c *x509.Certificate) { c.ExtKeyUsage = nil }), time.Time{}},
		{"any extended usage", ca.svid(t, idA, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} }), time.Time{}},
		{"key encipherment too", ca.svid(t, idA, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageKeyEncipherment }), time.Time{}},
		{"intermediate", chained(t, ca, nil), time.Time{}},
		{"three intermediates", nested(t, ca), time.Time{}},
		{"the authority itself at the end", func() *x509svid.SVID {
			svid := nested(t, ca)
			svid.Certificates = append(svid.Certificates, ca.cert)
			return svid
		}(), time.Time{}},
		{"intermediate that expires first", chained(t, ca, func(c *x509.Certificate) { c.NotAfter = soon }), soon},
		{"ten certificates", func() *x509svid.SVID {
			svid := ca.svid(t, idA, nil)
			for range 9 {
				svid.Certificates = append(svid.Certificates, second.cert)
			}
			return svid
		}(), time.Time{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			peer, err := handshake.Verify(tt.svid.Certificates, both, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			if tt.expiry.IsZero() {
				tt.expiry = tt.svid.Certificates[0].NotAfter
			}
			if peer.ID != idA || !peer.Expiry.Equal(tt.expiry.Truncate(time.Second)) || !bytes.Equal(peer.Authority.Raw, ca.cert.Raw) {
				t.Errorf("Verify() = %v until %v by %v, want %v until %v", peer.ID, peer.Expiry, peer.Authority.Subject, idA, tt.expiry)
			}
		})
	}
}

// codeOf returns the code of err, or "" if it has none.
func codeOf(err error) handshake.Code {
	if e, ok := errors.AsType[*handshake.Error](err); ok {
		return e.Code
	}
	return ""
}
