package capture

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"troth.dev/troth/internal/latest"
)

// FollowAddresses keeps in addresses, in ascending order, those that others can
// reach this process's network namespace by, until ctx ends: on a node's network, where
// the probes of the node's kubelet come from. It returns when the first are there, or
// an error if the kernel does not tell them; afterwards what was told last stands until
// it tells more. The loopback's addresses and those of a single link are none of them.
// failed is told when the kernel does not tell.
func FollowAddresses(ctx context.Context, addresses *latest.Value[[]netip.Addr], failed func(error)) error {
	// What changes between the list and the subscription would never be heard of: the
	// subscription comes first.
	updates, done, err := subscribe()
	if err != nil {
		return err
	}
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		close(done)
		return fmt.Errorf("list the node's addresses: %w", err)
	}
	now, err := nodeAddresses(handle)
	if err != nil {
		close(done)
		handle.Close()
		return err
	}
	addresses.Set(now)
	go func() {
		defer handle.Close()
		for {
			var ok bool
			select {
			case <-ctx.Done():
				close(done)
				return
			case _, ok = <-updates:
			}
			if !ok { // the subscription has ended, because there was too much to tell
				if updates, done = resubscribe(ctx, failed); updates == nil {
					return
				}
			}
			next, err := nodeAddresses(handle)
			if err != nil {
				failed(err)
			} else if !slices.Equal(now, next) {
				now = next
				addresses.Set(now)
			}
		}
	}()
	return nil
}

// resubscribe tries once a second, and returns nil when ctx has ended.
func resubscribe(ctx context.Context, failed func(error)) (updates chan netlink.AddrUpdate, done chan struct{}) {
	for {
		select {
		case <-ctx.Done():
			return nil, nil
		case <-time.After(time.Second):
		}
		updates, done, err := subscribe()
		if err == nil {
			return updates, done
		}
		failed(err)
	}
}

func subscribe() (updates chan netlink.AddrUpdate, done chan struct{}, err error) {
	updates, done = make(chan netlink.AddrUpdate, 64), make(chan struct{})
	if err := netlink.AddrSubscribe(updates, done); err != nil {
		return nil, nil, fmt.Errorf("follow the node's addresses: %w", err)
	}
	return updates, done, nil
}

// nodeAddresses lists the addresses of all interfaces. It may be told half a list
// while interfaces come and go, and then asks again.
func nodeAddresses(handle *netlink.Handle) ([]netip.Addr, error) {
	found, err := handle.AddrList(nil, netlink.FAMILY_ALL)
	for tries := 1; errors.Is(err, netlink.ErrDumpInterrupted) && tries < 5; tries++ {
		found, err = handle.AddrList(nil, netlink.FAMILY_ALL)
	}
	if err != nil {
		return nil, fmt.Errorf("list the node's addresses: %w", err)
	}
	addresses := make([]netip.Addr, 0, len(found))
	for _, each := range found {
		address, ok := netip.AddrFromSlice(each.IP)
		if address = address.Unmap(); ok && address.IsGlobalUnicast() {
			addresses = append(addresses, address)
		}
	}
	slices.SortFunc(addresses, netip.Addr.Compare)
	return slices.Compact(addresses), nil
}
