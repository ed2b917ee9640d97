//go:build !linux

package workload

import (
	"errors"
	"net"
)

var errNotLinux = errors.New("callers are known by the kernel on Linux only")

func peerOf(*net.UnixConn) (Peer, error) { return Peer{}, errNotLinux }

// Alive returns an error: only on Linux is there a handle on the process.
func (Peer) Alive() error { return errNotLinux }

// CgroupPod returns an error: only Linux has cgroups.
func CgroupPod(Peer) (podUID string, err error) { return "", errNotLinux }
