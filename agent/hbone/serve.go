package hbone

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"

	"golang.org/x/net/http2"
	"golang.org/x/time/rate"
)

// callee is what the callee's end has beside a tunnel.
type callee struct {
	handle   func(*Request)
	running  sync.WaitGroup
	handlers int // guarded by the tunnel's mu
	resets   *rate.Limiter
}

// Serve makes conn, on which nothing was read yet, the callee's end of a tunnel, and
// calls handle for each request, each in a goroutine of its own. When handle returns,
// the stream of the request is closed; if it was not answered, it is reset.
//
// Serve blocks until the connection has ended, or ctx has, which resets every stream,
// and returns when all it has called has returned. It owns conn. It returns nil if
// the tunnel ended because of ctx or of Config.Drain, or because the caller said so.
func Serve(ctx context.Context, conn net.Conn, c Config, handle func(*Request)) error {
	t := newTunnel(conn, c)
	t.callee = &callee{handle: handle, resets: rate.NewLimiter(resetRate, resetBurst)}
	t.hello(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: uint32(t.max)})
	stop := context.AfterFunc(ctx, func() { t.fail(errClosed) })
	defer stop()
	if c.Drain != nil {
		go t.drainWhen(c.Drain)
	}
	t.flush()
	err := t.preface()
	if err == nil {
		err = t.read()
	} else {
		err = t.readError(err)
	}
	t.fail(err)
	t.callee.running.Wait()
	if errors.Is(t.err, errClosed) {
		return nil
	}
	return t.err
}

func (t *Tunnel) drainWhen(drain <-chan struct{}) {
	select {
	case <-drain:
		t.drain()
	case <-t.done:
		return
	}
	select {
	case <-t.empty:
		t.fail(errClosed)
	case <-t.done:
	}
}

func (t *Tunnel) preface() error {
	var b [len(http2.ClientPreface)]byte
	if _, err := io.ReadFull(&t.in, b[:]); err != nil {
		return err
	}
	if string(b[:]) != http2.ClientPreface {
		return protocolError("the peer does not speak HTTP/2")
	}
	return nil
}

// Request is a request for a connection. It is answered once, by Accept or Refuse.
type Request struct {
	// Authority is whom the caller wants to reach. It consists of letters that names,
	// addresses and ports have; whether it is an address and a port is not checked.
	Authority string
	Header    Header

	s        *Stream
	answered bool // guarded by s.t.mu
}

// Done is closed when the caller has given up, or the tunnel has ended.
func (r *Request) Done() <-chan struct{} { return r.s.over }

// Accept answers 200, with h, and returns the stream.
func (r *Request) Accept(h Header) (*Stream, error) {
	if err := r.reply(200, false, h); err != nil {
		return nil, err
	}
	return r.s, nil
}

// Refuse answers with status: 400 for what nobody could serve, 401 for what the
// caller may not have, 503 for an application that cannot be reached.
func (r *Request) Refuse(status int) error {
	if err := r.reply(status, true, nil); err != nil {
		return err
	}
	// The caller need send no more (RFC 9113 §8.1).
	r.s.abort(&resetError{code: http2.ErrCodeNo, why: "refused"})
	return nil
}

func (r *Request) reply(status int, end bool, h Header) error {
	if err := h.check(); err != nil {
		return err
	}
	t := r.s.t
	t.mu.Lock()
	switch {
	case r.answered:
		t.mu.Unlock()
		return errors.New("hbone: the request is answered already")
	case r.s.gone || t.err != nil:
		t.mu.Unlock()
		return r.s.cause()
	}
	r.answered = true
	r.s.sentEnd = end
	t.writeHeader(r.s.id, end, [][2]string{{":status", strconv.Itoa(status)}}, h)
	t.provoked += 64 // more or less: whoever asks much and reads no answer is stopped
	if end {
		t.removeIfOver(r.s)
	}
	t.mu.Unlock()
	t.flush()
	return nil
}

// opened takes the number of a stream that the peer opens.
func (t *Tunnel) opened(id uint32) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if id%2 == 0 {
		return protocolError(fmt.Sprintf("stream %d of a caller", id))
	}
	t.lastID = max(t.lastID, id)
	return nil
}

// handleRequest takes a request, or what ends what a caller sends.
func (t *Tunnel) handleRequest(f *http2.MetaHeadersFrame) error {
	s, err := t.lookup(f.StreamID)
	switch {
	case s != nil:
		return t.trailer(s, f)
	case err == nil:
		return nil // it was reset
	}
	if err := t.opened(f.StreamID); err != nil {
		return err
	}
	c := t.callee
	t.mu.Lock()
	if t.draining || t.err != nil || c.handlers >= t.max || len(t.streams) >= t.max {
		t.mu.Unlock()
		if !c.resets.Allow() {
			return &connectionError{http2.ErrCodeEnhanceYourCalm, "too many streams beyond the limit"}
		}
		t.refuse(f.StreamID, http2.ErrCodeRefusedStream)
		return nil
	}
	s = t.newStream(f.StreamID)
	c.handlers++
	t.mu.Unlock()
	r := &Request{Authority: f.PseudoValue("authority"), Header: headerOf(f), s: s}
	s.request = r
	handle := c.handle
	switch {
	case f.Truncated:
		handle = func(r *Request) { r.Refuse(431) } //nolint:errcheck // the caller is gone
	case f.PseudoValue("method") != "CONNECT", len(f.PseudoFields()) != 2, !validAuthority(r.Authority):
		handle = func(r *Request) { r.Refuse(400) } //nolint:errcheck // the caller is gone
	}
	if f.StreamEnded() {
		s.finish()
	}
	c.running.Go(func() {
		defer func() {
			t.mu.Lock()
			c.handlers--
			answered := r.answered
			t.mu.Unlock()
			if answered {
				s.Close()
			} else {
				s.abort(&resetError{code: http2.ErrCodeInternal, why: "not answered"})
			}
		}()
		handle(r)
	})
	return nil
}

// wasAnswered reports whether the request of s was.
func (c *callee) wasAnswered(s *Stream) bool {
	s.t.mu.Lock()
	defer s.t.mu.Unlock()
	return s.request.answered
}
