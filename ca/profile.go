package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"troth.dev/troth/identity"
	"troth.dev/troth/storage"
)

// ProfileConfig shapes X509-SVIDs.
type ProfileConfig struct {
	// Life is how long an SVID is valid from its issuance; 0 means one hour. At
	// least ten seconds and at most 24 hours.
	Life time.Duration
	// Backdate is how long before its issuance an SVID begins to be valid, for
	// verifiers whose clock is behind; 0 means one minute. At most one hour.
	Backdate time.Duration
}

// Profile decides everything in a certificate that is not the identity and the
// public key. It is valid by construction.
type Profile struct {
	life, backdate time.Duration
}

// NewProfile checks the config and returns the profile it describes.
func NewProfile(c ProfileConfig) (*Profile, error) {
	if c.Life == 0 {
		c.Life = time.Hour
	}
	if c.Backdate == 0 {
		c.Backdate = time.Minute
	}
	if c.Life < 10*time.Second || c.Life > maxLife {
		return nil, fmt.Errorf("ca: SVIDs that live %v: the life is from 10s to 24h", c.Life)
	}
	if c.Backdate < 0 || c.Backdate > time.Hour {
		return nil, fmt.Errorf("ca: SVIDs backdated by %v: it is from 0 to 1h", c.Backdate)
	}
	return &Profile{life: c.Life, backdate: c.Backdate}, nil
}

// minLife is what is left to use after all is rounded to the second.
const minLife = 2 * time.Second

// maxLife bounds the life of every SVID of every replica, whatever its profile.
const maxLife = 24 * time.Hour

// MaxCSR is the largest certificate request that is looked at, in bytes.
const MaxCSR = 4 << 10

// publicKey takes from a PKCS #10 request the two things that are taken from it:
// the public key, and the proof that the sender holds its private half.
func publicKey(der []byte) (spki []byte, err error) {
	if len(der) > MaxCSR {
		return nil, &Error{Reason: CSRTooLarge, Err: fmt.Errorf("a request of %d bytes; the limit is %d", len(der), MaxCSR)}
	}
	request, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, &Error{Reason: CSRMalformed, Err: err}
	}
	if err := checkKey(request.PublicKey); err != nil {
		return nil, &Error{Reason: CSRKeyType, Err: err}
	}
	if spki, err = canonical(request); err != nil {
		return nil, err
	}
	// CheckSignature lets SHA-1 pass, in requests alone.
	if a := request.SignatureAlgorithm; a == x509.SHA1WithRSA || a == x509.ECDSAWithSHA1 {
		return nil, &Error{Reason: CSRSignature, Err: fmt.Errorf("signed with %v", a)}
	}
	if err := request.CheckSignature(); err != nil {
		return nil, &Error{Reason: CSRSignature, Err: err}
	}
	return spki, nil
}

// p256Prefix is what stands before the point in the one encoding of a P-256 key
// (RFC 5480 §2): ecPublicKey, the curve's name, and that the point is not
// compressed.
const p256Prefix = "\x30\x59\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01" +
	"\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x03\x42\x00\x04"

// canonical returns the request's public key in its only encoding. The parser
// overlooks elements after the key, of any content, which would be signed with it.
func canonical(request *x509.CertificateRequest) (spki []byte, err error) {
	const p256Size = 91
	given := request.RawSubjectPublicKeyInfo
	if len(given) == p256Size && string(given[:len(p256Prefix)]) == p256Prefix {
		return given, nil // nearly all keys: to encode them again costs 5 us
	}
	if spki, err = x509.MarshalPKIXPublicKey(request.PublicKey); err != nil {
		return nil, &Error{Reason: CSRKeyType, Err: err}
	}
	if !bytes.Equal(spki, given) {
		return nil, &Error{Reason: CSRMalformed, Err: errors.New("the public key is not in its only encoding")}
	}
	return spki, nil
}

// checkKey comes before the signature is verified: an RSA key of a million bits
// must cost nothing.
func checkKey(public crypto.PublicKey) error {
	switch key := public.(type) {
	case *ecdsa.PublicKey:
		if key.Curve != elliptic.P256() && key.Curve != elliptic.P384() {
			return fmt.Errorf("ECDSA on %s; P-256 and P-384 are accepted", key.Curve.Params().Name)
		}
	case ed25519.PublicKey:
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits < 2048 || bits > 4096 {
			return fmt.Errorf("RSA of %d bits; 2048 to 4096 are accepted", bits)
		}
		if key.E < 65537 {
			return errors.New("RSA with a public exponent below 65537")
		}
	default:
		return fmt.Errorf("a key of type %T", public)
	}
	return nil
}

// Object identifiers of what the profile puts into a certificate (RFC 5280
// §4.2.1, RFC 5758 §3.2).
var (
	oidECDSAWithSHA256     = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}
	oidSubjectKeyID        = asn1.ObjectIdentifier{2, 5, 29, 14}
	oidKeyUsage            = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidSubjectAltName      = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidBasicConstraints    = asn1.ObjectIdentifier{2, 5, 29, 19}
	oidNameConstraints     = asn1.ObjectIdentifier{2, 5, 29, 30}
	oidCertificatePolicies = asn1.ObjectIdentifier{2, 5, 29, 32}
	oidAuthorityKeyID      = asn1.ObjectIdentifier{2, 5, 29, 35}
	oidExtendedKeyUsage    = asn1.ObjectIdentifier{2, 5, 29, 37}
	oidServerAuth          = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 1}
	oidClientAuth          = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 2}
	tagURI                 = cbasn1.Tag(6).ContextSpecific()
	tagKeyIdentifier       = cbasn1.Tag(0).ContextSpecific()
	tagVersion             = cbasn1.Tag(0).ContextSpecific().Constructed()
	tagExtensions          = cbasn1.Tag(3).ContextSpecific().Constructed()
	keyUsageDigitalSign    = []byte{7, 0x80} // BIT STRING content: 7 unused bits, bit 0
	emptySequence          = []byte{0x30, 0x00}
	placeholderForLintOnly = []byte{0}
)

const (
	certificateVersion3 = 2    // RFC 5280 §4.1.2.1 counts from 0
	generalizedTimeFrom = 2050 // RFC 5280 §4.1.2.5
)

// Room for what most certificates need, in bytes; a longer one grows.
const (
	sizeOfMost      = 768
	sizeOfSignature = 128
)

// leaf is one certificate on its way through Issue.
type leaf struct {
	request   Request
	spki      []byte
	serial    []byte
	notBefore time.Time
	notAfter  time.Time
	record    storage.Issuance
	tbs       []byte
	draft     *x509.Certificate // tbs under a signature that is none
}

// template assembles the part of the certificate that is signed. x509.CreateCertificate
// would do the same by reflection, and verify its own signature, which Issue does
// again as a peer: together that was half as much CPU again for each certificate.
func (p *Profile) template(l *leaf, by *signer) ([]byte, error) {
	b := cryptobyte.NewBuilder(make([]byte, 0, sizeOfMost))
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(tagVersion, func(b *cryptobyte.Builder) { b.AddASN1Int64(certificateVersion3) })
		b.AddASN1(cbasn1.INTEGER, func(b *cryptobyte.Builder) { b.AddBytes(l.serial) })
		addSignatureAlgorithm(b)
		b.AddBytes(by.certificate.RawSubject)
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
			addTime(b, l.notBefore)
			addTime(b, l.notAfter)
		})
		b.AddBytes(emptySequence) // no subject: the identity is the URI
		b.AddBytes(l.spki)
		b.AddASN1(tagExtensions, func(b *cryptobyte.Builder) {
			b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddBytes(by.extensions)
				addOwnExtensions(b, l)
			})
		})
	})
	return b.Bytes()
}

const critical = true

// commonExtensions returns those extensions that do not depend on the leaf.
func commonExtensions(authority *x509.Certificate) ([]byte, error) {
	var b cryptobyte.Builder
	// SPIFFE X509-SVID §4.3: digitalSignature, critical.
	addExtension(&b, oidKeyUsage, critical, func(b *cryptobyte.Builder) {
		b.AddASN1(cbasn1.BIT_STRING, func(b *cryptobyte.Builder) { b.AddBytes(keyUsageDigitalSign) })
	})
	// §4.4: both, or a peer in the other role refuses it.
	addExtension(&b, oidExtendedKeyUsage, !critical, func(b *cryptobyte.Builder) {
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1ObjectIdentifier(oidServerAuth)
			b.AddASN1ObjectIdentifier(oidClientAuth)
		})
	})
	// §4.1: cA is false, which DER encodes by leaving it out.
	addExtension(&b, oidBasicConstraints, critical, func(b *cryptobyte.Builder) { b.AddBytes(emptySequence) })
	addExtension(&b, oidAuthorityKeyID, !critical, func(b *cryptobyte.Builder) {
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1(tagKeyIdentifier, func(b *cryptobyte.Builder) { b.AddBytes(authority.SubjectKeyId) })
		})
	})
	if identity.IsTest(authority) {
		policy, err := identity.TestPolicy.MarshalBinary()
		if err != nil {
			return nil, err
		}
		// RFC 5280 §4.2.1.4: one policy, without qualifiers. Not critical: verifiers
		// that know nothing of it are stopped by what they trust.
		addExtension(&b, oidCertificatePolicies, !critical, func(b *cryptobyte.Builder) {
			b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
					b.AddASN1(cbasn1.OBJECT_IDENTIFIER, func(b *cryptobyte.Builder) { b.AddBytes(policy) })
				})
			})
		})
	}
	return b.Bytes()
}

func addOwnExtensions(b *cryptobyte.Builder, l *leaf) {
	addExtension(b, oidSubjectKeyID, !critical, func(b *cryptobyte.Builder) {
		b.AddASN1OctetString(subjectKeyID(l.spki))
	})
	// §2: exactly one URI. §3.1: critical, because the subject is empty.
	addExtension(b, oidSubjectAltName, critical, func(b *cryptobyte.Builder) {
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1(tagURI, func(b *cryptobyte.Builder) { b.AddBytes([]byte(l.request.ID.String())) })
		})
	})
}

func addExtension(b *cryptobyte.Builder, oid asn1.ObjectIdentifier, critical bool, value func(*cryptobyte.Builder)) {
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(oid)
		if critical {
			b.AddASN1Boolean(true)
		}
		b.AddASN1(cbasn1.OCTET_STRING, value)
	})
}

func addSignatureAlgorithm(b *cryptobyte.Builder) {
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) { b.AddASN1ObjectIdentifier(oidECDSAWithSHA256) })
}

func addTime(b *cryptobyte.Builder, t time.Time) {
	if t.Year() < generalizedTimeFrom {
		b.AddASN1UTCTime(t)
	} else {
		b.AddASN1GeneralizedTime(t)
	}
}

// assemble joins what is signed with its signature.
func assemble(tbs, signature []byte) ([]byte, error) {
	b := cryptobyte.NewBuilder(make([]byte, 0, len(tbs)+sizeOfSignature))
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(tbs)
		addSignatureAlgorithm(b)
		b.AddASN1BitString(signature)
	})
	return b.Bytes()
}
