package hbone

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/http2"
)

// Conn is the connection of an application, as net.TCPConn is one.
type Conn interface {
	net.Conn
	CloseWrite() error
	SetLinger(seconds int) error
}

// Relay joins the stream and the connection of an application until both directions
// have ended, or either was reset. An end is passed on as an end, and a reset as a
// reset. It closes both, and returns nil if both directions ended as their senders
// wanted. It is called once, and nobody else reads or writes the two.
//
// Bytes go from the tunnel to a *net.TCPConn without waking anybody. Any other Conn
// has its Write called, from a goroutine that lives as long as there is something to
// be written.
//
// sent is told how many bytes went from app into the stream, received how many went
// to app, as they go. Both must be quick, as the whole tunnel waits for received, and
// must not call the stream or the tunnel. Either may be nil.
func (s *Stream) Relay(app Conn, sent, received func(n int64)) error {
	r := &relay{s: s, app: app, sent: sent, received: received, done: make(chan struct{})}
	if tcp, ok := app.(*net.TCPConn); ok {
		if raw, err := tcp.SyscallConn(); err == nil {
			r.raw = raw
			r.readNow, r.readOnce, r.writeNow = r.tryRead, r.tryReadOnce, r.tryWrite
			r.isReadable, r.isGone, r.isReset = r.tryReadable, r.tryGone, r.tryReset
		}
	}
	if r.raw != nil {
		s.t.mu.Lock()
		s.reading = app
		s.t.mu.Unlock()
	}
	s.mu.Lock()
	s.relay = r
	switch {
	case s.err != nil:
		r.cut()
	case s.queue.size > 0:
		r.drainLater()
	case s.ended:
		r.finish()
	}
	s.mu.Unlock()
	return r.run()
}

// relay is what joins a stream to the connection of an application.
type relay struct {
	s              *Stream
	app            Conn
	raw            syscall.RawConn // nil if app is not of TCP
	sent, received func(int64)
	done           chan struct{} // closed when nothing will be written to app any more

	saidEnd atomic.Bool // app was told an end; it is not for s.mu, see cut

	// For the one that runs.
	buffer                      []byte
	readN                       int // -1 says that the windows had no room
	readErr, goneErr            error
	nothing                     bool // there was nothing to read
	large                       bool // app has sent more than a small buffer takes
	readNow, readOnce           func(fd uintptr) bool
	isReadable, isGone, isReset func(fd uintptr) bool

	// s.mu guards all below.
	draining  bool  // a goroutine writes what s.queue holds
	delivered bool  // the end of what the peer sent was passed on
	writeErr  error // why nothing can be written any more
	noRead    bool  // nothing is read any more
	out       []byte
	writeN    int
	writeNow  func(fd uintptr) bool
}

// run copies from app to the stream, and returns when both directions have ended.
func (r *relay) run() error {
	err := r.copy()
	s := r.s
	s.mu.Lock()
	r.noRead = true
	if err == nil && r.writeErr != nil {
		err = r.writeErr
	}
	if err == nil && !r.delivered && s.err == nil && r.gone() {
		// The kernel tells of a reset once. Whoever wrote was told, so this looked
		// like an end.
		err = syscall.ECONNRESET
	}
	s.mu.Unlock()
	if err == nil {
		s.t.endSending(s)
		err = r.wait()
	}
	if err != nil {
		s.mu.Lock()
		if s.err != nil {
			err = s.err // the reset came from there
		}
		s.mu.Unlock()
		s.abort(&resetError{code: http2.ErrCodeCancel, why: "the application's connection broke"})
		r.reset()
		<-r.done
		return fmt.Errorf("hbone: relay: %w", err)
	}
	r.app.Close()
	return nil
}

// wait returns when the peer's end was passed on, or something was reset.
func (r *relay) wait() error {
	if r.raw != nil {
		// The kernel wakes a reader when its connection is reset. finish sets a
		// deadline.
		for {
			select {
			case <-r.done:
			default:
				if err := r.raw.Read(r.isGone); err == nil && r.goneErr != nil {
					r.s.mu.Lock()
					delivered := r.delivered
					r.s.mu.Unlock()
					if !delivered {
						return syscall.ECONNRESET
					}
				} else if err == nil {
					continue
				}
			}
			break
		}
	}
	select {
	case <-r.done:
	case <-r.s.over:
	}
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	if r.s.err != nil {
		return r.s.err
	}
	return r.writeErr
}

// copy copies from app to the stream until app ends.
func (r *relay) copy() error {
	for {
		move := r.moveSmall
		if r.large && r.raw != nil {
			move = r.moveLarge
		}
		starved, err := move()
		if starved {
			err = r.starve()
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
	}
}

// moveSmall waits for something of app, and sends it. It holds no buffer while it
// waits. starved says that the windows have no room.
func (r *relay) moveSmall() (starved bool, err error) {
	if r.raw == nil {
		err = r.readSlow()
	} else {
		r.readN, r.readErr = 0, nil // a connection that is closed is not even tried
		if err = r.raw.Read(r.readNow); err == nil {
			err = r.readErr
		}
	}
	switch {
	case r.readN < 0:
		return true, nil
	case r.readN > 0:
		r.large = r.readN == smallRead
		if sendErr := r.s.t.send(r.s, r.buffer, r.readN); sendErr != nil {
			err = sendErr
		} else {
			r.count()
		}
	case err == nil:
		err = io.EOF
	}
	r.giveBack()
	return false, err
}

// moveLarge does the same for an application that sends much. It reads when it is
// its turn to send, so that what was read is still in the processor's cache when it
// is encrypted, and a tunnel has one large buffer for all its streams.
func (r *relay) moveLarge() (starved bool, err error) {
	if err := r.raw.Read(r.isReadable); err != nil {
		return false, err
	}
	t := r.s.t
	t.sending.lock()
	reserved := t.reserve(r.s, maxFrame-frameHeader)
	if reserved == 0 {
		t.sending.unlock()
		t.flush()
		return true, nil
	}
	r.buffer = borrow(largeBuffer)[:frameHeader+reserved]
	r.readN, r.readErr, r.nothing = 0, nil, false
	if err = r.raw.Read(r.readOnce); err == nil {
		err = r.readErr
	}
	t.restore(r.s, reserved-r.readN)
	r.large = r.readN >= min(reserved, smallRead)
	if r.readN > 0 {
		if sendErr := t.sendInTurn(r.s, r.buffer, r.readN); sendErr != nil {
			err = sendErr
		} else {
			r.count()
		}
	} else {
		t.sending.unlock()
		t.flush()
		if err == nil && !r.nothing {
			err = io.EOF
		}
	}
	r.giveBack()
	return false, err
}

func (r *relay) count() {
	if r.sent != nil {
		r.sent(int64(r.readN))
	}
}

// tryRead reads what is there into a small buffer, if the windows have room.
func (r *relay) tryRead(fd uintptr) bool {
	reserved := r.reserve()
	if reserved == 0 {
		r.readN = -1
		return true
	}
	r.readN, r.nothing, r.readErr = readSocket(fd, r.buffer[frameHeader:frameHeader+reserved])
	r.s.t.restore(r.s, reserved-r.readN)
	if r.nothing {
		r.giveBack()
		return false
	}
	return true
}

// tryReadable returns true if there is something to read, or an end.
func (r *relay) tryReadable(fd uintptr) bool {
	var one [1]byte
	_, _, err := syscall.Recvfrom(int(fd), one[:], syscall.MSG_PEEK)
	return !errors.Is(err, syscall.EAGAIN)
}

// tryReadOnce fills the buffer with what is there, and does not wait.
func (r *relay) tryReadOnce(fd uintptr) bool {
	r.readN, r.nothing, r.readErr = readSocket(fd, r.buffer[frameHeader:])
	return true
}

func (r *relay) readSlow() (err error) {
	reserved := r.reserve()
	if reserved == 0 {
		r.readN = -1
		return nil
	}
	r.readN, err = r.app.Read(r.buffer[frameHeader : frameHeader+reserved])
	r.s.t.restore(r.s, reserved-r.readN)
	return err
}

// smallRead fills one TLS record, with the header of its frame.
const smallRead = tlsRecord - frameHeader

// reserve reserves room in the windows, and borrows a small buffer for it.
func (r *relay) reserve() int {
	n := r.s.t.reserve(r.s, smallRead)
	if n > 0 {
		r.buffer = borrow(smallBuffer)
	}
	return n
}

func (r *relay) giveBack() {
	give(r.buffer)
	r.buffer = nil
}

// starve blocks until there may be room in the windows. app may be reset meanwhile.
func (r *relay) starve() error {
	s := r.s
	if r.raw != nil {
		// The kernel wakes a reader when its connection is reset, and the tunnel by a
		// deadline.
		err := r.raw.Read(r.isReset)
		if err == nil {
			return syscall.ECONNRESET
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = r.app.SetReadDeadline(time.Time{})
		}
		return err
	}
	select {
	case <-s.wake:
	case <-s.over:
		return s.cause()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return r.writeErr // if there is one, there is nobody to read from either
}

// tryReset returns true if app was reset. A connection that both have ended is gone
// too, and what it has sent may still be read.
func (r *relay) tryReset(fd uintptr) bool { return !r.saidEnd.Load() && disconnected(fd) }

// deliver writes what the application takes of b now, and returns what it does not.
// s.mu is held, as in all below.
func (r *relay) deliver(b []byte) []byte {
	if r.writeErr != nil {
		return nil // nobody will read it, and a reset is on its way
	}
	if r.draining {
		return b
	}
	if r.raw != nil {
		r.out, r.writeN = b, 0
		err := r.raw.Write(r.writeNow)
		r.out = nil
		if err != nil && r.writeErr == nil {
			r.writeErr = err
		}
		r.wrote(r.writeN)
		if r.writeErr != nil {
			r.failed()
			return nil
		}
		if b = b[r.writeN:]; len(b) == 0 {
			return nil
		}
	}
	r.s.queue.append(b)
	r.drainLater()
	return nil
}

func (r *relay) tryWrite(fd uintptr) bool {
	for r.writeN < len(r.out) {
		n, full, err := writeSocket(fd, r.out[r.writeN:])
		if err != nil {
			r.writeErr = err
		}
		if full || err != nil {
			break
		}
		r.writeN += n
	}
	return true
}

func (r *relay) wrote(n int) {
	if n == 0 {
		return
	}
	if r.received != nil {
		r.received(int64(n))
	}
	r.s.take(n)
}

func (r *relay) drainLater() {
	r.draining = true
	go r.drain()
}

// drain writes what is queued until nothing is.
func (r *relay) drain() {
	s := r.s
	s.mu.Lock()
	defer s.mu.Unlock()
	for r.writeErr == nil && s.err == nil {
		c, ok := s.queue.take()
		if !ok {
			break
		}
		s.mu.Unlock()
		n, err := r.app.Write(c.buffer[c.begin:c.end])
		give(c.buffer)
		s.mu.Lock()
		r.writeErr = err
		r.wrote(n)
		s.mu.Unlock()
		s.t.flush()
		s.mu.Lock()
	}
	r.draining = false
	switch {
	case s.err != nil:
		r.stop()
	case r.writeErr != nil:
		r.failed()
	case s.ended:
		r.finish()
	}
}

// finish passes the end of what the peer sends on, once all before it was written.
func (r *relay) finish() {
	if r.draining || r.delivered || r.writeErr != nil {
		return
	}
	r.saidEnd.Store(true)
	if err := r.app.CloseWrite(); err != nil {
		r.writeErr = err
		r.failed()
		return
	}
	r.delivered = true
	r.stop()
}

// failed deals with an application that takes no more.
func (r *relay) failed() {
	r.s.queue.drop()
	if !r.gone() && !r.noRead {
		r.reset() // which ends the reading
	}
	// What it sent before its reset may not have been read yet: an answer, perhaps,
	// that says why. The one that runs reads it, and then resets the stream.
	signal(r.s.wake)
	r.stop()
}

// cut passes the reset of the stream on. Close waits until whoever reads app has left
// off, so that nobody who does may wait for s.mu.
func (r *relay) cut() {
	r.reset()
	if !r.draining {
		r.stop()
	}
}

// stop tells that nothing will be written any more.
func (r *relay) stop() {
	select {
	case <-r.done:
		return
	default:
	}
	close(r.done)
	if r.noRead && r.raw != nil {
		r.app.SetReadDeadline(time.Unix(1, 0)) //nolint:errcheck // wait is woken, or app is closed
	}
}

// reset closes app so that its peer knows that something went wrong.
func (r *relay) reset() {
	_ = r.app.SetLinger(0) // fails only if app is closed already
	r.app.Close()
}

// gone reports whether the kernel says that app is connected no more.
func (r *relay) gone() bool {
	if r.raw == nil {
		return false
	}
	gone := false
	err := r.raw.Control(func(fd uintptr) { gone = disconnected(fd) })
	return err != nil || gone
}

func disconnected(fd uintptr) bool {
	_, err := syscall.Getpeername(int(fd))
	return err != nil
}

func (r *relay) tryGone(fd uintptr) bool {
	r.goneErr = nil
	if disconnected(fd) {
		r.goneErr = syscall.ECONNRESET
	}
	return r.goneErr != nil
}
