package ca

import (
	"context"
	"crypto/x509"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Meant is what a certificate should have become: what Lint compares it with.
type Meant struct {
	ID                  spiffeid.ID
	SPKI                []byte
	NotBefore, NotAfter time.Time
	Authority           *x509.Certificate
}

// Lint is what stands between the template and the signature.
func Lint(c *x509.Certificate, m Meant) error {
	l := &leaf{request: Request{ID: m.ID}, spki: m.SPKI, notBefore: m.NotBefore, notAfter: m.NotAfter}
	return lint(c, l, []*x509.Certificate{m.Authority})
}

// DecodeSet reads the stored form of a set.
func DecodeSet(data []byte) (Set, error) { return decodeSet(data) }

// EncodeSet is the inverse of DecodeSet.
func EncodeSet(s Set) ([]byte, error) { return s.encode() }

// TakeDelivery does once what Run does every few seconds with an upstream.
func (i *Issuer) TakeDelivery(ctx context.Context) error { return i.takeDelivery(ctx) }

// ParseUpstream reads what an upstream delivers, and returns the authority.
func ParseUpstream(chain, key, root []byte) (Authority, error) {
	d, err := parseUpstream(chain, key, root)
	return d.Authority, err
}

// Settle is how long a replica waits before it believes that an authority that is
// not active signs nothing any more, with SVIDs of an hour.
var Settle = settleOf(time.Hour)

// Lease is how long a replica signs after the store confirmed its document, then.
var Lease = leaseOf(time.Hour)

// Refresh does once what Run does all the time.
func (i *Issuer) Refresh(ctx context.Context) error {
	_, err := i.refresh(ctx)
	return err
}

// Known is all that Step decides by, besides the set.
type Known struct {
	Agents          Propagation
	Quiet           map[string]time.Time
	Left, Elsewhere map[string]time.Time
	Others          *time.Time
	Awaited         string // from the upstream
}

// Step is the decision that Rotate carries out.
func Step(now time.Time, set Set, k Known, life time.Duration) (do, id string, wake time.Time, overdue *Blocked) {
	e := evidence{Propagation: k.Agents, quiet: k.Quiet, left: make(map[string]leaves)}
	for id, until := range k.Left {
		e.left[id] = leaves{until: until, elsewhere: k.Elsewhere[id]}
	}
	if k.Others != nil {
		e.others = &leaves{until: *k.Others}
	}
	next, wake, overdue := step(now, set, e, life, k.Awaited)
	return next.do, next.id, wake, overdue
}

// StepOnce does once what Rotate does all the time, and returns what that was.
func (i *Issuer) StepOnce(ctx context.Context, agents Propagation) (string, error) {
	set, _ := i.set.Load()
	now := time.Now()
	next, _, _ := step(now, set, i.evidence(ctx, now, set, agents), i.profile.life, i.awaited())
	return next.do, i.carryOut(ctx, next, agents)
}
