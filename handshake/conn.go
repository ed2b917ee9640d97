package handshake

import (
	"crypto/tls"
	"crypto/x509"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Conn is a connection whose handshake succeeded: a [tls.Conn] that knows who is
// at the other end. Its methods may be called as those of any [net.Conn].
//
// CloseWrite, from tls.Conn, ends what we send and leaves the other direction
// open. Close ends both and closes the connection below.
type Conn struct {
	*tls.Conn

	order    Order
	peer     Peer
	progress *progress   // owned by whoever turns settled true
	settled  atomic.Bool // the last event was sent
}

// PeerID returns the SPIFFE ID of the other end.
func (c *Conn) PeerID() spiffeid.ID { return c.peer.ID }

// PeerExpiry returns when the proof of the other end's identity expires. Nothing
// happens to the connection then: whoever holds it has to close it.
func (c *Conn) PeerExpiry() time.Time { return c.peer.Expiry }

// PeerAuthority returns the certificate of the trust bundle by which the other
// end was verified. It must not be changed. To verify the other end again, by
// another bundle, give ConnectionState().PeerCertificates to [Verify].
func (c *Conn) PeerAuthority() *x509.Certificate { return c.peer.Authority }

// Order returns the order of the handshake.
func (c *Conn) Order() Order { return c.order }

// Read reads application data. For the caller in the standard order, the first
// byte is the proof that the callee has verified it, and a TLS alert instead of
// it is an [*Error].
//
// As with every tls.Conn, io.EOF does not prove that the peer meant to stop: a
// cut connection looks the same. Protocols above have to mark their own ends.
func (c *Conn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 {
		c.dataMoved()
	}
	if err != nil && c.unconfirmed() && isRemoteAlert(err) && c.settled.CompareAndSwap(false, true) {
		err = c.progress.stop(refuse(PeerRefused, c.peer.ID, err))
	}
	return n, err
}

// Write writes application data.
func (c *Conn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if n > 0 && !c.unconfirmed() {
		c.dataMoved()
	}
	return n, err
}

// unconfirmed says whether only a byte from the peer can prove that it has
// verified us.
func (c *Conn) unconfirmed() bool {
	return c.order == Standard && c.progress.side == Caller
}

// dataMoved ends the trace with the first application byte.
func (c *Conn) dataMoved() {
	if !c.settled.Load() && c.settled.CompareAndSwap(false, true) {
		c.progress.pass(StepData)
	}
}
