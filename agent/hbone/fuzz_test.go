package hbone_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"troth.dev/troth/agent/hbone"
)

// frames returns what a peer that behaves could send.
func frames(write func(f *http2.Framer, encode func(fields ...string) []byte)) []byte {
	var b, block bytes.Buffer
	f := http2.NewFramer(&b, nil)
	f.AllowIllegalWrites = true
	encoder := hpack.NewEncoder(&block)
	f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20}, http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 20})
	write(f, func(fields ...string) []byte {
		block.Reset()
		for n := 0; n < len(fields); n += 2 {
			encoder.WriteField(hpack.HeaderField{Name: fields[n], Value: fields[n+1]})
		}
		return bytes.Clone(block.Bytes())
	})
	return b.Bytes()
}

// everyday is what both ends send beside headers.
func everyday(f *http2.Framer) {
	f.WriteSettingsAck()
	f.WriteWindowUpdate(0, 1000)
	f.WriteWindowUpdate(1, 1000)
	f.WriteDataPadded(1, false, []byte("hello"), make([]byte, 7))
	f.WritePing(false, [8]byte{1})
	f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 7}, http2.Setting{ID: http2.SettingHeaderTableSize, Val: 100})
	f.WriteRawFrame(0x77, 3, 5, []byte("whatever"))
	f.WritePriority(1, http2.PriorityParam{StreamDep: 3, Weight: 4})
	f.WriteData(1, true, nil)
	f.WriteRSTStream(1, http2.ErrCodeNo)
	f.WriteGoAway(1, http2.ErrCodeNo, []byte("bye"))
}

// feed lets ours talk to a peer that sends data and closes, and reads what is said.
func feed(theirs net.Conn, data []byte) {
	var reading sync.WaitGroup
	reading.Go(func() { io.Copy(io.Discard, theirs) })
	theirs.Write(data) // ours may have enough of it before its end
	theirs.Close()
	reading.Wait()
}

// FuzzServe feeds the callee's end. It must end, run no more handlers than it may,
// and hand over no authority that could be anything but one.
func FuzzServe(f *testing.F) {
	f.Add(frames(func(f *http2.Framer, encode func(...string) []byte) {
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: encode(":method", "CONNECT", ":authority", "10.0.0.1:80", "baggage", "x")})
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, BlockFragment: encode(":method", "CONNECT")})
		f.WriteContinuation(3, true, encode(":authority", "[::1]:80"))
		everyday(f)
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, EndHeaders: true, EndStream: true, BlockFragment: encode("a", "trailer")})
	}))
	f.Add(frames(func(f *http2.Framer, encode func(...string) []byte) {
		for id := uint32(1); id < 20; id += 2 {
			f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, EndHeaders: true, BlockFragment: encode(":method", "GET", ":path", "/", ":scheme", "http")})
			f.WriteRSTStream(id, http2.ErrCodeCancel)
		}
	}))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		ours, theirs := net.Pipe()
		var running atomic.Int64
		served := make(chan struct{})
		go func() {
			defer close(served)
			hbone.Serve(context.Background(), ours, hbone.Config{MaxStreams: 3}, func(r *hbone.Request) {
				if n := running.Add(1); n > 3 {
					t.Errorf("%d handlers run", n)
				}
				defer running.Add(-1)
				if bytes.ContainsAny([]byte(r.Authority), "@/ \r\n?#\x00") || r.Authority == "" || len(r.Authority) > 320 {
					t.Errorf("the authority is %q", r.Authority)
				}
				echo(r)
			})
		}()
		feed(theirs, append([]byte(http2.ClientPreface), data...))
		<-served
	})
}

// FuzzOpen feeds the caller's end, which has asked. It must end, and everybody who
// asked must hear of it.
func FuzzOpen(f *testing.F) {
	f.Add(frames(func(f *http2.Framer, encode func(...string) []byte) {
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: encode(":status", "103")})
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: encode(":status", "200", "troth-renewed", "x")})
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, EndHeaders: true, EndStream: true, BlockFragment: encode(":status", "503")})
		everyday(f)
	}))
	f.Fuzz(func(t *testing.T, data []byte) {
		ours, theirs := net.Pipe()
		tunnel, err := hbone.Open(ours, hbone.Config{})
		if err != nil {
			t.Fatal(err)
		}
		var asking sync.WaitGroup
		for range 2 {
			asking.Go(func() {
				s, _, err := tunnel.Connect(context.Background(), "10.0.0.1:80", hbone.Header{"x": "y"})
				if err != nil {
					return
				}
				s.Write([]byte("hello"))
				io.Copy(io.Discard, s)
				s.Close()
			})
		}
		feed(theirs, data)
		<-tunnel.Done()
		asking.Wait()
		if n := tunnel.Streams(); n != 0 {
			t.Errorf("%d streams are left", n)
		}
	})
}
