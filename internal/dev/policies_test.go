package dev_test

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"troth.dev/troth/identity"
	"troth.dev/troth/internal/dev"
	"troth.dev/troth/policy"
)

const strict = `
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default}
spec: {mtls: {mode: STRICT}}
`

// A manifest is in force soon after it is there, stays in force while its file
// cannot be read, and is not any more when it is gone.
func TestPoliciesFromAFolder(t *testing.T) {
	folder := t.TempDir()
	file := filepath.Join(folder, "policy.yaml")
	log := &lines{}
	plane, _ := start(t, dev.Config{Dir: shortDir(t), Policies: []string{folder}, PolicyNamespace: "shop", Log: slog.New(slog.NewTextHandler(log, nil))})
	pod := plane.Cluster.AddPod(identity.ServiceAccount{Namespace: "shop", Name: "web"}, "web")
	elsewhere := plane.Cluster.AddPod(identity.ServiceAccount{Namespace: "other", Name: "web"}, "web")

	becomes(t, plane, pod, "without a manifest", policy.Permissive)
	write(t, file, strict)
	becomes(t, plane, pod, "with a manifest", policy.Strict)
	becomes(t, plane, elsewhere, "in another namespace", policy.Permissive)

	write(t, file, "mode: STRICT: DISABLE")
	log.wait(t, "the last good ones stay in force")
	becomes(t, plane, pod, "with a broken manifest", policy.Strict)

	write(t, file, strings.Replace(strict, "STRICT", "DISABLE", 1))
	becomes(t, plane, pod, "with another manifest", policy.Disable)
	write(t, file, strings.Replace(strict, "STRICT", "LOOSE", 1))
	becomes(t, plane, pod, "with a mode that is none", policy.Strict)
	log.wait(t, `spec.mtls.mode`)

	// A selector finds the label that the pods of development mode have.
	write(t, file, `
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: web, namespace: other}
spec: {selector: {matchLabels: {app: web}}, mtls: {mode: DISABLE}}
`)
	becomes(t, plane, elsewhere, "selected", policy.Disable)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	becomes(t, plane, elsewhere, "without a manifest again", policy.Permissive)
}

// Policies that cannot be read when the plane starts are no policies to start with.
func TestOpenWithoutItsPolicies(t *testing.T) {
	file := filepath.Join(t.TempDir(), "policy.yaml")
	write(t, file, "not: [a manifest")
	for _, path := range []string{file, file + ".missing"} {
		plane, err := dev.Open(t.Context(), dev.Config{
			TrustDomain: td, Dir: shortDir(t), Policies: []string{path}, PolicyNamespace: "shop",
			Log: slog.New(slog.DiscardHandler), Audit: slog.New(slog.DiscardHandler),
		})
		if err == nil {
			t.Errorf("Open(policies in %s) = %v, nil", path, plane)
		}
	}
}

func write(t *testing.T, file, content string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// becomes waits until the agent holds the mode for the pod.
func becomes(t *testing.T, plane *dev.Plane, pod identity.Pod, when string, want policy.Mode) {
	t.Helper()
	value, release := plane.Policy(pod.UID)
	defer release()
	patience := time.After(10 * time.Second)
	for {
		current, changed := value.Load()
		if current != nil && current.Mode == want {
			return
		}
		select {
		case <-changed:
		case <-patience:
			t.Fatalf("%s: the agent holds %v, want %s", when, current, want)
		}
	}
}

// lines collects a log.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer  // guarded by mu
	more chan struct{} // guarded by mu; closed and renewed by Write
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.more != nil {
		close(l.more)
		l.more = nil
	}
	return l.text.Write(p)
}

func (l *lines) wait(t *testing.T, want string) {
	t.Helper()
	patience := time.After(10 * time.Second)
	for {
		l.mu.Lock()
		found := strings.Contains(l.text.String(), want)
		if l.more == nil {
			l.more = make(chan struct{})
		}
		more := l.more
		l.mu.Unlock()
		if found {
			return
		}
		select {
		case <-more:
		case <-patience:
			t.Fatalf("no log line has %q", want)
		}
	}
}
