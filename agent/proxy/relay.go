package proxy

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// stream is what a connection must be capable of to be carried through.
type stream interface {
	net.Conn
	CloseWrite() error
	SetLinger(seconds int) error
}

// asStream closes what is no stream.
func asStream(c net.Conn) (stream, error) {
	s, ok := c.(stream)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("a %T cannot be closed by halves, or reset", c)
	}
	return s, nil
}

// reset closes s so that its peer knows that something went wrong, and discards
// what was not sent yet.
func reset(s stream) {
	_ = s.SetLinger(0) // fails only if s is closed already
	s.Close()
}

// relay joins two connections.
type relay struct {
	caller, app stream
	in, out     func(n int64) // told of bytes as they go, from one goroutine each

	mu    sync.Mutex
	ended int   // directions that ended as their sender wanted; guarded by mu
	err   error // what broke the first direction that did not; guarded by mu
}

// run copies what both ends send until both have ended, or one was reset. It closes
// both, and resets them if it fails.
func (r *relay) run() error {
	var back sync.WaitGroup
	back.Go(func() { r.copy(r.caller, r.app, r.out) })
	r.copy(r.app, r.caller, r.in)
	back.Wait()
	if r.err != nil {
		r.reset()
		return r.err
	}
	r.caller.Close()
	r.app.Close()
	return nil
}

// copy copies one direction until its end, and passes the end on.
func (r *relay) copy(to, from stream, count func(int64)) {
	err := copyCounted(to, from, count)
	r.mu.Lock()
	defer r.mu.Unlock()
	if err == nil && r.ended == 0 && gone(from) {
		// The kernel reports a reset once. If the other direction was told, this one
		// saw an end of file, which it was not. Once the other direction has ended
		// there is nobody to be told instead, and a connection that both ends have
		// closed is gone as well.
		err = syscall.ECONNRESET
	}
	if err == nil && r.err == nil {
		r.ended++
		err = to.CloseWrite() // fails if to was reset
	}
	if err == nil {
		return
	}
	if r.err == nil {
		r.err = err
	}
	if gone(to) && !gone(from) {
		// What to had sent before its reset may not have been read yet: an answer,
		// perhaps, that says why. The other direction carries it, and ends.
		return
	}
	r.reset()
}

func (r *relay) reset() {
	reset(r.caller)
	reset(r.app)
}

// portion is how many bytes are copied before they are counted.
const portion = 4 << 20

// copyCounted copies until from ends. Between two TCP connections the bytes stay in
// the kernel. It begins to copy only once there is something: what the kernel needs to
// move it, a pipe of a megabyte, is not held by a connection that is idle.
func copyCounted(to io.Writer, from io.Reader, count func(int64)) error {
	arrived := arrivals(from)
	for {
		most, err := arrived()
		if err != nil {
			return err
		}
		n, err := io.CopyN(to, from, most)
		count(n)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// arrivals returns a function that blocks until there is something to be read of from,
// or from has ended, and says how much may be read without waiting for more. Of what
// is not a socket it says a portion, and does not wait.
func arrivals(from io.Reader) func() (int64, error) {
	always := func() (int64, error) { return portion, nil }
	socket, ok := from.(syscall.Conn)
	if !ok {
		return always
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return always
	}
	var queued int
	var cause error
	var one [1]byte
	look := func(fd uintptr) bool {
		for {
			_, _, cause = unix.Recvfrom(int(fd), one[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
			if !errors.Is(cause, unix.EINTR) {
				break
			}
		}
		if errors.Is(cause, unix.EAGAIN) {
			return false
		}
		if cause == nil {
			queued, cause = unix.IoctlGetInt(int(fd), unix.TIOCINQ)
		}
		return true
	}
	return func() (int64, error) {
		queued = 0
		if err := raw.Read(look); err != nil {
			return 0, err
		}
		return int64(max(queued, 1)), cause // the end is there to be read
	}
}

// gone reports whether the kernel says that s is connected no more: it was reset,
// or has ended both ways. It reports false of what is not a socket.
func gone(s stream) bool {
	socket, ok := s.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return false
	}
	var peer error
	err = raw.Control(func(fd uintptr) { _, peer = syscall.Getpeername(int(fd)) })
	return err == nil && peer != nil
}
