package proxy_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"troth.dev/troth/agent/proxy"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/policy"
)

const podUID = "0f8b25c2-3f0e-4c57-9d55-5d3ac1a0a001"

// patience is how long a test waits for what must happen.
const patience = 20 * time.Second

// The addresses that tests call from.
var (
	client  = netip.MustParseAddr("127.0.0.1")
	other   = netip.MustParseAddr("127.0.0.2")
	kubelet = netip.MustParseAddr("127.0.0.3")
)

var (
	meshDefault = policy.Ref{Namespace: "istio-system", Name: "default"}
	ports       = policy.Ref{Namespace: "shop", Name: "ports"}
)

// inForce is a policy of one mode.
func inForce(mode policy.Mode, at ...policy.PortMode) *policy.Effective {
	e := &policy.Effective{Mode: mode, DecidedBy: meshDefault, Ports: at}
	if len(at) > 0 {
		e.PortsBy = ports
	}
	return e
}

// pod is an Inbound that serves, with what it is given and what it says.
type pod struct {
	policy   *latest.Value[*policy.Effective]
	peers    *proxy.Peers
	registry *prometheus.Registry
	lines    lines
	inbound  *proxy.Inbound
	front    string // where callers connect to
	stop     func() // ends the serving; the test's end does too
}

// newPod makes an Inbound of what c says, and real parts for what it does not say:
// a PERMISSIVE policy, and the application app for whatever comes.
func newPod(tb testing.TB, app net.Addr, c proxy.InboundConfig) *pod {
	tb.Helper()
	p := &pod{policy: c.Policy, peers: proxy.NewPeers(100), registry: prometheus.NewRegistry(), lines: make(lines, 10_000)}
	if p.policy == nil {
		p.policy = latest.New(inForce(policy.Permissive))
	}
	metrics, err := proxy.NewMetrics(p.registry)
	if err != nil {
		tb.Fatal(err)
	}
	c.Policy, c.Peers, c.Metrics, c.Pod = p.policy, p.peers, metrics, podUID
	if c.Kubelet == nil {
		c.Kubelet = latest.New([]netip.Addr{kubelet})
	}
	if c.Log == nil {
		c.Log = slog.New(slog.NewJSONHandler(p.lines, nil))
	}
	if c.Destination == nil {
		c.Destination = to(app)
	}
	if c.Dial == nil {
		c.Dial = dialTCP
	}
	if p.inbound, err = proxy.NewInbound(c); err != nil {
		tb.Fatal(err)
	}
	return p
}

// serve serves p on a loopback port.
func (p *pod) serve(tb testing.TB) *pod {
	tb.Helper()
	l := listen(tb)
	p.front = l.Addr().String()
	p.stop = p.serveOn(tb, l)
	return p
}

// serveOn serves on l until the test ends or stop is called, which sees that nothing
// is left running.
func (p *pod) serveOn(tb testing.TB, l net.Listener) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.inbound.ServePlaintext(ctx, l) }()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				tb.Errorf("ServePlaintext() = %v, want nil after the end of its context", err)
			}
		case <-time.After(patience):
			tb.Fatal("ServePlaintext does not return")
		}
		if c, err := l.Accept(); err == nil {
			c.Close()
			tb.Error("the listener is open after ServePlaintext has returned")
		}
	})
	tb.Cleanup(stop)
	return stop
}

// assertNothingRuns fails the test if a goroutine of the package is left.
func assertNothingRuns(tb testing.TB) {
	tb.Helper()
	deadline := time.Now().Add(patience)
	for {
		stacks := make([]byte, 1<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		if !bytes.Contains(stacks, []byte("troth.dev/troth/agent/proxy.")) {
			return
		}
		if time.Now().After(deadline) {
			tb.Fatalf("something still runs:\n%s", stacks)
		}
		runtime.Gosched() // a goroutine that has said that it is done may be about to end
	}
}

// ends are the two ends of a connection through a pod.
type ends struct{ caller, app *net.TCPConn }

// through connects to an application through p. Four bytes have gone either way:
// before, the application may have accepted what the proxy still thinks it dials.
func (p *pod) through(tb testing.TB, from netip.Addr, app *net.TCPListener) ends {
	tb.Helper()
	caller := call(tb, p.front, from)
	e := ends{caller, accept(tb, app)}
	e.assertOpen(tb)
	return e
}

// assertOpen fails the test unless both ends hear each other.
func (e ends) assertOpen(tb testing.TB) {
	tb.Helper()
	for _, pair := range [][2]net.Conn{{e.caller, e.app}, {e.app, e.caller}} {
		if _, err := pair[0].Write([]byte("ping")); err != nil {
			tb.Fatalf("write: %v", err)
		}
		if got := readN(tb, pair[1], 4); got != "ping" {
			tb.Fatalf("read %q, want what the other end wrote", got)
		}
	}
}

func (e ends) assertReset(tb testing.TB) {
	tb.Helper()
	assertReset(tb, "the caller", e.caller)
	assertReset(tb, "the application", e.app)
}

// assertReset fails the test unless c is reset before there is anything to read.
func assertReset(tb testing.TB, who string, c net.Conn) {
	tb.Helper()
	got, err := io.ReadAll(c)
	if len(got) > 0 || !errors.Is(err, syscall.ECONNRESET) {
		tb.Fatalf("%s reads %q and then %v, want nothing and a reset", who, got, err)
	}
}

// assertTurnedAway fails the test unless who calls from an address is reset.
func (p *pod) assertTurnedAway(tb testing.TB, from netip.Addr) {
	tb.Helper()
	if err := turnedAway(p.front, from); err != nil {
		tb.Fatal(err)
	}
}

// turnedAway returns nil if who calls is reset before there is anything to read.
func turnedAway(address string, from netip.Addr) error {
	c, err := dialFrom(address, from)
	var got []byte
	if err == nil { // otherwise the reset may have been faster than the look at the connection
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		if got, err = io.ReadAll(c); err == nil {
			err = io.EOF
		}
	}
	if len(got) > 0 || !errors.Is(err, syscall.ECONNRESET) {
		return fmt.Errorf("a caller reads %q and then %w, want nothing and a reset", got, err)
	}
	return nil
}

// assertDead fails the test unless c, which has read the end, is reset once it has
// written a byte, or before. It would not read of that: the end stays the end.
func assertDead(tb testing.TB, who string, c *net.TCPConn) {
	tb.Helper()
	c.Write([]byte{1}) // fails if it is dead already
	raw, err := c.SyscallConn()
	if err != nil {
		tb.Fatal(err)
	}
	for deadline := time.Now().Add(patience); ; runtime.Gosched() {
		var peer error
		if err := raw.Control(func(fd uintptr) { _, peer = syscall.Getpeername(int(fd)) }); err != nil {
			tb.Fatal(err)
		}
		if errors.Is(peer, syscall.ENOTCONN) {
			return
		}
		if time.Now().After(deadline) {
			tb.Fatalf("%s is connected still, want a reset", who)
		}
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { return len(b), nil }

// end is a line about the end of a connection.
type end struct {
	Level       string        `json:"level"`
	Message     string        `json:"msg"`
	Pod         string        `json:"pod"`
	Direction   string        `json:"direction"`
	Protocol    string        `json:"protocol"`
	Peer        string        `json:"peer"`
	Source      string        `json:"source"`
	Destination string        `json:"destination"`
	In          int64         `json:"bytes_in"`
	Out         int64         `json:"bytes_out"`
	Duration    time.Duration `json:"duration"`
	Reason      policy.Reason `json:"reason"`
	Policy      string        `json:"policy"`
	Err         string        `json:"err"`
	Count       int           `json:"count"`
	Pause       time.Duration `json:"pause"`
}

// lines are the lines of a log.
type lines chan end

func (l lines) Write(line []byte) (int, error) {
	var e end
	if err := json.Unmarshal(line, &e); err != nil {
		return 0, err
	}
	l <- e
	return len(line), nil
}

// next returns the next line.
func (l lines) next(tb testing.TB) end {
	tb.Helper()
	select {
	case e := <-l:
		return e
	case <-time.After(patience):
		tb.Fatal("nothing is logged")
		return end{}
	}
}

// assertEnd fails the test unless the next line has the reason, and returns it.
func (p *pod) assertEnd(tb testing.TB, want policy.Reason) end {
	tb.Helper()
	got := p.lines.next(tb)
	if got.Reason != want || got.Pod != podUID {
		tb.Fatalf("the line is %+v, want the reason %s and the pod %s", got, want, podUID)
	}
	return got
}

// metric returns the sum of a metric's values, of those with a label of the value given if there is one.
func (p *pod) metric(tb testing.TB, name, label string) float64 {
	tb.Helper()
	families, err := p.registry.Gather()
	if err != nil {
		tb.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() != "troth_agent_proxy_"+name {
			continue
		}
		var total float64
		for _, m := range family.GetMetric() {
			has := label == ""
			for _, l := range m.GetLabel() {
				has = has || l.GetValue() == label
			}
			if has {
				total += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
		return total
	}
	return 0
}

func (p *pod) assertMetric(tb testing.TB, name, label string, want float64) {
	tb.Helper()
	if got := p.metric(tb, name, label); got != want {
		tb.Errorf("%s %s = %v, want %v", name, label, got, want)
	}
}

func listen(tb testing.TB) *net.TCPListener {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// accept returns the next connection to an application.
func accept(tb testing.TB, l *net.TCPListener) *net.TCPConn {
	tb.Helper()
	if err := l.SetDeadline(time.Now().Add(patience)); err != nil {
		tb.Fatal(err)
	}
	c, err := l.AcceptTCP()
	if err != nil {
		tb.Fatalf("the application accepts nothing: %v", err)
	}
	return bounded(tb, c)
}

// call connects to an address from one of its own.
func call(tb testing.TB, address string, from netip.Addr) *net.TCPConn {
	tb.Helper()
	c, err := dialFrom(address, from)
	if err != nil {
		tb.Fatal(err)
	}
	return bounded(tb, c)
}

func dialFrom(address string, from netip.Addr) (*net.TCPConn, error) {
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), Timeout: patience}
	c, err := d.Dial("tcp", address)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

func bounded(tb testing.TB, c *net.TCPConn) *net.TCPConn {
	tb.Helper()
	tb.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		tb.Fatal(err)
	}
	return c
}

func readN(tb testing.TB, r io.Reader, n int) string {
	tb.Helper()
	got := make([]byte, n)
	if m, err := io.ReadFull(r, got); err != nil {
		tb.Fatalf("read %q and then %v, want %d bytes", got[:m], err, n)
	}
	return string(got)
}

func portOf(a net.Addr) uint16 { return a.(*net.TCPAddr).AddrPort().Port() }

// to is a Destination that sends all to one address.
func to(app net.Addr) func(net.Conn) (netip.AddrPort, error) {
	return func(net.Conn) (netip.AddrPort, error) { return app.(*net.TCPAddr).AddrPort(), nil }
}

func dialTCP(ctx context.Context, _ netip.Addr, destination netip.AddrPort) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, "tcp", destination.String())
}

// assertUncalled fails the test if anybody has connected to the application.
func assertUncalled(tb testing.TB, app *net.TCPListener) {
	tb.Helper()
	// Connections come out in the order in which they came in.
	fence := call(tb, app.Addr().String(), client)
	if first := accept(tb, app); first.RemoteAddr().String() != fence.LocalAddr().String() {
		tb.Fatalf("the application was called from %s", first.RemoteAddr())
	}
}
