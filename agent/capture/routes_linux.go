package capture

import (
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The packets by which an application answers a connection of [Network.DialFrom] go
// to somebody else's address. A rule gives them the replyMark, and a route of their
// own brings them back: `ip rule` has fwmark replyMark lookup routeTable, where
// everything is local.
const (
	routeTable = 29703
	// The rule comes before any that a network plugin has, and after the kernel's
	// own for local addresses, 0.
	rulePriority = 10
	// A second, equal rule says that there may be rules of iptables to remove.
	iptablesPriority = 11
)

// routes speaks with the kernel about routes, in one namespace.
type routes struct {
	handle   *netlink.Handle
	families []int // netlink.FAMILY_V4, and FAMILY_V6 unless the pod has it disabled
}

// openRoutes must run inside the namespace. The caller closes what it returns.
func openRoutes() (*routes, error) {
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("routes: %w", err)
	}
	r := &routes{handle: handle, families: []int{netlink.FAMILY_V4}}
	disabled, err := os.ReadFile("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
	if err == nil && len(disabled) > 0 && disabled[0] == '0' {
		r.families = append(r.families, netlink.FAMILY_V6)
	}
	return r, nil
}

// hasIPv6 says whether the kernel has it at all.
func hasIPv6() bool {
	_, err := os.Stat("/proc/sys/net/ipv6")
	return err == nil
}

func (r *routes) close() { r.handle.Close() }

// set puts up the routes and the rules that lead to them. It needs the loopback, and
// takes it up if the container runtime has not yet.
func (r *routes) set() error {
	lo, err := r.handle.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find the loopback: %w", err)
	}
	if err := r.handle.LinkSetUp(lo); err != nil {
		return fmt.Errorf("take the loopback up: %w", err)
	}
	for _, family := range r.families {
		if err := r.handle.RouteReplace(route(family, lo.Attrs().Index)); err != nil {
			return fmt.Errorf("add %s: %w", routeName(family), err)
		}
		if err := r.handle.RuleAdd(rule(family, rulePriority)); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add the rule that leads to %s: %w", routeName(family), err)
		}
	}
	return nil
}

// remove takes down what set put up, and nothing else. What is gone already is no
// error.
func (r *routes) remove() error {
	families := []int{netlink.FAMILY_V4}
	if hasIPv6() { // it may have been disabled after set
		families = append(families, netlink.FAMILY_V6)
	}
	for _, family := range families {
		rules, err := whole(func() ([]netlink.Rule, error) { return r.handle.RuleList(family) })
		if err != nil {
			return fmt.Errorf("list rules: %w", err)
		}
		for _, found := range rules {
			if isOurs(found, rulePriority) {
				if err := r.handle.RuleDel(rule(family, rulePriority)); err != nil && !errors.Is(err, unix.ENOENT) {
					return fmt.Errorf("remove the rule that leads to %s: %w", routeName(family), err)
				}
			}
		}
		found, err := r.list(family)
		if err != nil {
			return err
		}
		for _, f := range found {
			if err := r.handle.RouteDel(&f); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("remove %s: %w", routeName(family), err)
			}
		}
	}
	return nil
}

// check returns an error if something of what set puts up is missing.
func (r *routes) check() error {
	for _, family := range r.families {
		found, err := r.list(family)
		if err != nil {
			return err
		}
		if len(found) != 1 {
			return fmt.Errorf("%s is missing", routeName(family))
		}
		stands, err := r.hasRule(family, rulePriority)
		if err != nil {
			return err
		}
		if !stands {
			return fmt.Errorf("the rule that leads to %s is missing", routeName(family))
		}
	}
	return nil
}

func (r *routes) list(family int) ([]netlink.Route, error) {
	found, err := whole(func() ([]netlink.Route, error) {
		return r.handle.RouteListFiltered(family, &netlink.Route{Table: routeTable}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	return found, nil
}

// whole lists again what changed while it was listed, as it does in a pod whose
// network is still being set up.
func whole[T any](list func() ([]T, error)) (all []T, err error) {
	for range 10 {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}

func (r *routes) hasRule(family, priority int) (bool, error) {
	rules, err := whole(func() ([]netlink.Rule, error) { return r.handle.RuleList(family) })
	if err != nil {
		return false, fmt.Errorf("list rules: %w", err)
	}
	for _, found := range rules {
		if isOurs(found, priority) {
			return true, nil
		}
	}
	return false, nil
}

// iptables says whether rules of iptables may have been set. The mark that says so
// is written before the first of them, and removed after the last.
func (r *routes) iptables() (bool, error) { return r.hasRule(netlink.FAMILY_V4, iptablesPriority) }

func (r *routes) setIptables(on bool) error {
	change, settled := r.handle.RuleDel, unix.ENOENT
	if on {
		change, settled = r.handle.RuleAdd, unix.EEXIST
	}
	if err := change(rule(netlink.FAMILY_V4, iptablesPriority)); err != nil && !errors.Is(err, settled) {
		return fmt.Errorf("note that iptables is used: %w", err)
	}
	return nil
}

func rule(family, priority int) *netlink.Rule {
	r := netlink.NewRule()
	mask := uint32(0xffffffff)
	r.Family, r.Priority, r.Table, r.Mark, r.Mask = family, priority, routeTable, replyMark, &mask
	return r
}

func isOurs(r netlink.Rule, priority int) bool {
	return r.Priority == priority && r.Table == routeTable && r.Mark == replyMark
}

func route(family, lo int) *netlink.Route {
	everything := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	if family == netlink.FAMILY_V6 {
		everything = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	return &netlink.Route{
		Family:    family,
		LinkIndex: lo,
		Dst:       everything,
		Table:     routeTable,
		Type:      unix.RTN_LOCAL,
		Scope:     unix.RT_SCOPE_HOST,
		Protocol:  unix.RTPROT_STATIC,
	}
}

func routeName(family int) string {
	if family == netlink.FAMILY_V6 {
		return fmt.Sprintf("the IPv6 route in table %d", routeTable)
	}
	return fmt.Sprintf("the IPv4 route in table %d", routeTable)
}
