// Package trothtest gives a test real workload identities: a certificate authority, a
// SPIFFE Workload API and mutual TLS, in the test's own process and within
// milliseconds. Nothing has to be installed, and nothing of it is a stand-in: it is
// Troth's own authority and Troth's own Workload API.
//
// Start with [New] and [Authority.Identity]:
//
//	a := trothtest.New(t)
//	server := a.Identity("/ns/shop/sa/payments")
//	client := a.Identity("/ns/shop/sa/frontend")
//
// An [Identity] is a source of SVIDs and of trust bundles, as SPIFFE libraries take
// them, has TLS configurations, and serves itself to any language by
// [Identity.Socket]. What happens to identities in production happens at a word:
// [Authority.Rotate] and its steps, [Authority.Taint], [Identity.Expire],
// [Identity.Partition]. What PeerAuthentications let pass, [Authority.Decide] says.
//
// All that is issued says that it is for tests ([identity.TestPolicy]). No part of
// Troth that runs in production accepts it, and the authorities are confined to the
// trust domain of the test in the eyes of every other verifier. Keys are in memory and
// end with the test.
//
// # In a bubble of testing/synctest
//
// An Authority that is made in a bubble lives by the bubble's time: an hour passes at
// once, and SVIDs are renewed and expire in it. An Identity as a source works there,
// and so do its TLS configurations over connections in memory, such as those of
// google.golang.org/grpc/test/bufconn. (A [net.Pipe] has no room for what is written
// and not read yet, so that a TLS server that refuses and a client that sends wait for
// each other.) What waits in the kernel keeps the bubble's time from moving on:
// [Identity.Socket], network sockets, child processes. They belong in tests outside.
//
// An authority lives for 100 days. When a bubble has waited for that long without a
// rotation, nothing is renewed any more and the test fails: it is most likely one that
// waits for ever.
package trothtest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/ca"
	"troth.dev/troth/policy"
	"troth.dev/troth/storage"
)

// TB is what [New] needs of a test. Every testing.TB is one.
type TB interface {
	Helper()
	Cleanup(func())
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// Config is what an Authority may be told. The zero Config is good.
type Config struct {
	// TrustDomain is the zero value for "troth.test".
	TrustDomain spiffeid.TrustDomain
	// SVIDLife is how long SVIDs live, from ten seconds to 24 hours; 0 means one
	// hour. They are renewed at half of it.
	SVIDLife time.Duration
	// Log receives what is issued, changed and refused. Nil means that nothing is
	// logged.
	Log *slog.Logger
}

// Authority is a certificate authority of a trust domain of its own, with the
// identities that it gave out. Its methods may be called from many goroutines, and
// those of an [Identity] too.
//
// What fails in an Authority made by [New] ends the test. After a failure in one made
// by [Open], controls do nothing, and [Authority.Err] says what it was.
type Authority struct {
	t      TB // nil if made by Open
	config Config
	issuer *ca.Issuer

	ctx  context.Context //nolint:containedctx // it is the life of the Authority, which Close ends
	stop context.CancelFunc
	work sync.WaitGroup
	wake chan struct{} // of size 1: that there is something to renew at another time

	// acting is held, by its one token, for the whole of a control. A mutex would
	// keep a bubble's time from moving on.
	acting chan struct{}

	mu         sync.Mutex
	err        error                     // the first failure; guarded by mu, as is all below
	dir        string                    // of sockets; empty before the first
	sockets    int                       // that were given a name
	identities map[spiffeid.ID]*Identity // by ID
	bundle     *x509bundle.Bundle        // never changed
	revision   uint64                    // of all that is published
	policies   *policy.Set               // never nil
	closed     bool
}

// New returns an Authority that ends with the test, at the latest by its Cleanup. At
// most one Config is given.
func New(t TB, config ...Config) *Authority {
	t.Helper()
	c := Config{}
	if len(config) > 0 {
		c = config[0]
	}
	a, err := Open(context.Background(), c)
	if err != nil {
		t.Fatalf("%v", err)
		return nil
	}
	a.t = t
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Errorf("%v", err)
		}
	})
	return a
}

// Open returns an Authority for a program that is no test. The caller closes it; when
// ctx ends, its sockets close and nothing is renewed any more.
func Open(ctx context.Context, c Config) (*Authority, error) {
	if c.TrustDomain.IsZero() {
		c.TrustDomain = spiffeid.RequireTrustDomainFromString("troth.test")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	profile, err := ca.NewProfile(ca.ProfileConfig{Life: c.SVIDLife})
	if err != nil {
		return nil, fmt.Errorf("trothtest: %w", err)
	}
	kek := make([]byte, ca.KeySize)
	rand.Read(kek)
	keys, err := ca.NewSealedKeys(kek)
	if err != nil {
		return nil, fmt.Errorf("trothtest: %w", err)
	}
	memory := storage.NewMemory()
	const life = 100 * 24 * time.Hour // in a bubble it passes in seconds
	issuer, err := ca.Open(ctx, ca.Config{
		TrustDomain: c.TrustDomain, Keys: keys, Authorities: memory, Ledger: memory,
		Audit: c.Log, Profile: profile, AuthorityLife: life, Test: true,
	})
	if err != nil {
		return nil, fmt.Errorf("trothtest: %w", err)
	}
	a := &Authority{
		config: c, issuer: issuer,
		wake:       make(chan struct{}, 1),
		acting:     make(chan struct{}, 1),
		identities: make(map[spiffeid.ID]*Identity),
		policies:   policy.NewSet(rootNamespace),
	}
	a.ctx, a.stop = context.WithCancel(ctx)
	a.mu.Lock()
	a.trust()
	a.mu.Unlock()
	a.work.Go(a.renewInTime)
	return a, nil
}

// Close ends all that the Authority started, and removes its sockets. It returns when
// that has been done, which takes some two seconds if a client does not let go of its
// connection. A second Close does nothing. Sources keep what they have.
func (a *Authority) Close() error {
	a.mu.Lock()
	if a.closed {
		a.mu.Unlock()
		return nil
	}
	a.closed = true
	dir := a.dir
	a.mu.Unlock()
	a.stop()
	a.work.Wait()
	if dir == "" {
		return nil
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("trothtest: %w", err)
	}
	return nil
}

// Err returns the first failure of an Authority made by [Open], or nil.
func (a *Authority) Err() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.err
}

// TrustDomain returns the trust domain of all its identities.
func (a *Authority) TrustDomain() spiffeid.TrustDomain { return a.config.TrustDomain }

// Bundle returns the trust bundle as it is now. The result is the caller's.
func (a *Authority) Bundle() *x509bundle.Bundle {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.bundle.Clone()
}

// fail records a failure. The caller returns after it, with mu not held.
func (a *Authority) fail(err error) {
	if a.t != nil {
		a.t.Helper()
		a.t.Fatalf("trothtest: %v", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err == nil {
		a.err = fmt.Errorf("trothtest: %w", err)
	}
}

// act carries out one control, one at a time.
func (a *Authority) act(what string, control func() error) {
	if a.t != nil {
		a.t.Helper()
	}
	select {
	case a.acting <- struct{}{}:
	case <-a.ctx.Done():
		a.fail(fmt.Errorf("%s: %w", what, errClosed))
		return
	}
	err := a.Err()
	if err == nil {
		if err = a.ctx.Err(); err != nil {
			err = errClosed
		} else {
			err = control()
		}
		if err != nil {
			err = fmt.Errorf("%s: %w", what, err)
		}
	}
	<-a.acting
	if err != nil {
		a.fail(err)
	}
}

var errClosed = errors.New("the Authority is closed")
