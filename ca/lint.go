package ca

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
)

// lint returns an error if the certificate is not exactly the X509-SVID that was
// meant. It reads the parsed certificate and shares nothing with the code that
// assembled it, so that a mistake there is caught here, before it is signed.
func lint(c *x509.Certificate, l *leaf, authority *x509.Certificate) error {
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
	case c.URIs[0].String() != l.request.ID.String():
		return fmt.Errorf("URI SAN %q, not %q (X509-SVID §2)", c.URIs[0], l.request.ID)
	case len(c.URIs[0].String()) > 2048:
		return errors.New("SPIFFE ID longer than 2048 bytes (SPIFFE-ID §2.3)")
	case len(c.DNSNames)+len(c.EmailAddresses)+len(c.IPAddresses) != 0:
		return errors.New("SANs other than the URI")
	case !isCritical(c, oidSubjectAltName.String()):
		return errors.New("SAN not critical although the subject is empty (X509-SVID §3.1)")
	case !c.BasicConstraintsValid || c.IsCA:
		return errors.New("basic constraints do not say that this is no CA (X509-SVID §4.1)")
	case c.KeyUsage != x509.KeyUsageDigitalSignature:
		return errors.New("key usage is not digitalSignature alone (X509-SVID §4.3)")
	case !isCritical(c, oidKeyUsage.String()):
		return errors.New("key usage not critical (X509-SVID §4.3)")
	case len(c.ExtKeyUsage) != 2, c.ExtKeyUsage[0] != x509.ExtKeyUsageServerAuth, c.ExtKeyUsage[1] != x509.ExtKeyUsageClientAuth:
		return errors.New("extended key usage is not serverAuth and clientAuth (X509-SVID §4.4)")
	case len(c.UnknownExtKeyUsage) != 0, len(c.UnhandledCriticalExtensions) != 0:
		return errors.New("extensions that nobody asked for")

	case !c.NotBefore.Equal(l.notBefore), !c.NotAfter.Equal(l.notAfter):
		return errors.New("validity is not the one that will be recorded")
	case !c.NotBefore.Before(c.NotAfter):
		return errors.New("validity ends before it begins")
	case c.NotBefore.Before(authority.NotBefore), c.NotAfter.After(authority.NotAfter):
		return errors.New("validity is not within the authority's")
	}
	return nil
}

func isCritical(c *x509.Certificate, oid string) bool {
	for _, e := range c.Extensions {
		if e.Id.String() == oid {
			return e.Critical
		}
	}
	return false
}
