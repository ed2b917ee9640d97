package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
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

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"troth.dev/troth/agent/cni"
)

// plugins is where Debian puts the plugins that make networks.
const plugins = "/usr/lib/cni"

// program is the path of the command, built as it is delivered.
var program string

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "the tests of troth-cni make network namespaces: run them as root")
		os.Exit(1)
	}
	for path, debian := range map[string]string{"ip": "iproute2", plugins + "/bridge": "containernetworking-plugins", plugins + "/host-local": "containernetworking-plugins"} {
		if _, err := exec.LookPath(path); err != nil {
			fmt.Fprintf(os.Stderr, "the tests of troth-cni run %s: install the package %s\n", path, debian)
			os.Exit(1)
		}
	}
	os.Exit(build(m.Run))
}

func build(run func() int) int {
	dir, err := os.MkdirTemp("", "troth-cni-test")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	program = filepath.Join(dir, pluginType)
	cmd := exec.Command("go", "build", "-o", program, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "go build: %v\n%s", err, out)
		return 1
	}
	return run()
}

// namespace makes a network namespace at a path, for a pod or for a node.
func namespace(t *testing.T) string {
	t.Helper()
	name := "troth-cni-" + uuid.NewString()[:8]
	if out, err := exec.Command("ip", "netns", "add", name).CombinedOutput(); err != nil {
		t.Fatalf("ip netns add: %v\n%s", err, out)
	}
	t.Cleanup(func() { exec.Command("ip", "netns", "del", name).Run() }) // the test may have
	return "/run/netns/" + name
}

// inside runs f on a thread in the namespace at path. What it starts is there too.
func inside(path string, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		ns, err := os.Open(path)
		if err == nil {
			defer ns.Close()
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// handler is an agent that does what a test wants it to.
type handler struct {
	do func(ctx context.Context, verb string, pod cni.Pod) error

	mu    sync.Mutex
	calls []string // guarded by mu
}

func (h *handler) call(ctx context.Context, verb string, pod cni.Pod, args any) error {
	h.mu.Lock()
	h.calls = append(h.calls, fmt.Sprint(verb, " ", args))
	h.mu.Unlock()
	if h.do == nil {
		return nil
	}
	return h.do(ctx, verb, pod)
}

func (h *handler) Add(ctx context.Context, pod cni.Pod, _ *os.File) error {
	return h.call(ctx, "add", pod, pod)
}

func (h *handler) Check(ctx context.Context, pod cni.Pod, _ *os.File) error {
	return h.call(ctx, "check", pod, pod)
}

func (h *handler) Delete(ctx context.Context, pod cni.Pod) error {
	return h.call(ctx, "delete", pod, pod)
}

func (h *handler) Collect(ctx context.Context, keep []cni.Attachment) error {
	return h.call(ctx, "collect", cni.Pod{}, keep)
}

func (h *handler) Status(ctx context.Context) error { return h.call(ctx, "status", cni.Pod{}, "") }

func (h *handler) called() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]string(nil), h.calls...)
}

// serve is an agent with h in it, until the test ends or stop is called.
func serve(t *testing.T, h cni.Handler) (socket string, stop func()) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "cni.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan struct{})
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

// invocation is one run of the plugin by hand, as a runtime does it.
type invocation struct {
	verb, sandbox, netns, args string
	config                     map[string]any
}

// prevResult is a result of the plugins before ours, with a field that nobody knows.
const prevResult = `{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"/run/netns/x"}],"ips":[{"address":"10.1.0.2/24","interface":0}],"dns":{},"x":1.50}`

func call(verb, netns, socket string) invocation {
	version := "1.0.0"
	if verb == "GC" || verb == "STATUS" {
		version = "1.1.0"
	}
	return invocation{
		verb: verb, netns: netns, sandbox: strings.Repeat("5a", 32),
		args: "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-1;K8S_POD_INFRA_CONTAINER_ID=" + strings.Repeat("5a", 32) + ";K8S_POD_UID=2f9d6d2e-0f4b-4b3e-8f6f-51a2d7b0c001;OTHER=x",
		config: map[string]any{
			"cniVersion": version, "name": "pods", "type": pluginType, "socket": socket, "timeout": "10s",
			"excludeNamespaces": []string{"kube-system"}, "prevResult": json.RawMessage(prevResult),
		},
	}
}

func (i invocation) with(key string, value any) invocation {
	c := make(map[string]any)
	for k, v := range i.config {
		c[k] = v
	}
	c[key] = value
	if value == nil {
		delete(c, key)
	}
	i.config = c
	return i
}

func (i invocation) command(t *testing.T) *exec.Cmd {
	t.Helper()
	stdin, err := json.Marshal(i.config)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program)
	cmd.Env = append(os.Environ(), "CNI_COMMAND="+i.verb, "CNI_CONTAINERID="+i.sandbox, "CNI_NETNS="+i.netns, "CNI_IFNAME=eth0", "CNI_ARGS="+i.args, "CNI_PATH="+filepath.Dir(program))
	cmd.Stdin = bytes.NewReader(stdin)
	return cmd
}

// run returns what the plugin printed, and the code of its error or 0.
func (i invocation) run(t *testing.T) (stdout string, code uint) {
	t.Helper()
	out, err := i.command(t).Output()
	if err == nil {
		return string(out), 0
	}
	var e struct{ Code uint }
	if json.Unmarshal(out, &e) != nil || e.Code == 0 {
		t.Fatalf("%s: %v, and no error in %q", i.verb, err, out)
	}
	return string(out), e.Code
}

func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !condition(); {
		if time.Now().After(deadline) {
			t.Fatalf("not within ten seconds: %s", what)
		}
		runtime.Gosched()
	}
}
