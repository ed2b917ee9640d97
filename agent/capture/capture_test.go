//go:build linux

package capture_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"troth.dev/troth/agent/capture"
)

// each runs f for both kinds of rules and both families.
func each(t *testing.T, f func(t *testing.T, backend, family string)) {
	for _, backend := range []string{"nft", "iptables"} {
		for _, family := range []string{"IPv4", "IPv6"} {
			t.Run(backend+" "+family, func(t *testing.T) {
				f(t, backend, family)
			})
		}
	}
}

func TestOutbound(t *testing.T) {
	each(t, func(t *testing.T, backend, family string) {
		inner, outer := wired(t)
		n := open(t, inner, backend)
		to := netip.AddrPortFrom(service.of(family), 80)
		elsewhere := listen(t, outer, to)

		app := mustDial(t, inner, to)
		captured := accept(t, n.Listener(capture.OutboundPort))
		if got, err := capture.Destination(captured); got != to || err != nil {
			t.Errorf("Destination() = %v, %v, want %v", got, err, to)
		}
		if got := remote(captured).Addr(); got != pod.of(family) {
			t.Errorf("the caller is %s, want the pod, %s", got, pod.of(family))
		}
		talk(t, app, captured)

		conn, err := n.Dial(context10(t), to)
		if err != nil {
			t.Fatalf("Dial() = %v", err)
		}
		defer conn.Close()
		talk(t, conn, accept(t, elsewhere))
		wantNone(t, elsewhere)
	})
}

func TestInbound(t *testing.T) {
	each(t, func(t *testing.T, backend, family string) {
		inner, outer := wired(t)
		n := open(t, inner, backend)
		to := netip.AddrPortFrom(pod.of(family), 80)
		app := listen(t, inner, to)

		caller := mustDial(t, outer, to)
		captured := accept(t, n.Listener(capture.PlaintextPort))
		if got, err := capture.Destination(captured); got != to || err != nil {
			t.Errorf("Destination() = %v, %v, want %v", got, err, to)
		}
		talk(t, caller, captured)
		wantNone(t, app)

		conn, err := n.DialFrom(context10(t), remote(captured).Addr(), to)
		if err != nil {
			t.Fatalf("DialFrom() = %v", err)
		}
		defer conn.Close()
		served := accept(t, app)
		if got, want := remote(served).Addr(), remote(captured).Addr(); got != want {
			t.Errorf("the application's caller is %s, want %s", got, want)
		}
		talk(t, conn, served)
	})
}

// What the ports of the agent are called directly, nobody takes for captured.
func TestOwnPorts(t *testing.T) {
	each(t, func(t *testing.T, backend, family string) {
		inner, outer := wired(t)
		n := open(t, inner, backend)
		at := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(pod.of(family), port) }

		for _, port := range []uint16{capture.OutboundPort, capture.PlaintextPort} {
			_, err := dial(t, outer, at(port))
			wantRefused(t, "from outside", err)
			wantNone(t, n.Listener(port))

			mustDial(t, inner, at(port))
			if got, err := capture.Destination(accept(t, n.Listener(port))); !errors.Is(err, capture.ErrNotCaptured) {
				t.Errorf("Destination() = %v, %v, want %v", got, err, capture.ErrNotCaptured)
			}
		}
		for _, port := range []uint16{capture.HBONEPort, capture.CallerFirstPort} {
			for _, from := range []string{"outside", "the pod"} {
				ns := outer
				if from == "the pod" {
					ns = inner
				}
				caller := mustDial(t, ns, at(port))
				talk(t, caller, accept(t, n.Listener(port)))
			}
		}
		for _, port := range []uint16{capture.OutboundPort, capture.PlaintextPort, capture.HBONEPort, capture.CallerFirstPort} {
			if _, err := n.DialFrom(context10(t), peer.of(family), at(port)); err == nil {
				t.Errorf("DialFrom() reached port %d", port)
			}
		}
	})
}

// The rules are replaced and removed, and nothing else is.
func TestRelease(t *testing.T) {
	for _, backend := range []string{"nft", "iptables"} {
		t.Run(backend, func(t *testing.T) {
			inner, outer := wired(t)
			script(t, inner, `
				nft add table inet theirs
				nft 'add chain inet theirs troth { type nat hook output priority -100; }'
				nft add rule inet theirs troth tcp dport 81 redirect to :82
				iptables-legacy -t nat -N THEIRS
				iptables-legacy -t nat -A OUTPUT -p tcp --dport 83 -j THEIRS
				ip6tables-legacy -t filter -A INPUT -p tcp --dport 84 -j DROP
				ip rule add fwmark 1 lookup 100 pref 10
				ip route add local default dev lo table 100`)
			before := state(t, inner)
			n := open(t, inner, backend)
			once := state(t, inner)
			files, err := n.Files()
			if err != nil {
				t.Fatal(err)
			}
			again := open(t, inner, backend, files...)
			if got := state(t, inner); got != once {
				t.Errorf("opened twice:\n%s\nwant\n%s", got, once)
			}
			if err := again.Check(); err != nil {
				t.Errorf("Check() = %v", err)
			}
			if err := again.Release(); err != nil {
				t.Fatalf("Release() = %v", err)
			}
			if got := state(t, inner); got != before {
				t.Errorf("released:\n%s\nwant\n%s", got, before)
			}
			// n and files still have the sockets, as a keeper would.
			for _, port := range []uint16{capture.HBONEPort, capture.CallerFirstPort} {
				_, err := dial(t, outer, netip.AddrPortFrom(pod.v4, port))
				wantRefused(t, "a released port", err)
			}
			for _, file := range files {
				file.Close()
			}
		})
	}
}

// An agent for which one kind of rules works follows one for which only the other
// did.
func TestOtherRules(t *testing.T) {
	for _, backends := range [][2]string{{"iptables", "nft"}, {"nft", "iptables"}} {
		t.Run(backends[0]+" then "+backends[1], func(t *testing.T) {
			inner, _ := wired(t)
			before := state(t, inner)
			open(t, inner, backends[1]).Close()
			want := state(t, inner)
			open(t, inner, backends[0]).Close()
			n := open(t, inner, backends[1])
			if got := state(t, inner); got != want {
				t.Errorf("state:\n%s\nwant\n%s", got, want)
			}
			if err := n.Release(); err != nil {
				t.Fatal(err)
			}
			if got := state(t, inner); got != before {
				t.Errorf("released:\n%s\nwant\n%s", got, before)
			}
		})
	}
}

// While no agent runs, nothing passes.
func TestNoAgent(t *testing.T) {
	each(t, func(t *testing.T, backend, family string) {
		inner, outer := wired(t)
		app := listen(t, inner, netip.AddrPortFrom(pod.of(family), 80))
		elsewhere := listen(t, outer, netip.AddrPortFrom(service.of(family), 80))
		if err := open(t, inner, backend).Close(); err != nil {
			t.Fatalf("Close() = %v", err)
		}
		_, err := dial(t, outer, netip.AddrPortFrom(pod.of(family), 80))
		wantRefused(t, "into the pod", err)
		wantNone(t, app)
		_, err = dial(t, inner, netip.AddrPortFrom(service.of(family), 80))
		wantRefused(t, "out of the pod", err)
		wantNone(t, elsewhere)
	})
}

// What the pod sends to itself stays in the pod.
func TestPodCallsItself(t *testing.T) {
	each(t, func(t *testing.T, backend, family string) {
		inner, _ := wired(t)
		n := open(t, inner, backend)
		loopback := addresses{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}
		for _, at := range []addresses{pod, loopback} {
			to := netip.AddrPortFrom(at.of(family), 80)
			app := listen(t, inner, to)
			caller := mustDial(t, inner, to)
			talk(t, caller, accept(t, app))
			app.Close()

			_, err := dial(t, inner, to)
			wantRefused(t, "nobody listens", err)
		}
		for _, port := range []uint16{capture.OutboundPort, capture.PlaintextPort} {
			wantNone(t, n.Listener(port))
		}
	})
}

// The table of connections takes an ACK that nobody expects for a connection that is
// older than the table, and no NAT is done for it. A SYN after it is taken for a part
// of that. A reset would end it, but an ACK with a signature that nobody asked for (RFC
// 2385) is answered by none.
func TestSYNAfterACK(t *testing.T) {
	each(t, func(t *testing.T, backend, family string) {
		inner, outer := wired(t)
		n := open(t, inner, backend)
		to := netip.AddrPortFrom(pod.of(family), 80)
		app := listen(t, inner, to)
		from := netip.AddrPortFrom(peer.of(family), 40000)
		sendACK(t, outer, from, to)
		waitFor(t, func() error {
			if known := script(t, inner, "cat /proc/net/nf_conntrack"); !strings.Contains(known, "sport=40000 dport=80") {
				return fmt.Errorf("the table of connections has\n%s", known)
			}
			return nil
		})
		_, err := dialWith(t, outer, net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(from)}, to)
		wantRefused(t, "the caller", err)
		wantNone(t, app)
		wantNone(t, n.Listener(capture.PlaintextPort))

		// The same on the way out.
		from, to = netip.AddrPortFrom(pod.of(family), 41000), netip.AddrPortFrom(service.of(family), 80)
		elsewhere := listen(t, outer, to)
		sendACK(t, inner, from, to)
		waitFor(t, func() error {
			if known := script(t, inner, "cat /proc/net/nf_conntrack"); !strings.Contains(known, "sport=41000 dport=80") {
				return fmt.Errorf("the table of connections has\n%s", known)
			}
			return nil
		})
		_, err = dialWith(t, inner, net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(from)}, to)
		wantRefused(t, "the application", err)
		wantNone(t, elsewhere)
		wantNone(t, n.Listener(capture.OutboundPort))
	})
}

// sendACK sends a segment that belongs to no connection, and that is not answered.
func sendACK(tb testing.TB, ns *os.File, from, to netip.AddrPort) {
	tb.Helper()
	segment := make([]byte, 40)
	binary.BigEndian.PutUint16(segment[0:], from.Port())
	binary.BigEndian.PutUint16(segment[2:], to.Port())
	binary.BigEndian.PutUint32(segment[4:], 1000)
	binary.BigEndian.PutUint32(segment[8:], 2000)
	segment[12], segment[13] = 10<<4, 0x10 // ACK
	binary.BigEndian.PutUint16(segment[14:], 1000)
	segment[20], segment[21] = 19, 18 // an MD5 signature
	// RFC 9293, section 3.1: of the addresses, the protocol, the length and all of
	// the segment.
	var sum uint32
	counted := slices.Concat(from.Addr().AsSlice(), to.Addr().AsSlice(), []byte{0, 6, 0, 40}, segment)
	for i := 0; i < len(counted); i += 2 {
		sum += uint32(counted[i])<<8 | uint32(counted[i+1])
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(segment[16:], ^uint16(sum))
	in(tb, ns, func() error {
		network := "ip4:tcp"
		if to.Addr().Is6() {
			network = "ip6:tcp"
		}
		conn, err := net.DialIP(network, &net.IPAddr{IP: from.Addr().AsSlice()}, &net.IPAddr{IP: to.Addr().AsSlice()})
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = conn.Write(segment)
		return err
	})
}

// Marks are believed of nobody but the pod's own sockets.
func TestMarks(t *testing.T) {
	each(t, func(t *testing.T, backend, family string) {
		inner, outer := wired(t)
		n := open(t, inner, backend)
		to := netip.AddrPortFrom(pod.of(family), 80)
		app := listen(t, inner, to)

		for _, mark := range []int{capture.SocketMark, capture.ReplyMark} {
			// A plugin that hands packets from one namespace to the other by eBPF may
			// forget to take the mark off.
			script(t, inner, fmt.Sprintf(`
				nft add table inet leak
				nft 'add chain inet leak in { type filter hook prerouting priority -350; }'
				nft add rule inet leak in iifname eth0 meta mark set %#x
				nft 'add chain inet leak believed { type filter hook prerouting priority -290; }'
				nft add rule inet leak believed iifname eth0 meta mark != 0 counter`, mark))
			caller := mustDial(t, outer, to)
			talk(t, caller, accept(t, n.Listener(capture.PlaintextPort)))
			wantNone(t, app)
			if seen := script(t, inner, "nft list chain inet leak believed"); !strings.Contains(seen, "packets 0") {
				t.Errorf("the mark %#x was believed:\n%s", mark, seen)
			}
			script(t, inner, "nft delete table inet leak")
		}

		// Who may set a mark gets out, and nowhere else.
		set := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
			var err error
			return errors.Join(raw.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, capture.SocketMark)
			}), err)
		}}
		out := netip.AddrPortFrom(service.of(family), 80)
		elsewhere := listen(t, outer, out)
		caller, err := dialWith(t, inner, set, out)
		if err != nil {
			t.Fatal(err)
		}
		talk(t, caller, accept(t, elsewhere))
		caller, err = dialWith(t, outer, set, to)
		if err != nil {
			t.Fatal(err)
		}
		talk(t, caller, accept(t, n.Listener(capture.PlaintextPort)))
	})
}

// The agent's connection to an application may take the very port that the caller
// has whose address it wears.
func TestCallersOwnPort(t *testing.T) {
	each(t, func(t *testing.T, backend, family string) {
		inner, outer := wired(t)
		n := open(t, inner, backend)
		to := netip.AddrPortFrom(pod.of(family), 80)
		app := listen(t, inner, to)
		from := netip.AddrPortFrom(peer.of(family), 45000)
		caller, err := dialWith(t, outer, net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(from)}, to)
		if err != nil {
			t.Fatal(err)
		}
		captured := accept(t, n.Listener(capture.PlaintextPort))
		talk(t, caller, captured)

		script(t, inner, "sysctl -qw net.ipv4.ip_local_port_range='45000 45000'")
		conn, err := n.DialFrom(context10(t), from.Addr(), to)
		if err != nil {
			t.Fatalf("DialFrom() = %v", err)
		}
		defer conn.Close()
		served := accept(t, app)
		if got := remote(served); got != from {
			t.Errorf("the application's caller is %s, want %s", got, from)
		}
		talk(t, conn, served)
		talk(t, caller, captured)
	})
}

// Connections that were open before go on, until they are told not to.
func TestOlderConnections(t *testing.T) {
	each(t, func(t *testing.T, backend, family string) {
		inner, outer := wired(t)
		// Listens for both families, as applications do.
		any := netip.AddrPortFrom(netip.IPv6Unspecified(), 80)
		app, elsewhere := listen(t, inner, any), listen(t, outer, any)
		to := netip.AddrPortFrom(pod.of(family), 80)
		in := mustDial(t, outer, to)
		inServed := accept(t, app)
		out := mustDial(t, inner, netip.AddrPortFrom(service.of(family), 80))
		outServed := accept(t, elsewhere)
		self := mustDial(t, inner, to)
		selfServed := accept(t, app)

		n := open(t, inner, backend)
		talk(t, in, inServed)
		talk(t, out, outServed)
		talk(t, self, selfServed)
		conn, err := n.DialFrom(context10(t), peer.of(family), to)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		served := accept(t, app)

		if reset, err := n.ResetOlder(); reset != 1 || err != nil {
			t.Errorf("ResetOlder() = %d, %v, want 1", reset, err)
		}
		in.SetReadDeadline(time.Now().Add(patience))
		if _, err := in.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("Read() = %v, want %v", err, syscall.ECONNRESET)
		}
		if _, err := inServed.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNABORTED) {
			t.Errorf("Read() = %v, want %v", err, syscall.ECONNABORTED)
		}
		talk(t, out, outServed)
		talk(t, self, selfServed)
		talk(t, conn, served)
		if reset, err := n.ResetOlder(); reset != 0 || err != nil {
			t.Errorf("ResetOlder() = %d, %v, want 0", reset, err)
		}
	})
}

func TestUDP(t *testing.T) {
	each(t, func(t *testing.T, backend, family string) {
		inner, outer := wired(t)
		open(t, inner, backend)
		for _, way := range []struct {
			from, to *os.File
			address  netip.Addr
		}{{inner, outer, service.of(family)}, {outer, inner, pod.of(family)}} {
			address := net.UDPAddrFromAddrPort(netip.AddrPortFrom(way.address, 53))
			var server, client *net.UDPConn
			in(t, way.to, func() (err error) {
				server, err = net.ListenUDP("udp", address)
				return err
			})
			defer server.Close()
			in(t, way.from, func() (err error) {
				client, err = net.DialUDP("udp", nil, address)
				return err
			})
			defer client.Close()
			if _, err := client.Write([]byte("troth")); err != nil {
				t.Fatal(err)
			}
			server.SetDeadline(time.Now().Add(patience))
			if _, err := server.Read(make([]byte, 10)); err != nil {
				t.Errorf("Read() = %v", err)
			}
		}
	})
}

// The pod has no IPv6, and the container runtime has not taken the loopback up yet.
func TestBarePod(t *testing.T) {
	for _, backend := range []string{"nft", "iptables"} {
		t.Run(backend, func(t *testing.T) {
			inner, outer := wired(t)
			script(t, inner, "sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1; ip link set lo down")
			n := open(t, inner, backend)
			if err := n.Check(); err != nil {
				t.Errorf("Check() = %v", err)
			}
			to := netip.AddrPortFrom(pod.v4, 80)
			app := listen(t, inner, to)
			caller := mustDial(t, outer, to)
			talk(t, caller, accept(t, n.Listener(capture.PlaintextPort)))
			conn, err := n.DialFrom(context10(t), peer.v4, to)
			if err != nil {
				t.Fatalf("DialFrom() = %v", err)
			}
			defer conn.Close()
			talk(t, conn, accept(t, app))
			out := mustDial(t, inner, netip.AddrPortFrom(service.v4, 80))
			talk(t, out, accept(t, n.Listener(capture.OutboundPort)))
			if err := n.Release(); err != nil {
				t.Errorf("Release() = %v", err)
			}
		})
	}
}

func TestCheck(t *testing.T) {
	for _, test := range []struct{ backend, damage string }{
		{"nft", "nft delete table inet troth"},
		{"nft", "nft flush table inet troth"},
		{"nft", "nft flush chain inet troth zone"},
		{"nft", "nft flush chain inet troth guard_in"},
		{"nft", "nft insert rule inet troth inbound accept"},
		{"nft", "nft 'add chain inet troth more { type nat hook prerouting priority -150; }'"},
		{"nft", "ip rule del pref 10"},
		{"nft", "ip -6 rule del pref 10"},
		{"nft", "ip route flush table 29703"},
		{"nft", "ip -6 route flush table 29703"},
		{"nft", "ip link set lo down"},
		{"iptables", "iptables-legacy -t nat -F"},
		{"iptables", "ip6tables-legacy -t nat -F TROTH_INBOUND"},
		{"iptables", "ip6tables-legacy -t filter -D INPUT -j TROTH_GUARD_IN"},
		{"iptables", "iptables-legacy -t nat -I TROTH_OUTBOUND -j RETURN"},
		{"iptables", "ip rule del pref 10"},
	} {
		t.Run(test.damage, func(t *testing.T) {
			inner := namespace(t)
			script(t, inner, "ip link set lo up")
			n := open(t, inner, test.backend)
			if err := n.Check(); err != nil {
				t.Fatalf("Check() = %v, want nil", err)
			}
			stands := state(t, inner)
			script(t, inner, test.damage)
			err := n.Check()
			if err == nil {
				t.Error("Check() = nil")
			}
			t.Log(err)
			files, err := n.Files()
			if err != nil {
				t.Fatal(err)
			}
			again := open(t, inner, test.backend, files...)
			for _, file := range files {
				file.Close()
			}
			if err := again.Check(); err != nil {
				t.Errorf("Check() = %v, after it was opened again", err)
			}
			if got := state(t, inner); got != stands {
				t.Errorf("mended:\n%s\nwant\n%s", got, stands)
			}
		})
	}
}

func TestOpenFails(t *testing.T) {
	inner, _ := wired(t)
	n := open(t, inner, "nft")
	want := "capture: port 15001 is taken, by another agent or by the pod: address already in use"
	if _, err := capture.Open(inner, nil); err == nil || err.Error() != want {
		t.Errorf("Open() = %v, want %q", err, want)
	}
	other := namespace(t)
	files, err := n.Files()
	if err != nil {
		t.Fatal(err)
	}
	// The sockets of another namespace are not taken.
	script(t, other, "ip link set lo up")
	second := open(t, other, "nft", files...)
	caller := mustDial(t, other, netip.MustParseAddrPort("127.0.0.1:15008"))
	talk(t, caller, accept(t, second.Listener(capture.HBONEPort)))
	for _, file := range files {
		file.Close()
	}
	if _, err := capture.Open(temporary(t), nil); err == nil || !strings.Contains(err.Error(), "enter the network namespace") {
		t.Errorf("Open(a file) = %v", err)
	}
	if err := n.Check(); err != nil {
		t.Errorf("Check() = %v", err)
	}
	if err := n.Close(); err != nil {
		t.Errorf("Close() = %v", err)
	}
	if err := n.Close(); err != nil {
		t.Errorf("Close(), again, = %v", err)
	}
	if err := n.Check(); err == nil {
		t.Error("Check() = nil, after Close")
	}
	if _, err := n.Dial(t.Context(), netip.AddrPortFrom(service.v4, 80)); err == nil {
		t.Error("Dial() = nil, after Close")
	}
}

func TestDialFails(t *testing.T) {
	inner, outer := wired(t)
	n := open(t, inner, "nft")
	script(t, outer, `
		nft add table inet hole
		nft 'add chain inet hole in { type filter hook input priority 0; }'
		nft add rule inet hole in tcp dport 81 drop`)
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error, 1)
	go func() {
		_, err := n.Dial(ctx, netip.AddrPortFrom(service.v4, 81))
		failed <- err
	}()
	waitFor(t, func() error {
		if sent := script(t, inner, "ss -Hnt state syn-sent"); sent == "" {
			return errors.New("nothing was sent")
		}
		return nil
	})
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) && !strings.Contains(fmt.Sprint(err), "operation was canceled") {
		t.Errorf("Dial() = %v, want the end of its context", err)
	}

	to := netip.AddrPortFrom(pod.v4, 80)
	_, err := n.DialFrom(t.Context(), peer.v4, to)
	wantRefused(t, "nobody listens", err)
	for _, test := range []struct {
		from string
		to   netip.AddrPort
	}{
		{"10.74.0.1", netip.AddrPort{}},
		{"10.74.0.1", netip.AddrPortFrom(pod.v4, 0)},
		{"0.0.0.0", to},
		{"224.0.0.1", to},
		{"127.0.0.1", to},
		{"fd74::1", to},
		{"10.74.0.1", netip.AddrPortFrom(pod.v6, 80)},
	} {
		if _, err := n.DialFrom(t.Context(), netip.MustParseAddr(test.from), test.to); err == nil {
			t.Errorf("DialFrom(%s, %s) = nil", test.from, test.to)
		}
	}
	if _, err := n.DialFrom(t.Context(), netip.Addr{}, to); err == nil {
		t.Error("DialFrom(nobody) = nil")
	}

	// The only port that the kernel may choose is the one that is called.
	script(t, inner, "sysctl -qw net.ipv4.ip_local_port_range='45000 45000'")
	_, err = n.Dial(t.Context(), netip.AddrPortFrom(pod.v4, 45000))
	if want := "nobody listens on 10.74.0.2:45000"; err == nil || !strings.HasSuffix(err.Error(), want) {
		t.Errorf("Dial(itself) = %v, want %q", err, want)
	}
}

// A thread that was in a pod is back when it does something else.
func TestThreadsGoHome(t *testing.T) {
	inner, _ := wired(t)
	n := open(t, inner, "nft")
	to := netip.AddrPortFrom(pod.v4, 80)
	app := listen(t, inner, to)
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			for range 20 {
				conn, err := n.DialFrom(context10(t), peer.v4, to)
				if err != nil {
					t.Errorf("DialFrom() = %v", err)
					return
				}
				conn.Close()
			}
		})
	}
	for range 400 {
		accept(t, app).Close()
	}
	all.Wait()
	home, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	threads, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil || len(threads) == 0 {
		t.Fatal(threads, err)
	}
	for _, thread := range threads {
		at, err := os.Readlink(thread)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it has ended
		}
		if err != nil || at != home {
			t.Errorf("%s is in %s, %v, want %s", thread, at, err, home)
		}
	}
}

// A node has up to 250 pods.
func TestManyNamespaces(t *testing.T) {
	const pods = 250
	open(t, namespace(t), "nft").Close() // the runtime opens files of its own for the first
	before := openFiles(t)
	all := make([]*os.File, pods)
	var making errgroup.Group
	making.SetLimit(16)
	for i := range all {
		making.Go(func() (err error) {
			all[i], err = makeNamespace()
			return err
		})
	}
	if err := making.Wait(); err != nil {
		t.Fatal(err)
	}
	began, descriptors := time.Now(), openFiles(t)
	networks := make([]*capture.Network, pods)
	var opening errgroup.Group
	opening.SetLimit(16) // most of the time, the kernel waits for its own readers
	for i, ns := range all {
		opening.Go(func() (err error) {
			networks[i], err = capture.Open(ns, nil)
			return err
		})
	}
	if err := opening.Wait(); err != nil {
		t.Fatal(err)
	}
	opened := time.Since(began)
	each := (openFiles(t) - descriptors) / pods
	if each > 5 {
		t.Errorf("a pod takes %d descriptors, want 5: its namespace and four sockets", each)
	}
	began = time.Now()
	for _, n := range networks {
		if err := n.Check(); err != nil {
			t.Fatal(err)
		}
	}
	checked := time.Since(began)
	began = time.Now()
	var releasing errgroup.Group
	releasing.SetLimit(16)
	for _, n := range networks {
		releasing.Go(n.Release)
	}
	if err := releasing.Wait(); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d pods: opened in %v, checked in %v, released in %v; %d descriptors each",
		pods, opened, checked, time.Since(began), each)
	for _, ns := range all {
		ns.Close()
	}
	if after := openFiles(t); after > before {
		t.Errorf("%d descriptors are open, %d were before", after, before)
	}
}

// fallbackHelper captures the namespace where the kernel refuses nftables, and has
// the socket that would ask for them.
func fallbackHelper() {
	err := func() error {
		if err := refuseNetfilter(); err != nil {
			return err
		}
		if len(os.Args) > 1 {
			os.Setenv("PATH", os.Args[1])
		}
		n, err := capture.Open(os.NewFile(3, "namespace"), nil)
		if err != nil {
			return err
		}
		if err := n.Check(); err != nil {
			return err
		}
		fmt.Println("captured")
		os.Stdin.Read(make([]byte, 1))
		return n.Release()
	}()
	fmt.Println(err)
}

// refuseNetfilter has the kernel refuse the sockets of NETLINK_NETFILTER, to every
// thread of this process, as one does that was built without.
func refuseNetfilter() error {
	const protocolOffset = 16 + 2*8 // of struct seccomp_data: the third argument
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // the system call's number
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_SOCKET, Jf: 5},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 16}, // the first argument
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.AF_NETLINK, Jf: 3},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: protocolOffset},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.NETLINK_NETFILTER, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPROTONOSUPPORT)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC,
		uintptr(unsafe.Pointer(&program)))
	runtime.KeepAlive(filter)
	if errno != 0 {
		return errno
	}
	return nil
}

// A kernel without nftables has iptables.
func TestFallback(t *testing.T) {
	inner, outer := wired(t)
	before := state(t, inner)
	child := start(t, "fallback", inner)
	if line := child.line(t); line != "captured" {
		t.Fatalf("helper: %s", line)
	}
	to := netip.AddrPortFrom(pod.v4, 80)
	app := listen(t, inner, to)
	mustDial(t, outer, to)
	wantNone(t, app)
	if rules := state(t, inner); !strings.Contains(rules, "TROTH_INBOUND") || strings.Contains(rules, "table inet troth") {
		t.Errorf("the rules are\n%s", rules)
	}
	child.stdin.Close()
	if line := child.line(t); line != "<nil>" {
		t.Errorf("Release() = %s", line)
	}
	if got := state(t, inner); got != before {
		t.Errorf("released:\n%s\nwant\n%s", got, before)
	}
}

// Where neither works, nothing is left behind.
func TestNoRules(t *testing.T) {
	inner, outer := wired(t)
	before := state(t, inner)
	line := start(t, "fallback", inner, t.TempDir()).line(t)
	if !strings.HasPrefix(line, "capture: set rules by nftables: ") {
		t.Errorf("Open() = %s", line)
	}
	if got := state(t, inner); got != before {
		t.Errorf("state:\n%s\nwant\n%s", got, before)
	}
	to := netip.AddrPortFrom(pod.v4, 80)
	app := listen(t, inner, to)
	talk(t, mustDial(t, outer, to), accept(t, app))

	n := open(t, inner, "nft")
	files, err := n.Files()
	if err != nil {
		t.Fatal(err)
	}
	n.Close()
	for _, file := range files {
		file.Close()
	}
	stands := state(t, inner)
	start(t, "fallback", inner, t.TempDir()).line(t)
	if got := state(t, inner); got != stands {
		t.Errorf("a pod that was captured:\n%s\nwant\n%s", got, stands)
	}
}

func BenchmarkDial(b *testing.B) {
	inner, _ := wired(b)
	n := open(b, inner, "nft")
	to := netip.AddrPortFrom(pod.v4, 80)
	app := listen(b, inner, to)
	go func() {
		for {
			conn, err := app.AcceptTCP()
			if err != nil {
				return
			}
			go func() {
				conn.Read(make([]byte, 1)) // until the other end resets it: no port is taken for long
				conn.Close()
			}()
		}
	}()
	dials := func(b *testing.B, dial func() (*net.TCPConn, error)) {
		for b.Loop() {
			conn, err := dial()
			if err != nil {
				b.Fatal(err)
			}
			conn.SetLinger(0)
			conn.Close()
		}
	}
	b.Run("Dial", func(b *testing.B) {
		dials(b, func() (*net.TCPConn, error) { return n.Dial(b.Context(), to) })
	})
	b.Run("DialFrom", func(b *testing.B) {
		dials(b, func() (*net.TCPConn, error) { return n.DialFrom(b.Context(), peer.v4, to) })
	})
	// What it would cost without a namespace to go to.
	b.Run("net", func(b *testing.B) {
		in(b, inner, func() error {
			dials(b, func() (*net.TCPConn, error) {
				return new(net.Dialer).DialTCP(b.Context(), "tcp4", netip.AddrPort{}, to)
			})
			return nil
		})
	})
	b.Run("inside", func(b *testing.B) {
		for b.Loop() {
			in(b, inner, func() error { return nil })
		}
	})
}
