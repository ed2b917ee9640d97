package ca_test

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/ca"
	"troth.dev/troth/storage"
)

// run starts Run and returns what ends it and checks how it ended. It is for use
// in a bubble, which fails if Run leaves anything behind.
func run(t *testing.T, issuer *ca.Issuer) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1) // one result, whether anybody waits or not
	go func() { done <- issuer.Run(ctx) }()
	return func() {
		t.Helper()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run = %v after its context ended, want nil", err)
		}
	}
}

func TestRunFollowsAnotherReplica(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := newConfig(t)
		issuer := open(t, config)
		stop := run(t, issuer)
		earlier := issue(t, issuer, requestFor(t))
		before, changed := issuer.Bundle().Load()

		next := anotherAuthority(t, config, "active")
		replace(t, config.Authorities, rotated(stored(t, config.Authorities), next).encode(t))
		<-changed
		if waited := time.Since(earlier.NotBefore.Add(time.Minute)); waited > 0 {
			t.Errorf("the bundle changed after %v, want at once", waited)
		}
		after := currentBundle(issuer)
		if after.Revision != before.Revision+1 || len(after.Authorities) != 2 {
			t.Errorf("revision %d with %d authorities; want %d with 2", after.Revision, len(after.Authorities), before.Revision+1)
		}
		later := issue(t, issuer, requestFor(t))
		if later.AuthorityID != next.ID || earlier.AuthorityID == next.ID {
			t.Errorf("signed by %s, then by %s; want %s the second time", earlier.AuthorityID, later.AuthorityID, next.ID)
		}
		checkVerifies(t, after, earlier)
		checkVerifies(t, after, later)
		if n := len(before.Authorities); n != 1 {
			t.Errorf("the earlier snapshot has %d authorities now; it must not change", n)
		}
		stop()
	})
}

func TestRunKeepsTheLastGoodState(t *testing.T) {
	for _, test := range []struct {
		name string
		data func(t *testing.T, config ca.Config, good document) []byte
		want string // in the log
	}{
		{"garbage", func(*testing.T, ca.Config, document) []byte { return []byte("\x00") }, "invalid character"},
		{"empty", func(*testing.T, ca.Config, document) []byte { return nil }, "unexpected end"},
		{"of a later version", func(t *testing.T, _ ca.Config, d document) []byte {
			d.Format = 4
			return d.encode(t)
		}, "was it downgraded?"},
		{"trusting none", func(t *testing.T, _ ca.Config, d document) []byte {
			d.Authorities = nil
			return d.encode(t)
		}, "trusts none"},
		{"foreign trust domain", func(t *testing.T, config ca.Config, _ document) []byte {
			config.TrustDomain = spiffeid.RequireTrustDomainFromString("other.test")
			config.Authorities = storage.NewMemory()
			open(t, config)
			return stored(t, config.Authorities).encode(t)
		}, "are of trust domain"},
		{"foreign key", func(t *testing.T, config ca.Config, d document) []byte {
			config.Keys = newKeys(t)
			return rotated(d, anotherAuthority(t, config, "active")).encode(t)
		}, "does not open"},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				config := newConfig(t)
				log := new(bytes.Buffer)
				config.Audit = slog.New(slog.NewTextHandler(log, nil))
				issuer := open(t, config)
				stop := run(t, issuer)
				good := stored(t, config.Authorities)
				before, changed := issuer.Bundle().Load()
				next := anotherAuthority(t, config, "active")
				log.Reset()

				replace(t, config.Authorities, test.data(t, config, good))
				time.Sleep(time.Minute)
				synctest.Wait()
				if !strings.Contains(log.String(), "the last good ones keep serving") || !strings.Contains(log.String(), test.want) {
					t.Errorf("log %q, want it to say %q", log, test.want)
				}
				if lines := strings.Count(log.String(), "the last good ones"); lines > 21 {
					t.Errorf("%d lines of log in a minute, want one each 3 seconds", lines)
				}
				if svid := issue(t, issuer, requestFor(t)); svid.AuthorityID != before.Authorities[0].ID {
					t.Errorf("signed by %s, want %s", svid.AuthorityID, before.Authorities[0].ID)
				} else {
					checkVerifies(t, currentBundle(issuer), svid)
				}
				select {
				case <-changed:
					t.Error("the bundle was replaced")
				default:
				}

				repaired := time.Now()
				replace(t, config.Authorities, rotated(good, next).encode(t))
				<-changed
				if waited := time.Since(repaired); waited > 3*time.Second {
					t.Errorf("recovered after %v, want 3s", waited)
				}
				if svid := issue(t, issuer, requestFor(t)); svid.AuthorityID != next.ID {
					t.Errorf("signed by %s, want %s", svid.AuthorityID, next.ID)
				}
				stop()
			})
		})
	}
}

// outage is a store that cannot be watched while it is down.
type outage struct {
	storage.AuthorityStore
	down  *atomic.Bool
	tries *atomic.Int32
}

func (s outage) Watch(ctx context.Context, seen string) (storage.Document, error) {
	s.tries.Add(1)
	if s.down.Load() {
		return storage.Document{}, errors.New("connection refused")
	}
	return s.AuthorityStore.Watch(ctx, seen)
}

func TestRunSurvivesAnOutageOfTheStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var down atomic.Bool
		var tries atomic.Int32
		config := newConfig(t)
		config.Authorities = outage{config.Authorities, &down, &tries}
		issuer := open(t, config)
		next := anotherAuthority(t, config, "active")
		down.Store(true)
		stop := run(t, issuer)

		time.Sleep(time.Minute)
		if n := tries.Load(); n < 15 || n > 21 {
			t.Errorf("%d tries in a minute, want one each 3 seconds", n)
		}
		issue(t, issuer, requestFor(t))
		_, changed := issuer.Bundle().Load()
		replace(t, config.Authorities, rotated(stored(t, config.Authorities), next).encode(t))
		down.Store(false)
		<-changed
		if svid := issue(t, issuer, requestFor(t)); svid.AuthorityID != next.ID {
			t.Errorf("signed by %s after the outage, want %s", svid.AuthorityID, next.ID)
		}
		stop()
	})
}

// keysOutage fails to open keys while it is down.
type keysOutage struct {
	ca.Keys
	down *atomic.Bool
}

func (k keysOutage) Open(ctx context.Context, id string, handle []byte) (crypto.Signer, error) {
	if k.down.Load() {
		return nil, errors.New("key service unavailable")
	}
	return k.Keys.Open(ctx, id, handle)
}

// The document does not change again: Run has to come back to it by itself.
func TestRunSurvivesAnOutageOfTheKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var down atomic.Bool
		config := newConfig(t)
		config.Keys = keysOutage{config.Keys, &down}
		issuer := open(t, config)
		next := anotherAuthority(t, config, "active")
		stop := run(t, issuer)
		_, changed := issuer.Bundle().Load()

		down.Store(true)
		replace(t, config.Authorities, rotated(stored(t, config.Authorities), next).encode(t))
		time.Sleep(10 * time.Second)
		issue(t, issuer, requestFor(t))
		down.Store(false)
		ended := time.Now()
		select {
		case <-changed:
			if waited := time.Since(ended); waited > 3*time.Second {
				t.Errorf("recovered after %v, want 3s", waited)
			}
		case <-time.After(time.Hour):
			t.Error("never tried again")
		}
		if svid := issue(t, issuer, requestFor(t)); svid.AuthorityID != next.ID {
			t.Errorf("signed by %s after the outage, want %s", svid.AuthorityID, next.ID)
		}
		stop()
	})
}

func TestRunEndsWhileItWaits(t *testing.T) {
	for _, test := range []struct {
		name string
		down bool
	}{{"for the store", false}, {"to try again", true}} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var down atomic.Bool
				down.Store(test.down)
				config := newConfig(t)
				config.Authorities = outage{config.Authorities, &down, new(atomic.Int32)}
				stop := run(t, open(t, config))
				synctest.Wait()
				start := time.Now()
				stop()
				if waited := time.Since(start); waited != 0 {
					t.Errorf("Run ended %v after its context", waited)
				}
			})
		})
	}
}
