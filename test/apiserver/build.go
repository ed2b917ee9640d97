package apiserver

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

// The programs, as their folder holds them. etcd's main package is called
// server, and so is what go build makes of it.
const (
	apiserverProgram = "kube-apiserver"
	etcdProgram      = "server"
)

// programs returns the folder that holds kube-apiserver and etcd, and builds
// them first if nobody has: 4 to 8 minutes on two cores with a cold build cache,
// seconds with a warm one. Of several processes that need them at the same time
// one builds and the others wait.
//
// The folder is outside the checkout and named after all that the programs are
// made of. It appears by a rename, so that it is complete whenever it exists.
func programs(ctx context.Context) (string, error) {
	parts, err := partsModule(ctx)
	if err != nil {
		return "", err
	}
	key, err := buildKey(ctx, parts)
	if err != nil {
		return "", err
	}
	userCache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find the user's cache folder: %w", err)
	}
	cache := filepath.Join(userCache, "troth", "apiserver")
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
	if err := build(ctx, parts, unfinished); err != nil {
		return "", err
	}
	return dir, os.Rename(unfinished, dir)
}

// partsModule returns the folder of the module that pins the two programs.
func partsModule(ctx context.Context) (string, error) {
	gomod, err := goCommand(ctx, "", "env", "GOMOD")
	if err != nil {
		return "", err
	}
	parts := filepath.Join(filepath.Dir(gomod), "test", "apiserver", "parts")
	if _, err := os.Stat(filepath.Join(parts, "go.mod")); err != nil {
		return "", fmt.Errorf("run the test from inside Troth's checkout: %w", err)
	}
	return parts, nil
}

func buildKey(ctx context.Context, parts string) (string, error) {
	hash := sha256.New()
	for _, name := range []string{"go.mod", "go.sum"} {
		content, err := os.ReadFile(filepath.Join(parts, name))
		if err != nil {
			return "", err
		}
		fmt.Fprintf(hash, "%d\n%s", len(content), content)
	}
	toolchain, err := goCommand(ctx, parts, "env", "GOVERSION", "GOARCH")
	if err != nil {
		return "", err
	}
	fmt.Fprint(hash, toolchain)
	return hex.EncodeToString(hash.Sum(nil))[:16], nil
}

func build(ctx context.Context, parts, dir string) error {
	version, err := goCommand(ctx, parts, "list", "-m", "-f", "{{.Version}}", "k8s.io/kubernetes")
	if err != nil {
		return err
	}
	stop := reportEvery(15*time.Second, fmt.Sprintf(
		"building kube-apiserver %s and etcd from source, this once; 4 to 8 minutes if nothing is cached", version))
	defer stop()

	// Without a stamped version the API server calls itself v0.0.0-master,
	// which newer clients refuse to talk to.
	major, rest, _ := strings.Cut(strings.TrimPrefix(version, "v"), ".")
	minor, _, _ := strings.Cut(rest, ".")
	const variable = " -X k8s.io/component-base/version."
	ldflags := "-s -w" + variable + "gitVersion=" + version +
		variable + "gitMajor=" + major + variable + "gitMinor=" + minor
	_, err = goCommand(ctx, parts, "build", "-trimpath", "-ldflags", ldflags, "-o", dir+string(filepath.Separator),
		"k8s.io/kubernetes/cmd/kube-apiserver", "go.etcd.io/etcd/server/v3")
	return err
}

// goCommand runs the go command in dir and returns what it prints. As with
// [startProcess], it ends when the test does.
func goCommand(ctx context.Context, dir string, args ...string) (string, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("go %s: %w (the control plane is built from Go modules: the go command has to be in PATH and a module proxy within reach)\n%s",
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
	stop := reportEvery(15*time.Second, "waiting for another test that builds the control plane")
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
				fmt.Fprintf(os.Stderr, "apiserver: %s; %s so far\n", text, time.Since(begin).Round(time.Second))
			case <-stopping:
				return
			}
		}
	}()
	return func() { close(stopping); <-stopped }
}
