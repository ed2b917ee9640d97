package ca

import (
	"bytes"
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
	// Upstream is the certificates from the authority's issuer up to the trust
	// anchor; none if the authority signed itself, or once Revoked.
	Upstream []*x509.Certificate
	// Key is what [Keys] needs to open the signing key; nil once Revoked.
	Key []byte
	// Changed says how the authority came into its State; zero for the first one
	// of a trust domain, until it leaves its first State.
	Changed Change
	// TaintPending says of an Active authority that it is Tainted as soon as it
	// can be replaced.
	TaintPending bool
	// ReissueBy is when agents are to have replaced what an Old or Tainted
	// authority signed, each at its own moment from Changed.At on; zero if
	// nothing is to be replaced early.
	ReissueBy time.Time
}

// NotAfter returns when the authority ends: when the first certificate of those up to
// the trust anchor does.
func (a Authority) NotAfter() time.Time {
	end := a.Certificate.NotAfter
	for _, c := range a.Upstream {
		if c.NotAfter.Before(end) {
			end = c.NotAfter
		}
	}
	return end
}

// anchor returns the certificate that verifiers trust.
func (a Authority) anchor() *x509.Certificate {
	if n := len(a.Upstream); n > 0 {
		return a.Upstream[n-1]
	}
	return a.Certificate
}

// Change is the record of one change of an authority. It is stored with what it
// changed, in one write: neither is ever there without the other.
type Change struct {
	AuthorityID string
	State       State     // after it; Revoked of one that was forgotten
	At          time.Time // in whole milliseconds, UTC
	Revision    uint64    // of the set that was the first to have it
	// Operation is what was asked for: "prepare", "activate", "taint", "revoke",
	// "abort" or "forget". One operation may change several authorities. Empty of a
	// change that a server made which did not record it yet.
	Operation string
	Actor     string
	Reason    string // may be empty
	Forced    bool
	// Evidence is what it was decided by, in one line.
	Evidence string
	// BundleSHA256 is [Bundle.SHA256] after it; empty as Operation.
	BundleSHA256 string
}

// Set is all authorities of a trust domain: the one document on which replicas
// agree by compare-and-swap. A Set is a value; whoever changes one makes a new
// one with a higher revision.
type Set struct {
	TrustDomain spiffeid.TrustDomain
	Revision    uint64
	Authorities []Authority
	// History is what became of authorities, those included that are forgotten: the
	// last 200 changes, oldest first, or fewer if they are long.
	History []Change
}

// The bounds of a History: how many changes, and how many bytes they take as they
// are stored. JSON spells some letters with six bytes, so that 200 changes of
// hostile actors for hostile reasons would be more than a store has to take.
const (
	maxHistory      = 200
	maxHistoryBytes = 192 << 10
)

// Bundle returns the authorities that the set trusts.
func (s Set) Bundle() Bundle {
	b := Bundle{TrustDomain: s.TrustDomain, Revision: s.Revision}
	for _, a := range s.Authorities {
		if a.State == Revoked {
			continue
		}
		in := BundleAuthority{ID: a.ID, Certificate: a.anchor(), NotAfter: a.NotAfter()}
		if !a.ReissueBy.IsZero() {
			in.ReissueFrom, in.ReissueBy = a.Changed.At, a.ReissueBy
		}
		b.Authorities = append(b.Authorities, in)
	}
	return b
}

// Authority returns the authority with this ID.
func (s Set) Authority(id string) (Authority, bool) {
	for _, a := range s.Authorities {
		if a.ID == id {
			return a, true
		}
	}
	return Authority{}, false
}

// Active returns the active authority, if there is one.
func (s Set) Active() (Authority, bool) {
	for _, a := range s.Authorities {
		if a.State == Active {
			return a, true
		}
	}
	return Authority{}, false
}

// Successor returns the prepared authority that is to be active next, if there is
// one: of several, the one that lives longest. It is the one that agents prove.
func (s Set) Successor() (Authority, bool) {
	var next Authority
	for _, a := range s.Authorities {
		if a.State == Prepared && (next.Certificate == nil || a.NotAfter().After(next.NotAfter())) {
			next = a
		}
	}
	return next, next.Certificate != nil
}

// longestRevoked returns the one of the revoked authorities that has been so for the
// longest time, or none.
func (s Set) longestRevoked() Authority {
	var oldest Authority
	for _, a := range s.Authorities {
		if a.State == Revoked && (oldest.ID == "" || a.Changed.At.Before(oldest.Changed.At)) {
			oldest = a
		}
	}
	return oldest
}

// check returns an error unless the set is one that may be stored and used.
func (s Set) check() error {
	if s.TrustDomain.IsZero() {
		return errors.New("ca: a set of authorities without a trust domain")
	}
	if s.Revision == 0 {
		return errors.New("ca: a set of authorities without a revision")
	}
	if err := s.checkHistory(); err != nil {
		return err
	}
	seen := make(map[string]bool)
	active, trusted := 0, 0
	for _, a := range s.Authorities {
		if _, err := a.State.MarshalText(); err != nil {
			return err
		}
		if err := a.check(); err != nil {
			return err
		}
		if seen[a.ID] {
			return fmt.Errorf("ca: authority %q is there twice", a.ID)
		}
		seen[a.ID] = true
		if a.TaintPending && a.State != Active {
			return fmt.Errorf("ca: authority %q is %v and waits for a successor", a.ID, a.State)
		}
		if c := a.Changed; c != (Change{}) && (c.AuthorityID != a.ID || c.State != a.State) {
			return fmt.Errorf("ca: authority %q is %v, and its last change made %q %v", a.ID, a.State, c.AuthorityID, c.State)
		}
		if a.Changed.Revision > s.Revision {
			return fmt.Errorf("ca: authority %q was changed in revision %d, which is yet to come", a.ID, a.Changed.Revision)
		}
		for _, t := range []time.Time{a.Changed.At, a.ReissueBy} {
			if t.Year() < 1 || t.Year() > 9998 { // what JSON can spell in any zone
				return fmt.Errorf("ca: authority %q has a time in the year %d", a.ID, t.Year())
			}
		}
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

// check returns an error unless the certificates are those of the authority.
func (a Authority) check() error {
	if a.ID == "" || a.ID != hex.EncodeToString(a.Certificate.SubjectKeyId) {
		return fmt.Errorf("ca: authority %q is not the one of its certificate", a.ID)
	}
	if !a.Certificate.IsCA {
		return fmt.Errorf("ca: the certificate of authority %q may sign no others", a.ID)
	}
	if selfIssued(a.Certificate) {
		if id, err := authorityID(a.Certificate.PublicKey); err != nil || id != a.ID {
			return fmt.Errorf("ca: authority %q is not the one of its certificate", a.ID)
		}
		if len(a.Upstream) > 0 {
			return fmt.Errorf("ca: authority %q signed itself and has an upstream", a.ID)
		}
		return nil
	}
	switch {
	case len(a.Upstream) == 0 && a.State == Revoked:
		return nil
	case len(a.Upstream) == 0, len(a.Upstream) >= maxUpstreamPath, !selfIssued(a.anchor()):
		return fmt.Errorf("ca: the upstream of authority %q, %d certificates, does not end in a root", a.ID, len(a.Upstream))
	}
	child := a.Certificate
	for _, parent := range a.Upstream {
		if !parent.IsCA || !bytes.Equal(child.RawIssuer, parent.RawSubject) {
			return fmt.Errorf("ca: the upstream of authority %q does not lead from one certificate to the next", a.ID)
		}
		child = parent
	}
	return nil
}

func (s Set) checkHistory() error {
	if len(s.History) > maxHistory {
		return fmt.Errorf("ca: a history of %d changes, more than %d", len(s.History), maxHistory)
	}
	before := uint64(0)
	for _, c := range s.History {
		if _, err := c.State.MarshalText(); err != nil {
			return err
		}
		if c.AuthorityID == "" || c.Operation == "" {
			return fmt.Errorf("ca: the history has a change in revision %d of no authority or by no operation", c.Revision)
		}
		if c.Revision < before || c.Revision > s.Revision {
			return fmt.Errorf("ca: the history has revision %d after %d, and the set is of %d", c.Revision, before, s.Revision)
		}
		before = c.Revision
		if y := c.At.Year(); y < 1 || y > 9998 {
			return fmt.Errorf("ca: the history has a time in the year %d", y)
		}
	}
	return nil
}

// The stored form. A format that is not known is refused, so that an older
// server never drops what a newer one wrote. The first that has room for all is
// written: format 1 knows no changes, and who has never rotated can go back.
// Format 2 knows no history.
const (
	setFormatFirst   = 1
	setFormatChanged = 2
	setFormat        = 3
)

type storedSet struct {
	Format      int               `json:"format"`
	TrustDomain string            `json:"trust_domain"`
	Revision    uint64            `json:"revision"`
	Authorities []storedAuthority `json:"authorities"`

	// Since format 3.
	History []storedChange `json:"history,omitempty"`
}

type storedAuthority struct {
	ID          string `json:"id"`
	State       State  `json:"state"`
	Certificate []byte `json:"certificate"`
	Key         []byte `json:"key,omitempty"`

	// Since format 2. Since format 3 the change is here only if it is not the last
	// one of this authority in the history.
	Changed      *storedChange `json:"changed,omitempty"`
	TaintPending bool          `json:"taint_pending,omitempty"`
	ReissueBy    time.Time     `json:"reissue_by,omitzero"`

	// Since format 3.
	Upstream [][]byte `json:"upstream,omitempty"`
}

type storedChange struct {
	AuthorityID string    `json:"authority_id,omitempty"` // in the history
	State       State     `json:"state,omitempty"`        // in the history
	At          time.Time `json:"at"`
	Revision    uint64    `json:"revision"`
	Operation   string    `json:"operation,omitempty"` // since format 3
	Actor       string    `json:"actor"`
	Reason      string    `json:"reason,omitempty"`
	Forced      bool      `json:"forced,omitempty"`
	Evidence    string    `json:"evidence,omitempty"`

	BundleSHA256 string `json:"bundle_sha256,omitempty"` // since format 3
}

// leastFormat returns the first format that has room for the set.
func (s storedSet) leastFormat() int {
	least := setFormatFirst
	for _, a := range s.Authorities {
		if a.Changed != nil || a.TaintPending || !a.ReissueBy.IsZero() {
			least = setFormatChanged
		}
		if c := a.Changed; len(a.Upstream) > 0 || c != nil && (c.Operation != "" || c.BundleSHA256 != "") {
			return setFormat
		}
	}
	if len(s.History) > 0 {
		return setFormat
	}
	return least
}

// lastChanges returns the last change of each authority in the history.
func (s Set) lastChanges() map[string]Change {
	last := make(map[string]Change)
	for _, c := range s.History {
		last[c.AuthorityID] = c
	}
	return last
}

func (s Set) encode() ([]byte, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	stored := storedSet{TrustDomain: s.TrustDomain.Name(), Revision: s.Revision}
	last := s.lastChanges()
	for _, a := range s.Authorities {
		one := storedAuthority{
			ID: a.ID, State: a.State, Certificate: a.Certificate.Raw, Key: a.Key,
			TaintPending: a.TaintPending, ReissueBy: a.ReissueBy,
		}
		for _, c := range a.Upstream {
			one.Upstream = append(one.Upstream, c.Raw)
		}
		if a.Changed != (Change{}) && a.Changed != last[a.ID] {
			changed := storedChange(a.Changed)
			changed.AuthorityID, changed.State = "", 0 // those of the authority
			one.Changed = &changed
		}
		stored.Authorities = append(stored.Authorities, one)
	}
	for _, c := range s.History {
		stored.History = append(stored.History, storedChange(c))
	}
	stored.Format = stored.leastFormat()
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
	if stored.Format < setFormatFirst || stored.Format > setFormat {
		return Set{}, fmt.Errorf("ca: stored authorities have format %d, and this server knows only %d to %d: was it downgraded?",
			stored.Format, setFormatFirst, setFormat)
	}
	if stored.Format < stored.leastFormat() {
		return Set{}, fmt.Errorf("ca: stored authorities have what format %d does not know", stored.Format)
	}
	td, err := spiffeid.TrustDomainFromString(stored.TrustDomain)
	if err != nil {
		return Set{}, fmt.Errorf("ca: stored authorities: %w", err)
	}
	s := Set{TrustDomain: td, Revision: stored.Revision}
	for _, c := range stored.History {
		change := Change(c)
		change.At = change.At.UTC()
		s.History = append(s.History, change)
	}
	last := s.lastChanges()
	for _, a := range stored.Authorities {
		certificate, err := x509.ParseCertificate(a.Certificate)
		if err != nil {
			return Set{}, fmt.Errorf("ca: stored authority %q: %w", a.ID, err)
		}
		one := Authority{
			ID: a.ID, State: a.State, Certificate: certificate, Key: a.Key, Changed: last[a.ID],
			TaintPending: a.TaintPending, ReissueBy: a.ReissueBy.UTC(),
		}
		for _, der := range a.Upstream {
			c, err := x509.ParseCertificate(der)
			if err != nil {
				return Set{}, fmt.Errorf("ca: stored authority %q: upstream: %w", a.ID, err)
			}
			one.Upstream = append(one.Upstream, c)
		}
		if a.Changed != nil {
			one.Changed = Change(*a.Changed)
			one.Changed.At = one.Changed.At.UTC()
			one.Changed.AuthorityID, one.Changed.State = a.ID, a.State
		}
		s.Authorities = append(s.Authorities, one)
	}
	return s, s.check()
}

// newAuthority makes a key and a self-signed certificate for it, valid from
// shortly before now. Its State is for the caller to set.
func newAuthority(ctx context.Context, keys Keys, td spiffeid.TrustDomain, now time.Time, life time.Duration, test bool) (Authority, error) {
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
	if test {
		limitToTests(template, td)
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

// authorityID is the subject key identifier of an authority that we make: the first 160 bits of the SHA-256 of
// the public key (RFC 7093 §2, method 4 shortened as method 1 allows).
func authorityID(public crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return "", fmt.Errorf("ca: authority key: %w", err)
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:20]), nil
}
