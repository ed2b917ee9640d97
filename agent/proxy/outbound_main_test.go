package proxy_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/agent/hbone"
	"troth.dev/troth/agent/proxy"
	"troth.dev/troth/handshake"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/policy"
)

// table is a directory that knows what it was told, and nobody else.
type table struct {
	mu    sync.Mutex
	known map[netip.AddrPort]*proxy.Destination
}

func (d *table) set(destination string, known proxy.Destination) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.known == nil {
		d.known = make(map[netip.AddrPort]*proxy.Destination)
	}
	d.known[netip.MustParseAddrPort(destination)] = &known
}

func (d *table) Resolve(_ context.Context, destination netip.AddrPort) (*proxy.Destination, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if known := d.known[destination]; known != nil {
		return known, nil
	}
	return nil, errors.New("nobody has said who that is")
}

// node is what the pods of a node share.
type node struct {
	registry  *prometheus.Registry
	metrics   *proxy.Metrics
	directory *table
	balancer  *proxy.Balancer
	pool      *proxy.Pool

	mu    sync.Mutex
	ports map[netip.AddrPort]string // guarded by mu; where what has a fixed port listens in truth
}

// newNode makes what the pods of a node share. Its pool is shut down at the end of the
// test, which sees that nothing is left running.
func newNode(tb testing.TB, c proxy.PoolConfig) *node {
	tb.Helper()
	n := &node{
		registry: prometheus.NewRegistry(), directory: new(table), balancer: proxy.NewBalancer(100),
		ports: make(map[netip.AddrPort]string),
	}
	var err error
	if n.metrics, err = proxy.NewMetrics(n.registry); err != nil {
		tb.Fatal(err)
	}
	c.Log, c.Metrics, c.Registerer = slog.New(slog.DiscardHandler), n.metrics, n.registry
	if n.pool, err = proxy.NewPool(c); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := n.pool.Shutdown(ctx); err != nil {
			tb.Errorf("Shutdown() = %v", err)
		}
	})
	return n
}

// at has whoever dials to reach the address where something listens in truth.
func (n *node) at(to netip.AddrPort, truth string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ports[to] = truth
}

func (n *node) dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	n.mu.Lock()
	truth, ok := n.ports[to]
	n.mu.Unlock()
	if !ok {
		truth = to.String()
	}
	return (&net.Dialer{}).DialContext(ctx, "tcp", truth)
}

// sender is the Outbound of one pod.
type sender struct {
	node     *node
	identity *latest.Value[proxy.Identity]
	goes     atomic.Pointer[string] // where its connections go
	outbound *proxy.Outbound
	lines    chan sent
	front    string
	stop     func()
}

// sent is a line about the end of a connection that left a pod.
type sent struct {
	end

	Service  string `json:"service"`
	Endpoint string `json:"endpoint"`
	PeerPod  string `json:"peer_pod"`
	Code     string `json:"code"`
}

type sentLines chan sent

func (l sentLines) Write(line []byte) (int, error) {
	var s sent
	if err := json.Unmarshal(line, &s); err != nil {
		return 0, err
	}
	l <- s
	return len(line), nil
}

// newSender is a pod of the node, whose connections go to a destination.
func (n *node) newSender(tb testing.TB, identity proxy.Identity, goes string, c proxy.OutboundConfig) *sender {
	tb.Helper()
	p := &sender{node: n, identity: latest.New(identity), lines: make(chan sent, 10_000)}
	p.goes.Store(&goes)
	c.Identity, c.Directory, c.Balancer, c.Pool, c.Metrics = p.identity, n.directory, n.balancer, n.pool, n.metrics
	if c.Pod == "" {
		c.Pod = podUID
	}
	if c.Log == nil {
		c.Log = slog.New(slog.NewJSONHandler(sentLines(p.lines), nil))
	}
	if c.Destination == nil {
		c.Destination = func(net.Conn) (netip.AddrPort, error) { return netip.ParseAddrPort(*p.goes.Load()) }
	}
	if c.Dial == nil {
		c.Dial = n.dial
	}
	var err error
	if p.outbound, err = proxy.NewOutbound(c); err != nil {
		tb.Fatal(err)
	}
	l := listen(tb)
	p.front = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.outbound.Serve(ctx, l) }()
	p.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				tb.Errorf("Serve() = %v, want nil after the end of its context", err)
			}
		case <-time.After(patience):
			tb.Fatal("Serve does not return")
		}
	})
	tb.Cleanup(p.stop)
	return p
}

// next returns the next line, which has to have a reason.
func (p *sender) next(tb testing.TB, want policy.Reason) sent {
	tb.Helper()
	select {
	case got := <-p.lines:
		if got.Reason != want {
			tb.Fatalf("the line is %+v, want the reason %s", got, want)
		}
		return got
	case <-time.After(patience):
		tb.Fatal("nothing is logged")
		return sent{}
	}
}

// assertRefused fails the test unless who calls out is reset, for the reason.
func (p *sender) assertRefused(tb testing.TB, want policy.Reason) sent {
	tb.Helper()
	if err := turnedAway(p.front, client); err != nil {
		tb.Fatal(err)
	}
	return p.next(tb, want)
}

// through connects to the application through p. Four bytes have gone either way.
func (p *sender) through(tb testing.TB, app *net.TCPListener) ends {
	tb.Helper()
	e := ends{call(tb, p.front, client), accept(tb, app)}
	e.assertOpen(tb)
	return e
}

// finish ends a connection as both ends want it.
func (e ends) finish(tb testing.TB) {
	tb.Helper()
	for _, pair := range [][2]*net.TCPConn{{e.caller, e.app}, {e.app, e.caller}} {
		if err := pair[0].CloseWrite(); err != nil {
			tb.Fatal(err)
		}
		if got, err := io.ReadAll(pair[1]); len(got) > 0 || err != nil {
			tb.Fatalf("read %q and then %v, want the end", got, err)
		}
	}
}

// callee accepts tunnels as an identity, and does with requests what it was told.
type callee struct {
	address    netip.Addr
	order      handshake.Order
	handshakes atomic.Int64 // that were begun
	tunnels    atomic.Int64 // that came about
	requests   atomic.Int64
	received   atomic.Int64 // bytes of applications
	identity   *latest.Value[proxy.Identity]
	mu         sync.Mutex
	open       []*handshake.Conn // guarded by mu
	drain      chan struct{}     // if not nil, ends the tunnels to come when closed
}

// cut breaks every tunnel.
func (c *callee) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.open {
		conn.NetConn().Close()
	}
	c.open = nil
}

// serveTunnels has a callee accept tunnels at an address of the node's, until the test
// ends.
func (n *node) serveTunnels(tb testing.TB, address string, order handshake.Order, identity proxy.Identity, handle func(*callee, *hbone.Request)) *callee {
	tb.Helper()
	c := &callee{address: netip.MustParseAddr(address), order: order, identity: latest.New(identity)}
	return n.serveCallee(tb, c, func(spiffeid.ID) error { return nil }, handle)
}

func (n *node) serveCallee(tb testing.TB, c *callee, authorize func(spiffeid.ID) error, handle func(*callee, *hbone.Request)) *callee {
	tb.Helper()
	l := listen(tb)
	port := uint16(15009)
	if c.order == handshake.Standard {
		port = 15008
	}
	n.at(netip.AddrPortFrom(c.address, port), l.Addr().String())
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
				secured, err := handshake.Accept(ctx, hbone.Buffer(conn), &handshake.Config{Order: c.order, SVID: i.SVID, Bundles: i.Bundles}, authorize)
				if err != nil {
					return
				}
				c.tunnels.Add(1)
				c.mu.Lock()
				c.open = append(c.open, secured)
				c.mu.Unlock()
				hbone.Serve(ctx, secured, hbone.Config{}, func(r *hbone.Request) {
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

// passOn connects a request to the application that it names.
func passOn(c *callee, r *hbone.Request) {
	app, err := net.Dial("tcp", r.Authority)
	if err != nil {
		r.Refuse(503)
		return
	}
	s, err := r.Accept(nil)
	if err != nil {
		app.Close()
		return
	}
	s.Relay(app.(*net.TCPConn), nil, func(n int64) { c.received.Add(n) })
}

func refuseWith(status int) func(*callee, *hbone.Request) {
	return func(_ *callee, r *hbone.Request) { r.Refuse(status) }
}

// podAt is a destination that is a pod, called by a protocol.
func podAt(address string, protocol proxy.Protocol) proxy.Destination {
	return proxy.Destination{Endpoints: []proxy.Endpoint{endpointAt(address, protocol)}}
}

func endpointAt(address string, protocol proxy.Protocol) proxy.Endpoint {
	e := proxy.Endpoint{Address: netip.MustParseAddrPort(address), Protocol: protocol, Pod: fmt.Sprintf("shop/%s", address)}
	if protocol != proxy.Plaintext {
		e.ID = stock
	}
	return e
}

// metricWith returns the sum of a metric's values that have all the labels given.
func (n *node) metricWith(tb testing.TB, name string, labels ...string) float64 {
	tb.Helper()
	families, err := n.registry.Gather()
	if err != nil {
		tb.Fatal(err)
	}
	var total float64
	for _, family := range families {
		if family.GetName() != "troth_agent_proxy_"+name {
			continue
		}
		for _, m := range family.GetMetric() {
			has := 0
			for _, l := range m.GetLabel() {
				for _, want := range labels {
					if l.GetValue() == want {
						has++
					}
				}
			}
			if has == len(labels) {
				total += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return total
}

func newLatest[T any](v T) *latest.Value[T] { return latest.New(v) }
