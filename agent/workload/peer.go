package workload

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"google.golang.org/grpc/credentials"
)

// Peer is the process that connected, as the kernel recorded it at that moment. The
// zero Peer is no process and is not alive.
//
// A process that hands its connection to another lends it its identity, as it could
// with the key; the loan ends when the lender does.
type Peer struct {
	PID      int32 // as this process sees it; never zero
	UID, GID uint32

	// process is the kernel's handle on the process (a pidfd), which no other
	// process ever comes to stand for. It is closed with the connection.
	process *os.File
	// started is when the process began, in clock ticks since boot: with PID, it
	// tells the connections of one process. Zero if it had ended before that could
	// be known, and then it is not alive.
	started uint64
}

// kernelCredentials learns who is at the other end of a connection from the
// kernel. There is no handshake on the wire, and nothing is asked of the caller
// (SPIFFE Workload Endpoint §3.1, §5).
type kernelCredentials struct{ server *Server }

// ServerHandshake refuses a connection whose peer is not known, or that is more
// than the share of the peer's pod.
func (k kernelCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := raw.(*connection)
	if !ok {
		panic("workload: a connection that the listener did not accept")
	}
	if err := c.admit(k.server); err != nil {
		// gRPC closes the connection; the caller can be told nothing.
		k.server.logRefusal("workload connection refused", c.peer, "", err)
		return nil, nil, err
	}
	return c, authInfo{
		// Nobody but the kernel stands between the two ends of a Unix socket.
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		peer:           c.peer,
	}, nil
}

// ClientHandshake refuses: these credentials are a server's.
func (kernelCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("workload: these are a server's credentials")
}

func (kernelCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "kernel"}
}

func (k kernelCredentials) Clone() credentials.TransportCredentials { return k }
func (kernelCredentials) OverrideServerName(string) error           { return nil }

// authInfo takes the peer from the connection to its streams.
type authInfo struct {
	credentials.CommonAuthInfo

	peer Peer
}

func (authInfo) AuthType() string { return "kernel" }

// listener accepts connections that know their peer and their place in the quota.
type listener struct{ net.Listener }

func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &connection{Conn: c}, nil
}

// connection gives back all that it holds when it is closed. gRPC closes what was
// accepted, whether or not the handshake succeeded.
type connection struct {
	net.Conn

	peer    Peer   // set by admit
	leave   func() // set by admit
	closing sync.Once
}

func (c *connection) admit(s *Server) error {
	socket, ok := c.Conn.(*net.UnixConn)
	if !ok {
		return fmt.Errorf("a connection of type %T has no peer that the kernel knows", c.Conn)
	}
	var err error
	if c.peer, err = peerOf(socket); err != nil {
		return err
	}
	// Only to count it. A caller in no pod is let in, so that each of its calls can
	// be answered with a status instead of a closed connection.
	podUID, _ := s.pod(c.peer)
	if c.leave, err = s.connections.take(podUID); err != nil {
		return fmt.Errorf("too many connections: %w", err)
	}
	return nil
}

func (c *connection) Close() error {
	c.closing.Do(func() {
		if c.leave != nil {
			c.leave()
		}
		if c.peer.process != nil {
			c.peer.process.Close()
		}
	})
	return c.Conn.Close()
}
