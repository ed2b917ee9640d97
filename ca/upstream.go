package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/identity"
)

// Upstream says where another PKI delivers the authorities of the trust domain:
// intermediates under a root that is its own, for whose keys it vouches. All three
// are paths of PEM files, which are looked at every few seconds, because whoever
// mounts a Kubernetes Secret has its files replaced under way. A new certificate
// in them becomes a prepared authority, and then goes through the same states by
// the same gates as any other. Nothing is ever taken from files that do not match
// each other: they are read again until they do.
//
// What a root that others use too means, everybody should know who uses one.
// Verifiers trust the root, and not the intermediate: whoever holds a certificate of
// this trust domain under that root is believed, whichever intermediate signed it.
// To revoke an authority drops its key here and has what it signed replaced, but
// no verifier distrusts it for that, as long as another authority under the same
// root is trusted. So if the key of an intermediate is stolen, the trust domain has
// to be moved to another root; see [Issuer.Taint]. What bounds the harm until then is
// what the upstream wrote into the intermediate: an early end, and name constraints
// that permit this trust domain alone.
type Upstream struct {
	// Certificate has the intermediate, then those above it, each signed by the
	// next; the root may be the last. At most 64 KiB, as each of the files.
	// Required.
	Certificate string
	// Key has the intermediate's private key, ECDSA P-256, as PKCS #8 or SEC 1.
	// Required. It is sealed by [Importer] before it is stored.
	Key string
	// Root has the root; of several, the one that signed the last of Certificate.
	// Empty if Certificate has it.
	Root string
}

// Importer is implemented by Keys that take in a key which was made elsewhere.
// [Config].Upstream needs it.
type Importer interface {
	Keys

	// Import returns the handle by which Open finds the key of the authority with
	// this ID.
	Import(ctx context.Context, authorityID string, key crypto.Signer) (handle []byte, err error)
}

// Import implements [Importer].
func (k *SealedKeys) Import(_ context.Context, authorityID string, key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	defer clear(der)
	return k.seal(authorityID, der), nil
}

// The bounds of what an upstream delivers. All of it is stored with each authority
// that is trusted.
const (
	maxUpstreamFile = 64 << 10
	maxUpstreamPath = 6       // certificates from the authority to the root
	maxUpstreamDER  = 4 << 10 // bytes of each
	maxUpstreamRoot = 16      // roots to choose from
)

// checkUpstream says whether the config can have an upstream at all.
func (c Config) checkUpstream() error {
	switch _, imports := c.Keys.(Importer); {
	case c.Upstream == nil:
		return nil
	case c.Upstream.Certificate == "", c.Upstream.Key == "":
		return errors.New("ca: Upstream needs a certificate and a key")
	case !imports:
		return fmt.Errorf("ca: %T do not take in the key of an upstream authority: keep keys sealed in the store, or do without an upstream root", c.Keys)
	}
	return nil
}

// delivery is what an upstream has delivered: an authority without State and
// handle, and its key.
type delivery struct {
	Authority
	key *ecdsa.PrivateKey
}

// read reads what is in the files at the moment: the certificates, the key and the
// root. They are replaced one by one, and need not belong together.
func (u *Upstream) read() (files [3][]byte, err error) {
	for n, path := range []string{u.Certificate, u.Key, u.Root} {
		if path == "" {
			continue
		}
		if files[n], err = readBounded(path); err != nil {
			return files, err
		}
	}
	return files, nil
}

// looked is what was in the files the last time that they belonged together. To
// check the same signatures again every few seconds is most of what looking costs.
type looked struct {
	sum       [sha256.Size]byte
	authority Authority
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxUpstreamFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) == 0 || len(data) > maxUpstreamFile {
		return nil, fmt.Errorf("%s is empty, or larger than %d bytes", path, maxUpstreamFile)
	}
	return data, nil
}

// parseUpstream reads the three files: a key, its certificate, and the path from
// there to a root that signed itself, each certificate signed by the next.
func parseUpstream(chainPEM, keyPEM, rootPEM []byte) (delivery, error) {
	chain, err := parseCertificates(chainPEM, maxUpstreamPath)
	if err != nil {
		return delivery{}, fmt.Errorf("the certificate file: %w", err)
	}
	key, err := parseKey(keyPEM)
	if err != nil {
		return delivery{}, fmt.Errorf("the key file: %w", err)
	}
	if !key.PublicKey.Equal(chain[0].PublicKey) {
		return delivery{}, errors.New("the key is not that of the first certificate: the files are being replaced, or are not of the same intermediate")
	}
	if selfIssued(chain[0]) {
		return delivery{}, errors.New("the certificate is a root itself, whose key belongs nowhere near a server: have the root issue an intermediate")
	}
	roots := chain[len(chain)-1:]
	if last := chain[len(chain)-1]; selfIssued(last) {
		chain = chain[:len(chain)-1]
	} else if len(rootPEM) == 0 {
		return delivery{}, errors.New("the certificate file does not end in a root, and there is no root file")
	}
	if len(rootPEM) > 0 {
		if roots, err = parseCertificates(rootPEM, maxUpstreamRoot); err != nil {
			return delivery{}, fmt.Errorf("the root file: %w", err)
		}
	}
	for n := range chain[1:] {
		if err := signedBy(chain[n], chain[n+1]); err != nil {
			return delivery{}, fmt.Errorf("certificate %d is not signed by the one after it: %w", n+1, err)
		}
	}
	last := chain[len(chain)-1]
	for _, root := range roots {
		if err = signedBy(last, root); err == nil {
			err = signedBy(root, root)
		}
		if err == nil {
			path := append(chain[1:len(chain):len(chain)], root)
			id := hex.EncodeToString(chain[0].SubjectKeyId)
			return delivery{Authority: Authority{ID: id, Certificate: chain[0], Upstream: path}, key: key}, nil
		}
	}
	return delivery{}, fmt.Errorf("no root that signed itself has signed %q: %w", last.Subject, err)
}

// selfIssued says whether a certificate names itself as its issuer (RFC 5280 §3.2).
func selfIssued(c *x509.Certificate) bool { return bytes.Equal(c.RawSubject, c.RawIssuer) }

// signedBy returns an error unless the parent signed the child and every verifier
// sees that it is the one: OpenSSL goes by the key identifiers too.
func signedBy(child, parent *x509.Certificate) error {
	if !bytes.Equal(child.RawIssuer, parent.RawSubject) {
		return fmt.Errorf("its issuer is %q, not %q", child.Issuer, parent.Subject)
	}
	if len(child.AuthorityKeyId) > 0 && len(parent.SubjectKeyId) > 0 && !bytes.Equal(child.AuthorityKeyId, parent.SubjectKeyId) {
		return fmt.Errorf("its authority key identifier is %x, not %x", child.AuthorityKeyId, parent.SubjectKeyId)
	}
	if err := checkPathKey(parent.PublicKey); err != nil { // before it costs anything
		return fmt.Errorf("%q has %w", parent.Subject, err)
	}
	return child.CheckSignatureFrom(parent)
}

// checkPathKey is for keys that others make: those of old roots are RSA.
func checkPathKey(public crypto.PublicKey) error {
	switch key := public.(type) {
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits < 2048 || bits > 8192 {
			return fmt.Errorf("an RSA key of %d bits; 2048 to 8192 are accepted", bits)
		}
	case *ecdsa.PublicKey, ed25519.PublicKey:
	default:
		return fmt.Errorf("a key of type %T", public)
	}
	return nil
}

// blocks returns what a PEM file has, at most that many. The decoder passes over
// what it cannot read, such as a certificate that is cut off: here that is an error.
func blocks(data []byte, most int) ([]*pem.Block, error) {
	begun := bytes.Count(data, []byte("-----BEGIN "))
	if begun > most {
		return nil, fmt.Errorf("%d PEM blocks, more than %d", begun, most)
	}
	var found []*pem.Block
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		found = append(found, block)
	}
	if len(found) == 0 || len(found) != begun {
		return nil, fmt.Errorf("%d PEM blocks begin and %d can be read: it is cut off, damaged or no PEM", begun, len(found))
	}
	return found, nil
}

func parseCertificates(data []byte, most int) ([]*x509.Certificate, error) {
	all, err := blocks(data, most)
	if err != nil {
		return nil, err
	}
	var certificates []*x509.Certificate
	for _, block := range all {
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("a %.32q among the certificates", block.Type)
		}
		if len(block.Bytes) > maxUpstreamDER {
			return nil, fmt.Errorf("a certificate of %d bytes, more than %d", len(block.Bytes), maxUpstreamDER)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(certificates)+1, err)
		}
		certificates = append(certificates, c)
	}
	return certificates, nil
}

// parseKey reads a private key of the one kind that Troth signs with.
func parseKey(data []byte) (*ecdsa.PrivateKey, error) {
	all, err := blocks(data, 2)
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(b *pem.Block) bool { return b.Type == "EC PARAMETERS" }) // openssl writes them before the key
	if len(all) != 1 {
		return nil, fmt.Errorf("%d private keys, not one", len(all))
	}
	block := all[0]
	defer clear(block.Bytes)
	const ask = "have the PKI issue the intermediate for an ECDSA P-256 key (cert-manager: privateKey with algorithm ECDSA and size 256)"
	var key any
	switch {
	case block.Type == "ENCRYPTED PRIVATE KEY", block.Headers["DEK-Info"] != "":
		return nil, errors.New("the private key is encrypted: deliver it in the clear, in a file that only the server can read")
	case block.Type == "PRIVATE KEY":
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	case block.Type == "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	case block.Type == "RSA PRIVATE KEY":
		return nil, errors.New("the private key is RSA: " + ask)
	default:
		return nil, fmt.Errorf("a %.32q, not a private key", block.Type)
	}
	if err != nil {
		return nil, errors.New("the private key cannot be read: it is damaged, or of a curve that Go does not know: " + ask)
	}
	switch key := key.(type) {
	case *ecdsa.PrivateKey:
		if key.Curve == elliptic.P256() {
			return key, nil
		}
		return nil, fmt.Errorf("the private key is ECDSA %s: %s", key.Curve.Params().Name, ask)
	case *rsa.PrivateKey:
		return nil, fmt.Errorf("the private key is RSA of %d bits: %s", key.N.BitLen(), ask)
	case ed25519.PrivateKey:
		return nil, errors.New("the private key is Ed25519: " + ask)
	default:
		return nil, fmt.Errorf("the private key is a %T: %s", key, ask)
	}
}

// check returns an error unless the authority may sign for the trust domain, for
// SVIDs that live as long as given, in the eyes of every verifier.
func (d delivery) check(td spiffeid.TrustDomain, now time.Time, life time.Duration) error {
	c := d.Certificate
	switch {
	case !c.BasicConstraintsValid, !c.IsCA, !extension(c, oidBasicConstraints).Critical:
		return errors.New("the certificate may sign no others: its basic constraints do not say CA:TRUE, critical (X509-SVID §4.1, RFC 5280 §4.2.1.9)")
	case c.KeyUsage&x509.KeyUsageCertSign == 0, !extension(c, oidKeyUsage).Critical:
		return errors.New("the certificate may sign no others: its key usage is not keyCertSign, critical (X509-SVID §4.3)")
	case len(c.SubjectKeyId) < 8, len(c.SubjectKeyId) > 32:
		return fmt.Errorf("the certificate has a subject key identifier of %d bytes; 8 to 32 are accepted (RFC 5280 §4.2.1.2)", len(c.SubjectKeyId))
	case len(c.RawSubject) <= len(emptySequence):
		return errors.New("the certificate has an empty subject (RFC 5280 §4.1.2.6)")
	}
	// X509-SVID §3.2: with a SPIFFE ID it is that of the trust domain, with no path.
	for _, uri := range c.URIs {
		if strings.EqualFold(uri.Scheme, "spiffe") && (uri.String() != td.IDString() || len(c.URIs) != 1) {
			return fmt.Errorf("the certificate has the URI %.300q; a SPIFFE ID in it has to be %q, alone (X509-SVID §3.2)", uri, td.IDString())
		}
	}
	p := newPath(d.Authority)
	for n, above := range p.certificates {
		if identity.IsTest(above) {
			return fmt.Errorf("%q is for tests: it has the certificate policy %v", above.Subject, identity.TestPolicy)
		}
		if len(above.UnhandledCriticalExtensions) > 0 {
			return fmt.Errorf("%q has the critical extension %v, which verifiers do not know", above.Subject, above.UnhandledCriticalExtensions[0])
		}
		if n > 0 && (!above.BasicConstraintsValid || !above.IsCA) {
			return fmt.Errorf("%q may sign no others", above.Subject)
		}
	}
	switch {
	case now.Before(p.notBefore):
		return fmt.Errorf("it is not valid before %s", p.notBefore.UTC().Format(time.RFC3339))
	case p.notAfter.Sub(p.notBefore) < 3*life, p.notAfter.Sub(now) < 2*life:
		return fmt.Errorf("%q ends at %s: SVIDs live %v, so an authority has to live three times as long, and two of these have to be left; have it issued for longer",
			p.first().Subject, p.notAfter.UTC().Format(time.RFC3339), life)
	}
	return nil
}

// memoryKey is Keys with one key, which is stored nowhere.
type memoryKey struct{ crypto.Signer }

func (k memoryKey) Create(context.Context) (crypto.Signer, []byte, error) {
	return nil, nil, errors.New("ca: there is one key only")
}

func (k memoryKey) Open(context.Context, string, []byte) (crypto.Signer, error) {
	return k.Signer, nil
}

// try has the authority sign one leaf, in memory, and verifies it in both roles,
// now and at its end: whatever the certificates above say of path lengths, names or
// usages, it is the outcome that counts. Nobody ever gets the leaf, whose key is
// gone, and so the ledger does not list it.
func (i *Issuer) try(ctx context.Context, d delivery, now time.Time) error {
	svid, err := i.probe(ctx, memoryKey{d.key}, d.Authority, now, nil)
	if err != nil {
		return err
	}
	leaf, err := x509.ParseCertificate(svid.Certificates[0])
	if err != nil {
		return err
	}
	p := newPath(d.Authority)
	roots := x509.NewCertPool()
	roots.AddCert(d.anchor())
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		for _, at := range []time.Time{now, leaf.NotAfter} {
			if _, err := leaf.Verify(x509.VerifyOptions{
				Roots: roots, Intermediates: p.intermediates, KeyUsages: []x509.ExtKeyUsage{usage}, CurrentTime: at,
			}); err != nil {
				return err
			}
		}
	}
	return nil
}

// delivered returns the authority that the upstream has issued since those that the
// set knows, checked and with its key sealed. It returns [*Blocked] if there is none.
func (i *Issuer) delivered(ctx context.Context, now time.Time, set Set) (Authority, error) {
	files, err := i.config.Upstream.read()
	if err != nil {
		return Authority{}, fmt.Errorf("ca: upstream: %w", err)
	}
	defer clear(files[1])
	hash := sha256.New()
	for _, content := range files {
		fmt.Fprintf(hash, "%d ", len(content))
		hash.Write(content)
	}
	sum := [sha256.Size]byte(hash.Sum(nil))
	i.mu.Lock()
	last := i.looked
	i.mu.Unlock()
	if last.sum == sum {
		if err := set.expects(last.authority); err != nil {
			return Authority{}, err
		}
	}
	d, err := parseUpstream(files[0], files[1], files[2])
	if err != nil {
		return Authority{}, fmt.Errorf("ca: upstream: %w", err)
	}
	i.mu.Lock()
	i.looked = looked{sum, d.Authority}
	i.mu.Unlock()
	if err := set.expects(d.Authority); err != nil {
		return Authority{}, err
	}
	if err := d.check(i.config.TrustDomain, now, i.config.LongestLife); err != nil {
		return Authority{}, fmt.Errorf("ca: upstream: %w", err)
	}
	if err := i.try(ctx, d, now); err != nil {
		return Authority{}, fmt.Errorf("ca: upstream: what the intermediate signs for %q does not verify: %w", i.config.TrustDomain.IDString(), err)
	}
	importer, ok := i.config.Keys.(Importer)
	if !ok {
		return Authority{}, errors.New("ca: upstream: the keys cannot be imported") // Open has seen to that
	}
	if d.Key, err = importer.Import(ctx, d.ID, d.key); err != nil {
		return Authority{}, fmt.Errorf("ca: upstream: seal the key: %w", err)
	}
	return d.Authority, nil
}

// expects returns nil if what was delivered is new, and says why it is not
// otherwise. A key is used for one authority: with another certificate for the same
// key it would be both the one that is to be replaced and the one that replaces it.
func (s Set) expects(a Authority) error {
	unchanged := func(format string, args ...any) error {
		return &Blocked{Operation: "prepare", Authority: a.ID, Blockers: []Blocker{{Obstacle: UpstreamUnchanged, Detail: fmt.Sprintf(format, args...)}}}
	}
	for _, known := range s.Authorities {
		same := slices.EqualFunc(known.Upstream, a.Upstream, (*x509.Certificate).Equal) || known.State == Revoked
		switch {
		case known.Certificate.Equal(a.Certificate) && same:
			return unchanged("what the upstream has issued is authority %s, which is %v since: have it issue another, for a new key", known.ID, known.State)
		case known.ID == a.ID, a.Certificate.PublicKey.(*ecdsa.PublicKey).Equal(known.Certificate.PublicKey):
			return fmt.Errorf("ca: upstream: another certificate for the key of authority %s, or another root above it: have it issued for a new key each time (cert-manager: privateKey with rotationPolicy: Always)",
				known.ID)
		}
	}
	if c, ok := s.lastChanges()[a.ID]; ok {
		return unchanged("what the upstream has issued is authority %s, which was revoked by %s: have it issue another, for a new key", a.ID, c.Actor)
	}
	return nil
}

// upstreamActor is who prepares what the upstream has issued.
const upstreamActor = "upstream"

// followUpstream prepares whatever the upstream issues, until ctx ends.
func (i *Issuer) followUpstream(ctx context.Context) {
	const (
		every = 5 * time.Second
		quiet = time.Minute // between two lines of log
	)
	var logged time.Time
	for {
		err := i.takeDelivery(ctx)
		now := time.Now()
		if blocked := (*Blocked)(nil); err != nil && !errors.As(err, &blocked) && ctx.Err() == nil && now.Sub(logged) >= quiet {
			i.config.Audit.LogAttrs(ctx, slog.LevelError, "what the upstream has delivered is not taken; it is looked at again", slog.Any("err", err))
			logged = now
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(every):
		}
	}
}

// takeDelivery prepares what the upstream has issued, if that is new, and remembers
// what it found. What was prepared before and has not been activated gives way.
//
// A crash before the Swap leaves the files, which the next one finds; after it the
// authority is known, and is not taken again.
func (i *Issuer) takeDelivery(ctx context.Context) error {
	set, _ := i.set.Load()
	a, err := i.delivered(ctx, time.Now(), set)
	found := ""
	if err != nil {
		found = detail(err)
	}
	i.mu.Lock()
	i.found = found
	i.mu.Unlock()
	if err != nil {
		return err
	}
	order := Order{Actor: upstreamActor, Reason: "issued by " + a.Upstream[0].Subject.String()}
	if order.check() != nil {
		order.Reason = ""
	}
	_, err = i.change(ctx, "prepare", order, func(d *draft) (string, error) {
		if d.set.expects(a) == nil { // another replica may have been first
			d.prepare(a)
		}
		return a.ID, nil
	})
	return err
}

// awaited says what is in the way of another authority from the upstream, or is
// empty if Troth makes its authorities itself.
func (i *Issuer) awaited() string {
	if i.config.Upstream == nil {
		return ""
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.found == "" {
		return "the upstream has issued nothing new"
	}
	return i.found
}

// detail returns an obstacle's detail, or what else the error says.
func detail(err error) string {
	if blocked := (*Blocked)(nil); errors.As(err, &blocked) {
		return blocked.Blockers[0].Detail
	}
	return err.Error()
}

// awaitUpstream is what stands in the way of a successor that only the upstream can
// issue.
func awaitUpstream(id, detail string) *Blocked {
	return &Blocked{Operation: "prepare", Authority: id, Blockers: []Blocker{{Obstacle: UpstreamUnchanged, Detail: detail}}}
}

// path leads from an authority to its trust anchor.
type path struct {
	certificates        []*x509.Certificate // the authority first, the anchor last
	presented           [][]byte            // those but the anchor, DER; none if the authority is the anchor
	intermediates       *x509.CertPool      // the same
	notBefore, notAfter time.Time           // when all of them are valid
}

func newPath(a Authority) path {
	p := path{certificates: append([]*x509.Certificate{a.Certificate}, a.Upstream...), notBefore: a.Certificate.NotBefore, notAfter: a.NotAfter()}
	if len(a.Upstream) > 0 {
		p.intermediates = x509.NewCertPool()
	}
	for n, c := range p.certificates {
		p.notBefore = later(p.notBefore, c.NotBefore)
		if n < len(a.Upstream) {
			p.presented = append(p.presented, c.Raw)
			p.intermediates.AddCert(c)
		}
	}
	return p
}

// first returns the certificate that ends first.
func (p path) first() *x509.Certificate {
	return slices.MinFunc(p.certificates, func(a, b *x509.Certificate) int { return a.NotAfter.Compare(b.NotAfter) })
}
