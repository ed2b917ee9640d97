package hbone

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
)

// Buffer returns conn with what a fast tunnel needs beneath its TLS: many records
// are read by one system call, and written by one. Give it to the handshake in the
// place of conn, and what the handshake returns to [Open] or [Serve], which find it
// there. It owns conn. Until then it behaves as conn does. A connection that is not
// of TCP is returned as it is.
func Buffer(conn net.Conn) net.Conn {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return conn
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return conn
	}
	w := &wire{TCPConn: tcp, raw: raw, records: true}
	w.readNow, w.writeNow = w.tryRead, w.tryWrite
	return w
}

// wireBeneath returns the wire that conn writes to, or nil.
func wireBeneath(conn net.Conn) *wire {
	if w, ok := conn.(*wire); ok {
		w.records = false // there is no TLS
		return w
	}
	if t, ok := conn.(interface{ NetConn() net.Conn }); ok {
		w, _ := t.NetConn().(*wire)
		return w
	}
	return nil
}

// wire is a TCP connection below TLS.
type wire struct {
	*net.TCPConn

	raw syscall.RawConn
	// records says that what is read are TLS records. Each is handed over apart, so
	// that TLS holds nothing of the next one, and ready can tell whether that is here.
	records bool

	// For the one that reads.
	in      []byte // borrowed while it holds something
	r, w    int    // what it holds
	record  int    // what is left of the record that is being handed over
	readN   int
	readErr error
	readNow func(fd uintptr) bool

	// mu guards all below.
	mu       sync.Mutex
	corked   bool
	out      []byte // borrowed while it holds something
	begin    int
	end      int
	wait     bool // tryWrite waits for room
	writeErr error
	writeNow func(fd uintptr) bool
}

const recordHeader = 5

// Read returns bytes of at most one TLS record.
func (c *wire) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for c.r == c.w || c.records && c.record == 0 && c.w-c.r < recordHeader {
		if err := c.fill(); err != nil {
			return 0, err
		}
	}
	n := min(len(p), c.w-c.r)
	if c.records {
		if c.record == 0 {
			c.record = recordHeader + c.length()
		}
		n = min(n, c.record)
		c.record -= n
	}
	copy(p, c.in[c.r:c.r+n])
	c.r += n
	if c.r == c.w {
		c.release()
	}
	return n, nil
}

// length is that of the record at the start of what is held.
func (c *wire) length() int { return int(binary.BigEndian.Uint16(c.in[c.r+3:])) }

func (c *wire) release() {
	give(c.in)
	c.in, c.r, c.w = nil, 0, 0
}

// ready reports whether the next Read of whoever reads whole records will not block.
func (c *wire) ready() bool {
	if !c.records {
		return c.w > c.r
	}
	held := c.w - c.r
	return c.record == 0 && held >= recordHeader && held >= recordHeader+c.length()
}

// fill blocks until there is more to read.
func (c *wire) fill() error {
	if c.r > 0 {
		c.w = copy(c.in, c.in[c.r:c.w])
		c.r = 0
	}
	err := c.raw.Read(c.readNow)
	if err == nil {
		err = c.readErr
	}
	if err == nil && c.readN == 0 {
		err = io.EOF
	}
	if err != nil && c.in != nil && c.r == c.w {
		c.release()
	}
	return err
}

// tryRead borrows a buffer only if there is something to read.
func (c *wire) tryRead(fd uintptr) bool {
	if c.in == nil {
		c.in = borrow(largeBuffer)
	}
	var nothing bool
	c.readN, nothing, c.readErr = readSocket(fd, c.in[c.w:])
	if nothing {
		if c.w == 0 {
			c.release()
		}
		return false
	}
	if c.readErr == nil {
		c.w += c.readN
	}
	return true
}

// Write writes p, or holds it while the wire is corked.
func (c *wire) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.corked && c.end == 0 {
		return c.TCPConn.Write(p)
	}
	written := 0
	for written < len(p) {
		if c.out == nil {
			c.out = borrow(largeBuffer)
		}
		n := copy(c.out[c.end:], p[written:])
		c.end += n
		written += n
		if c.end == len(c.out) {
			if err := c.push(true); err != nil {
				return written, err
			}
		}
	}
	return written, nil
}

// cork makes Write hold what it is given until flush.
func (c *wire) cork() {
	c.mu.Lock()
	c.corked = true
	c.mu.Unlock()
}

// flush writes what was held. Unless it is to wait, it may leave some, and then
// returns false.
func (c *wire) flush(wait bool) (bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.push(wait); err != nil {
		return false, err
	}
	if c.end > 0 {
		return false, nil
	}
	c.corked = false
	return true, nil
}

func (c *wire) push(wait bool) error {
	if c.end == 0 {
		return c.writeErr
	}
	c.wait = wait
	err := c.raw.Write(c.writeNow)
	if c.writeErr == nil {
		c.writeErr = err
	}
	if c.begin == c.end || c.writeErr != nil {
		give(c.out)
		c.out, c.begin, c.end = nil, 0, 0
	}
	return c.writeErr
}

func (c *wire) tryWrite(fd uintptr) bool {
	for c.begin < c.end {
		n, full, err := writeSocket(fd, c.out[c.begin:c.end])
		if full {
			return !c.wait
		}
		if err != nil {
			c.writeErr = err
			return true
		}
		c.begin += n
	}
	return true
}

// readSocket and writeSocket never block: Go's sockets are non-blocking. They report
// whether there was nothing to read, or no room to write.
func readSocket(fd uintptr, p []byte) (int, bool, error) { return try(syscall.Read, fd, p) }

func writeSocket(fd uintptr, p []byte) (int, bool, error) { return try(syscall.Write, fd, p) }

func try(call func(int, []byte) (int, error), fd uintptr, p []byte) (int, bool, error) {
	for {
		n, err := call(int(fd), p)
		switch {
		case err == nil:
			return n, false, nil
		case errors.Is(err, syscall.EAGAIN):
			return 0, true, nil
		case !errors.Is(err, syscall.EINTR):
			return 0, false, err
		}
	}
}
