package storage_test

import (
	"testing"

	"troth.dev/troth/storage"
	"troth.dev/troth/storage/storagetest"
)

func TestMemoryAuthorityStore(t *testing.T) {
	storagetest.TestAuthorityStore(t, func(*testing.T) storage.AuthorityStore { return storage.NewMemory() })
}

func TestMemoryLedger(t *testing.T) {
	storagetest.TestLedger(t, func(*testing.T) storage.Ledger { return storage.NewMemory() })
}

func TestMemoryTestDocument(t *testing.T) {
	storagetest.TestAuthorityStore(t, func(*testing.T) storage.AuthorityStore { return storage.NewMemory().Tests() })
}

func TestMemoryTokenStore(t *testing.T) {
	storagetest.TestTokenStore(t, func(*testing.T) (a, b storage.TokenStore) {
		m := storage.NewMemory()
		return m, m
	})
}

func TestMemoryFleetStore(t *testing.T) {
	storagetest.TestFleetStore(t, func(*testing.T) storage.FleetStore { return storage.NewMemory() })
}
