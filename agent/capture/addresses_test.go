//go:build linux

package capture_test

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"troth.dev/troth/agent/capture"
	"troth.dev/troth/internal/latest"
)

// The addresses of a node come and go with its interfaces: a network plugin makes its
// bridge when the first pod comes.
func TestFollowAddresses(t *testing.T) {
	ns := namespace(t)
	run(t, ns, "ip", "link", "set", "lo", "up")
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var addresses latest.Value[[]netip.Addr]
	in(t, ns, func() error {
		return capture.FollowAddresses(ctx, &addresses, func(err error) { t.Error(err) })
	})
	become := func(want ...netip.Addr) {
		t.Helper()
		deadline := time.After(patience)
		for {
			got, changed := addresses.Load()
			if slices.Equal(got, want) {
				return
			}
			select {
			case <-changed:
			case <-deadline:
				t.Fatalf("the addresses are %v, want %v", got, want)
			}
		}
	}
	one, two, six := netip.MustParseAddr("10.1.0.1"), netip.MustParseAddr("10.2.0.1"), netip.MustParseAddr("fd00::1")
	become()
	run(t, ns, "ip", "link", "add", "bridge", "type", "bridge")
	run(t, ns, "ip", "link", "set", "bridge", "up")
	become() // an address of the link alone is none
	for _, each := range []netip.Addr{two, six, one} {
		run(t, ns, "ip", "address", "add", fmt.Sprintf("%s/%d", each, each.BitLen()), "dev", "bridge", "nodad")
	}
	become(one, two, six)
	run(t, ns, "ip", "address", "del", two.String()+"/32", "dev", "bridge")
	become(one, six)
	run(t, ns, "ip", "link", "del", "bridge")
	become()
}
