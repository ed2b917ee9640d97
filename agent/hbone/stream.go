package hbone

import (
	"errors"
	"io"
	"net"
	"sync"

	"golang.org/x/net/http2"
)

// Stream is one connection in a tunnel: bytes both ways, each way with an end of its
// own. One may read while another writes.
type Stream struct {
	t  *Tunnel
	id uint32

	wake     chan struct{} // there may be room in the windows
	readable chan struct{} // there may be something to read
	over     chan struct{} // closed when the stream was aborted

	// For the one that asked, who reads the two below once answered is closed.
	answered chan struct{}
	answer   Header
	status   int

	request *Request // at the callee's end

	// t.mu guards these.
	sendWindow int64
	blocked    bool
	reading    Conn // what waits for room in the windows as a reader of it, or nil
	granted    int  // of t.windows
	sentEnd    bool // we have sent END_STREAM
	heardEnd   bool // the peer has
	gone       bool // not in t.streams any more
	informed   int  // informational answers

	// mu guards all below. It is taken before t.mu, never while t.mu is held.
	mu         sync.Mutex
	queue      queue
	recvWindow int  // what the peer may send
	window     int  // what it may send when nothing waits
	owed       int  // what was taken and not told to the peer yet
	ended      bool // the last byte is in queue, or was taken
	err        error
	relay      *relay
}

// newStream adds a stream. t.mu is held.
func (t *Tunnel) newStream(id uint32) *Stream {
	s := &Stream{
		t: t, id: id,
		wake: make(chan struct{}, 1), readable: make(chan struct{}, 1), over: make(chan struct{}),
		sendWindow: t.peer.window, granted: initialWindow, recvWindow: initialWindow, window: initialWindow,
	}
	t.windows += initialWindow
	t.streams[id] = s
	return s
}

// Read blocks until there is something to read. It returns [io.EOF] when the peer has
// ended what it sends, and an error that is a [syscall.ECONNRESET] if it has reset the
// stream.
func (s *Stream) Read(p []byte) (int, error) {
	for {
		s.mu.Lock()
		n := s.queue.read(p)
		flush := s.take(n)
		ended, err := s.ended, s.err
		s.mu.Unlock()
		if flush {
			s.t.flush()
		}
		switch {
		case n > 0 || len(p) == 0:
			return n, nil
		case err != nil:
			return 0, err
		case ended:
			return 0, io.EOF
		}
		select {
		case <-s.readable:
		case <-s.over:
		}
	}
}

// Write blocks until the peer's windows and the kernel have taken all of p.
func (s *Stream) Write(p []byte) (int, error) {
	written := 0
	for written < len(p) {
		n := s.t.reserve(s, min(len(p)-written, maxFrame-frameHeader))
		if n == 0 {
			select {
			case <-s.wake:
				continue
			case <-s.over:
				return written, s.cause()
			}
		}
		b := borrow(frameHeader + n)
		copy(b[frameHeader:], p[written:written+n])
		err := s.sendable()
		if err != nil {
			s.t.restore(s, n)
		} else {
			err = s.t.send(s, b, n)
		}
		give(b)
		if err != nil {
			return written, err
		}
		written += n
	}
	return written, nil
}

func (s *Stream) sendable() error {
	s.t.mu.Lock()
	defer s.t.mu.Unlock()
	if s.sentEnd {
		return net.ErrClosed
	}
	return nil
}

// CloseWrite ends what we send. The peer may go on.
func (s *Stream) CloseWrite() error {
	s.t.endSending(s)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Close ends what we send, and resets the stream if the peer has not ended what it
// sends.
func (s *Stream) Close() error {
	s.t.endSending(s)
	code := http2.ErrCodeCancel
	if s.t.callee != nil {
		code = http2.ErrCodeNo // it was answered in full (RFC 9113 §8.1)
	}
	s.abort(&resetError{code: code, why: "closed"})
	return nil
}

// Reset aborts the stream: neither end may take what has arrived for the whole. The
// peer does not hear of it if both ends have ended the stream already.
func (s *Stream) Reset() error {
	s.abort(&resetError{code: http2.ErrCodeCancel})
	return nil
}

// cause is why the stream was aborted.
func (s *Stream) cause() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		return net.ErrClosed // both have ended it
	}
	return s.err
}

// abort ends s at once and tells the peer, if that does not know.
func (s *Stream) abort(err *resetError) {
	t := s.t
	s.end(err)
	t.mu.Lock()
	tell := !s.gone && !err.remote && t.err == nil
	if tell {
		t.frames.WriteRSTStream(s.id, err.code) //nolint:errcheck // controlWriter takes all
		t.provoked += frameHeader + 4
	}
	t.remove(s)
	t.mu.Unlock()
	if tell {
		t.flush()
	}
}

// end makes whoever waits for s see err. What has not been read is gone.
func (s *Stream) end(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return
	}
	s.err = err
	s.queue.drop()
	close(s.over)
	if s.relay != nil {
		var reset *resetError
		if errors.As(err, &reset) && reset.remote && reset.code == http2.ErrCodeNo && s.relay.delivered {
			s.relay.app.Close() // it has heard all there is, and needs to say no more
		}
		s.relay.cut()
	}
}

// take counts n bytes as taken, and gives the peer as much of a window again once a
// quarter of it was taken. It reports whether there is something to flush. mu is held.
func (s *Stream) take(n int) bool {
	if n == 0 || s.ended || s.err != nil {
		return false
	}
	s.owed += n
	if s.owed < s.window/4 {
		return false
	}
	t := s.t
	t.mu.Lock()
	defer t.mu.Unlock()
	if s.gone {
		return false
	}
	more := s.owed
	if grow := min(s.window, maxWindow-s.window, windowBudget-t.windows); grow > 0 && s.queue.size == 0 {
		s.window += grow
		s.granted += grow
		t.windows += grow
		more += grow
	}
	s.owed = 0
	s.recvWindow += more
	t.frames.WriteWindowUpdate(s.id, uint32(more)) //nolint:errcheck // controlWriter takes all
	return true
}

// deliver takes what has arrived for s. It does not keep b. It is called by the one
// that reads, and does not wait.
func (s *Stream) deliver(b []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return
	}
	if s.relay != nil {
		if b = s.relay.deliver(b); len(b) == 0 {
			return
		}
	}
	s.queue.append(b)
	signal(s.readable)
}

// finish takes the end of what the peer sends.
func (s *Stream) finish() {
	s.t.mu.Lock()
	s.heardEnd = true
	s.t.removeIfOver(s)
	s.t.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
	if s.relay != nil && s.err == nil {
		s.relay.finish()
	}
	signal(s.readable)
}
