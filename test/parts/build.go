// Package parts builds the programs of others that tests run, from the Go modules
// that pin them. Only tests import it. It needs Linux and the go command. Start with
// [Build].
package parts

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// Module is a module of ours that only pins programs of others, by tool directives
// in its go.mod.
type Module struct {
	Folder     string   // from the root of the checkout
	Cache      string   // the folder below troth in the user's cache
	Kubernetes bool     // stamp the version of k8s.io/kubernetes, which the module requires
	Tags       []string // build tags
	CGO        bool     // link C: the Go command needs a C compiler
}

// Build returns the folder that holds the programs of a module, and builds them
// first if nobody has: minutes with a cold build cache, seconds with a warm one. Of
// several processes that need them at the same time one builds and the others wait.
//
// The folder is outside the checkout and named after all that the programs are
// made of. It appears by a rename, so that it is complete whenever it exists.
func Build(ctx context.Context, m Module) (string, error) {
	source, err := m.source(ctx)
	if err != nil {
		return "", err
	}
	key, err := m.key(ctx, source)
	if err != nil {
		return "", err
	}
	userCache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find the user's cache folder: %w", err)
	}
	cache := filepath.Join(userCache, "troth", m.Cache)
	dir := filepath.Join(cache, key)
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}

	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	unlock, err := lock(ctx, dir+".lock")
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return dir, err // somebody else built it while we waited
	}
	// Whoever holds the lock is the only builder: what is here already is of one
	// that was killed.
	unfinished := dir + ".unfinished"
	if err := os.RemoveAll(unfinished); err != nil {
		return "", err
	}
	if err := m.build(ctx, source, unfinished); err != nil {
		return "", err
	}
	return dir, os.Rename(unfinished, dir)
}

// source returns the folder of the module.
func (m Module) source(ctx context.Context) (string, error) {
	gomod, err := m.goCommand(ctx, "", "env", "GOMOD")
	if err != nil {
		return "", err
	}
	// Or in a module of the checkout that is not its root's.
	for root := filepath.Dir(gomod); ; root = filepath.Dir(root) {
		source := filepath.Join(root, filepath.FromSlash(m.Folder))
		_, err := os.Stat(filepath.Join(source, "go.mod"))
		if err == nil {
			return source, nil
		}
		if root == filepath.Dir(root) {
			return "", fmt.Errorf("run the test from inside Troth's checkout: %w", err)
		}
	}
}

// key names all that the programs are made of.
func (m Module) key(ctx context.Context, source string) (string, error) {
	hash := sha256.New()
	files := []string{filepath.Join(source, "go.mod"), filepath.Join(source, "go.sum")}
	ours, err := filepath.Glob(filepath.Join(source, "*.go"))
	if err != nil {
		return "", err
	}
	for _, name := range append(files, ours...) {
		content, err := os.ReadFile(name)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(hash, "%d\n%s", len(content), content)
	}
	toolchain, err := m.goCommand(ctx, source, "env", "GOVERSION", "GOARCH")
	if err != nil {
		return "", err
	}
	fmt.Fprint(hash, toolchain)
	if len(m.Tags) > 0 {
		fmt.Fprint(hash, m.Tags)
	}
	return hex.EncodeToString(hash.Sum(nil))[:16], nil
}

func (m Module) build(ctx context.Context, source, dir string) error {
	stop := reportEvery(15*time.Second, fmt.Sprintf(
		"building the programs of %s from source, this once; some minutes if nothing is cached", m.Folder))
	defer stop()

	ldflags := "-s -w"
	if m.Kubernetes {
		version, err := m.goCommand(ctx, source, "list", "-m", "-f", "{{.Version}}", "k8s.io/kubernetes")
		if err != nil {
			return err
		}
		// Without a stamped version the API server calls itself v0.0.0-master,
		// which newer clients refuse to talk to.
		major, rest, _ := strings.Cut(strings.TrimPrefix(version, "v"), ".")
		minor, _, _ := strings.Cut(rest, ".")
		const variable = " -X k8s.io/component-base/version."
		ldflags += variable + "gitVersion=" + version + variable + "gitMajor=" + major + variable + "gitMinor=" + minor
	}
	_, err := m.goCommand(ctx, source, "build", "-trimpath", "-tags", strings.Join(m.Tags, ","), "-ldflags", ldflags,
		"-o", dir+string(filepath.Separator), "tool")
	return err
}

// goCommand runs the go command in dir and returns what it prints. As with
// every process of a test, it ends when the test does.
func (m Module) goCommand(ctx context.Context, dir string, args ...string) (string, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	cgo := "CGO_ENABLED=0"
	if m.CGO {
		cgo = "CGO_ENABLED=1"
	}
	cmd.Env = append(os.Environ(), cgo, "GOWORK=off", "GOFLAGS=")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("go %s: %w (the programs are built from Go modules: the go command has to be in PATH and a module proxy within reach)\n%s",
			strings.Join(args, " "), err, stderr.Bytes())
	}
	return strings.TrimSpace(stdout.String()), nil
}

// lock waits for the file lock at path and returns what releases it. The kernel
// releases it too when the process ends, however it ends.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	stop := reportEvery(15*time.Second, "waiting for another test that builds the same programs")
	defer stop()
	poll := time.NewTicker(100 * time.Millisecond)
	defer poll.Stop()
	for {
		err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { file.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			file.Close()
			return nil, fmt.Errorf("lock %q: %w", path, err)
		}
		select {
		case <-poll.C:
		case <-ctx.Done():
			file.Close()
			return nil, fmt.Errorf("wait for the lock %q: %w", path, ctx.Err())
		}
	}
}

// reportEvery prints text and the time passed to standard error, so that nobody
// takes a long build for a test that hangs, until stop is called.
func reportEvery(interval time.Duration, text string) (stop func()) {
	begin := time.Now()
	stopping, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		ticker := time.NewTicker(interval)
		defer ticker.Stop()
		for {
			select {
			case <-ticker.C:
				fmt.Fprintf(os.Stderr, "parts: %s; %s so far\n", text, time.Since(begin).Round(time.Second))
			case <-stopping:
				return
			}
		}
	}()
	return func() { close(stopping); <-stopped }
}
