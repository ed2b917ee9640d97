package e2e_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// foreignProgram is SPIFFE's own daemon for programs that read files. Its version
// is in parts/go.mod.
const foreignProgram = "github.com/spiffe/spiffe-helper/cmd/spiffe-helper"

// buildForeign builds the program that is not ours.
func buildForeign(ctx context.Context, dir string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-o", dir+string(filepath.Separator), foreignProgram)
	cmd.Dir = "parts"
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=")
	if output, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build %s: %w (it is built from Go modules: a module proxy has to be within reach)\n%s", foreignProgram, err, output)
	}
	return nil
}

// A program of somebody else gets its SVID from the agent's socket, sees it
// rotate, and does not notice that the server was killed and started again.
func TestForeignProgram(t *testing.T) {
	t.Parallel()
	p := newPlane(t, 10*time.Second)
	n, root := p.newNode(t).start(t), newCgroup(t)
	account := p.account(t, "cart")
	files := runForeign(t, n, func(w *workload) { w.enter(t, root, p.pod(t, n, account)) })

	first := files.next(t, p, p.id(account), nil)
	second := files.next(t, p, p.id(account), first)
	p.server.kill()
	p.serve(t)
	third := files.next(t, p, p.id(account), second)
	files.next(t, p, p.id(account), third)
}

// foreignFiles is what the program keeps for others to read.
type foreignFiles struct{ svid, key, bundle string }

// runForeign starts the program as a workload of the node. It waits in a shell
// until enter has put it where it belongs.
func runForeign(t *testing.T, n *node, enter func(*workload)) foreignFiles {
	t.Helper()
	dir := t.TempDir()
	files := foreignFiles{
		svid: filepath.Join(dir, "svid.pem"), key: filepath.Join(dir, "key.pem"), bundle: filepath.Join(dir, "bundle.pem"),
	}
	config := filepath.Join(dir, "helper.conf")
	content := fmt.Sprintf("agent_address = %q\ncert_dir = %q\nsvid_file_name = %q\nsvid_key_file_name = %q\nsvid_bundle_file_name = %q\n",
		n.socket, dir, filepath.Base(files.svid), filepath.Base(files.key), filepath.Base(files.bundle))
	if err := os.WriteFile(config, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", `read go && exec "$0" "$@"`, filepath.Join(programs, filepath.Base(foreignProgram)), "-config", config)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	w := &workload{process: start(t, cmd, stderr)}
	t.Cleanup(func() {
		if lines, _ := w.lines.Load(); t.Failed() {
			t.Logf("what the foreign program wrote:\n%s", lines)
		}
	})
	enter(w)
	if _, err := stdin.Write([]byte("go\n")); err != nil {
		t.Fatal(err)
	}
	return files
}

// next waits for an SVID that is not before, and fails the test unless it is the
// identity's, in force, and trusted by the bundle beside it.
func (f foreignFiles) next(t *testing.T, p *plane, id string, before *x509.Certificate) *x509.Certificate {
	t.Helper()
	var leaf *x509.Certificate
	var bundle *x509bundle.Bundle
	eventually(t, "another SVID in the files", func() bool {
		// The files are written one after the other, the bundle last.
		pair, err := tls.LoadX509KeyPair(f.svid, f.key)
		if err != nil {
			return false
		}
		if bundle, err = x509bundle.Load(trustDomain, f.bundle); err != nil || bundle.Empty() {
			return false
		}
		leaf = pair.Leaf
		return before == nil || leaf.SerialNumber.Cmp(before.SerialNumber) != 0
	})
	got, _, err := x509svid.Verify([]*x509.Certificate{leaf}, bundle)
	if err != nil || got.String() != id {
		t.Fatalf("the SVID in the files is %v, %v; want %s", got, err, id)
	}
	if before != nil && leaf.NotBefore.After(before.NotAfter) {
		t.Errorf("the SVID of %s was replaced by one that begins at %s", before.NotAfter, leaf.NotBefore)
	}
	return leaf
}
