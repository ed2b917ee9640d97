package cni

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// NamespaceOf returns which network namespace f is, and fails if it is none.
func NamespaceOf(f *os.File) (Namespace, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return Namespace{}, err
	}
	var ns Namespace
	var kernelErr error
	err = raw.Control(func(fd uintptr) { ns, kernelErr = namespaceOf(int(fd)) })
	if err := errors.Join(err, kernelErr); err != nil {
		return Namespace{}, err
	}
	return ns, nil
}

func namespaceOf(fd int) (Namespace, error) {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return Namespace{}, fmt.Errorf("file system of the namespace: %w", err)
	}
	// Before the ioctl, whose number may mean something else to another kind of file.
	if fs.Type != unix.NSFS_MAGIC {
		return Namespace{}, errors.New("it is not a namespace")
	}
	kind, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE)
	if err != nil {
		return Namespace{}, fmt.Errorf("kind of the namespace: %w", err)
	}
	if kind != unix.CLONE_NEWNET {
		return Namespace{}, fmt.Errorf("it is a namespace of kind %#x, not a network namespace", kind)
	}
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return Namespace{}, err
	}
	return Namespace{Device: stat.Dev, Inode: stat.Ino}, nil
}

// isTemporary reports whether accepting may succeed later.
func isTemporary(err error) bool {
	for _, temporary := range []error{unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.ENOBUFS, unix.ECONNABORTED} {
		if errors.Is(err, temporary) {
			return true
		}
	}
	return false
}
