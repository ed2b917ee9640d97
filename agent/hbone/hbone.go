// Package hbone carries TCP connections through HTTP/2 CONNECT tunnels, as Istio's
// ztunnel does: one tunnel is one authenticated connection between two proxies, and
// each connection of an application is one stream in it.
//
// Start with [Open], the caller's end, whose [Tunnel.Connect] makes a [Stream]; with
// [Serve], the callee's end, which hands over each [Request]; and with
// [Stream.Relay], which joins a stream to the application's connection. Give what
// comes from the kernel to [Buffer] before the TLS handshake: it makes the tunnel fast.
//
// It guarantees that an end arrives as an end and a reset as a reset, that a stream
// whose application reads slowly stalls no other stream, and that what a peer can
// make it hold is bounded: by the window of each stream, by the number of streams,
// and by limits on everything that asks for an answer.
//
// It refuses what is not CONNECT, and a peer that breaks the rules of HTTP/2 or
// keeps it busy for nothing: with GOAWAY and a reason. It knows nothing of identity
// and policy: the connection is authenticated before it gets here, and who may
// connect to what is for the handler to say.
package hbone

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"time"

	"golang.org/x/net/http/httpguts"
	"golang.org/x/net/http2"
)

// Config says how much one tunnel carries.
type Config struct {
	// MaxStreams is how many streams may be open at a time; 0 means 200. The
	// callee refuses those beyond it. The caller makes no more, nor more than the
	// callee allows.
	MaxStreams uint32
	// Drain, if not nil, makes the callee's end refuse new requests once it is
	// closed. [Serve] returns when the last stream has ended.
	Drain <-chan struct{}
}

func (c Config) maxStreams() int {
	if c.MaxStreams == 0 {
		return 200
	}
	return int(min(c.MaxStreams, 1<<20))
}

// Header is the fields of a request or of an answer, by their names in lower case.
// A peer may send 16 KB of them. Fields that are repeated are joined by ", ".
type Header map[string]string

// check refuses what a peer would.
func (h Header) check() error {
	size := 0
	for name, value := range h {
		if !httpguts.ValidHeaderFieldName(name) || name != strings.ToLower(name) || !httpguts.ValidHeaderFieldValue(value) {
			return fmt.Errorf("hbone: %q is no field of a header", name)
		}
		size += len(name) + len(value) + 32 // RFC 9113 §10.5.1
	}
	if size > maxHeaderList/2 {
		return fmt.Errorf("hbone: a header of %d bytes", size)
	}
	return nil
}

// What bounds a tunnel.
const (
	// A stream starts with initialWindow, and gets a larger one, up to maxWindow, as
	// long as its application takes what arrives. All the windows of a tunnel
	// together grow to no more than windowBudget.
	initialWindow = 256 << 10
	maxWindow     = 4 << 20
	windowBudget  = 64 << 20
	// tunnelWindow is what may be under way in a tunnel. It is given back on arrival:
	// what is held is bounded by the windows of the streams.
	tunnelWindow = 16 << 20

	// maxFrame is the largest DATA frame that we take or send, with its header. It
	// fills 16 TLS records to the last byte.
	maxFrame    = 256 << 10
	frameHeader = 9
	// maxOtherFrame bounds every frame that is not DATA.
	maxOtherFrame = 16 << 10
	// maxHeaderList bounds what a header says, maxHeaderBlock the bytes that say it.
	maxHeaderList  = 16 << 10
	maxHeaderBlock = 64 << 10
	maxAuthority   = 320

	// maxProvoked bounds the answers that wait to be written for a peer that makes us
	// answer and does not read.
	maxProvoked = 32 << 10
	// A peer may give up resetBurst requests before they are answered, and
	// resetRate more each second.
	resetRate, resetBurst = 100, 1000

	// idlePing is how long a tunnel is silent before it is asked whether it is
	// alive. A peer that says nothing for pongTimeout, or takes nothing of what is
	// written, is dead.
	idlePing    = 10 * time.Second
	pongTimeout = 20 * time.Second
)

// ErrUnprocessed says that the peer has surely not acted on a request: it was not
// sent, or was refused before anybody looked at it. It is safe to send it elsewhere.
var ErrUnprocessed = errors.New("hbone: the peer has not acted on the request")

// errClosed is the end that this side made.
var errClosed = errors.New("hbone: the tunnel is closed")

// StatusError is the answer of a peer that refused a request.
type StatusError struct {
	Status int // 400: malformed, 401: not allowed, 503: the application cannot be reached
}

func (e *StatusError) Error() string { return fmt.Sprintf("hbone: the peer answered %d", e.Status) }

// resetError is why a stream was aborted, by either end.
type resetError struct {
	code   http2.ErrCode
	remote bool
	why    string
}

func (e *resetError) Error() string {
	by := "reset"
	if e.remote {
		by = "reset by the peer"
	}
	if e.why != "" {
		by += ": " + e.why
	}
	return fmt.Sprintf("hbone: stream %s (%v)", by, e.code)
}

// Is makes the reset of a stream a reset of a connection, and a refusal before
// anybody looked at it ErrUnprocessed.
func (e *resetError) Is(target error) bool {
	return target == syscall.ECONNRESET || target == ErrUnprocessed && e.remote && e.code == http2.ErrCodeRefusedStream
}

// connectionError is why a tunnel cannot go on. Its code goes into a GOAWAY.
type connectionError struct {
	code http2.ErrCode
	why  string
}

func (e *connectionError) Error() string { return fmt.Sprintf("hbone: %s (%v)", e.why, e.code) }

func protocolError(why string) error { return &connectionError{http2.ErrCodeProtocol, why} }
