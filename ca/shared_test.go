package ca_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/ca"
	"troth.dev/troth/storage"
)

// Where no agent is expected, an SVID that lives keeps the next authority from signing:
// somebody may verify by a bundle without it. One of another trust domain, in a ledger
// that both have, does not.
func TestActivateBesideAnotherTrustDomain(t *testing.T) {
	for name, want := range map[string]bool{"spiffe://tests.example/ci/job": true, web.String(): false} {
		synctest.Test(t, func(t *testing.T) {
			config := newConfig(t)
			issuer := open(t, config)
			now := time.Now()
			if err := config.Ledger.Record(t.Context(), storage.Issuance{
				Serial: "1", ID: spiffeid.RequireFromString(name), AuthorityID: "another", Caller: "ci",
				NotBefore: now, NotAfter: now.Add(time.Hour), IssuedAt: now,
			}); err != nil {
				t.Fatal(err)
			}
			order := ca.Order{Actor: "test", Evidence: ca.Propagation{At: now}}
			next, err := issuer.Prepare(t.Context(), order)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := issuer.Activate(t.Context(), next.ID, order); (err == nil) != want {
				t.Errorf("Activate while an SVID of %s lives = %v, want success: %v", name, err, want)
			}
		})
	}
}
