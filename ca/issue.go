package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"troth.dev/troth/storage"
)

// Request asks for one X509-SVID.
type Request struct {
	// ID is the identity, derived and permitted by whoever asks. It is of the
	// issuer's trust domain and has a path.
	ID spiffeid.ID
	// CSR is a PKCS #10 request, DER. Its public key and the proof of possession
	// are used, and nothing else.
	CSR []byte
	// Caller, Node and PodUID go into the ledger.
	Caller, Node, PodUID string
}

// SVID is an issued X509-SVID.
type SVID struct {
	ID spiffeid.ID
	// Certificates are DER, leaf first, without the trust anchor.
	Certificates [][]byte
	NotBefore    time.Time
	NotAfter     time.Time
	AuthorityID  string
}

// Result is an SVID, or the error that one request of a batch failed with: an
// [*Error] if the request is to blame.
type Result struct {
	SVID SVID
	Err  error
}

// Issue issues an X509-SVID for each request. Each succeeds or fails on its own,
// at the same index; the batch pays once for being made durable, and blocks until
// it is. Issue itself fails, and releases nothing, if no authority can sign
// ([ErrNoActiveAuthority], [ErrAuthorityExpiring]) or nothing could be recorded
// ([ErrLedger]).
//
// Who the caller is, and whether it may have the identities, is settled before.
func (i *Issuer) Issue(ctx context.Context, requests ...Request) ([]Result, error) {
	now := time.Now()
	state, err := i.signer(now)
	if err != nil {
		return nil, err
	}
	results := make([]Result, len(requests))
	leaves := make([]*leaf, len(requests))
	issuances := make([]storage.Issuance, 0, len(requests))
	for n, request := range requests {
		leaves[n], results[n].Err = i.prepare(request, state, now)
		if results[n].Err == nil {
			issuances = append(issuances, leaves[n].issuance(state.active.id, now))
		}
	}
	if len(issuances) == 0 {
		return results, nil
	}

	// 4. Recorded before released. If the process dies before this line, nothing
	// was issued; after it, the ledger may list a certificate that nobody got,
	// and never lacks one that somebody got.
	if err := i.config.Ledger.Record(ctx, issuances...); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrLedger, err)
	}
	for n, l := range leaves {
		if results[n].Err != nil {
			continue
		}
		results[n].SVID, results[n].Err = i.sign(l, state)
		if results[n].Err == nil {
			i.audit(ctx, l, state.active.id)
		}
	}
	return results, nil
}

// prepare does all that can be done before the issuance is recorded.
func (i *Issuer) prepare(request Request, state *authorities, now time.Time) (*leaf, error) {
	if !request.ID.MemberOf(i.config.TrustDomain) || request.ID.Path() == "" {
		return nil, fmt.Errorf("ca: %q is no identity of trust domain %q", request.ID, i.config.TrustDomain)
	}
	// 1. The public key, and the proof that the sender holds its private half.
	spki, err := publicKey(request.CSR)
	if err != nil {
		return nil, err
	}
	// 2. The profile makes the certificate.
	l := &leaf{
		request:   request,
		spki:      spki,
		serial:    newSerial(),
		notBefore: now.Add(-i.profile.backdate).UTC().Truncate(time.Second),
		notAfter:  now.Add(i.profile.life).UTC().Truncate(time.Second),
	}
	if l.notBefore.Before(state.active.certificate.NotBefore) {
		l.notBefore = state.active.certificate.NotBefore
	}
	if l.tbs, err = i.profile.template(l, state.active); err != nil {
		return nil, fmt.Errorf("ca: assemble the certificate: %w", err)
	}
	// 3. Lint the very bytes that will be signed, parsed as a verifier would.
	draft, err := assemble(l.tbs, placeholderForLintOnly)
	if err != nil {
		return nil, fmt.Errorf("ca: assemble the certificate: %w", err)
	}
	parsed, err := x509.ParseCertificate(draft)
	if err != nil {
		return nil, fmt.Errorf("ca: lint: %w", err)
	}
	if err := lint(parsed, l, state.active.certificate); err != nil {
		return nil, fmt.Errorf("ca: lint: %w", err)
	}
	return l, nil
}

// sign signs what was recorded and linted, and verifies the outcome.
func (i *Issuer) sign(l *leaf, state *authorities) (SVID, error) {
	// 5. Sign.
	digest := sha256.Sum256(l.tbs)
	signature, err := state.active.key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return SVID{}, fmt.Errorf("ca: sign: %w", err)
	}
	der, err := assemble(l.tbs, signature)
	if err != nil {
		return SVID{}, fmt.Errorf("ca: assemble the certificate: %w", err)
	}
	// 6. Verify as a peer would: a key that signs wrongly, in hardware or by a
	// fault, must not hand out certificates that fail in production.
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		return SVID{}, fmt.Errorf("ca: verify what was signed: %w", err)
	}
	id, _, err := x509svid.Verify([]*x509.Certificate{certificate}, state.bundle)
	if err != nil {
		return SVID{}, fmt.Errorf("ca: verify what was signed: %w", err)
	}
	if id != l.request.ID || !bytes.Equal(certificate.RawTBSCertificate, l.tbs) {
		return SVID{}, errors.New("ca: verify what was signed: it is not what was asked for")
	}
	return SVID{
		ID:           l.request.ID,
		Certificates: [][]byte{der},
		NotBefore:    l.notBefore,
		NotAfter:     l.notAfter,
		AuthorityID:  state.active.id,
	}, nil
}

func (i *Issuer) audit(ctx context.Context, l *leaf, authorityID string) {
	if !i.config.Audit.Enabled(ctx, slog.LevelInfo) {
		return
	}
	i.config.Audit.LogAttrs(ctx, slog.LevelInfo, "issued",
		slog.String("spiffe_id", l.request.ID.String()),
		slog.String("serial", l.serialText()),
		slog.String("authority_id", authorityID),
		slog.Time("not_after", l.notAfter),
		slog.String("caller", l.request.Caller),
		slog.String("node", l.request.Node),
		slog.String("pod_uid", l.request.PodUID))
}

func (l *leaf) issuance(authorityID string, now time.Time) storage.Issuance {
	return storage.Issuance{
		Serial:      l.serialText(),
		ID:          l.request.ID,
		AuthorityID: authorityID,
		NotBefore:   l.notBefore,
		NotAfter:    l.notAfter,
		IssuedAt:    now.UTC().Truncate(time.Millisecond),
		Caller:      l.request.Caller,
		Node:        l.request.Node,
		PodUID:      l.request.PodUID,
	}
}

// serialText is the serial as the ledger and openssl -serial spell it.
func (l *leaf) serialText() string {
	return strings.TrimLeft(hex.EncodeToString(l.serial), "0")
}

// newSerial returns 16 random bytes that are a positive DER integer in its only
// encoding: the first bit is clear (not negative), the second set (not padded).
// 126 random bits are left.
func newSerial() []byte {
	serial := make([]byte, 16)
	rand.Read(serial)
	serial[0] = serial[0]&0x7f | 0x40
	return serial
}

// subjectKeyID identifies a leaf's key (RFC 5280 §4.2.1.2, RFC 7093 §2).
func subjectKeyID(spki []byte) []byte {
	sum := sha256.Sum256(spki)
	return sum[:20]
}
