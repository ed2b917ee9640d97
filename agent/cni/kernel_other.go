//go:build !linux

package cni

import (
	"errors"
	"net"
	"os"
)

// NamespaceOf fails: only Linux has network namespaces.
func NamespaceOf(*os.File) (Namespace, error) { return Namespace{}, errors.ErrUnsupported }

func peerUID(*net.UnixConn) (uint32, error) { return 0, errors.ErrUnsupported }

func isTemporary(error) bool { return false }
