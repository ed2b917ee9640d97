package hbone_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"troth.dev/troth/agent/hbone"
)

// sizes around everything that has a size: records, frames, windows.
var sizes = []int{0, 1, 9, 503, 16375, 16384, 65535, 262135, 262144, 3 << 20}

// net/http's server is a callee that is not ours.
func TestCallerWithServerOfXNet(t *testing.T) {
	for name, server := range map[string]*http2.Server{
		"as it comes":   {},
		"large frames":  {MaxReadFrameSize: 1 << 20, MaxUploadBufferPerConnection: 1 << 24, MaxUploadBufferPerStream: 1 << 22},
		"small windows": {MaxUploadBufferPerStream: 1000, MaxUploadBufferPerConnection: 70_000},
		"few streams":   {MaxConcurrentStreams: 1},
	} {
		t.Run(name, func(t *testing.T) {
			caller, callee := securePair(t, hbone.Buffer)
			done := make(chan struct{})
			go func() {
				defer close(done)
				server.ServeConn(callee, &http2.ServeConnOpts{Handler: http.HandlerFunc(serveEcho)})
			}()
			tunnel, err := hbone.Open(caller, hbone.Config{})
			if err != nil {
				t.Fatal(err)
			}
			for _, size := range sizes {
				ctx, cancel := context.WithTimeout(context.Background(), patience)
				s, answer, err := tunnel.Connect(ctx, "10.0.0.1:80", hbone.Header{"baggage": "k8s.namespace.name=shop"})
				cancel()
				if err != nil {
					t.Fatal(err)
				}
				if answer["x-authority"] != "10.0.0.1:80" || answer["x-baggage"] != "k8s.namespace.name=shop" {
					t.Errorf("the answer is %v", answer)
				}
				assertEcho(t, s, size)
				s.Close()
			}
			_, _, err = tunnel.Connect(context.Background(), "refused:80", nil)
			var refused *hbone.StatusError
			if !errors.As(err, &refused) || refused.Status != 503 {
				t.Errorf("the error is %v, want status 503", err)
			}
			s := connect(t, tunnel, "reset:80")
			if _, err := io.ReadAll(s); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("read %v, want a reset", err)
			}
			s.Close()
			tunnel.Close()
			<-done
		})
	}
}

func serveEcho(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodConnect || r.Host == "refused:80" {
		http.Error(w, "no", http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("X-Authority", r.Host)
	w.Header().Set("X-Baggage", r.Header.Get("Baggage"))
	w.Header().Set("Trailer", "X-Trailer")
	w.WriteHeader(http.StatusOK)
	flush := w.(http.Flusher)
	flush.Flush()
	if r.Host == "reset:80" {
		w.Write([]byte("half an ans"))
		flush.Flush()
		panic(http.ErrAbortHandler)
	}
	b := make([]byte, 32<<10)
	for {
		n, err := r.Body.Read(b)
		w.Write(b[:n])
		flush.Flush()
		if err != nil {
			break
		}
	}
	w.Header().Set("X-Trailer", "the end is a trailer")
}

// net/http's client is a caller that is not ours.
func TestCalleeWithTransportOfXNet(t *testing.T) {
	for name, transport := range map[string]*http2.Transport{
		"as it comes": {},
		"small reads": {MaxReadFrameSize: 16 << 10},
		"large reads": {MaxReadFrameSize: 1 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			caller, callee := securePair(t, hbone.Buffer)
			result := serve(t, callee, hbone.Config{}, func(r *hbone.Request) {
				switch r.Authority {
				case "refused:80":
					r.Refuse(401)
				case "reset:80":
					if s, err := r.Accept(nil); err == nil {
						s.Write([]byte("half an ans"))
						s.Reset()
					}
				default:
					echo(r)
				}
			})
			client, err := transport.NewClientConn(caller)
			if err != nil {
				t.Fatal(err)
			}
			for _, size := range sizes {
				t.Run(fmt.Sprint(size), func(t *testing.T) {
					want := make([]byte, size)
					rand.Read(want)
					body, feed := io.Pipe()
					go func() {
						feed.Write(want)
						feed.Close()
					}()
					got, err := roundTrip(client, "10.0.0.1:80", body)
					if err != nil || !bytes.Equal(got, want) {
						t.Errorf("read %d bytes and %v, want %d", len(got), err, size)
					}
				})
			}
			for authority, want := range map[string]string{"refused:80": "401", "reset:80": "CANCEL"} {
				body, feed := io.Pipe()
				if _, err := roundTrip(client, authority, body); err == nil || !bytes.Contains([]byte(err.Error()), []byte(want)) {
					t.Errorf("the error is %v, want %s", err, want)
				}
				feed.Close()
			}
			client.Close()
			if err := <-result; err != nil && !errors.Is(err, io.EOF) {
				t.Errorf("Serve returned %v", err)
			}
		})
	}
}

func roundTrip(client *http2.ClientConn, authority string, body io.ReadCloser) ([]byte, error) {
	answer, err := client.RoundTrip(&http.Request{
		Method: http.MethodConnect, URL: &url.URL{Scheme: "https", Host: authority}, Host: authority,
		Header: http.Header{}, Body: body,
	})
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("status %d", answer.StatusCode)
	}
	return io.ReadAll(answer.Body)
}

// What a peer may do and few do: padding, headers in many frames, settings that
// change while data flows, information before the answer, unknown frames.
func TestUnusualPeer(t *testing.T) {
	t.Run("caller", func(t *testing.T) {
		p, _ := rawCaller(t, hbone.Config{}, echo)
		block := bytes.Clone(p.encode(":method", "CONNECT", ":authority", "10.0.0.1:80", "x", "y"))
		p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block[:3], PadLength: 200, Priority: http2.PriorityParam{Weight: 3}})
		for n := 3; n < len(block); n++ {
			p.WriteContinuation(1, n == len(block)-1, block[n:n+1])
		}
		p.assertStatus(t, 1, "200")
		p.WritePriority(1, http2.PriorityParam{Weight: 7})
		p.WriteRawFrame(0xfa, 0xff, 1, make([]byte, 100_000))
		p.WriteDataPadded(1, false, []byte("pad"), make([]byte, 255))
		p.WriteDataPadded(1, false, nil, make([]byte, 255))
		p.WriteDataPadded(1, false, []byte("ded"), []byte{})
		p.headers(1, true, "a", "trailer")
		var got []byte
		for end := false; !end; {
			f := next[*http2.DataFrame](t, p, nil)
			got = append(got, f.Data()...)
			end = f.StreamEnded()
		}
		if string(got) != "padded" {
			t.Errorf("the echo is %q", got)
		}
	})
	t.Run("padding gives its credit back", func(t *testing.T) {
		p, _ := rawCaller(t, hbone.Config{}, echo)
		p.connect(1)
		p.assertStatus(t, 1, "200")
		// Three windows of nothing but padding, as far as the windows go.
		window, sent := 256<<10, 0
		for sent < 3*(256<<10) {
			for window >= 256 {
				p.WriteDataPadded(1, false, nil, make([]byte, 255))
				window -= 256
				sent += 256
			}
			window += int(next(t, p, func(f *http2.WindowUpdateFrame) bool { return f.StreamID == 1 }).Increment)
		}
	})
	t.Run("callee", func(t *testing.T) {
		p, tunnel := rawCallee(t, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}, http2.Setting{ID: http2.SettingHeaderTableSize, Val: 0})
		payload := make([]byte, 50_000)
		rand.Read(payload)
		var running sync.WaitGroup
		defer running.Wait()
		running.Go(func() {
			s, answer, err := tunnel.Connect(context.Background(), "10.0.0.1:80", nil)
			if err != nil || answer["x"] != "1, 2" {
				t.Errorf("the answer is %v, %v", answer, err)
				return
			}
			s.Write(payload)
			s.CloseWrite()
			if got, err := io.ReadAll(s); string(got) != "abc" || err != nil {
				t.Errorf("read %q, %v", got, err)
			}
			s.Close()
		})
		next[*http2.MetaHeadersFrame](t, p, nil)
		p.headers(1, false, ":status", "103", "link", "x")
		p.headers(1, false, ":status", "200", "x", "1", "x", "2")
		p.WriteData(1, false, []byte("ab"))
		// A window that opens by one byte, closes below zero, and opens again.
		p.WriteWindowUpdate(1, 1)
		if f := next(t, p, func(f *http2.DataFrame) bool { return true }); len(f.Data()) != 1 {
			t.Errorf("%d bytes for a window of 1", len(f.Data()))
		}
		got := 1
		p.WriteWindowUpdate(1, 20_000)
		for got < 20_001 {
			got += len(next[*http2.DataFrame](t, p, nil).Data())
		}
		p.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 100})
		p.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
		p.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 20})
		p.WriteWindowUpdate(1, 100_000)
		for end := false; !end; {
			f := next[*http2.DataFrame](t, p, nil)
			got += len(f.Data())
			end = f.StreamEnded()
		}
		if got != len(payload) {
			t.Errorf("%d bytes of %d arrived", got, len(payload))
		}
		p.WriteData(1, false, []byte("c"))
		p.headers(1, true, "the", "end")
	})
}

// A callee that is asked to end does so once its streams have, and so does a caller.
func TestGracefulEnd(t *testing.T) {
	t.Run("caller", func(t *testing.T) {
		tunnel := tunnel(t, hbone.Config{}, echo)
		s := connect(t, tunnel, "10.0.0.1:80")
		ended := make(chan error, 1)
		go func() { ended <- tunnel.Shutdown(context.Background()) }()
		for tunnel.Available() {
			runtime.Gosched() // until Shutdown has begun
		}
		if _, _, err := tunnel.Connect(context.Background(), "10.0.0.1:80", nil); !errors.Is(err, hbone.ErrUnprocessed) {
			t.Errorf("the error of Connect is %v, want ErrUnprocessed", err)
		}
		assertEcho(t, s, 1<<20)
		if err := <-ended; err != nil {
			t.Errorf("Shutdown returned %v", err)
		}
		<-tunnel.Done()
	})
	t.Run("caller, out of patience", func(t *testing.T) {
		tunnel := tunnel(t, hbone.Config{}, echo)
		s := connect(t, tunnel, "10.0.0.1:80")
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if err := tunnel.Shutdown(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("Shutdown returned %v", err)
		}
		if _, err := s.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("the stream ended with %v, want an error", err)
		}
	})
	t.Run("callee", func(t *testing.T) {
		caller, callee := securePair(t, hbone.Buffer)
		drain := make(chan struct{})
		result := serve(t, callee, hbone.Config{Drain: drain}, echo)
		tunnel, err := hbone.Open(caller, hbone.Config{})
		if err != nil {
			t.Fatal(err)
		}
		s := connect(t, tunnel, "10.0.0.1:80")
		close(drain)
		deadline := time.Now().Add(patience)
		for tunnel.Available() && time.Now().Before(deadline) {
			runtime.Gosched()
		}
		assertEcho(t, s, 1<<20)
		if err := <-result; err != nil {
			t.Errorf("Serve returned %v", err)
		}
		<-tunnel.Done()
	})
}
