package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"troth.dev/troth/agent/capture"
	"troth.dev/troth/agent/cni"
	"troth.dev/troth/agent/pods"
)

// node is a container runtime in a network of its own, with the plugins that Debian
// has before ours.
type node struct {
	t     *testing.T
	netns string
	cni   *libcni.CNIConfig
	list  *libcni.NetworkConfigList
}

func newNode(t *testing.T, socket string) *node {
	t.Helper()
	n := &node{t: t, netns: namespace(t), cni: libcni.NewCNIConfigWithCacheDir([]string{plugins, filepath.Dir(program)}, t.TempDir(), nil)}
	var err error
	n.list, err = libcni.NetworkConfFromBytes(fmt.Appendf(nil, `{
		"cniVersion": "1.0.0", "name": "pods", "plugins": [
			{"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "ipam": {
				"type": "host-local", "dataDir": %q, "subnet": "10.78.0.0/24", "routes": [{"dst": "0.0.0.0/0"}]}},
			{"type": "troth-cni", "socket": %q, "excludeNamespaces": ["kube-system"], "timeout": "10s"}
		]}`, t.TempDir(), socket))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// do runs a verb of the runtime on the node.
func (n *node) do(f func(ctx context.Context) error) error {
	return inside(n.netns, func() error { return f(n.t.Context()) })
}

func newPod(netns, namespace string) *libcni.RuntimeConf {
	sandbox := strings.ReplaceAll(uuid.NewString()+uuid.NewString(), "-", "")
	return &libcni.RuntimeConf{ContainerID: sandbox, NetNS: netns, IfName: "eth0", Args: [][2]string{
		{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", namespace}, {"K8S_POD_NAME", "cart"},
		{"K8S_POD_INFRA_CONTAINER_ID", sandbox}, {"K8S_POD_UID", uuid.NewString()},
	}}
}

func podOfConf(c *libcni.RuntimeConf) cni.Pod {
	return cni.Pod{Namespace: c.Args[1][1], Name: c.Args[2][1], UID: c.Args[4][1], Sandbox: c.ContainerID, Interface: c.IfName, Netns: c.NetNS}
}

func (n *node) add(c *libcni.RuntimeConf) (result types.Result, err error) {
	err = n.do(func(ctx context.Context) error {
		result, err = n.cni.AddNetworkList(ctx, n.list, c)
		return err
	})
	return result, err
}

func (n *node) del(c *libcni.RuntimeConf) error {
	return n.do(func(ctx context.Context) error { return n.cni.DelNetworkList(ctx, n.list, c) })
}

func (n *node) check(c *libcni.RuntimeConf) error {
	return n.do(func(ctx context.Context) error { return n.cni.CheckNetworkList(ctx, n.list, c) })
}

func code(err error) uint {
	if e, ok := errors.AsType[*types.Error](err); ok {
		return e.Code
	}
	return 0
}

func TestChain(t *testing.T) {
	h := &handler{}
	socket, stop := serve(t, h)
	n := newNode(t, socket)
	c := newPod(namespace(t), "shop")
	result, err := n.add(c)
	if err != nil {
		t.Fatalf("ADD: %v", err)
	}
	got, err := types100.GetResult(result)
	if err != nil || len(got.IPs) != 1 || !strings.HasPrefix(got.IPs[0].Address.String(), "10.78.0.") || len(got.Interfaces) != 3 {
		t.Errorf("ADD = %v, %v, want what the bridge plugin answered", result, err)
	}
	if err := n.check(c); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	for range 2 {
		if err := n.del(c); err != nil {
			t.Errorf("DEL: %v", err)
		}
	}
	pod := podOfConf(c)
	want := []string{fmt.Sprint("add ", pod), fmt.Sprint("check ", pod), fmt.Sprint("delete ", pod), fmt.Sprint("delete ", pod)}
	if got := h.called(); !slices.Equal(got, want) {
		t.Errorf("the agent was asked for %v, want %v", got, want)
	}

	// Without the agent only what is excluded starts, and everything ends.
	stop()
	if _, err := n.add(newPod(namespace(t), "kube-system")); err != nil {
		t.Errorf("ADD(excluded, agent away): %v", err)
	}
	refused := newPod(namespace(t), "shop")
	if _, err := n.add(refused); code(err) != types.ErrTryAgainLater {
		t.Errorf("ADD(agent away): %v, want code %d", err, types.ErrTryAgainLater)
	}
	if err := n.del(refused); err != nil {
		t.Errorf("DEL(agent away): %v", err)
	}
}

// TestInvocations has a row for each answer of the plugin.
func TestInvocations(t *testing.T) {
	netns := namespace(t)
	refuses := func(err error) string {
		socket, _ := serve(t, &handler{do: func(context.Context, string, cni.Pod) error { return err }})
		return socket
	}
	yes := refuses(nil)
	away := filepath.Join(t.TempDir(), "nobody.sock")
	add := call("ADD", netns, yes)
	args := func(i invocation, args string) invocation {
		i.args = args
		return i
	}
	at := func(i invocation, netns string) invocation {
		i.netns = netns
		return i
	}
	tests := []struct {
		name    string
		run     invocation
		code    uint
		message string // a part of what it prints
	}{
		{"ADD", add, 0, prevResult},
		{"ADD, unchained", add.with("prevResult", nil), 7, "put it after the plugin"},
		{"ADD, a result that is none", add.with("prevResult", []int{}), 6, "result of the plugins"},
		{"ADD, a timeout that is none", add.with("timeout", "soon"), 7, "timeout"},
		{"ADD, a timeout that is none of ours", add.with("timeout", "1h"), 7, "1h0m0s is not from 100ms to 2m0s"},
		{"ADD, a socket that is none", add.with("socket", 1), 6, "socket"},
		{"ADD, a version without chains", add.with("cniVersion", "0.2.0"), 1, "incompatible"},
		{"ADD, the runtime's own network", at(add, "/proc/self/ns/net"), 8, "the agent itself is in"},
		{"ADD, no namespace", at(add, "/dev/null"), 8, "not a namespace"},
		{"ADD, nothing", at(add, "/nowhere"), 8, "no such file"},
		{"ADD, a namespace of another kind", at(add, "/proc/self/ns/ipc"), 8, "not a network namespace"},
		{"ADD, not Kubernetes", args(call("ADD", netns, away), ""), 0, prevResult},
		{"ADD, not Kubernetes, other arguments", args(call("ADD", netns, away), "A=b"), 0, prevResult},
		{"ADD, no UID", args(add, "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart"), 4, "too old"},
		{"ADD, only the sandbox", args(add, "K8S_POD_INFRA_CONTAINER_ID="+add.sandbox), 4, "too old"},
		{"ADD, another sandbox", args(add, "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart;K8S_POD_UID=u;K8S_POD_INFRA_CONTAINER_ID=x"), 4, "differ"},
		{"ADD, malformed", args(add, "K8S_POD_NAMESPACE"), 4, "CNI_ARGS"},
		{"ADD, malformed names", args(add, "K8S_POD_NAMESPACE=Shop;K8S_POD_NAME=cart;K8S_POD_UID=u"), errRefused, "malformed"},
		{"ADD, excluded", args(call("ADD", netns, away), "K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=dns"), 0, prevResult},
		{"ADD, agent away", call("ADD", netns, away), 11, "no such file"},
		{"ADD, later", call("ADD", netns, refuses(&cni.Error{Reason: "POD_NOT_KNOWN", Message: "wait", Retry: true})), 11, "POD_NOT_KNOWN: wait"},
		{"ADD, never", call("ADD", netns, refuses(&cni.Error{Reason: "NEVER", Message: "no"})), errRefused, "NEVER: no"},
		{"ADD, a network that is not a pod's", call("ADD", netns, refuses(&cni.Error{Reason: cni.ReasonNamespace, Message: "no"})), 8, "INVALID_NAMESPACE"},
		{"CHECK", call("CHECK", netns, yes), 0, ""},
		{"CHECK, unchained", call("CHECK", netns, yes).with("prevResult", nil), 7, "put it after the plugin"},
		{"CHECK, excluded", args(call("CHECK", netns, away), "K8S_POD_NAMESPACE=kube-system"), 0, ""},
		{"CHECK, agent away", call("CHECK", netns, away), 11, "not known to stand"},
		{"CHECK, not captured", call("CHECK", netns, refuses(&cni.Error{Reason: "POD_NOT_CAPTURED", Retry: true})), 11, "POD_NOT_CAPTURED"},
		{"DEL", call("DEL", netns, yes), 0, ""},
		{"DEL, no namespace any more", call("DEL", "", yes), 0, ""},
		{"DEL, a pod that nobody knows", args(call("DEL", "", yes), ""), 0, ""},
		{"DEL, malformed", args(call("DEL", "", yes), "K8S_POD_NAMESPACE"), 0, ""},
		{"DEL, a configuration that is wrong", call("DEL", netns, yes).with("timeout", "soon"), 0, ""},
		{"DEL, agent away", call("DEL", netns, away), 0, ""},
		{"DEL, refused", call("DEL", netns, refuses(errors.New("broken"))), 0, ""},
		{"STATUS", call("STATUS", "", yes), 0, ""},
		{"STATUS, agent away", call("STATUS", "", away), 50, "cannot start"},
		{"STATUS, agent starting", call("STATUS", "", refuses(&cni.Error{Reason: "AGENT_STARTING", Retry: true})), 50, "AGENT_STARTING"},
		{"GC", call("GC", "", yes).with("cni.dev/valid-attachments", []types.GCAttachment{{ContainerID: "a", IfName: "eth0"}}), 0, ""},
		{"GC, agent away", call("GC", "", away), 11, "not collected"},
		{"VERSION", call("VERSION", "", away), 0, `"supportedVersions":["0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]`},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			out, code := test.run.run(t)
			if code != test.code || !strings.Contains(out, test.message) {
				t.Errorf("it printed %q, code %d, want code %d and %q", out, code, test.code, test.message)
			}
			if test.run.verb == "ADD" && code == 0 && out != prevResult {
				t.Errorf("it printed %q, want the result of the plugins before it as it was", out)
			}
		})
	}
}

func TestGarbageIsCollected(t *testing.T) {
	h := &handler{}
	socket, _ := serve(t, h)
	list, err := libcni.NetworkConfFromBytes(fmt.Appendf(nil, `{"cniVersion": "1.1.0", "name": "pods", "plugins": [{"type": "troth-cni", "socket": %q}]}`, socket))
	if err != nil {
		t.Fatal(err)
	}
	runtime := libcni.NewCNIConfigWithCacheDir([]string{filepath.Dir(program)}, t.TempDir(), nil)
	if err := runtime.GetStatusNetworkList(t.Context(), list); err != nil {
		t.Errorf("STATUS: %v", err)
	}
	err = runtime.GCNetworkList(t.Context(), list, &libcni.GCArgs{ValidAttachments: []types.GCAttachment{{ContainerID: "a", IfName: "eth0"}, {ContainerID: "b", IfName: "net1"}}})
	if err != nil {
		t.Errorf("GC: %v", err)
	}
	if got, want := h.called(), []string{"status ", "collect [{a eth0} {b net1}]"}; !slices.Equal(got, want) {
		t.Errorf("the agent was asked for %v, want %v", got, want)
	}
}

func TestTheAgentIsSlow(t *testing.T) {
	socket, _ := serve(t, &handler{do: func(ctx context.Context, _ string, _ cni.Pod) error {
		<-ctx.Done()
		return ctx.Err()
	}})
	out, code := call("ADD", namespace(t), socket).with("timeout", "200ms").run(t)
	if code != types.ErrTryAgainLater || !strings.Contains(out, "has not answered") {
		t.Errorf("ADD printed %q, code %d, want code %d", out, code, types.ErrTryAgainLater)
	}
}

// TestTheAgentDies has an agent that is gone after it has read the request.
func TestTheAgentDies(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "cni.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, verb := range []string{"ADD", "DEL"} {
		go func() {
			if c, err := l.Accept(); err == nil {
				c.Read(make([]byte, 4096))
				c.Close()
			}
		}()
		want := uint(0)
		if verb == "ADD" {
			want = types.ErrTryAgainLater
		}
		if out, code := call(verb, namespace(t), socket).run(t); code != want {
			t.Errorf("%s printed %q, code %d, want %d", verb, out, code, want)
		}
	}
}

func TestThePluginIsKilled(t *testing.T) {
	began, ended := make(chan struct{}), make(chan struct{})
	socket, _ := serve(t, &handler{do: func(ctx context.Context, _ string, _ cni.Pod) error {
		close(began)
		<-ctx.Done()
		close(ended)
		return nil
	}})
	cmd := call("ADD", namespace(t), socket).command(t)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-began
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("the agent goes on with what nobody waits for")
	}
}

// TestCapture is the whole of it: a runtime, its plugins, ours, an agent's pods and the
// kernel's rules.
func TestCapture(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	var optedOut sync.Map // of UIDs
	p, err := pods.New(pods.Config{
		Records: filepath.Join(t.TempDir(), "pods"), HostRoot: "/", Log: slog.New(slog.DiscardHandler),
		Wanted: func(_ context.Context, uid string) (bool, string, error) {
			_, out := optedOut.Load(uid)
			return !out, "OPTED_OUT", nil
		},
		Serve: func(ctx context.Context, uid string, n *capture.Network) error {
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
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	ran := make(chan error)
	go func() { ran <- p.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-ran; err != nil {
			t.Errorf("Run() = %v", err)
		}
	}()
	socket, _ := serve(t, p)
	n := newNode(t, socket)
	first, out := newPod(namespace(t), "shop"), newPod(namespace(t), "shop")
	optedOut.Store(podOfConf(out).UID, true)
	for _, c := range []*libcni.RuntimeConf{first, out} {
		if _, err := n.add(c); err != nil {
			t.Fatalf("ADD: %v", err)
		}
		if err := n.check(c); err != nil {
			t.Errorf("CHECK: %v", err)
		}
	}
	if answer, err := dial(first.NetNS); err != nil || answer != podOfConf(first).UID {
		t.Errorf("a connection out of the pod was answered %q, %v, want by the agent", answer, err)
	}
	if answer, err := dial(out.NetNS); err == nil {
		t.Errorf("a connection out of the pod that opted out was answered %q", answer)
	}
	if p.Captured() != 1 {
		t.Errorf("%d pods are captured, want 1", p.Captured())
	}

	// Two at once for one pod, as a runtime should not.
	two := call("ADD", namespace(t), socket)
	codes := make(chan uint)
	for range 2 {
		cmd := two.command(t)
		go func() {
			if err := cmd.Run(); err != nil {
				codes <- 1
				return
			}
			codes <- 0
		}()
	}
	if a, b := <-codes, <-codes; a != 0 || b != 0 || p.Captured() != 2 {
		t.Errorf("two at once: %d, %d, and %d captured, want both to succeed", a, b, p.Captured())
	}
	two.verb = "DEL"
	if out, code := two.run(t); code != 0 {
		t.Errorf("DEL printed %q", out)
	}
	for range 2 {
		for _, c := range []*libcni.RuntimeConf{first, out} {
			if err := n.del(c); err != nil {
				t.Errorf("DEL: %v", err)
			}
		}
	}
	if p.Captured() != 0 {
		t.Errorf("%d pods are captured after all were deleted", p.Captured())
	}
}

// dial connects from a pod to somebody who is not there.
func dial(netns string) (answer string, err error) {
	err = inside(netns, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		limit := unix.Timeval{Sec: 1}
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
