package ca

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/storage"
)

// State is where an authority is in its life.
type State int

// The states of an authority, in the order in which it passes through them. The
// zero State is none and is refused.
const (
	Prepared State = iota + 1 // in the bundle, signs nothing yet
	Active                    // in the bundle, signs; at most one
	Old                       // in the bundle, signs no more
	Tainted                   // in the bundle until what it signed is replaced
	Revoked                   // gone from the bundle
)

var stateNames = map[State]string{
	Prepared: "prepared", Active: "active", Old: "old", Tainted: "tainted", Revoked: "revoked",
}

// String returns the state's name as operators write it.
func (s State) String() string {
	if name, ok := stateNames[s]; ok {
		return name
	}
	return fmt.Sprintf("State(%d)", int(s))
}

// MarshalText writes the state's name; it fails for the zero State.
func (s State) MarshalText() ([]byte, error) {
	name, ok := stateNames[s]
	if !ok {
		return nil, fmt.Errorf("ca: %v is not the state of an authority", s)
	}
	return []byte(name), nil
}

// UnmarshalText reads what MarshalText wrote and refuses all else.
func (s *State) UnmarshalText(text []byte) error {
	for state, name := range stateNames {
		if name == string(text) {
			*s = state
			return nil
		}
	}
	return fmt.Errorf("ca: unknown state %q of an authority", text)
}

// Authority is one X.509 authority of a trust domain.
type Authority struct {
	// ID is the lower-case hexadecimal subject key identifier.
	ID          string
	State       State
	Certificate *x509.Certificate
	// Key is what [Keys] needs to open the signing key; nil once Revoked.
	Key []byte
}

// Set is all authorities of a trust domain: the one document on which replicas
// agree by compare-and-swap. A Set is a value; whoever changes one makes a new
// one with a higher revision.
type Set struct {
	TrustDomain spiffeid.TrustDomain
	Revision    uint64
	Authorities []Authority
}

// Bundle returns the authorities that the set trusts.
func (s Set) Bundle() Bundle {
	b := Bundle{TrustDomain: s.TrustDomain, Revision: s.Revision}
	for _, a := range s.Authorities {
		if a.State != Revoked {
			b.Authorities = append(b.Authorities, BundleAuthority{ID: a.ID, Certificate: a.Certificate})
		}
	}
	return b
}

// check returns an error unless the set is one that may be stored and used.
func (s Set) check() error {
	if s.TrustDomain.IsZero() {
		return errors.New("ca: a set of authorities without a trust domain")
	}
	if s.Revision == 0 {
		return errors.New("ca: a set of authorities without a revision")
	}
	seen := make(map[string]bool)
	active, trusted := 0, 0
	for _, a := range s.Authorities {
		if _, err := a.State.MarshalText(); err != nil {
			return err
		}
		if id, err := authorityID(a.Certificate.PublicKey); err != nil || id != a.ID {
			return fmt.Errorf("ca: authority %q is not the one of its certificate", a.ID)
		}
		if !a.Certificate.IsCA {
			return fmt.Errorf("ca: the certificate of authority %q may sign no others", a.ID)
		}
		if seen[a.ID] {
			return fmt.Errorf("ca: authority %q is there twice", a.ID)
		}
		seen[a.ID] = true
		if a.State == Active {
			active++
		}
		if a.State != Revoked {
			trusted++
		}
	}
	if active > 1 {
		return fmt.Errorf("ca: %d authorities are active at once", active)
	}
	if trusted == 0 {
		// SPIFFE Trust Domain and Bundle §4.1.4: an empty bundle distrusts every
		// SVID of the domain. Nobody means that.
		return errors.New("ca: a set of authorities that trusts none")
	}
	return nil
}

// The stored form. A format that is not known is refused, so that an older
// server never drops what a newer one wrote.
const setFormat = 1

type storedSet struct {
	Format      int               `json:"format"`
	TrustDomain string            `json:"trust_domain"`
	Revision    uint64            `json:"revision"`
	Authorities []storedAuthority `json:"authorities"`
}

type storedAuthority struct {
	ID          string `json:"id"`
	State       State  `json:"state"`
	Certificate []byte `json:"certificate"`
	Key         []byte `json:"key,omitempty"`
}

func (s Set) encode() ([]byte, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	stored := storedSet{Format: setFormat, TrustDomain: s.TrustDomain.Name(), Revision: s.Revision}
	for _, a := range s.Authorities {
		stored.Authorities = append(stored.Authorities,
			storedAuthority{ID: a.ID, State: a.State, Certificate: a.Certificate.Raw, Key: a.Key})
	}
	return json.Marshal(stored)
}

func decodeSet(data []byte) (Set, error) {
	if len(data) > storage.MaxDocument {
		return Set{}, storage.ErrDocumentSize
	}
	var stored storedSet
	if err := json.Unmarshal(data, &stored); err != nil {
		return Set{}, fmt.Errorf("ca: stored authorities: %w", err)
	}
	if stored.Format != setFormat {
		return Set{}, fmt.Errorf("ca: stored authorities have format %d, and this server knows only %d: was it downgraded?",
			stored.Format, setFormat)
	}
	td, err := spiffeid.TrustDomainFromString(stored.TrustDomain)
	if err != nil {
		return Set{}, fmt.Errorf("ca: stored authorities: %w", err)
	}
	s := Set{TrustDomain: td, Revision: stored.Revision}
	for _, a := range stored.Authorities {
		certificate, err := x509.ParseCertificate(a.Certificate)
		if err != nil {
			return Set{}, fmt.Errorf("ca: stored authority %q: %w", a.ID, err)
		}
		s.Authorities = append(s.Authorities, Authority{ID: a.ID, State: a.State, Certificate: certificate, Key: a.Key})
	}
	return s, s.check()
}

// newAuthority makes a key and a self-signed certificate for it, valid from
// shortly before now. Its State is for the caller to set.
func newAuthority(ctx context.Context, keys Keys, td spiffeid.TrustDomain, now time.Time, life time.Duration) (Authority, error) {
	key, handle, err := keys.Create(ctx)
	if err != nil {
		return Authority{}, fmt.Errorf("ca: create an authority key: %w", err)
	}
	id, err := authorityID(key.Public())
	if err != nil {
		return Authority{}, err
	}
	keyID, err := hex.DecodeString(id)
	if err != nil {
		return Authority{}, err
	}
	notBefore := now.Add(-10 * time.Minute).UTC().Truncate(time.Second)
	template := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(newSerial(now)),
		// RFC 5280 §4.1.2.6: an authority has a subject. The key identifier in it
		// keeps the subjects of successive authorities apart, so that a verifier
		// finds the right one at once.
		Subject:      pkix.Name{CommonName: "Troth authority", SerialNumber: id},
		SubjectKeyId: keyID,
		NotBefore:    notBefore,
		NotAfter:     now.Add(life).UTC().Truncate(time.Second),
		// SPIFFE X509-SVID §3.2: a signing certificate is an SVID too, of the
		// trust domain itself, with no path; §4.1 and §4.3: CA, keyCertSign.
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: td.Name()}},
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return Authority{}, fmt.Errorf("ca: self-sign the authority: %w", err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		return Authority{}, fmt.Errorf("ca: parse the new authority: %w", err)
	}
	return Authority{ID: id, Certificate: certificate, Key: handle}, nil
}

// authorityID is the subject key identifier: the first 160 bits of the SHA-256 of
// the public key (RFC 7093 §2, method 4 shortened as method 1 allows).
func authorityID(public crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return "", fmt.Errorf("ca: authority key: %w", err)
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:20]), nil
}
