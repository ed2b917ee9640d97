package hbone_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"troth.dev/troth/agent/hbone"
)

// peer is the other end of a connection to ours, frame by frame.
type peer struct {
	*http2.Framer

	conn  *net.TCPConn
	block bytes.Buffer
	hpack *hpack.Encoder
}

func newPeer(c *net.TCPConn) *peer {
	p := &peer{conn: c, Framer: http2.NewFramer(c, c)}
	p.hpack = hpack.NewEncoder(&p.block)
	p.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	p.AllowIllegalWrites = true
	c.SetDeadline(time.Now().Add(patience))
	return p
}

// rawCaller is a caller of our callee's end: it has said hello.
func rawCaller(t *testing.T, c hbone.Config, handle func(*hbone.Request)) (*peer, <-chan error) {
	t.Helper()
	caller, callee := socketPair(t)
	result := serve(t, callee, c, handle)
	p := newPeer(caller)
	io.WriteString(caller, http2.ClientPreface)
	p.WriteSettings()
	return p, result
}

// rawCallee is a callee of our caller's end.
func rawCallee(t *testing.T, settings ...http2.Setting) (*peer, *hbone.Tunnel) {
	t.Helper()
	caller, callee := socketPair(t)
	tunnel, err := hbone.Open(caller, hbone.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tunnel.Close() })
	p := newPeer(callee)
	if _, err := io.ReadFull(callee, make([]byte, len(http2.ClientPreface))); err != nil {
		t.Fatal(err)
	}
	p.WriteSettings(settings...)
	return p, tunnel
}

// encode returns a header block.
func (p *peer) encode(fields ...string) []byte {
	p.block.Reset()
	for n := 0; n < len(fields); n += 2 {
		p.hpack.WriteField(hpack.HeaderField{Name: fields[n], Value: fields[n+1]})
	}
	return p.block.Bytes()
}

func (p *peer) headers(id uint32, end bool, fields ...string) {
	p.WriteHeaders(http2.HeadersFrameParam{StreamID: id, EndStream: end, EndHeaders: true, BlockFragment: p.encode(fields...)})
}

func (p *peer) connect(id uint32) {
	p.headers(id, false, ":method", "CONNECT", ":authority", "10.0.0.1:80")
}

// next returns the next frame that match accepts, and what came before is lost.
func next[F http2.Frame](t *testing.T, p *peer, match func(F) bool) F {
	t.Helper()
	for {
		f, err := p.ReadFrame()
		if err != nil {
			t.Fatalf("the frame never came: %v", err)
		}
		if f, ok := f.(F); ok && (match == nil || match(f)) {
			return f
		}
	}
}

func (p *peer) assertStatus(t *testing.T, id uint32, want string) {
	t.Helper()
	f := next(t, p, func(f *http2.MetaHeadersFrame) bool { return f.StreamID == id })
	if got := f.PseudoValue("status"); got != want {
		t.Errorf("stream %d is answered %q, want %s", id, got, want)
	}
}

func (p *peer) assertReset(t *testing.T, id uint32, want http2.ErrCode) {
	t.Helper()
	f := next(t, p, func(f *http2.RSTStreamFrame) bool { return f.StreamID == id })
	if f.ErrCode != want {
		t.Errorf("stream %d is reset with %v, want %v", id, f.ErrCode, want)
	}
}

func (p *peer) assertGoAway(t *testing.T, want http2.ErrCode, why string) {
	t.Helper()
	f := next[*http2.GoAwayFrame](t, p, nil)
	if f.ErrCode != want || !strings.Contains(string(f.DebugData()), why) {
		t.Errorf("the tunnel ends with %v, %q, want %v, %q", f.ErrCode, f.DebugData(), want, why)
	}
	if _, err := io.Copy(io.Discard, p.conn); err != nil {
		t.Errorf("the connection ends with %v, want an end", err)
	}
	p.conn.Close()
}

// A caller that breaks the rules is told which, and the tunnel ends.
func TestCallerBreaksTunnel(t *testing.T) {
	raw := func(kind http2.FrameType, flags http2.Flags, id uint32, payload string) func(*peer) {
		return func(p *peer) { p.WriteRawFrame(kind, flags, id, []byte(payload)) }
	}
	setting := func(id http2.SettingID, value uint32) func(*peer) {
		return func(p *peer) { p.WriteSettings(http2.Setting{ID: id, Val: value}) }
	}
	for name, tt := range map[string]struct {
		do   func(*peer)
		code http2.ErrCode
		why  string
	}{
		"DATA of no stream":         {raw(http2.FrameData, 0, 0, "x"), http2.ErrCodeProtocol, "DATA of no stream"},
		"DATA of an idle stream":    {raw(http2.FrameData, 0, 7, "x"), http2.ErrCodeProtocol, "which nobody has opened"},
		"DATA of a callee's stream": {raw(http2.FrameData, 0, 2, "x"), http2.ErrCodeProtocol, "which nobody has opened"},
		"too much padding": {func(p *peer) {
			p.connect(1)
			raw(http2.FrameData, http2.FlagDataPadded, 1, "\x05abcd")(p)
		}, http2.ErrCodeProtocol, "more padding than DATA"},
		"no room for padding": {func(p *peer) {
			p.connect(1)
			raw(http2.FrameData, http2.FlagDataPadded, 1, "")(p)
		}, http2.ErrCodeFrameSize, "too short for its padding"},
		"too large DATA": {func(p *peer) {
			p.connect(1)
			p.WriteData(1, false, make([]byte, 256<<10+1))
		}, http2.ErrCodeFrameSize, "too large"},
		"too large HEADERS": {func(p *peer) {
			p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: make([]byte, 16<<10+1)})
		}, http2.ErrCodeFrameSize, "too large"},
		"too large GOAWAY":                {func(p *peer) { p.WriteGoAway(0, 0, make([]byte, 20<<10)) }, http2.ErrCodeFrameSize, "too large"},
		"RST_STREAM of an idle stream":    {func(p *peer) { p.WriteRSTStream(9, http2.ErrCodeCancel) }, http2.ErrCodeProtocol, "which nobody has opened"},
		"RST_STREAM of a wrong size":      {raw(http2.FrameRSTStream, 0, 1, "abc"), http2.ErrCodeFrameSize, ""},
		"WINDOW_UPDATE of an idle stream": {func(p *peer) { p.WriteWindowUpdate(9, 1) }, http2.ErrCodeProtocol, "which nobody has opened"},
		"WINDOW_UPDATE of nothing":        {func(p *peer) { p.WriteWindowUpdate(0, 0) }, http2.ErrCodeProtocol, ""},
		"WINDOW_UPDATE of too much":       {func(p *peer) { p.WriteWindowUpdate(0, 1<<31-1) }, http2.ErrCodeFlowControl, "beyond the largest window"},
		"a window of too much":            {setting(http2.SettingInitialWindowSize, 1<<31), http2.ErrCodeFlowControl, ""},
		"SETTINGS that make one overflow": {func(p *peer) {
			p.connect(1)
			p.WriteWindowUpdate(1, 1<<31-1-65535)
			setting(http2.SettingInitialWindowSize, 65536)(p)
		}, http2.ErrCodeFlowControl, "make a window overflow"},
		"too small frames":           {setting(http2.SettingMaxFrameSize, 1<<14-1), http2.ErrCodeProtocol, ""},
		"SETTINGS of a stream":       {raw(http2.FrameSettings, 0, 1, ""), http2.ErrCodeProtocol, ""},
		"half a setting":             {raw(http2.FrameSettings, 0, 0, "abc"), http2.ErrCodeFrameSize, ""},
		"an ack that says something": {raw(http2.FrameSettings, http2.FlagSettingsAck, 0, "abcdef"), http2.ErrCodeFrameSize, ""},
		"PING of a stream":           {raw(http2.FramePing, 0, 1, "12345678"), http2.ErrCodeProtocol, ""},
		"PING of a wrong size":       {raw(http2.FramePing, 0, 0, "1234567"), http2.ErrCodeFrameSize, ""},
		"PUSH_PROMISE":               {func(p *peer) { p.WritePushPromise(http2.PushPromiseParam{StreamID: 1, PromiseID: 2, EndHeaders: true}) }, http2.ErrCodeProtocol, "PUSH_PROMISE"},
		"a stream of an even number": {func(p *peer) { p.connect(2) }, http2.ErrCodeProtocol, "stream 2 of a caller"},
		"HEADERS of no stream":       {func(p *peer) { p.connect(0) }, http2.ErrCodeProtocol, ""},
		"a CONTINUATION of nothing":  {func(p *peer) { p.WriteContinuation(1, true, nil) }, http2.ErrCodeProtocol, "unexpected CONTINUATION"},
		"DATA in the middle of a header": {func(p *peer) {
			p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.encode(":method", "CONNECT")})
			p.WriteData(1, false, nil)
		}, http2.ErrCodeProtocol, "expected CONTINUATION"},
		"a header that does not decode": {func(p *peer) {
			p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}})
		}, http2.ErrCodeCompression, ""},
		"CONTINUATION without end": {func(p *peer) {
			p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.encode(":method", "CONNECT")})
			for range 10_000 {
				if p.WriteContinuation(1, false, nil) != nil {
					return
				}
			}
		}, http2.ErrCodeEnhanceYourCalm, "takes too many bytes"},
		"a header without end": {func(p *peer) {
			p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.encode(":method", "CONNECT")})
			for n := range 100 {
				if p.WriteContinuation(1, false, p.encode(fmt.Sprintf("x-%d", n), strings.Repeat("y", 2000))) != nil {
					return
				}
			}
		}, http2.ErrCodeProtocol, ""},
		"HTTP/1.1": {func(p *peer) { io.WriteString(p.conn, "GET / HTTP/1.1\r\n\r\n") }, http2.ErrCodeFrameSize, "too large"},
	} {
		t.Run(name, func(t *testing.T) {
			p, result := rawCaller(t, hbone.Config{}, func(r *hbone.Request) { <-r.Done() })
			// What the kernel does not take is not needed.
			go tt.do(p)
			p.assertGoAway(t, tt.code, tt.why)
			if err := <-result; err == nil || !strings.Contains(err.Error(), tt.code.String()) {
				t.Errorf("Serve returned %v, want %v", err, tt.code)
			}
		})
	}
}

func TestNotHTTP2(t *testing.T) {
	for name, hello := range map[string]string{
		"HTTP/1.1":       "GET / HTTP/1.1\r\nHost: 10.0.0.1\r\n\r\n",
		"no SETTINGS":    http2.ClientPreface + "\x00\x00\x08\x06\x00\x00\x00\x00\x00abcdefgh",
		"an ack of them": http2.ClientPreface + "\x00\x00\x00\x04\x01\x00\x00\x00\x00",
	} {
		t.Run(name, func(t *testing.T) {
			caller, callee := socketPair(t)
			serve(t, callee, hbone.Config{}, echo)
			p := newPeer(caller)
			io.WriteString(caller, hello)
			p.assertGoAway(t, http2.ErrCodeProtocol, "")
		})
	}
}

// What is wrong with a stream ends the stream, and no other.
func TestCallerBreaksStream(t *testing.T) {
	for name, tt := range map[string]struct {
		do   func(*peer)
		code http2.ErrCode
	}{
		"DATA after its end": {func(p *peer) {
			p.WriteData(1, true, nil)
			p.WriteData(1, false, []byte("x"))
		}, http2.ErrCodeStreamClosed},
		"DATA beyond its window": {func(p *peer) {
			for range 17 {
				p.WriteData(1, false, make([]byte, 16<<10))
			}
		}, http2.ErrCodeFlowControl},
		"WINDOW_UPDATE of nothing":  {func(p *peer) { p.WriteWindowUpdate(1, 0) }, http2.ErrCodeProtocol},
		"WINDOW_UPDATE of too much": {func(p *peer) { p.WriteWindowUpdate(1, 1<<31-1) }, http2.ErrCodeFlowControl},
		"HEADERS in its middle":     {func(p *peer) { p.headers(1, false, "x", "y") }, http2.ErrCodeProtocol},
		"HEADERS after its end": {func(p *peer) {
			p.WriteData(1, true, nil)
			p.headers(1, true, "x", "y")
		}, http2.ErrCodeStreamClosed},
		"malformed HEADERS": {func(p *peer) { p.headers(1, true, "X", "y") }, http2.ErrCodeProtocol},
	} {
		t.Run(name, func(t *testing.T) {
			failed := make(chan error, 1)
			p, _ := rawCaller(t, hbone.Config{}, func(r *hbone.Request) {
				if r.Authority != "10.0.0.1:80" {
					echo(r)
					return
				}
				s, err := r.Accept(nil)
				if err == nil {
					<-r.Done()
					_, err = s.Read(make([]byte, 1))
				}
				failed <- err
			})
			p.connect(1)
			p.assertStatus(t, 1, "200")
			tt.do(p)
			p.assertReset(t, 1, tt.code)
			if err := <-failed; !errors.Is(err, syscall.ECONNRESET) || !strings.Contains(err.Error(), tt.code.String()) {
				t.Errorf("the handler read %v, want a reset, and %v", err, tt.code)
			}
			p.headers(3, false, ":method", "CONNECT", ":authority", "other:80")
			p.assertStatus(t, 3, "200")
			p.WriteData(3, true, []byte("still here"))
			if f := next[*http2.DataFrame](t, p, nil); string(f.Data()) != "still here" {
				t.Errorf("the next stream echoes %q", f.Data())
			}
		})
	}
}

func TestCallerAsksWhatIsRefused(t *testing.T) {
	long := strings.Repeat("a", 321)
	for name, tt := range map[string]struct {
		fields []string
		status string
	}{
		"GET":                     {[]string{":method", "GET", ":scheme", "https", ":path", "/", ":authority", "a"}, "400"},
		"POST without a path":     {[]string{":method", "POST", ":authority", "10.0.0.1:80"}, "400"},
		"a path":                  {[]string{":method", "CONNECT", ":authority", "10.0.0.1:80", ":path", "/"}, "400"},
		"an extended CONNECT":     {[]string{":method", "CONNECT", ":protocol", "websocket", ":scheme", "https", ":path", "/", ":authority", "a:1"}, "400"},
		"no authority":            {[]string{":method", "CONNECT", "host", "10.0.0.1:80"}, "400"},
		"an empty authority":      {[]string{":method", "CONNECT", ":authority", ""}, "400"},
		"a user in the authority": {[]string{":method", "CONNECT", ":authority", "user@10.0.0.1:80"}, "400"},
		"a line in the authority": {[]string{":method", "CONNECT", ":authority", "10.0.0.1:80 x"}, "400"},
		"letters beyond ASCII":    {[]string{":method", "CONNECT", ":authority", "\u0131.example:80"}, "400"},
		"a long authority":        {[]string{":method", "CONNECT", ":authority", long}, "400"},
		"a long header":           {[]string{":method", "CONNECT", ":authority", "10.0.0.1:80", "x", strings.Repeat("y", 9000), "z", strings.Repeat("y", 9000)}, "431"},
	} {
		t.Run(name, func(t *testing.T) {
			p, _ := rawCaller(t, hbone.Config{}, func(r *hbone.Request) { t.Errorf("the handler is asked for %q", r.Authority) })
			block := slices.Clone(p.encode(tt.fields...))
			first := min(len(block), 16<<10)
			p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: first == len(block), BlockFragment: block[:first]})
			if first < len(block) {
				p.WriteContinuation(1, true, block[first:])
			}
			f := next[*http2.MetaHeadersFrame](t, p, nil)
			if got := f.PseudoValue("status"); got != tt.status || !f.StreamEnded() {
				t.Errorf("the answer is %s, ended: %v, want %s and the end", got, f.StreamEnded(), tt.status)
			}
			p.assertReset(t, 1, http2.ErrCodeNo)
		})
	}
	for name, fields := range map[string][]string{
		"two methods":         {":method", "CONNECT", ":method", "CONNECT", ":authority", "a:1"},
		"an unknown pseudo":   {":method", "CONNECT", ":authority", "a:1", ":x", "y"},
		"a status":            {":method", "CONNECT", ":authority", "a:1", ":status", "200"},
		"a late pseudo":       {":method", "CONNECT", "x", "y", ":authority", "a:1"},
		"a capital letter":    {":method", "CONNECT", ":authority", "a:1", "X", "y"},
		"a line in the value": {":method", "CONNECT", ":authority", "a:1", "x", "y\r\nz: 1"},
	} {
		t.Run(name, func(t *testing.T) {
			p, _ := rawCaller(t, hbone.Config{}, func(r *hbone.Request) { t.Errorf("the handler is asked for %q", r.Authority) })
			p.headers(1, false, fields...)
			p.assertReset(t, 1, http2.ErrCodeProtocol)
		})
	}
}

// Frames of streams that are no more are taken, and cost nothing but their way.
func TestFramesOfClosedStreams(t *testing.T) {
	p, _ := rawCaller(t, hbone.Config{}, echo)
	p.connect(1)
	p.assertStatus(t, 1, "200")
	p.WriteData(1, true, nil)
	next(t, p, func(f *http2.DataFrame) bool { return f.StreamEnded() })
	go func() {
		chunk := make([]byte, 16<<10)
		for range 2048 { // twice the window of the tunnel
			p.WriteData(1, false, chunk)
		}
		p.WriteWindowUpdate(1, 1)
		p.WriteRSTStream(1, http2.ErrCodeCancel)
		p.headers(1, true, "x", "y")
		p.connect(3)
	}()
	p.assertStatus(t, 3, "200")
}

func TestStreamsBeyondLimit(t *testing.T) {
	var mu sync.Mutex
	running, most := 0, 0
	p, _ := rawCaller(t, hbone.Config{MaxStreams: 3}, func(r *hbone.Request) {
		mu.Lock()
		running++
		most = max(most, running)
		mu.Unlock()
		r.Accept(nil)
		<-r.Done()
		mu.Lock()
		running--
		mu.Unlock()
	})
	f := next[*http2.SettingsFrame](t, p, nil)
	if v, ok := f.Value(http2.SettingMaxConcurrentStreams); !ok || v != 3 {
		t.Errorf("the callee says that it takes %d streams, want 3", v)
	}
	for id := uint32(1); id < 20; id += 2 {
		p.connect(id)
	}
	for range 7 {
		f := next[*http2.RSTStreamFrame](t, p, nil)
		if f.ErrCode != http2.ErrCodeRefusedStream {
			t.Errorf("stream %d is reset with %v, want REFUSED_STREAM", f.StreamID, f.ErrCode)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if most > 3 {
		t.Errorf("%d handlers ran at a time, want at most 3", most)
	}
}

// A caller that asks and gives up, as fast as it can: what runs is bounded though no
// stream is open, and soon the tunnel ends.
func TestRapidReset(t *testing.T) {
	var mu sync.Mutex
	running, most := 0, 0
	hold := make(chan struct{})
	defer close(hold)
	p, result := rawCaller(t, hbone.Config{MaxStreams: 10}, func(*hbone.Request) {
		mu.Lock()
		running++
		most = max(most, running)
		mu.Unlock()
		<-hold
	})
	go func() {
		for id := uint32(1); id < 10_000; id += 2 {
			p.connect(id)
			if p.WriteRSTStream(id, http2.ErrCodeCancel) != nil {
				return
			}
		}
	}()
	f := next[*http2.GoAwayFrame](t, p, nil)
	if f.ErrCode != http2.ErrCodeEnhanceYourCalm {
		t.Errorf("the tunnel ends with %v, want ENHANCE_YOUR_CALM", f.ErrCode)
	}
	select {
	case err := <-result:
		t.Errorf("Serve returned %v before its handlers did", err)
	default:
	}
	mu.Lock()
	defer mu.Unlock()
	if most > 10 {
		t.Errorf("%d handlers ran at a time, want at most 10", most)
	}
}

// What makes us answer, from a peer that does not read: the answers that wait are
// bounded, and the tunnel ends.
func TestFloodOfWhatIsAnswered(t *testing.T) {
	for name, do := range map[string]func(p *peer, n uint32){
		"PING":     func(p *peer, _ uint32) { p.WritePing(false, [8]byte{}) },
		"SETTINGS": func(p *peer, _ uint32) { p.WriteSettings() },
		"requests that are refused": func(p *peer, n uint32) {
			p.WriteHeaders(http2.HeadersFrameParam{StreamID: 2*n + 1, EndHeaders: true, EndStream: true, BlockFragment: p.encode(":method", "GET")})
		},
		"HEADERS that are malformed": func(p *peer, n uint32) {
			p.WriteHeaders(http2.HeadersFrameParam{StreamID: 2*n + 1, EndHeaders: true, BlockFragment: p.encode("X", "y")})
		},
	} {
		t.Run(name, func(t *testing.T) {
			caller, callee := socketPair(t)
			caller.SetReadBuffer(4096)
			callee.SetWriteBuffer(4096)
			result := serve(t, callee, hbone.Config{}, echo)
			p := newPeer(caller)
			var batch bytes.Buffer
			p.Framer = http2.NewFramer(&batch, nil)
			batch.WriteString(http2.ClientPreface)
			p.WriteSettings()
			var flood sync.WaitGroup
			defer flood.Wait()
			defer caller.Close()
			flood.Go(func() {
				for n := uint32(0); ; n++ {
					do(p, n)
					if batch.Len() > 10_000 {
						if _, err := caller.Write(batch.Bytes()); err != nil {
							break
						}
						batch.Reset()
					}
				}
			})
			if err := <-result; err == nil || !strings.Contains(err.Error(), "ENHANCE_YOUR_CALM") {
				t.Errorf("Serve returned %v, want ENHANCE_YOUR_CALM", err)
			}
		})
	}
}

// A callee that breaks the rules.
func TestCalleeBreaksTunnel(t *testing.T) {
	for name, tt := range map[string]struct {
		do   func(*peer)
		code http2.ErrCode
		why  string
	}{
		"an answer to nothing":    {func(p *peer) { p.headers(7, false, ":status", "200") }, http2.ErrCodeProtocol, "which nobody has opened"},
		"a stream of its own":     {func(p *peer) { p.headers(2, false, ":status", "200") }, http2.ErrCodeProtocol, "which nobody has opened"},
		"DATA of an idle stream":  {func(p *peer) { p.WriteData(7, false, nil) }, http2.ErrCodeProtocol, "which nobody has opened"},
		"push":                    {func(p *peer) { p.WriteSettings(http2.Setting{ID: http2.SettingEnablePush, Val: 1}) }, http2.ErrCodeProtocol, "enables push"},
		"PUSH_PROMISE":            {func(p *peer) { p.WritePushPromise(http2.PushPromiseParam{StreamID: 1, PromiseID: 2, EndHeaders: true}) }, http2.ErrCodeProtocol, "PUSH_PROMISE"},
		"WINDOW_UPDATE too large": {func(p *peer) { p.WriteWindowUpdate(0, 1<<31-1) }, http2.ErrCodeFlowControl, "beyond the largest window"},
	} {
		t.Run(name, func(t *testing.T) {
			p, tunnel := rawCallee(t)
			tt.do(p)
			p.assertGoAway(t, tt.code, tt.why)
			<-tunnel.Done()
			if err := tunnel.Err(); err == nil || !strings.Contains(err.Error(), tt.code.String()) {
				t.Errorf("the tunnel ended with %v, want %v", err, tt.code)
			}
			if _, _, err := tunnel.Connect(context.Background(), "10.0.0.1:80", nil); !errors.Is(err, hbone.ErrUnprocessed) {
				t.Errorf("the error of Connect is %v, want ErrUnprocessed", err)
			}
		})
	}
}

// What a callee can answer to one request.
func TestAnswers(t *testing.T) {
	for name, tt := range map[string]struct {
		do     func(*peer)
		reset  http2.ErrCode // that the callee must see; 0 for none
		status int
		is     error
		why    string
	}{
		"no status":             {do: func(p *peer) { p.headers(1, false, "x", "y") }, reset: http2.ErrCodeProtocol, why: "without a status"},
		"a status of letters":   {do: func(p *peer) { p.headers(1, false, ":status", "abc") }, reset: http2.ErrCodeProtocol, why: "without a status"},
		"a status of 4 digits":  {do: func(p *peer) { p.headers(1, false, ":status", "2000") }, reset: http2.ErrCodeProtocol, why: "without a status"},
		"a malformed answer":    {do: func(p *peer) { p.headers(1, false, "X", "y") }, reset: http2.ErrCodeProtocol, why: "malformed"},
		"DATA and no answer":    {do: func(p *peer) { p.WriteData(1, false, []byte("x")) }, reset: http2.ErrCodeProtocol, why: "DATA before the answer"},
		"information as an end": {do: func(p *peer) { p.headers(1, true, ":status", "103") }, reset: http2.ErrCodeProtocol, why: "information"},
		"nothing but information": {do: func(p *peer) {
			for range 17 {
				p.headers(1, false, ":status", "103")
			}
		}, reset: http2.ErrCodeProtocol, why: "information"},
		"a long answer": {do: func(p *peer) {
			p.headers(1, false, ":status", "200", "x", strings.Repeat("y", 8000), "z", strings.Repeat("y", 8500))
		}, reset: http2.ErrCodeEnhanceYourCalm, why: "too long"},
		"503, and no end": {do: func(p *peer) { p.headers(1, false, ":status", "503") }, reset: http2.ErrCodeCancel, status: 503},
		"401":             {do: func(p *peer) { p.headers(1, true, ":status", "401") }, reset: http2.ErrCodeCancel, status: 401},
		"REFUSED_STREAM":  {do: func(p *peer) { p.WriteRSTStream(1, http2.ErrCodeRefusedStream) }, is: hbone.ErrUnprocessed, why: "REFUSED_STREAM"},
		"INTERNAL_ERROR":  {do: func(p *peer) { p.WriteRSTStream(1, http2.ErrCodeInternal) }, is: syscall.ECONNRESET, why: "INTERNAL_ERROR"},
		"GOAWAY before":   {do: func(p *peer) { p.WriteGoAway(0, http2.ErrCodeNo, nil) }, is: hbone.ErrUnprocessed},
		"GOAWAY after":    {do: func(p *peer) { p.WriteGoAway(1, http2.ErrCodeInternal, []byte("why")) }, why: "why"},
		"an end":          {do: func(p *peer) { p.conn.CloseWrite() }, is: io.EOF},
		"a reset":         {do: func(p *peer) { p.conn.SetLinger(0); p.conn.Close() }, is: syscall.ECONNRESET},
	} {
		t.Run(name, func(t *testing.T) {
			p, tunnel := rawCallee(t)
			failed := make(chan error, 1)
			go func() {
				_, _, err := tunnel.Connect(context.Background(), "10.0.0.1:80", nil)
				failed <- err
			}()
			f := next[*http2.MetaHeadersFrame](t, p, nil)
			if f.PseudoValue("method") != "CONNECT" || f.PseudoValue("authority") != "10.0.0.1:80" || len(f.Fields) != 2 {
				t.Errorf("the request is %v", f.Fields)
			}
			tt.do(p)
			err := <-failed
			var refused *hbone.StatusError
			switch {
			case tt.status != 0 && (!errors.As(err, &refused) || refused.Status != tt.status):
				t.Errorf("the error is %v, want status %d", err, tt.status)
			case tt.is != nil && !errors.Is(err, tt.is), err == nil || !strings.Contains(err.Error(), tt.why):
				t.Errorf("the error is %v, want %v, %q", err, tt.is, tt.why)
			}
			if tt.is != hbone.ErrUnprocessed && errors.Is(err, hbone.ErrUnprocessed) { //nolint:errorlint // the table's own
				t.Errorf("the error is %v, which says that it is safe to try again", err)
			}
			if tt.reset != 0 {
				p.assertReset(t, 1, tt.reset)
			}
		})
	}
}
