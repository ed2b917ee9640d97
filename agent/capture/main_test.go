//go:build linux

package capture_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"troth.dev/troth/agent/capture"
)

// patience is how long a test waits for what should take milliseconds.
const patience = 10 * time.Second

func TestMain(m *testing.M) {
	var missing []string
	if os.Geteuid() != 0 {
		missing = append(missing, "they make network namespaces, which takes root: run them as root")
	}
	for program, debian := range map[string]string{"ip": "iproute2", "nft": "nftables", "iptables-legacy-save": "iptables"} {
		if _, err := exec.LookPath(program); err != nil {
			missing = append(missing, fmt.Sprintf("they run %s: install the package %s", program, debian))
		}
	}
	if missing != nil {
		fmt.Fprintf(os.Stderr, "the tests of capture cannot run: %s\n", strings.Join(missing, "; "))
		os.Exit(1)
	}
	// A test that needs another process runs its own binary again, as one of these.
	switch os.Getenv("CAPTURE_TEST_HELPER") {
	case "agent":
		agentHelper()
	case "fallback":
		fallbackHelper()
	default:
		os.Exit(m.Run())
	}
}

// namespace returns a new network namespace. It is gone when the test ends, and with
// it all that is in it.
func namespace(tb testing.TB) *os.File {
	tb.Helper()
	made, err := makeNamespace()
	if err != nil {
		tb.Fatalf("make a network namespace: %v", err)
	}
	tb.Cleanup(func() { made.Close() })
	return made
}

func makeNamespace() (made *os.File, err error) {
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, err
	}
	defer home.Close()
	err = capture.Inside(home, func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		made, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	return made, err
}

// in runs f in the namespace.
func in(tb testing.TB, ns *os.File, f func() error) {
	tb.Helper()
	if err := capture.Inside(ns, f); err != nil {
		tb.Fatal(err)
	}
}

// run runs a program in the namespace and returns what it writes.
func run(tb testing.TB, ns *os.File, name string, args ...string) string {
	tb.Helper()
	var output bytes.Buffer
	err := capture.Inside(ns, func() error {
		cmd := exec.Command(name, args...)
		cmd.Stdout, cmd.Stderr = &output, &output
		return cmd.Run()
	})
	if err != nil {
		tb.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, &output)
	}
	return output.String()
}

// script runs lines of a shell in the namespace.
func script(tb testing.TB, ns *os.File, lines string) string {
	tb.Helper()
	return run(tb, ns, "sh", "-ec", lines)
}

// The addresses of a pod and of what is outside.
var (
	pod     = addresses{netip.MustParseAddr("10.74.0.2"), netip.MustParseAddr("fd74::2")}
	peer    = addresses{netip.MustParseAddr("10.74.0.1"), netip.MustParseAddr("fd74::1")}
	service = addresses{netip.MustParseAddr("10.75.0.9"), netip.MustParseAddr("fd75::9")}
)

type addresses struct{ v4, v6 netip.Addr }

func (a addresses) of(family string) netip.Addr {
	if family == "IPv6" {
		return a.v6
	}
	return a.v4
}

// wired returns two namespaces with a wire between them. The second has all that is
// outside of the pod.
func wired(tb testing.TB) (inner, outer *os.File) {
	tb.Helper()
	inner, outer = namespace(tb), namespace(tb)
	in(tb, inner, func() error {
		veth := netlink.NewVeth(netlink.NewLinkAttrs())
		veth.Name, veth.PeerName = "eth0", "veth0"
		veth.PeerNamespace = netlink.NsFd(int(outer.Fd()))
		return netlink.LinkAdd(veth)
	})
	script(tb, inner, `
		ip link set lo up
		sysctl -qw net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.default.rp_filter=1 net.ipv4.conf.lo.rp_filter=1 net.ipv4.conf.eth0.rp_filter=1
		ip link set eth0 addrgenmode none up # or an address comes when it likes
		ip addr add 10.74.0.2/24 dev eth0
		ip addr add fd74::2/64 dev eth0 nodad
		ip route add default via 10.74.0.1
		ip route add default via fd74::1`)
	script(tb, outer, `
		ip link set lo up
		ip link set veth0 addrgenmode none up
		ip addr add 10.74.0.1/24 dev veth0
		ip addr add fd74::1/64 dev veth0 nodad
		ip addr add 10.75.0.9/32 dev lo
		ip addr add fd75::9/128 dev lo nodad`)
	// The kernel notices a little later that there is a wire.
	for _, ns := range []*os.File{inner, outer} {
		waitFor(tb, func() error {
			routes := script(tb, ns, "ip route show table all; ip -6 route show table all")
			if strings.Contains(routes, "linkdown") || !strings.Contains(routes, "local fd74::") {
				return fmt.Errorf("the wire is not up:\n%s", routes)
			}
			return nil
		})
	}
	return inner, outer
}

// open captures the namespace by one kind of rules, until the test ends.
func open(tb testing.TB, ns *os.File, backend string, kept ...*os.File) *capture.Network {
	tb.Helper()
	n, err := capture.OpenBy(ns, kept, backend)
	if err != nil {
		tb.Fatalf("Open() = %v", err)
	}
	tb.Cleanup(func() { n.Close() })
	return n
}

// listen listens in the namespace until the test ends.
func listen(tb testing.TB, ns *os.File, address netip.AddrPort) *net.TCPListener {
	tb.Helper()
	var l *net.TCPListener
	in(tb, ns, func() error {
		var err error
		l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(address))
		return err
	})
	tb.Cleanup(func() { l.Close() })
	return l
}

// dial connects from the namespace, as an application does.
func dial(tb testing.TB, ns *os.File, to netip.AddrPort) (*net.TCPConn, error) {
	tb.Helper()
	return dialWith(tb, ns, net.Dialer{}, to)
}

func dialWith(tb testing.TB, ns *os.File, d net.Dialer, to netip.AddrPort) (*net.TCPConn, error) {
	tb.Helper()
	d.Timeout = patience
	var conn *net.TCPConn
	err := capture.Inside(ns, func() error {
		c, err := d.Dial("tcp", to.String())
		if err == nil {
			conn = c.(*net.TCPConn)
			tb.Cleanup(func() { c.Close() })
		}
		return err
	})
	return conn, err
}

func mustDial(tb testing.TB, ns *os.File, to netip.AddrPort) *net.TCPConn {
	tb.Helper()
	conn, err := dial(tb, ns, to)
	if err != nil {
		tb.Fatalf("dial %s: %v", to, err)
	}
	return conn
}

// accept returns the next connection, and its caller's end is closed with the test.
func accept(tb testing.TB, l net.Listener) *net.TCPConn {
	tb.Helper()
	if d, ok := l.(interface{ SetDeadline(time.Time) error }); ok {
		d.SetDeadline(time.Now().Add(patience))
	}
	conn, err := l.Accept()
	if err != nil {
		tb.Fatalf("Accept() = %v", err)
	}
	tb.Cleanup(func() { conn.Close() })
	return conn.(*net.TCPConn)
}

// wantNone fails if a connection waits to be accepted.
func wantNone(tb testing.TB, l net.Listener) {
	tb.Helper()
	l.(interface{ SetDeadline(time.Time) error }).SetDeadline(time.Unix(1, 0))
	if conn, err := l.Accept(); err == nil {
		tb.Errorf("a connection from %s was let through", conn.RemoteAddr())
		conn.Close()
	}
}

// talk sends words both ways.
func talk(tb testing.TB, a, b net.Conn) {
	tb.Helper()
	for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
		way[0].SetDeadline(time.Now().Add(patience))
		way[1].SetDeadline(time.Now().Add(patience))
		if _, err := way[0].Write([]byte("troth")); err != nil {
			tb.Fatalf("Write() = %v", err)
		}
		got := make([]byte, 5)
		if _, err := io.ReadFull(way[1], got); err != nil || string(got) != "troth" {
			tb.Fatalf("Read() = %q, %v", got, err)
		}
	}
}

func remote(c net.Conn) netip.AddrPort {
	a := c.RemoteAddr().(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

func wantRefused(tb testing.TB, what string, err error) {
	tb.Helper()
	if !errors.Is(err, syscall.ECONNREFUSED) {
		tb.Errorf("%s: %v, want %v", what, err, syscall.ECONNREFUSED)
	}
}

func context10(tb testing.TB) context.Context {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), patience)
	tb.Cleanup(cancel)
	return ctx
}

// state is what the kernel has been told in the namespace, but for counters and for
// the empty tables that iptables leaves behind, which nobody can remove.
func state(tb testing.TB, ns *os.File) string {
	tb.Helper()
	var lines []string
	for line := range strings.Lines(script(tb, ns, `
		nft list ruleset
		iptables-legacy-save; ip6tables-legacy-save
		ip rule; ip -6 rule
		ip route show table all; ip -6 route show table all`)) {
		if strings.HasPrefix(line, "#") || strings.HasPrefix(line, "*") || strings.HasPrefix(line, "COMMIT") ||
			strings.HasPrefix(line, ":") && strings.Contains(line, " ACCEPT [") {
			continue
		}
		lines = append(lines, line)
	}
	return strings.Join(slices.Compact(lines), "")
}

// child is another process, of this binary.
type child struct {
	*exec.Cmd

	stdin  io.WriteCloser
	pipe   *os.File // that stdout reads from
	stdout *bufio.Reader
}

// start starts a helper, whose descriptor 3 is the namespace. It ends with the test, at
// the latest.
func start(tb testing.TB, helper string, ns *os.File, args ...string) *child {
	tb.Helper()
	self, err := os.Executable()
	if err != nil {
		tb.Fatal(err)
	}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), "CAPTURE_TEST_HELPER="+helper)
	cmd.ExtraFiles = []*os.File{ns}
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		tb.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		tb.Fatalf("start helper %q: %v", helper, err)
	}
	c := &child{Cmd: cmd, stdin: stdin, pipe: stdout.(*os.File), stdout: bufio.NewReader(stdout)}
	tb.Cleanup(c.kill)
	return c
}

// line returns the next line that the child writes.
func (c *child) line(tb testing.TB) string {
	tb.Helper()
	if err := c.pipe.SetReadDeadline(time.Now().Add(patience)); err != nil {
		tb.Fatal(err)
	}
	line, err := c.stdout.ReadString('\n')
	if err != nil {
		tb.Fatalf("helper wrote %q and then: %v", line, err)
	}
	return strings.TrimSpace(line)
}

// kill kills the child, with SIGKILL, and returns when it is gone.
func (c *child) kill() {
	c.Process.Kill()
	c.Wait()
}

// openFiles counts the descriptors of this process.
func openFiles(tb testing.TB) int {
	tb.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		tb.Fatal(err)
	}
	return len(all)
}

// waitFor waits until f returns nil.
func waitFor(tb testing.TB, f func() error) {
	tb.Helper()
	deadline := time.After(patience)
	again := time.NewTicker(time.Millisecond)
	defer again.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-again.C:
		case <-deadline:
			tb.Fatal(err)
		}
	}
}

// asUser runs f on a thread that is another user to whoever asks.
func asUser(tb testing.TB, uid int, f func()) {
	tb.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		become := func(uid int) error {
			_, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0))
			if errno != 0 {
				return errno
			}
			return nil
		}
		if err := become(uid); err != nil {
			done <- err
			return
		}
		f()
		err := become(0)
		if err == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		tb.Fatal(err)
	}
}
