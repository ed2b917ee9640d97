// Package ca is the certificate authority: it always holds a valid X.509
// authority and issues X509-SVIDs with it.
//
// Start with [Open], which loads the authorities of a trust domain and makes the
// first one if there is none, and [Issuer.Issue], which is the only way in which
// a certificate comes into being. [Issuer.Bundle] is what others verify by.
//
// It guarantees that no certificate is returned before its issuance is durable
// in the ledger; that everything in a certificate but its public key comes from
// the [Profile] and the identity that the caller derived, never from the request;
// and that each certificate was linted before it was signed, and verified
// afterwards as a peer would. It refuses what does not fit: a lifetime that
// outlasts the authority is an error and is never cut short silently.
//
// It decides nothing about who may have which identity. That is package
// server's, which knows the caller.
package ca

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/internal/latest"
	"troth.dev/troth/storage"
)

// Config is what an Issuer needs. Every field is required unless it says
// otherwise.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Keys        Keys
	Authorities storage.AuthorityStore
	Ledger      storage.Ledger
	// Audit receives one line for each certificate issued and for each change
	// of an authority.
	Audit *slog.Logger
	// Profile shapes the SVIDs; nil means NewProfile(ProfileConfig{}).
	Profile *Profile
	// AuthorityLife is how long a new authority lives; 0 means 30 days.
	AuthorityLife time.Duration
}

// Issuer issues X509-SVIDs under the active authority of one trust domain. Its
// methods may be called from many goroutines.
type Issuer struct {
	config  Config // immutable after Open
	profile *Profile
	// state is replaced whole, by Open and Run.
	state  latest.Value[*authorities]
	bundle latest.Value[Bundle]
}

// authorities is an immutable snapshot of the authority document, opened.
type authorities struct {
	version string // of the stored document
	set     Set
	active  *signer        // nil if no authority is active
	roots   *x509.CertPool // what set trusts
}

// Open returns an Issuer for the trust domain. If the store holds no authority
// yet, it makes one, self-signed and active from the start, because nobody can
// depend on another. Replicas may Open at the same time: one of them makes the
// authority, and all use it.
//
// Open fails if a stored authority cannot be used: a key that does not open or
// does not match its certificate, or a document of another trust domain.
func Open(ctx context.Context, config Config) (*Issuer, error) {
	switch {
	case config.TrustDomain.IsZero():
		return nil, errors.New("ca: no trust domain")
	case config.Keys == nil, config.Authorities == nil, config.Ledger == nil, config.Audit == nil:
		return nil, errors.New("ca: Keys, Authorities, Ledger and Audit are required")
	}
	if config.AuthorityLife == 0 {
		config.AuthorityLife = 30 * 24 * time.Hour
	}
	if config.Profile == nil {
		profile, err := NewProfile(ProfileConfig{})
		if err != nil {
			return nil, err
		}
		config.Profile = profile
	}
	if config.AuthorityLife < 2*config.Profile.life {
		return nil, fmt.Errorf("ca: authorities that live %v cannot sign SVIDs that live %v: give them at least twice as long",
			config.AuthorityLife, config.Profile.life)
	}
	i := &Issuer{config: config, profile: config.Profile}
	doc, err := config.Authorities.Load(ctx)
	if err != nil {
		return nil, fmt.Errorf("ca: load authorities: %w", err)
	}
	if doc.Version == "" {
		if doc, err = i.createFirst(ctx); err != nil {
			return nil, err
		}
	}
	if err := i.use(ctx, doc); err != nil {
		return nil, err
	}
	return i, nil
}

// createFirst stores a document with one active authority, and returns what the
// store holds afterwards: ours, or that of a replica that was faster.
//
// A crash before the Swap loses a key that nobody has seen; a crash after it
// leaves an authority that the next Open finds.
func (i *Issuer) createFirst(ctx context.Context) (storage.Document, error) {
	authority, err := newAuthority(ctx, i.config.Keys, i.config.TrustDomain, time.Now(), i.config.AuthorityLife)
	if err != nil {
		return storage.Document{}, err
	}
	authority.State = Active
	set := Set{TrustDomain: i.config.TrustDomain, Revision: 1, Authorities: []Authority{authority}}
	data, err := set.encode()
	if err != nil {
		return storage.Document{}, err
	}
	doc, err := i.config.Authorities.Swap(ctx, "", data)
	if errors.Is(err, storage.ErrConflict) {
		doc, err = i.config.Authorities.Load(ctx)
	} else if err == nil {
		i.config.Audit.LogAttrs(ctx, slog.LevelInfo, "authority created",
			slog.String("authority_id", authority.ID), slog.String("state", authority.State.String()),
			slog.Time("not_after", authority.Certificate.NotAfter), slog.Uint64("revision", set.Revision))
	}
	if err != nil {
		return storage.Document{}, fmt.Errorf("ca: store the first authority: %w", err)
	}
	return doc, nil
}

// use makes the document the one that the Issuer works by.
func (i *Issuer) use(ctx context.Context, doc storage.Document) error {
	set, err := decodeSet(doc.Data)
	if err != nil {
		return err
	}
	if set.TrustDomain != i.config.TrustDomain {
		return fmt.Errorf("ca: the stored authorities are of trust domain %q, not %q", set.TrustDomain, i.config.TrustDomain)
	}
	current := &authorities{version: doc.Version, set: set, roots: x509.NewCertPool()}
	for _, a := range set.Bundle().Authorities {
		current.roots.AddCert(a.Certificate)
	}
	for _, a := range set.Authorities {
		if a.State != Active {
			continue
		}
		if current.active, err = openSigner(ctx, i.config.Keys, a); err != nil {
			return err
		}
	}
	i.state.Set(current)
	i.bundle.Set(set.Bundle())
	return nil
}

// Run follows the stored authorities, which other replicas may change, until ctx
// ends. While the store cannot be read, or holds what cannot be used, the last
// good state keeps serving, and Run tries again every few seconds.
func (i *Issuer) Run(ctx context.Context) error {
	const retry = 3 * time.Second
	state, _ := i.state.Load()
	seen := state.version
	for {
		doc, err := i.config.Authorities.Watch(ctx, seen)
		if err == nil {
			if err = i.use(ctx, doc); err == nil {
				seen = doc.Version
			}
		}
		if ctx.Err() != nil {
			return nil //nolint:nilerr // the end that was asked for is no error
		}
		if err != nil {
			i.config.Audit.LogAttrs(ctx, slog.LevelError, "authorities not reloaded; the last good ones keep serving",
				slog.Any("err", err))
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(retry):
			}
		}
	}
}

// Bundle returns the current trust bundle and keeps it current while Run runs.
// It never holds less than one authority.
func (i *Issuer) Bundle() *latest.Value[Bundle] { return &i.bundle }

// Ready returns nil if there is an active authority with enough life left to
// issue, and says what is missing if not.
func (i *Issuer) Ready() error {
	_, err := i.signer(time.Now())
	return err
}

// signer returns the active authority if a certificate made now fits into its
// life.
func (i *Issuer) signer(now time.Time) (*authorities, error) {
	state, _ := i.state.Load()
	if state.active == nil {
		return nil, ErrNoActiveAuthority
	}
	if end := state.active.certificate.NotAfter; now.Add(i.profile.life).After(end) {
		return nil, fmt.Errorf("%w: authority %s ends at %s, before an SVID of %v would: rotate it",
			ErrAuthorityExpiring, state.active.id, end.UTC().Format(time.RFC3339), i.profile.life)
	}
	return state, nil
}

// Bundle is a trust domain's set of authorities to verify by, an immutable
// snapshot.
type Bundle struct {
	TrustDomain spiffeid.TrustDomain
	// Revision grows with every change.
	Revision uint64
	// Authorities are those that are prepared, active, old or tainted.
	Authorities []BundleAuthority
}

// BundleAuthority is one authority of a Bundle.
type BundleAuthority struct {
	ID          string
	Certificate *x509.Certificate
}

// X509Bundle returns the bundle in the form that SPIFFE libraries take. The
// result is the caller's.
func (b Bundle) X509Bundle() *x509bundle.Bundle {
	bundle := x509bundle.New(b.TrustDomain)
	for _, a := range b.Authorities {
		bundle.AddX509Authority(a.Certificate)
	}
	return bundle
}
