package agent

import (
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/handshake"
)

// probe is what the control plane wants proved. It is never changed.
type probe struct {
	revision           uint64
	authority          string
	trusted, untrusted [][]byte // leaf first; nil if it was not fit to be looked at
}

// maxChain is the most certificates that a leaf of a probe may come with: what
// package handshake takes from a peer.
const maxChain = 10

// newProbe returns nil if there is nothing to prove.
func newProbe(in *trothv1.Probe) *probe {
	if len(in.GetTrusted())+len(in.GetUntrusted()) == 0 {
		return nil
	}
	fit := func(chain [][]byte) [][]byte {
		if len(chain) > maxChain {
			return nil
		}
		for _, der := range chain {
			if len(der) > maxCertificate {
				return nil
			}
		}
		return chain
	}
	return &probe{
		revision: in.GetRevision(), authority: in.GetAuthorityId(),
		trusted: fit(in.GetTrusted()), untrusted: fit(in.GetUntrusted()),
	}
}

// outcome is what a probe has shown at one revision of the bundle. The zero outcome
// is that nothing was tried.
type outcome struct {
	probe    *probe
	revision uint64
	failure  trothv1.ProbeFailure
	err      error // says more about the failure
}

// proves says whether the outcome is a proof.
func (o outcome) proves() bool { return o.probe != nil && o.err == nil }

// try puts the probe to the code that verifies peers: the handshake's, which the
// proxy uses too, and that of go-spiffe, which workloads run. Both get the bundle as
// workloads are sent it.
//
// The leaf that nobody trusts has to be refused for that reason. One that is refused
// because it has expired, or cannot be parsed, would be refused by who trusts
// everybody, and proves nothing: that counts as if it had been accepted.
func (p *probe) try(t *trust, now time.Time) outcome {
	o := outcome{probe: p, revision: t.revision}
	var der []byte
	for _, authority := range t.bundle.X509Authorities() {
		der = append(der, authority.Raw...)
	}
	bundle, err := x509bundle.ParseRaw(t.bundle.TrustDomain(), der)
	if err == nil {
		err = p.tryTrusted(bundle, now)
	}
	if err != nil {
		o.failure = trothv1.ProbeFailure_PROBE_FAILURE_TRUSTED_REFUSED
		o.err = fmt.Errorf("the leaf of authority %.100q: %w", p.authority, err)
		return o
	}
	if err := p.tryUntrusted(bundle, now); err != nil {
		o.failure = trothv1.ProbeFailure_PROBE_FAILURE_UNTRUSTED_ACCEPTED
		o.err = fmt.Errorf("the leaf that nobody trusts: %w", err)
	}
	return o
}

func (p *probe) tryTrusted(bundle *x509bundle.Bundle, now time.Time) error {
	chain, err := parseChain(p.trusted)
	if err != nil {
		return err
	}
	peer, err := handshake.Verify(chain, bundle, now)
	if err != nil {
		return err
	}
	id, chains, err := x509svid.ParseAndVerify(p.trusted, bundle, x509svid.WithTime(now))
	if err != nil {
		return err
	}
	for _, each := range []spiffeid.ID{peer.ID, id} {
		if !each.MemberOf(bundle.TrustDomain()) {
			return fmt.Errorf("its identity is %q", each)
		}
	}
	// By another authority it would be no proof of this one. What is above an
	// authority under an upstream root is not ours to compare.
	if got := hex.EncodeToString(chains[0][1].SubjectKeyId); got != p.authority {
		return fmt.Errorf("it is accepted by authority %q", got)
	}
	return nil
}

func (p *probe) tryUntrusted(bundle *x509bundle.Bundle, now time.Time) error {
	chain, err := parseChain(p.untrusted)
	if err != nil {
		return err
	}
	_, err = handshake.Verify(chain, bundle, now)
	if refusal, ok := errors.AsType[*handshake.Error](err); !ok || refusal.Code != handshake.CertificateUntrusted {
		return fmt.Errorf("the handshake does not refuse it as untrusted: %w", orAccepted(err))
	}
	_, _, err = x509svid.ParseAndVerify(p.untrusted, bundle, x509svid.WithTime(now))
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); !ok {
		return fmt.Errorf("go-spiffe does not refuse it as untrusted: %w", orAccepted(err))
	}
	return nil
}

func orAccepted(err error) error {
	if err == nil {
		return errors.New("it is accepted")
	}
	return err
}

func parseChain(raw [][]byte) ([]*x509.Certificate, error) {
	if len(raw) == 0 {
		return nil, errors.New("it is missing, or larger than an SVID can be")
	}
	chain := make([]*x509.Certificate, len(raw))
	for n, der := range raw {
		var err error
		if chain[n], err = x509.ParseCertificate(der); err != nil {
			return nil, err
		}
	}
	return chain, nil
}
