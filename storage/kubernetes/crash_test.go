package kubernetes_test

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

	"troth.dev/troth/kube"
	"troth.dev/troth/storage"
	"troth.dev/troth/storage/kubernetes"
)

// These make the test binary the process that TestKill kills.
const (
	childKubeconfig = "TROTH_TEST_CRASH_KUBECONFIG"
	childNamespace  = "TROTH_TEST_CRASH_NAMESPACE"
)

// writeUntilKilled records and swaps without end, and says on standard output,
// unbuffered, what was acknowledged, after it was.
func writeUntilKilled(ctx context.Context, kubeconfig, namespace string) error {
	client, err := kube.Connect(kubeconfig)
	if err != nil {
		return err
	}
	s, err := kubernetes.Open(ctx, kubernetes.Config{Client: client, Namespace: namespace})
	if err != nil {
		return err
	}
	if _, err := s.Swap(ctx, "", []byte("0")); err != nil && !errors.Is(err, storage.ErrConflict) {
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

// The process is killed at a random moment, again and again, and each time another
// finds everything that was ever acknowledged, each issuance once.
func TestKill(t *testing.T) {
	const rounds = 8
	namespace := cluster.CreateNamespace(t, "troth-")
	kubeconfig := cluster.Kubeconfig(t, cluster.Admin())
	var serials []string
	count := 0
	for range rounds {
		newSerials, newCount := killOnce(t, kubeconfig, namespace)
		if newCount == 0 && len(newSerials) == 0 {
			t.Fatal("the child was killed before it wrote anything")
		}
		serials = append(serials, newSerials...)
		count = max(count, newCount)

		s := openAt(t, cluster.Admin(), namespace)
		checkRecorded(t, s, serials)
		d, err := s.Load(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got, _ := strconv.Atoi(string(d.Data)); got < count {
			t.Fatalf("the document is at %d, although the Swap to %d had returned", got, count)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d rounds: %d serials and %d swaps acknowledged, none lost", rounds, len(serials), count)
}

// killOnce starts a child on the store, kills it up to 200 ms after its first
// word, and returns what it had acknowledged until then.
func killOnce(t *testing.T, kubeconfig, namespace string) (serials []string, count int) {
	t.Helper()
	child := exec.CommandContext(t.Context(), os.Args[0])
	child.Env = append(os.Environ(), childKubeconfig+"="+kubeconfig, childNamespace+"="+namespace)
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
			time.AfterFunc(time.Duration(rand.Int64N(int64(200*time.Millisecond))), func() { child.Process.Kill() })
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
