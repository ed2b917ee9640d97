package proxy_test

import (
	"io"
	"log/slog"
	"net"
	"net/netip"
	"testing"

	"troth.dev/troth/agent/proxy"
	"troth.dev/troth/handshake"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/policy"
)

// outWays are the ways out of a pod: through the whole of the product in either order,
// which is an Outbound, a warm tunnel and an Inbound, in plaintext through an Outbound,
// and beneath them two bare relays, which is the least that must be done.
var outWays = []struct {
	name  string
	front func(b *testing.B, app net.Addr) string
}{
	{"troth", func(b *testing.B, app net.Addr) string { return outboundTo(b, app, proxy.Troth) }},
	{"hbone", func(b *testing.B, app net.Addr) string { return outboundTo(b, app, proxy.HBONE) }},
	{"plaintext", func(b *testing.B, app net.Addr) string { return outboundTo(b, app, proxy.Plaintext) }},
	{"floor", func(b *testing.B, app net.Addr) string {
		second := bareRelay(b, app)
		l, err := net.ResolveTCPAddr("tcp", second)
		if err != nil {
			b.Fatal(err)
		}
		return bareRelay(b, l)
	}},
}

func outboundTo(b *testing.B, app net.Addr, protocol proxy.Protocol) string {
	ca := newAuthority(b)
	n := newNode(b, proxy.PoolConfig{})
	quiet := slog.New(slog.DiscardHandler)
	order, port := handshake.CallerFirst, uint16(15009)
	if protocol == proxy.HBONE {
		order, port = handshake.Standard, 15008
	}
	peer := newTunnelled(b, order, latest.New(ca.identity(b, stock)), proxy.InboundConfig{
		Log: quiet, Policy: latest.New(inForce(policy.Strict)),
	})
	n.at(netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port), peer.front)
	n.directory.set(app.String(), podAt(app.String(), protocol))
	return n.newSender(b, ca.identity(b, cart), app.String(), proxy.OutboundConfig{Log: quiet}).front
}

// BenchmarkOutboundConnection is a connection over a warm tunnel, a byte there and
// back, and its end.
func BenchmarkOutboundConnection(b *testing.B) {
	for _, way := range outWays {
		b.Run(way.name, func(b *testing.B) {
			app := listen(b)
			go serveOneByte(app)
			front := way.front(b, app.Addr())
			b.ReportAllocs()
			for b.Loop() {
				c, err := dialFrom(front, netip.IPv4Unspecified())
				if err != nil {
					b.Fatal(err)
				}
				if _, err := c.Write([]byte{1}); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadAll(c); err != nil {
					b.Fatal(err)
				}
				c.Close()
			}
		})
	}
}

func serveOneByte(app *net.TCPListener) {
	for {
		c, err := app.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			var one [1]byte
			if _, err := io.ReadFull(c, one[:]); err == nil {
				c.Write(one[:])
			}
		}()
	}
}

// BenchmarkOutboundRequest is a request of 128 bytes and an answer of 1024 on a
// connection that is open.
func BenchmarkOutboundRequest(b *testing.B) {
	for _, way := range outWays {
		b.Run(way.name, func(b *testing.B) {
			app := listen(b)
			caller, err := dialFrom(way.front(b, app.Addr()), client)
			if err != nil {
				b.Fatal(err)
			}
			defer caller.Close()
			callee, err := app.AcceptTCP()
			if err != nil {
				b.Fatal(err)
			}
			defer callee.Close()
			go func() {
				request, answer := make([]byte, 128), make([]byte, 1024)
				for {
					if _, err := io.ReadFull(callee, request); err != nil {
						return
					}
					if _, err := callee.Write(answer); err != nil {
						return
					}
				}
			}()
			request, answer := make([]byte, 128), make([]byte, 1024)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := caller.Write(request); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(caller, answer); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkChoose chooses among the endpoints of a large Service.
func BenchmarkChoose(b *testing.B) {
	balancer, d := proxy.NewBalancer(100), serviceOf(1000, 0)
	b.ReportAllocs()
	for b.Loop() {
		_, release, _ := balancer.Choose(podUID, d, 80)
		release()
	}
}
