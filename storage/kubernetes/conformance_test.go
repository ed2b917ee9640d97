package kubernetes_test

import (
	"testing"

	"troth.dev/troth/storage"
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
		namespace := cluster.CreateNamespace(t, "troth-")
		return openAt(t, cluster.Admin(), namespace), openAt(t, cluster.Admin(), namespace)
	})
}

func TestReopen(t *testing.T) {
	namespaces := make(map[string]string) // by the place that the suite names
	storagetest.TestReopen(t, func(t *testing.T, place string) storagetest.Store {
		if namespaces[place] == "" {
			namespaces[place] = cluster.CreateNamespace(t, "troth-")
		}
		return openAt(t, cluster.Admin(), namespaces[place])
	})
}
