package agent

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"log/slog"
	"math"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"troth.dev/troth/agent/workload"
	"troth.dev/troth/ca"
	"troth.dev/troth/identity"
	"troth.dev/troth/storage"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func newIssuer(t *testing.T) *ca.Issuer {
	t.Helper()
	keys, err := ca.NewSealedKeys(bytes.Repeat([]byte{1}, ca.KeySize))
	if err != nil {
		t.Fatal(err)
	}
	store := storage.NewMemory()
	issuer, err := ca.Open(t.Context(), ca.Config{
		TrustDomain: td, Keys: keys, Authorities: store, Ledger: store, Audit: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	return issuer
}

func issue(t *testing.T, issuer *ca.Issuer, id spiffeid.ID) *x509svid.SVID {
	t.Helper()
	key, csr, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	results, err := issuer.Issue(t.Context(), ca.Request{ID: id, CSR: csr, Caller: "test"})
	if err != nil || results[0].Err != nil {
		t.Fatal(err, results)
	}
	bundle, _ := issuer.Bundle().Load()
	svid, err := newSVID(key, func(spiffeid.ID) error { return nil }, results[0].SVID.Certificates, bundle.X509Bundle())
	if err != nil {
		t.Fatal(err)
	}
	return svid
}

func podOf(n int, account string) pod {
	return pod{
		PodReference:   identity.PodReference{Namespace: "shop", Name: fmt.Sprintf("pod-%d", n), UID: fmt.Sprintf("uid-%d", n)},
		serviceAccount: account,
		id:             spiffeid.RequireFromPath(td, "/ns/shop/sa/"+account),
	}
}

// What a workload sees of its pod's life, step by step.
func TestStateOfAPod(t *testing.T) {
	issuer := newIssuer(t)
	bundle, _ := issuer.Bundle().Load()
	i := newIdentities(td)
	p := podOf(1, "web")
	value, release := i.Workload(p.UID)
	status := func() workload.Status {
		state, _ := value.Load()
		return state.Status
	}
	want := func(when string, want workload.Status) {
		t.Helper()
		if got := status(); got != want {
			t.Errorf("%s: status %d, want %d", when, got, want)
		}
	}
	want("before the control plane said anything", workload.StatusUnknown)
	i.setPods("1", nil)
	want("when no such pod is on the node", workload.StatusDenied)
	i.setPods("2", []pod{p})
	want("when the pod is there", workload.StatusPending)
	i.put(issue(t, issuer, p.id), nil, time.Now())
	want("when its SVID came before the bundle", workload.StatusPending)
	if err := i.setTrust(trustOf(t, bundle)); err != nil {
		t.Fatal(err)
	}
	want("when all is there", workload.StatusReady)
	first, _ := value.Load()
	i.put(issue(t, issuer, p.id), nil, time.Now())
	second, _ := value.Load()
	if first.Identities[0].SVID == second.Identities[0].SVID {
		t.Error("the SVID was not replaced")
	}

	i.setPods("3", nil)
	want("when the pod is gone", workload.StatusDenied)
	i.setPods("4", []pod{p})
	want("when it is back, with the old key dropped", workload.StatusPending)
	release()
	if len(i.followers) != 0 {
		t.Errorf("%d followers are left", len(i.followers))
	}
}

// A node that restarts with 250 pods asks in batches, for each identity once.
func TestDue(t *testing.T) {
	now := time.Now()
	i := newIdentities(td)
	var pods []pod
	for n := range 250 {
		pods = append(pods, podOf(n, fmt.Sprintf("account-%d", n%125)))
	}
	i.setPods("1", pods)
	asked := make(map[spiffeid.ID]int)
	for _, size := range []int{maxBatch, 25, 0} {
		due, next := i.due(now)
		if len(due) != size {
			t.Fatalf("due() returns %d pods, want %d", len(due), size)
		}
		if size == maxBatch && !next.Equal(now) {
			t.Errorf("with more due than a batch, the next is at %v, want now", next)
		}
		for _, p := range due {
			asked[p.id]++
			i.failed(p.id, now, time.Minute)
		}
	}
	if len(asked) != 125 {
		t.Errorf("%d identities were asked for, want 125", len(asked))
	}
	for id, count := range asked {
		if count != 1 {
			t.Errorf("%q was asked for %d times", id, count)
		}
	}
	if due, _ := i.due(now.Add(59 * time.Second)); len(due) != 0 {
		t.Errorf("%d are due before the server's RetryInfo has passed", len(due))
	}
	if due, _ := i.due(now.Add(61 * time.Second)); len(due) != maxBatch {
		t.Errorf("%d are due after it, want %d", len(due), maxBatch)
	}
}

// Refreshes are spread over a quarter of the SVID's life, and each SVID has its
// own fixed place in it.
func TestRefreshAt(t *testing.T) {
	issuer := newIssuer(t)
	id := spiffeid.RequireFromPath(td, "/ns/shop/sa/web")
	now := time.Now()
	var earliest, latest time.Time
	for range 100 {
		svid := issue(t, issuer, id)
		at := newPlan(svid, nil, now).refresh
		left := svid.Certificates[0].NotAfter.Sub(now)
		if at.Before(now.Add(left/2)) || at.After(now.Add(left*3/4)) {
			t.Fatalf("refresh after %v of %v", at.Sub(now), left)
		}
		if again := newPlan(svid, nil, now).refresh; !again.Equal(at) {
			t.Fatalf("the same SVID has two places, %v and %v", at, again)
		}
		if earliest.IsZero() || at.Before(earliest) {
			earliest = at
		}
		if at.After(latest) {
			latest = at
		}
	}
	if spread := latest.Sub(earliest); spread < 10*time.Minute {
		t.Errorf("100 SVIDs of an hour are refreshed within %v of each other, want them spread over 15 minutes", spread)
	}
}

func TestBackoff(t *testing.T) {
	for _, tt := range []struct {
		failures     int
		left         time.Duration
		atLeast, max time.Duration
	}{
		{failures: 1, left: time.Hour, atLeast: 250 * time.Millisecond, max: 500 * time.Millisecond},
		{failures: 6, left: time.Hour, atLeast: 8 * time.Second, max: 16 * time.Second},
		{failures: 7, left: time.Hour, atLeast: 15 * time.Second, max: 30 * time.Second},
		{failures: 1000, left: time.Hour, atLeast: 15 * time.Second, max: 30 * time.Second},
		// Who has little time left does not wait for long.
		{failures: 1000, left: 16 * time.Second, atLeast: time.Second, max: 2 * time.Second},
		{failures: 1000, left: time.Nanosecond, atLeast: 125 * time.Millisecond, max: 250 * time.Millisecond},
		// What has expired is no reason to hurry.
		{failures: 1000, left: -time.Second, atLeast: 15 * time.Second, max: 30 * time.Second},
	} {
		for range 100 {
			if wait := backoff(tt.failures, tt.left); wait < tt.atLeast || wait > tt.max {
				t.Fatalf("after %d failures and with %v left the wait is %v, want %v to %v", tt.failures, tt.left, wait, tt.atLeast, tt.max)
			}
		}
	}
}

// What has expired does not hide that another SVID is about to.
func TestLeft(t *testing.T) {
	now := time.Now()
	i := newIdentities(td)
	if left := i.left(now); left != math.MaxInt64 {
		t.Errorf("with nothing held %v are left", left)
	}
	for name, end := range map[string]time.Duration{"gone": -time.Second, "next": 3 * time.Second, "later": time.Hour} {
		i.held[spiffeid.RequireFromPath(td, "/"+name)] = &holding{
			svid: &x509svid.SVID{}, plan: plan{leaf: workload.Leaf{NotAfter: now.Add(end)}},
		}
	}
	i.held[spiffeid.RequireFromPath(td, "/none")] = &holding{}
	if left := i.left(now); left != 3*time.Second {
		t.Errorf("%v are left, want the 3s of the one that is next to expire", left)
	}
}

// An SVID that is not what was asked for never reaches a workload.
func TestNewSVIDRefuses(t *testing.T) {
	issuer := newIssuer(t)
	bundle, _ := issuer.Bundle().Load()
	trusted := bundle.X509Bundle()
	elsewhere, _ := newIssuer(t).Bundle().Load()
	id := spiffeid.RequireFromPath(td, "/ns/shop/sa/web")
	good := issue(t, issuer, id)
	chain := [][]byte{good.Certificates[0].Raw}
	any := func(spiffeid.ID) error { return nil }

	if _, err := newSVID(good.PrivateKey, any, chain, trusted); err != nil {
		t.Fatalf("a good one: %v", err)
	}
	if _, err := newSVID(good.PrivateKey, any, nil, trusted); err == nil {
		t.Error("one without certificates is taken")
	}
	if _, err := newSVID(good.PrivateKey, func(spiffeid.ID) error { return fmt.Errorf("another") }, chain, trusted); err == nil {
		t.Error("one of another identity is taken")
	}
	if _, err := newSVID(good.PrivateKey, any, chain, elsewhere.X509Bundle()); err == nil {
		t.Error("one that no peer trusts is taken")
	}
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := newSVID(other, any, chain, trusted); err == nil {
		t.Error("one for another key is taken")
	}
}
