package ca_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net/url"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"troth.dev/troth/ca"
	"troth.dev/troth/handshake"
	"troth.dev/troth/identity"
)

func newTestConfig(t testing.TB) ca.Config {
	t.Helper()
	config := newConfig(t)
	config.Test = true
	return config
}

// A trust domain for tests is whole, through a rotation: who accepts tests accepts
// what it issues, and nobody else does, although the authority is in the bundle.
func TestTestTrustDomain(t *testing.T) {
	issuer := open(t, newTestConfig(t))
	for _, round := range []string{"first authority", "second authority"} {
		svid := issue(t, issuer, requestFor(t))
		leaf := parseLeaf(t, svid)
		bundle := currentBundle(issuer)
		if !identity.IsTest(leaf) || !identity.IsTest(bundle.Authorities[len(bundle.Authorities)-1].Certificate) {
			t.Fatalf("%s: leaf or authority has not the policy", round)
		}
		if id, _, err := x509svid.Verify([]*x509.Certificate{leaf}, bundle.X509Bundle()); err != nil || id != web {
			t.Errorf("%s: x509svid.Verify = %v, %v", round, id, err)
		}
		if _, err := handshake.VerifyAcceptingTests([]*x509.Certificate{leaf}, bundle.X509Bundle(), time.Now()); err != nil {
			t.Errorf("%s: %v", round, err)
		}
		_, err := handshake.Verify([]*x509.Certificate{leaf}, bundle.X509Bundle(), time.Now())
		if e, ok := errors.AsType[*handshake.Error](err); !ok || e.Code != handshake.TestIdentity {
			t.Errorf("%s: Verify = %v, want %v", round, err, handshake.TestIdentity)
		}

		next, err := issuer.Prepare(t.Context(), ca.Order{Actor: "test"})
		if err != nil {
			t.Fatal(err)
		}
		// What agents prove with is for tests too, and so is what they have to refuse.
		probe, err := issuer.Probe(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, der := range [][]byte{probe.Trusted[0], probe.Untrusted[0]} {
			if c, err := x509.ParseCertificate(der); err != nil || !identity.IsTest(c) {
				t.Errorf("%s: a probe without the policy (%v)", round, err)
			}
		}
		if _, err := issuer.Activate(t.Context(), next.ID, ca.Order{Actor: "test", Force: true, Reason: "test"}); err != nil {
			t.Fatal(err)
		}
	}
}

// The one kind of authority is never used as the other: not when it is in the store
// at the start, and not when it appears there later.
func TestPurposeIsForLife(t *testing.T) {
	for _, test := range []bool{false, true} {
		config := newConfig(t)
		config.Test = test
		issuer := open(t, config)

		other := config
		other.Test = !test
		if _, err := ca.Open(t.Context(), other); err == nil || !strings.Contains(err.Error(), "is it another's store?") {
			t.Errorf("Open with Test %v of authorities with %v: %v", !test, test, err)
		}
		replace(t, config.Authorities, rotated(stored(t, config.Authorities), anotherAuthority(t, other, "active")).encode(t))
		if err := issuer.Refresh(t.Context()); err == nil || !strings.Contains(err.Error(), "is it another's store?") {
			t.Errorf("Refresh with Test %v: %v", test, err)
		}
	}
}

func TestTestRefusesAnUpstream(t *testing.T) {
	config := newTestConfig(t)
	config.Upstream = &ca.Upstream{Certificate: "tls.crt", Key: "tls.key"}
	if _, err := ca.Open(t.Context(), config); err == nil || !strings.Contains(err.Error(), "Test with an Upstream") {
		t.Errorf("Open = %v", err)
	}
}

// Names that no constraint can hold to are refused, and not left unconstrained.
func TestTestTrustDomainHasAHost(t *testing.T) {
	for _, name := range []string{"10.0.0.1", "a..test", ".test"} {
		config := newTestConfig(t)
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			continue // the SPIFFE library says so first
		}
		config.TrustDomain = td
		if _, err := ca.Open(t.Context(), config); err == nil {
			t.Errorf("Open for trust domain %q succeeded", name)
		}
	}
}

// OpenSSL, as one that knows nothing of Troth, and Go's verifier hold a test
// authority to its trust domain, whatever its key was made to sign; and under a
// production bundle they refuse what it signed at all.
func TestOthersConfineTests(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Fatal("no openssl: apt-get install openssl")
	}
	keys := &keeping{Keys: newKeys(t)}
	config := newTestConfig(t)
	config.Keys = keys
	issuer := open(t, config)
	authority := currentBundle(issuer).Authorities[0].Certificate
	own := parseLeaf(t, issue(t, issuer, requestFor(t)))
	production := currentBundle(open(t, newConfig(t))).Authorities[0].Certificate

	contains(t, openssl(t, "x509", "-in", writePEM(t, authority.Raw), "-noout", "-text"),
		"X509v3 Certificate Policies:\nPolicy: "+identity.TestPolicy.String()+"\n",
		"X509v3 Name Constraints: critical\nPermitted:\nURI:example.test\nExcluded:\nURI:.example.test\n")
	contains(t, openssl(t, "x509", "-in", writePEM(t, own.Raw), "-noout", "-text"),
		"X509v3 Certificate Policies:\nPolicy: "+identity.TestPolicy.String()+"\n")

	// forged is a leaf that the authority's key signed past all of our code.
	forged := func(uri string) *x509.Certificate {
		key := newKey(t, p256)
		name, err := url.Parse(uri)
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "forged"},
			NotBefore: own.NotBefore, NotAfter: own.NotAfter,
			URIs: []*url.URL{name}, KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}, authority, key.Public(), keys.made)
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return leaf
	}

	for _, test := range []struct {
		name    string
		leaf    *x509.Certificate
		under   *x509.Certificate
		openssl string // what it says; empty if it accepts
	}{
		{"its own", own, authority, ""},
		{"its own, signed by hand", forged(web.String()), authority, ""},
		{"its own, under the production bundle", own, production, "unable to get local issuer certificate"},
		{"of production", forged("spiffe://prod.example/ns/shop/sa/web"), authority, "permitted subtree violation"},
		{"of a trust domain below", forged("spiffe://sub.example.test/ns/shop/sa/web"), authority, "subtree violation"},
		{"of a trust domain above", forged("spiffe://test/ns/shop/sa/web"), authority, "permitted subtree violation"},
		{"of a trust domain that ends alike", forged("spiffe://myexample.test/ns/shop/sa/web"), authority, "permitted subtree violation"},
	} {
		t.Run(test.name, func(t *testing.T) {
			roots := x509.NewCertPool()
			roots.AddCert(test.under)
			_, err := test.leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
			if (err == nil) != (test.openssl == "") {
				t.Errorf("Go: %v", err)
			}
			out, err := exec.CommandContext(t.Context(), "openssl", "verify",
				"-CAfile", writePEM(t, test.under.Raw), writePEM(t, test.leaf.Raw)).CombinedOutput()
			if (err == nil) != (test.openssl == "") || !strings.Contains(string(out), test.openssl) {
				t.Errorf("openssl: %v: %s", err, out)
			}
		})
	}
}

// keeping are Keys that remember what they made.
type keeping struct {
	ca.Keys
	made crypto.Signer
}

func (k *keeping) Create(ctx context.Context) (crypto.Signer, []byte, error) {
	key, handle, err := k.Keys.Create(ctx)
	k.made = key
	return key, handle, err
}
