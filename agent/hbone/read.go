package hbone

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/net/http2"
)

// input is what the peer sends, after TLS.
type input struct {
	t      *Tunnel
	frames *http2.Framer
	look   [512]byte // read ahead of what was asked for
	r, w   int
	limit  int // how much a header block may still take; none if negative
}

var errHeaderBlock = &connectionError{http2.ErrCodeEnhanceYourCalm, "a header block takes too many bytes"}

// Read is for frames alone.
func (in *input) Read(p []byte) (int, error) {
	if in.limit == 0 {
		return 0, errHeaderBlock
	}
	if in.r == in.w {
		n, err := in.fetch(in.look[:])
		if err != nil {
			return 0, err
		}
		in.r, in.w = 0, n
	}
	n := copy(p, in.look[in.r:in.w])
	if in.limit > 0 {
		n = min(n, in.limit)
		in.limit -= n
	}
	in.r += n
	return n, nil
}

// payload reads at least one and at most want bytes into p, whose length may be
// greater: the header of the next frame goes there, and then into look.
func (in *input) payload(p []byte, want int) (int, error) {
	if in.r < in.w {
		n := copy(p[:min(want, len(p))], in.look[in.r:in.w])
		in.r += n
		return n, nil
	}
	n, err := in.get(p[:min(want+frameHeader, len(p))])
	if n > want {
		in.r, in.w = 0, copy(in.look[:], p[want:n])
		n = want
	}
	return n, err
}

// fetch reads from the connection. Before it may block, all that has arrived is
// delivered, and the answers to it are written.
func (in *input) fetch(p []byte) (int, error) {
	if in.t.wire == nil || !in.t.wire.ready() {
		in.t.deliver()
		in.t.flush()
	}
	return in.get(p)
}

func (in *input) get(p []byte) (int, error) {
	for {
		n, err := in.t.conn.Read(p)
		if n > 0 {
			return n, nil
		}
		if err != nil {
			return 0, err
		}
	}
}

// batch is what has arrived for one stream and was not delivered yet: frames that
// come one after the other are written to its application at once.
type batch struct {
	s      *Stream
	buffer []byte
	n      int
}

// deliver delivers the batch.
func (t *Tunnel) deliver() {
	b := &t.batch
	if b.n > 0 {
		b.s.deliver(b.buffer[:b.n])
	}
	give(b.buffer)
	*b = batch{}
}

// read takes what the peer sends until it breaks the rules or the connection ends.
func (t *Tunnel) read() error {
	defer t.deliver()
	if err := t.readSettings(); err != nil {
		return t.readError(err)
	}
	for {
		if err := t.readFrame(); err != nil {
			return t.readError(err)
		}
	}
}

// readError tells why the reading ended.
func (t *Tunnel) readError(err error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var broken http2.ConnectionError
	var ours *connectionError
	switch {
	case t.broke != nil && saysNothing(err):
		return fmt.Errorf("hbone: write: %w", t.broke)
	case errors.As(err, &ours):
		return err
	case errors.As(err, &broken):
		why := "the peer breaks the rules of HTTP/2"
		if detail := t.in.frames.ErrorDetail(); detail != nil {
			why += ": " + detail.Error()
		}
		return &connectionError{http2.ErrCode(broken), why}
	case errors.Is(err, http2.ErrFrameTooLarge):
		return &connectionError{http2.ErrCodeFrameSize, "the peer sends a frame that is too large"}
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		if t.goaway || t.draining {
			return errClosed
		}
		return fmt.Errorf("hbone: the peer closed the connection: %w", err)
	}
	return fmt.Errorf("hbone: read: %w", err)
}

// saysNothing reports whether a read failed for no reason of its own.
func saysNothing(err error) bool {
	for _, nothing := range []error{os.ErrDeadlineExceeded, net.ErrClosed, io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET} {
		if errors.Is(err, nothing) {
			return true
		}
	}
	return false
}

// readSettings reads the first frame, which is settings.
func (t *Tunnel) readSettings() error {
	h, err := t.in.frames.ReadFrameHeader()
	if err != nil {
		return err
	}
	if h.Type != http2.FrameSettings || h.Flags.Has(http2.FlagSettingsAck) {
		return protocolError("the peer does not begin with SETTINGS")
	}
	return t.readOther(h)
}

func (t *Tunnel) readFrame() error {
	h, err := t.in.frames.ReadFrameHeader()
	if err != nil {
		return err
	}
	t.heard.Store(true)
	if h.Type == http2.FrameData {
		return t.readData(h)
	}
	t.deliver() // nothing overtakes what came before it
	if h.Type > http2.FrameContinuation {
		return t.skip(int(h.Length)) // of a type that we do not know, which is allowed
	}
	return t.readOther(h)
}

// skip reads n bytes that nobody wants.
func (t *Tunnel) skip(n int) error {
	if n == 0 {
		return nil
	}
	b := borrow(smallBuffer)
	defer give(b)
	for n > 0 {
		m, err := io.ReadFull(&t.in, b[:min(n, len(b))])
		if err != nil {
			return err
		}
		n -= m
	}
	return nil
}

// readData takes a DATA frame.
func (t *Tunnel) readData(h http2.FrameHeader) error {
	if h.StreamID == 0 {
		return protocolError("DATA of no stream")
	}
	length := int(h.Length)
	// The window of the tunnel is given back on arrival: nobody gets beyond it.
	if t.owed += length; t.owed >= tunnelWindow/4 {
		t.mu.Lock()
		t.frames.WriteWindowUpdate(0, uint32(t.owed)) //nolint:errcheck // controlWriter takes all
		t.mu.Unlock()
		t.owed = 0
	}
	s, err := t.lookup(h.StreamID)
	if err != nil {
		return err
	}
	if s == nil { // it was reset
		return t.skip(length)
	}
	refusal := s.accepts(length)
	if t.callee == nil && s.status == 0 {
		refusal = &resetError{code: http2.ErrCodeProtocol, why: "DATA before the answer"}
	}
	if refusal != nil {
		t.deliver()
		s.abort(refusal)
		if err := t.calm(); err != nil {
			return err
		}
		return t.skip(length)
	}
	padding := 0
	if h.Flags.Has(http2.FlagDataPadded) {
		var one [1]byte
		if length == 0 {
			return &connectionError{http2.ErrCodeFrameSize, "DATA is too short for its padding"}
		}
		if _, err := io.ReadFull(&t.in, one[:]); err != nil {
			return err
		}
		length--
		if padding = int(one[0]); padding > length {
			return protocolError("more padding than DATA")
		}
		length -= padding
		s.takePadding(1 + padding)
	}
	for length > 0 {
		n, err := t.readInto(s, length)
		if err != nil {
			return err
		}
		length -= n
	}
	if err := t.skip(padding); err != nil {
		return err
	}
	if h.Flags.Has(http2.FlagDataEndStream) {
		t.deliver()
		s.finish()
	}
	return nil
}

// readInto reads up to want bytes of s into the batch.
func (t *Tunnel) readInto(s *Stream, want int) (int, error) {
	if t.batch.s != s || t.batch.n == len(t.batch.buffer) {
		t.deliver()
	}
	if t.in.r == t.in.w && (t.wire == nil || !t.wire.ready()) {
		// This may block, and until then all that has arrived is delivered.
		t.deliver()
		t.flush()
	}
	b := &t.batch
	if b.buffer == nil {
		b.s, b.buffer = s, borrow(want+frameHeader)
	}
	n, err := t.in.payload(b.buffer[b.n:], want)
	b.n += n
	return n, err
}

// accepts takes the room for n bytes from the window of s, or says why not.
func (s *Stream) accepts(n int) *resetError {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.ended:
		return &resetError{code: http2.ErrCodeStreamClosed, why: "DATA after its end"}
	case n > s.recvWindow:
		return &resetError{code: http2.ErrCodeFlowControl, why: "DATA beyond its window"}
	}
	s.recvWindow -= n
	return nil
}

func (s *Stream) takePadding(n int) {
	s.mu.Lock()
	s.take(n)
	s.mu.Unlock()
}

// lookup returns the stream of that number, nil if it is no more, and an error if
// it never was.
func (t *Tunnel) lookup(id uint32) (*Stream, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.streams[id]; s != nil {
		return s, nil
	}
	if t.idle(id) {
		return nil, protocolError(fmt.Sprintf("a frame of stream %d, which nobody has opened", id))
	}
	return nil, nil
}

// idle reports whether nobody has opened the stream yet. mu is held.
func (t *Tunnel) idle(id uint32) bool {
	switch {
	case id%2 == 0:
		return true // callees open none
	case t.callee != nil:
		return id > t.lastID
	}
	return id >= t.nextID
}

// calm refuses to go on with a peer that makes us answer more than it reads.
func (t *Tunnel) calm() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.provoked > maxProvoked {
		return &connectionError{http2.ErrCodeEnhanceYourCalm, "the peer does not read its answers"}
	}
	return nil
}

// readOther takes a frame that is not DATA.
func (t *Tunnel) readOther(h http2.FrameHeader) error {
	if h.Length > maxOtherFrame {
		return http2.ErrFrameTooLarge
	}
	if h.Type == http2.FrameHeaders {
		// CONTINUATION frames belong to it.
		t.in.limit = maxHeaderBlock
		t.in.frames.SetMaxReadFrameSize(maxOtherFrame)
	}
	f, err := t.in.frames.ReadFrameForHeader(h)
	t.in.limit = -1
	t.in.frames.SetMaxReadFrameSize(maxFrame)

	var malformed http2.StreamError
	switch {
	case errors.As(err, &malformed):
		err = t.malformed(h, malformed)
	case err == nil:
		err = t.handle(f)
	}
	if err != nil {
		return err
	}
	return t.calm()
}

// malformed resets the stream that a malformed frame is of.
func (t *Tunnel) malformed(h http2.FrameHeader, why http2.StreamError) error {
	if h.Type == http2.FrameHeaders && t.callee != nil {
		if err := t.opened(h.StreamID); err != nil {
			return err
		}
	}
	s, err := t.lookup(h.StreamID)
	if err != nil {
		return err
	}
	if s != nil {
		s.abort(&resetError{code: why.Code, why: "malformed " + h.Type.String()})
		return nil
	}
	t.refuse(h.StreamID, why.Code)
	return nil
}

// refuse resets a stream that there is nothing of.
func (t *Tunnel) refuse(id uint32, code http2.ErrCode) {
	t.mu.Lock()
	t.frames.WriteRSTStream(id, code) //nolint:errcheck // controlWriter takes all
	t.provoked += frameHeader + 4
	t.mu.Unlock()
}

func (t *Tunnel) handle(f http2.Frame) error {
	switch f := f.(type) {
	case *http2.SettingsFrame:
		return t.handleSettings(f)
	case *http2.MetaHeadersFrame:
		if t.callee != nil {
			return t.handleRequest(f)
		}
		return t.handleAnswer(f)
	case *http2.WindowUpdateFrame:
		return t.handleWindowUpdate(f)
	case *http2.RSTStreamFrame:
		return t.handleReset(f)
	case *http2.PingFrame:
		if !f.IsAck() {
			t.mu.Lock()
			t.frames.WritePing(true, f.Data) //nolint:errcheck // controlWriter takes all
			t.provoked += frameHeader + 8
			t.mu.Unlock()
		}
		return nil
	case *http2.GoAwayFrame:
		return t.handleGoAway(f)
	case *http2.PushPromiseFrame:
		return protocolError("PUSH_PROMISE")
	}
	return nil // PRIORITY means nothing any more (RFC 9113 §5.3.2)
}

func (t *Tunnel) handleSettings(f *http2.SettingsFrame) error {
	if f.IsAck() {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.peer.known = true
	err := f.ForeachSetting(func(s http2.Setting) error {
		if err := s.Valid(); err != nil {
			return err
		}
		switch s.ID {
		case http2.SettingEnablePush:
			if t.callee == nil && s.Val != 0 {
				return protocolError("a callee that enables push")
			}
		case http2.SettingHeaderTableSize:
			t.encoder.SetMaxDynamicTableSize(min(s.Val, 4096))
		case http2.SettingMaxConcurrentStreams:
			t.peer.maxStreams = s.Val
		case http2.SettingMaxFrameSize:
			t.peer.maxFrame = int(s.Val)
		case http2.SettingInitialWindowSize:
			change := int64(s.Val) - t.peer.window
			t.peer.window = int64(s.Val)
			for _, stream := range t.streams {
				if stream.sendWindow += change; stream.sendWindow > maxInt31 {
					return &connectionError{http2.ErrCodeFlowControl, "SETTINGS that make a window overflow"}
				}
				stream.feed()
			}
		}
		return nil
	})
	t.frames.WriteSettingsAck() //nolint:errcheck // controlWriter takes all
	t.provoked += frameHeader
	return err
}

const maxInt31 = 1<<31 - 1

func (t *Tunnel) handleWindowUpdate(f *http2.WindowUpdateFrame) error {
	if f.StreamID == 0 {
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.sendWindow += int64(f.Increment); t.sendWindow > maxInt31 {
			return &connectionError{http2.ErrCodeFlowControl, "WINDOW_UPDATE beyond the largest window"}
		}
		t.feed()
		return nil
	}
	s, err := t.lookup(f.StreamID)
	if err != nil || s == nil {
		return err
	}
	t.mu.Lock()
	s.sendWindow += int64(f.Increment)
	overflow := s.sendWindow > maxInt31
	s.feed()
	t.mu.Unlock()
	if overflow {
		s.abort(&resetError{code: http2.ErrCodeFlowControl, why: "WINDOW_UPDATE beyond the largest window"})
	}
	return nil
}

func (t *Tunnel) handleReset(f *http2.RSTStreamFrame) error {
	s, err := t.lookup(f.StreamID)
	if err != nil || s == nil {
		return err
	}
	if t.callee != nil && !t.callee.wasAnswered(s) && !t.callee.resets.Allow() {
		return &connectionError{http2.ErrCodeEnhanceYourCalm, "too many requests that were given up"}
	}
	s.abort(&resetError{code: f.ErrCode, remote: true})
	return nil
}

func (t *Tunnel) handleGoAway(f *http2.GoAwayFrame) error {
	t.mu.Lock()
	t.goaway = true
	var unprocessed []*Stream
	if t.callee == nil {
		for id, s := range t.streams {
			if id > f.LastStreamID {
				unprocessed = append(unprocessed, s)
			}
		}
	}
	over := len(t.streams) == len(unprocessed)
	t.mu.Unlock()
	for _, s := range unprocessed {
		s.abort(&resetError{code: http2.ErrCodeRefusedStream, remote: true})
	}
	switch {
	case f.ErrCode != http2.ErrCodeNo:
		return fmt.Errorf("hbone: the peer ends the tunnel: %q (%v)", clip(f.DebugData()), f.ErrCode)
	case over && t.callee == nil:
		return errClosed
	}
	return nil
}

// clip bounds what a peer can put into our log.
func clip(b []byte) []byte { return b[:min(len(b), 200)] }

// handleAnswer takes what a callee says to a request, or after all it has sent.
func (t *Tunnel) handleAnswer(f *http2.MetaHeadersFrame) error {
	s, err := t.lookup(f.StreamID)
	if err != nil || s == nil {
		return err
	}
	select {
	case <-s.answered:
		return t.trailer(s, f)
	default:
	}
	status := statusOf(f)
	switch {
	case status == 0:
		s.abort(&resetError{code: http2.ErrCodeProtocol, why: "an answer without a status"})
		return nil
	case f.Truncated:
		s.abort(&resetError{code: http2.ErrCodeEnhanceYourCalm, why: "an answer that is too long"})
		return nil
	case status < 200:
		if s.informed++; s.informed > 16 || f.StreamEnded() {
			s.abort(&resetError{code: http2.ErrCodeProtocol, why: "information and no answer"})
		}
		return nil
	}
	s.status, s.answer = status, headerOf(f)
	close(s.answered)
	if f.StreamEnded() {
		s.finish()
	}
	return nil
}

// statusOf returns the status of an answer, or 0 if it has none.
func statusOf(f *http2.MetaHeadersFrame) int {
	status, err := strconv.Atoi(f.PseudoValue("status"))
	if err != nil || status < 100 || status > 999 {
		return 0
	}
	return status
}

// trailer takes the header that ends a stream. It says nothing that a TCP connection
// could say.
func (t *Tunnel) trailer(s *Stream, f *http2.MetaHeadersFrame) error {
	s.mu.Lock()
	ended := s.ended
	s.mu.Unlock()
	switch {
	case ended:
		s.abort(&resetError{code: http2.ErrCodeStreamClosed, why: "HEADERS after its end"})
	case !f.StreamEnded():
		s.abort(&resetError{code: http2.ErrCodeProtocol, why: "HEADERS in its middle"})
	default:
		s.finish()
	}
	return nil
}

func headerOf(f *http2.MetaHeadersFrame) Header {
	fields := f.RegularFields()
	if len(fields) == 0 {
		return nil
	}
	h := make(Header, len(fields))
	for _, field := range fields {
		if before, repeated := h[field.Name]; repeated {
			h[field.Name] = before + ", " + field.Value
		} else {
			h[field.Name] = field.Value
		}
	}
	return h
}

// validAuthority reports whether s may be an authority: of a length and of letters
// that names, addresses and ports have. What it means is for others to say.
func validAuthority(s string) bool {
	if s == "" || len(s) > maxAuthority {
		return false
	}
	return strings.IndexFunc(s, func(r rune) bool {
		switch {
		case 'a' <= r && r <= 'z', 'A' <= r && r <= 'Z', '0' <= r && r <= '9':
			return false
		}
		return !strings.ContainsRune("-._~:[]%", r)
	}) < 0
}
