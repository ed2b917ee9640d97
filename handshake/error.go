package handshake

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Code is the exact reason why a handshake stopped, for metrics and for programs
// that act on it. Codes never change meaning.
type Code string

// What is wrong with ourselves. Nothing was sent.
const (
	OwnSVIDMissing     Code = "OWN_SVID_MISSING"
	OwnSVIDExpired     Code = "OWN_SVID_EXPIRED"
	OwnSVIDNotYetValid Code = "OWN_SVID_NOT_YET_VALID"
)

// What is wrong with the way the peer speaks.
const (
	NotTLS        Code = "NOT_TLS"        // its first bytes are no TLS record
	TLSVersion    Code = "TLS_VERSION"    // it has no TLS 1.3
	ALPNMismatch  Code = "ALPN_MISMATCH"  // it has not the protocol of our Order
	ProtocolError Code = "PROTOCOL_ERROR" // it breaks the rules of TLS or of ours, or a limit
	// CertificateNotRequested says that the peer was content not to know us.
	CertificateNotRequested Code = "CERTIFICATE_NOT_REQUESTED"
)

// What is wrong with the peer's certificate: the reasons of [Verify], and
// KeyNotProved.
const (
	CertificateMissing     Code = "CERTIFICATE_MISSING"
	ChainTooLong           Code = "CHAIN_TOO_LONG"            // more than 10 certificates
	NotOneURI              Code = "NOT_ONE_URI"               // X509-SVID §2
	NotASPIFFEID           Code = "NOT_A_SPIFFE_ID"           // SPIFFE-ID §2, X509-SVID §5.2
	CAAsLeaf               Code = "CA_AS_LEAF"                // X509-SVID §4.1
	KeyUsage               Code = "KEY_USAGE"                 // X509-SVID §4.3, §4.4
	WeakKey                Code = "WEAK_KEY"                  // RSA below 2048 bits, any that it presents
	CertificateExpired     Code = "CERTIFICATE_EXPIRED"       // RFC 5280 §4.1.2.5, any of the chain
	CertificateNotYetValid Code = "CERTIFICATE_NOT_YET_VALID" // RFC 5280 §4.1.2.5, any of the chain
	TrustDomainUnknown     Code = "TRUST_DOMAIN_UNKNOWN"      // no bundle for it
	CertificateUntrusted   Code = "CERTIFICATE_UNTRUSTED"     // no chain to the bundle
	CertificateInvalid     Code = "CERTIFICATE_INVALID"       // RFC 5280 §6, any other rule
	TestIdentity           Code = "TEST_IDENTITY"             // issued for tests, and this is none
	KeyNotProved           Code = "KEY_NOT_PROVED"            // the certificate may be somebody else's
)

// What is wrong with who the peer is, though its certificate is good.
const (
	PeerUnexpected Code = "PEER_UNEXPECTED" // not whom Initiate was to reach
	NotAuthorized  Code = "NOT_AUTHORIZED"  // Accept's authorize says no
)

// How a handshake ends that nobody here refused.
const (
	PeerRefused Code = "PEER_REFUSED" // the peer sent a TLS alert: the reason is in its log
	PeerClosed  Code = "PEER_CLOSED"  // the connection ended
	Timeout     Code = "TIMEOUT"      // Config.Timeout or the context's deadline
	Canceled    Code = "CANCELED"     // the context
)

// Error is why a handshake stopped.
type Error struct {
	Step Step // the step it stopped in; zero from [Verify]
	Side Side // the side that says so; zero from [Verify]
	Code Code
	// Peer is who the other side claims to be, proved or not, or zero.
	Peer spiffeid.ID
	Err  error
}

// Error says step, code, peer and cause in one line, for our own log: it is never
// sent to the peer.
func (e *Error) Error() string {
	s := string(e.Code)
	if !e.Peer.IsZero() {
		s += fmt.Sprintf(": peer %q", e.Peer)
	}
	if e.Step != 0 {
		s = fmt.Sprintf("stopped at step %d, %v: %s", int(e.Step), e.Step, s)
	}
	return fmt.Sprintf("handshake: %s: %v", s, e.Err)
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

func refuse(code Code, peer spiffeid.ID, err error) *Error {
	return &Error{Code: code, Peer: peer, Err: err}
}

// The alerts by which a TLS server says that it cannot do (RFC 8446 §6.2).
const (
	alertProtocolVersion       tls.AlertError = 70
	alertNoApplicationProtocol tls.AlertError = 120
)

// classify says what an error of crypto/tls or of the connection below means.
func classify(ctx context.Context, err error) Code {
	header, _ := errors.AsType[tls.RecordHeaderError](err)
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return Timeout
	case ctx.Err() != nil:
		return Canceled
	case header.Conn != nil: // set for the first record only
		return NotTLS
	case isAlert(err, alertNoApplicationProtocol):
		return ALPNMismatch
	case isAlert(err, alertProtocolVersion):
		return TLSVersion
	case isRemoteAlert(err):
		return PeerRefused
	case isConnError(err):
		return PeerClosed
	default:
		return ProtocolError
	}
}

// isRemoteAlert says whether the peer sent a TLS alert. The alert's own type is
// not exported except to QUIC: the operation of the net.OpError tells.
func isRemoteAlert(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return ok && op.Op == "remote error"
}

func isAlert(err error, alert tls.AlertError) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return ok && op.Op == "remote error" && op.Err.Error() == alert.Error()
}

// isConnError says whether err is of the connection below TLS.
func isConnError(err error) bool {
	_, isErrno := errors.AsType[syscall.Errno](err)
	return isErrno ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, net.ErrClosed) || errors.Is(err, io.ErrClosedPipe)
}
