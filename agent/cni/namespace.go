package cni

import (
	"errors"
	"fmt"
	"os"
)

// Namespace is a network namespace as the kernel tells it from every other one that
// there is at the same time. The zero Namespace is none.
type Namespace struct {
	Device uint64 `json:"device"`
	Inode  uint64 `json:"inode"`
}

// CheckNamespace returns nil if f is a network namespace and not the one that this
// process is in. That one is the node's, and whoever captured it would take the whole
// node for one pod.
func CheckNamespace(f *os.File) error {
	ns, err := NamespaceOf(f)
	if err != nil {
		return err
	}
	own, err := OwnNamespace()
	switch {
	case err != nil:
		return err
	case ns == own:
		return errors.New("it is the network namespace that the agent itself is in: a pod with the node's network is not captured")
	}
	return nil
}

// OwnNamespace returns the network namespace of this process. A goroutine that has
// entered another one, on a thread of its own, gets that one.
func OwnNamespace() (Namespace, error) {
	f, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return Namespace{}, fmt.Errorf("own network namespace: %w", err)
	}
	defer f.Close()
	return NamespaceOf(f)
}
