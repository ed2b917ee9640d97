package bad

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	_ "crypto/sha1" // of the one that is signed with it
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"strings"
	"time"

	"troth.dev/troth/handshake"
)

// exhibit is a bad certificate, and how it is made.
type exhibit struct {
	name       string
	code       handshake.Code
	reason     string
	make       func(*gallery) ([][]byte, crypto.Signer, error)
	others     Verdicts
	unreadable bool
	production bool
}

// spoiled makes a leaf under the authority, wrong in one way.
func spoiled(edit func(*gallery, *draft)) func(*gallery) ([][]byte, crypto.Signer, error) {
	return func(g *gallery) ([][]byte, crypto.Signer, error) {
		return g.signed(g.authority, func(d *draft) { edit(g, d) })
	}
}

// named makes a leaf with one URI, which is wrong.
func named(uri func(*gallery) string) func(*gallery) ([][]byte, crypto.Signer, error) {
	return spoiled(func(g *gallery, d *draft) { d.names(uri(g)) })
}

// middle makes a good leaf below an intermediate that is wrong in one way.
func middle(edit func(*gallery, *draft)) func(*gallery) ([][]byte, crypto.Signer, error) {
	return func(g *gallery) ([][]byte, crypto.Signer, error) {
		return g.chain(func(d *draft) { edit(g, d) })
	}
}

func commonName(text string) []byte {
	return encoded(pkix.Name{CommonName: text}.ToRDNSequence())
}

// bound of what TLS implementations read of certificates, in bytes: Go has 256 KiB,
// OpenSSL 100 KiB.
const huge = 300 << 10

// exhibits returns the gallery, in its order.
func exhibits() []exhibit {
	return []exhibit{
		{
			name: "expired", code: handshake.CertificateExpired,
			reason: "It ended a minute ago (RFC 5280 §4.1.2.5).",
			make:   spoiled(func(_ *gallery, d *draft) { d.notBefore, d.notAfter = ago(2*time.Hour), ago(time.Minute) }),
			others: Verdicts{
				X509:          "certificate has expired or is not yet valid",
				GoSPIFFE:      "certificate has expired or is not yet valid",
				OpenSSLVerify: "certificate has expired",
				OpenSSLTLS:    "expired certificate",
			},
		},
		{
			name: "not-yet-valid", code: handshake.CertificateNotYetValid,
			reason: "It begins in half an hour (RFC 5280 §4.1.2.5).",
			make:   spoiled(func(_ *gallery, d *draft) { d.notBefore = ago(-30 * time.Minute) }),
			others: Verdicts{
				X509:          "certificate has expired or is not yet valid",
				GoSPIFFE:      "certificate has expired or is not yet valid",
				OpenSSLVerify: "certificate is not yet valid",
				OpenSSLTLS:    "bad certificate",
			},
		},
		{
			name: "wrong-trust-domain", code: handshake.TrustDomainUnknown,
			reason: "It is of another trust domain, for which this authority does not speak (X509-SVID §5.1).",
			make:   named((*gallery).elsewhere),
			others: Verdicts{
				X509:          "not authorized to sign for this name",
				GoSPIFFE:      "no X.509 bundle found for trust domain",
				OpenSSLVerify: "permitted subtree violation",
				OpenSSLTLS:    "unknown certificate",
			},
		},
		{
			name: "two-uris", code: handshake.NotOneURI,
			reason: "It has two SPIFFE IDs (X509-SVID §2).",
			make:   spoiled(func(g *gallery, d *draft) { d.names(g.id.String(), g.id.String()+"-2") }),
			others: Verdicts{GoSPIFFE: "certificate contains more than one URI SAN"},
		},
		{
			name: "same-uri-twice", code: handshake.NotOneURI,
			reason: "It has its SPIFFE ID twice (X509-SVID §2).",
			make:   spoiled(func(g *gallery, d *draft) { d.names(g.id.String(), g.id.String()) }),
			others: Verdicts{GoSPIFFE: "certificate contains more than one URI SAN"},
		},
		{
			name: "uri-beside-the-id", code: handshake.NotOneURI,
			reason: "It has a web address beside its SPIFFE ID (X509-SVID §2).",
			make: spoiled(func(g *gallery, d *draft) {
				d.names(g.id.String(), "https://"+g.id.TrustDomain().Name()+"/")
			}),
			others: Verdicts{GoSPIFFE: "certificate contains more than one URI SAN"},
		},
		{
			name: "no-names", code: handshake.NotOneURI,
			reason: "It has no subject alternative name (X509-SVID §2).",
			make:   spoiled(func(_ *gallery, d *draft) { d.drop(standard(subjectAltName)) }),
			others: Verdicts{GoSPIFFE: "certificate contains no URI SAN"},
		},
		{
			name: "dns-name-only", code: handshake.NotOneURI,
			reason: "It has a DNS name and no SPIFFE ID (X509-SVID §2).",
			make: spoiled(func(g *gallery, d *draft) {
				d.set(standard(subjectAltName), true, []asn1.RawValue{name(dnsName, g.id.TrustDomain().Name())})
			}),
			others: Verdicts{GoSPIFFE: "certificate contains no URI SAN"},
		},
		{
			name: "common-name-only", code: handshake.NotOneURI,
			reason: "It has its SPIFFE ID as the common name of its subject, where nobody looks (X509-SVID §2).",
			make: spoiled(func(g *gallery, d *draft) {
				d.drop(standard(subjectAltName))
				d.subject = commonName(g.id.String())
			}),
			others: Verdicts{GoSPIFFE: "certificate contains no URI SAN"},
		},
		{
			name: "id-in-dns-name", code: handshake.NotOneURI,
			reason: "It has its SPIFFE ID as a DNS name, and no URI (X509-SVID §2).",
			make: spoiled(func(g *gallery, d *draft) {
				d.set(standard(subjectAltName), true, []asn1.RawValue{name(dnsName, g.id.String())})
			}),
			others: Verdicts{GoSPIFFE: "certificate contains no URI SAN"},
		},
		{
			name: "web-address", code: handshake.NotASPIFFEID,
			reason: "Its URI has another scheme than spiffe (SPIFFE-ID §2).",
			make:   named(func(g *gallery) string { return g.replaced("spiffe", "https") }),
			others: Verdicts{GoSPIFFE: "scheme is missing or invalid"},
		},
		{
			name: "upper-case-scheme", code: handshake.NotASPIFFEID,
			reason: "It spells the scheme in capitals, which makes two spellings of one ID (SPIFFE-ID §2).",
			make:   named(func(g *gallery) string { return g.replaced("spiffe", "SPIFFE") }),
		},
		{
			name: "upper-case-trust-domain", code: handshake.NotASPIFFEID,
			reason: "It spells the trust domain in capitals (SPIFFE-ID §2.1).",
			make: named(func(g *gallery) string {
				td := g.id.TrustDomain().Name()
				return g.replaced("//"+td, "//"+strings.ToUpper(td))
			}),
			others: Verdicts{
				GoSPIFFE: "trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores",
			},
		},
		{
			name: "no-path", code: handshake.NotASPIFFEID,
			reason: "It is the ID of the trust domain itself, which no workload has (X509-SVID §5.2).",
			make:   named(func(g *gallery) string { return g.id.TrustDomain().IDString() }),
		},
		{
			name: "trailing-slash", code: handshake.NotASPIFFEID,
			reason: "Its path ends in a slash (SPIFFE-ID §2.2).",
			make:   named(func(g *gallery) string { return g.id.String() + "/" }),
			others: Verdicts{GoSPIFFE: "path cannot have a trailing slash"},
		},
		{
			name: "dot-segment", code: handshake.NotASPIFFEID,
			reason: "Its path has a segment of two dots, which some take for the one above (SPIFFE-ID §2.2).",
			make:   named(func(g *gallery) string { return g.id.String() + "/x/.." }),
			others: Verdicts{GoSPIFFE: "path cannot contain dot segments"},
		},
		{
			name: "percent-encoding", code: handshake.NotASPIFFEID,
			reason: "Its path has a character in percent-encoding (SPIFFE-ID §2.2).",
			make:   named(func(g *gallery) string { return g.id.String() + "%61" }),
			others: Verdicts{GoSPIFFE: "path segment characters are limited to letters, numbers, dots, dashes, and underscores"},
		},
		{
			name: "user", code: handshake.NotASPIFFEID,
			reason: "It has a user before the trust domain (SPIFFE-ID §2.1).",
			make:   named(func(g *gallery) string { return g.replaced("//", "//me@") }),
			others: Verdicts{
				GoSPIFFE:      "trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores",
				OpenSSLVerify: "permitted subtree violation",
				OpenSSLTLS:    "unknown certificate",
			},
		},
		{
			name: "port", code: handshake.NotASPIFFEID,
			reason: "It has a port after the trust domain (SPIFFE-ID §2.1).",
			make: named(func(g *gallery) string {
				td := g.id.TrustDomain().Name()
				return g.replaced("//"+td, "//"+td+":443")
			}),
			others: Verdicts{
				GoSPIFFE: "trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores",
			},
		},
		{
			name: "query", code: handshake.NotASPIFFEID,
			reason: "It has a query (SPIFFE-ID §2).",
			make:   named(func(g *gallery) string { return g.id.String() + "?admin=true" }),
			others: Verdicts{GoSPIFFE: "path segment characters are limited to letters, numbers, dots, dashes, and underscores"},
		},
		{
			name: "fragment", code: handshake.NotASPIFFEID,
			reason: "It has a fragment (SPIFFE-ID §2).",
			make:   named(func(g *gallery) string { return g.id.String() + "#admin" }),
			others: Verdicts{GoSPIFFE: "path segment characters are limited to letters, numbers, dots, dashes, and underscores"},
		},
		{
			name: "empty-fragment", code: handshake.NotASPIFFEID,
			reason: "It has a fragment of no characters, which a parsed URL forgets (SPIFFE-ID §2).",
			make:   named(func(g *gallery) string { return g.id.String() + "#" }),
		},
		{
			name: "long-id", code: handshake.NotASPIFFEID,
			reason: "Its SPIFFE ID is longer than 2048 bytes (SPIFFE-ID §2.3).",
			make:   named(func(g *gallery) string { return g.id.String() + "/" + strings.Repeat("a", 2048) }),
		},
		{
			name: "nul-in-id", code: handshake.ProtocolError, unreadable: true,
			reason: "Its URI has a NUL, at which programs in C stop to read (RFC 3986 §2).",
			make:   named(func(g *gallery) string { return g.id.String() + "\x00.elsewhere" }),
			others: Verdicts{X509: "invalid control character in URL", GoSPIFFE: "invalid control character in URL"},
		},
		{
			name: "authority-as-leaf", code: handshake.CAAsLeaf,
			reason: "It says that it is an authority's (X509-SVID §4.1).",
			make:   spoiled(func(_ *gallery, d *draft) { d.constraints(true, -1) }),
			others: Verdicts{GoSPIFFE: "leaf certificate with CA flag set to true"},
		},
		{
			name: "no-key-usage", code: handshake.KeyUsage,
			reason: "It does not say what its key is for (X509-SVID §4.3).",
			make:   spoiled(func(_ *gallery, d *draft) { d.drop(standard(keyUsage)) }),
		},
		{
			name: "key-encipherment-only", code: handshake.KeyUsage,
			reason: "Its key is to encrypt others and not to sign (X509-SVID §4.3).",
			make:   spoiled(func(_ *gallery, d *draft) { d.usage(keyEncipherment) }),
			others: Verdicts{OpenSSLVerify: "unsuitable certificate purpose", OpenSSLTLS: "unsupported certificate"},
		},
		{
			name: "may-sign-certificates", code: handshake.KeyUsage,
			reason: "Its key may sign certificates, though it is no authority's (X509-SVID §4.3).",
			make:   spoiled(func(_ *gallery, d *draft) { d.usage(digitalSignature, keyCertSign) }),
			others: Verdicts{GoSPIFFE: "leaf certificate with KeyCertSign key usage"},
		},
		{
			name: "may-sign-revocations", code: handshake.KeyUsage,
			reason: "Its key may sign revocations (X509-SVID §4.3).",
			make:   spoiled(func(_ *gallery, d *draft) { d.usage(digitalSignature, cRLSign) }),
			others: Verdicts{GoSPIFFE: "leaf certificate with KeyCrlSign key usage"},
		},
		{
			name: "server-only", code: handshake.KeyUsage,
			reason: "It is limited to servers, and an SVID is for both ends (X509-SVID §4.4).",
			make:   spoiled(func(_ *gallery, d *draft) { d.purposes(serverAuth) }),
			others: Verdicts{
				X509:          "certificate specifies an incompatible key usage",
				OpenSSLVerify: "unsuitable certificate purpose",
				OpenSSLTLS:    "unsupported certificate",
			},
		},
		{
			name: "client-only", code: handshake.KeyUsage,
			reason: "It is limited to clients, and an SVID is for both ends (X509-SVID §4.4).",
			make:   spoiled(func(_ *gallery, d *draft) { d.purposes(clientAuth) }),
		},
		{
			name: "code-signing", code: handshake.KeyUsage,
			reason: "It is limited to the signing of programs (X509-SVID §4.4).",
			make:   spoiled(func(_ *gallery, d *draft) { d.purposes(codeSigning) }),
			others: Verdicts{
				X509:          "certificate specifies an incompatible key usage",
				OpenSSLVerify: "unsuitable certificate purpose",
				OpenSSLTLS:    "unsupported certificate",
			},
		},
		{
			name: "unknown-critical-extension", code: handshake.CertificateInvalid,
			reason: "It has a critical extension that nobody knows (RFC 5280 §4.2).",
			make: spoiled(func(_ *gallery, d *draft) {
				d.set(asn1.ObjectIdentifier{2, 25, 1}, true, asn1.NullRawValue)
			}),
			others: Verdicts{
				X509:          "unhandled critical extension",
				GoSPIFFE:      "unhandled critical extension",
				OpenSSLVerify: "unhandled critical extension",
				OpenSSLTLS:    "unknown certificate",
			},
		},
		{
			name: "duplicate-extension", code: handshake.ProtocolError, unreadable: true,
			reason: "It has two subject alternative names, of which one reader takes the first and another the last (RFC 5280 §4.2).",
			make: spoiled(func(g *gallery, d *draft) {
				d.extensions = append(d.extensions, pkix.Extension{
					Id: standard(subjectAltName), Value: encoded([]asn1.RawValue{name(uriName, g.id.String()+"-2")}),
				})
			}),
			others: Verdicts{
				X509:          "certificate contains duplicate extension",
				GoSPIFFE:      "certificate contains duplicate extension",
				OpenSSLVerify: "unable to get local issuer certificate",
				OpenSSLTLS:    "unknown certificate authority",
			},
		},
		{
			name: "zero-serial", code: handshake.CertificateInvalid,
			reason: "Its serial number is zero (RFC 5280 §4.1.2.2).",
			make:   spoiled(func(_ *gallery, d *draft) { d.serial = new(big.Int) }),
		},
		{
			name: "negative-serial", code: handshake.ProtocolError, unreadable: true,
			reason: "Its serial number is negative (RFC 5280 §4.1.2.2).",
			make:   spoiled(func(_ *gallery, d *draft) { d.serial = new(big.Int).Neg(d.serial) }),
			others: Verdicts{X509: "negative serial number", GoSPIFFE: "negative serial number"},
		},
		{
			name: "trailing-bytes", code: handshake.ProtocolError, unreadable: true,
			reason: "It is followed by a byte that belongs to nothing (RFC 5280 §4.1).",
			make: spoiled(func(_ *gallery, d *draft) {
				d.spoil = func(der []byte) []byte { return append(der, 0) }
			}),
			others: Verdicts{X509: "trailing data", GoSPIFFE: "trailing data", OpenSSLTLS: "error decoding message"},
		},
		{
			name: "huge", code: handshake.ProtocolError, unreadable: true,
			reason: "It has 300 KiB, by an extension that is of no use to anybody.",
			make: spoiled(func(_ *gallery, d *draft) {
				d.set(asn1.ObjectIdentifier{2, 25, 2}, false, make([]byte, huge))
			}),
			others: Verdicts{OpenSSLTLS: "illegal parameter"},
		},
		{
			name: "rsa-1024", code: handshake.WeakKey,
			reason: "Its key is RSA of 1024 bits, which can be broken (RFC 8446 leaves it to the verifier; NIST SP 800-131A disallows it).",
			make: func(g *gallery) ([][]byte, crypto.Signer, error) {
				key, err := rsa.GenerateKey(rand.Reader, 1024)
				if err != nil {
					return nil, nil, err
				}
				return g.signed(g.authority, func(d *draft) {
					d.key = key
					d.identify()
				})
			},
			others: Verdicts{OpenSSLTLS: "bad certificate"},
		},
		{
			name: "sha1", code: handshake.CertificateUntrusted,
			reason: "It is signed with SHA-1, under which two certificates can have one signature (RFC 9155).",
			make: spoiled(func(_ *gallery, d *draft) {
				d.inner, d.outer, d.hash = ecdsaWithSHA1(), ecdsaWithSHA1(), crypto.SHA1
			}),
			others: Verdicts{
				X509:       "cannot verify signature: insecure algorithm ECDSA-SHA1",
				GoSPIFFE:   "cannot verify signature: insecure algorithm ECDSA-SHA1",
				OpenSSLTLS: "bad certificate",
			},
		},
		{
			name: "algorithm-mismatch", code: handshake.ProtocolError, unreadable: true,
			reason: "What it says outside of how it is signed is not what was signed (RFC 5280 §4.1.1.2).",
			make:   spoiled(func(_ *gallery, d *draft) { d.inner = ecdsaWithSHA1() }),
			others: Verdicts{
				X509:          "inner and outer signature algorithm identifiers don't match",
				GoSPIFFE:      "inner and outer signature algorithm identifiers don't match",
				OpenSSLVerify: "certificate signature failure",
				OpenSSLTLS:    "error decrypting message",
			},
		},
		{
			name: "broken-signature", code: handshake.CertificateUntrusted,
			reason: "One bit of its signature is wrong (RFC 5280 §6.1.3).",
			make:   spoiled(func(_ *gallery, d *draft) { d.spoil = flipLast }),
			others: Verdicts{
				X509:          "ECDSA verification failure",
				GoSPIFFE:      "ECDSA verification failure",
				OpenSSLVerify: "certificate signature failure",
				OpenSSLTLS:    "error decrypting message",
			},
		},
		{
			name: "self-signed", code: handshake.CertificateUntrusted,
			reason: "It has the right name and was signed with its own key (RFC 5280 §6.1).",
			make: func(g *gallery) ([][]byte, crypto.Signer, error) {
				d, err := g.leaf()
				if err != nil {
					return nil, nil, err
				}
				der, err := d.sign(issuer{subject: d.subject, keyID: keyID(d.key), key: d.key})
				return [][]byte{der}, d.key, err
			},
			others: Verdicts{
				X509:          "certificate signed by unknown authority",
				GoSPIFFE:      "certificate signed by unknown authority",
				OpenSSLVerify: "self-signed certificate",
				OpenSSLTLS:    "unknown certificate authority",
			},
		},
		{
			name: "revoked-authority", code: handshake.CertificateUntrusted,
			reason: "The authority that signed it is not in the bundle any more (SPIFFE Trust Domain and Bundle §4.2).",
			make: func(g *gallery) ([][]byte, crypto.Signer, error) {
				former, err := newIssuer("former authority")
				if err != nil {
					return nil, nil, err
				}
				return g.signed(former, nil)
			},
			others: Verdicts{
				X509:          "certificate signed by unknown authority",
				GoSPIFFE:      "certificate signed by unknown authority",
				OpenSSLVerify: "unable to get local issuer certificate",
				OpenSSLTLS:    "unknown certificate authority",
			},
		},
		{
			name: "impostor-authority", code: handshake.CertificateUntrusted,
			reason: "It was signed by somebody who calls himself as the authority does, and has another key (RFC 5280 §6.1.3).",
			make: func(g *gallery) ([][]byte, crypto.Signer, error) {
				impostor, err := newIssuer("impostor")
				if err != nil {
					return nil, nil, err
				}
				impostor.subject, impostor.keyID = g.authority.subject, g.authority.keyID
				return g.signed(impostor, nil)
			},
			others: Verdicts{
				X509:          "ECDSA verification failure",
				GoSPIFFE:      "ECDSA verification failure",
				OpenSSLVerify: "certificate signature failure",
				OpenSSLTLS:    "error decrypting message",
			},
		},
		{
			name: "signed-by-a-leaf", code: handshake.CertificateUntrusted,
			reason: "It was signed by a workload, which is no authority (RFC 5280 §6.1.4 k).",
			make: middle(func(g *gallery, d *draft) {
				d.usage(digitalSignature)
				d.constraints(false, -1)
				d.names(g.id.String() + "-2")
			}),
			others: Verdicts{
				X509:          "invalid signature: parent certificate cannot sign this kind of certificate",
				GoSPIFFE:      "invalid signature: parent certificate cannot sign this kind of certificate",
				OpenSSLVerify: "invalid CA certificate",
				OpenSSLTLS:    "unknown certificate authority",
			},
		},
		{
			name: "missing-intermediate", code: handshake.CertificateUntrusted,
			reason: "The intermediate that signed it is not presented (RFC 8446 §4.4.2).",
			make: func(g *gallery) ([][]byte, crypto.Signer, error) {
				chain, key, err := g.chain(nil)
				return chain[:min(len(chain), 1)], key, err
			},
			others: Verdicts{
				X509:          "certificate signed by unknown authority",
				GoSPIFFE:      "certificate signed by unknown authority",
				OpenSSLVerify: "unable to get local issuer certificate",
				OpenSSLTLS:    "unknown certificate authority",
			},
		},
		{
			name: "expired-intermediate", code: handshake.CertificateExpired,
			reason: "The intermediate that signed it ended a minute ago (RFC 5280 §6.1.3).",
			make:   middle(func(_ *gallery, d *draft) { d.notBefore, d.notAfter = ago(2*time.Hour), ago(time.Minute) }),
			others: Verdicts{
				X509:          "certificate has expired or is not yet valid",
				GoSPIFFE:      "certificate has expired or is not yet valid",
				OpenSSLVerify: "certificate has expired",
				OpenSSLTLS:    "expired certificate",
			},
		},
		{
			name: "intermediate-may-not-sign", code: handshake.CertificateUntrusted,
			reason: "The key of the intermediate is not for signing certificates (RFC 5280 §6.1.4 n).",
			make:   middle(func(_ *gallery, d *draft) { d.usage(digitalSignature) }),
			others: Verdicts{
				X509:          "invalid signature: parent certificate cannot sign this kind of certificate",
				GoSPIFFE:      "invalid signature: parent certificate cannot sign this kind of certificate",
				OpenSSLVerify: "invalid CA certificate",
				OpenSSLTLS:    "unknown certificate authority",
			},
		},
		{
			name: "intermediate-for-code-signing", code: handshake.KeyUsage,
			reason: "The intermediate is limited to the signing of programs, so that what is below it is (RFC 5280 §4.2.1.12).",
			make:   middle(func(_ *gallery, d *draft) { d.purposes(codeSigning) }),
			others: Verdicts{
				X509:          "certificate specifies an incompatible key usage",
				OpenSSLVerify: "unsuitable certificate purpose",
				OpenSSLTLS:    "unsupported certificate",
			},
		},
		{
			name: "name-constraint", code: handshake.CertificateInvalid,
			reason: "The intermediate may speak for another trust domain only (RFC 5280 §4.2.1.10).",
			make: middle(func(_ *gallery, d *draft) {
				d.confine("elsewhere.test", ".elsewhere.test")
			}),
			others: Verdicts{
				X509:          "not authorized to sign for this name",
				GoSPIFFE:      "not authorized to sign for this name",
				OpenSSLVerify: "permitted subtree violation",
				OpenSSLTLS:    "unknown certificate",
			},
		},
		{
			name: "path-too-long", code: handshake.CertificateInvalid,
			reason: "An intermediate that may have no authority below it has one (RFC 5280 §4.2.1.9).",
			make: func(g *gallery) ([][]byte, crypto.Signer, error) {
				upper, err := g.below(g.authority, "upper intermediate", func(d *draft) { d.constraints(true, 0) })
				if err != nil {
					return nil, nil, err
				}
				lower, err := g.below(upper, "lower intermediate", nil)
				if err != nil {
					return nil, nil, err
				}
				return g.signed(lower, nil, lower.certificate, upper.certificate)
			},
			others: Verdicts{
				X509:          "too many intermediates for path length constraint",
				GoSPIFFE:      "too many intermediates for path length constraint",
				OpenSSLVerify: "path length constraint exceeded",
				OpenSSLTLS:    "unknown certificate authority",
			},
		},
		{
			name: "wrong-order", code: handshake.CertificateUntrusted,
			reason: "Its intermediates are presented upside down (RFC 8446 §4.4.2).",
			make: func(g *gallery) ([][]byte, crypto.Signer, error) {
				upper, err := g.below(g.authority, "upper intermediate", nil)
				if err != nil {
					return nil, nil, err
				}
				lower, err := g.below(upper, "lower intermediate", nil)
				if err != nil {
					return nil, nil, err
				}
				return g.signed(lower, nil, upper.certificate, lower.certificate)
			},
		},
		{
			name: "too-many-certificates", code: handshake.ChainTooLong,
			reason: "It comes with ten more that it does not need, more than anybody has to look at.",
			make: func(g *gallery) ([][]byte, crypto.Signer, error) {
				var above [][]byte
				for range 10 {
					above = append(above, g.authority.certificate)
				}
				return g.signed(g.authority, nil, above...)
			},
		},
		{
			name: "test-identity", code: handshake.TestIdentity, production: true,
			reason: "It is good, and was issued for tests: its policy says so, and whoever runs in production refuses it.",
			make:   spoiled(func(_ *gallery, d *draft) { d.forTests() }),
		},
	}
}

func ago(d time.Duration) time.Time { return time.Now().UTC().Truncate(time.Second).Add(-d) }
