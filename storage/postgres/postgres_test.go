package postgres_test

import (
	"context"
	"flag"
	"fmt"
	"os"
	"testing"

	"troth.dev/troth/storage"
	"troth.dev/troth/storage/postgres"
	"troth.dev/troth/storage/storagetest"
	postgrestest "troth.dev/troth/test/postgres"
)

// server is shared by all tests of this package. Each has a database of its own, and
// none runs beside another: some stop the server.
var server *postgrestest.Server

func TestMain(m *testing.M) {
	if url := os.Getenv(crashURL); url != "" {
		fmt.Fprintln(os.Stderr, writeUntilKilled(context.Background(), url))
		os.Exit(1)
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	var err error
	if server, err = postgrestest.Run(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "start PostgreSQL:", err)
		return 1
	}
	defer server.Close()
	// Those that may run beside each other wait for most of their time.
	flag.Parse()
	if err := flag.Set("test.parallel", "8"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	code := m.Run()
	if code != 0 {
		fmt.Fprintln(os.Stderr, server.Log())
	}
	return code
}

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
		url := server.Database(t)
		return openAt(t, url), openAt(t, url)
	})
}

// The place is a folder, which stands for a database.
func TestReopen(t *testing.T) {
	urls := make(map[string]string)
	storagetest.TestReopen(t, func(t *testing.T, place string) storagetest.Store {
		if urls[place] == "" {
			urls[place] = server.Database(t)
		}
		return openAt(t, urls[place])
	})
}

func open(t testing.TB) *postgres.Store {
	t.Helper()
	return openAt(t, server.Database(t))
}

// openAt opens the store and closes it when the test ends, if it did not.
func openAt(t testing.TB, url string) *postgres.Store {
	t.Helper()
	s, err := postgres.Open(t.Context(), postgres.Config{URL: url})
	if err != nil {
		t.Fatalf("Open(%q) = %v", url, err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	})
	return s
}
