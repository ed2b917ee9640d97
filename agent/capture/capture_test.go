//go:build linux

package capture_test

import (
	"errors"
	"net/netip"
	"testing"

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
		for port := uint16(15000); port < 15010; port++ {
			wantRefused := port == capture.OutboundPort || port == capture.PlaintextPort ||
				port == capture.HBONEPort || port == capture.CallerFirstPort
			if !wantRefused {
				continue
			}
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
			inner, _ := wired(t)
			before := state(t, inner)
			n := open(t, inner, backend)
			once := state(t, inner)
			files, err := n.Files()
			if err != nil {
				t.Fatal(err)
			}
			again := open(t, inner, backend, files...)
			for _, file := range files {
				file.Close()
			}
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
		})
	}
}
