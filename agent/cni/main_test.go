package cni_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"troth.dev/troth/agent/cni"
)

// A test that needs another user or another process runs its own binary again.
func TestMain(m *testing.M) {
	switch os.Getenv("CNI_TEST_HELPER") {
	case "ask":
		// Asks for the status on the socket it is given and says what came of it.
		fmt.Println(cni.Client{Socket: os.Args[1]}.Status(context.Background()))
	case "add":
		// Asks for a pod in a new namespace, and waits for ever.
		ns, err := newNamespace()
		if err == nil {
			err = cni.Client{Socket: os.Args[1]}.Add(context.Background(), pod(), ns)
		}
		fmt.Println(err)
	case "serve":
		// Listens, reads what comes and is killed before it answers.
		l, err := net.Listen("unix", os.Args[1])
		if err != nil {
			panic(err)
		}
		fmt.Println("ready")
		c, err := l.Accept()
		if err != nil {
			panic(err)
		}
		io.ReadFull(c, make([]byte, 8))
		unix.Kill(os.Getpid(), unix.SIGKILL)
		select {}
	default:
		os.Exit(m.Run())
	}
}

func helper(t *testing.T, name string, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), "CNI_TEST_HELPER="+name)
	cmd.Stderr = os.Stderr
	return cmd
}

// newNamespace returns a network namespace of its own.
func newNamespace() (*os.File, error) { return unshare(unix.CLONE_NEWNET, "net") }

func unshare(flag int, name string) (*os.File, error) {
	type result struct {
		f   *os.File
		err error
	}
	made := make(chan result)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		err := unix.Unshare(flag)
		var f *os.File
		if err == nil {
			f, err = os.Open("/proc/thread-self/ns/" + name)
		}
		made <- result{f, err}
	}()
	r := <-made
	if errors.Is(r.err, unix.EPERM) {
		r.err = fmt.Errorf("the test has to run as root: %w", r.err)
	}
	return r.f, r.err
}

func namespace(t *testing.T) *os.File {
	t.Helper()
	ns, err := newNamespace()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

func pod() cni.Pod {
	return cni.Pod{
		Namespace: "shop", Name: "cart-7d9f", UID: "0b5c1a3e-7a4e-4a6e-9d43-1f0b6f7f6c11",
		Sandbox: strings.Repeat("ab", 32), Interface: "eth0", Netns: "/run/netns/cni-1",
	}
}

// handler writes down what it is asked for, and does what a test wants it to.
type handler struct {
	do func(ctx context.Context, verb string, ns *os.File) error

	mu    sync.Mutex
	calls []string // guarded by mu
}

func (h *handler) call(ctx context.Context, verb string, ns *os.File, args any) error {
	h.mu.Lock()
	h.calls = append(h.calls, fmt.Sprintf("%s %v", verb, args))
	h.mu.Unlock()
	if h.do == nil {
		return nil
	}
	return h.do(ctx, verb, ns)
}

func (h *handler) Add(ctx context.Context, pod cni.Pod, ns *os.File) error {
	return h.call(ctx, "add", ns, pod)
}

func (h *handler) Check(ctx context.Context, pod cni.Pod, ns *os.File) error {
	return h.call(ctx, "check", ns, pod)
}

func (h *handler) Delete(ctx context.Context, pod cni.Pod) error {
	return h.call(ctx, "delete", nil, pod)
}

func (h *handler) Collect(ctx context.Context, keep []cni.Attachment) error {
	return h.call(ctx, "collect", nil, keep)
}

func (h *handler) Status(ctx context.Context) error { return h.call(ctx, "status", nil, "") }

func (h *handler) called() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]string(nil), h.calls...)
}

// serve serves h until the test ends, or stop is called.
func serve(t *testing.T, h cni.Handler) (socket string, stop func()) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "cni.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error)
	go func() {
		defer close(served)
		if err := cni.Serve(ctx, l, h, slog.New(slog.DiscardHandler)); err != nil {
			t.Errorf("Serve() = %v", err)
		}
	}()
	stop = func() {
		cancel()
		<-served
	}
	t.Cleanup(stop)
	return socket, stop
}

// eventually waits for a condition, and says what it was.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !condition(); {
		if time.Now().After(deadline) {
			t.Fatalf("not within ten seconds: %s", what)
		}
		runtime.Gosched()
	}
}
