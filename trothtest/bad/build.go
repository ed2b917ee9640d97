package bad

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"

	"troth.dev/troth/identity"
)

// draft is a certificate on its way. It is assembled here, because
// x509.CreateCertificate refuses to make much of what a gallery has to have.
type draft struct {
	serial              *big.Int
	inner, outer        asn1.ObjectIdentifier // signature algorithm, as signed and as said outside
	hash                crypto.Hash
	notBefore, notAfter time.Time
	subject             []byte // DER
	key                 crypto.Signer
	extensions          []pkix.Extension
	// spoil, if it is there, changes what was signed.
	spoil func(der []byte) []byte
}

// issuer is a certificate that others are signed with.
type issuer struct {
	certificate []byte // DER
	subject     []byte // DER
	keyID       []byte
	key         crypto.Signer
}

// Extensions and algorithms by number (RFC 5280 §4.2.1, RFC 5758 §3.2).
const (
	subjectKeyID     = 14
	keyUsage         = 15
	subjectAltName   = 17
	basicConstraints = 19
	nameConstraints  = 30
	policies         = 32
	authorityKeyID   = 35
	extendedKeyUsage = 37
)

func standard(number int) asn1.ObjectIdentifier { return asn1.ObjectIdentifier{2, 5, 29, number} }

func ecdsaWithSHA256() asn1.ObjectIdentifier { return asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2} }
func ecdsaWithSHA1() asn1.ObjectIdentifier   { return asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 1} }

// Purposes (RFC 5280 §4.2.1.12).
const (
	serverAuth  = 1
	clientAuth  = 2
	codeSigning = 3
)

// Bits of the key usage (RFC 5280 §4.2.1.3).
const (
	digitalSignature = 0
	keyEncipherment  = 2
	keyCertSign      = 5
	cRLSign          = 6
)

// set adds an extension, or puts it into the place of the one of its kind.
func (d *draft) set(oid asn1.ObjectIdentifier, critical bool, value any) {
	d.drop(oid)
	d.extensions = append(d.extensions, pkix.Extension{Id: oid, Critical: critical, Value: encoded(value)})
}

func (d *draft) drop(oid asn1.ObjectIdentifier) {
	d.extensions = slices.DeleteFunc(d.extensions, func(e pkix.Extension) bool { return e.Id.Equal(oid) })
}

func (d *draft) usage(bits ...int) {
	field := make([]byte, 2)
	highest := 0
	for _, bit := range bits {
		field[bit/8] |= 0x80 >> (bit % 8)
		highest = max(highest, bit)
	}
	d.set(standard(keyUsage), true, asn1.BitString{Bytes: field[:highest/8+1], BitLength: highest + 1})
}

func (d *draft) purposes(numbers ...int) {
	var all []asn1.ObjectIdentifier
	for _, number := range numbers {
		all = append(all, asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, number})
	}
	d.set(standard(extendedKeyUsage), false, all)
}

// constraints are the basic ones. Less than nothing is no limit of the path.
func (d *draft) constraints(authority bool, path int) {
	d.set(standard(basicConstraints), true, struct {
		CA   bool `asn1:"optional"`
		Path int  `asn1:"optional,default:-1"`
	}{authority, path})
}

// Kinds of names (RFC 5280 §4.2.1.6).
const (
	dnsName = 2
	uriName = 6
)

// names are those of the subject: a URI each, unless they are said to be else.
func (d *draft) names(uris ...string) {
	var all []asn1.RawValue
	for _, uri := range uris {
		all = append(all, name(uriName, uri))
	}
	d.set(standard(subjectAltName), true, all)
}

func name(kind int, text string) asn1.RawValue {
	return asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: kind, Bytes: []byte(text)}
}

func (d *draft) forTests() {
	policy, err := identity.TestPolicy.MarshalBinary()
	if err != nil {
		panic(err) // it is a constant
	}
	oid := asn1.RawValue{Tag: asn1.TagOID, Bytes: policy}
	d.set(standard(policies), false, []struct{ ID asn1.RawValue }{{oid}})
}

// confine lets an authority speak for one host, and not for those below it: of a
// constraint without a leading period Go thinks otherwise (RFC 5280 §4.2.1.10).
func (d *draft) confine(permitted, excluded string) {
	type subtree struct{ Base asn1.RawValue }
	d.set(standard(nameConstraints), true, struct {
		Permitted []subtree `asn1:"tag:0"`
		Excluded  []subtree `asn1:"tag:1"`
	}{[]subtree{{name(uriName, permitted)}}, []subtree{{name(uriName, excluded)}}})
}

// encoded panics on what is written wrong in this package.
func encoded(value any) []byte {
	der, err := asn1.Marshal(value)
	if err != nil {
		panic(err)
	}
	return der
}

// sign returns the certificate, signed by an issuer.
func (d *draft) sign(by issuer) ([]byte, error) {
	spki, err := x509.MarshalPKIXPublicKey(d.key.Public())
	if err != nil {
		return nil, err
	}
	d.set(standard(authorityKeyID), false, struct {
		ID []byte `asn1:"tag:0"`
	}{by.keyID})
	tbs, err := asn1.Marshal(struct {
		Version    int `asn1:"explicit,tag:0"`
		Serial     *big.Int
		Algorithm  pkix.AlgorithmIdentifier
		Issuer     asn1.RawValue
		Validity   struct{ NotBefore, NotAfter time.Time }
		Subject    asn1.RawValue
		Key        asn1.RawValue
		Extensions []pkix.Extension `asn1:"explicit,tag:3"`
	}{
		2, d.serial, pkix.AlgorithmIdentifier{Algorithm: d.inner}, asn1.RawValue{FullBytes: by.subject},
		struct{ NotBefore, NotAfter time.Time }{d.notBefore, d.notAfter},
		asn1.RawValue{FullBytes: d.subject}, asn1.RawValue{FullBytes: spki}, d.extensions,
	})
	if err != nil {
		return nil, err
	}
	digest := d.hash.New()
	digest.Write(tbs)
	signature, err := by.key.Sign(rand.Reader, digest.Sum(nil), d.hash)
	if err != nil {
		return nil, err
	}
	der, err := asn1.Marshal(struct {
		TBS       asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}{
		asn1.RawValue{FullBytes: tbs}, pkix.AlgorithmIdentifier{Algorithm: d.outer},
		asn1.BitString{Bytes: signature, BitLength: len(signature) * 8},
	})
	if err != nil {
		return nil, err
	}
	if d.spoil != nil {
		der = d.spoil(der)
	}
	return der, nil
}

func newDraft() (*draft, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial := make([]byte, 16)
	rand.Read(serial)
	serial[0] = serial[0]&0x7f | 0x40
	now := time.Now().UTC().Truncate(time.Second)
	d := &draft{
		serial: new(big.Int).SetBytes(serial), inner: ecdsaWithSHA256(), outer: ecdsaWithSHA256(), hash: crypto.SHA256,
		notBefore: now.Add(-time.Minute), notAfter: now.Add(time.Hour), subject: encoded([]int{}), key: key,
	}
	d.identify()
	return d, nil
}

// identify names the draft's key.
func (d *draft) identify() { d.set(standard(subjectKeyID), false, keyID(d.key)) }

func keyID(key crypto.Signer) []byte {
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		panic(err) // it was made here
	}
	sum := sha256.Sum256(spki)
	return sum[:20]
}

// issuer checks the authority and returns it as one that signs.
func (a Authority) issuer() (issuer, error) {
	public, ok := a.Key.Public().(*ecdsa.PublicKey)
	switch {
	case !ok:
		return issuer{}, fmt.Errorf("the authority has a key of type %T, not ECDSA", a.Key.Public())
	case !public.Equal(a.Certificate.PublicKey):
		return issuer{}, errors.New("the authority's key does not match its certificate")
	case !a.Certificate.IsCA:
		return issuer{}, errors.New("the authority is none")
	}
	return issuer{
		certificate: a.Certificate.Raw, subject: a.Certificate.RawSubject,
		keyID: a.Certificate.SubjectKeyId, key: a.Key,
	}, nil
}

// flipLast spoils a signature in a way that leaves it a signature.
func flipLast(der []byte) []byte {
	der = bytes.Clone(der)
	der[len(der)-1] ^= 1
	return der
}
