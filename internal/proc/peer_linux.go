package proc

import (
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"
)

// Peer returns who is at the other end of a Unix socket: who connected, or who listens.
// It is the process that did so, not whoever else has come to hold the socket.
func Peer(c *net.UnixConn) (Credentials, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return Credentials{}, err
	}
	var peer Credentials
	var failed error
	err = raw.Control(func(fd uintptr) { peer, failed = PeerOf(int(fd)) })
	return peer, errors.Join(err, failed)
}

// PeerOf does the same for the descriptor of a socket.
func PeerOf(fd int) (Credentials, error) {
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return Credentials{}, fmt.Errorf("credentials of the peer: %w", err)
	}
	return Credentials{PID: cred.Pid, UID: cred.Uid, GID: cred.Gid}, nil
}
