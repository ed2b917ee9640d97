package ca

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/storage"
)

// Probe is what an agent proves with that it trusts a prepared authority, before
// anything depends on it: the code that verifies for workloads has to accept
// Trusted and to refuse Untrusted. Both are DER, leaf first, without the trust anchor;
// the leaves have an identity that no policy names, and their keys exist no longer.
type Probe struct {
	Revision  uint64 // of the bundle that verifies Trusted
	Authority string
	Trusted   [][]byte // under Authority
	Untrusted [][]byte // under a root that was made for it and that nobody trusts
	NotAfter  time.Time
}

// ErrNothingPrepared says that there is no prepared authority to probe.
var ErrNothingPrepared = errors.New("ca: no authority is prepared")

// probeCaller is who asks for probes, in the ledger.
const probeCaller = "probe"

// Probe makes a probe of what [Set.Successor] returns, or fails with
// [ErrNothingPrepared]. Like every certificate it is recorded before. One does for
// all agents, for as long as the revision is the current one and NotAfter ahead.
func (i *Issuer) Probe(ctx context.Context) (Probe, error) {
	now := time.Now()
	state, err := i.current(ctx, now)
	if err != nil {
		return Probe{}, err
	}
	successor, ok := state.set.Successor()
	if !ok {
		return Probe{}, ErrNothingPrepared
	}
	trusted, err := i.probe(ctx, i.config.Keys, successor, now, i.config.Ledger)
	if err != nil {
		return Probe{}, err
	}
	throwaway, err := throwawayKeys()
	if err != nil {
		return Probe{}, err
	}
	stranger, err := i.selfSigned(ctx, throwaway, now)
	if err != nil {
		return Probe{}, err
	}
	untrusted, err := i.probe(ctx, throwaway, stranger, now, nil) // no authority of ours signs it
	if err != nil {
		return Probe{}, err
	}
	return Probe{
		Revision: state.set.Revision, Authority: successor.ID, NotAfter: trusted.NotAfter,
		Trusted: trusted.Certificates, Untrusted: untrusted.Certificates,
	}, nil
}

// probe issues one leaf under an authority that is not active, for a key that is
// thrown away.
func (i *Issuer) probe(ctx context.Context, keys Keys, by Authority, now time.Time, ledger storage.Ledger) (SVID, error) {
	id, err := spiffeid.FromSegments(i.config.TrustDomain, "troth", "probe")
	if err != nil {
		return SVID{}, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return SVID{}, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return SVID{}, err
	}
	as := &authorities{roots: x509.NewCertPool(), path: newPath(by)}
	as.roots.AddCert(by.anchor())
	if as.active, err = openSigner(ctx, keys, by); err != nil {
		return SVID{}, err
	}
	if err := as.canSign(now, i.profile.life); err != nil {
		return SVID{}, err
	}
	l, err := i.prepare(Request{ID: id, CSR: csr, Caller: probeCaller}, as, now)
	if err != nil {
		return SVID{}, err
	}
	if ledger == nil {
		return i.sign(l, as)
	}
	if err := ledger.Record(ctx, l.record); err != nil {
		return SVID{}, fmt.Errorf("%w: %w", ErrLedger, err)
	}
	svid, err := i.sign(l, as)
	if err == nil {
		i.audit(ctx, l.record)
	}
	return svid, err
}

// throwawayKeys seals under a key that nobody keeps.
func throwawayKeys() (*SealedKeys, error) {
	kek := make([]byte, KeySize)
	rand.Read(kek)
	return NewSealedKeys(kek)
}
