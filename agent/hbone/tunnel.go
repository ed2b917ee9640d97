package hbone

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Tunnel is the caller's end of a tunnel. Its methods may be called by many at a time.
type Tunnel struct {
	conn   net.Conn
	wire   *wire // what conn writes to, or nil
	max    int
	callee *callee // nil at the caller's end
	done   chan struct{}
	alarm  *time.Timer
	heard  atomic.Bool   // the peer said something since the last alarm
	writes atomic.Uint64 // odd while something is being written

	// sending is held by whoever writes to conn. It is not unlocked before the
	// frames that wait in control were looked for.
	sending turn

	// mu guards all below. Whoever holds it waits for nothing.
	mu         sync.Mutex
	control    []byte // frames to be written before any other
	provoked   int    // how much of control the peer made us write
	frames     *http2.Framer
	encoder    *hpack.Encoder
	block      bytes.Buffer // what encoder writes
	streams    map[uint32]*Stream
	nextID     uint32 // of the streams that we make
	lastID     uint32 // the highest of those that the peer made
	sendWindow int64
	starving   int // streams that wait for sendWindow
	windows    int // of all streams
	peer       settings
	goaway     bool // the peer takes no more streams
	draining   bool // we take none, or make none
	empty      chan struct{}
	broke      error // why nothing can be written any more
	err        error

	// For look.
	silent    int // how many times in a row nothing was heard
	lastWrite uint64
	stuck     int // how many times in a row the same was being written

	// For the one that reads.
	in    input
	owed  int // what the peer was not yet told that it may send again
	batch batch
}

// settings are those of the peer.
type settings struct {
	maxFrame   int
	window     int64
	maxStreams uint32
	known      bool
}

func newTunnel(conn net.Conn, c Config) *Tunnel {
	t := &Tunnel{
		conn: conn, wire: wireBeneath(conn), max: c.maxStreams(),
		sending: make(turn, 1), done: make(chan struct{}), empty: make(chan struct{}),
		streams: make(map[uint32]*Stream), nextID: 1,
		sendWindow: 65_535,
		peer:       settings{maxFrame: 16 << 10, window: 65_535, maxStreams: 100},
	}
	t.in.t = t
	t.in.limit = -1
	t.in.frames = http2.NewFramer(nil, &t.in)
	t.in.frames.SetMaxReadFrameSize(maxFrame)
	t.in.frames.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	t.in.frames.MaxHeaderListSize = maxHeaderList
	t.frames = http2.NewFramer((*controlWriter)(t), nil)
	t.encoder = hpack.NewEncoder(&t.block)
	return t
}

// controlWriter puts the frames that it is given into control. Whoever writes to it
// holds mu.
type controlWriter Tunnel

func (w *controlWriter) Write(p []byte) (int, error) {
	w.control = append(w.control, p...)
	return len(p), nil
}

// hello queues what both ends say first.
func (t *Tunnel) hello(more ...http2.Setting) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.frames.WriteSettings(append(more, //nolint:errcheck // controlWriter takes all
		http2.Setting{ID: http2.SettingInitialWindowSize, Val: initialWindow},
		http2.Setting{ID: http2.SettingMaxFrameSize, Val: maxFrame},
		http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: maxHeaderList})...)
	t.frames.WriteWindowUpdate(0, tunnelWindow-65_535) //nolint:errcheck // controlWriter takes all
	t.alarm = time.AfterFunc(idlePing, t.look)
}

// Open makes conn, on which nothing was sent yet, the caller's end of a tunnel. It
// does not wait for the peer: an error of the peer comes with the first Connect. The
// Tunnel owns conn, whatever Open returns. Whoever opens it closes it.
func Open(conn net.Conn, c Config) (*Tunnel, error) {
	t := newTunnel(conn, c)
	t.control = append(t.control, http2.ClientPreface...)
	t.hello(http2.Setting{ID: http2.SettingEnablePush, Val: 0})
	go func() { t.fail(t.read()) }()
	t.flush()
	return t, nil
}

// Connect asks the peer for a connection to authority, and blocks until it has
// answered or ctx has ended. Whoever gets a Stream closes it.
//
// The error is [ErrUnprocessed] if it is safe to ask somebody else, a [*StatusError]
// if the peer refused, and ctx's if that ended. Whatever else it is, the peer may
// have acted on the request.
func (t *Tunnel) Connect(ctx context.Context, authority string, h Header) (*Stream, Header, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, context.Cause(ctx)
	}
	s, err := t.request(authority, h)
	if err != nil {
		return nil, nil, err
	}
	t.flush()
	select {
	case <-s.answered:
	case <-s.over:
		// Both may have come.
		select {
		case <-s.answered:
		default:
			return nil, nil, s.cause()
		}
	case <-ctx.Done():
		s.abort(&resetError{code: http2.ErrCodeCancel, why: "given up"})
		return nil, nil, context.Cause(ctx)
	}
	if s.status < 200 || s.status > 299 {
		s.abort(&resetError{code: http2.ErrCodeCancel, why: "refused"})
		return nil, nil, &StatusError{s.status}
	}
	return s, s.answer, nil
}

// request queues a request.
func (t *Tunnel) request(authority string, h Header) (*Stream, error) {
	if !validAuthority(authority) {
		return nil, fmt.Errorf("hbone: %q is no authority", authority)
	}
	if err := h.check(); err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.available() {
		if t.err != nil {
			return nil, fmt.Errorf("%w: %w", ErrUnprocessed, t.err)
		}
		return nil, fmt.Errorf("%w: the tunnel takes no more streams", ErrUnprocessed)
	}
	s := t.newStream(t.nextID)
	s.answered = make(chan struct{})
	t.nextID += 2
	t.writeHeader(s.id, false, [][2]string{{":method", "CONNECT"}, {":authority", authority}}, h)
	return s, nil
}

// writeHeader queues a header. mu is held.
func (t *Tunnel) writeHeader(id uint32, end bool, pseudo [][2]string, h Header) {
	t.block.Reset()
	for _, f := range pseudo {
		t.encoder.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}) //nolint:errcheck // to a bytes.Buffer
	}
	for name, value := range h {
		t.encoder.WriteField(hpack.HeaderField{Name: name, Value: value}) //nolint:errcheck // to a bytes.Buffer
	}
	block := t.block.Bytes()
	n := min(len(block), maxOtherFrame)
	t.frames.WriteHeaders(http2.HeadersFrameParam{ //nolint:errcheck // controlWriter takes all
		StreamID: id, BlockFragment: block[:n], EndStream: end, EndHeaders: n == len(block),
	})
	for block = block[n:]; len(block) > 0; block = block[n:] {
		n = min(len(block), maxOtherFrame)
		t.frames.WriteContinuation(id, n == len(block), block[:n]) //nolint:errcheck // controlWriter takes all
	}
}

// Available reports whether Connect would send a request now.
func (t *Tunnel) Available() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.available()
}

func (t *Tunnel) available() bool {
	return t.err == nil && !t.goaway && !t.draining && t.nextID < 1<<31 &&
		len(t.streams) < t.max && uint64(len(t.streams)) < uint64(t.peer.maxStreams)
}

// Streams returns how many streams are open.
func (t *Tunnel) Streams() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.streams)
}

// Done is closed when the tunnel has ended, and every stream in it.
func (t *Tunnel) Done() <-chan struct{} { return t.done }

// Err returns why the tunnel ended: nil before it has.
func (t *Tunnel) Err() error {
	select {
	case <-t.done:
		return t.err
	default:
		return nil
	}
}

// Close resets every stream, tells the peer and closes the connection. It waits for
// the peer no longer than a second, or two if that has broken the rules.
func (t *Tunnel) Close() error {
	t.fail(errClosed)
	return nil
}

// Shutdown makes no more streams, waits until those that are open have ended, or ctx
// has, and then closes the tunnel. It returns ctx's error if streams had to be reset.
func (t *Tunnel) Shutdown(ctx context.Context) error {
	t.drain()
	select {
	case <-t.empty:
		return t.Close()
	case <-t.done:
		return nil
	case <-ctx.Done():
		t.fail(errClosed)
		return context.Cause(ctx)
	}
}

// drain tells the peer that no new stream is taken, or made.
func (t *Tunnel) drain() {
	t.mu.Lock()
	if !t.draining && t.err == nil {
		t.draining = true
		t.frames.WriteGoAway(t.lastID, http2.ErrCodeNo, nil) //nolint:errcheck // controlWriter takes all
		if len(t.streams) == 0 {
			close(t.empty)
		}
	}
	t.mu.Unlock()
	t.flush()
}

// fail ends the tunnel, once. The peer is told why.
func (t *Tunnel) fail(err error) {
	t.mu.Lock()
	if t.err != nil {
		t.mu.Unlock()
		<-t.done
		return
	}
	t.err = err
	code := http2.ErrCodeNo
	var broken *connectionError
	if errors.As(err, &broken) {
		code = broken.code
	}
	t.frames.WriteGoAway(t.lastID, code, []byte(reasonFor(err))) //nolint:errcheck // controlWriter takes all
	control := t.control
	t.control = nil
	open := make([]*Stream, 0, len(t.streams))
	for _, s := range t.streams {
		open = append(open, s)
	}
	t.mu.Unlock()
	t.alarm.Stop()
	for _, s := range open {
		s.end(err)
	}

	// A peer that does not read is waited for no longer than this, and learns no
	// reason. Whoever is writing now is done by then.
	t.conn.SetWriteDeadline(time.Now().Add(time.Second)) //nolint:errcheck // then the write fails
	t.sending.lock()
	if _, err := t.conn.Write(control); err == nil && t.wire != nil {
		t.wire.flush(true) //nolint:errcheck // the tunnel has failed already
	}
	t.sending.unlock()
	if broken != nil {
		t.linger()
	}
	_ = t.below().Close() // it is broken already, or given up
	t.mu.Lock()
	for _, s := range open {
		t.remove(s)
	}
	t.mu.Unlock()
	close(t.done)
}

// reasonFor is what the peer may know.
func reasonFor(err error) string {
	var broken *connectionError
	if errors.As(err, &broken) {
		return broken.why
	}
	return ""
}

// linger reads what the peer still sends, for a second: a connection that is closed
// with bytes unread is reset, and the reason for it is lost with it.
func (t *Tunnel) linger() {
	below := t.below()
	half, ok := below.(interface{ CloseWrite() error })
	if !ok || half.CloseWrite() != nil {
		return
	}
	below.SetReadDeadline(time.Now().Add(time.Second))         //nolint:errcheck // then the read fails
	io.Copy(io.Discard, io.LimitReader(below, 2*tunnelWindow)) //nolint:errcheck // it ends somehow
}

// below is the connection beneath TLS. To close it waits for nothing.
func (t *Tunnel) below() net.Conn {
	if t.wire != nil {
		return t.wire.TCPConn
	}
	if c, ok := t.conn.(interface{ NetConn() net.Conn }); ok {
		return c.NetConn()
	}
	return t.conn
}

// look runs every idlePing. It asks a silent peer whether it lives.
func (t *Tunnel) look() {
	if t.heard.Swap(false) {
		t.silent = 0
	} else {
		t.silent++
	}
	if writes := t.writes.Load(); writes%2 == 1 && writes == t.lastWrite {
		t.stuck++
	} else {
		t.lastWrite, t.stuck = writes, 0
	}
	switch {
	case t.silent > int(pongTimeout/idlePing):
		t.fail(fmt.Errorf("hbone: the peer is dead: it said nothing for %v", idlePing+pongTimeout))
		return
	case t.stuck >= int(pongTimeout/idlePing):
		t.fail(fmt.Errorf("hbone: the peer is dead: it read nothing for %v", pongTimeout))
		return
	}
	t.mu.Lock()
	if t.silent == 1 {
		t.frames.WritePing(false, [8]byte{}) //nolint:errcheck // controlWriter takes all
	}
	if t.err == nil {
		t.alarm.Reset(idlePing)
	}
	t.mu.Unlock()
	t.flush()
}
