package handshake

import (
	"bytes"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"troth.dev/troth/identity"
)

// maxChain is the most certificates that a peer may present. SPIFFE deployments
// have up to four. crypto/tls has bounded the message to 256 KiB before.
const maxChain = 10

// maxID is the longest SPIFFE ID that has to be supported (SPIFFE-ID §2.3).
const maxID = 2048

// Peer is an identity that was verified.
type Peer struct {
	ID spiffeid.ID
	// Expiry is when the chain, from leaf to authority, stops being valid.
	Expiry time.Time
	// Authority is the certificate of the trust bundle that the chain ends in.
	Authority *x509.Certificate
}

// Verify decides whether the chain of certificates, leaf first, is an X509-SVID
// that is valid at the time now and issued by an authority of its own trust
// domain (X509-SVID §5). The handshake calls it; call it again when the bundle
// of a live connection's peer changes. It does not prove that anybody holds the
// leaf's key.
//
// It refuses what was issued for tests ([identity.TestPolicy]), whatever is in the
// bundle: an authority for tests that was put there vouches for nobody.
//
// The error is an [*Error] with one of the certificate codes. The cheap rules
// come first: nothing is looked up or computed for a certificate that cannot be
// an SVID.
func Verify(chain []*x509.Certificate, bundles x509bundle.Source, now time.Time) (Peer, error) {
	return verify(chain, bundles, now, false)
}

// VerifyAcceptingTests is [Verify] for tests: it accepts what was issued for them
// too. Nothing that runs in production calls it.
func VerifyAcceptingTests(chain []*x509.Certificate, bundles x509bundle.Source, now time.Time) (Peer, error) {
	return verify(chain, bundles, now, true)
}

func verify(chain []*x509.Certificate, bundles x509bundle.Source, now time.Time, acceptTests bool) (Peer, error) {
	// 1. The leaf is formed like an SVID.
	if len(chain) == 0 {
		return Peer{}, refuse(CertificateMissing, spiffeid.ID{}, errors.New("no certificate"))
	}
	if len(chain) > maxChain {
		return Peer{}, refuse(ChainTooLong, spiffeid.ID{}, fmt.Errorf("%d certificates, more than %d", len(chain), maxChain))
	}
	leaf := chain[0]
	id, refusal := leafID(leaf)
	if refusal != nil {
		return Peer{}, refusal
	}
	if leaf.IsCA {
		return Peer{}, refuse(CAAsLeaf, id, errors.New("the certificate is an authority's"))
	}
	if err := checkKeyUsage(leaf); err != nil {
		return Peer{}, refuse(KeyUsage, id, err)
	}
	if leaf.SerialNumber.Sign() <= 0 {
		// RFC 5280 §4.1.2.2. Two such certificates have one name in every ledger.
		return Peer{}, refuse(CertificateInvalid, id, errors.New("the serial number is not positive"))
	}
	if err := checkKeys(chain); err != nil {
		return Peer{}, refuse(WeakKey, id, err)
	}
	if !acceptTests && identity.IsTest(leaf) {
		return Peer{}, refuse(TestIdentity, id, errors.New("the certificate was issued for tests"))
	}

	// 2. Its trust domain is known. Another domain's bundle must never vouch
	// for it (X509-SVID §5.1, SPIFFE Trust Domain and Bundle §4).
	bundle, err := bundles.GetX509BundleForTrustDomain(id.TrustDomain())
	if err != nil {
		return Peer{}, refuse(TrustDomainUnknown, id, err)
	}
	if bundle == nil || bundle.TrustDomain() != id.TrustDomain() {
		return Peer{}, refuse(TrustDomainUnknown, id, errors.New("the source has no bundle of this trust domain"))
	}

	// 3. A chain leads to the bundle, and all of it is valid now (RFC 5280 §6).
	authorities := bundle.X509Authorities()
	if err := checkAnchored(chain, authorities); err != nil {
		return Peer{}, refuse(CertificateUntrusted, id, err)
	}
	verified, err := leaf.Verify(x509.VerifyOptions{
		Roots:         pool(authorities),
		Intermediates: pool(chain[1:]),
		// An authority that is limited to other usages issues no SVIDs.
		KeyUsages:   []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		CurrentTime: now,
	})
	if err != nil {
		return Peer{}, refuse(chainCode(err, now), id, err)
	}
	// 4. No authority of it is for tests. Who has the key of one can sign a leaf
	// that does not say so.
	if !acceptTests && slices.ContainsFunc(verified, forTests) {
		return Peer{}, refuse(TestIdentity, id, errors.New("an authority of the chain is for tests"))
	}
	return lasting(id, verified), nil
}

// leafID returns the SPIFFE ID of a certificate, which has to have exactly one
// URI (X509-SVID §2) with a path (§5.2).
//
// The URI is read from the extension as it was signed: x509.Certificate has it
// parsed, and url.URL forgets an empty fragment and the case of the scheme, so
// that "SPIFFE://a/b#" would pass for "spiffe://a/b".
func leafID(leaf *x509.Certificate) (spiffeid.ID, *Error) {
	uris, err := uriNames(leaf)
	if err != nil {
		return spiffeid.ID{}, refuse(NotOneURI, spiffeid.ID{}, err)
	}
	if len(uris) != 1 {
		return spiffeid.ID{}, refuse(NotOneURI, spiffeid.ID{}, fmt.Errorf("%d URIs in the subject alternative name", len(uris)))
	}
	if len(uris[0]) > maxID {
		return spiffeid.ID{}, refuse(NotASPIFFEID, spiffeid.ID{}, fmt.Errorf("%d bytes, more than %d", len(uris[0]), maxID))
	}
	id, err := spiffeid.FromString(uris[0])
	if err != nil {
		return spiffeid.ID{}, refuse(NotASPIFFEID, spiffeid.ID{}, fmt.Errorf("%q: %w", uris[0], err))
	}
	if id.Path() == "" {
		return spiffeid.ID{}, refuse(NotASPIFFEID, id, errors.New("no path: the ID of a trust domain, not of a workload"))
	}
	return id, nil
}

// uriNames returns the URIs of a certificate's subject alternative name, byte
// for byte (RFC 5280 §4.2.1.6).
func uriNames(cert *x509.Certificate) ([]string, error) {
	malformed := errors.New("malformed subject alternative name")
	const uri = asn1.Tag(6) | 0x80 // uniformResourceIdentifier [6] IMPLICIT
	var uris []string
	for _, ext := range cert.Extensions {
		if !ext.Id.Equal([]int{2, 5, 29, 17}) {
			continue
		}
		var names cryptobyte.String
		value := cryptobyte.String(ext.Value)
		if !value.ReadASN1(&names, asn1.SEQUENCE) || !value.Empty() {
			return nil, malformed
		}
		for !names.Empty() {
			var name cryptobyte.String
			var tag asn1.Tag
			if !names.ReadAnyASN1(&name, &tag) {
				return nil, malformed
			}
			if tag == uri {
				uris = append(uris, string(name))
			}
		}
	}
	return uris, nil
}

// checkKeyUsage checks what the leaf's key may be used for: to sign, and never
// to sign certificates (X509-SVID §4.3); and, if it is limited to certain
// protocols at all, as client and as server (§4.4).
func checkKeyUsage(leaf *x509.Certificate) error {
	if leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return errors.New("no digitalSignature")
	}
	if leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 {
		return errors.New("keyCertSign or cRLSign on a leaf")
	}
	allows := func(usage x509.ExtKeyUsage) bool { return slices.Contains(leaf.ExtKeyUsage, usage) }
	limited := len(leaf.ExtKeyUsage)+len(leaf.UnknownExtKeyUsage) > 0
	if limited && !allows(x509.ExtKeyUsageAny) &&
		!(allows(x509.ExtKeyUsageClientAuth) && allows(x509.ExtKeyUsageServerAuth)) {
		return errors.New("extended key usage without both clientAuth and serverAuth")
	}
	return nil
}

// checkKeys refuses keys that can be broken, whoever signed them. crypto/x509 and
// crypto/tls take RSA of every size that can sign.
func checkKeys(chain []*x509.Certificate) error {
	const least = 2048 // NIST SP 800-131A
	for _, certificate := range chain {
		if key, ok := certificate.PublicKey.(*rsa.PublicKey); ok && key.N.BitLen() < least {
			return fmt.Errorf("RSA of %d bits, less than %d", key.N.BitLen(), least)
		}
	}
	return nil
}

// checkAnchored walks a chain with two or more intermediates from its far end,
// so that every signature is checked with a key that is trusted already. The
// chain has to be in order, as RFC 8446 §4.4.2 has it.
//
// x509 searches from the leaf up and uses whatever keys the peer made up: nine
// intermediates of one name, with P-521 keys, that sign each other in a ring
// cost 130 ms before they are refused. With one intermediate it cannot be made
// to check more than one such signature.
func checkAnchored(chain, authorities []*x509.Certificate) error {
	if len(chain) <= 2 {
		return nil
	}
	last := chain[len(chain)-1]
	signed := func(authority *x509.Certificate) bool {
		return bytes.Equal(authority.RawSubject, last.RawIssuer) && last.CheckSignatureFrom(authority) == nil
	}
	if !slices.ContainsFunc(authorities, signed) {
		return errors.New("no authority of the bundle signed the last intermediate")
	}
	for i := len(chain) - 2; i > 0; i-- {
		if err := chain[i].CheckSignatureFrom(chain[i+1]); err != nil {
			return fmt.Errorf("certificate %d is not signed by the next: %w", i, err)
		}
	}
	return nil
}

func forTests(chain []*x509.Certificate) bool { return slices.ContainsFunc(chain, identity.IsTest) }

// pool is never nil: x509 takes nil roots for the system's.
func pool(certs []*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, cert := range certs {
		p.AddCert(cert)
	}
	return p
}

func chainCode(err error, now time.Time) Code {
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return CertificateUntrusted
	}
	invalid, ok := errors.AsType[x509.CertificateInvalidError](err)
	switch {
	case ok && invalid.Reason == x509.Expired && now.Before(invalid.Cert.NotBefore):
		return CertificateNotYetValid
	case ok && invalid.Reason == x509.Expired:
		return CertificateExpired
	case ok && invalid.Reason == x509.IncompatibleUsage:
		return KeyUsage
	default:
		return CertificateInvalid
	}
}

// lasting returns the peer by the chain that lasts longest. A chain lasts as
// long as its first certificate to expire.
func lasting(id spiffeid.ID, chains [][]*x509.Certificate) Peer {
	peer := Peer{ID: id}
	for _, chain := range chains {
		until := slices.MinFunc(chain, func(a, b *x509.Certificate) int { return a.NotAfter.Compare(b.NotAfter) }).NotAfter
		if until.After(peer.Expiry) {
			peer.Expiry, peer.Authority = until, chain[len(chain)-1]
		}
	}
	return peer
}
