package kube_test

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
)

// wire is the way between a client and the real API server. It counts what is
// asked, and can be late or broken, as real ones are. It makes nothing up.
type wire struct {
	next http.RoundTripper

	mu       sync.Mutex
	requests map[string]int            // by method and path
	accepts  map[string]string         // the last Accept header, by path
	cut      chan struct{}             // closed while the wire is cut
	held     chan struct{}             // closed unless what watches bring is held back
	answered func(method, path string) // called before an answer is handed on, if not nil
	astray   string                    // what is asked below this path is asked elsewhere; empty for none
}

func newWire() *wire {
	w := &wire{
		requests: make(map[string]int),
		accepts:  make(map[string]string),
		cut:      make(chan struct{}),
		held:     make(chan struct{}),
	}
	close(w.held)
	return w
}

func (w *wire) wrap(next http.RoundTripper) http.RoundTripper {
	w.next = next
	return w
}

// hold keeps back what watches bring from now on, until release.
func (w *wire) hold() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.held = make(chan struct{})
}

func (w *wire) release() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !ended(w.held) {
		close(w.held)
	}
}

// sever cuts all connections and lets no other pass, until mend.
func (w *wire) sever() {
	w.mu.Lock()
	defer w.mu.Unlock()
	close(w.cut)
}

func (w *wire) mend() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cut = make(chan struct{})
}

// misroute lets requests below a path end where nobody knows that path, as they do
// behind a load balancer that has lost its API servers: the answer is 404. An
// empty path ends it.
func (w *wire) misroute(path string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.astray = path
}

// onAnswer has f called with each answer that is here and not handed on yet.
func (w *wire) onAnswer(f func(method, path string)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.answered = f
}

// count returns how often that was asked.
func (w *wire) count(method, path string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.requests[method+" "+path]
}

// total returns how often something below a path was asked.
func (w *wire) total(method, path string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	total := 0
	for request, n := range w.requests {
		if strings.HasPrefix(request, method+" "+path) {
			total += n
		}
	}
	return total
}

// asked returns how many requests other than watches there were.
func (w *wire) asked() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	total := 0
	for request, n := range w.requests {
		if !strings.HasPrefix(request, "WATCH ") {
			total += n
		}
	}
	return total
}

func (w *wire) accept(path string) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.accepts[path]
}

var errCut = errors.New("the wire is cut")

func (w *wire) RoundTrip(request *http.Request) (*http.Response, error) {
	method := request.Method
	watch := request.URL.Query().Get("watch") != ""
	if watch {
		method = "WATCH"
	}
	w.mu.Lock()
	w.requests[method+" "+request.URL.Path]++
	w.accepts[request.URL.Path] = request.Header.Get("Accept")
	cut, answered, astray := w.cut, w.answered, w.astray
	w.mu.Unlock()

	if ended(cut) {
		return nil, errCut
	}
	if astray != "" && strings.HasPrefix(request.URL.Path, astray) {
		request = request.Clone(request.Context())
		request.URL.Path = "/nowhere" + request.URL.Path
	}
	response, err := w.next.RoundTrip(request)
	if err != nil {
		return nil, err
	}
	if answered != nil {
		answered(method, request.URL.Path)
	}
	if watch {
		response.Body = &watchBody{ReadCloser: response.Body, wire: w, cut: cut, closed: make(chan struct{})}
	}
	return response, nil
}

// watchBody is what a watch brings.
type watchBody struct {
	io.ReadCloser
	wire   *wire
	cut    chan struct{}
	once   sync.Once
	closed chan struct{}
}

func (b *watchBody) Read(p []byte) (int, error) {
	type result struct {
		n   int
		err error
	}
	read := make(chan result, 1) // so that the reader can end when nobody waits any more
	go func() {
		n, err := b.ReadCloser.Read(p)
		read <- result{n, err}
	}()
	var got result
	select {
	case got = <-read:
	case <-b.cut:
		b.ReadCloser.Close()
		<-read // which fails now; until then it may write to p
		return 0, errCut
	}
	b.wire.mu.Lock()
	held := b.wire.held
	b.wire.mu.Unlock()
	select {
	case <-held:
		return got.n, got.err
	case <-b.cut:
		return 0, errCut
	case <-b.closed:
		return 0, errCut
	}
}

func (b *watchBody) Close() error {
	b.once.Do(func() { close(b.closed) })
	return b.ReadCloser.Close()
}

func ended(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
