package proxy_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"sync"
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
			if got.In+got.Out != int64(len(before)+len(after)) || got.Err != "" {
				t.Errorf("the line is %+v, want %d bytes", got, len(before)+len(after))
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
