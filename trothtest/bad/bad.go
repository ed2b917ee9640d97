// Package bad is a gallery of bad certificates, for tests of whatever verifies
// X509-SVIDs: each is wrong in one way, and there is one for each way that is worth
// knowing.
//
// Start with [Certificates], which makes them afresh under an authority of the test's
// own. A verifier that trusts this authority and takes identities for tests has to
// refuse every one of them; what Troth's own says is in [Certificate.Code], and what
// others say, right or wrong, in [Certificate.Others]. docs/bad-certificates.md has
// the same as a table, which a test holds to what really happens.
package bad

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/handshake"
	"troth.dev/troth/identity"
)

// Authority is who signs the gallery: an authority of a trust domain for tests, as
// verifiers under test have it in their bundle.
type Authority struct {
	Certificate *x509.Certificate
	Key         crypto.Signer // ECDSA
}

// NewAuthority makes an authority of a trust domain for tests, of this process alone.
// Unlike those of package ca it permits authorities below it: under one that does not,
// certificates that have an intermediate are wrong in two ways, and verifiers may name
// the other one.
func NewAuthority(td spiffeid.TrustDomain) (Authority, error) {
	itself, err := newIssuer("authority of bad certificates")
	if err != nil {
		return Authority{}, fmt.Errorf("bad: %w", err)
	}
	g := &gallery{test: true}
	made, err := g.under(itself, itself, func(d *draft) {
		d.names(td.IDString())
		d.confine(td.Name(), "."+td.Name())
	})
	if err != nil {
		return Authority{}, fmt.Errorf("bad: %w", err)
	}
	certificate, err := x509.ParseCertificate(made.certificate)
	if err != nil {
		return Authority{}, fmt.Errorf("bad: %w", err)
	}
	return Authority{Certificate: certificate, Key: made.key}, nil
}

// Certificate is one bad certificate, with all that is needed to present it.
type Certificate struct {
	// Name is lower-case words with hyphens, and does not change.
	Name string
	// Chain is what a peer presents: DER, leaf first. Some of it nobody can parse.
	Chain [][]byte
	// Key is the leaf's. With a Chain as [tls.Certificate] has it, it makes a peer.
	Key crypto.Signer
	// Code is the reason that a handshake with such a peer stops for.
	Code handshake.Code
	// Reason says what is wrong, by which rule, in one sentence.
	Reason string
	// Unreadable says that TLS stops at it, and whoever only verifies parsed
	// certificates never sees it.
	Unreadable bool
	// Production says that only a verifier in production refuses it. One for tests
	// accepts it.
	Production bool
	// Others is what other verifiers say.
	Others Verdicts
}

// Verdicts is what verifiers that are not Troth's say of a certificate from a TLS
// client: the unchanging part of their complaint, or nothing if they accept it. They
// are right to accept what X.509 allows and SPIFFE does not, and wrong about the rest.
type Verdicts struct {
	// X509 is crypto/x509, as crypto/tls asks it about clients.
	X509 string
	// GoSPIFFE is x509svid.ParseAndVerify of go-spiffe.
	GoSPIFFE string
	// OpenSSLVerify is openssl verify -purpose sslclient of OpenSSL 3.
	OpenSSLVerify string
	// OpenSSLTLS is the alert of openssl s_server -verify_return_error of OpenSSL 3.
	OpenSSLTLS string
}

// Certificates makes the whole gallery, each certificate anew, in a fixed order. The
// leaves claim to be id wherever what is wrong with them permits it; id belongs to
// the trust domain of the authority. It fails if the authority cannot sign.
func Certificates(authority Authority, id spiffeid.ID) ([]Certificate, error) {
	if authority.Certificate == nil || authority.Key == nil {
		return nil, errors.New("bad: Certificate and Key of the authority are required")
	}
	if id.Path() == "" {
		return nil, fmt.Errorf("bad: %q is the ID of nobody", id)
	}
	by, err := authority.issuer()
	if err != nil {
		return nil, fmt.Errorf("bad: %w", err)
	}
	g := &gallery{authority: by, id: id, test: identity.IsTest(authority.Certificate)}
	all := make([]Certificate, 0, len(exhibits()))
	for _, e := range exhibits() {
		c := Certificate{
			Name: e.name, Code: e.code, Reason: e.reason, Unreadable: e.unreadable, Production: e.production, Others: e.others,
		}
		if c.Chain, c.Key, err = e.make(g); err != nil {
			return nil, fmt.Errorf("bad: make %s: %w", e.name, err)
		}
		all = append(all, c)
	}
	return all, nil
}

// gallery is what exhibits are made with.
type gallery struct {
	authority issuer
	id        spiffeid.ID
	test      bool // whether leaves say that they are for tests, as the authority does
}

// elsewhere is the same identity in another trust domain.
func (g *gallery) elsewhere() string { return "spiffe://elsewhere.test" + g.id.Path() }

// leaf returns a good leaf, for an exhibit to spoil.
func (g *gallery) leaf() (*draft, error) {
	d, err := newDraft()
	if err != nil {
		return nil, err
	}
	d.usage(digitalSignature)
	d.purposes(serverAuth, clientAuth)
	d.constraints(false, -1)
	d.names(g.id.String())
	if g.test {
		d.forTests()
	}
	return d, nil
}

// newIssuer returns a name and a key for it.
func newIssuer(name string) (issuer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return issuer{}, err
	}
	return issuer{subject: commonName(name), keyID: keyID(key), key: key}, nil
}

// under returns an authority with its certificate, signed by another or by itself.
// edit may spoil it.
func (g *gallery) under(above, itself issuer, edit func(*draft)) (issuer, error) {
	d, err := newDraft()
	if err != nil {
		return issuer{}, err
	}
	d.key, d.subject = itself.key, itself.subject
	d.identify()
	d.usage(keyCertSign, cRLSign)
	d.constraints(true, -1)
	if g.test {
		d.forTests()
	}
	if edit != nil {
		edit(d)
	}
	itself.certificate, err = d.sign(above)
	return itself, err
}

// below returns an authority below another one. edit may spoil it.
func (g *gallery) below(above issuer, name string, edit func(*draft)) (issuer, error) {
	itself, err := newIssuer(name)
	if err != nil {
		return issuer{}, err
	}
	return g.under(above, itself, edit)
}

// signed makes a leaf that edit has spoiled, signed by an issuer, and presents it with
// the certificates above.
func (g *gallery) signed(by issuer, edit func(*draft), above ...[]byte) ([][]byte, crypto.Signer, error) {
	d, err := g.leaf()
	if err != nil {
		return nil, nil, err
	}
	if edit != nil {
		edit(d)
	}
	der, err := d.sign(by)
	return append([][]byte{der}, above...), d.key, err
}

// chain makes a good leaf below an intermediate that edit has spoiled.
func (g *gallery) chain(edit func(*draft)) ([][]byte, crypto.Signer, error) {
	middle, err := g.below(g.authority, "intermediate", edit)
	if err != nil {
		return nil, nil, err
	}
	return g.signed(middle, nil, middle.certificate)
}

// replaced returns the ID's text with a part of it replaced.
func (g *gallery) replaced(old, by string) string { return strings.Replace(g.id.String(), old, by, 1) }
