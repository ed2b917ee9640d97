package proxy_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"troth.dev/troth/agent/proxy"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/policy"
)

func TestPlaintextPassesAsThePolicySays(t *testing.T) {
	app := listen(t)
	port := portOf(app.Addr())
	at := func(port uint16, mode policy.Mode) policy.PortMode { return policy.PortMode{Port: port, Mode: mode} }
	for _, tt := range []struct {
		name   string
		policy *policy.Effective
		from   netip.Addr
		want   policy.Reason
		by     string
	}{
		{"PERMISSIVE", inForce(policy.Permissive), client, policy.PlaintextAccepted, "istio-system/default"},
		{"DISABLE", inForce(policy.Disable), client, policy.PlaintextAccepted, "istio-system/default"},
		{"no policy decides", &policy.Effective{Mode: policy.Permissive}, client, policy.PlaintextAccepted, ""},
		{"STRICT", inForce(policy.Strict), client, policy.PlaintextRefused, "istio-system/default"},
		{"STRICT, a probe", inForce(policy.Strict), kubelet, policy.ProbeExempt, "istio-system/default"},
		{"STRICT but for the port", inForce(policy.Strict, at(port, policy.Disable)), client, policy.PlaintextAccepted, "shop/ports"},
		{"STRICT but for another port", inForce(policy.Strict, at(port^1, policy.Disable)), client, policy.PlaintextRefused, "istio-system/default"},
		{"PERMISSIVE but for the port", inForce(policy.Permissive, at(port, policy.Strict)), client, policy.PlaintextRefused, "shop/ports"},
		{"PERMISSIVE but for the port, a probe", inForce(policy.Permissive, at(port, policy.Strict)), kubelet, policy.ProbeExempt, "shop/ports"},
		{"no policy", nil, client, policy.PolicyUnknown, ""},
		{"no policy, a probe", nil, kubelet, policy.PolicyUnknown, ""},
		{"the zero policy", new(policy.Effective), client, policy.PolicyUnknown, ""},
		{"a mode that nobody knows", inForce(9), client, policy.PolicyUnknown, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPod(t, app.Addr(), proxy.InboundConfig{Policy: latest.New(tt.policy)}).serve(t)
			var moved int64
			switch tt.want {
			case policy.PlaintextAccepted, policy.ProbeExempt:
				e := p.through(t, tt.from, app)
				p.assertMetric(t, "connections_open", "", 1)
				e.caller.Close()
				e.app.Close()
				moved = 4
			default:
				p.assertTurnedAway(t, tt.from)
				assertUncalled(t, app)
			}
			got := p.assertEnd(t, tt.want)
			source, err := netip.ParseAddrPort(got.Source)
			if err != nil || source.Addr() != tt.from || got.Destination != app.Addr().String() ||
				got.Level != "INFO" || got.Policy != tt.by || got.In != moved || got.Out != moved || got.Duration <= 0 {
				t.Errorf("the line is %+v", got)
			}
			p.stop()
			p.assertMetric(t, "connections_total", string(tt.want), 1)
			p.assertMetric(t, "connections_open", "", 0)
			p.assertMetric(t, "bytes_total", "in", float64(moved))
			p.assertMetric(t, "bytes_total", "out", float64(moved))
			assertNothingRuns(t)
		})
	}
}

// A caller who talks first is refused like any other, unread.
func TestRefusedThoughItTalks(t *testing.T) {
	app := listen(t)
	p := newPod(t, app.Addr(), proxy.InboundConfig{Policy: latest.New(inForce(policy.Strict))}).serve(t)
	for range 50 {
		// If the reset is faster, the caller does not get so far as to talk.
		if caller, err := dialFrom(p.front, client); err == nil {
			_, write := bounded(t, caller).Write([]byte("GET / HTTP/1.1\r\n\r\n"))
			got, read := io.ReadAll(caller)
			if len(got) > 0 || !errors.Is(errors.Join(write, read), syscall.ECONNRESET) {
				t.Fatalf("the caller writes, and then %v, and reads %q, and then %v, want a reset", write, got, read)
			}
		} else if !errors.Is(err, syscall.ECONNRESET) {
			t.Fatal(err)
		}
		if got := p.assertEnd(t, policy.PlaintextRefused); got.In != 0 || got.Out != 0 {
			t.Fatalf("the line is %+v, want no bytes", got)
		}
	}
	assertUncalled(t, app)
}

func TestDestinationThatNobodyKnows(t *testing.T) {
	app := listen(t)
	for _, tt := range []struct {
		name string
		to   func(front net.Conn) (netip.AddrPort, error)
		err  string
	}{
		{"an error", func(net.Conn) (netip.AddrPort, error) {
			return netip.AddrPort{}, syscall.ENOENT
		}, "no such file or directory"},
		{"no address", func(net.Conn) (netip.AddrPort, error) {
			return netip.AddrPortFrom(netip.Addr{}, 80), nil
		}, "invalid AddrPort is no destination"},
		{"no port", func(net.Conn) (netip.AddrPort, error) {
			return netip.AddrPortFrom(client, 0), nil
		}, "127.0.0.1:0 is no destination"},
		{"the proxy itself", func(c net.Conn) (netip.AddrPort, error) {
			return c.LocalAddr().(*net.TCPAddr).AddrPort(), nil
		}, "it was meant for the proxy"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPod(t, nil, proxy.InboundConfig{Destination: tt.to}).serve(t)
			p.assertTurnedAway(t, client)
			if got := p.assertEnd(t, "DESTINATION_UNKNOWN"); got.Err != tt.err || got.Level != "WARN" {
				t.Errorf("the line is %+v, want the error %q", got, tt.err)
			}
			assertUncalled(t, app)
		})
	}
}

// Addresses mapped into IPv6 are IPv4 addresses, in what is dialled and in the line.
func TestMappedAddresses(t *testing.T) {
	app := listen(t)
	l, err := net.Listen("tcp", "[::]:0") // accepts both families, IPv4 as mapped
	if err != nil {
		t.Fatal(err)
	}
	p := newPod(t, nil, proxy.InboundConfig{
		Policy:  latest.New(inForce(policy.Strict)),
		Kubelet: latest.New([]netip.Addr{netip.MustParseAddr("::ffff:127.0.0.3")}),
		Destination: func(net.Conn) (netip.AddrPort, error) {
			return netip.AddrPortFrom(netip.MustParseAddr("::ffff:127.0.0.1"), portOf(app.Addr())), nil
		},
	})
	p.front = net.JoinHostPort("127.0.0.1", l.Addr().String()[len("[::]:"):])
	p.serveOn(t, l)
	e := p.through(t, kubelet, app)
	e.caller.Close()
	e.app.Close()
	got := p.assertEnd(t, policy.ProbeExempt)
	if got.Source != e.caller.LocalAddr().String() || got.Destination != app.Addr().String() {
		t.Errorf("the line is %+v, want %s and %s", got, e.caller.LocalAddr(), app.Addr())
	}
}

func TestApplicationThatDoesNotAnswer(t *testing.T) {
	// A port that is taken, so that nobody else gets it, but not listened on.
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: client.As4()}); err != nil {
		t.Fatal(err)
	}
	taken, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	closed := &net.TCPAddr{IP: client.AsSlice(), Port: taken.(*syscall.SockaddrInet4).Port}
	p := newPod(t, closed, proxy.InboundConfig{}).serve(t)
	p.assertTurnedAway(t, client)
	if got := p.assertEnd(t, "DIAL_FAILED"); !strings.Contains(got.Err, "connection refused") || got.Level != "WARN" {
		t.Errorf("the line is %+v, want a refused connection", got)
	}
}

// What is not TCP cannot be carried through, and is not.
func TestApplicationThatIsNoSocket(t *testing.T) {
	ours, theirs := net.Pipe()
	defer theirs.Close()
	p := newPod(t, listen(t).Addr(), proxy.InboundConfig{
		Dial: func(context.Context, netip.Addr, netip.AddrPort) (net.Conn, error) { return ours, nil },
	}).serve(t)
	p.assertTurnedAway(t, client)
	if got := p.assertEnd(t, "DIAL_FAILED"); got.Err != "a *net.pipe cannot be closed by halves, or reset" {
		t.Errorf("the line is %+v", got)
	}
	if _, err := theirs.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the other end reads %v, want that it was closed", err)
	}
}

func TestLimit(t *testing.T) {
	app := listen(t)
	p := newPod(t, app.Addr(), proxy.InboundConfig{Limit: 2}).serve(t)
	first, second := p.through(t, client, app), p.through(t, other, app)

	const beyond = 20
	for range beyond {
		p.assertTurnedAway(t, client)
	}
	if got := p.assertEnd(t, "LIMIT_REACHED"); got.Count != 1 || got.Level != "WARN" {
		t.Errorf("the line is %+v, want one that counts 1", got)
	}
	p.assertMetric(t, "connections_total", "LIMIT_REACHED", beyond)
	p.assertMetric(t, "connections_open", "", 2)
	assertUncalled(t, app)

	first.caller.Close()
	first.app.Close()
	for p.lines.next(t).Reason == "LIMIT_REACHED" { // if it all took longer than a second
	}
	p.assertMetric(t, "connections_open", "", 1)
	p.through(t, client, app)
	second.assertOpen(t)
}

// A flood is one line in a second, which says of how many.
func TestLimitIsLoggedOnceASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &broken{arrive: make(chan any, 10)}
		p := newPod(t, nil, proxy.InboundConfig{
			Limit: 1,
			Destination: func(c net.Conn) (netip.AddrPort, error) {
				_, err := c.Read(make([]byte, 1)) // until the other end closes
				return netip.AddrPort{}, err
			},
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- p.inbound.ServePlaintext(ctx, l) }()
		first, hold := newPipe()
		l.arrive <- first
		for _, tt := range []struct {
			after   time.Duration
			arrive  int
			counted []int
		}{
			{0, 5, []int{1}},
			{999 * time.Millisecond, 1, nil},
			{time.Millisecond, 3, []int{6}},
			{10 * time.Second, 1, []int{3}},
		} {
			time.Sleep(tt.after)
			for range tt.arrive {
				near, _ := newPipe()
				l.arrive <- near
			}
			synctest.Wait()
			for _, want := range tt.counted {
				if got := p.assertEnd(t, "LIMIT_REACHED"); got.Count != want {
					t.Errorf("the line counts %d, want %d", got.Count, want)
				}
			}
			if len(p.lines) > 0 {
				t.Errorf("there is a line more: %+v", <-p.lines)
			}
		}
		hold.Close()
		p.assertEnd(t, "DESTINATION_UNKNOWN")
		cancel()
		if err := <-done; err != nil {
			t.Errorf("ServePlaintext() = %v", err)
		}
	})
}

// An address that is the node's no more is nobody's.
func TestKubeletChangeCutsWhatNoLongerPasses(t *testing.T) {
	app := listen(t)
	addresses := latest.New([]netip.Addr{other, kubelet})
	p := newPod(t, app.Addr(), proxy.InboundConfig{Policy: latest.New(inForce(policy.Strict)), Kubelet: addresses}).serve(t)
	staying, going := p.through(t, kubelet, app), p.through(t, other, app)
	addresses.Set([]netip.Addr{kubelet})
	going.assertReset(t)
	if got := p.assertEnd(t, "POLICY_CHANGED"); got.Err != "it no longer passes: PLAINTEXT_REFUSED" {
		t.Errorf("the line is %+v", got)
	}
	staying.assertOpen(t)
}

// A connection that is cut in the midst of everything else, and only that one.
func TestPolicyChangeCutsWhatNoLongerPasses(t *testing.T) {
	web, admin := listen(t), listen(t)
	p := newPod(t, nil, proxy.InboundConfig{
		Destination: func(c net.Conn) (netip.AddrPort, error) {
			if c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr() == other {
				return admin.Addr().(*net.TCPAddr).AddrPort(), nil
			}
			return web.Addr().(*net.TCPAddr).AddrPort(), nil
		},
	}).serve(t)
	caller, toAdmin, probe := p.through(t, client, web), p.through(t, other, admin), p.through(t, kubelet, web)

	// PERMISSIVE and DISABLE are one to plaintext.
	p.policy.Set(inForce(policy.Disable))
	for _, e := range []ends{caller, toAdmin, probe} {
		e.assertOpen(t)
	}

	p.policy.Set(inForce(policy.Strict, policy.PortMode{Port: portOf(admin.Addr()), Mode: policy.Disable}))
	caller.assertReset(t)
	got := p.assertEnd(t, "POLICY_CHANGED")
	if got.Err != "it no longer passes: PLAINTEXT_REFUSED" || got.Policy != "istio-system/default" || got.In != 8 || got.Level != "INFO" {
		t.Errorf("the line is %+v", got)
	}
	toAdmin.assertOpen(t)
	probe.assertOpen(t)

	p.policy.Set(inForce(policy.Strict))
	toAdmin.assertReset(t)
	p.assertEnd(t, "POLICY_CHANGED")
	probe.assertOpen(t)

	p.policy.Set(nil)
	probe.assertReset(t)
	if got := p.assertEnd(t, "POLICY_CHANGED"); got.Err != "it no longer passes: POLICY_UNKNOWN" {
		t.Errorf("the line is %+v", got)
	}

	p.policy.Set(inForce(policy.Permissive))
	p.through(t, client, web)
}

// A line names the policy by which the connection passed in the end.
func TestPolicyChangeThatKeepsTheConnection(t *testing.T) {
	app := listen(t)
	p := newPod(t, app.Addr(), proxy.InboundConfig{}).serve(t)
	marker, e := p.through(t, client, app), p.through(t, kubelet, app)
	p.policy.Set(inForce(policy.Strict, policy.PortMode{Port: portOf(app.Addr()), Mode: policy.Strict}))
	marker.assertReset(t) // now the new policy is known
	p.assertEnd(t, "POLICY_CHANGED")
	e.caller.Close()
	e.app.Close()
	if got := p.assertEnd(t, policy.ProbeExempt); got.Policy != "shop/ports" {
		t.Errorf("the line is %+v, want the newest policy", got)
	}
}

// A connection in full flow is cut like an idle one.
func TestPolicyChangeCutsInFullFlow(t *testing.T) {
	app := listen(t)
	p := newPod(t, app.Addr(), proxy.InboundConfig{}).serve(t)
	e := p.through(t, client, app)
	var flows sync.WaitGroup
	for _, pair := range [][2]net.Conn{{e.caller, e.app}, {e.app, e.caller}} {
		flowing := make(chan struct{})
		flows.Go(func() { io.Copy(pair[0], zeros{}) })
		flows.Go(func() {
			if _, err := io.CopyN(io.Discard, pair[1], 32<<20); err != nil {
				t.Errorf("read: %v", err)
			}
			close(flowing)
			io.Copy(io.Discard, pair[1])
		})
		<-flowing
	}
	if in, out := p.metric(t, "bytes_total", "in"), p.metric(t, "bytes_total", "out"); in < 16<<20 || out < 16<<20 {
		t.Errorf("%v bytes in and %v out are counted of a connection that lives, want at least 16 MiB each", in, out)
	}
	p.policy.Set(inForce(policy.Strict))
	flows.Wait()
	p.assertEnd(t, "POLICY_CHANGED")
}

// While the application is dialled the caller is cut all the same, even if the
// dialling takes no notice.
func TestPolicyChangeWhileDialling(t *testing.T) {
	app := listen(t)
	dialling, answer := make(chan struct{}), make(chan struct{})
	p := newPod(t, app.Addr(), proxy.InboundConfig{
		Dial: func(ctx context.Context, source netip.Addr, destination netip.AddrPort) (net.Conn, error) {
			close(dialling)
			<-answer
			if ctx.Err() == nil {
				t.Error("the dialling was not called off")
			}
			return dialTCP(context.WithoutCancel(ctx), source, destination)
		},
	}).serve(t)
	caller := call(t, p.front, client)
	<-dialling
	p.policy.Set(inForce(policy.Strict))
	assertReset(t, "the caller", caller)
	close(answer)
	assertReset(t, "the application", accept(t, app))
	p.assertEnd(t, "POLICY_CHANGED")
}

// However a change of policy and connections interleave, none that the last policy
// refuses lives on.
func TestNoConnectionSlipsThrough(t *testing.T) {
	const callers, rounds = 20, 100
	app := listen(t)
	passed := make(chan struct{}, callers*rounds)
	go func() {
		for {
			c, err := app.Accept()
			if err != nil {
				return
			}
			passed <- struct{}{}
			go func() {
				defer c.Close()
				io.Copy(io.Discard, c)
			}()
		}
	}()
	p := newPod(t, app.Addr(), proxy.InboundConfig{Log: slog.New(slog.DiscardHandler)}).serve(t)
	for round := range rounds {
		p.policy.Set(inForce(policy.Permissive))
		var calling sync.WaitGroup
		for range callers {
			calling.Go(func() {
				if err := turnedAway(p.front, client); err != nil {
					t.Error(err)
				}
			})
		}
		for range round % callers { // the change comes at another moment in each round
			<-passed
		}
		p.policy.Set(inForce(policy.Strict))
		calling.Wait()
		for len(passed) > 0 {
			<-passed
		}
	}
}

func TestEndOfContext(t *testing.T) {
	app := listen(t)
	dialling := make(chan struct{})
	var hang atomic.Bool
	p := newPod(t, app.Addr(), proxy.InboundConfig{
		Dial: func(ctx context.Context, source netip.Addr, destination netip.AddrPort) (net.Conn, error) {
			if !hang.Load() {
				return dialTCP(ctx, source, destination)
			}
			close(dialling)
			<-ctx.Done()
			return nil, ctx.Err()
		},
	}).serve(t)
	e := p.through(t, client, app)
	half := p.through(t, client, app)
	half.caller.CloseWrite()
	if _, err := half.app.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	hang.Store(true)
	caller := call(t, p.front, client)
	<-dialling

	p.stop()
	assertNothingRuns(t)
	e.assertReset(t)
	assertReset(t, "the caller who said that it was done", half.caller)
	assertDead(t, "its application", half.app)
	assertReset(t, "the caller whose application was dialled", caller)
	for range 3 {
		p.assertEnd(t, "AGENT_STOPPED")
	}
	p.assertMetric(t, "connections_open", "", 0)
	p.assertMetric(t, "connections_total", "AGENT_STOPPED", 3)
}

func TestListenerClosedByOthers(t *testing.T) {
	app, l := listen(t), listen(t)
	p := newPod(t, app.Addr(), proxy.InboundConfig{})
	p.front = l.Addr().String()
	done := make(chan error, 1)
	go func() { done <- p.inbound.ServePlaintext(t.Context(), l) }()
	e := p.through(t, client, app)
	l.Close()
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("ServePlaintext() = %v, want net.ErrClosed", err)
	}
	e.assertReset(t)
	assertNothingRuns(t)
}

// What arrives or is dialled while the proxy ends is told so, too.
func TestEndOfContextBeforeAnythingElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &broken{arrive: make(chan any, 2), closing: time.Second}
		asked := make(chan struct{})
		p := newPod(t, nil, proxy.InboundConfig{
			Destination: func(c net.Conn) (netip.AddrPort, error) {
				if c.(*pipe).slow {
					<-asked
				}
				return netip.AddrPortFrom(client, 80), nil
			},
			Dial: func(ctx context.Context, _ netip.Addr, _ netip.AddrPort) (net.Conn, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			},
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- p.inbound.ServePlaintext(ctx, l) }()
		dialled, _ := newPipe()
		arrived, _ := newPipe()
		arrived.slow = true
		l.arrive <- dialled
		l.arrive <- arrived
		synctest.Wait()

		begun := time.Now()
		cancel()
		p.assertEnd(t, "AGENT_STOPPED")
		if time.Since(begun) != time.Second {
			t.Errorf("a connection ended %v after the context, want 1s: when the listener was closed", time.Since(begun))
		}
		synctest.Wait()
		select {
		case err := <-done:
			t.Errorf("ServePlaintext() = %v before the last connection has ended", err)
		default:
		}
		close(asked)
		p.assertEnd(t, "AGENT_STOPPED")
		if err := <-done; err != nil {
			t.Errorf("ServePlaintext() = %v", err)
		}
	})
}

func TestTwoListenersShareTheLimit(t *testing.T) {
	app, l := listen(t), listen(t)
	p := newPod(t, app.Addr(), proxy.InboundConfig{Limit: 1}).serve(t)
	stop := p.serveOn(t, l)
	e := p.through(t, client, app)
	if err := turnedAway(l.Addr().String(), client); err != nil {
		t.Error(err)
	}
	stop()
	e.assertOpen(t) // the end of one is nothing to the other
	p.policy.Set(inForce(policy.Strict))
	e.assertReset(t)
}

// broken is a listener of what arrives, connections and errors.
type broken struct {
	net.Listener

	arrive  chan any
	calls   atomic.Int64
	closing time.Duration // that Close takes
}

func (b *broken) Accept() (net.Conn, error) {
	b.calls.Add(1)
	switch next := (<-b.arrive).(type) {
	case net.Conn:
		return next, nil
	case error:
		return nil, next
	default:
		return nil, net.ErrClosed
	}
}

func (b *broken) Close() error {
	time.Sleep(b.closing)
	close(b.arrive)
	return nil
}

func (b *broken) Addr() net.Addr { return &net.TCPAddr{Port: 15006} }

// pipe is one end of a connection in memory that counts what it is asked.
type pipe struct {
	net.Conn

	reads atomic.Int64
	slow  bool // for a test to say what it likes
}

func newPipe() (near, far *pipe) {
	a, b := net.Pipe()
	return &pipe{Conn: a}, &pipe{Conn: b}
}

func (p *pipe) Read(b []byte) (int, error) { p.reads.Add(1); return p.Conn.Read(b) }
func (p *pipe) CloseWrite() error          { return nil } // a pipe has no halves
func (p *pipe) SetLinger(int) error        { return nil }
func (p *pipe) RemoteAddr() net.Addr       { return &net.TCPAddr{IP: client.AsSlice(), Port: 40000} }

var errTooMany = &net.OpError{Op: "accept", Net: "tcp", Err: syscall.EMFILE}

func TestAcceptErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &broken{arrive: make(chan any, 100)}
		p := newPod(t, &net.TCPAddr{IP: client.AsSlice(), Port: 80}, proxy.InboundConfig{
			Policy: latest.New(inForce(policy.Strict)),
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- p.inbound.ServePlaintext(ctx, l) }()

		for range 20 {
			l.arrive <- errTooMany
		}
		begun, total := time.Now(), time.Duration(0)
		for n := range 20 {
			want := min(5*time.Millisecond<<n, time.Second)
			got := p.lines.next(t)
			if got.Pause != want || time.Since(begun) != total || !strings.Contains(got.Err, "too many open files") {
				t.Fatalf("error %d after %v: the line is %+v, want a pause of %v after %v", n, time.Since(begun), got, want, total)
			}
			total += want
		}
		near, far := newPipe()
		l.arrive <- near
		p.assertEnd(t, policy.PlaintextRefused)
		if n := near.reads.Load(); n > 0 {
			t.Errorf("a refused caller was read from %d times", n)
		}
		if _, err := far.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("a refused caller reads %v, want the end", err)
		}
		// After a connection that came, the pauses begin anew.
		l.arrive <- errTooMany
		if got := p.lines.next(t).Pause; got != 5*time.Millisecond {
			t.Errorf("the pause is %v, want 5ms", got)
		}
		// What cannot be served is closed, and no end of the service either.
		a, b := net.Pipe()
		l.arrive <- a
		if got := p.lines.next(t); got.Err != "a *net.pipe cannot be closed by halves, or reset" {
			t.Errorf("the line is %+v", got)
		}
		if _, err := b.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("its other end reads %v, want the end", err)
		}
		// The end of the context ends a pause.
		calls, begun := l.calls.Load(), time.Now()
		cancel()
		if err := <-done; err != nil || l.calls.Load() > calls || time.Since(begun) > 0 {
			t.Errorf("ServePlaintext() = %v after %v and %d more calls, want nil at once", err, time.Since(begun), l.calls.Load()-calls)
		}
	})
}

func TestDiallingIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &broken{arrive: make(chan any, 1)}
		p := newPod(t, &net.TCPAddr{IP: client.AsSlice(), Port: 80}, proxy.InboundConfig{
			Dial: func(ctx context.Context, _ netip.Addr, _ netip.AddrPort) (net.Conn, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			},
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- p.inbound.ServePlaintext(ctx, l) }()
		near, far := newPipe()
		l.arrive <- near
		begun := time.Now()
		if _, err := far.Read(make([]byte, 1)); !errors.Is(err, io.EOF) || time.Since(begun) != 5*time.Second {
			t.Errorf("the caller reads %v after %v, want the end after 5s", err, time.Since(begun))
		}
		if got := p.assertEnd(t, "DIAL_FAILED"); got.Err != context.DeadlineExceeded.Error() || got.Duration != 5*time.Second {
			t.Errorf("the line is %+v", got)
		}
		if n := near.reads.Load(); n > 0 {
			t.Errorf("the caller was read from %d times before there was anybody to read for", n)
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("ServePlaintext() = %v", err)
		}
	})
}

// Whoever is there now was seen at most a minute ago, and is seen off.
func TestPeersOfLongConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &broken{arrive: make(chan any, 1)}
		app, theirs := newPipe()
		p := newPod(t, &net.TCPAddr{IP: client.AsSlice(), Port: 80}, proxy.InboundConfig{
			Dial: func(context.Context, netip.Addr, netip.AddrPort) (net.Conn, error) { return app, nil },
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- p.inbound.ServePlaintext(ctx, l) }()
		near, far := newPipe()
		l.arrive <- near
		synctest.Wait()
		if got := p.peers.Recent(time.Now()); len(got) != 1 {
			t.Errorf("Recent(now) = %v, want the connection that has just begun", got)
		}
		time.Sleep(10*time.Hour + 90*time.Second)
		synctest.Wait()
		if got := p.peers.Recent(time.Now().Add(-time.Minute)); len(got) != 1 || time.Since(got[0].Last) != 30*time.Second {
			t.Errorf("Recent(a minute ago) = %v, want the open connection, as of 30s ago", got)
		}
		far.Close()
		theirs.Close()
		p.assertEnd(t, policy.PlaintextAccepted)
		if got := p.peers.Recent(time.Now()); len(got) != 1 {
			t.Errorf("Recent(now) = %v, want the connection that ended now", got)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if got := p.peers.Recent(time.Now().Add(-59 * time.Minute)); len(got) != 0 {
			t.Errorf("Recent(59 minutes ago) = %v, want nobody an hour after the end", got)
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("ServePlaintext() = %v", err)
		}
	})
}

func TestPeersAreThoseWhomStrictWouldRefuse(t *testing.T) {
	app := listen(t)
	p := newPod(t, app.Addr(), proxy.InboundConfig{}).serve(t)
	before := time.Now()
	for _, from := range []netip.Addr{kubelet, client, other, client} {
		p.through(t, from, app)
	}
	p.policy.Set(inForce(policy.Strict))
	for range 3 {
		p.assertEnd(t, "POLICY_CHANGED")
	}
	refused := netip.MustParseAddr("127.0.0.9")
	p.assertTurnedAway(t, refused)
	got := p.peers.Recent(before)
	if len(got) != 2 {
		t.Fatalf("Recent() = %v, want two peers", got)
	}
	for _, peer := range got {
		if peer.Pod != podUID || peer.Port != portOf(app.Addr()) || (peer.Source != client && peer.Source != other) {
			t.Errorf("Recent() has %+v", peer)
		}
	}
}

func TestNewInboundRefuses(t *testing.T) {
	metrics, err := proxy.NewMetrics(prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	good := proxy.InboundConfig{
		Policy: latest.New(inForce(policy.Permissive)), Destination: to(&net.TCPAddr{}), Dial: dialTCP,
		Log: slog.New(slog.DiscardHandler), Metrics: metrics,
	}
	if _, err := proxy.NewInbound(good); err != nil {
		t.Fatalf("NewInbound() = %v, want nil for what is required", err)
	}
	for name, tt := range map[string]struct {
		spoil func(*proxy.InboundConfig)
		want  string
	}{
		"no Policy":        {func(c *proxy.InboundConfig) { c.Policy = nil }, "proxy: Policy, Destination and Dial are required"},
		"no Destination":   {func(c *proxy.InboundConfig) { c.Destination = nil }, "proxy: Policy, Destination and Dial are required"},
		"no Dial":          {func(c *proxy.InboundConfig) { c.Dial = nil }, "proxy: Policy, Destination and Dial are required"},
		"no Log":           {func(c *proxy.InboundConfig) { c.Log = nil }, "proxy: Log and Metrics are required"},
		"no Metrics":       {func(c *proxy.InboundConfig) { c.Metrics = nil }, "proxy: Log and Metrics are required"},
		"a negative Limit": {func(c *proxy.InboundConfig) { c.Limit = -1 }, "proxy: negative Limit -1 or Drain 0s"},
	} {
		t.Run(name, func(t *testing.T) {
			c := good
			tt.spoil(&c)
			if i, err := proxy.NewInbound(c); i != nil || err == nil || err.Error() != tt.want {
				t.Errorf("NewInbound() = %v, %v, want the error %q", i, err, tt.want)
			}
		})
	}
}

func TestMetricsAreRegisteredOnce(t *testing.T) {
	registry := prometheus.NewRegistry()
	if _, err := proxy.NewMetrics(registry); err != nil {
		t.Fatal(err)
	}
	if m, err := proxy.NewMetrics(registry); err == nil || m != nil {
		t.Errorf("NewMetrics() = %v, %v the second time, want an error", m, err)
	}
}
