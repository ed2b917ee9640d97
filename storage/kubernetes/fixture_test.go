package kubernetes_test

import (
	"context"
	crand "crypto/rand"
	"encoding/hex"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/storage"
)

// issuance returns one as the certificate authority makes them: a serial number of
// its own, and an hour of life from now on.
func issuance() storage.Issuance {
	serial := make([]byte, 20)
	crand.Read(serial)
	serial[0] = serial[0]&0x3f | 0x40
	now := time.Now()
	return storage.Issuance{
		Serial:      hex.EncodeToString(serial),
		ID:          spiffeid.RequireFromString("spiffe://example.org/ns/shop/sa/cart"),
		AuthorityID: "6f5a0b1c2d3e4f50",
		NotBefore:   now.Add(-30 * time.Second),
		NotAfter:    now.Add(time.Hour),
		IssuedAt:    now,
		Caller:      "spiffe://example.org/troth/agent/node-17/0d4b8c1e-6f2a-4b7e-9c3d-5a1f8e7b6c90/troth-agent-x7k2p/91c2d3e4-5f60-4718-8293-a4b5c6d7e8f9",
		Node:        "node-17",
		PodUID:      "1c9d2e8f-7a6b-4c5d-8e9f-0a1b2c3d4e5f",
	}
}

// all returns everything in the ledger, however much, and fails if a serial number
// is there twice.
func all(t testing.TB, l storage.Ledger) map[string]storage.Issuance {
	t.Helper()
	found := make(map[string]storage.Issuance)
	for q := (storage.Query{}); ; {
		page, err := l.Query(context.WithoutCancel(t.Context()), q)
		if err != nil {
			t.Fatalf("Query(%+v) = %v", q, err)
		}
		inPage := make(map[string]bool)
		for _, i := range page {
			if inPage[i.Serial] {
				t.Errorf("Query returned serial number %s twice", i.Serial)
			}
			inPage[i.Serial] = true
			found[i.Serial] = i
		}
		if len(page) < q.Max() {
			return found
		}
		next := page[len(page)-1].IssuedAt.Add(time.Millisecond)
		if next.Equal(q.IssuedUntil) {
			t.Fatalf("%d issuances in one millisecond", len(page))
		}
		q.IssuedUntil = next
	}
}

// checkRecorded wants each of the serial numbers in the ledger.
func checkRecorded(t testing.TB, l storage.Ledger, serials []string) {
	t.Helper()
	found := all(t, l)
	lost := 0
	for _, serial := range serials {
		if _, ok := found[serial]; !ok {
			lost++
		}
	}
	if lost > 0 {
		t.Fatalf("%d of %d acknowledged issuances are not in the ledger, which has %d", lost, len(serials), len(found))
	}
}
