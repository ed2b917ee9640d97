package ca_test

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/ca"
	"troth.dev/troth/identity"
)

// Each rule fires, and by itself: every certificate here differs in one aspect
// from one that passes. Most are made by crypto/x509, which shares no code with
// the template; parsed is for those that it will not make.
func TestLint(t *testing.T) {
	authorityKey, key := newKey(t, p256), newKey(t, p256)
	now := time.Now().UTC().Truncate(time.Second)
	authority := selfSigned(t, &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, SubjectKeyId: []byte("authority"),
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, authorityKey)

	extension := func(critical bool, value []byte, oid ...int) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: oid, Critical: critical, Value: value})
		}
	}
	san := func(names ...string) func(*x509.Certificate) { // each with its tag
		var content []byte
		for _, name := range names {
			content = append(append(content, name[0], byte(len(name)-1)), name[1:]...)
		}
		return extension(true, append([]byte{0x30, byte(len(content))}, content...), 2, 5, 29, 17)
	}
	forTests := func(m *ca.Meant) { m.Authority = purposely(m.Authority, identity.TestPolicy) }
	const uri, dns, registeredID = "\x86", "\x82", "\x88"

	for _, test := range []struct {
		name     string
		template func(*x509.Certificate)
		parsed   func(*x509.Certificate)
		meant    func(*ca.Meant)
		want     string
	}{
		{name: "good"},
		{name: "version", parsed: func(c *x509.Certificate) { c.Version = 1 }, want: "version 1, not 3"},
		{name: "serial zero", template: func(c *x509.Certificate) { c.SerialNumber = big.NewInt(0) }, want: "serial number not positive"},
		{name: "serial negative", parsed: func(c *x509.Certificate) { c.SerialNumber = new(big.Int).Neg(c.SerialNumber) }, want: "serial number not positive"},
		{name: "serial of 21 octets", parsed: func(c *x509.Certificate) { c.SerialNumber = new(big.Int).Lsh(big.NewInt(1), 159) }, want: "within 20 octets"},
		{name: "serial of 119 bits", template: func(c *x509.Certificate) { c.SerialNumber = new(big.Int).Lsh(big.NewInt(1), 118) }, want: "fewer than 120 bits"},
		{name: "signature algorithm", template: func(c *x509.Certificate) { c.SignatureAlgorithm = x509.ECDSAWithSHA384 }, want: "signature algorithm ECDSA-SHA384"},
		{name: "issuer", parsed: func(c *x509.Certificate) { c.RawIssuer = []byte{0x30, 0} }, want: "issuer is not the authority's subject"},
		{name: "authority key identifier", parsed: func(c *x509.Certificate) { c.AuthorityKeyId = []byte("other") }, want: "authority key identifier is not"},
		{name: "public key", meant: func(m *ca.Meant) { m.SPKI = spkiOf(t, newKey(t, p256).Public()) }, want: "public key is not the one asked for"},
		{name: "subject", template: func(c *x509.Certificate) { c.Subject.CommonName = "web" }, want: "subject is not empty"},

		{name: "no URI", template: func(c *x509.Certificate) { c.URIs = nil; c.DNSNames = []string{"web"} }, want: "0 URI SANs, not one"},
		{name: "two URIs", template: func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }, want: "2 URI SANs, not one"},
		{name: "other URI", template: func(c *x509.Certificate) {
			c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.test", Path: "/ns/shop/sa/db"}}
		}, want: "is not \"" + web.String() + "\" alone"},
		{name: "scheme in capitals", template: san(uri + "SPIFFE" + strings.TrimPrefix(web.String(), "spiffe")), want: "alone"},
		{name: "empty fragment", template: san(uri + web.String() + "#"), want: "alone"},
		{name: "DNS name", template: func(c *x509.Certificate) { c.DNSNames = []string{"web"} }, want: "alone"},
		{name: "mail address", template: func(c *x509.Certificate) { c.EmailAddresses = []string{"a@b.test"} }, want: "alone"},
		{name: "IP address", template: func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(10, 0, 0, 1)} }, want: "alone"},
		{name: "name before the URI", template: san(dns+"web", uri+web.String()), want: "alone"},
		{name: "name of a kind Go does not know", template: san(uri+web.String(), registeredID+"\x2a"), want: "alone"},
		{name: "ID too long", template: func(c *x509.Certificate) { c.URIs[0].Path = longID.Path() },
			meant: func(m *ca.Meant) { m.ID = longID }, want: "SPIFFE ID longer than 2048 bytes"},
		{name: "SAN not critical", template: extension(false, append([]byte{0x30, byte(len(web.String()) + 2), 0x86, byte(len(web.String()))}, web.String()...), 2, 5, 29, 17),
			want: "SAN not critical"},

		{name: "CA", template: func(c *x509.Certificate) { c.IsCA = true }, want: "basic constraints do not say that this is no CA"},
		{name: "no basic constraints", template: func(c *x509.Certificate) { c.BasicConstraintsValid = false }, want: "basic constraints do not say that this is no CA"},
		{name: "certSign", template: func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }, want: "key usage is not digitalSignature alone"},
		{name: "no key usage", template: func(c *x509.Certificate) { c.KeyUsage = 0 }, want: "key usage is not digitalSignature alone"},
		{name: "key usage not critical", template: extension(false, []byte{3, 2, 7, 0x80}, 2, 5, 29, 15), want: "key usage not critical"},
		{name: "server only", template: func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }, want: "extended key usage is not"},
		{name: "client only", template: func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] }, want: "extended key usage is not"},
		{name: "client twice", template: func(c *x509.Certificate) { c.ExtKeyUsage[0] = x509.ExtKeyUsageClientAuth }, want: "extended key usage is not"},
		{name: "server twice", template: func(c *x509.Certificate) { c.ExtKeyUsage[1] = x509.ExtKeyUsageServerAuth }, want: "extended key usage is not"},
		{name: "any usage too", template: func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageAny) }, want: "extended key usage is not"},
		{name: "unknown usage too", template: func(c *x509.Certificate) { c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{{1, 2, 3}} }, want: "extended key usage is not"},
		{name: "no subject key identifier", template: func(c *x509.Certificate) { c.SubjectKeyId = nil }, want: "no subject key identifier"},
		{name: "one extension more", template: extension(false, []byte{5, 0}, 1, 2, 3), want: "7 extensions"},
		{name: "one critical extension more", template: extension(true, []byte{5, 0}, 1, 2, 3), want: "7 extensions"},

		{name: "any policy", template: policies(mustOID(t, "2.5.29.32.0")), want: "certificate policies under an authority that is not for tests"},
		{name: "for tests under one that is not", template: policies(identity.TestPolicy), want: "certificate policies under an authority that is not for tests"},
		{name: "for tests", template: policies(identity.TestPolicy), meant: forTests},
		{name: "not for tests under one that is", meant: forTests, want: "certificate policies are not the one of tests"},
		{name: "another policy under one for tests", template: policies(mustOID(t, "2.23.140.1.2.1")), meant: forTests, want: "certificate policies are not the one of tests"},
		{name: "a policy more under one for tests", template: policies(identity.TestPolicy, mustOID(t, "2.23.140.1.2.1")), meant: forTests, want: "certificate policies are not the one of tests"},
		{name: "one extension more under one for tests", template: func(c *x509.Certificate) {
			policies(identity.TestPolicy)(c)
			extension(false, []byte{5, 0}, 1, 2, 3)(c)
		}, meant: forTests, want: "8 extensions"},

		{name: "other start", template: func(c *x509.Certificate) { c.NotBefore = c.NotBefore.Add(time.Second) }, want: "validity is not the one that will be recorded"},
		{name: "other end", template: func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(-time.Second) }, want: "validity is not the one that will be recorded"},
		{name: "no duration", template: func(c *x509.Certificate) { c.NotAfter = c.NotBefore }, meant: func(m *ca.Meant) { m.NotAfter = m.NotBefore }, want: "validity ends before it begins"},
		{name: "before the authority", template: func(c *x509.Certificate) { c.NotBefore = authority.NotBefore.Add(-time.Second) },
			meant: func(m *ca.Meant) { m.NotBefore = authority.NotBefore.Add(-time.Second) }, want: "validity is not within the authority's"},
		{name: "after the authority", template: func(c *x509.Certificate) { c.NotAfter = authority.NotAfter.Add(time.Second) },
			meant: func(m *ca.Meant) { m.NotAfter = authority.NotAfter.Add(time.Second) }, want: "validity is not within the authority's"},
	} {
		t.Run(test.name, func(t *testing.T) {
			template := &x509.Certificate{
				SerialNumber: new(big.Int).Lsh(big.NewInt(1), 158), SubjectKeyId: []byte("leaf"),
				NotBefore: authority.NotBefore, NotAfter: authority.NotAfter,
				URIs:                  []*url.URL{web.URL()},
				KeyUsage:              x509.KeyUsageDigitalSignature,
				ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
				BasicConstraintsValid: true,
			}
			meant := ca.Meant{ID: web, SPKI: spkiOf(t, key.Public()), NotBefore: template.NotBefore, NotAfter: template.NotAfter, Authority: authority}
			if test.template != nil {
				test.template(template)
			}
			if test.meant != nil {
				test.meant(&meant)
			}
			der, err := x509.CreateCertificate(rand.Reader, template, authority, key.Public(), authorityKey)
			if err != nil {
				t.Fatal(err)
			}
			c, err := x509.ParseCertificate(der)
			if err != nil {
				t.Fatal(err)
			}
			if test.parsed != nil {
				test.parsed(c)
			}
			got := ""
			if err := ca.Lint(c, meant); err != nil {
				got = err.Error()
			}
			if (got == "") != (test.want == "") || !strings.Contains(got, test.want) {
				t.Errorf("Lint = %q, want %q", got, test.want)
			}
		})
	}
}

func policies(all ...x509.OID) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.Policies = all }
}

// purposely returns an authority as if it had been made with these policies.
func purposely(authority *x509.Certificate, all ...x509.OID) *x509.Certificate {
	again := *authority
	again.Policies = all
	return &again
}

func mustOID(t *testing.T, s string) x509.OID {
	t.Helper()
	oid, err := x509.ParseOID(s)
	if err != nil {
		t.Fatal(err)
	}
	return oid
}

var longID = spiffeid.RequireFromString("spiffe://example.test/" + strings.Repeat("a", 2048))

func selfSigned(t *testing.T, template *x509.Certificate, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}
