//go:build !linux

package capture

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"

	"troth.dev/troth/internal/latest"
)

var errNotLinux = errors.New("capture: only Linux has network namespaces")

// Network is a captured pod's network namespace, on Linux.
type Network struct{}

// Open fails: only Linux has network namespaces.
func Open(*os.File, []*os.File) (*Network, error) { return nil, errNotLinux }

// Listener returns nil.
func (*Network) Listener(uint16) net.Listener { return nil }

// Files fails.
func (*Network) Files() ([]*os.File, error) { return nil, errNotLinux }

// Check fails.
func (*Network) Check() error { return errNotLinux }

// Dial fails.
func (*Network) Dial(context.Context, netip.AddrPort) (*net.TCPConn, error) { return nil, errNotLinux }

// DialFrom fails.
func (*Network) DialFrom(context.Context, netip.Addr, netip.AddrPort) (*net.TCPConn, error) {
	return nil, errNotLinux
}

// ResetOlder fails.
func (*Network) ResetOlder() (int, error) { return 0, errNotLinux }

// Release fails.
func (*Network) Release() error { return errNotLinux }

// Close fails.
func (*Network) Close() error { return errNotLinux }

// Destination fails.
func Destination(net.Conn) (netip.AddrPort, error) { return netip.AddrPort{}, errNotLinux }

// ListenKeeper fails.
func ListenKeeper(string) (net.Listener, error) { return nil, errNotLinux }

// ServeKeeper fails.
func ServeKeeper(context.Context, net.Listener) error { return errNotLinux }

// Keep fails.
func (Keeper) Keep(string, []*os.File) error { return errNotLinux }

// Drop fails.
func (Keeper) Drop(string) error { return errNotLinux }

// Take fails.
func (Keeper) Take() (map[string][]*os.File, error) { return nil, errNotLinux }

// FollowAddresses fails.
func FollowAddresses(context.Context, *latest.Value[[]netip.Addr], func(error)) error {
	return errNotLinux
}
