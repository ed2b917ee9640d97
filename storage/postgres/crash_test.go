package postgres_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"troth.dev/troth/storage"
	"troth.dev/troth/storage/postgres"
)

// crashURL makes the test binary the process that TestKillClient kills.
const crashURL = "TROTH_TEST_CRASH_URL"

// writeUntilKilled records and swaps without end, and says on standard output,
// unbuffered, what was acknowledged, after it was.
func writeUntilKilled(ctx context.Context, url string) error {
	s, err := postgres.Open(ctx, postgres.Config{URL: url})
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

// A replica is killed at a random moment, again and again. Each time the others,
// and the next one, find all that was ever acknowledged, and can go on.
func TestKillClient(t *testing.T) {
	const rounds = 10
	url := server.Database(t)
	other := openAt(t, url)
	serials, count := 0, 0
	for range rounds {
		newSerials, newCount := killOnce(t, url)
		if newCount == 0 && len(newSerials) == 0 {
			t.Fatal("the child was killed before it wrote anything")
		}
		serials, count = serials+len(newSerials), max(count, newCount)

		checkRecorded(t, other, newSerials)
		d, err := other.Load(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got, _ := strconv.Atoi(string(d.Data)); got < count {
			t.Fatalf("the document is at %d, although the Swap to %d had returned", got, count)
		}
		if err := other.Record(t.Context(), issuance()); err != nil {
			t.Errorf("Record by another replica = %v", err)
		}
	}
	t.Logf("%d rounds: %d serials and %d swaps acknowledged, none lost", rounds, serials, count)
}

// killOnce starts a child on the store, kills it up to 100 ms after its first
// word, and returns what it had acknowledged until then.
func killOnce(t *testing.T, url string) (serials []string, count int) {
	t.Helper()
	child := exec.CommandContext(t.Context(), os.Args[0])
	child.Env = append(os.Environ(), crashURL+"="+url)
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
			time.AfterFunc(time.Duration(rand.Int64N(int64(100*time.Millisecond))), func() { child.Process.Kill() })
		}
		kind, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch kind {
		case "serial":
			serials = append(serials, value)
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
	return serials, count
}

func checkRecorded(t *testing.T, s *postgres.Store, serials []string) {
	t.Helper()
	for _, serial := range serials {
		found, err := s.Query(t.Context(), storage.Query{Serial: serial})
		if len(found) != 1 || err != nil {
			t.Fatalf("Query(serial %s, which was acknowledged) = %d rows, %v, want 1", serial, len(found), err)
		}
	}
}
