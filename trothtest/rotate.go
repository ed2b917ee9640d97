package trothtest

import (
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"troth.dev/troth/agent/workload"
	"troth.dev/troth/ca"
	"troth.dev/troth/handshake"
)

// Rotate goes from the active authority to the next, as production does: Prepare,
// Activate, Revoke. It returns when every identity has an SVID of the new authority
// and a bundle without the old one, and every open stream was sent both.
//
// What was sent to an application may not have been read yet: the Workload API has no
// acknowledgement. Whoever asserts what an application in another process has, or a
// library's source behind a socket, waits for it.
func (a *Authority) Rotate() {
	if a.t != nil {
		a.t.Helper()
	}
	a.act("rotate", func() error {
		if err := a.prepare(); err != nil {
			return err
		}
		if err := a.activate(); err != nil {
			return err
		}
		return a.revoke()
	})
}

// Prepare is the first step of a rotation: it adds an authority to the bundle that
// signs nothing yet. If there is one, it does nothing.
func (a *Authority) Prepare() {
	if a.t != nil {
		a.t.Helper()
	}
	a.act("prepare", a.prepare)
}

// Activate is the second step of a rotation: the prepared authority signs in the place
// of the active one, and every identity gets a new SVID. The old authority is still in
// the bundle. An identity that was made to expire gets none.
func (a *Authority) Activate() {
	if a.t != nil {
		a.t.Helper()
	}
	a.act("activate", a.activate)
}

// Revoke is the last step of a rotation: every authority that is not active any more
// leaves the bundle. An SVID of it, which an identity has that was made to expire or
// is in an [Outage], is trusted by nobody from then on.
func (a *Authority) Revoke() {
	if a.t != nil {
		a.t.Helper()
	}
	a.act("revoke", a.revoke)
}

// Taint is what an operator does when the active authority's key is stolen: another
// takes its place at once, unannounced, and what it signed is replaced. It stays in the
// bundle until Revoke.
func (a *Authority) Taint() {
	if a.t != nil {
		a.t.Helper()
	}
	a.act("taint", func() error {
		set, _ := a.issuer.Authorities().Load()
		active, ok := set.Active()
		if !ok {
			return ca.ErrNoActiveAuthority
		}
		if _, err := a.issuer.Taint(a.ctx, active.ID, order("the key is stolen, as a test has it")); err != nil {
			return err
		}
		if err := a.tell(); err != nil {
			return err
		}
		return a.renewAll()
	})
}

// Renew gives every identity that is not made to expire another SVID, now.
func (a *Authority) Renew() {
	if a.t != nil {
		a.t.Helper()
	}
	a.act("renew", a.renewAll)
}

func (a *Authority) prepare() error {
	if _, err := a.issuer.Prepare(a.ctx, order("")); err != nil {
		return err
	}
	return a.tell()
}

func (a *Authority) activate() error {
	set, _ := a.issuer.Authorities().Load()
	next, ok := set.Successor()
	if !ok {
		return errors.New("no authority is prepared: call Prepare first")
	}
	known, err := a.prove()
	if err != nil {
		return err
	}
	o := order("")
	o.Evidence = known
	if _, err := a.issuer.Activate(a.ctx, next.ID, o); err != nil {
		return err
	}
	if err := a.tell(); err != nil {
		return err
	}
	return a.renewAll()
}

// revoke uses force. The gate waits for replicas that may still sign, of which there
// are none, and for SVIDs to be replaced, which they are, or a test wants otherwise.
func (a *Authority) revoke() error {
	set, _ := a.issuer.Authorities().Load()
	for _, each := range set.Authorities {
		if each.State != ca.Old && each.State != ca.Tainted {
			continue
		}
		if _, err := a.issuer.Revoke(a.ctx, each.ID, order("this process is the only replica and the only agent")); err != nil {
			return err
		}
	}
	return a.tell()
}

// order is who wants a change. A reason means force.
func order(reason string) ca.Order {
	return ca.Order{Actor: "trothtest", Reason: reason, Force: reason != ""}
}

// prove does what each agent does before an authority is activated: the code that
// verifies for workloads has to accept a leaf under it and to refuse one that nobody
// trusts. This process is the only agent there is.
func (a *Authority) prove() (ca.Propagation, error) {
	probe, err := a.issuer.Probe(a.ctx)
	if err != nil {
		return ca.Propagation{}, err
	}
	bundle, now := a.Bundle(), time.Now()
	verify := func(chain [][]byte) error {
		var certificates []*x509.Certificate
		for _, der := range chain {
			c, err := x509.ParseCertificate(der)
			if err != nil {
				return err
			}
			certificates = append(certificates, c)
		}
		_, err := handshake.VerifyAcceptingTests(certificates, bundle, now)
		return err
	}
	if err := verify(probe.Trusted); err != nil {
		return ca.Propagation{}, fmt.Errorf("prove the prepared authority: %w", err)
	}
	if verify(probe.Untrusted) == nil {
		return ca.Propagation{}, errors.New("prove the prepared authority: what nobody trusts is accepted")
	}
	return ca.Propagation{
		At: now, Expected: 1, Received: 1, Applied: 1, Proved: 1,
		Revision: probe.Revision, Authority: probe.Authority,
	}, nil
}

// trust takes up the bundle. The caller holds mu.
func (a *Authority) trust() {
	bundle, _ := a.issuer.Bundle().Load()
	a.bundle = bundle.X509Bundle()
}

// tell publishes the bundle to every identity, and returns when all open streams have
// been sent it.
func (a *Authority) tell() error {
	a.mu.Lock()
	a.trust()
	all := slices.Collect(maps.Values(a.identities))
	a.publish(all...)
	a.mu.Unlock()
	return a.delivered(all...)
}

func (a *Authority) renewAll() error {
	a.mu.Lock()
	var all []*Identity
	for _, i := range a.identities {
		if i.svid != nil && !i.held {
			all = append(all, i)
		}
	}
	a.mu.Unlock()
	return a.reissue(0, all...)
}

// delivered returns when the open streams of the identities have been sent what was
// published.
func (a *Authority) delivered(identities ...*Identity) error {
	const patience = 10 * time.Second
	var limit <-chan time.Time
	for _, i := range identities {
		sent, revision := i.sending()
		for sent != nil {
			now, changed := sent.Load()
			if now.Streams == 0 || now.Revisions[i.id.TrustDomain()] >= revision {
				break
			}
			if limit == nil {
				limit = time.After(patience)
			}
			select {
			case <-changed:
			case <-limit:
				return fmt.Errorf("a stream of %q did not take what it was sent within %v: does its client read?", i.id, patience)
			case <-a.ctx.Done():
				return errClosed
			}
		}
	}
	return nil
}

// sending returns what is known of the streams of an identity, and what they are to be
// sent; nil if they are to be sent nothing.
func (i *Identity) sending() (sent *deliveredValue, revision uint64) {
	i.of.mu.Lock()
	defer i.of.mu.Unlock()
	state, _ := i.state.Load()
	switch {
	case i.socket == nil, i.outage != 0, state.Status != workload.StatusReady:
		return nil, 0
	case time.Now().After(i.svid.Certificates[0].NotAfter):
		return nil, 0 // what has expired is sent to nobody
	}
	return i.socket.server.Delivered(), state.Bundles[0].Revision
}
