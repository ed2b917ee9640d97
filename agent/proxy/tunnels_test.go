package proxy_test

import (
	"context"
	"encoding/base64"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"troth.dev/troth/agent/hbone"
	"troth.dev/troth/agent/proxy"
	"troth.dev/troth/handshake"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/policy"
)

var orders = []handshake.Order{handshake.CallerFirst, handshake.Standard}

// newTunnelled is a pod of the identity stock that takes tunnels in the order.
func newTunnelled(tb testing.TB, order handshake.Order, identity *latest.Value[proxy.Identity], c proxy.InboundConfig) *pod {
	tb.Helper()
	c.Identity = identity
	if c.Destination == nil {
		c.Destination = func(net.Conn) (netip.AddrPort, error) { return netip.AddrPort{}, errors.New("of no use here") }
	}
	p := newPod(tb, nil, c)
	l := listen(tb)
	p.front = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.inbound.ServeTunnels(ctx, l, order) }()
	p.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				tb.Errorf("ServeTunnels() = %v, want nil after the end of its context", err)
			}
		case <-time.After(patience):
			tb.Fatal("ServeTunnels does not return")
		}
	})
	tb.Cleanup(p.stop)
	return p
}

// link is a tunnel to a pod, with what its TLS knows.
type link struct {
	*hbone.Tunnel

	conn *handshake.Conn
}

// dig opens a tunnel to p as caller, from an address of its own.
func (p *pod) dig(tb testing.TB, order handshake.Order, caller proxy.Identity, from netip.Addr) link {
	tb.Helper()
	l, err := p.tryDig(tb, order, caller, from)
	if err != nil {
		tb.Fatal(err)
	}
	return l
}

func (p *pod) tryDig(tb testing.TB, order handshake.Order, caller proxy.Identity, from netip.Addr) (link, error) {
	tb.Helper()
	conn, err := dialFrom(p.front, from)
	if err != nil {
		return link{}, err
	}
	secured, err := handshake.Initiate(tb.Context(), hbone.Buffer(conn), &handshake.Config{
		Order: order, SVID: caller.SVID, Bundles: caller.Bundles,
	}, stock)
	if err != nil {
		return link{}, err
	}
	tunnel, err := hbone.Open(secured, hbone.Config{})
	if err != nil {
		return link{}, err
	}
	tb.Cleanup(func() { tunnel.Close() })
	return link{tunnel, secured}, nil
}

// assertRetired fails the test unless the caller is told to leave the tunnel.
func (l link) assertRetired(tb testing.TB) {
	tb.Helper()
	for deadline := time.Now().Add(patience); l.Available(); runtime.Gosched() {
		if time.Now().After(deadline) {
			tb.Fatal("the caller is not told to leave the tunnel")
		}
	}
}

// talk is a connection in a tunnel, and the application's end of it.
type talk struct {
	stream *hbone.Stream
	app    *net.TCPConn
}

func (l link) connect(tb testing.TB, app *net.TCPListener) talk {
	tb.Helper()
	stream, _, err := l.Connect(tb.Context(), app.Addr().String(), nil)
	if err != nil {
		tb.Fatal(err)
	}
	k := talk{stream, accept(tb, app)}
	tb.Cleanup(func() { stream.Close() })
	k.assertOpen(tb)
	return k
}

func (k talk) assertOpen(tb testing.TB) {
	tb.Helper()
	if _, err := k.stream.Write([]byte("ping")); err != nil {
		tb.Fatal(err)
	}
	if got := readN(tb, k.app, 4); got != "ping" {
		tb.Fatalf("the application reads %q", got)
	}
	if _, err := k.app.Write([]byte("pong")); err != nil {
		tb.Fatal(err)
	}
	if got := readN(tb, k.stream, 4); got != "pong" {
		tb.Fatalf("the caller reads %q", got)
	}
}

// finish ends both directions, one after the other.
func (k talk) finish(tb testing.TB) {
	tb.Helper()
	k.stream.CloseWrite()
	if got, err := io.ReadAll(k.app); len(got) > 0 || err != nil {
		tb.Errorf("the application reads %q, %v, want the end", got, err)
	}
	k.app.Close()
	if got, err := io.ReadAll(k.stream); len(got) > 0 || err != nil {
		tb.Errorf("the caller reads %q, %v, want the end", got, err)
	}
}

// assertCut fails the test unless both ends are reset, not ended.
func (k talk) assertCut(tb testing.TB) {
	tb.Helper()
	if got, err := io.ReadAll(k.stream); len(got) > 0 || err == nil {
		tb.Fatalf("the caller reads %q and then %v, want nothing and a reset", got, err)
	}
	assertReset(tb, "the application", k.app)
}

func (p *pod) assertProtocol(tb testing.TB, order handshake.Order, reason policy.Reason) end {
	tb.Helper()
	got := p.assertEnd(tb, reason)
	want := map[handshake.Order]string{handshake.CallerFirst: "troth", handshake.Standard: "hbone"}[order]
	if got.Protocol != want || got.Direction != "inbound" {
		tb.Errorf("the line is %+v, want protocol %s", got, want)
	}
	return got
}

func TestTunnelPassesUnderEveryPolicyThatIsKnown(t *testing.T) {
	root := newAuthority(t)
	for _, order := range orders {
		for _, tt := range []struct {
			policy *policy.Effective
			want   policy.Reason
		}{
			{inForce(policy.Strict), policy.MTLSAccepted},
			{inForce(policy.Permissive), policy.MTLSAccepted},
			{inForce(policy.Disable), policy.MTLSAccepted},
			{nil, policy.PolicyUnknown},
			{new(policy.Effective), policy.PolicyUnknown},
		} {
			t.Run(order.String()+" "+string(tt.want), func(t *testing.T) {
				app := listen(t)
				var seen netip.Addr
				p := newTunnelled(t, order, latest.New(root.identity(t, stock)), proxy.InboundConfig{
					Policy: latest.New(tt.policy),
					Dial: func(ctx context.Context, source netip.Addr, destination netip.AddrPort) (net.Conn, error) {
						seen = source
						return dialTCP(ctx, source, destination)
					},
				})
				l := p.dig(t, order, root.identity(t, cart), other)
				if tt.want != policy.MTLSAccepted {
					var status *hbone.StatusError
					if _, _, err := l.Connect(t.Context(), app.Addr().String(), nil); !errors.As(err, &status) || status.Status != http.StatusUnauthorized {
						t.Errorf("Connect() = %v, want status 401", err)
					}
					p.assertProtocol(t, order, tt.want)
					assertUncalled(t, app)
					return
				}
				k := l.connect(t, app)
				if seen != other {
					t.Errorf("the application is dialled as %v, want the caller's %v", seen, other)
				}
				k.finish(t)
				got := p.assertProtocol(t, order, tt.want)
				if got.Peer != cart.String() || got.In != 4 || got.Out != 4 || !strings.HasPrefix(got.Source, "127.0.0.2:") || got.Destination != app.Addr().String() {
					t.Errorf("the line is %+v", got)
				}
				p.stop()
				assertNothingRuns(t)
			})
		}
	}
}

func TestTunnelLeadsToThePodAndNowhereElse(t *testing.T) {
	root, app := newAuthority(t), listen(t)
	closed := listen(t)
	closed.Close()
	p := newTunnelled(t, handshake.CallerFirst, latest.New(root.identity(t, stock)), proxy.InboundConfig{Own: []uint16{15006}})
	l := p.dig(t, handshake.CallerFirst, root.identity(t, cart), client)
	for _, tt := range []struct {
		authority string
		status    int
		reason    policy.Reason
	}{
		{"stock.shop.svc:80", 400, "DESTINATION_UNKNOWN"},
		{"127.0.0.1", 400, "DESTINATION_UNKNOWN"},
		{"127.0.0.1:0", 400, "DESTINATION_REFUSED"},
		{"127.0.0.9:80", 400, "DESTINATION_REFUSED"},
		{"[::1]:80", 400, "DESTINATION_REFUSED"},
		{p.front, 400, "DESTINATION_REFUSED"},
		{"127.0.0.1:15006", 400, "DESTINATION_REFUSED"},
		{closed.Addr().String(), 503, "DIAL_FAILED"},
	} {
		_, _, err := l.Connect(t.Context(), tt.authority, nil)
		var status *hbone.StatusError
		if !errors.As(err, &status) || status.Status != tt.status {
			t.Errorf("Connect(%q) = %v, want status %d", tt.authority, err, tt.status)
		}
		p.assertProtocol(t, handshake.CallerFirst, tt.reason)
	}
	l.connect(t, app) // the tunnel is none the worse
	l.connect(t, app)
}

func TestTunnelThatDoesNotComeAbout(t *testing.T) {
	root, strangers := newAuthority(t), newAuthority(t)
	for _, tt := range []struct {
		name   string
		pod    proxy.Identity
		caller proxy.Identity
		order  handshake.Order
		want   policy.Reason
		err    string
	}{
		{"the pod has no SVID", proxy.Identity{Bundles: trusting(root)}, root.identity(t, cart), handshake.CallerFirst, "IDENTITY_MISSING", "no SVID"},
		{"the pod trusts nobody", proxy.Identity{SVID: root.svid(t, stock, time.Hour)}, root.identity(t, cart), handshake.CallerFirst, "IDENTITY_MISSING", ""},
		{"an SVID of strangers", root.identity(t, stock),
			proxy.Identity{SVID: strangers.svid(t, cart, time.Hour), Bundles: trusting(root)}, handshake.CallerFirst, "HANDSHAKE_FAILED", "CERTIFICATE_UNTRUSTED"},
		{"the other order", root.identity(t, stock), root.identity(t, cart), handshake.Standard, "HANDSHAKE_FAILED", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newTunnelled(t, handshake.CallerFirst, latest.New(tt.pod), proxy.InboundConfig{})
			if l, err := p.tryDig(t, tt.order, tt.caller, client); err == nil {
				t.Fatalf("there is a tunnel: %v", l)
			}
			got := p.assertEnd(t, tt.want)
			if !strings.Contains(got.Err, tt.err) || got.Count != 1 || got.Level != "WARN" {
				t.Errorf("the line is %+v, want %q", got, tt.err)
			}
			p.assertMetric(t, "tunnels_open", "", 0)
		})
	}
}

// Whatever the proof of a tunnel rests on, the tunnel ends with it, and all in it.
func TestTunnelEndsWithItsProof(t *testing.T) {
	old, next := newAuthority(t), newAuthority(t)
	for _, order := range orders {
		for _, tt := range []struct {
			name   string
			life   time.Duration // of the caller's SVID
			change func(identity *latest.Value[proxy.Identity], now proxy.Identity)
			want   policy.Reason
		}{
			{"the authority is dropped", time.Hour, func(v *latest.Value[proxy.Identity], now proxy.Identity) {
				v.Set(proxy.Identity{SVID: next.svid(t, stock, time.Hour), Bundles: trusting(next)})
			}, "PEER_UNTRUSTED"},
			{"the pod is gone", time.Hour, func(v *latest.Value[proxy.Identity], _ proxy.Identity) {
				v.Set(proxy.Identity{})
			}, "IDENTITY_GONE"},
			{"the pod is somebody else", time.Hour, func(v *latest.Value[proxy.Identity], now proxy.Identity) {
				v.Set(proxy.Identity{SVID: old.svid(t, web, time.Hour), Bundles: now.Bundles})
			}, "IDENTITY_GONE"},
			{"the caller's SVID expires", 2 * time.Second, nil, "PROOF_EXPIRED"},
		} {
			t.Run(order.String()+", "+tt.name, func(t *testing.T) {
				t.Parallel()
				app := listen(t)
				now := proxy.Identity{SVID: old.svid(t, stock, time.Hour), Bundles: trusting(old, next)}
				identity := latest.New(now)
				p := newTunnelled(t, order, identity, proxy.InboundConfig{})
				caller := proxy.Identity{SVID: old.svid(t, cart, tt.life), Bundles: trusting(old, next)}
				l := p.dig(t, order, caller, client)
				k := l.connect(t, app)
				if tt.change != nil {
					tt.change(identity, now)
				}
				k.assertCut(t)
				p.assertProtocol(t, order, tt.want)
				if tt.change == nil && time.Now().Before(caller.SVID.Certificates[0].NotAfter) {
					t.Error("the connection was cut before the SVID expired")
				}
				select {
				case <-l.Done():
				case <-time.After(patience):
					t.Error("the tunnel is open")
				}
			})
		}
	}
}

// secretOf is what names a tunnel to its other end.
func (l link) secretOf(tb testing.TB, who string) string {
	tb.Helper()
	state := l.conn.ConnectionState()
	secret, err := state.ExportKeyingMaterial("EXPORTER-troth renew "+who, nil, 32)
	if err != nil {
		tb.Fatal(err)
	}
	return base64.RawURLEncoding.EncodeToString(secret)
}

// renew moves what l proves to an older tunnel.
func (l link) renew(tb testing.TB, secret string) (string, error) {
	tb.Helper()
	stream, answer, err := l.Connect(tb.Context(), "renew", hbone.Header{"troth-renew": secret})
	if err != nil {
		return "", err
	}
	return answer["troth-renewed"], stream.Close()
}

// A connection outlives the SVIDs by which it was made, and their authority.
func TestTunnelIsRenewed(t *testing.T) {
	old, next, app := newAuthority(t), newAuthority(t), listen(t)
	both := trusting(old, next)
	identity := latest.New(proxy.Identity{SVID: old.svid(t, stock, time.Hour), Bundles: both})
	p := newTunnelled(t, handshake.CallerFirst, identity, proxy.InboundConfig{})
	first := p.dig(t, handshake.CallerFirst, proxy.Identity{SVID: old.svid(t, cart, time.Hour), Bundles: both}, client)
	k := first.connect(t, app)

	// The pod's own SVID is replaced: no new connections in a tunnel that was made by
	// the old one, and nothing happens to the one that is there.
	identity.Set(proxy.Identity{SVID: next.svid(t, stock, time.Hour), Bundles: both})
	first.assertRetired(t)
	k.assertOpen(t)

	second := p.dig(t, handshake.CallerFirst, proxy.Identity{SVID: next.svid(t, cart, time.Hour), Bundles: both}, client)
	third := p.dig(t, handshake.CallerFirst, proxy.Identity{SVID: next.svid(t, web, time.Hour), Bundles: both}, client)
	for _, tt := range []struct {
		name   string
		by     link
		secret string
	}{
		{"by somebody else", third, first.secretOf(t, "caller")},
		{"by a guess", second, base64.RawURLEncoding.EncodeToString(make([]byte, 32))},
		{"by nothing", second, ""},
		{"by the callee's secret", second, first.secretOf(t, "callee")},
		{"by itself", second, second.secretOf(t, "caller")},
	} {
		var status *hbone.StatusError
		if _, err := tt.by.renew(t, tt.secret); !errors.As(err, &status) || status.Status != http.StatusNotFound {
			t.Errorf("%s: renew() = %v, want status 404", tt.name, err)
		}
	}
	shown := func() map[string]int {
		counts := make(map[string]int)
		for _, tunnel := range p.inbound.Tunnels() {
			for _, id := range tunnel.Authorities {
				counts[id] += tunnel.Connections
			}
		}
		return counts
	}
	if diff := cmp.Diff(map[string]int{old.id: 1, next.id: 0}, shown()); diff != "" {
		t.Errorf("connections by authority before (-want +got):\n%s", diff)
	}
	answer, err := second.renew(t, first.secretOf(t, "caller"))
	if err != nil || answer != first.secretOf(t, "callee") {
		t.Fatalf("renew() = %q, %v, want the callee's secret", answer, err)
	}
	if diff := cmp.Diff(map[string]int{next.id: 1}, shown()); diff != "" {
		t.Errorf("connections by authority after (-want +got):\n%s", diff)
	}

	identity.Set(proxy.Identity{SVID: next.svid(t, stock, time.Hour), Bundles: trusting(next)})
	k.assertOpen(t)
	k.finish(t)
	p.assertProtocol(t, handshake.CallerFirst, policy.MTLSAccepted)
}

// Those who are there when serving ends may finish, for as long as Drain.
func TestDrain(t *testing.T) {
	root, app := newAuthority(t), listen(t)
	for _, finishes := range []bool{true, false} {
		p := newTunnelled(t, handshake.CallerFirst, latest.New(root.identity(t, stock)), proxy.InboundConfig{
			Drain: map[bool]time.Duration{true: patience, false: 200 * time.Millisecond}[finishes],
		})
		l := p.dig(t, handshake.CallerFirst, root.identity(t, cart), client)
		k := l.connect(t, app)
		var stopping sync.WaitGroup
		stopping.Go(p.stop)
		l.assertRetired(t)
		want := policy.Reason("AGENT_STOPPED")
		if finishes {
			k.assertOpen(t)
			k.finish(t)
			want = policy.MTLSAccepted
		} else {
			k.assertCut(t)
		}
		p.assertProtocol(t, handshake.CallerFirst, want)
		stopping.Wait()
		assertNothingRuns(t)
	}
}

func TestPolicyChangeCutsInTunnels(t *testing.T) {
	root, app := newAuthority(t), listen(t)
	p := newTunnelled(t, handshake.Standard, latest.New(root.identity(t, stock)), proxy.InboundConfig{})
	l := p.dig(t, handshake.Standard, root.identity(t, cart), client)
	k := l.connect(t, app)
	p.policy.Set(inForce(policy.Strict))
	k.assertOpen(t)
	if diff := cmp.Diff([]string{cart.String(), "istio-system/default", "MTLS_ACCEPTED"}, shownOf(p.inbound.Connections())); diff != "" {
		t.Errorf("the connection as shown (-want +got):\n%s", diff)
	}
	p.policy.Set(nil)
	k.assertCut(t)
	p.assertProtocol(t, handshake.Standard, "POLICY_CHANGED")
	p.policy.Set(inForce(policy.Strict))
	l.connect(t, app) // in the same tunnel
}

func shownOf(c []proxy.Connection) []string {
	if len(c) != 1 {
		return nil
	}
	return []string{c[0].Peer, c[0].Policy, c[0].Reason}
}
