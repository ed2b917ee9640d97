// Package ca is the certificate authority: it always holds a valid X.509
// authority and issues X509-SVIDs with it.
//
// Start with [Open], which loads the authorities of a trust domain and makes the
// first one if there is none, and [Issuer.Issue], which is the only way in which
// a certificate comes into being. [Issuer.Bundle] is what others verify by.
//
// Authorities are replaced while all goes on: [Issuer.Prepare] puts the next one
// into the bundle, [Issuer.Activate] lets it sign once every agent has proved that
// it trusts it, and [Issuer.Revoke] drops the one before when nothing depends on
// it any more. [Issuer.Rotate] does all three by itself. What agents have proved
// and what they hold comes in as a [Propagation]; what is in the way comes out as
// a [*Blocked]. Replicas agree by compare-and-swap of one document, and none of
// them leads.
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
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"sync"
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
	// AuthorityLife is how long a new authority lives; 0 means 30 days. At least
	// three times the life of an SVID.
	AuthorityLife time.Duration
	// LongestLife is how long a request may ask an SVID to live, at most 24 hours; 0,
	// and what is less than the profile's life, mean the profile's life. An authority
	// has to have room for it.
	LongestLife time.Duration
	// Publication is how long those who get the bundle from where it is published, and
	// not from an agent, may take to use what is new there. 0 means that nobody gets it
	// so. Otherwise an authority signs nothing before it was published for as long, and
	// whoever publishes tells by [Issuer.Published].
	Publication time.Duration
	// Upstream, if it is there, issues the authorities; then none signs itself.
	Upstream *Upstream
	// Test makes the trust domain one for tests. Its authorities and all that they
	// sign carry [identity.TestPolicy], by which whoever verifies for production
	// refuses them, and the authorities are constrained to names of this trust
	// domain, in the eyes of every verifier. Open refuses Test with an Upstream, whose
	// root others trust for more than tests, and a document of authorities that are
	// not for tests; and without Test, one of authorities that are.
	Test bool
}

// Issuer issues X509-SVIDs under the active authority of one trust domain. Its
// methods may be called from many goroutines.
type Issuer struct {
	config  Config // immutable after Open
	profile *Profile

	// using is held, by its one token, by who replaces what follows: a mutex that
	// can be waited for with a context.
	using   chan struct{}
	state   latest.Value[*authorities]
	set     latest.Value[Set]
	bundle  latest.Value[Bundle]
	overdue latest.Value[*Blocked] // set by Rotate
	// published says since when prepared authorities are published, as far as this
	// replica has seen.
	published latest.Value[map[string]time.Time]

	mu sync.Mutex
	// quiet is when this replica knew of authorities that they sign no more, and
	// left is what the ledger lists under them after that; see evidence.
	quiet map[string]time.Time // guarded by mu
	left  map[string]leaves    // guarded by mu
	// looked is what the upstream last delivered, and found why nothing of it was
	// taken, if nothing was.
	looked looked // guarded by mu
	found  string // guarded by mu
}

// authorities is an immutable snapshot of the authority document, opened.
type authorities struct {
	version string // of the stored document
	data    []byte // of the stored document
	// confirmed is a moment at which no later document was stored.
	confirmed time.Time
	set       Set
	signers   map[string]*signer // of those prepared and active, by ID
	active    *signer            // nil if no authority is active
	path      path               // of active
	roots     *x509.CertPool     // what set trusts
}

// Open returns an Issuer for the trust domain. If the store holds no authority
// yet, it makes one, self-signed and active from the start, because nobody can
// depend on another. Replicas may Open at the same time: one of them makes the
// authority, and all use it. With an upstream, the first authority is what that has
// delivered, and Open fails if that is nothing of use; later it is [Issuer.Run] that
// looks at what is delivered.
//
// Open fails if a stored authority cannot be used: one that is prepared or active
// and whose key does not open or does not match its certificate, or a document of
// another trust domain.
func Open(ctx context.Context, config Config) (*Issuer, error) {
	switch {
	case config.TrustDomain.IsZero():
		return nil, errors.New("ca: no trust domain")
	case config.Keys == nil, config.Authorities == nil, config.Ledger == nil, config.Audit == nil:
		return nil, errors.New("ca: Keys, Authorities, Ledger and Audit are required")
	}
	if err := config.checkUpstream(); err != nil {
		return nil, err
	}
	if config.Test && config.Upstream != nil {
		return nil, errors.New("ca: Test with an Upstream: what is below a root that others trust is not for tests alone")
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
	if config.LongestLife < 0 || config.LongestLife > maxLife || config.Publication < 0 {
		return nil, fmt.Errorf("ca: SVIDs that live %v at the longest, published within %v: it is up to 24h, and not less than nothing",
			config.LongestLife, config.Publication)
	}
	config.LongestLife = max(config.LongestLife, config.Profile.life)
	// The successor is due at two thirds of a life, and until the end of it the
	// authority has to have room for one SVID.
	if config.AuthorityLife < 3*config.LongestLife {
		return nil, fmt.Errorf("ca: authorities that live %v cannot sign SVIDs that live %v: give them at least three times as long",
			config.AuthorityLife, config.LongestLife)
	}
	i := &Issuer{
		config: config, profile: config.Profile,
		using: make(chan struct{}, 1), // the token
		quiet: make(map[string]time.Time), left: make(map[string]leaves),
	}
	if _, err := i.refresh(ctx); err != nil {
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
	first := i.newAuthority
	if i.config.Upstream != nil {
		first = i.delivered
	}
	authority, err := first(ctx, time.Now(), Set{})
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
			slog.Time("not_after", authority.NotAfter()), slog.Uint64("revision", set.Revision))
	}
	if err != nil {
		return storage.Document{}, fmt.Errorf("ca: store the first authority: %w", err)
	}
	return doc, nil
}

// newAuthority makes an authority that signs itself.
func (i *Issuer) newAuthority(ctx context.Context, now time.Time, _ Set) (Authority, error) {
	return i.selfSigned(ctx, i.config.Keys, now)
}

// selfSigned makes an authority whose key is under the keys given.
func (i *Issuer) selfSigned(ctx context.Context, keys Keys, now time.Time) (Authority, error) {
	a, err := newAuthority(ctx, keys, i.config.TrustDomain, now, i.config.AuthorityLife, i.config.Test)
	if err != nil {
		return Authority{}, err
	}
	return a, a.checkPurpose(i.config.TrustDomain, i.config.Test)
}

// refresh loads the document and makes it the one that the Issuer works by.
func (i *Issuer) refresh(ctx context.Context) (*authorities, error) {
	called := time.Now()
	select {
	case i.using <- struct{}{}:
		defer func() { <-i.using }()
	case <-ctx.Done():
		return nil, fmt.Errorf("ca: load authorities: %w", ctx.Err())
	}
	if state, _ := i.state.Load(); state != nil && state.confirmed.After(called) {
		return state, nil // by somebody whom we waited for
	}
	// Before the Load: what it returns was current then or later. Under the lock:
	// whoever comes after us loads a later document, or the same.
	asked := time.Now()
	doc, err := i.config.Authorities.Load(ctx)
	if err != nil {
		return nil, fmt.Errorf("ca: load authorities: %w", err)
	}
	if state, _ := i.state.Load(); doc.Version == "" && state == nil {
		if doc, err = i.createFirst(ctx); err != nil {
			return nil, err
		}
	}
	return i.use(ctx, doc, asked)
}

// use makes the document the one that the Issuer works by, or confirms that it
// still is. Its caller holds the token of using.
func (i *Issuer) use(ctx context.Context, doc storage.Document, confirmed time.Time) (*authorities, error) {
	before, _ := i.state.Load()
	if before != nil && before.version == doc.Version {
		again := *before
		again.confirmed = confirmed
		i.state.Set(&again)
		return &again, nil
	}
	set, err := decodeSet(doc.Data)
	if err != nil {
		return nil, err
	}
	if set.TrustDomain != i.config.TrustDomain {
		return nil, fmt.Errorf("ca: the stored authorities are of trust domain %q, not %q", set.TrustDomain, i.config.TrustDomain)
	}
	for _, a := range set.Authorities {
		if err := a.checkPurpose(set.TrustDomain, i.config.Test); err != nil {
			return nil, err
		}
	}
	if before != nil {
		// Somebody restored an older document. Agents have left it behind, and what
		// was revoked since would be trusted again.
		if set.Revision < before.set.Revision || set.Revision == before.set.Revision && !bytes.Equal(doc.Data, before.data) {
			return nil, fmt.Errorf("ca: the stored authorities are those of revision %d, after %d was in use: was the store restored? Restart to go on from there",
				set.Revision, before.set.Revision)
		}
	}
	current := &authorities{version: doc.Version, data: doc.Data, confirmed: confirmed, set: set, roots: x509.NewCertPool()}
	for _, a := range set.Bundle().Authorities {
		current.roots.AddCert(a.Certificate)
	}
	if current.signers, err = i.signers(ctx, set, before); err != nil {
		return nil, err
	}
	if a, ok := set.Active(); ok {
		current.active, current.path = current.signers[a.ID], newPath(a)
	}
	i.observe(set)
	i.state.Set(current)
	i.bundle.Set(set.Bundle())
	i.set.Set(set)
	return current, nil
}

// leaseOf is how long after its document was confirmed to be the current one a
// replica may release certificates of that life. An authority that a replica knows
// to be replaced signs nothing anywhere as soon as a lease has passed: see
// evidence. Run confirms three times in a lease.
//
// It is shorter only for SVIDs that live for less than six minutes, so that what is
// replaced early does not wait for it. All replicas need the same one.
func leaseOf(svidLife time.Duration) time.Duration { return min(90*time.Second, svidLife/4) }

// stale says whether the lease of the snapshot has passed. Both clocks count: the
// monotonic one stands still while a machine sleeps, the other can be set back.
func (a *authorities) stale(now time.Time, lease time.Duration) bool {
	return now.Sub(a.confirmed) > lease || now.Round(0).Sub(a.confirmed.Round(0)) > lease
}

// current returns the snapshot, confirmed anew if its lease has passed.
func (i *Issuer) current(ctx context.Context, now time.Time) (*authorities, error) {
	state, _ := i.state.Load()
	if !state.stale(now, leaseOf(i.profile.life)) {
		return state, nil
	}
	state, err := i.refresh(ctx)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnconfirmed, err)
	}
	return state, nil
}

// Run follows the stored authorities, which other replicas may change, and what the
// upstream delivers, until ctx ends. While the store cannot be read, or holds what
// cannot be used, the last good state keeps serving, and Run tries again every few
// seconds. It serves for a minute and a half, or a quarter of an SVID's life if that
// is less: then Issue refuses, because the active authority may be another by now.
func (i *Issuer) Run(ctx context.Context) error {
	const retry = 3 * time.Second
	if i.config.Upstream != nil {
		var following sync.WaitGroup
		following.Go(func() { i.followUpstream(ctx) })
		defer following.Wait()
	}
	state, _ := i.state.Load()
	seen := state.version
	for {
		err := i.follow(ctx, &seen)
		if ctx.Err() != nil {
			return nil // the end that was asked for is no error
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

// follow waits for another document than the one seen, or until the one in use
// has to be confirmed, and refreshes.
func (i *Issuer) follow(ctx context.Context, seen *string) error {
	waiting, cancel := context.WithTimeout(ctx, leaseOf(i.profile.life)/3)
	defer cancel()
	// What Watch returns may be older than what an operation has put into use
	// meanwhile: it only says that it is time to look.
	if _, err := i.config.Authorities.Watch(waiting, *seen); err != nil && waiting.Err() == nil {
		return err
	}
	if ctx.Err() != nil {
		return nil
	}
	state, err := i.refresh(ctx)
	if err == nil {
		*seen = state.version
	}
	return err
}

// Bundle returns the current trust bundle and keeps it current while Run runs.
// It never holds less than one authority.
func (i *Issuer) Bundle() *latest.Value[Bundle] { return &i.bundle }

// CurrentBundle asks the store, and returns the bundle that nobody had replaced when it
// was called. Who acts on a bundle that others may know to be older asks for it.
func (i *Issuer) CurrentBundle(ctx context.Context) (Bundle, error) {
	state, err := i.refresh(ctx)
	if err != nil {
		return Bundle{}, err
	}
	return state.set.Bundle(), nil
}

// Authorities returns all authorities in all states, and keeps them current while
// Run runs. The bundle of the same revision is there already when they change.
func (i *Issuer) Authorities() *latest.Value[Set] { return &i.set }

// SVIDLife is how long the SVIDs live that the Issuer issues.
func (i *Issuer) SVIDLife() time.Duration { return i.profile.life }

// Ready returns nil if there is an active authority with enough life left to
// issue, and says what is missing if not.
func (i *Issuer) Ready() error {
	state, _ := i.state.Load()
	return state.canSign(time.Now(), i.profile.life)
}

// canSign returns nil if a certificate made now fits into the life of the active
// authority.
func (a *authorities) canSign(now time.Time, life time.Duration) error {
	if a.active == nil {
		return ErrNoActiveAuthority
	}
	if end := a.path.notAfter; now.Add(life).After(end) {
		return fmt.Errorf("%w: authority %s ends at %s, before an SVID of %v would: rotate it",
			ErrAuthorityExpiring, a.active.id, end.UTC().Format(time.RFC3339), life)
	}
	return nil
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

// SHA256 returns what tells two bundles apart at a glance: the lower-case
// hexadecimal SHA-256 of its certificates, DER, one after the other, each once.
func (b Bundle) SHA256() string {
	hash := sha256.New()
	for _, c := range b.X509Bundle().X509Authorities() {
		hash.Write(c.Raw)
	}
	return hex.EncodeToString(hash.Sum(nil))
}

// BundleAuthority is one authority of a Bundle.
type BundleAuthority struct {
	ID string
	// Certificate is the trust anchor: the authority's own, or the upstream root.
	// Several authorities may have the same.
	Certificate *x509.Certificate
	NotAfter    time.Time // of the authority; the trust anchor may live longer
	// ReissueFrom and ReissueBy are the window in which whoever holds an SVID
	// under this authority is to replace it, each at a moment of its own in
	// between, and at once if it gets one later: another replica may sign on
	// for a minute or two. Zero while what it signed is renewed in due course.
	ReissueFrom, ReissueBy time.Time
}

// X509Bundle returns the bundle in the form that SPIFFE libraries take. The
// result is the caller's, and has each trust anchor once.
func (b Bundle) X509Bundle() *x509bundle.Bundle {
	bundle := x509bundle.New(b.TrustDomain)
	for _, a := range b.Authorities {
		bundle.AddX509Authority(a.Certificate)
	}
	return bundle
}
