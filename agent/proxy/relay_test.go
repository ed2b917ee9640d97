package proxy_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"troth.dev/troth/agent/proxy"
	"troth.dev/troth/policy"
)

// Each of the two ends may be the first to say that it is done, and the other goes
// on as long as it likes.
func TestHalfClose(t *testing.T) {
	app := listen(t)
	p := newPod(t, app.Addr(), proxy.InboundConfig{}).serve(t)
	before, after := make([]byte, 100_000), make([]byte, 5<<20)
	rand.Read(before)
	rand.Read(after)
	for name, order := range map[string]func(ends) (first, last *net.TCPConn){
		"the caller first":      func(e ends) (first, last *net.TCPConn) { return e.caller, e.app },
		"the application first": func(e ends) (first, last *net.TCPConn) { return e.app, e.caller },
	} {
		t.Run(name, func(t *testing.T) {
			e := p.through(t, client, app)
			first, last := order(e)
			send(t, first, before)
			first.CloseWrite()
			assertReads(t, last, before)
			var sending sync.WaitGroup
			sending.Go(func() {
				send(t, last, after)
				last.CloseWrite()
			})
			assertReads(t, first, after)
			sending.Wait()
			got := p.assertEnd(t, policy.PlaintextAccepted)
			if got.In+got.Out != int64(8+len(before)+len(after)) || got.Err != "" {
				t.Errorf("the line is %+v, want %d bytes", got, 8+len(before)+len(after))
			}
		})
	}
}

func send(t *testing.T, c net.Conn, b []byte) {
	t.Helper()
	if _, err := c.Write(b); err != nil {
		t.Errorf("write: %v", err)
	}
}

// assertReads reads to the end, which must be one.
func assertReads(t *testing.T, c net.Conn, want []byte) {
	t.Helper()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("read %d bytes and then %v, want the %d that were sent, and the end", len(got), err, len(want))
	}
}

func TestResetGoesThrough(t *testing.T) {
	app := listen(t)
	p := newPod(t, app.Addr(), proxy.InboundConfig{}).serve(t)
	for _, tt := range []struct {
		name  string
		order func(ends) (resets, hears *net.TCPConn)
	}{
		{"by the caller", func(e ends) (_, _ *net.TCPConn) { return e.caller, e.app }},
		{"by the application", func(e ends) (_, _ *net.TCPConn) { return e.app, e.caller }},
	} {
		for _, half := range []string{"", "resets", "hears"} {
			t.Run(tt.name+" after the end of "+half, func(t *testing.T) {
				resets, hears := tt.order(p.through(t, client, app))
				switch half {
				case "resets":
					resets.CloseWrite()
					assertReads(t, hears, nil)
				case "hears":
					hears.CloseWrite()
					assertReads(t, resets, nil)
				}
				resets.SetLinger(0)
				resets.Close()
				if half == "resets" {
					assertDead(t, "the other end", hears)
				} else {
					assertReset(t, "the other end", hears)
				}
				if got := p.assertEnd(t, "CONNECTION_BROKEN"); got.Err == "" || got.Level != "INFO" {
					t.Errorf("the line is %+v, want an error", got)
				}
			})
		}
	}
}

// An application that answers before it has heard all, and is gone: the caller gets
// the answer, and the reset after it, however the two directions interleave.
func TestAnswerBeforeReset(t *testing.T) {
	app := listen(t)
	p := newPod(t, app.Addr(), proxy.InboundConfig{}).serve(t)
	const answer = "413 Content Too Large"
	for n := range 500 {
		e := p.through(t, client, app)
		var sending sync.WaitGroup
		var write error
		sending.Go(func() { _, write = io.Copy(e.caller, zeros{}) })
		readN(t, e.app, 1)
		send(t, e.app, []byte(answer))
		e.app.Close() // resets: there is more to read
		got, read := io.ReadAll(e.caller)
		sending.Wait()
		// The kernel tells of a reset once, the reader or the writer, and of one that
		// comes after an end only as a broken pipe.
		if string(got) != answer || !errors.Is(errors.Join(read, write), syscall.ECONNRESET) {
			t.Fatalf("call %d: the caller reads %q, and then %v, and writes, and then %v, want %q and a reset", n, got, read, write, answer)
		}
		p.assertEnd(t, "CONNECTION_BROKEN")
	}
}

// late is a connection whose reader starts when a write has failed, and whose writer
// tells of that when it is let.
type late struct {
	*net.TCPConn

	failed, tell chan struct{}
}

func (l late) Read(b []byte) (int, error) {
	<-l.failed
	return l.TCPConn.Read(b)
}

func (l late) ReadFrom(r io.Reader) (int64, error) {
	n, err := l.TCPConn.ReadFrom(r)
	if err != nil {
		close(l.failed)
		<-l.tell
	}
	return n, err
}

// The kernel has told the writer of the reset, so that the reader sees an end. The
// caller must not take it for one, though nobody knows better yet.
func TestResetThatLooksLikeAnEnd(t *testing.T) {
	app := listen(t)
	tell := make(chan struct{})
	p := newPod(t, app.Addr(), proxy.InboundConfig{
		Dial: func(ctx context.Context, source netip.Addr, destination netip.AddrPort) (net.Conn, error) {
			c, err := dialTCP(ctx, source, destination)
			if err != nil {
				return nil, err
			}
			return late{c.(*net.TCPConn), make(chan struct{}), tell}, nil
		},
	}).serve(t)
	caller := call(t, p.front, client)
	callee := accept(t, app)
	var sending sync.WaitGroup
	var write error
	sending.Go(func() { _, write = io.Copy(caller, zeros{}) })
	readN(t, callee, 1)
	send(t, callee, []byte("half an ans"))
	callee.Close()
	got, read := io.ReadAll(caller)
	close(tell)
	sending.Wait()
	if string(got) != "half an ans" || !errors.Is(errors.Join(read, write), syscall.ECONNRESET) {
		t.Errorf("the caller reads %q, and then %v, and writes, and then %v, want the half and a reset", got, read, write)
	}
	p.assertEnd(t, "CONNECTION_BROKEN")
}

// watched tells of its Close.
type watched struct {
	*net.TCPConn

	closed *atomic.Int64
}

func (w watched) Close() error {
	w.closed.Add(1)
	return w.TCPConn.Close()
}

type watchedListener struct {
	*net.TCPListener

	closed *atomic.Int64
}

func (w watchedListener) Accept() (net.Conn, error) {
	c, err := w.AcceptTCP()
	return watched{c, w.closed}, err
}

// A connection that both ends have ended takes up nothing more.
func TestEndedIsClosed(t *testing.T) {
	app, l := listen(t), listen(t)
	var callers, apps atomic.Int64
	p := newPod(t, app.Addr(), proxy.InboundConfig{
		Dial: func(ctx context.Context, source netip.Addr, destination netip.AddrPort) (net.Conn, error) {
			c, err := dialTCP(ctx, source, destination)
			if err != nil {
				return nil, err
			}
			return watched{c.(*net.TCPConn), &apps}, nil
		},
	})
	p.front = l.Addr().String()
	p.serveOn(t, watchedListener{l, &callers})
	e := p.through(t, client, app)
	e.caller.CloseWrite()
	assertReads(t, e.app, nil)
	if callers.Load()+apps.Load() > 0 {
		t.Error("what has ended by half is closed")
	}
	e.app.CloseWrite()
	p.assertEnd(t, policy.PlaintextAccepted)
	if callers.Load() != 1 || apps.Load() != 1 {
		t.Errorf("the two were closed %d and %d times, want once each", callers.Load(), apps.Load())
	}
}

// Both ends at once say that they are done: no end is a reset.
func TestBothEndAtOnce(t *testing.T) {
	app := listen(t)
	p := newPod(t, app.Addr(), proxy.InboundConfig{}).serve(t)
	for range 500 {
		e := p.through(t, client, app)
		var both sync.WaitGroup
		for _, c := range []*net.TCPConn{e.caller, e.app} {
			both.Go(func() {
				send(t, c, []byte("bye"))
				c.CloseWrite()
				if got, err := io.ReadAll(c); string(got) != "bye" || err != nil {
					t.Errorf("read %q and then %v, want the other's bye, and the end", got, err)
				}
			})
		}
		both.Wait()
		p.assertEnd(t, policy.PlaintextAccepted)
	}
}
