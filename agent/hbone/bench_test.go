package hbone_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"troth.dev/troth/agent/hbone"
	"troth.dev/troth/test/tuned"
)

// pair is two proxies, one after the other, between a caller and an application.
type pair struct {
	name  string
	begin func(tb testing.TB, app net.Addr) (front string)
}

var pairs = []pair{
	{"plain", plainPair},
	{"tls", tlsPair},
	{"hbone", hbonePair},
}

// serveEach calls serve for each connection that l accepts, until the benchmark ends.
func serveEach(tb testing.TB, l *net.TCPListener, serve func(*net.TCPConn)) {
	var mu sync.Mutex
	open := make(map[*net.TCPConn]struct{})
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = struct{}{}
			mu.Unlock()
			running.Go(func() {
				serve(c)
				c.Close()
				mu.Lock()
				delete(open, c)
				mu.Unlock()
			})
		}
	})
	tb.Cleanup(func() {
		l.Close()
		mu.Lock()
		for c := range open {
			c.Close()
		}
		mu.Unlock()
		running.Wait()
	})
}

// plainPair relays by io.Copy, which splices.
func plainPair(tb testing.TB, app net.Addr) string {
	hop := func(to net.Addr) net.Addr {
		l := listen(tb)
		serveEach(tb, l, func(c *net.TCPConn) {
			out, err := net.Dial("tcp", to.String())
			if err != nil {
				return
			}
			join(c, out.(*net.TCPConn), func(to, from hbone.Conn) { io.Copy(to.(*net.TCPConn), from) })
		})
		return l.Addr()
	}
	return hop(hop(app)).String()
}

func join(a, b hbone.Conn, copy func(to, from hbone.Conn)) {
	var both sync.WaitGroup
	both.Go(func() {
		copy(a, b)
		a.CloseWrite()
	})
	copy(b, a)
	b.CloseWrite()
	both.Wait()
	a.Close()
	b.Close()
}

// tlsPair is crypto/tls as well as it can be had: what lies beneath it reads and writes
// many records at once, and what lies above 256 KB.
func tlsPair(tb testing.TB, app net.Addr) string {
	back := listen(tb)
	serveEach(tb, back, func(c *net.TCPConn) {
		t := tuned.New(c, func(c net.Conn) *tls.Conn { return tls.Client(c, identities().callee) })
		if t.Handshake() != nil {
			return
		}
		out, err := net.Dial("tcp", app.String())
		if err != nil {
			return
		}
		t.Join(out.(*net.TCPConn))
	})
	front := listen(tb)
	serveEach(tb, front, func(c *net.TCPConn) {
		out, err := net.Dial("tcp", back.Addr().String())
		if err != nil {
			return
		}
		t := tuned.New(out.(*net.TCPConn), func(c net.Conn) *tls.Conn { return tls.Server(c, identities().caller) })
		if t.Handshake() != nil {
			out.Close()
			return
		}
		t.Join(c)
	})
	return front.Addr().String()
}

func hbonePair(tb testing.TB, app net.Addr) string {
	caller, callee := securePair(tb, hbone.Buffer)
	t := tunnelOn(tb, caller, callee, hbone.Config{}, func(r *hbone.Request) {
		c, err := net.Dial("tcp", app.String())
		if err != nil {
			r.Refuse(503)
			return
		}
		s, err := r.Accept(nil)
		if err != nil {
			c.Close()
			return
		}
		s.Relay(c.(*net.TCPConn), nil, nil)
	})
	front := listen(tb)
	serveEach(tb, front, func(c *net.TCPConn) {
		s, _, err := t.Connect(context.Background(), app.String(), nil)
		if err != nil {
			return
		}
		s.Relay(c, nil, nil)
	})
	return front.Addr().String()
}

// cpu is what this process has used, user and system: proxies, caller and application.
func cpu() time.Duration {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		panic(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// BenchmarkBulk moves a gigabyte, so to speak: what the ends cost without any proxy
// is the row "none", and is in all the others.
func BenchmarkBulk(b *testing.B) {
	for _, streams := range []int{1, 8} {
		for _, direction := range []string{"up", "down"} {
			for _, p := range append([]pair{{"none", nil}}, pairs...) {
				b.Run(fmt.Sprintf("%s/%d/%s", direction, streams, p.name), func(b *testing.B) {
					app := listen(b)
					front := app.Addr().String()
					if p.begin != nil {
						front = p.begin(b, app.Addr())
					}
					var from, to []*net.TCPConn
					for range streams {
						caller, callee := through(b, front, app)
						if direction == "down" {
							caller, callee = callee, caller
						}
						from, to = append(from, caller), append(to, callee)
					}
					const chunk = 1 << 20
					zero := make([]byte, chunk)
					b.SetBytes(chunk * int64(streams))
					before := cpu()
					b.ResetTimer()
					var all sync.WaitGroup
					for n := range streams {
						all.Go(func() {
							buffer := make([]byte, chunk)
							for {
								if _, err := to[n].Read(buffer); err != nil {
									return
								}
							}
						})
						all.Go(func() {
							for range b.N {
								if _, err := from[n].Write(zero); err != nil {
									b.Error(err)
									break
								}
							}
							from[n].CloseWrite()
						})
					}
					all.Wait()
					b.StopTimer()
					used := cpu() - before
					b.ReportMetric(used.Seconds()/(float64(b.N)*chunk*float64(streams)/1e9), "cpu-s/GB")
				})
			}
		}
	}
}

// through returns both ends of a connection through front.
func through(tb testing.TB, front string, app *net.TCPListener) (caller, callee *net.TCPConn) {
	tb.Helper()
	c, err := net.Dial("tcp", front)
	if err != nil {
		tb.Fatal(err)
	}
	if callee, err = app.AcceptTCP(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close(); callee.Close() })
	return c.(*net.TCPConn), callee
}

// BenchmarkRequest is 100 bytes there and 100 back, on a connection that is open.
func BenchmarkRequest(b *testing.B) {
	for _, p := range append([]pair{{"none", nil}}, pairs...) {
		b.Run(p.name, func(b *testing.B) {
			app := listen(b)
			front := app.Addr().String()
			if p.begin != nil {
				front = p.begin(b, app.Addr())
			}
			caller, callee := through(b, front, app)
			var serving sync.WaitGroup
			serving.Go(func() { io.Copy(struct{ io.Writer }{callee}, struct{ io.Reader }{callee}) })
			message := make([]byte, 100)
			took := make([]time.Duration, 0, b.N)
			before := cpu()
			for b.Loop() {
				began := time.Now()
				if _, err := caller.Write(message); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(caller, message); err != nil {
					b.Fatal(err)
				}
				took = append(took, time.Since(began))
			}
			used := cpu() - before
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Nanoseconds())/1e3, "p50-us")
			b.ReportMetric(float64(used.Nanoseconds())/1e3/float64(b.N), "cpu-us/op")
			caller.Close()
			serving.Wait()
		})
	}
}

// BenchmarkConnection is a connection, a byte there and back, and its end. Hbone's is
// one through a tunnel that stands, as its place is beside plain TCP.
func BenchmarkConnection(b *testing.B) {
	for _, p := range append([]pair{{"none", nil}}, pairs...) {
		b.Run(p.name, func(b *testing.B) {
			app := listen(b)
			serveEach(b, app, func(c *net.TCPConn) {
				var one [1]byte
				if _, err := io.ReadFull(c, one[:]); err == nil {
					c.Write(one[:])
				}
			})
			front := app.Addr().String()
			if p.begin != nil {
				front = p.begin(b, app.Addr())
			}
			before := cpu()
			for b.Loop() {
				c, err := net.Dial("tcp", front)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := c.Write([]byte{1}); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadAll(c); err != nil {
					b.Fatal(err)
				}
				c.Close()
			}
			b.ReportMetric(float64((cpu()-before).Nanoseconds())/1e3/float64(b.N), "cpu-us/op")
		})
	}
}
