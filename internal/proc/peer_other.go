//go:build !linux

package proc

import (
	"errors"
	"net"
)

// Peer returns who is at the other end of a Unix socket: here, errors.ErrUnsupported.
func Peer(*net.UnixConn) (Credentials, error) { return Credentials{}, errors.ErrUnsupported }
