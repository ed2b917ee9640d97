package sqlite_test

import (
	"path/filepath"
	"testing"

	"troth.dev/troth/storage"
	"troth.dev/troth/storage/sqlite"
	"troth.dev/troth/storage/storagetest"
)

func TestAuthorityStore(t *testing.T) {
	storagetest.TestAuthorityStore(t, func(t *testing.T) storage.AuthorityStore { return open(t) })
}

func TestLedger(t *testing.T) {
	storagetest.TestLedger(t, func(t *testing.T) storage.Ledger { return open(t) })
}

func TestFleetStore(t *testing.T) {
	storagetest.TestFleetStore(t, func(t *testing.T) storage.FleetStore { return open(t) })
}

func TestTestDocument(t *testing.T) {
	storagetest.TestAuthorityStore(t, func(t *testing.T) storage.AuthorityStore { return open(t).Tests() })
}

func TestTokenStore(t *testing.T) {
	storagetest.TestTokenStore(t, func(t *testing.T) (a, b storage.TokenStore) {
		s := open(t)
		return s, s
	})
}

func TestReopen(t *testing.T) {
	storagetest.TestReopen(t, func(t *testing.T, place string) storagetest.Store {
		return openAt(t, filepath.Join(place, "troth.db"))
	})
}

func open(t testing.TB) *sqlite.Store {
	t.Helper()
	return openAt(t, filepath.Join(t.TempDir(), "troth.db"))
}

// openAt opens the store and closes it when the test ends, if it did not.
func openAt(t testing.TB, path string) *sqlite.Store {
	t.Helper()
	s, err := sqlite.Open(t.Context(), sqlite.Config{Path: path})
	if err != nil {
		t.Fatalf("Open(%q) = %v", path, err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	})
	return s
}
