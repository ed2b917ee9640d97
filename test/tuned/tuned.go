// Package tuned is the floor that the data path is measured by: crypto/tls as well as
// it can be had. What lies beneath it reads and writes many records at once, and what
// lies above 256 KB. Its large buffers come from a pool, since 512 KB that are new cost a
// connection more than its handshake.
package tuned

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"net"
	"sync"
)

// Conn is a TLS connection to be relayed.
type Conn struct {
	*tls.Conn

	below *coalescing
}

type coalescing struct {
	*net.TCPConn

	in        []byte
	r, w      int
	remaining int // of the record that is being read
	out       []byte
	coalesce  bool
}

const largeBuffer = 288 << 10

// New returns the connection that secure makes of what lies beneath it. It owns c.
func New(c *net.TCPConn, secure func(net.Conn) *tls.Conn) *Conn {
	below := &coalescing{TCPConn: c}
	return &Conn{secure(below), below}
}

// Read returns bytes of one record, so that ready can tell whether the next is here.
func (c *coalescing) Read(p []byte) (int, error) {
	for c.r == c.w || c.remaining == 0 && c.w-c.r < 5 {
		if c.in == nil {
			c.in = large.Get().([]byte)
		}
		c.w = copy(c.in, c.in[c.r:c.w])
		c.r = 0
		n, err := c.TCPConn.Read(c.in[c.w:])
		if n == 0 {
			return 0, err
		}
		c.w += n
	}
	if c.remaining == 0 {
		c.remaining = c.next()
	}
	n := copy(p, c.in[c.r:min(c.w, c.r+c.remaining)])
	c.r += n
	c.remaining -= n
	return n, nil
}

func (c *coalescing) next() int { return 5 + int(binary.BigEndian.Uint16(c.in[c.r+3:])) }

func (c *coalescing) ready() bool {
	held := c.w - c.r
	return c.remaining == 0 && held >= 5 && held >= c.next()
}

func (c *coalescing) Write(p []byte) (int, error) {
	if !c.coalesce {
		return c.TCPConn.Write(p)
	}
	c.out = append(c.out, p...)
	return len(p), nil
}

var large = sync.Pool{New: func() any { return make([]byte, largeBuffer) }}

// send writes what TLS makes of b at once.
func (t *Conn) send(b []byte) error {
	t.below.coalesce = true
	t.below.out = large.Get().([]byte)[:0]
	_, err := t.Write(b)
	if err == nil {
		_, err = t.below.TCPConn.Write(t.below.out)
	}
	large.Put(t.below.out[:cap(t.below.out)]) //nolint:staticcheck // a slice's header is little beside it
	t.below.out, t.below.coalesce = nil, false
	return err
}

// Join relays between t and a connection until both have ended, and closes both.
func (t *Conn) Join(c *net.TCPConn) {
	var both sync.WaitGroup
	both.Go(func() {
		b := large.Get().([]byte)
		defer large.Put(b) //nolint:staticcheck // a slice's header is little beside it
		for {
			n, err := c.Read(b[:256<<10])
			if n > 0 {
				err = errors.Join(err, t.send(b[:n]))
			}
			if err != nil {
				break
			}
		}
		t.CloseWrite()
	})
	b := large.Get().([]byte)
	for {
		n, err := t.Read(b)
		for err == nil && n <= 256<<10-16<<10 && t.below.ready() {
			var m int
			m, err = t.Read(b[n:])
			n += m
		}
		if n > 0 {
			if _, err := c.Write(b[:n]); err != nil {
				break
			}
		}
		if err != nil {
			break
		}
	}
	large.Put(b) //nolint:staticcheck // a slice's header is little beside it
	c.CloseWrite()
	both.Wait()
	t.below.Close()
	c.Close()
	if t.below.in != nil {
		large.Put(t.below.in) //nolint:staticcheck // a slice's header is little beside it
	}
}
