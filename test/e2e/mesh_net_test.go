package e2e_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// netns is the name of a network namespace, as ip netns has them.
type netns string

func (n netns) path() string { return "/run/netns/" + string(n) }

// newNamespace makes one that ends with the test.
func newNamespace(t *testing.T, name string) netns {
	t.Helper()
	ip(t, "", "netns add "+name)
	t.Cleanup(func() { ip(t, "", "netns del "+name) })
	n := netns(name)
	n.configure(t)
	return n
}

// configure gives a namespace its loopback, and addresses that can be used at once.
func (n netns) configure(t *testing.T) {
	t.Helper()
	n.set(t, map[string]string{"ipv6/conf/all/accept_dad": "0", "ipv6/conf/default/accept_dad": "0"})
	ip(t, n, "link set lo up")
}

// ip runs the commands of ip, one a line, in the namespace, or, if that is "", where
// the test runs.
func ip(t *testing.T, in netns, commands string) {
	t.Helper()
	args := []string{"-batch", "-"}
	if in != "" {
		args = append([]string{"-n", string(in)}, args...)
	}
	cmd := exec.Command("ip", args...)
	cmd.Stdin = strings.NewReader(commands + "\n")
	if output, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("in network namespace %q:\n%s\n%v\n%s(this test needs root, and iproute2: apt-get install iproute2)", in, commands, err, output)
		if !strings.HasPrefix(commands, "netns del") {
			t.FailNow()
		}
	}
}

// set sets what is below /proc/sys/net.
func (n netns) set(t *testing.T, values map[string]string) {
	t.Helper()
	err := n.within(func() error {
		for name, value := range values {
			if err := os.WriteFile(filepath.Join("/proc/sys/net", name), []byte(value), 0); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// within calls f in the namespace. What f opens stays there; f starts no goroutine
// that opens something.
func (n netns) within(f func() error) error {
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine, and nobody else
		// finds itself in the namespace.
		runtime.LockOSThread()
		done <- func() error {
			file, err := os.Open(n.path())
			if err != nil {
				return err
			}
			defer file.Close()
			if err := unix.Setns(int(file.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("enter %q: %w", n, err)
			}
			return f()
		}()
	}()
	return <-done
}

// dial connects from inside.
func (n netns) dial(ctx context.Context, to netip.AddrPort) (conn *net.TCPConn, err error) {
	err = n.within(func() error {
		c, err := new(net.Dialer).DialContext(ctx, "tcp", to.String())
		if err == nil {
			conn = c.(*net.TCPConn)
		}
		return err
	})
	return conn, err
}

// listen listens inside, until the test ends at the latest.
func (n netns) listen(t *testing.T, at netip.AddrPort) *net.TCPListener {
	t.Helper()
	var l *net.TCPListener
	err := n.within(func() (err error) {
		l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// command is a program to run inside.
func (n netns) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + n.path(), name}, args...)...)
}

// subnets counts the networks that meshes have taken. All pods of all tests are in
// one API server, whose pods have addresses of their own.
var subnets atomic.Uint32

// subnet is a network of one's own: a /24, and a /64.
type subnet struct{ v4, v6 netip.Addr } // the addresses before the first

func newSubnet() subnet {
	n := subnets.Add(1)
	return subnet{
		v4: netip.AddrFrom4([4]byte{10, byte(128 | n>>8&0x7f), byte(n), 0}),
		v6: netip.MustParseAddr(fmt.Sprintf("fd74:7472:6f74:%x::", n)),
	}
}

// at returns the n-th addresses.
func (s subnet) at(n byte) addresses {
	v4, v6 := s.v4.As4(), s.v6.As16()
	v4[3], v6[15] = n, n
	return addresses{netip.AddrFrom4(v4), netip.AddrFrom16(v6)}
}

// addresses are one of each family.
type addresses struct{ v4, v6 netip.Addr }

func (a addresses) each() []netip.Addr { return []netip.Addr{a.v4, a.v6} }

func (a addresses) strings() []string { return []string{a.v4.String(), a.v6.String()} }
