// Package handshake makes one network connection a mutually authenticated one:
// both ends present an X509-SVID, both verify the other's, and no application
// byte moves before they have.
//
// Start with [Initiate], which the service that opened the connection calls,
// [Accept], which the service that was called calls, and [Event], the record of
// each step. [Config] has the [Order] in which the two show themselves.
//
// What a [Conn] guarantees: TLS 1.3 and a full handshake, never a resumed one;
// a peer whose certificate passed [Verify] against the bundle of its own trust
// domain at that moment, whose key was proved, and whose SPIFFE ID is the one
// expected or was authorized. In the caller-first order the callee reveals
// nothing of itself before the caller has passed all of this.
//
// What it refuses, it refuses with an [*Error] that names the step and the exact
// reason, and closes the connection. The peer learns no reason.
package handshake

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Order is the order in which the two services show who they are. Both ends have
// to be configured with the same one. The zero Order is refused.
//
// Each order has an ALPN protocol of its own, demanded by both ends. Without it
// somebody with no credentials could splice an acceptor of one order to an
// acceptor of the other: one of them is a TLS client and the other a TLS server,
// so that both handshakes would succeed and each would believe that the other
// had called.
type Order int

const (
	// CallerFirst has the caller verified before the callee sends anything but
	// a ClientHello. The TLS roles are turned round: whoever opened the
	// connection is the TLS server, as in NETCONF Call Home (RFC 8071). Both
	// [Initiate] and [Accept] return only when both ends are verified. It costs
	// one more round trip than Standard.
	CallerFirst Order = iota + 1
	// Standard has the roles as usual, for peers that are not Troth's: the
	// callee, as TLS server, shows its certificate to whoever asks. RFC 8446
	// §4.4 lets a client finish before the server has verified it, so that the
	// success of [Initiate] proves the callee to the caller and nothing else;
	// a refusal by the callee arrives with the first [Conn.Read].
	Standard
)

// String returns the order as flags and logs spell it.
func (o Order) String() string {
	switch o {
	case CallerFirst:
		return "caller-first"
	case Standard:
		return "standard"
	default:
		return fmt.Sprintf("Order(%d)", int(o))
	}
}

// protocol returns the order's ALPN protocol.
func (o Order) protocol() string {
	if o == CallerFirst {
		return "troth/1"
	}
	return "h2"
}

// Config says who we are and whom we trust. It may be shared by any number of
// handshakes and must not be changed while one is under way.
type Config struct {
	// Order is required.
	Order Order
	// SVID is required. It is asked once in each handshake, so that a rotated
	// SVID is used at once.
	SVID x509svid.Source
	// Bundles is required. It is asked once in each handshake, for the trust
	// domain that the peer claims to be of.
	Bundles x509bundle.Source
	// AcceptTests accepts peers whose certificates were issued for tests, too: see
	// [VerifyAcceptingTests]. It is for tests.
	AcceptTests bool
	// Timeout bounds the whole handshake; 0 means 10 seconds.
	Timeout time.Duration
	// Trace, if not nil, is called for each step as it happens, in order. It
	// runs within the handshake, or within the first Read or Write of the Conn,
	// and should be quick.
	Trace func(Event)
}

// Initiate performs the handshake as the service that opened conn. The peer has
// to be exactly the one named; the zero ID matches nobody. It blocks until the
// handshake is over, ctx ends or cfg.Timeout has passed.
//
// On success the returned Conn owns conn. On failure conn is closed, and the
// error is an [*Error] unless cfg is invalid.
func Initiate(ctx context.Context, conn net.Conn, cfg *Config, peer spiffeid.ID) (*Conn, error) {
	expected := func(id spiffeid.ID) *Error {
		if id != peer {
			return refuse(PeerUnexpected, id, fmt.Errorf("want %q", peer))
		}
		return nil
	}
	return perform(ctx, conn, cfg, Caller, expected)
}

// Accept performs the handshake as the service that was called. It asks
// authorize about the peer once, when the peer's certificate has been verified;
// an error refuses the peer, and so does a nil authorize. Accept blocks, and
// owns or closes conn, as [Initiate] does.
func Accept(ctx context.Context, conn net.Conn, cfg *Config, authorize func(spiffeid.ID) error) (*Conn, error) {
	authorized := func(id spiffeid.ID) *Error {
		if authorize == nil {
			return refuse(NotAuthorized, id, errors.New("nobody is"))
		}
		if err := authorize(id); err != nil {
			return refuse(NotAuthorized, id, err)
		}
		return nil
	}
	return perform(ctx, conn, cfg, Callee, authorized)
}

const (
	defaultTimeout = 10 * time.Second

	// confirmation is the first byte inside TLS from caller to callee in
	// protocol troth/1. A TLS client is done when it has sent its Finished, and
	// the callee is the TLS client: this byte tells it that the caller has
	// verified it too. The caller's own data follows without a further round
	// trip.
	confirmation = 0x01
)

func perform(ctx context.Context, conn net.Conn, cfg *Config, side Side, admit func(spiffeid.ID) *Error) (*Conn, error) {
	if err := cfg.check(); err != nil {
		conn.Close()
		return nil, err
	}
	timeout := cfg.Timeout
	if timeout == 0 {
		timeout = defaultTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { conn.Close() })

	h := &handshake{cfg: cfg, side: side, admit: admit, progress: newProgress(cfg, side)}
	c, err := h.perform(ctx, conn)
	if !stop() && err == nil {
		err = ctx.Err() // too late: conn is being closed
	}
	if err != nil {
		conn.Close()
		return nil, h.progress.stop(h.reason(ctx, err))
	}
	return c, nil
}

func (cfg *Config) check() error {
	switch {
	case cfg.Order != CallerFirst && cfg.Order != Standard:
		return fmt.Errorf("handshake: config: no such order: %v", cfg.Order)
	case cfg.SVID == nil:
		return errors.New("handshake: config: no SVID source")
	case cfg.Bundles == nil:
		return errors.New("handshake: config: no bundle source")
	case cfg.Timeout < 0:
		return fmt.Errorf("handshake: config: negative timeout %v", cfg.Timeout)
	}
	return nil
}

// handshake is one handshake under way, owned by the goroutine that performs it:
// crypto/tls runs its callbacks there.
type handshake struct {
	cfg      *Config
	side     Side
	admit    func(spiffeid.ID) *Error // asked about the verified peer
	own      tls.Certificate
	progress *progress
	peer     Peer   // set once the peer's certificate was verified and admitted
	proved   bool   // the peer has proved that it holds the key of its certificate
	shown    bool   // our certificate was handed to crypto/tls
	refusal  *Error // why one of our callbacks refused; before all that crypto/tls says
}

// perform is the handshake. Its steps are numbered in [Step]; what crypto/tls
// does in between is in the callbacks below, in the order they run in.
func (h *handshake) perform(ctx context.Context, conn net.Conn) (*Conn, error) {
	if err := h.loadOwn(); err != nil {
		return nil, err
	}
	var t *tls.Conn
	if h.isTLSServer() {
		t = tls.Server(conn, h.tlsConfig())
	} else {
		t = tls.Client(conn, h.tlsConfig())
	}
	if err := t.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	h.proven()
	if !h.shown {
		// A TLS server need not ask for a certificate, and then nobody has
		// verified us.
		return nil, refuse(CertificateNotRequested, h.peer.ID, errors.New("the peer did not ask for our certificate"))
	}
	if err := h.confirm(t); err != nil {
		return nil, err
	}
	return &Conn{Conn: t, order: h.cfg.Order, peer: h.peer, progress: h.progress}, nil
}

// isTLSServer says which TLS role this side has: the usual one in the standard
// order, the other one in the caller-first order.
func (h *handshake) isTLSServer() bool {
	return (h.side == Callee) == (h.cfg.Order == Standard)
}

// loadOwn gets our SVID before anything is sent: a peer cannot do anything with
// one that has expired.
func (h *handshake) loadOwn() error {
	svid, err := h.cfg.SVID.GetX509SVID()
	switch {
	case err != nil:
		return refuse(OwnSVIDMissing, spiffeid.ID{}, err)
	case svid == nil || len(svid.Certificates) == 0 || svid.PrivateKey == nil:
		return refuse(OwnSVIDMissing, spiffeid.ID{}, errors.New("the source has none"))
	}
	leaf := svid.Certificates[0]
	switch now := time.Now(); {
	case now.After(leaf.NotAfter):
		return refuse(OwnSVIDExpired, spiffeid.ID{}, fmt.Errorf("%q was valid until %v", svid.ID, leaf.NotAfter))
	case now.Before(leaf.NotBefore):
		return refuse(OwnSVIDNotYetValid, spiffeid.ID{}, fmt.Errorf("%q is valid from %v", svid.ID, leaf.NotBefore))
	}
	h.own = tls.Certificate{PrivateKey: svid.PrivateKey, Leaf: leaf}
	for _, cert := range svid.Certificates {
		h.own.Certificate = append(h.own.Certificate, cert.Raw)
	}
	return nil
}

func (h *handshake) tlsConfig() *tls.Config {
	return &tls.Config{
		MinVersion:       tls.VersionTLS13,
		MaxVersion:       tls.VersionTLS13,
		CurvePreferences: []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256},
		NextProtos:       []string{h.cfg.Order.protocol()},
		// The decision of one handshake is not kept for the next.
		SessionTicketsDisabled: true,

		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			h.judgeHello(hello)
			return nil, nil
		},
		GetCertificate:       func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return h.show() },
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return h.show() },

		// SPIFFE verification replaces that of host names. It is in
		// VerifyConnection because VerifyPeerCertificate is not called for
		// resumed sessions. RequestClientCert, not RequireAnyClientCert, brings
		// the missing certificate there too, so that it has its own reason.
		InsecureSkipVerify: true,
		ClientAuth:         tls.RequestClientCert,
		VerifyConnection:   h.verify,
	}
}

// judgeHello looks at the ClientHello, as TLS server. It only notes why it
// cannot do: crypto/tls then sends the alert that is made for the case. Where
// crypto/tls would go on, as with a client that knows no ALPN, show refuses.
func (h *handshake) judgeHello(hello *tls.ClientHelloInfo) {
	switch {
	case !slices.Contains(hello.SupportedVersions, tls.VersionTLS13):
		h.refusal = refuse(TLSVersion, spiffeid.ID{}, errors.New("the peer does not speak TLS 1.3"))
	case !slices.Contains(hello.SupportedProtos, h.cfg.Order.protocol()):
		h.refusal = refuse(ALPNMismatch, spiffeid.ID{}, fmt.Errorf("the peer offers %q, not %q", hello.SupportedProtos, h.cfg.Order.protocol()))
	}
}

// show hands our certificate to crypto/tls. As TLS server this is the first
// thing that the peer sees of us. As TLS client it comes after the peer's
// Finished, and so after the peer is verified and its key proved: in the
// caller-first order, this is where the callee reveals itself.
func (h *handshake) show() (*tls.Certificate, error) {
	if h.refusal != nil {
		return nil, h.refusal
	}
	if !h.isTLSServer() {
		h.proven()
	}
	h.shown = true
	h.progress.pass(h.side.presents())
	return &h.own, nil
}

// verify decides about the peer's certificate. The peer has not yet proved that
// it holds the key: its CertificateVerify is the next message.
func (h *handshake) verify(state tls.ConnectionState) error {
	if err := h.judge(state); err != nil {
		h.refusal = err
		return err
	}
	return nil
}

func (h *handshake) judge(state tls.ConnectionState) *Error {
	peer := h.side.other()
	if got := state.NegotiatedProtocol; got != h.cfg.Order.protocol() {
		return refuse(ALPNMismatch, spiffeid.ID{}, fmt.Errorf("the peer chose %q, not %q", got, h.cfg.Order.protocol()))
	}
	if h.isTLSServer() {
		h.progress.pass(peer.verifies()) // it goes on, so it was content with us
	}
	if len(state.PeerCertificates) == 0 {
		return refuse(CertificateMissing, spiffeid.ID{}, errors.New("the peer presented no certificate"))
	}
	h.progress.pass(peer.presents())
	verified, err := verify(state.PeerCertificates, h.cfg.Bundles, time.Now(), h.cfg.AcceptTests)
	if err != nil {
		return err.(*Error) //nolint:errorlint // verify returns one, unwrapped
	}
	// Only a peer that exists is compared and authorized: what is logged as
	// unexpected was somebody, and authorize never sees an invented name.
	if err := h.admit(verified.ID); err != nil {
		return err
	}
	h.peer = verified
	return nil
}

// proven notes that crypto/tls has checked the peer's CertificateVerify and
// Finished: only now is the certificate the peer's own.
func (h *handshake) proven() {
	if h.peer.ID.IsZero() {
		panic("handshake: a TLS handshake went on without VerifyConnection")
	}
	h.proved = true
	h.progress.peer = h.peer.ID
	h.progress.pass(h.side.verifies())
}

// confirm tells the callee, or hears from the caller, that both are verified.
func (h *handshake) confirm(t *tls.Conn) error {
	switch {
	case h.cfg.Order == CallerFirst && h.side == Caller:
		if _, err := t.Write([]byte{confirmation}); err != nil {
			return err
		}
	case h.cfg.Order == CallerFirst:
		var first [1]byte
		if _, err := t.Read(first[:]); err != nil {
			return err
		}
		if first[0] != confirmation {
			return refuse(ProtocolError, h.peer.ID, fmt.Errorf("the first byte is %#x, not the confirmation", first[0]))
		}
	case h.side == Caller:
		return nil // nobody tells; the first byte from the callee will
	}
	h.progress.pass(StepComplete)
	return nil
}

// reason turns what stopped the handshake into an Error with its code. What we
// refused ourselves comes before what became of the connection afterwards.
func (h *handshake) reason(ctx context.Context, err error) *Error {
	if h.refusal != nil {
		return h.refusal
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	code := classify(ctx, err)
	if code == ProtocolError && !h.peer.ID.IsZero() && !h.proved {
		code = KeyNotProved
	}
	return refuse(code, h.peer.ID, err)
}
