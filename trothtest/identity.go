package trothtest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"troth.dev/troth/agent/workload"
	"troth.dev/troth/ca"
	"troth.dev/troth/handshake"
	"troth.dev/troth/internal/latest"
)

// Identity is one workload's identity: a SPIFFE ID, and the SVIDs and trust bundles
// that its Workload API gives it. It is an x509svid.Source and an x509bundle.Source,
// which always have what was published last, and read nothing in between.
type Identity struct {
	of *Authority
	id spiffeid.ID

	// state is what the Workload API serves, and known what the sources have: what
	// was published, but for an Outage.
	state latest.Value[workload.State]
	known atomic.Pointer[workload.State]

	// All of it is guarded by of.mu.
	svid    *x509svid.SVID
	renewAt time.Time
	held    bool // nothing is renewed: it is to expire
	outage  Outage
	socket  *socket // nil before the first
}

// Identity returns the identity of a path, such as "/ns/shop/sa/web", and gives it
// its first SVID. The same path is the same Identity.
func (a *Authority) Identity(path string) *Identity {
	if a.t != nil {
		a.t.Helper()
	}
	id, err := spiffeid.FromPath(a.config.TrustDomain, path)
	if err == nil && path == "" {
		err = errors.New("a workload's SPIFFE ID has a path")
	}
	if err != nil {
		a.fail(fmt.Errorf("identity %q: %w", path, err))
		return &Identity{of: a}
	}
	i := a.identity(id)
	if i.known.Load() == nil {
		a.act("identity", func() error { return a.reissue(0, i) })
	}
	return i
}

func (a *Authority) identity(id spiffeid.ID) *Identity {
	a.mu.Lock()
	defer a.mu.Unlock()
	i := a.identities[id]
	if i == nil {
		i = &Identity{of: a, id: id}
		a.identities[id] = i
	}
	return i
}

// ID returns the SPIFFE ID.
func (i *Identity) ID() spiffeid.ID { return i.id }

// GetX509SVID returns the newest SVID, expired or not. It implements
// x509svid.Source.
func (i *Identity) GetX509SVID() (*x509svid.SVID, error) {
	known := i.known.Load()
	if known == nil {
		return nil, errors.New("trothtest: no SVID")
	}
	return known.Identities[0].SVID, nil
}

// GetX509BundleForTrustDomain returns the newest trust bundle. It implements
// x509bundle.Source, and fails for every trust domain but its own.
func (i *Identity) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	known := i.known.Load()
	if known == nil || td != i.id.TrustDomain() {
		return nil, fmt.Errorf("trothtest: no bundle of trust domain %q", td)
	}
	return known.Bundles[0].Bundle, nil
}

// TLSServer returns the configuration of a server that demands a certificate of its
// clients, and accepts those that the authorizer does. It is always current: each
// handshake has the newest SVID and bundle.
func (i *Identity) TLSServer(clients tlsconfig.Authorizer) *tls.Config {
	return tlsconfig.MTLSServerConfig(i, i, clients)
}

// TLSClient returns the configuration of a client, as TLSServer does. It verifies
// the server by its SPIFFE ID, and not by a host name.
func (i *Identity) TLSClient(server tlsconfig.Authorizer) *tls.Config {
	return tlsconfig.MTLSClientConfig(i, i, server)
}

// Handshake returns what Troth's own handshake takes, in the order given. It accepts
// what was issued for tests.
func (i *Identity) Handshake(order handshake.Order) *handshake.Config {
	return &handshake.Config{Order: order, SVID: i, Bundles: i, AcceptTests: true}
}

// Renew gives the identity another SVID with another key, now. If it was made to
// expire, it is renewed in time again.
func (i *Identity) Renew() {
	a := i.of
	if a.t != nil {
		a.t.Helper()
	}
	a.act("renew", func() error {
		a.mu.Lock()
		i.held = false
		a.mu.Unlock()
		return a.reissue(0, i)
	})
}

// Expire has the identity's SVID run out: it gets one that ends within two seconds,
// and then no other until Renew. Expire returns when that has expired, which takes as
// long, or no time in a bubble.
//
// An application that has it keeps it. One that comes anew to the Workload API is
// told to come again.
func (i *Identity) Expire() {
	a := i.of
	if a.t != nil {
		a.t.Helper()
	}
	a.act("expire", func() error {
		a.mu.Lock()
		i.held = true
		a.mu.Unlock()
		if err := a.reissue(shortest, i); err != nil {
			return err
		}
		a.mu.Lock()
		end := i.svid.Certificates[0].NotAfter
		a.mu.Unlock()
		for !time.Now().After(end) {
			select {
			case <-time.After(time.Until(end) + time.Millisecond):
			case <-a.ctx.Done():
				return errClosed
			}
		}
		return nil
	})
}

// shortest is the shortest life that the authority issues for.
const shortest = 2 * time.Second

// reissue gives each of the identities a new SVID that lives as long as given, 0 for
// the usual. It returns when all open streams have been sent it.
func (a *Authority) reissue(life time.Duration, identities ...*Identity) error {
	if err := a.issue(life, identities...); err != nil {
		return err
	}
	select {
	case a.wake <- struct{}{}:
	default: // it is told already
	}
	return a.delivered(identities...)
}

// issue gives each of the identities a new SVID, and publishes it. The caller holds
// the token of acting.
func (a *Authority) issue(life time.Duration, identities ...*Identity) error {
	requests := make([]ca.Request, len(identities))
	keys := make([]*ecdsa.PrivateKey, len(identities))
	for n, i := range identities {
		var err error
		if keys[n], err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			return err
		}
		requests[n] = ca.Request{ID: i.id, Life: life, Caller: "trothtest"}
		if requests[n].CSR, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, keys[n]); err != nil {
			return err
		}
	}
	now := time.Now()
	results, err := a.issuer.Issue(a.ctx, requests...)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for n, i := range identities {
		if err := results[n].Err; err != nil {
			return err
		}
		svid, err := newSVID(results[n].SVID, keys[n])
		if err != nil {
			return err
		}
		i.svid, i.renewAt = svid, now.Add(a.issuer.SVIDLife()/2)
	}
	a.publish(identities...)
	return nil
}

func newSVID(issued ca.SVID, key *ecdsa.PrivateKey) (*x509svid.SVID, error) {
	svid := &x509svid.SVID{ID: issued.ID, PrivateKey: key}
	for _, der := range issued.Certificates {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		svid.Certificates = append(svid.Certificates, c)
	}
	return svid, nil
}

// publish makes what the identities have known. The caller holds mu.
func (a *Authority) publish(identities ...*Identity) {
	a.revision++
	for _, i := range identities {
		if i.svid == nil || i.outage != 0 {
			continue // it is published when that is over
		}
		s := workload.State{
			Status:     workload.StatusReady,
			Identities: []workload.Identity{{SVID: i.svid}},
			// The revision grows with the SVID too: by it is known what was sent.
			Bundles: []workload.Bundle{{Bundle: a.bundle, Revision: a.revision}},
		}
		i.known.Store(&s)
		i.state.Set(s)
	}
}

// renewInTime renews each SVID at half of its life, until the Authority is closed. It
// waits for no stream: what a client does not read is no concern of the others.
func (a *Authority) renewInTime() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-a.wake:
		case <-a.ctx.Done():
			return
		}
		// Not beside a control: what Activate has replaced must not be overwritten by
		// what was issued before it.
		select {
		case a.acting <- struct{}{}:
		case <-a.ctx.Done():
			return
		}
		due, next := a.due(time.Now())
		if len(due) > 0 {
			if err := a.issue(0, due...); err != nil && a.ctx.Err() == nil {
				<-a.acting
				a.failRenewal(err)
				return // or a bubble in which all wait would never be found out
			}
			_, next = a.due(time.Now())
		}
		<-a.acting
		timer.Reset(next)
	}
}

// failRenewal records a failure outside of the test's goroutine, which it cannot end.
func (a *Authority) failRenewal(err error) {
	if a.t != nil {
		a.t.Errorf("trothtest: renew: %v", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err == nil {
		a.err = fmt.Errorf("trothtest: renew: %w", err)
	}
}

// due returns the identities that are to be renewed now, or else in how long the
// next is.
func (a *Authority) due(now time.Time) (due []*Identity, next time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	next = time.Hour
	for _, i := range a.identities {
		switch {
		case i.svid == nil, i.held:
		case i.renewAt.After(now):
			next = min(next, i.renewAt.Sub(now))
		default:
			due = append(due, i)
		}
	}
	return due, next
}
