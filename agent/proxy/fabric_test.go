package proxy_test

import (
	"context"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"
)

// fabric is a network in memory, for synctest: nobody can wait for a socket in a
// bubble. What it carries can be ended by halves, and reset.
type fabric struct {
	mu        sync.Mutex
	listeners map[netip.AddrPort]*fabricListener // guarded by mu
	last      uint16                             // guarded by mu; the last port that a caller had
	slow      map[netip.AddrPort]time.Duration   // guarded by mu; what a connection there takes
}

func newFabric() *fabric {
	return &fabric{listeners: make(map[netip.AddrPort]*fabricListener), slow: make(map[netip.AddrPort]time.Duration)}
}

type fabricListener struct {
	fabric  *fabric
	address netip.AddrPort
	arrived chan net.Conn
	closed  chan struct{}
	once    sync.Once
}

func (f *fabric) listen(address string) *fabricListener {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := &fabricListener{
		fabric: f, address: netip.MustParseAddrPort(address), arrived: make(chan net.Conn, 1000), closed: make(chan struct{}),
	}
	f.listeners[l.address] = l
	return l
}

func (l *fabricListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.arrived:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *fabricListener) Close() error {
	l.once.Do(func() {
		close(l.closed)
		l.fabric.mu.Lock()
		defer l.fabric.mu.Unlock()
		if l.fabric.listeners[l.address] == l {
			delete(l.fabric.listeners, l.address)
		}
	})
	return nil
}

func (l *fabricListener) Addr() net.Addr { return net.TCPAddrFromAddrPort(l.address) }

// from returns a dialler at an address.
func (f *fabric) from(address string) func(context.Context, netip.AddrPort) (net.Conn, error) {
	return func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
		return f.dial(ctx, netip.MustParseAddr(address), to)
	}
}

func (f *fabric) dial(ctx context.Context, from netip.Addr, to netip.AddrPort) (net.Conn, error) {
	f.mu.Lock()
	slow := f.slow[to]
	f.mu.Unlock()
	if slow > 0 {
		select {
		case <-time.After(slow):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	f.mu.Lock()
	l := f.listeners[to]
	f.last++
	local := netip.AddrPortFrom(from, 1024+f.last%60_000)
	f.mu.Unlock()
	if l == nil {
		return nil, syscall.ECONNREFUSED
	}
	there, back := newHalf(), newHalf()
	l.arrived <- &fabricConn{in: there, out: back, local: to, remote: local}
	return &fabricConn{in: back, out: there, local: local, remote: to}, nil
}

// half is one direction of a connection.
type half struct {
	mu    sync.Mutex
	moved sync.Cond
	buf   []byte
	end   error // after buf
	// broken says that end comes at once.
	broken bool
}

func newHalf() *half {
	h := new(half)
	h.moved.L = &h.mu
	return h
}

func (h *half) read(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for len(h.buf) == 0 && h.end == nil {
		h.moved.Wait()
	}
	if h.end != nil && (h.broken || len(h.buf) == 0) {
		return 0, h.end
	}
	n := copy(p, h.buf)
	h.buf = h.buf[n:]
	h.moved.Broadcast()
	return n, nil
}

func (h *half) write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for len(h.buf) > 1<<20 && h.end == nil {
		h.moved.Wait()
	}
	switch {
	case h.broken:
		return 0, h.end
	case h.end != nil:
		return 0, syscall.EPIPE
	}
	h.buf = append(h.buf, p...)
	h.moved.Broadcast()
	return len(p), nil
}

// finish ends it after what is in it.
func (h *half) finish() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.end == nil {
		h.end = io.EOF
	}
	h.moved.Broadcast()
}

// cut ends it at once, unless it has ended and all was read.
func (h *half) cut(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.end == nil || !h.broken && len(h.buf) > 0 {
		h.end, h.broken = err, true
	}
	h.moved.Broadcast()
}

type fabricConn struct {
	in, out       *half
	local, remote netip.AddrPort
	hard          bool
}

func (c *fabricConn) Read(p []byte) (int, error)  { return c.in.read(p) }
func (c *fabricConn) Write(p []byte) (int, error) { return c.out.write(p) }

func (c *fabricConn) CloseWrite() error {
	c.out.finish()
	return nil
}

func (c *fabricConn) SetLinger(int) error {
	c.in.mu.Lock()
	defer c.in.mu.Unlock()
	c.hard = true
	return nil
}

func (c *fabricConn) Close() error {
	c.in.mu.Lock()
	hard := c.hard
	c.in.mu.Unlock()
	if hard {
		c.out.cut(syscall.ECONNRESET)
		c.in.cut(syscall.ECONNRESET)
		return nil
	}
	c.out.finish()
	c.in.cut(net.ErrClosed)
	return nil
}

func (c *fabricConn) LocalAddr() net.Addr              { return net.TCPAddrFromAddrPort(c.local) }
func (c *fabricConn) RemoteAddr() net.Addr             { return net.TCPAddrFromAddrPort(c.remote) }
func (c *fabricConn) SetDeadline(time.Time) error      { return nil }
func (c *fabricConn) SetReadDeadline(time.Time) error  { return nil }
func (c *fabricConn) SetWriteDeadline(time.Time) error { return nil }

// echo is an application that sends back what it gets, until the test ends.
func (f *fabric) echo(tb testing.TB, address string) {
	l := f.listen(address)
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer c.Close()
				b := make([]byte, 1024)
				for {
					n, err := c.Read(b)
					if err != nil {
						return
					}
					if _, err := c.Write(b[:n]); err != nil {
						return
					}
				}
			})
		}
	})
	tb.Cleanup(func() {
		l.Close()
		running.Wait()
	})
}
