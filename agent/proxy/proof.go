package proxy

import (
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"troth.dev/troth/handshake"
	"troth.dev/troth/policy"
)

// proof is what the two ends of a tunnel have shown each other. It holds for as long
// as both SVIDs would be accepted now. What it consists of can be renewed, by a
// newer tunnel between the same two: the connections of the old one live on.
type proof struct {
	peer, own spiffeid.ID
	conn      *handshake.Conn

	mu         sync.Mutex
	chain      []*x509.Certificate // the peer's, leaf first; guarded by mu
	svid       *x509svid.SVID      // our own; guarded by mu
	acceptedBy *x509bundle.Set     // by which both were last found to be good; guarded by mu
}

// newProof is the proof of a handshake that was made as i.
func newProof(c *handshake.Conn, i Identity) *proof {
	return &proof{
		peer: c.PeerID(), own: i.SVID.ID, conn: c,
		chain: c.ConnectionState().PeerCertificates, svid: i.SVID, acceptedBy: i.Bundles,
	}
}

// Why a proof no longer holds.
const (
	identityGone     policy.Reason = "IDENTITY_GONE"     // the pod has no SVID any more
	proofExpired     policy.Reason = "PROOF_EXPIRED"     // an SVID has, and nothing renewed the proof
	peerUntrusted    policy.Reason = "PEER_UNTRUSTED"    // whoever signed the peer's SVID is not trusted any more
	identityReplaced policy.Reason = "IDENTITY_REPLACED" // the authority of our own is not trusted any more
)

// check returns why the proof does not hold for a pod that is i at the time now, and
// "" if it does.
func (p *proof) check(i Identity, now time.Time) (policy.Reason, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case i.SVID == nil || i.Bundles == nil || i.SVID.ID != p.own:
		return identityGone, errors.New("the pod has not this identity any more")
	case !now.Before(p.end()):
		return proofExpired, nil
	case p.acceptedBy == i.Bundles:
		return "", nil
	}
	// The very code of the handshake, by what is trusted now.
	if _, err := handshake.Verify(p.chain, i.Bundles, now); err != nil {
		return peerUntrusted, err
	}
	if _, err := handshake.Verify(p.svid.Certificates, i.Bundles, now); err != nil {
		return identityReplaced, err
	}
	p.acceptedBy = i.Bundles
	return "", nil
}

// until returns when the proof ends unless it is renewed.
func (p *proof) until() time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.end()
}

// end is the first moment at which a certificate of either chain is not valid any
// more. The caller holds mu.
func (p *proof) end() time.Time {
	end := p.chain[0].NotAfter
	for _, chain := range [][]*x509.Certificate{p.chain, p.svid.Certificates} {
		for _, c := range chain {
			if c.NotAfter.Before(end) {
				end = c.NotAfter
			}
		}
	}
	return end
}

// authorities returns the ids of the authorities that signed the peer's SVID and our
// own: one, if it is the same.
func (p *proof) authorities() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	theirs, ours := hex.EncodeToString(p.chain[0].AuthorityKeyId), hex.EncodeToString(p.svid.Certificates[0].AuthorityKeyId)
	if theirs == ours {
		return []string{ours}
	}
	return []string{theirs, ours}
}

// madeBy reports whether it is the SVID that our end of the proof consists of.
func (p *proof) madeBy(svid *x509svid.SVID) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.svid == svid
}

// renew makes p consist of what newer consists of, if that is between the same two.
func (p *proof) renew(newer *proof) bool {
	if p == newer || p.peer != newer.peer || p.own != newer.own {
		return false
	}
	newer.mu.Lock()
	chain, svid, by := newer.chain, newer.svid, newer.acceptedBy
	newer.mu.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.chain, p.svid, p.acceptedBy = chain, svid, by
	return true
}

// A tunnel is named, to renew its proof on another one, by what nobody but its two
// ends can know: a value that TLS exports (RFC 8446 §7.5). The callee's answer is
// another, so that the caller knows that it is the same callee.
const (
	renewedByCaller = "EXPORTER-troth renew caller"
	renewedByCallee = "EXPORTER-troth renew callee"
)

// secret returns a value that only the two ends of the tunnel know.
func (p *proof) secret(label string) (string, error) {
	state := p.conn.ConnectionState()
	value, err := state.ExportKeyingMaterial(label, nil, 32)
	if err != nil {
		return "", err
	}
	return base64.RawURLEncoding.EncodeToString(value), nil
}
