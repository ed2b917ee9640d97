package postgres_test

import (
	"context"
	"errors"
	"net/url"
	"strings"
	"sync"
	"testing"

	"troth.dev/troth/storage"
	"troth.dev/troth/storage/postgres"
)

func TestOpenRefuses(t *testing.T) {
	tests := []struct {
		name string
		url  func(t *testing.T) string
		want string
	}{
		{"no URL", func(*testing.T) string { return "" }, "Config.URL is empty"},
		{"keywords", func(*testing.T) string { return "host=/tmp password=secret" }, "not of the form"},
		{"no URL at all", func(*testing.T) string { return "postgres://u:secret@h:port/%" }, "not of the form"},
		{"another scheme", func(*testing.T) string { return "mysql://u:secret@h/d" }, "not of the form"},
		{"a parameter's value", func(*testing.T) string { return "postgres://u:secret@h/d?sslmode=secret-mode" }, "sslmode is invalid"},
		{"nobody there", func(t *testing.T) string { return "postgres://u:secret@/d?host=" + t.TempDir() }, "no such file"},
		{"no such database", func(t *testing.T) string { return replaced(t, server.Database(t), "/nowhere") }, `database "nowhere" does not exist`},
		{"another encoding", func(t *testing.T) string {
			at := server.Database(t)
			server.Execute(t, at, "CREATE DATABASE ascii ENCODING 'SQL_ASCII' LOCALE_PROVIDER libc LOCALE 'C' TEMPLATE template0")
			return replaced(t, at, "/ascii")
		}, "encoding SQL_ASCII: create one with ENCODING 'UTF8'"},
		{"read-only", func(t *testing.T) string { return with(server.Database(t), "default_transaction_read_only", "on") }, "must name the primary"},
		{"read-only is what is asked for", func(t *testing.T) string {
			return with(with(server.Database(t), "default_transaction_read_only", "on"), "target_session_attrs", "read-only")
		}, "must name the primary"},
		{"another program's schema", func(t *testing.T) string {
			at := server.Database(t)
			server.Execute(t, at, "CREATE SCHEMA troth; CREATE TABLE troth.t (x int)")
			return at
		}, `the schema "troth" is another program's`},
		{"a newer schema", func(t *testing.T) string {
			at := closed(t)
			server.Execute(t, at, "INSERT INTO troth.migration VALUES (3)")
			return at
		}, "the schema has version 3, this program knows versions up to 2: run the version of the program that wrote it, or a newer one"},
		{"no right to make a schema", func(t *testing.T) string {
			at := server.Database(t)
			role(t, at, "lowly")
			return as(at, "lowly")
		}, "permission denied"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			at := test.url(t)
			s, err := postgres.Open(t.Context(), postgres.Config{URL: at})
			if err == nil {
				s.Close()
				t.Fatalf("Open(%q) = nil, want an error with %q", at, test.want)
			}
			if !strings.Contains(err.Error(), test.want) {
				t.Errorf("Open(%q) = %v, want an error with %q", at, err, test.want)
			}
			if strings.Contains(err.Error(), "secret@") || strings.Contains(err.Error(), "=secret ") {
				t.Errorf("Open(%q) tells the password: %v", at, err)
			}
		})
	}
}

// A host that is reached over TCP must prove who it is, unless the URL says
// otherwise. PostgreSQL does not listen there, so that the refusal is all there is.
func TestTCPIsVerified(t *testing.T) {
	for parameters, verified := range map[string]bool{"": true, "?sslmode=verify-full": true, "?sslmode=disable": false, "?sslmode=require": false} {
		if got, err := postgres.Verifies("postgres://u@db.example/d" + parameters); got != verified || err != nil {
			t.Errorf("a connection with the parameters %q verifies the server: %t, %v, want %t", parameters, got, err, verified)
		}
	}
}

// An operator makes the schema for a role that may make none.
func TestOpenInSchemaOfRole(t *testing.T) {
	at := server.Database(t)
	role(t, at, "owner")
	server.Execute(t, at, "CREATE SCHEMA troth AUTHORIZATION owner")
	s := openAt(t, as(at, "owner"))
	if err := s.Record(t.Context(), issuance()); err != nil {
		t.Error(err)
	}
}

// What durability and the order of Swaps hang on is ours to set, whatever the URL,
// the role or the database say.
func TestSettings(t *testing.T) {
	at := server.Database(t)
	name := strings.TrimPrefix(parsed(t, at).Path, "/")
	server.Execute(t, at, "ALTER DATABASE "+name+" SET synchronous_commit = off; ALTER DATABASE "+name+" SET default_transaction_isolation = serializable")
	s := openAt(t, with(with(at, "options", "-c synchronous_commit=off"), "synchronous_commit", "off"))
	for name, want := range map[string]string{
		"synchronous_commit": "on", "default_transaction_isolation": "read committed",
		"statement_timeout": "30s", "idle_in_transaction_session_timeout": "30s",
	} {
		if got, err := s.Setting(t.Context(), name); got != want || err != nil {
			t.Errorf("%s = %q, %v, want %q", name, got, err, want)
		}
	}
}

func TestConcurrentOpens(t *testing.T) {
	at := server.Database(t)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			s, err := postgres.Open(t.Context(), postgres.Config{URL: with(at, "pool_max_conns", "1")})
			if err != nil {
				t.Errorf("Open beside others = %v", err)
				return
			}
			if err := s.Record(t.Context(), issuance()); err != nil {
				t.Errorf("Record = %v", err)
			}
			s.Close()
		})
	}
	all.Wait()
	if all, err := openAt(t, at).Query(t.Context(), storage.Query{}); len(all) != 8 || err != nil {
		t.Errorf("Query() = %d issuances, %v, want one of each", len(all), err)
	}
}

// steps are such that none can be taken twice, and none out of turn.
func steps() []string {
	return append(postgres.Schema(),
		"CREATE TABLE troth.two (x int)",
		"ALTER TABLE troth.two RENAME TO three",
		"ALTER TABLE troth.three ADD COLUMN y int",
	)
}

func TestConcurrentMigrations(t *testing.T) {
	at := closed(t)
	var all sync.WaitGroup
	for range 6 {
		all.Go(func() {
			if err := postgres.Migrate(t.Context(), at, steps()); err != nil {
				t.Errorf("migrate beside others = %v", err)
			}
		})
	}
	all.Wait()
	checkVersion(t, at, "1,2,3,4,5")
}

// A migration dies in the middle of a step: by the client's end, by the server's,
// or by an error. The step before it is there and nothing of this one, and the next
// Open goes on.
func TestMigrationDies(t *testing.T) {
	const running = "FROM pg_stat_activity WHERE datname = current_database() AND query LIKE '%pg_sleep(600)' AND state = 'active' AND pid != pg_backend_pid()"
	for _, death := range []struct {
		name string
		step string
		kill func(t *testing.T, at string, cancel context.CancelFunc)
	}{
		{"client", "SELECT pg_sleep(600)", func(t *testing.T, at string, cancel context.CancelFunc) {
			await(t, at, "SELECT count(*) = 1 "+running)
			cancel()
		}},
		{"connection", "SELECT pg_sleep(600)", func(t *testing.T, at string, _ context.CancelFunc) {
			await(t, at, "SELECT count(*) = 1 "+running)
			server.Execute(t, at, "SELECT pg_terminate_backend(pid) "+running)
		}},
		{"server", "SELECT pg_sleep(600)", func(t *testing.T, at string, _ context.CancelFunc) {
			await(t, at, "SELECT count(*) = 1 "+running)
			server.Kill(t)
			server.Start(t)
		}},
		{"error", "SELECT 1/0", func(*testing.T, string, context.CancelFunc) {}},
	} {
		t.Run(death.name, func(t *testing.T) {
			at := closed(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			broken := steps()
			broken[3] += "; " + death.step
			failed := make(chan error, 1)
			go func() { failed <- postgres.Migrate(ctx, at, broken) }()
			death.kill(t, at, cancel)
			if err := <-failed; err == nil {
				t.Fatal("the migration that died = nil")
			}
			checkVersion(t, at, "1,2,3")
			// It waits for the dead one's lock, if the server has not noticed yet.
			if err := postgres.Migrate(t.Context(), at, steps()); err != nil {
				t.Errorf("migrate again = %v", err)
			}
			checkVersion(t, at, "1,2,3,4,5")
		})
	}
}

func checkVersion(t *testing.T, at, want string) {
	t.Helper()
	await(t, at, "SELECT string_agg(version::text, ',' ORDER BY version) = '"+want+"' FROM troth.migration")
}

func TestClosed(t *testing.T) {
	s := open(t)
	watched := make(chan error)
	go func() {
		_, err := s.Watch(t.Context(), "")
		watched <- err
	}()
	for range 2 {
		if err := s.Close(); err != nil {
			t.Fatalf("Close() = %v", err)
		}
	}
	if err := <-watched; !errors.Is(err, storage.ErrClosed) {
		t.Errorf("Watch while Close was called = %v, want ErrClosed", err)
	}
	_, errLoad := s.Load(t.Context())
	_, errSwap := s.Swap(t.Context(), "", nil)
	_, errWatch := s.Watch(t.Context(), "")
	_, errQuery := s.Query(t.Context(), storage.Query{})
	_, errPrune := s.Prune(t.Context(), epoch)
	_, errSummaries := s.Summaries(t.Context())
	for name, err := range map[string]error{
		"Load": errLoad, "Swap": errSwap, "Watch": errWatch, "Query": errQuery, "Prune": errPrune, "Summaries": errSummaries,
		"Record":   s.Record(t.Context(), issuance()),
		"Spend":    s.Spend(t.Context(), "issuer", "token", epoch),
		"Publish":  s.Publish(t.Context(), "a", nil),
		"Withdraw": s.Withdraw(t.Context(), "a"),
	} {
		if !errors.Is(err, storage.ErrClosed) {
			t.Errorf("%s after Close = %v, want ErrClosed", name, err)
		}
	}
}

// closed returns the URL of a store that was made and closed.
func closed(t *testing.T) string {
	t.Helper()
	at := server.Database(t)
	if err := openAt(t, at).Close(); err != nil {
		t.Fatal(err)
	}
	return at
}

// role makes a role with no rights of its own, until the test ends.
func role(t *testing.T, at, name string) {
	t.Helper()
	server.Execute(t, at, "CREATE ROLE "+name+" LOGIN")
	t.Cleanup(func() { server.Execute(t, at, "DROP OWNED BY "+name+" CASCADE; DROP ROLE "+name) })
}

// as returns the URL for another role.
func as(at, role string) string {
	u, err := url.Parse(at)
	if err != nil {
		panic(err)
	}
	u.User = url.User(role)
	return u.String()
}

// replaced returns the URL for another database.
func replaced(t *testing.T, at, path string) string {
	t.Helper()
	u := parsed(t, at)
	u.Path = path
	return u.String()
}

func parsed(t *testing.T, at string) *url.URL {
	t.Helper()
	u, err := url.Parse(at)
	if err != nil {
		t.Fatal(err)
	}
	return u
}
