package hbone_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"troth.dev/troth/agent/hbone"
)

// chain is two applications with a relay at each end of a tunnel between them.
type chain struct {
	tunnel *hbone.Tunnel
	app    *net.TCPListener // what the callee's end dials
	ends   chan ended       // of the relays, both ends'
	caller func(net.Conn) hbone.Conn
}

type ended struct {
	side           string
	err            error
	sent, received int64
}

func newChain(tb testing.TB, c hbone.Config, buffer func(net.Conn) net.Conn, wrap func(*net.TCPConn) hbone.Conn) *chain {
	tb.Helper()
	n := &chain{app: listen(tb), ends: make(chan ended, 10_000)}
	n.caller = func(c net.Conn) hbone.Conn { return wrap(c.(*net.TCPConn)) }
	caller, callee := securePair(tb, buffer)
	n.tunnel = tunnelOn(tb, caller, callee, c, func(r *hbone.Request) {
		app, err := net.Dial("tcp", n.app.Addr().String())
		if err != nil {
			r.Refuse(503)
			return
		}
		s, err := r.Accept(nil)
		if err != nil {
			app.Close()
			return
		}
		n.relay("callee", s, wrap(app.(*net.TCPConn)))
	})
	return n
}

func (n *chain) relay(side string, s *hbone.Stream, app hbone.Conn) {
	var sent, received atomic.Int64
	err := s.Relay(app, func(n int64) { sent.Add(n) }, func(n int64) { received.Add(n) })
	n.ends <- ended{side, err, sent.Load(), received.Load()}
}

// through returns both ends of a new connection through the tunnel.
func (n *chain) through(tb testing.TB) (caller, app *net.TCPConn) {
	tb.Helper()
	caller, front := socketPair(tb)
	s := connect(tb, n.tunnel, n.app.Addr().String())
	go n.relay("caller", s, n.caller(front))
	app, err := n.app.AcceptTCP()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { app.Close() })
	return caller, app
}

// plain is a Conn that is not a *net.TCPConn.
type plain struct{ hbone.Conn }

var wraps = map[string]func(*net.TCPConn) hbone.Conn{
	"TCP":    func(c *net.TCPConn) hbone.Conn { return c },
	"others": func(c *net.TCPConn) hbone.Conn { return plain{c} },
}

func TestHalfClose(t *testing.T) {
	before, after := make([]byte, 100_000), make([]byte, 6<<20)
	rand.Read(before)
	rand.Read(after)
	for name, wrap := range wraps {
		n := newChain(t, hbone.Config{}, hbone.Buffer, wrap)
		for _, order := range []string{"the caller first", "the application first"} {
			t.Run(name+", "+order, func(t *testing.T) {
				first, last := n.through(t)
				if order != "the caller first" {
					first, last = last, first
				}
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
				for range 2 {
					end := <-n.ends
					if end.err != nil || end.sent+end.received != int64(len(before)+len(after)) {
						t.Errorf("the relay returned %+v, want %d bytes", end, len(before)+len(after))
					}
				}
			})
		}
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
	for name, wrap := range wraps {
		n := newChain(t, hbone.Config{}, hbone.Buffer, wrap)
		for _, by := range []string{"the caller", "the application"} {
			for _, half := range []string{"nobody", "who resets", "who hears"} {
				if name == "others" && half == "who resets" {
					continue // only the kernel tells of a reset after an end
				}
				t.Run(name+", by "+by+" after the end of "+half, func(t *testing.T) {
					resets, hears := n.through(t)
					if by != "the caller" {
						resets, hears = hears, resets
					}
					switch half {
					case "who resets":
						resets.CloseWrite()
						assertReads(t, hears, nil)
					case "who hears":
						hears.CloseWrite()
						assertReads(t, resets, nil)
					}
					resets.SetLinger(0)
					resets.Close()
					if half != "who resets" {
						if _, err := io.ReadAll(hears); !errors.Is(err, syscall.ECONNRESET) {
							t.Errorf("the other end reads %v, want a reset", err)
						}
					}
					for range 2 {
						if end := <-n.ends; end.err == nil {
							t.Errorf("the relay at the %s's end returned no error", end.side)
						}
					}
				})
			}
		}
	}
}

// An application that answers before it has heard all, and is gone: the caller gets
// the answer, and the reset after it, however the two directions interleave.
func TestAnswerBeforeReset(t *testing.T) {
	n := newChain(t, hbone.Config{}, hbone.Buffer, wraps["TCP"])
	const answer = "413 Content Too Large"
	for call := range 300 {
		caller, app := n.through(t)
		var sending sync.WaitGroup
		var write error
		sending.Go(func() { _, write = io.Copy(caller, zeros{}) })
		if _, err := io.ReadFull(app, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		send(t, app, []byte(answer))
		app.Close() // resets: there is more to read
		got, read := io.ReadAll(caller)
		sending.Wait()
		// The kernel tells of a reset once, the reader or the writer, and of one that
		// comes after an end only as a broken pipe.
		if string(got) != answer || !errors.Is(errors.Join(read, write), syscall.ECONNRESET) {
			t.Fatalf("call %d: the caller reads %q, and then %v, and writes, and then %v, want %q and a reset", call, got, read, write, answer)
		}
		for range 2 {
			if end := <-n.ends; end.err == nil {
				t.Errorf("the relay at the %s's end returned no error", end.side)
			}
		}
		caller.Close()
	}
}
