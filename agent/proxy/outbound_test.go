package proxy_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/agent/hbone"
	"troth.dev/troth/agent/proxy"
	"troth.dev/troth/handshake"
	"troth.dev/troth/policy"
)

// protocolIn is the protocol of tunnels in an order.
func protocolIn(order handshake.Order) proxy.Protocol {
	if order == handshake.CallerFirst {
		return proxy.Troth
	}
	return proxy.HBONE
}

func TestOutboundPasses(t *testing.T) {
	ca := newAuthority(t)
	for _, tt := range []struct {
		name     string
		protocol proxy.Protocol
		service  bool
	}{
		{"caller-first", proxy.Troth, false}, {"standard", proxy.HBONE, false}, {"plaintext", proxy.Plaintext, false},
		{"a Service, caller-first", proxy.Troth, true}, {"a Service, plaintext", proxy.Plaintext, true},
		{"nobody whom the directory knows", 0, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t, proxy.PoolConfig{})
			app := listen(t)
			address := app.Addr().String()
			first := n.serveTunnels(t, "127.0.0.1", handshake.CallerFirst, ca.identity(t, stock), passOn)
			standard := n.serveTunnels(t, "127.0.0.1", handshake.Standard, ca.identity(t, stock), passOn)
			known := podAt(address, tt.protocol)
			want := sent{PeerPod: "shop/" + address}
			want.Reason, want.Protocol = "MTLS_SENT", tt.protocol.String()
			if tt.protocol == proxy.Plaintext {
				want.Reason = "PLAINTEXT_SENT"
			} else {
				want.Peer = stock.String()
			}
			if tt.protocol == 0 {
				known.Endpoints[0] = proxy.Endpoint{Address: netip.MustParseAddrPort(address), Protocol: proxy.Plaintext}
				want.Reason, want.Protocol, want.PeerPod, want.Peer = "PLAINTEXT_SENT", "plaintext", "", ""
			}
			goes := address
			if tt.service {
				goes, known.Service = "10.1.0.1:80", "shop/stock"
				want.Service, want.Endpoint = "shop/stock", address
			}
			n.directory.set(goes, known)
			p := n.newSender(t, ca.identity(t, cart), goes, proxy.OutboundConfig{})

			e := p.through(t, app)
			if got := p.outbound.Connections(); len(got) != 1 || got[0].Reason != string(want.Reason) || got[0].Peer != want.Peer {
				t.Errorf("the open connections are %+v", got)
			}
			// A half-close, and more of the answer after it.
			if err := e.caller.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(e.app); len(got) > 0 || err != nil {
				t.Fatalf("the application reads %q, %v", got, err)
			}
			e.app.Write([]byte("after the end"))
			e.app.Close()
			if got, err := io.ReadAll(e.caller); string(got) != "after the end" || err != nil {
				t.Fatalf("the caller reads %q, %v", got, err)
			}
			got := p.next(t, want.Reason)
			if got.Protocol != want.Protocol || got.Peer != want.Peer || got.PeerPod != want.PeerPod ||
				got.Service != want.Service || got.Endpoint != want.Endpoint || got.Direction != "outbound" || got.Pod != podUID ||
				got.Message != "connection ended" || got.Level != "INFO" ||
				got.In != 17 || got.Out != 4 || got.Source != e.caller.LocalAddr().String() || got.Destination != goes || got.Err != "" {
				t.Errorf("the line is %+v", got)
			}

			// Another goes the same way, over the tunnel that is there; an application
			// that resets is a reset.
			e = p.through(t, app)
			e.app.SetLinger(0)
			e.app.Close()
			assertReset(t, "the caller", e.caller)
			p.next(t, "CONNECTION_BROKEN")
			e = p.through(t, app)
			e.caller.SetLinger(0)
			e.caller.Close()
			assertReset(t, "the application", e.app)
			p.next(t, "CONNECTION_BROKEN")

			wantFirst, wantStandard := int64(0), int64(0)
			switch tt.protocol {
			case proxy.Troth:
				wantFirst = 1
			case proxy.HBONE:
				wantStandard = 1
			}
			if first.handshakes.Load() != wantFirst || standard.handshakes.Load() != wantStandard {
				t.Errorf("%d caller-first and %d standard handshakes", first.handshakes.Load(), standard.handshakes.Load())
			}
			p.stop()
			if got := n.metricWith(t, "connections_open") + n.metricWith(t, "tunnels_open"); got != 0 {
				t.Errorf("%v connections and tunnels are open", got)
			}
			if got := n.metricWith(t, "connections_total", "outbound", want.Protocol, string(want.Reason)); got != 1 {
				t.Errorf("%v connections are counted", got)
			}
		})
	}
}

func TestOutboundRefuses(t *testing.T) {
	ca, foreign := newAuthority(t), newAuthority(t)
	valid := ca.identity(t, cart)
	expired := proxy.Identity{SVID: ca.svid(t, cart, -time.Second), Bundles: valid.Bundles}
	nowhere := func(tb testing.TB) string { // a port that nobody listens at
		l := listen(tb)
		l.Close()
		return l.Addr().String()
	}
	const target = "10.0.0.7:8080"
	for _, tt := range []struct {
		name     string
		identity proxy.Identity
		config   proxy.OutboundConfig
		goes     string
		known    *proxy.Destination
		serve    func(t *testing.T, n *node) *callee
		want     policy.Reason
		code     handshake.Code
		err      string
	}{
		{name: "no original destination", identity: valid, config: proxy.OutboundConfig{
			Destination: func(net.Conn) (netip.AddrPort, error) { return netip.AddrPort{}, errors.New("not captured") },
		}, want: "DESTINATION_UNKNOWN", err: "not captured"},
		{name: "no port", identity: valid, goes: "10.0.0.7:0", want: "DESTINATION_UNKNOWN", err: "10.0.0.7:0 is no destination"},
		{name: "the directory does not know", identity: valid, goes: target, want: "DESTINATION_UNKNOWN", err: "nobody has said who that is"},
		{name: "the proxy itself", identity: valid, config: proxy.OutboundConfig{
			Destination: func(c net.Conn) (netip.AddrPort, error) { return c.LocalAddr().(*net.TCPAddr).AddrPort(), nil },
		}, want: "DESTINATION_REFUSED", err: "it was meant for the proxy"},
		{name: "a port of the proxy at an address of the pod", identity: valid, goes: "127.0.0.1:15008", want: "DESTINATION_REFUSED"},
		{name: "a port of the proxy, mapped", identity: valid, goes: "[::ffff:127.0.0.1]:15006", want: "DESTINATION_REFUSED"},
		{name: "a port of the proxy at an endpoint here", identity: valid, goes: "10.1.0.1:80",
			known: &proxy.Destination{Service: "shop/loop", Endpoints: []proxy.Endpoint{endpointAt("127.0.0.1:15001", proxy.Plaintext)}}, want: "DESTINATION_REFUSED"},
		{name: "nobody is known there, and that is refused", identity: valid, goes: target, config: proxy.OutboundConfig{RefuseUnknown: true},
			known: &proxy.Destination{Endpoints: []proxy.Endpoint{{Address: netip.MustParseAddrPort(target), Protocol: proxy.Plaintext}}}, want: "EGRESS_REFUSED"},
		{name: "a Service without endpoints", identity: valid, goes: target, known: &proxy.Destination{Service: "shop/stock"}, want: "NO_ENDPOINT"},
		{name: "nothing is behind it", identity: valid, goes: target, known: &proxy.Destination{}, want: "NO_ENDPOINT"},
		{name: "the zero protocol", identity: valid, goes: target, known: new(podAt(target, 0)), want: "PROTOCOL_UNKNOWN"},
		{name: "a protocol that nobody knows", identity: valid, goes: target, known: new(podAt(target, 4)), want: "PROTOCOL_UNKNOWN"},
		{name: "nobody to be expected", identity: valid, goes: target, known: &proxy.Destination{
			Endpoints: []proxy.Endpoint{{Address: netip.MustParseAddrPort(target), Protocol: proxy.Troth}},
		}, want: "PROTOCOL_UNKNOWN"},
		{name: "no SVID", goes: target, known: new(podAt(target, proxy.Troth)), want: "IDENTITY_MISSING"},
		{name: "no bundles", identity: proxy.Identity{SVID: valid.SVID}, goes: target, known: new(podAt(target, proxy.HBONE)), want: "IDENTITY_MISSING"},
		{name: "an SVID that has expired", identity: expired, goes: target, known: new(podAt(target, proxy.Troth)), serve: func(t *testing.T, n *node) *callee {
			return n.serveTunnels(t, "10.0.0.7", handshake.CallerFirst, ca.identity(t, stock), passOn)
		}, want: "HANDSHAKE_FAILED", code: handshake.OwnSVIDExpired},
		{name: "nobody listens, plaintext", identity: valid, goes: nowhere(t), want: "DIAL_FAILED", err: "connection refused"},
		{name: "nobody listens, caller-first", identity: valid, goes: target, known: new(podAt(target, proxy.Troth)), serve: func(t *testing.T, n *node) *callee {
			n.at(netip.MustParseAddrPort("10.0.0.7:15009"), nowhere(t))
			return nil
		}, want: "DIAL_FAILED", err: "connection refused"},
		{name: "another peer, caller-first", identity: valid, goes: target, known: new(podAt(target, proxy.Troth)), serve: func(t *testing.T, n *node) *callee {
			return n.serveTunnels(t, "10.0.0.7", handshake.CallerFirst, ca.identity(t, web), passOn)
		}, want: "HANDSHAKE_FAILED", code: handshake.PeerUnexpected, err: web.String()},
		{name: "another peer, standard", identity: valid, goes: target, known: new(podAt(target, proxy.HBONE)), serve: func(t *testing.T, n *node) *callee {
			return n.serveTunnels(t, "10.0.0.7", handshake.Standard, ca.identity(t, web), passOn)
		}, want: "HANDSHAKE_FAILED", code: handshake.PeerUnexpected},
		{name: "a peer of another authority", identity: valid, goes: target, known: new(podAt(target, proxy.HBONE)), serve: func(t *testing.T, n *node) *callee {
			return n.serveTunnels(t, "10.0.0.7", handshake.Standard, foreign.identity(t, stock), passOn)
		}, want: "HANDSHAKE_FAILED", code: handshake.CertificateUntrusted},
		{name: "a peer that refuses us, standard", identity: valid, goes: target, known: new(podAt(target, proxy.HBONE)), serve: func(t *testing.T, n *node) *callee {
			c := &callee{address: netip.MustParseAddr("10.0.0.7"), order: handshake.Standard, identity: newLatest(ca.identity(t, stock))}
			return n.serveCallee(t, c, func(spiffeid.ID) error { return errors.New("not you") }, passOn)
		}, want: "HANDSHAKE_FAILED", code: handshake.PeerRefused},
		{name: "a peer that refuses us, caller-first", identity: valid, goes: target, known: new(podAt(target, proxy.Troth)), serve: func(t *testing.T, n *node) *callee {
			c := &callee{address: netip.MustParseAddr("10.0.0.7"), order: handshake.CallerFirst, identity: newLatest(ca.identity(t, stock))}
			return n.serveCallee(t, c, func(spiffeid.ID) error { return errors.New("not you") }, passOn)
		}, want: "HANDSHAKE_FAILED", code: handshake.PeerRefused},
		{name: "a peer in the other order", identity: valid, goes: target, known: new(podAt(target, proxy.HBONE)), serve: func(t *testing.T, n *node) *callee {
			c := n.serveTunnels(t, "10.0.0.7", handshake.CallerFirst, ca.identity(t, stock), passOn)
			n.mu.Lock()
			n.ports[netip.MustParseAddrPort("10.0.0.7:15008")] = n.ports[netip.MustParseAddrPort("10.0.0.7:15009")]
			n.mu.Unlock()
			return c
		}, want: "HANDSHAKE_FAILED", code: handshake.ProtocolError},
		{name: "401", identity: valid, goes: target, known: new(podAt(target, proxy.Troth)), serve: func(t *testing.T, n *node) *callee {
			return n.serveTunnels(t, "10.0.0.7", handshake.CallerFirst, ca.identity(t, stock), refuseWith(401))
		}, want: "POLICY_DENIED_BY_PEER", err: "hbone: the peer answered 401"},
		{name: "400", identity: valid, goes: target, known: new(podAt(target, proxy.Troth)), serve: func(t *testing.T, n *node) *callee {
			return n.serveTunnels(t, "10.0.0.7", handshake.CallerFirst, ca.identity(t, stock), refuseWith(400))
		}, want: "REFUSED_BY_PEER", err: "hbone: the peer answered 400"},
		{name: "503", identity: valid, goes: target, known: new(podAt(target, proxy.HBONE)), serve: func(t *testing.T, n *node) *callee {
			return n.serveTunnels(t, "10.0.0.7", handshake.Standard, ca.identity(t, stock), refuseWith(503))
		}, want: "PEER_UNAVAILABLE", err: "hbone: the peer answered 503"},
		{name: "a peer that ends the tunnel in the middle", identity: valid, goes: target, known: new(podAt(target, proxy.Troth)), serve: func(t *testing.T, n *node) *callee {
			return n.serveTunnels(t, "10.0.0.7", handshake.CallerFirst, ca.identity(t, stock), func(c *callee, _ *hbone.Request) {
				c.mu.Lock()
				defer c.mu.Unlock()
				c.open[0].NetConn().Close()
			})
		}, want: "TUNNEL_BROKEN"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t, proxy.PoolConfig{})
			var peer *callee
			if tt.serve != nil {
				peer = tt.serve(t, n)
			}
			if tt.known != nil {
				n.directory.set(tt.goes, *tt.known)
			} else if tt.want == "DIAL_FAILED" {
				n.directory.set(tt.goes, podAt(tt.goes, proxy.Plaintext))
			}
			tt.config.Own = []uint16{15001, 15006, 15008, 15009}
			p := n.newSender(t, tt.identity, tt.goes, tt.config)
			got := p.assertRefused(t, tt.want)
			if !strings.Contains(got.Err, tt.err) || got.Code != string(tt.code) || got.In != 0 || got.Out != 0 {
				t.Errorf("the line is %+v, want the code %q and the error %q", got, tt.code, tt.err)
			}
			if tt.code != "" {
				if got := n.metricWith(t, "handshakes_total", "outbound", string(tt.code)); got != 1 {
					t.Errorf("%v handshakes are counted with the code", got)
				}
			}
			if peer != nil && peer.received.Load() != 0 {
				t.Errorf("the peer got %d bytes of an application", peer.received.Load())
			}
			p.stop()
			if got := n.metricWith(t, "connections_total", "outbound", string(tt.want)); got != 1 {
				t.Errorf("%v connections are counted", got)
			}
			if got := n.metricWith(t, "connections_open"); got != 0 {
				t.Errorf("%v connections are open", got)
			}
		})
	}
}

// Whoever is at the endpoint's address with an SVID that is good, but another's, gets
// not one byte, and the pod that talked at once is reset.
func TestImpersonationGetsNothing(t *testing.T) {
	ca := newAuthority(t)
	for _, order := range orders {
		t.Run(order.String(), func(t *testing.T) {
			n := newNode(t, proxy.PoolConfig{})
			impostor := n.serveTunnels(t, "10.0.0.7", order, ca.identity(t, web), passOn)
			n.directory.set("10.0.0.7:80", podAt("10.0.0.7:80", protocolIn(order)))
			p := n.newSender(t, ca.identity(t, cart), "10.0.0.7:80", proxy.OutboundConfig{})
			caller, err := dialFrom(p.front, client)
			if err == nil { // the reset may be faster than the look at the connection
				caller.Write([]byte("secret"))
				assertReset(t, "the caller", bounded(t, caller))
			} else if !errors.Is(err, syscall.ECONNRESET) {
				t.Fatal(err)
			}
			if got := p.next(t, "HANDSHAKE_FAILED"); got.Code != string(handshake.PeerUnexpected) || got.Out != 0 {
				t.Errorf("the line is %+v", got)
			}
			p.stop()
			if impostor.handshakes.Load() != 1 || impostor.requests.Load() != 0 || impostor.received.Load() != 0 {
				t.Errorf("%d handshakes, %d requests and %d bytes reached the impostor, want one handshake alone",
					impostor.handshakes.Load(), impostor.requests.Load(), impostor.received.Load())
			}
		})
	}
}

// Another endpoint is asked only if nobody can have acted on the connection, no more
// than three are, and plaintext is no way out.
func TestRetries(t *testing.T) {
	ca := newAuthority(t)
	for _, tt := range []struct {
		name  string
		bad   func(t *testing.T, n *node, address string)
		other proxy.Protocol
		want  policy.Reason
		asked int64 // the other
	}{
		{"dial failed", func(t *testing.T, n *node, address string) {
			l := listen(t)
			l.Close()
			n.at(netip.AddrPortFrom(netip.MustParseAddr(address), 15009), l.Addr().String())
		}, proxy.Troth, "MTLS_SENT", 1},
		{"handshake failed", func(t *testing.T, n *node, address string) {
			n.serveTunnels(t, address, handshake.CallerFirst, ca.identity(t, web), passOn)
		}, proxy.Troth, "MTLS_SENT", 1},
		{"503", func(t *testing.T, n *node, address string) {
			n.serveTunnels(t, address, handshake.CallerFirst, ca.identity(t, stock), refuseWith(503))
		}, proxy.Troth, "MTLS_SENT", 1},
		{"401", func(t *testing.T, n *node, address string) {
			n.serveTunnels(t, address, handshake.CallerFirst, ca.identity(t, stock), refuseWith(401))
		}, proxy.Troth, "POLICY_DENIED_BY_PEER", 0},
		{"400", func(t *testing.T, n *node, address string) {
			n.serveTunnels(t, address, handshake.CallerFirst, ca.identity(t, stock), refuseWith(400))
		}, proxy.Troth, "REFUSED_BY_PEER", 0},
		{"the tunnel breaks when the peer may have acted", func(t *testing.T, n *node, address string) {
			n.serveTunnels(t, address, handshake.CallerFirst, ca.identity(t, stock), func(c *callee, _ *hbone.Request) {
				c.mu.Lock()
				defer c.mu.Unlock()
				c.open[0].NetConn().Close()
			})
		}, proxy.Troth, "TUNNEL_BROKEN", 0},
		{"handshake failed, and the other is plaintext", func(t *testing.T, n *node, address string) {
			n.serveTunnels(t, address, handshake.CallerFirst, ca.identity(t, web), passOn)
		}, proxy.Plaintext, "HANDSHAKE_FAILED", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t, proxy.PoolConfig{})
			app := listen(t)
			good := n.serveTunnels(t, "127.0.0.1", handshake.CallerFirst, ca.identity(t, stock), passOn)
			tt.bad(t, n, "10.0.0.8")
			// An affinity makes the order certain: first to the bad endpoint alone.
			bad := endpointAt("10.0.0.8:80", proxy.Troth)
			service := proxy.Destination{Service: "shop/stock", Affinity: time.Hour, Endpoints: []proxy.Endpoint{bad}}
			n.directory.set("10.1.0.1:80", service)
			p := n.newSender(t, ca.identity(t, cart), "10.1.0.1:80", proxy.OutboundConfig{})
			if err := turnedAway(p.front, client); err != nil {
				t.Fatal(err)
			}
			<-p.lines
			service.Endpoints = append(service.Endpoints, endpointAt(app.Addr().String(), tt.other))
			n.directory.set("10.1.0.1:80", service)
			if tt.want == "MTLS_SENT" {
				p.through(t, app).finish(t)
			} else if err := turnedAway(p.front, client); err != nil {
				t.Fatal(err)
			}
			p.next(t, tt.want)
			if got := good.requests.Load(); got != tt.asked {
				t.Errorf("the other endpoint was asked %d times, want %d", got, tt.asked)
			}
			if got := n.metricWith(t, "retries_total"); int64(got) != tt.asked {
				t.Errorf("%v retries are counted, want %d", got, tt.asked)
			}
			if tt.asked == 0 {
				assertUncalled(t, app)
			}
		})
	}
	t.Run("three in all", func(t *testing.T) {
		n := newNode(t, proxy.PoolConfig{})
		service := proxy.Destination{Service: "shop/stock"}
		var callees []*callee
		for i := range 5 {
			address := fmt.Sprintf("10.0.1.%d", i)
			callees = append(callees, n.serveTunnels(t, address, handshake.CallerFirst, ca.identity(t, stock), refuseWith(503)))
			service.Endpoints = append(service.Endpoints, endpointAt(address+":80", proxy.Troth))
		}
		n.directory.set("10.1.0.1:80", service)
		p := n.newSender(t, ca.identity(t, cart), "10.1.0.1:80", proxy.OutboundConfig{})
		p.assertRefused(t, "PEER_UNAVAILABLE")
		var asked int64
		for _, c := range callees {
			if c.requests.Load() > 1 {
				t.Error("an endpoint was asked twice")
			}
			asked += c.requests.Load()
		}
		if asked != 3 {
			t.Errorf("%d endpoints were asked, want 3", asked)
		}
	})
}

func TestOutboundLimitAndStop(t *testing.T) {
	ca := newAuthority(t)
	n := newNode(t, proxy.PoolConfig{})
	app := listen(t)
	n.serveTunnels(t, "127.0.0.1", handshake.CallerFirst, ca.identity(t, stock), passOn)
	n.directory.set(app.Addr().String(), podAt(app.Addr().String(), proxy.Troth))
	p := n.newSender(t, ca.identity(t, cart), app.Addr().String(), proxy.OutboundConfig{Limit: 2})
	first, second := p.through(t, app), p.through(t, app)
	if got := p.assertRefused(t, "LIMIT_REACHED"); got.Count != 1 {
		t.Errorf("the line is %+v", got)
	}
	p.stop()
	first.assertReset(t)
	second.assertReset(t)
	p.next(t, "AGENT_STOPPED")
	p.next(t, "AGENT_STOPPED")
	if got := n.pool.Tunnels(); len(got) != 0 {
		t.Errorf("tunnels of a pod that is gone are open: %+v", got)
	}
}

func TestOutboundDrains(t *testing.T) {
	ca := newAuthority(t)
	n := newNode(t, proxy.PoolConfig{})
	app := listen(t)
	n.serveTunnels(t, "127.0.0.1", handshake.CallerFirst, ca.identity(t, stock), passOn)
	n.directory.set(app.Addr().String(), podAt(app.Addr().String(), proxy.Troth))
	p := n.newSender(t, ca.identity(t, cart), app.Addr().String(), proxy.OutboundConfig{Drain: patience})
	e := p.through(t, app)
	stopped := make(chan struct{})
	go func() { defer close(stopped); p.stop() }()
	for { // until nobody listens any more
		c, err := dialFrom(p.front, client)
		if err != nil {
			break
		}
		c.Close()
	}
	e.assertOpen(t)
	select {
	case <-stopped:
		t.Error("Serve has returned while a connection goes on")
	default:
	}
	e.finish(t)
	<-stopped
}
