//go:build !linux

package cni

import (
	"errors"
	"os"
)

// NamespaceOf fails: only Linux has network namespaces.
func NamespaceOf(*os.File) (Namespace, error) { return Namespace{}, errors.ErrUnsupported }

func isTemporary(error) bool { return false }
