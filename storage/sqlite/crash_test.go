package sqlite_test

import (
	"bufio"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"troth.dev/troth/storage"
	"troth.dev/troth/storage/sqlite"
)

// crashPath makes the test binary the process that TestKill kills.
const crashPath = "TROTH_TEST_CRASH_PATH"

func TestMain(m *testing.M) {
	if path := os.Getenv(crashPath); path != "" {
		fmt.Fprintln(os.Stderr, writeUntilKilled(context.Background(), path))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// writeUntilKilled records and swaps without end, and says on standard output,
// unbuffered, what was acknowledged, after it was.
func writeUntilKilled(ctx context.Context, path string) error {
	s, err := sqlite.Open(ctx, sqlite.Config{Path: path})
	if err != nil {
		return err
	}
	failed := make(chan error)
	for range 16 {
		go func() {
			for {
				batch := make([]storage.Issuance, 1+rand.IntN(3))
				var serials strings.Builder
				for n := range batch {
					batch[n] = issuance()
					fmt.Fprintf(&serials, "serial %s\n", batch[n].Serial)
				}
				if err := s.Record(ctx, batch...); err != nil {
					failed <- err
					return
				}
				os.Stdout.WriteString(serials.String())
			}
		}()
	}
	go func() {
		for {
			token := rand.Int64()
			if err := s.Spend(ctx, "issuer", strconv.FormatInt(token, 10), time.Now().Add(time.Hour)); err != nil {
				failed <- err
				return
			}
			fmt.Fprintf(os.Stdout, "spent %d\n", token)
		}
	}()
	go func() {
		for {
			d, err := s.Load(ctx)
			if err != nil {
				failed <- err
				return
			}
			count, _ := strconv.Atoi(string(d.Data))
			if _, err := s.Swap(ctx, d.Version, []byte(strconv.Itoa(count+1))); err != nil {
				failed <- err
				return
			}
			fmt.Fprintf(os.Stdout, "document %d\n", count+1)
		}
	}()
	return <-failed
}

// The store is killed at a random moment, again and again, and each time opens
// with everything in it that was ever acknowledged.
func TestKill(t *testing.T) {
	const rounds = 20
	path := filepath.Join(t.TempDir(), "troth.db")
	var serials []string
	count, tokens := 0, 0
	for range rounds {
		newSerials, spent, newCount := killOnce(t, path)
		if newCount == 0 && len(newSerials)+len(spent) == 0 {
			t.Fatal("the child was killed before it wrote anything")
		}
		serials = append(serials, newSerials...)
		count = max(count, newCount)

		s := openAt(t, path)
		checkRecorded(t, s, newSerials)
		tokens += len(spent)
		for _, token := range spent {
			if err := s.Spend(t.Context(), "issuer", token, time.Now()); !errors.Is(err, storage.ErrSpent) {
				t.Fatalf("Spend(a token whose Spend had returned) = %v, want ErrSpent", err)
			}
		}
		d, err := s.Load(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got, _ := strconv.Atoi(string(d.Data)); got < count {
			t.Fatalf("the document is at %d, although the Swap to %d had returned", got, count)
		}
		checkIntegrity(t, path)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	checkRecorded(t, openAt(t, path), serials)
	t.Logf("%d rounds: %d serials, %d tokens and %d swaps acknowledged, none lost", rounds, len(serials), tokens, count)
}

// killOnce starts a child on the store, kills it up to 100 ms after its first
// word, and returns what it had acknowledged until then.
func killOnce(t *testing.T, path string) (serials, spent []string, count int) {
	t.Helper()
	child := exec.CommandContext(t.Context(), os.Args[0])
	child.Env = append(os.Environ(), crashPath+"="+path)
	child.Stderr = os.Stderr
	output, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(output)
	started := false
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			break // the child is dead; a torn line was not said
		}
		if !started {
			started = true
			if _, err := sqlite.Open(t.Context(), sqlite.Config{Path: path}); err == nil || !strings.Contains(err.Error(), "in use") {
				t.Errorf("Open(while another process has it open) = %v, want a refusal", err)
			}
			time.AfterFunc(time.Duration(rand.Int64N(int64(100*time.Millisecond))), func() { child.Process.Kill() })
		}
		kind, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch kind {
		case "serial":
			serials = append(serials, value)
		case "spent":
			spent = append(spent, value)
		case "document":
			if count, err = strconv.Atoi(value); err != nil {
				t.Fatal(err)
			}
		default:
			t.Fatalf("the child said %q", line)
		}
	}
	if exit, ok := errors.AsType[*exec.ExitError](child.Wait()); !ok || exit.Exited() {
		t.Fatalf("the child ended by itself: %v", exit)
	}
	return serials, spent, count
}

// A log that ends anywhere, or is damaged anywhere, opens, and holds exactly the
// calls whose last byte lies before that point: each whole, or not at all. It can
// be asserted so sharply because nothing is written back to the database before
// the log has 4,000 pages, and the log is only ever appended to until then.
func TestTornLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "troth.db")
	s := openAt(t, path)
	type acknowledged struct {
		serials []string
		size    int // of the log when Record returned
	}
	var calls []acknowledged
	for range 12 {
		var a acknowledged
		var batch []storage.Issuance
		for range 1 + rand.IntN(40) {
			i := issuance()
			batch = append(batch, i)
			a.serials = append(a.serials, i.Serial)
		}
		if err := s.Record(t.Context(), batch...); err != nil {
			t.Fatal(err)
		}
		a.size = len(read(t, path+"-wal"))
		calls = append(calls, a)
	}
	database, log := read(t, path), read(t, path+"-wal")

	check := func(t *testing.T, log []byte, until int) {
		t.Helper()
		path := filepath.Join(t.TempDir(), "troth.db")
		for suffix, content := range map[string][]byte{"": database, "-wal": log} {
			if err := os.WriteFile(path+suffix, content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		s := openAt(t, path)
		defer s.Close()
		found, err := s.Query(t.Context(), storage.Query{})
		if err != nil {
			t.Fatal(err)
		}
		recovered := make(map[string]bool)
		for _, i := range found {
			recovered[i.Serial] = true
		}
		for n, call := range calls {
			want := call.size <= until
			for _, serial := range call.serials {
				if recovered[serial] != want {
					t.Fatalf("log good until byte %d of %d: call %d, acknowledged at byte %d, has serial %s: %t, want %t",
						until, len(log), n, call.size, serial, recovered[serial], want)
				}
			}
		}
		checkIntegrity(t, path)
		if err := s.Record(t.Context(), issuance()); err != nil {
			t.Errorf("Record after recovery = %v", err)
		}
	}

	var points []int
	for _, call := range calls {
		points = append(points, call.size-1, call.size)
	}
	for range 10 {
		points = append(points, rand.IntN(len(log)))
	}
	for _, at := range append(points, 0, 31, 32) {
		check(t, log[:at], at)
		if at < len(log) {
			damaged := append([]byte{}, log...)
			damaged[at] ^= 0xff
			check(t, damaged, at)
		}
	}
}

func checkIntegrity(t *testing.T, path string) {
	t.Helper()
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var result string
	if err := db.QueryRowContext(t.Context(), "PRAGMA integrity_check").Scan(&result); err != nil || result != "ok" {
		t.Fatalf("PRAGMA integrity_check = %q, %v, want ok", result, err)
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return content
}
