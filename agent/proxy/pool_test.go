package proxy_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/agent/hbone"
	"troth.dev/troth/agent/proxy"
	"troth.dev/troth/handshake"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/policy"
)

// calling is a pod that calls and its node, on a network in memory.
type calling struct {
	*sender

	fabric *fabric
	front  *fabricListener
}

const (
	callerAt = "10.0.0.1" // the pod that calls
	calleeAt = "10.0.0.2"
	appAt    = "10.0.0.2:80"
)

// newCalling is a pod of the identity i, whose connections go to appAt by a protocol.
func newCalling(tb testing.TB, f *fabric, i proxy.Identity, protocol proxy.Protocol, c proxy.PoolConfig) *calling {
	tb.Helper()
	n := newNode(tb, c)
	n.directory.set(appAt, podAt(appAt, protocol))
	return n.newCalling(tb, f, i, callerAt)
}

func (n *node) newCalling(tb testing.TB, f *fabric, i proxy.Identity, at string) *calling {
	tb.Helper()
	p := &calling{
		sender: &sender{node: n, identity: latest.New(i), lines: make(chan sent, 10_000)},
		fabric: f, front: f.listen(at + ":15001"),
	}
	goes := appAt
	p.goes.Store(&goes)
	outbound, err := proxy.NewOutbound(proxy.OutboundConfig{
		Identity: p.identity, Directory: n.directory, Balancer: n.balancer, Pool: n.pool, Metrics: n.metrics, Pod: podUID,
		Destination: func(net.Conn) (netip.AddrPort, error) { return netip.ParseAddrPort(*p.goes.Load()) },
		Dial:        f.from(at), Log: slog.New(slog.NewJSONHandler(sentLines(p.lines), nil)),
	})
	if err != nil {
		tb.Fatal(err)
	}
	p.outbound = outbound
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- outbound.Serve(ctx, p.front) }()
	p.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			tb.Errorf("Serve() = %v", err)
		}
	})
	tb.Cleanup(p.stop)
	return p
}

// call opens a connection through the pod's Outbound.
func (p *calling) call(tb testing.TB) *fabricConn {
	tb.Helper()
	c, err := p.fabric.dial(tb.Context(), netip.MustParseAddr(callerAt), p.front.address)
	if err != nil {
		tb.Fatal(err)
	}
	return c.(*fabricConn)
}

// echoed fails the test unless what c sends comes back.
func (c *fabricConn) echoed() error {
	if _, err := c.Write([]byte("ping")); err != nil {
		return err
	}
	var b [4]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return err
	}
	if string(b[:]) != "ping" {
		return fmt.Errorf("%q comes back", b)
	}
	return nil
}

func (c *fabricConn) assertOpen(tb testing.TB) {
	tb.Helper()
	if err := c.echoed(); err != nil {
		tb.Fatalf("what the caller sends does not come back: %v", err)
	}
}

// connect opens a connection that the application answers.
func (p *calling) connect(tb testing.TB) *fabricConn {
	tb.Helper()
	c := p.call(tb)
	c.assertOpen(tb)
	return c
}

// finish ends a connection as its ends want it.
func (p *calling) finish(tb testing.TB, c *fabricConn) {
	tb.Helper()
	c.CloseWrite()
	if n, err := c.Read(make([]byte, 1)); n > 0 || !errors.Is(err, io.EOF) {
		tb.Fatalf("the caller reads %v, want the end; %+v", err, <-p.lines)
	}
	c.Close()
	p.next(tb, "MTLS_SENT")
}

func (p *calling) assertCut(tb testing.TB, c *fabricConn, want policy.Reason) {
	tb.Helper()
	if n, err := c.Read(make([]byte, 1)); n > 0 || !errors.Is(err, syscall.ECONNRESET) {
		tb.Fatalf("the caller reads %d bytes, %v, want a reset", n, err)
	}
	p.next(tb, want)
}

// acceptTunnels is as serveTunnels, on a network in memory.
func (f *fabric) acceptTunnels(tb testing.TB, at string, order handshake.Order, identity proxy.Identity, handle func(*callee, *hbone.Request)) *callee {
	tb.Helper()
	port := uint16(15009)
	if order == handshake.Standard {
		port = 15008
	}
	c := &callee{address: netip.MustParseAddr(at), order: order, identity: latest.New(identity)}
	l := f.listen(netip.AddrPortFrom(c.address, port).String())
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				c.handshakes.Add(1)
				i, _ := c.identity.Load()
				secured, err := handshake.Accept(ctx, conn, &handshake.Config{Order: order, SVID: i.SVID, Bundles: i.Bundles}, func(spiffeid.ID) error { return nil })
				if err != nil {
					return
				}
				c.tunnels.Add(1)
				c.mu.Lock()
				c.open = append(c.open, secured)
				c.mu.Unlock()
				hbone.Serve(ctx, secured, hbone.Config{Drain: c.drain}, func(r *hbone.Request) {
					c.requests.Add(1)
					handle(c, r)
				})
			})
		}
	})
	tb.Cleanup(func() {
		l.Close()
		cancel()
		running.Wait()
	})
	return c
}

// echoing has requests answered by what they send.
func echoing(_ *callee, r *hbone.Request) {
	s, err := r.Accept(nil)
	if err != nil {
		return
	}
	io.Copy(s, s)
	s.CloseWrite()
}

// All who need the same tunnel at the same time wait for one handshake, or for as many
// as it takes to carry them.
func TestHandshakesAreShared(t *testing.T) {
	for _, tt := range []struct{ callers, tunnels int }{{1, 1}, {2, 1}, {100, 1}, {101, 2}, {250, 3}} {
		t.Run(fmt.Sprint(tt.callers), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ca, f := newAuthority(t), newFabric()
				peer := f.acceptTunnels(t, calleeAt, handshake.CallerFirst, ca.identity(t, stock), echoing)
				f.slow[netip.MustParseAddrPort("10.0.0.2:15009")] = time.Second
				p := newCalling(t, f, ca.identity(t, cart), proxy.Troth, proxy.PoolConfig{})
				callers := make([]*fabricConn, tt.callers)
				for i := range callers {
					callers[i] = p.call(t)
				}
				for _, c := range callers {
					c.assertOpen(t)
				}
				if got := int(peer.handshakes.Load()); got != tt.tunnels {
					t.Errorf("%d callers made %d handshakes, want %d", tt.callers, got, tt.tunnels)
				}
				if got := proxy.ByAuthority(p.node.pool.Tunnels()); !maps.Equal(got, map[string]int{ca.id: tt.callers}) {
					t.Errorf("ByAuthority() = %v", got)
				}
				for _, c := range callers {
					p.finish(t, c)
				}
				p.finish(t, p.connect(t)) // the tunnels are warm
				if got := int(peer.handshakes.Load()); got != tt.tunnels {
					t.Errorf("after that there are %d", got)
				}
			})
		})
	}
}

// Who waits for one peer waits for nobody else's.
func TestSlowPeerHoldsNobodyUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, f := newAuthority(t), newFabric()
		f.acceptTunnels(t, calleeAt, handshake.CallerFirst, ca.identity(t, stock), echoing)
		f.listen("10.0.0.3:15009") // accepts, and says nothing
		p := newCalling(t, f, ca.identity(t, cart), proxy.Troth, proxy.PoolConfig{})
		p.node.directory.set("10.0.0.3:80", podAt("10.0.0.3:80", proxy.Troth))
		silent := "10.0.0.3:80"
		p.goes.Store(&silent)
		began := time.Now()
		stuck := p.call(t)
		synctest.Wait()
		fine := appAt
		p.goes.Store(&fine)
		p.finish(t, p.connect(t))
		if time.Since(began) > 0 {
			t.Errorf("a connection waited %v for another's peer", time.Since(began))
		}
		p.assertCut(t, stuck, "HANDSHAKE_FAILED")
		if time.Since(began) != 10*time.Second {
			t.Errorf("the silent peer was waited for for %v", time.Since(began))
		}
	})
}

// Tunnels are of one pod: another of the same identity has its own.
func TestPodsShareNoTunnels(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, f := newAuthority(t), newFabric()
		peer := f.acceptTunnels(t, calleeAt, handshake.Standard, ca.identity(t, stock), echoing)
		i := ca.identity(t, cart)
		first := newCalling(t, f, i, proxy.HBONE, proxy.PoolConfig{})
		second := first.node.newCalling(t, f, i, "10.0.0.9")
		first.finish(t, first.connect(t))
		second.finish(t, second.connect(t))
		if got := peer.handshakes.Load(); got != 2 {
			t.Errorf("%d handshakes, want 2", got)
		}
		first.stop()
		if got := len(first.node.pool.Tunnels()); got != 1 {
			t.Errorf("after the end of one pod %d tunnels are open, want the other's", got)
		}
		second.finish(t, second.connect(t))
	})
}

func TestIdleTunnels(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, f := newAuthority(t), newFabric()
		peer := f.acceptTunnels(t, calleeAt, handshake.CallerFirst, ca.identity(t, stock), echoing)
		p := newCalling(t, f, ca.identity(t, cart), proxy.Troth, proxy.PoolConfig{})
		for range 3 {
			p.finish(t, p.connect(t))
			time.Sleep(5*time.Minute - time.Second)
		}
		if got := peer.handshakes.Load(); got != 1 {
			t.Errorf("%d handshakes, want one", got)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if got := p.node.pool.Tunnels(); len(got) != 0 {
			t.Errorf("the idle tunnel is open: %+v", got)
		}
		c := p.connect(t) // one that carries something is not idle
		time.Sleep(20 * time.Minute)
		c.assertOpen(t)
		if got := peer.handshakes.Load(); got != 2 {
			t.Errorf("%d handshakes, want 2", got)
		}
	})
}

// A tunnel that has ended, or that the peer takes no more connections in, is nobody's
// misfortune.
func TestEndedTunnelIsNotUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, f := newAuthority(t), newFabric()
		peer := f.acceptTunnels(t, calleeAt, handshake.Standard, ca.identity(t, stock), echoing)
		p := newCalling(t, f, ca.identity(t, cart), proxy.HBONE, proxy.PoolConfig{})
		for n := range int64(5) {
			if n%2 == 0 {
				p.finish(t, p.connect(t))
			} else {
				c := p.connect(t)
				peer.cut()
				p.assertCut(t, c, "CONNECTION_BROKEN")
			}
			peer.cut()
			synctest.Wait() // until the caller knows: before, the peer may have acted on a request
			if got := peer.handshakes.Load(); got != n+1 {
				t.Errorf("%d handshakes, want %d", got, n+1)
			}
		}
	})
	synctest.Test(t, func(t *testing.T) {
		ca, f := newAuthority(t), newFabric()
		peer := f.acceptTunnels(t, calleeAt, handshake.CallerFirst, ca.identity(t, stock), echoing)
		p := newCalling(t, f, ca.identity(t, cart), proxy.Troth, proxy.PoolConfig{})
		peer.drain = make(chan struct{})
		old := p.connect(t)
		close(peer.drain)
		synctest.Wait()
		peer.drain = nil
		p.finish(t, p.connect(t))
		old.assertOpen(t)
		if got := peer.handshakes.Load(); got != 2 {
			t.Errorf("%d handshakes, want 2", got)
		}
		p.finish(t, old)
	})
}

// A peer that refuses a stream has not acted on it: a newer tunnel is tried.
func TestRefusedStreamIsTriedOnANewTunnel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, f := newAuthority(t), newFabric()
		var full sync.Map
		peer := f.acceptTunnels(t, calleeAt, handshake.Standard, ca.identity(t, stock), func(c *callee, r *hbone.Request) {
			full.Store(c.tunnels.Load(), true)
			echoing(c, r)
		})
		peer.drain = nil
		p := newCalling(t, f, ca.identity(t, cart), proxy.HBONE, proxy.PoolConfig{Streams: 300})
		var open []*fabricConn
		for range 201 { // the peer takes 200 in a tunnel
			open = append(open, p.connect(t))
		}
		if got := peer.handshakes.Load(); got != 2 {
			t.Errorf("%d handshakes, want 2", got)
		}
		for _, c := range open {
			p.finish(t, c)
		}
	})
}

func TestTunnelLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, f := newAuthority(t), newFabric()
		f.acceptTunnels(t, calleeAt, handshake.CallerFirst, ca.identity(t, stock), echoing)
		f.acceptTunnels(t, "10.0.0.3", handshake.CallerFirst, ca.identity(t, stock), echoing)
		p := newCalling(t, f, ca.identity(t, cart), proxy.Troth, proxy.PoolConfig{Streams: 2, PerPeer: 2, Limit: 2})
		p.node.directory.set("10.0.0.3:80", podAt("10.0.0.3:80", proxy.Troth))
		var open []*fabricConn
		for range 4 {
			open = append(open, p.connect(t))
		}
		p.assertCut(t, p.call(t), "LIMIT_REACHED")
		other := "10.0.0.3:80"
		p.goes.Store(&other)
		p.assertCut(t, p.call(t), "LIMIT_REACHED")
		for _, c := range open {
			p.finish(t, c)
		}
		p.finish(t, p.connect(t)) // an idle tunnel makes room
		synctest.Wait()
		if got := len(p.node.pool.Tunnels()); got != 2 {
			t.Errorf("%d tunnels are open, want 2", got)
		}
	})
}

func TestTunnelEndsWithTheProofOfItsCaller(t *testing.T) {
	for _, protocol := range []proxy.Protocol{proxy.Troth, proxy.HBONE} {
		order := handshake.CallerFirst
		if protocol == proxy.HBONE {
			order = handshake.Standard
		}
		for _, tt := range []struct {
			name string
			then func(t *testing.T, p *calling, i proxy.Identity, ca, next *authority)
			want policy.Reason
		}{
			{"the pod is gone", func(_ *testing.T, p *calling, _ proxy.Identity, _, _ *authority) {
				p.identity.Set(proxy.Identity{})
			}, "IDENTITY_GONE"},
			{"the pod is another", func(t *testing.T, p *calling, i proxy.Identity, ca, _ *authority) {
				p.identity.Set(ca.identity(t, web))
			}, "IDENTITY_GONE"},
			{"the authority is not trusted any more", func(_ *testing.T, p *calling, i proxy.Identity, _, next *authority) {
				p.identity.Set(proxy.Identity{SVID: i.SVID, Bundles: trusting(next)})
			}, "PEER_UNTRUSTED"},
			{"our own authority is not", func(t *testing.T, p *calling, i proxy.Identity, ca, next *authority) {
				p.identity.Set(proxy.Identity{SVID: i.SVID, Bundles: trusting(next)})
			}, "IDENTITY_REPLACED"},
			{"the peer's SVID expires", func(_ *testing.T, p *calling, _ proxy.Identity, _, _ *authority) {
				time.Sleep(40*time.Minute + time.Second)
			}, "PROOF_EXPIRED"},
		} {
			t.Run(protocol.String()+"/"+tt.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					ca, next, f := newAuthority(t), newAuthority(t), newFabric()
					both := trusting(ca, next)
					theirs := proxy.Identity{SVID: ca.svid(t, stock, 40*time.Minute), Bundles: both}
					if tt.want == "IDENTITY_REPLACED" {
						theirs.SVID = next.svid(t, stock, time.Hour)
					}
					f.acceptTunnels(t, calleeAt, order, theirs, echoing)
					i := proxy.Identity{SVID: ca.svid(t, cart, time.Hour), Bundles: both}
					p := newCalling(t, f, i, protocol, proxy.PoolConfig{})
					c := p.connect(t)
					began := time.Now()
					tt.then(t, p, i, ca, next)
					p.assertCut(t, c, tt.want)
					if tt.want != "PROOF_EXPIRED" && time.Since(began) > 0 {
						t.Errorf("it is cut %v late", time.Since(began))
					}
				})
			})
		}
	}
}

// A bundle in which both are trusted leaves what is open, and new connections get a
// tunnel that was made by it.
func TestNewIdentityMakesNewTunnels(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, next, f := newAuthority(t), newAuthority(t), newFabric()
		peer := f.acceptTunnels(t, calleeAt, handshake.Standard, proxy.Identity{SVID: ca.svid(t, stock, time.Hour), Bundles: trusting(ca, next)}, echoing)
		i := ca.identity(t, cart)
		p := newCalling(t, f, i, proxy.HBONE, proxy.PoolConfig{})
		old := p.connect(t)
		for n, i := range []proxy.Identity{
			{SVID: i.SVID, Bundles: trusting(ca, next)},
			{SVID: next.svid(t, cart, time.Hour), Bundles: trusting(ca, next)},
		} {
			p.identity.Set(i)
			synctest.Wait()
			p.finish(t, p.connect(t))
			p.finish(t, p.connect(t))
			if got := peer.handshakes.Load(); got != int64(n)+2 {
				t.Errorf("%d handshakes, want %d", got, n+2)
			}
		}
		old.assertOpen(t)
		// The tunnel between the two, which carries nothing, is closed.
		synctest.Wait()
		if got := len(p.node.pool.Tunnels()); got != 2 {
			t.Errorf("%d tunnels are open, want the old one's and the new", got)
		}
		if diff := cmp.Diff(map[string]int{ca.id: 2, next.id: 1}, proxy.ByAuthority(p.node.pool.Tunnels())); diff != "" {
			t.Error(diff)
		}
		p.finish(t, old)
		synctest.Wait()
		if got := len(p.node.pool.Tunnels()); got != 1 {
			t.Errorf("%d tunnels are open, want the new one", got)
		}
	})
}

func TestShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, f := newAuthority(t), newFabric()
		f.acceptTunnels(t, calleeAt, handshake.CallerFirst, ca.identity(t, stock), echoing)
		p := newCalling(t, f, ca.identity(t, cart), proxy.Troth, proxy.PoolConfig{})
		first, second := p.connect(t), p.connect(t)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		result := make(chan error)
		go func() { result <- p.node.pool.Shutdown(ctx) }()
		synctest.Wait()
		first.assertOpen(t)
		p.assertCut(t, p.call(t), "AGENT_STOPPED")
		p.finish(t, first)
		if err := <-result; !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Shutdown() = %v, want its context's error", err)
		}
		p.assertCut(t, second, "CONNECTION_BROKEN")
	})
}

// served is the way into the pod that is called, as it is in the product.
func (f *fabric) served(tb testing.TB, at string, identity *latest.Value[proxy.Identity]) *proxy.Inbound {
	tb.Helper()
	metrics, err := proxy.NewMetrics(prometheus.NewRegistry())
	if err != nil {
		tb.Fatal(err)
	}
	inbound, err := proxy.NewInbound(proxy.InboundConfig{
		Identity: identity, Policy: latest.New(inForce(policy.Strict)),
		Destination: func(net.Conn) (netip.AddrPort, error) { return netip.AddrPort{}, errors.New("of no use") },
		Dial: func(ctx context.Context, from netip.Addr, to netip.AddrPort) (net.Conn, error) {
			return f.dial(ctx, from, to)
		},
		Log: slog.New(slog.DiscardHandler), Metrics: metrics,
	})
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	l := f.listen(at + ":15009")
	running.Go(func() { inbound.ServeTunnels(ctx, l, handshake.CallerFirst) })
	tb.Cleanup(func() {
		cancel()
		running.Wait()
	})
	return inbound
}

// A connection lives for days, through every renewal of the SVIDs of both ends and
// through a rotation of the authority, and is always held by a proof that is valid.
func TestConnectionOutlivesItsProof(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, next, f := newAuthority(t), newAuthority(t), newFabric()
		bundles := trusting(ca)
		theirs := latest.New(proxy.Identity{SVID: ca.svid(t, stock, time.Hour), Bundles: bundles})
		inbound := f.served(t, calleeAt, theirs)
		f.echo(t, appAt)
		p := newCalling(t, f, proxy.Identity{SVID: ca.svid(t, cart, time.Hour), Bundles: bundles}, proxy.Troth, proxy.PoolConfig{})
		long := p.connect(t)
		signer := ca
		for hour := range 40 {
			if hour == 20 {
				bundles = trusting(ca, next)
			}
			if hour == 22 {
				signer = next
			}
			if hour == 30 {
				bundles = trusting(next)
			}
			// The two renew at different times.
			time.Sleep(15 * time.Minute)
			p.identity.Set(proxy.Identity{SVID: signer.svid(t, cart, time.Hour), Bundles: bundles})
			time.Sleep(15 * time.Minute)
			theirs.Set(proxy.Identity{SVID: signer.svid(t, stock, time.Hour), Bundles: bundles})
			time.Sleep(15 * time.Minute)
			if err := long.echoed(); err != nil {
				t.Fatalf("after %d renewals: %v", hour, err)
			}
			p.finish(t, p.connect(t))
			for side, tunnels := range map[string][]proxy.Tunnel{"callee": inbound.Tunnels(), "caller": p.node.pool.Tunnels()} {
				if len(tunnels) > 3 {
					t.Errorf("the %s has %d tunnels for one connection", side, len(tunnels))
				}
				for _, tunnel := range tunnels {
					if !tunnel.Until.After(time.Now()) {
						t.Errorf("the %s has a tunnel whose proof ended at %v, and it is %v", side, tunnel.Until, time.Now())
					}
				}
			}
		}
		if got := proxy.ByAuthority(p.node.pool.Tunnels())[ca.id]; got != 0 {
			t.Errorf("%d connections hang on the authority that is gone", got)
		}
		if got := p.node.metricWith(t, "renewals_total", "failed"); got != 0 {
			t.Errorf("%v renewals failed", got)
		}
		p.finish(t, long)
	})
}

// Who does not know the tunnel renews nothing: the connection ends with its proof.
func TestRenewalThatFails(t *testing.T) {
	for name, answer := range map[string]func(r *hbone.Request){
		"the peer does not know the tunnel": func(r *hbone.Request) { r.Refuse(404) },
		"the peer does not say what it knows": func(r *hbone.Request) {
			if s, err := r.Accept(nil); err == nil {
				s.Close()
			}
		},
		"the peer says what it was told": func(r *hbone.Request) {
			if s, err := r.Accept(hbone.Header{"troth-renewed": r.Header["troth-renew"]}); err == nil {
				s.Close()
			}
		},
		"the peer says nothing": func(r *hbone.Request) { <-r.Done() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ca, f := newAuthority(t), newFabric()
				f.acceptTunnels(t, calleeAt, handshake.CallerFirst, proxy.Identity{SVID: ca.svid(t, stock, 24*time.Hour), Bundles: trusting(ca)}, func(c *callee, r *hbone.Request) {
					if r.Authority == "renew" {
						answer(r)
						return
					}
					echoing(c, r)
				})
				began := time.Now()
				p := newCalling(t, f, ca.identity(t, cart), proxy.Troth, proxy.PoolConfig{})
				c := p.connect(t)
				time.Sleep(30 * time.Minute)
				p.identity.Set(ca.identity(t, cart))
				c.assertOpen(t)
				p.assertCut(t, c, "PROOF_EXPIRED")
				// Times in certificates are whole seconds.
				if after := time.Since(began).Round(time.Second); after != time.Hour {
					t.Errorf("it is cut after %v", after)
				}
				if got := p.node.metricWith(t, "renewals_total", "failed"); got < 2 || got > 100 {
					t.Errorf("%v renewals have failed", got)
				}
			})
		})
	}
}
