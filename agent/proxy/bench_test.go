package proxy_test

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"troth.dev/troth/agent/proxy"
	"troth.dev/troth/handshake"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/policy"
)

// The proxy, and beneath it the least that anything of its kind must do: no
// policy, no bounds, no line, no half-closing.
var ways = []struct {
	name  string
	front func(tb testing.TB, app net.Addr) (address string)
}{
	{"proxy", func(tb testing.TB, app net.Addr) string {
		return newPod(tb, app, proxy.InboundConfig{Log: slog.New(slog.DiscardHandler)}).serve(tb).front
	}},
	{"floor", bareRelay},
}

func bareRelay(tb testing.TB, app net.Addr) string {
	l := listen(tb)
	go func() {
		for {
			caller, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer caller.Close()
				callee, err := net.Dial("tcp", app.String())
				if err != nil {
					return
				}
				defer callee.Close()
				go func() {
					io.Copy(callee, caller)
					callee.Close()
				}()
				io.Copy(caller, callee)
			}()
		}
	}()
	return l.Addr().String()
}

func BenchmarkThroughput(b *testing.B) {
	for _, way := range ways {
		b.Run(way.name, func(b *testing.B) {
			app := listen(b)
			caller, err := dialFrom(way.front(b, app.Addr()), client)
			if err != nil {
				b.Fatal(err)
			}
			defer caller.Close()
			callee, err := app.AcceptTCP()
			if err != nil {
				b.Fatal(err)
			}
			defer callee.Close()
			chunk := make([]byte, 1<<20)
			b.SetBytes(int64(len(chunk)))
			b.ReportAllocs()
			var reading sync.WaitGroup
			reading.Go(func() { io.Copy(io.Discard, struct{ io.Reader }{callee}) })
			for b.Loop() {
				if _, err := caller.Write(chunk); err != nil {
					b.Fatal(err)
				}
			}
			caller.CloseWrite()
			reading.Wait()
		})
	}
}

// BenchmarkConnection is a connection, a byte there and back, and its end.
func BenchmarkConnection(b *testing.B) {
	for _, way := range ways {
		b.Run(way.name, func(b *testing.B) {
			app := listen(b)
			go func() {
				for {
					c, err := app.Accept()
					if err != nil {
						return
					}
					go func() {
						defer c.Close()
						var one [1]byte
						if _, err := io.ReadFull(c, one[:]); err == nil {
							c.Write(one[:])
						}
					}()
				}
			}()
			front := way.front(b, app.Addr())
			b.ReportAllocs()
			for b.Loop() {
				c, err := dialFrom(front, netip.IPv4Unspecified())
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
		})
	}
}

// BenchmarkPolicyChange is a change by which every connection that is open no longer
// passes: how long until a caller sees that its connection was cut, and the last of
// them. In tunnels that is 10,000; in plaintext, where each takes three descriptors of
// this process, 5,000.
func BenchmarkPolicyChange(b *testing.B) {
	// Nobody accepts: the kernel does, 4,096 for each.
	var apps []*net.TCPListener
	for range 4 {
		apps = append(apps, listen(b))
	}
	b.Run("tunnels", func(b *testing.B) {
		root := newAuthority(b)
		p := newTunnelled(b, handshake.CallerFirst, latest.New(root.identity(b, stock)), proxy.InboundConfig{
			Log: slog.New(slog.DiscardHandler), Limit: 10_000,
		})
		var links []link
		for range 60 {
			links = append(links, p.dig(b, handshake.CallerFirst, root.identity(b, cart), client))
		}
		policyChange(b, p, 10_000, nil, func(n int) func() error {
			s, _, err := links[n%len(links)].Connect(b.Context(), apps[n%len(apps)].Addr().String(), nil)
			if err != nil {
				b.Fatal(err)
			}
			return func() error {
				_, err := s.Read(make([]byte, 1))
				return errors.Join(err, s.Close())
			}
		})
	})
	b.Run("plaintext", func(b *testing.B) {
		var next atomic.Int64
		p := newPod(b, nil, proxy.InboundConfig{
			Log: slog.New(slog.DiscardHandler), Limit: 10_000,
			Destination: func(net.Conn) (netip.AddrPort, error) {
				return addressOf(apps[int(next.Add(1))%len(apps)]), nil
			},
		}).serve(b)
		policyChange(b, p, 5_000, inForce(policy.Strict), func(int) func() error {
			c, err := dialFrom(p.front, client)
			if err != nil {
				b.Fatal(err)
			}
			return func() error {
				defer c.Close()
				_, err := c.Read(make([]byte, 1))
				return err
			}
		})
	})
}

func addressOf(l net.Listener) netip.AddrPort { return l.Addr().(*net.TCPAddr).AddrPort() }

// policyChange opens connections by connect, whose results block until they are cut.
func policyChange(b *testing.B, p *pod, connections int, to *policy.Effective, connect func(n int) (cut func() error)) {
	const metric = "connections_open"
	for b.Loop() {
		b.StopTimer()
		p.policy.Set(inForce(policy.Permissive))
		took := make(chan time.Duration, connections)
		var begun atomic.Pointer[time.Time]
		for n := range connections {
			cut := connect(n)
			go func() {
				if err := cut(); !errors.Is(err, syscall.ECONNRESET) {
					b.Errorf("a caller reads %v, want a reset", err)
				}
				took <- time.Since(*begun.Load())
			}()
		}
		eventually(b, "all are open", func() bool { return p.metric(b, metric, "") == float64(connections) })
		now := time.Now()
		begun.Store(&now)
		b.StartTimer()
		p.policy.Set(to)
		all := make([]time.Duration, 0, connections)
		for range connections {
			all = append(all, <-took)
		}
		b.StopTimer()
		slices.Sort(all)
		b.ReportMetric(float64(all[len(all)*99/100].Microseconds())/1000, "p99-ms")
		b.ReportMetric(float64(all[len(all)-1].Microseconds())/1000, "last-ms")
		eventually(b, "all are closed", func() bool { return p.metric(b, metric, "") == 0 })
		b.StartTimer()
	}
}

func eventually(b *testing.B, what string, so func() bool) {
	b.Helper()
	for deadline := time.Now().Add(patience); !so(); runtime.Gosched() {
		if time.Now().After(deadline) {
			b.Fatalf("it is not so that %s", what)
		}
	}
}
