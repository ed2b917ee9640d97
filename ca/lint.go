package ca

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"troth.dev/troth/identity"
)

// lint returns an error if the certificate is not exactly the X509-SVID that was
// meant. It reads the parsed certificate and shares nothing with the code that
// assembled it, so that a mistake there is caught here, before it is signed. The
// authority is the first of the path to its trust anchor.
func lint(c *x509.Certificate, l *leaf, path []*x509.Certificate) error {
	authority := path[0]
	extensions := 6
	if identity.IsTest(authority) {
		extensions = 7
	}
	switch {
	case c.Version != 3:
		return fmt.Errorf("version %d, not 3 (RFC 5280 §4.1.2.1)", c.Version)
	case c.SerialNumber.Sign() <= 0, c.SerialNumber.BitLen() > 159:
		return errors.New("serial number not positive and within 20 octets (RFC 5280 §4.1.2.2)")
	case c.SerialNumber.BitLen() < 120:
		return errors.New("serial number with fewer than 120 bits")
	case c.SignatureAlgorithm != x509.ECDSAWithSHA256:
		return fmt.Errorf("signature algorithm %v", c.SignatureAlgorithm)
	case !bytes.Equal(c.RawIssuer, authority.RawSubject):
		return errors.New("issuer is not the authority's subject (RFC 5280 §4.1.2.4)")
	case !bytes.Equal(c.AuthorityKeyId, authority.SubjectKeyId):
		return errors.New("authority key identifier is not the authority's (RFC 5280 §4.2.1.1)")
	case !bytes.Equal(c.RawSubjectPublicKeyInfo, l.spki):
		return errors.New("public key is not the one asked for")
	case len(c.Subject.Names) != 0:
		return errors.New("subject is not empty")

	case len(c.URIs) != 1:
		return fmt.Errorf("%d URI SANs, not one (X509-SVID §2)", len(c.URIs))
	case !isOnlyName(c, l.request.ID.String()):
		return fmt.Errorf("SAN is not %q alone (X509-SVID §2)", l.request.ID)
	case len(l.request.ID.String()) > 2048:
		return errors.New("SPIFFE ID longer than 2048 bytes (SPIFFE-ID §2.3)")
	case !extension(c, oidSubjectAltName).Critical:
		return errors.New("SAN not critical although the subject is empty (X509-SVID §3.1)")
	case !c.BasicConstraintsValid || c.IsCA:
		return errors.New("basic constraints do not say that this is no CA (X509-SVID §4.1)")
	case c.KeyUsage != x509.KeyUsageDigitalSignature:
		return errors.New("key usage is not digitalSignature alone (X509-SVID §4.3)")
	case !extension(c, oidKeyUsage).Critical:
		return errors.New("key usage not critical (X509-SVID §4.3)")
	case len(c.ExtKeyUsage) != 2, len(c.UnknownExtKeyUsage) != 0,
		c.ExtKeyUsage[0] != x509.ExtKeyUsageServerAuth, c.ExtKeyUsage[1] != x509.ExtKeyUsageClientAuth:
		return errors.New("extended key usage is not serverAuth and clientAuth (X509-SVID §4.4)")
	case len(c.SubjectKeyId) == 0:
		return errors.New("no subject key identifier (RFC 5280 §4.2.1.2)")
	case identity.IsTest(authority) && (len(c.Policies) != 1 || !identity.IsTest(c)):
		return errors.New("certificate policies are not the one of tests, under an authority for tests")
	case !identity.IsTest(authority) && len(c.Policies) != 0:
		return errors.New("certificate policies under an authority that is not for tests")
	case len(c.Extensions) != extensions:
		return fmt.Errorf("%d extensions, not the %d of the rules above", len(c.Extensions), extensions)

	case !c.NotBefore.Equal(l.notBefore), !c.NotAfter.Equal(l.notAfter):
		return errors.New("validity is not the one that will be recorded")
	case !c.NotBefore.Before(c.NotAfter):
		return errors.New("validity ends before it begins")
	}
	for _, above := range path {
		if c.NotBefore.Before(above.NotBefore) || c.NotAfter.After(above.NotAfter) {
			return errors.New("validity is not within the authority's")
		}
	}
	return nil
}

// isOnlyName says whether the SAN is this URI and nothing else. It reads what
// will be signed: the parsed certificate leaves out kinds of names that Go does
// not know, and a url.URL forgets an empty fragment and the case of the scheme.
func isOnlyName(c *x509.Certificate, uri string) bool {
	san := cryptobyte.String(extension(c, oidSubjectAltName).Value)
	var names, name cryptobyte.String
	return san.ReadASN1(&names, cbasn1.SEQUENCE) && san.Empty() &&
		names.ReadASN1(&name, tagURI) && names.Empty() &&
		string(name) == uri
}

// extension returns the extension of this kind, or the zero one. Kinds do not
// repeat: the parser sees to that.
func extension(c *x509.Certificate, oid asn1.ObjectIdentifier) pkix.Extension {
	for _, e := range c.Extensions {
		if e.Id.Equal(oid) {
			return e
		}
	}
	return pkix.Extension{}
}
