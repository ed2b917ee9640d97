package proxy_test

import (
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"

	"troth.dev/troth/agent/proxy"
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
