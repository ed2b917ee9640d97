package pods_test

import (
	"bufio"
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
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"troth.dev/troth/agent/capture"
	"troth.dev/troth/agent/cni"
	"troth.dev/troth/agent/pods"
	"troth.dev/troth/internal/latest"
)

// A test that needs another process runs its own binary again, as one of these.
func TestMain(m *testing.M) {
	switch os.Getenv("PODS_TEST_HELPER") {
	case "wait":
		// A process of a pod, until its standard input ends.
		fmt.Println("ready")
		io.Copy(io.Discard, os.Stdin)
	case "unshare":
		// A process of a pod that has made a network of its own.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			panic(err)
		}
		fmt.Println("ready")
		io.Copy(io.Discard, os.Stdin)
	case "agent":
		agentHelper()
	default:
		if os.Geteuid() != 0 {
			fmt.Fprintln(os.Stderr, "the tests of pods make network namespaces: run them as root")
			os.Exit(1)
		}
		for program, debian := range map[string]string{"ip": "iproute2", "nft": "nftables"} {
			if _, err := exec.LookPath(program); err != nil {
				fmt.Fprintf(os.Stderr, "the tests of pods run %s: install the package %s\n", program, debian)
				os.Exit(1)
			}
		}
		os.Exit(m.Run())
	}
}

// agentHelper is an agent that is killed. It adds one pod, by its arguments, says so
// and serves for ever.
func agentHelper() {
	records, keeper, path, uid, sandbox := os.Args[1], os.Args[2], os.Args[3], os.Args[4], os.Args[5]
	config := pods.Config{
		Records: records, HostRoot: "/", Log: slog.New(slog.DiscardHandler), Serve: serve,
		// Of a cluster that somebody runs on this computer no pod is touched.
		Wanted: func(_ context.Context, pod string) (bool, string, error) { return pod == uid, "NOT_OURS", nil },
	}
	if keeper != "" {
		config.Keeper = &capture.Keeper{Path: keeper}
	}
	p, err := pods.New(config)
	if err != nil {
		panic(err)
	}
	go p.Run(context.Background())
	ns, err := os.Open(path)
	if err != nil {
		panic(err)
	}
	pod := cni.Pod{Namespace: "shop", Name: "cart", UID: uid, Sandbox: sandbox, Interface: "eth0", Netns: path}
	if err := p.Add(context.Background(), pod, ns); err != nil {
		panic(err)
	}
	fmt.Println("ready")
	select {}
}

// serve answers every connection out of the pod with the pod's UID.
func serve(ctx context.Context, uid string, n *capture.Network) error {
	l := n.Listener(capture.OutboundPort)
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		io.WriteString(c, uid)
		c.Close()
	}
}

// sandbox is the network of a pod, as a runtime makes it: at a path, with an address
// and a way out.
type sandbox struct {
	cni.Pod

	t  *testing.T
	ns *os.File
}

func newSandbox(t *testing.T, uid string) *sandbox {
	t.Helper()
	name := "troth-pods-" + uuid.NewString()[:8]
	ip(t, "netns", "add", name)
	t.Cleanup(func() { exec.Command("ip", "netns", "del", name).Run() }) // the test may have
	for _, line := range []string{
		"link set lo up",
		"link add eth0 type veth peer name beyond",
		"link set beyond up",
		"address add 10.77.0.2/24 dev eth0",
		"link set eth0 up",
		"route add default via 10.77.0.1",
	} {
		ip(t, append([]string{"-n", name}, strings.Fields(line)...)...)
	}
	path := "/run/netns/" + name
	ns, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return &sandbox{t: t, ns: ns, Pod: cni.Pod{
		Namespace: "shop", Name: "cart", UID: uid, Sandbox: uuid.NewString(), Interface: "eth0", Netns: path,
	}}
}

// remove is what a runtime does with a network that it needs no more.
func (s *sandbox) remove() {
	s.t.Helper()
	ip(s.t, "netns", "del", filepath.Base(s.Netns))
}

func ip(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// inside runs f on a thread in the sandbox.
func (s *sandbox) inside(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		err := unix.Setns(int(s.ns.Fd()), unix.CLONE_NEWNET)
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// dial connects from the pod to somebody who is not there, and returns what answers:
// the agent, if the pod is captured.
func (s *sandbox) dial(wait time.Duration) (answer string, err error) {
	err = s.inside(func() error {
		// By hand, since package net might connect on another thread.
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		limit := unix.NsecToTimeval(wait.Nanoseconds())
		for _, option := range []int{unix.SO_SNDTIMEO, unix.SO_RCVTIMEO} {
			if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, option, &limit); err != nil {
				return err
			}
		}
		if err := unix.Connect(fd, &unix.SockaddrInet4{Port: 80, Addr: [4]byte{192, 0, 2, 1}}); err != nil {
			return err
		}
		buffer := make([]byte, 128)
		n, err := unix.Read(fd, buffer)
		answer = string(buffer[:max(n, 0)])
		return err
	})
	return answer, err
}

// isCaptured reports whether what the pod sends comes to the agent.
func (s *sandbox) isCaptured() bool {
	answer, err := s.dial(200 * time.Millisecond)
	return err == nil && answer == s.UID
}

// process runs a helper in the pod: in its network, and in a cgroup of its UID.
func (s *sandbox) process(helper string) (stop func()) {
	s.t.Helper()
	return process(s.t, helper, s.UID, s)
}

// process runs a helper in the cgroup of a pod, and in its network unless that is nil.
func process(t *testing.T, helper, uid string, in *sandbox) (stop func()) {
	t.Helper()
	cgroup := filepath.Join(hierarchy(t), "troth-pods-"+uuid.NewString()[:8], "kubepods", "pod"+uid)
	if err := os.MkdirAll(cgroup, 0o755); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), "PODS_TEST_HELPER="+helper)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if in != nil {
		err = in.inside(cmd.Start)
	} else {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		stdin.Close()
		cmd.Wait()
		for dir := cgroup; filepath.Base(dir) != filepath.Base(hierarchy(t)); dir = filepath.Dir(dir) {
			os.Remove(dir)
		}
	}
	t.Cleanup(stop)
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
		t.Fatalf("helper said %q: %v", line, err)
	}
	if err := os.WriteFile(filepath.Join(cgroup, "cgroup.procs"), fmt.Append(nil, cmd.Process.Pid), 0); err != nil {
		t.Fatal(err)
	}
	return stop
}

// hierarchy returns a cgroup hierarchy that the test may make groups in: the only one
// of version 2, or one that counts nothing.
func hierarchy(t *testing.T) string {
	t.Helper()
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd"} {
		if _, err := os.Stat(filepath.Join(dir, "cgroup.procs")); err == nil {
			return dir
		}
	}
	t.Fatal("there is no cgroup hierarchy in /sys/fs/cgroup: mount one")
	return ""
}

// controlPlane is what the test has the control plane say of each pod.
type controlPlane struct {
	said latest.Value[map[string]bool]
}

func (c *controlPlane) say(uid string, want bool) {
	now, _ := c.said.Load()
	next := map[string]bool{uid: want}
	for uid, want := range now {
		if _, ok := next[uid]; !ok {
			next[uid] = want
		}
	}
	c.said.Set(next)
}

func (c *controlPlane) wanted(ctx context.Context, uid string) (bool, string, error) {
	for {
		said, changed := c.said.Load()
		if want, ok := said[uid]; ok {
			return want, "OPTED_OUT", nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false, "", ctx.Err()
		}
	}
}

func (c *controlPlane) changed() <-chan struct{} {
	_, changed := c.said.Load()
	return changed
}

// node is an agent's pods, and what it needs.
type node struct {
	*pods.Pods
	controlPlane

	t       *testing.T
	config  pods.Config
	stop    func()
	serving atomic.Int64
}

// newNode makes a node and starts it. change may change its config.
func newNode(t *testing.T, change func(*pods.Config)) *node {
	t.Helper()
	n := &node{t: t}
	n.config = pods.Config{
		Records:  filepath.Join(t.TempDir(), "pods"),
		HostRoot: "/",
		Wanted:   n.wanted,
		Changed:  n.changed,
		Serve: func(ctx context.Context, uid string, network *capture.Network) error {
			n.serving.Add(1)
			defer n.serving.Add(-1)
			return serve(ctx, uid, network)
		},
		Interval: 50 * time.Millisecond,
		Log:      slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	if change != nil {
		change(&n.config)
	}
	n.start()
	return n
}

func (n *node) start() {
	n.t.Helper()
	p, err := pods.New(n.config)
	if err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := p.Run(ctx); err != nil {
			n.t.Errorf("Run() = %v", err)
		}
	}()
	n.Pods = p
	n.stop = func() {
		cancel()
		<-done
		if left := n.serving.Load(); left != 0 {
			n.t.Errorf("%d pods are served after Run has returned", left)
		}
	}
	n.t.Cleanup(n.stop)
}

// add adds a pod as the plugin would.
func (n *node) add(s *sandbox) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return n.Add(ctx, s.Pod, s.ns)
}

func (n *node) remove(s *sandbox) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return n.Delete(ctx, s.Pod)
}

func (n *node) recorded() []string {
	n.t.Helper()
	entries, err := os.ReadDir(n.config.Records)
	if err != nil {
		n.t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// keeper starts a keeper and returns its client.
func keeper(t *testing.T) *capture.Keeper {
	t.Helper()
	path := filepath.Join(t.TempDir(), "keeper.sock")
	l, err := capture.ListenKeeper(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := capture.ServeKeeper(ctx, l); err != nil && !errors.Is(err, net.ErrClosed) {
			t.Errorf("ServeKeeper() = %v", err)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return &capture.Keeper{Path: path}
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
