package storagetest

import (
	"testing"

	"troth.dev/troth/storage"
)

// Store is a store of all durable contracts that can be closed and opened again.
type Store interface {
	storage.AuthorityStore
	storage.Ledger
	storage.TokenStore
	Tests() storage.AuthorityStore
	Close() error
}

// TestReopen checks that a store finds again what it held when it was closed.
// open opens the store at a place, a folder that is empty at first; whoever
// opens the same place again gets the same store. TestReopen closes what it opens.
func TestReopen(t *testing.T, open func(t *testing.T, place string) Store) {
	place := t.TempDir()
	use := func(do func(Store)) {
		s := open(t, place)
		defer func() {
			if err := s.Close(); err != nil {
				t.Errorf("Close() = %v", err)
			}
		}()
		do(s)
	}

	all := []storage.Issuance{issuance(0), issuance(1), issuance(2)}
	var first, second, tests storage.Document
	use(func(s Store) { // nothing is stored in it
		checkDocument(t, s, storage.Document{})
		checkDocument(t, s.Tests(), storage.Document{})
	})
	use(func(s Store) {
		checkDocument(t, s, storage.Document{})
		checkQuery(t, s, nil, storage.Query{})
		tests = swap(t, s.Tests(), "", "for tests")
		checkDocument(t, s, storage.Document{})
		first = swap(t, s, "", "first")
		checkSpend(t, s, "issuer", "token", nil)
		record(t, s, all[0], all[1])
	})
	use(func(s Store) {
		checkDocument(t, s, first)
		checkDocument(t, s.Tests(), tests)
		checkSpend(t, s, "issuer", "token", storage.ErrSpent)
		checkQuery(t, s, all[:2], storage.Query{})
		second = swap(t, s, first.Version, "second")
		if second.Version == first.Version {
			t.Errorf("Swap used version %q again", first.Version)
		}
		if err := s.Record(t.Context(), all[2], all[0]); err == nil {
			t.Errorf("Record(a serial of before) = nil, want ErrDuplicateSerial")
		}
		record(t, s, all[2])
	})
	use(func(s Store) {
		checkDocument(t, s, second)
		checkQuery(t, s, all, storage.Query{})
		if n, err := s.Prune(t.Context(), epoch.AddDate(1, 0, 0)); n != len(all) || err != nil {
			t.Errorf("Prune(all) = %d, %v, want %d, nil", n, err, len(all))
		}
	})
	use(func(s Store) {
		checkQuery(t, s, nil, storage.Query{})
	})
}
