package hbone_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

	"troth.dev/troth/agent/hbone"
)

// goroutines returns how many of this package run, and where.
func goroutines() (int, string) {
	stacks := make([]byte, 1<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	n := 0
	var where []string
	for each := range strings.SplitSeq(string(stacks), "\n\n") {
		if strings.Contains(each, "/agent/hbone.") && !strings.Contains(each, "hbone_test.go") {
			n++
			where = append(where, each)
		}
	}
	return n, strings.Join(where, "\n\n")
}

// assertGoroutines waits until want of them run.
func assertGoroutines(t *testing.T, want int) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; runtime.Gosched() {
		n, where := goroutines()
		if n == want {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines run, want %d:\n%s", n, want, where)
		}
	}
}

// A stream that is idle takes one goroutine at each end, and one that has ended none,
// however it ended.
func TestGoroutines(t *testing.T) {
	assertGoroutines(t, 0)
	n := newChain(t, hbone.Config{}, hbone.Buffer, wraps["TCP"])
	assertGoroutines(t, 2) // one at each end of the tunnel
	type ends struct{ caller, app *net.TCPConn }
	var open []ends
	for range 10 {
		caller, app := n.through(t)
		send(t, caller, []byte("x"))
		io.ReadFull(app, make([]byte, 1))
		open = append(open, ends{caller, app})
	}
	assertGoroutines(t, 2+2*10)
	for at, e := range open {
		switch at % 5 {
		case 0:
			e.caller.Close()
			e.app.Close()
		case 1:
			e.caller.CloseWrite()
			e.app.Close()
		case 2:
			e.caller.SetLinger(0)
			e.caller.Close()
		case 3:
			e.app.SetLinger(0)
			e.app.Close()
		case 4:
			// A reset while neither application reads and all windows are full.
			var filling sync.WaitGroup
			for _, c := range []*net.TCPConn{e.caller, e.app} {
				c.SetDeadline(time.Now().Add(time.Second))
				filling.Go(func() { io.Copy(c, zeros{}) })
			}
			filling.Wait()
			e.caller.SetLinger(0)
			e.caller.Close()
		}
	}
	for range 2 * 10 {
		<-n.ends
	}
	assertGoroutines(t, 2)
	if left := n.tunnel.Streams(); left != 0 {
		t.Errorf("%d streams are left", left)
	}
	n.tunnel.Close()
	assertGoroutines(t, 0)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// An application that does not read stalls nobody else, and what is held for it is no
// more than a window.
func TestStalledApplication(t *testing.T) {
	n := newChain(t, hbone.Config{}, hbone.Buffer, wraps["TCP"])
	var stalled []*net.TCPConn
	for range 20 { // of 4 MB each they would fill the tunnel's window 5 times
		caller, _ := n.through(t)
		stalled = append(stalled, caller)
	}
	var filling sync.WaitGroup
	for _, c := range stalled {
		c.SetWriteDeadline(time.Now().Add(2 * time.Second))
		filling.Go(func() { io.Copy(c, zeros{}) })
	}
	caller, app := n.through(t)
	message := bytes.Repeat([]byte("x"), 5<<20)
	var sending sync.WaitGroup
	sending.Go(func() {
		send(t, caller, message)
		caller.CloseWrite()
	})
	assertReads(t, app, message)
	sending.Wait()
	filling.Wait()
	app.Close()
	for range 2 {
		<-n.ends
	}
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	if held := m.HeapInuse >> 20; held > 20*4+32 {
		t.Errorf("%d MB are held for 20 windows of 4 MB", held)
	}
	for _, c := range stalled {
		c.SetLinger(0)
		c.Close()
	}
	for range 40 {
		<-n.ends
	}
}

// pipe is a tunnel whose ends are in a bubble: net.Pipe has no buffer, and time passes
// when both ends wait.
func pipe(t *testing.T) (*hbone.Tunnel, net.Conn) {
	ours, theirs := net.Pipe()
	tunnel, err := hbone.Open(ours, hbone.Config{})
	if err != nil {
		t.Fatal(err)
	}
	return tunnel, theirs
}

// A tunnel that is silent asks whether the peer lives, and lives as long as that
// answers.
func TestKeepAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tunnel, theirs := pipe(t)
		began := time.Now()
		io.ReadFull(theirs, make([]byte, len(http2.ClientPreface)))
		f := http2.NewFramer(theirs, theirs)
		f.WriteSettings()
		for range 10 {
			for {
				frame, err := f.ReadFrame()
				if err != nil {
					t.Fatal(err)
				}
				if ping, ok := frame.(*http2.PingFrame); ok {
					f.WritePing(true, ping.Data)
					break
				}
			}
		}
		if took := time.Since(began); took < 100*time.Second || took > 210*time.Second {
			t.Errorf("10 questions took %v, want one in 10 to 20 s", took)
		}
		// It dies.
		died := time.Now()
		go io.Copy(io.Discard, theirs)
		<-tunnel.Done()
		if took := time.Since(died); took < 20*time.Second || took > 45*time.Second {
			t.Errorf("the dead peer was noticed after %v, want 30 s", took)
		}
		if err := tunnel.Err(); err == nil || !strings.Contains(err.Error(), "said nothing") {
			t.Errorf("the tunnel ended with %v", err)
		}
		theirs.Close()
	})
}

// A peer that speaks and does not read is dead too, and whoever writes to it hears so.
func TestPeerNeverReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tunnel, theirs := pipe(t)
		stop := make(chan struct{})
		var talking sync.WaitGroup
		talking.Go(func() {
			f := http2.NewFramer(theirs, nil)
			f.WriteSettings()
			for {
				select {
				case <-stop:
					return
				case <-time.After(time.Second):
					f.WritePing(true, [8]byte{})
				}
			}
		})
		began := time.Now()
		_, _, err := tunnel.Connect(context.Background(), "10.0.0.1:80", nil)
		if err == nil || !strings.Contains(err.Error(), "read nothing") {
			t.Errorf("the error of Connect is %v", err)
		}
		if took := time.Since(began); took > 45*time.Second {
			t.Errorf("it took %v", took)
		}
		<-tunnel.Done()
		close(stop)
		theirs.Close()
		talking.Wait()
	})
}

// Connect waits as long as its context, and the peer hears that nobody waits any more.
func TestConnectGivenUp(t *testing.T) {
	asked, gone := make(chan struct{}), make(chan struct{})
	tunnel := tunnel(t, hbone.Config{}, func(r *hbone.Request) {
		close(asked)
		<-r.Done()
		if _, err := r.Accept(nil); err == nil {
			t.Error("a request that was given up can be accepted")
		}
		close(gone)
	})
	why := errors.New("enough")
	ctx, cancel := context.WithCancelCause(context.Background())
	go func() {
		<-asked
		cancel(why)
	}()
	if _, _, err := tunnel.Connect(ctx, "10.0.0.1:80", nil); !errors.Is(err, why) || errors.Is(err, hbone.ErrUnprocessed) {
		t.Errorf("the error is %v, want the context's cause", err)
	}
	<-gone
}

// Whoever ends the context of Serve cuts every stream at once.
func TestServeIsCut(t *testing.T) {
	caller, callee := securePair(t, hbone.Buffer)
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() { result <- hbone.Serve(ctx, callee, hbone.Config{}, echo) }()
	tunnel, err := hbone.Open(caller, hbone.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer tunnel.Close()
	s := connect(t, tunnel, "10.0.0.1:80")
	cancel()
	if err := <-result; err != nil {
		t.Errorf("Serve returned %v", err)
	}
	if _, err := s.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("the stream ended with %v, want an error", err)
	}
	<-tunnel.Done()
}

// A handler that returns without an answer has made none.
func TestNoAnswer(t *testing.T) {
	tunnel := tunnel(t, hbone.Config{}, func(*hbone.Request) {})
	_, _, err := tunnel.Connect(context.Background(), "10.0.0.1:80", nil)
	if err == nil || !strings.Contains(err.Error(), "INTERNAL_ERROR") || errors.Is(err, hbone.ErrUnprocessed) {
		t.Errorf("the error is %v, want INTERNAL_ERROR", err)
	}
}

// The caller keeps to what the callee allows.
func TestMaxStreams(t *testing.T) {
	p, tunnel := rawCallee(t, http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 2})
	next(t, p, func(f *http2.SettingsFrame) bool { return f.IsAck() })
	for n := range 2 {
		if !tunnel.Available() {
			t.Fatalf("the tunnel takes no more than %d streams", n)
		}
		go tunnel.Connect(context.Background(), fmt.Sprintf("10.0.0.1:%d", n+1), nil)
		next[*http2.MetaHeadersFrame](t, p, nil)
	}
	if tunnel.Available() {
		t.Error("the tunnel takes a third stream")
	}
	if _, _, err := tunnel.Connect(context.Background(), "10.0.0.1:80", nil); !errors.Is(err, hbone.ErrUnprocessed) {
		t.Errorf("the error is %v, want ErrUnprocessed", err)
	}
}
