package ca_test

import (
	"context"
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"troth.dev/troth/ca"
	"troth.dev/troth/internal/latest"
)

// An SVID may be asked to live for longer than the profile says, and then lives for
// exactly that, with what it is backdated by.
func TestLifeOfRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := newConfig(t)
		config.LongestLife = 3 * time.Hour
		issuer := open(t, config)
		for _, test := range []struct {
			life time.Duration
			want string // the refusal, if any
		}{
			{time.Hour, ""},
			{3 * time.Hour, ""},
			{3*time.Hour + time.Second, "ca: an SVID that lives 3h0m1s: it is from 2s to 3h0m0s"},
			{time.Hour + time.Millisecond, "not of whole seconds"},
			{-time.Hour, "it is from 2s to 3h0m0s"},
		} {
			request := requestFor(t)
			request.Life, request.FromNotBefore = test.life, true
			results, err := issuer.Issue(t.Context(), request, requestFor(t))
			if err != nil {
				t.Fatal(err)
			}
			if results[1].Err != nil || time.Until(results[1].SVID.NotAfter).Round(time.Second) != time.Hour {
				t.Errorf("beside one of %v: until %v, %v", test.life, results[1].SVID.NotAfter, results[1].Err)
			}
			svid, err := results[0].SVID, results[0].Err
			switch {
			case test.want != "":
				if err == nil || !strings.Contains(err.Error(), test.want) {
					t.Errorf("life of %v: %v, want %q", test.life, err, test.want)
				}
			case err != nil:
				t.Errorf("life of %v: %v", test.life, err)
			default:
				if got := svid.NotAfter.Sub(svid.NotBefore); got != test.life || !svid.NotBefore.Before(time.Now()) {
					t.Errorf("life of %v: from %v on for %v", test.life, svid.NotBefore, got)
				}
				checkVerifies(t, currentBundle(issuer), svid)
			}
		}
	})
}

// What asks for more than is left of the authority fails alone.
func TestLifeOutlastsAuthority(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := newConfig(t)
		config.AuthorityLife, config.LongestLife = 6*time.Hour, 2*time.Hour
		issuer := open(t, config)
		stop := run(t, issuer)
		defer stop()
		time.Sleep(4*time.Hour + 30*time.Minute)
		long := requestFor(t)
		long.Life = 2 * time.Hour
		results, err := issuer.Issue(t.Context(), long, requestFor(t))
		if err != nil {
			t.Fatal(err)
		}
		if !errors.Is(results[0].Err, ca.ErrAuthorityExpiring) || results[1].Err != nil {
			t.Errorf("two hours: %v; one hour: %v; want the first to be too long", results[0].Err, results[1].Err)
		}
	})
}

func TestOpenRefusesLongestLife(t *testing.T) {
	for _, test := range []struct {
		life, longest, publication time.Duration
		want                       string
	}{
		{5 * time.Hour, 2 * time.Hour, 0, "cannot sign SVIDs that live 2h0m0s"},
		{0, 25 * time.Hour, 0, "it is up to 24h"},
		{0, -1, 0, "it is up to 24h"},
		{0, 0, -1, "not less than nothing"},
	} {
		config := newConfig(t)
		config.AuthorityLife, config.LongestLife, config.Publication = test.life, test.longest, test.publication
		if _, err := ca.Open(t.Context(), config); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("Open(%+v) = %v, want %q", test, err, test.want)
		}
	}
}

func everywhere(*x509.Certificate) bool { return true }

func nowhere(*x509.Certificate) bool { return false }

// An authority signs nothing before it was published for long enough, although every
// agent has proved it.
func TestActivateUnpublished(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := newConfig(t)
		config.Publication = 5 * time.Minute
		issuer := open(t, config)
		stop := run(t, issuer)
		defer stop()
		issuer.Published(everywhere) // that the first one is says nothing of the next
		next, err := issuer.Prepare(t.Context(), operator)
		if err != nil {
			t.Fatal(err)
		}
		activate := func(want string) *ca.Blocked {
			t.Helper()
			_, err := issuer.Activate(t.Context(), next.ID, by(proved(currentSet(issuer), 3)))
			if got := obstacles(err); got != want {
				t.Fatalf("Activate = %v, want %s", err, want)
			}
			var blocked *ca.Blocked
			errors.As(err, &blocked)
			return blocked
		}
		if b := activate("BUNDLE_UNPUBLISHED"); !b.Blockers[0].Until.IsZero() || !b.Forcible() {
			t.Errorf("blocked until %v, forcible %v; want nobody to know, and force to do", b.Blockers[0].Until, b.Forcible())
		}
		issuer.Published(func(c *x509.Certificate) bool { return c.Equal(next.Certificate) })
		published := time.Now()
		time.Sleep(4 * time.Minute)
		issuer.Published(everywhere) // does not begin anew
		if b := activate("BUNDLE_UNPUBLISHED"); !b.Blockers[0].Until.Equal(published.Add(5 * time.Minute)) {
			t.Errorf("blocked until %v, want five minutes after it was published", b.Blockers[0].Until)
		}
		issuer.Published(nowhere) // somebody deleted it
		time.Sleep(2 * time.Minute)
		activate("BUNDLE_UNPUBLISHED")
		issuer.Published(everywhere)
		time.Sleep(5 * time.Minute)
		activate("<nil>")
	})
}

// Where there is no agent, what is held by means of the kubelet stands in nobody's way
// if the bundle is published, and whatever else is held does.
func TestActivateWithoutAgents(t *testing.T) {
	for _, test := range []struct {
		name, caller string
		publication  time.Duration
		want         string
	}{
		{"published", ca.KubeletCaller, time.Minute, "activate"},
		{"not published", ca.KubeletCaller, 0, ""},
		{"somebody else's", "workload", time.Minute, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				config := newConfig(t)
				config.AuthorityLife, config.Publication = 10*time.Hour, test.publication
				issuer := open(t, config)
				stop := run(t, issuer)
				defer stop()
				time.Sleep(5 * time.Hour)
				request := requestFor(t)
				request.Caller = test.caller
				issue(t, issuer, request)
				step := func() string {
					do, err := issuer.StepOnce(t.Context(), ca.Propagation{At: time.Now()})
					if err != nil {
						t.Fatal(err)
					}
					return do
				}
				if do := step(); do != "prepare" {
					t.Fatalf("does %q, want prepare", do)
				}
				if do := step(); do != "" {
					t.Fatalf("does %q before anything is published", do)
				}
				issuer.Published(everywhere)
				time.Sleep(time.Minute)
				if do := step(); do != test.want {
					t.Errorf("does %q, want %q", do, test.want)
				}
			})
		})
	}
}

// Rotate looks again when the bundle is published, and when it was for long enough.
func TestRotateWaitsForPublication(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := newConfig(t)
		config.AuthorityLife, config.Publication = 10*time.Hour, 30*time.Second
		issuer := open(t, config)
		ctx, cancel := context.WithCancel(t.Context())
		var known latest.Value[ca.Propagation]
		ended := make(chan error, 2)
		go func() { ended <- issuer.Run(ctx) }()
		go func() { ended <- issuer.Rotate(ctx, &known) }()
		time.Sleep(5 * time.Hour)
		synctest.Wait()
		known.Set(proved(currentSet(issuer), 3)) // once: nothing else is news
		time.Sleep(10 * time.Second)
		if got := states(currentSet(issuer)); got != "active prepared" {
			t.Fatalf("unpublished: %s", got)
		}
		issuer.Published(everywhere)
		time.Sleep(29 * time.Second)
		if got := states(currentSet(issuer)); got != "active prepared" {
			t.Fatalf("published for too short: %s", got)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if got := states(currentSet(issuer)); got != "old active" {
			t.Errorf("published for long enough: %s", got)
		}
		cancel()
		for range cap(ended) {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
	})
}

// While a certificate lives that the kubelet asked for, its authority stays: no agent
// knows who holds it, whatever agents say.
func TestRevokeWaitsForKubelet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := newConfig(t)
		config.LongestLife = 4 * time.Hour
		issuer := open(t, config)
		stop := run(t, issuer)
		defer stop()
		first := currentSet(issuer).Authorities[0]
		request := requestFor(t)
		request.Caller, request.Life = ca.KubeletCaller, 4*time.Hour
		held := issue(t, issuer, request)
		next, err := issuer.Prepare(t.Context(), operator)
		if err == nil {
			_, err = issuer.Activate(t.Context(), next.ID, by(proved(currentSet(issuer), 3)))
		}
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Hour) // longer than any SVID lives that an agent holds
		order := func() ca.Order {
			p := proved(currentSet(issuer), 3)
			return by(p)
		}
		_, err = issuer.Revoke(t.Context(), first.ID, order())
		if got := obstacles(err); got != "SVIDS_LIVE HELD_ELSEWHERE" {
			t.Fatalf("Revoke = %v, want SVIDS_LIVE HELD_ELSEWHERE", err)
		}
		var blocked *ca.Blocked
		if errors.As(err, &blocked); !blocked.Blockers[1].Until.Equal(held.NotAfter) {
			t.Errorf("held until %v, want %v", blocked.Blockers[1].Until, held.NotAfter)
		}
		checkVerifies(t, currentBundle(issuer), held)
		time.Sleep(time.Until(held.NotAfter) + time.Second)
		if a, err := issuer.Revoke(t.Context(), first.ID, order()); err != nil || a.State != ca.Revoked {
			t.Errorf("Revoke after it has expired = %v, %v", a.State, err)
		}
	})
}

// CurrentBundle is the store's, whoever has changed it.
func TestCurrentBundle(t *testing.T) {
	config := newConfig(t)
	one, two := open(t, config), open(t, config)
	if _, err := two.Prepare(t.Context(), operator); err != nil {
		t.Fatal(err)
	}
	if n := len(currentBundle(one).Authorities); n != 1 {
		t.Fatalf("%d authorities without having looked, want 1", n)
	}
	bundle, err := one.CurrentBundle(t.Context())
	if err != nil || len(bundle.Authorities) != 2 || bundle.SHA256() != currentBundle(two).SHA256() {
		t.Errorf("CurrentBundle = %d authorities, %v; want the two that the store has", len(bundle.Authorities), err)
	}
}
