package ca

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

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
	// Life is how long the SVID is valid from now on, if it is not to be for as long as
	// the profile says: from two seconds to Config.LongestLife. Zero means the profile's.
	// It ends with a whole second, up to one earlier.
	Life time.Duration
	// FromNotBefore counts Life, which is whole seconds then, from NotBefore on, with what
	// the SVID is backdated by: as the API server counts that of a PodCertificateRequest.
	FromNotBefore bool
	// Caller, Node and PodUID go into the ledger.
	Caller, Node, PodUID string
}

// KubeletCaller is the Caller of requests that the kubelet makes for a pod. No agent
// knows what became of those SVIDs: who holds one trusts what is published.
const KubeletCaller = "kubelet"

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
// it is. One that asks for a life that is too long for the active authority fails with
// [ErrAuthorityExpiring]. Issue itself fails, and releases nothing, if no authority can sign
// ([ErrNoActiveAuthority], [ErrAuthorityExpiring]), none is known to be the active
// one still ([ErrUnconfirmed]), or nothing could be recorded ([ErrLedger]).
//
// Who the caller is, and whether it may have the identities, is settled before.
func (i *Issuer) Issue(ctx context.Context, requests ...Request) ([]Result, error) {
	now := time.Now()
	state, err := i.current(ctx, now)
	if err != nil {
		return nil, err
	}
	if err := state.canSign(now, i.profile.life); err != nil {
		return nil, err
	}
	results := make([]Result, len(requests))
	leaves := make([]*leaf, len(requests))
	issuances := make([]storage.Issuance, 0, len(requests))
	for n, request := range requests {
		leaves[n], results[n].Err = i.prepare(request, state, now)
		if results[n].Err == nil {
			issuances = append(issuances, leaves[n].record)
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
	}
	// 7. Released within the lease. If this process was stopped somewhere above,
	// the authority may have been revoked meanwhile.
	if lease := leaseOf(i.profile.life); state.stale(time.Now(), lease) {
		return nil, fmt.Errorf("%w: it took more than %v to record and sign", ErrUnconfirmed, lease)
	}
	for n, l := range leaves {
		if results[n].Err == nil {
			i.audit(ctx, l.record)
		}
	}
	return results, nil
}

// prepare does all that can be done before the issuance is recorded.
func (i *Issuer) prepare(request Request, state *authorities, now time.Time) (*leaf, error) {
	if !request.ID.MemberOf(i.config.TrustDomain) || request.ID.Path() == "" {
		return nil, fmt.Errorf("ca: %q is no identity of trust domain %q", request.ID, i.config.TrustDomain)
	}
	life := i.profile.life
	if request.Life != 0 {
		life = request.Life
		if life < minLife || life > i.config.LongestLife {
			return nil, fmt.Errorf("ca: an SVID that lives %v: it is from %v to %v", life, minLife, i.config.LongestLife)
		}
		if request.FromNotBefore && life%time.Second != 0 {
			return nil, fmt.Errorf("ca: an SVID that lives %v from NotBefore on: that is not of whole seconds", life)
		}
		if err := state.canSign(now, life); err != nil {
			return nil, err
		}
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
		serial:    newSerial(now),
		notBefore: now.Add(-i.profile.backdate).UTC().Truncate(time.Second),
		notAfter:  now.Add(life).UTC().Truncate(time.Second),
	}
	l.notBefore = later(l.notBefore, state.path.notBefore)
	if request.FromNotBefore {
		l.notAfter = l.notBefore.Add(life)
	}
	l.record = l.issuance(state.active.id, now)
	if err := l.record.Check(); err != nil {
		// The ledger would refuse the whole batch for it.
		return nil, fmt.Errorf("ca: %w", err)
	}
	if l.tbs, err = i.profile.template(l, state.active); err != nil {
		return nil, fmt.Errorf("ca: assemble the certificate: %w", err)
	}
	// 3. Lint the very bytes that will be signed, parsed as a verifier would.
	draft, err := assemble(l.tbs, placeholderForLintOnly)
	if err != nil {
		return nil, fmt.Errorf("ca: assemble the certificate: %w", err)
	}
	if l.draft, err = x509.ParseCertificate(draft); err != nil {
		return nil, fmt.Errorf("ca: lint: %w", err)
	}
	if err := lint(l.draft, l, state.path.certificates); err != nil {
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
	// fault, must not hand out certificates that fail in production. What is
	// verified is the parsed draft under its real signature: to parse the same
	// bytes again would cost time and show nothing new.
	certificate := *l.draft
	certificate.Raw, certificate.Signature = der, signature
	_, err = certificate.Verify(x509.VerifyOptions{
		Roots:         state.roots,
		Intermediates: state.path.intermediates,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return SVID{}, fmt.Errorf("ca: verify what was signed: %w", err)
	}
	return SVID{
		ID:           l.request.ID,
		Certificates: append([][]byte{der}, state.path.presented...),
		NotBefore:    l.notBefore,
		NotAfter:     l.notAfter,
		AuthorityID:  state.active.id,
	}, nil
}

func (i *Issuer) audit(ctx context.Context, issued storage.Issuance) {
	if !i.config.Audit.Enabled(ctx, slog.LevelInfo) {
		return
	}
	i.config.Audit.LogAttrs(ctx, slog.LevelInfo, "issued",
		slog.String("spiffe_id", issued.ID.String()),
		slog.String("serial", issued.Serial),
		slog.String("authority_id", issued.AuthorityID),
		slog.Time("not_after", issued.NotAfter),
		slog.String("caller", issued.Caller),
		slog.String("node", issued.Node),
		slog.String("pod_uid", issued.PodUID))
}

func (l *leaf) issuance(authorityID string, now time.Time) storage.Issuance {
	return storage.Issuance{
		Serial:      strings.TrimLeft(hex.EncodeToString(l.serial), "0"),
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

// newSerial returns 20 bytes that are a positive DER integer in its only encoding:
// the first bit is clear (not negative), the second set (not padded). Then come 30
// bits of the time in seconds and 128 random ones.
//
// The time is for the ledger. Its index by serial number then grows at one end;
// numbers of chance alone change another page of it for every certificate. With
// them 64 callers, one certificate a call, cost 1.44 times the floor of test/load
// instead of 1.29. NotBefore tells the time anyway.
func newSerial(now time.Time) []byte {
	serial := make([]byte, 20)
	binary.BigEndian.PutUint32(serial, uint32(now.Unix())&0x3fff_ffff|0x4000_0000)
	rand.Read(serial[4:])
	return serial
}

// subjectKeyID identifies a leaf's key (RFC 5280 §4.2.1.2, RFC 7093 §2).
func subjectKeyID(spki []byte) []byte {
	sum := sha256.Sum256(spki)
	return sum[:20]
}
