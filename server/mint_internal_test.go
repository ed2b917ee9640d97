package server

import (
	"bytes"
	"context"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/ca"
	"troth.dev/troth/storage"
)

// The authorities for tests rotate by themselves, without an agent to prove anything:
// each is in the bundle for as long as an SVID lives before it signs, and the one before
// is dropped when the last of its SVIDs has expired.
func TestMintRotates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const svidLife, authorityLife = time.Minute, 10 * time.Minute
		const leaseSettles = svidLife / 3 // replicas may sign on for that long
		keys, err := ca.NewSealedKeys(bytes.Repeat([]byte{1}, ca.KeySize))
		if err != nil {
			t.Fatal(err)
		}
		profile, err := ca.NewProfile(ca.ProfileConfig{Life: svidLife})
		if err != nil {
			t.Fatal(err)
		}
		store := storage.NewMemory()
		issuer, err := ca.Open(t.Context(), ca.Config{
			TrustDomain: spiffeid.RequireTrustDomainFromString("tests.example"), Keys: keys, Authorities: store.Tests(), Ledger: store,
			Audit: slog.New(slog.DiscardHandler), Profile: profile, AuthorityLife: authorityLife, Test: true,
		})
		if err != nil {
			t.Fatal(err)
		}
		m := &minter{Mint: Mint{Issuer: issuer, Tokens: store}}
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { issuer.Run(ctx) })
		running.Go(func() { issuer.Rotate(ctx, &m.propagation) })
		running.Go(func() { m.keepEvidence(ctx) })
		defer running.Wait()
		defer cancel()

		first, _ := issuer.Authorities().Load()
		active, _ := first.Active()
		seen := first.Revision
		// step waits for the next change of the authorities.
		step := func() ca.Set {
			t.Helper()
			late := time.After(2 * authorityLife)
			for {
				set, changed := issuer.Authorities().Load()
				if set.Revision > seen {
					seen = set.Revision
					return set
				}
				select {
				case <-changed:
				case <-late:
					t.Fatalf("nothing changes after revision %d", seen)
				}
			}
		}
		set := step()
		next, ok := set.Successor()
		prepared := time.Now()
		if !ok {
			t.Fatalf("the first change prepares no authority: %+v", set.Authorities)
		}
		set = step()
		if now, _ := set.Active(); now.ID != next.ID || time.Since(prepared) < svidLife || time.Since(prepared) > svidLife+time.Minute {
			t.Errorf("the next authority is active %v after it was prepared: %v, want a life of an SVID", time.Since(prepared), now.ID == next.ID)
		}
		activated := time.Now()
		for old := active; old.State != ca.Revoked; old, _ = set.Authority(active.ID) {
			if set = step(); time.Since(activated) > authorityLife/2 {
				t.Fatalf("the one before is not dropped %v later: %+v", time.Since(activated), set.History)
			}
		}
		if set.History[0].Operation != "prepare" || time.Since(activated) < leaseSettles {
			t.Errorf("it is dropped after %v: %+v", time.Since(activated), set.History)
		}
	})
}
