// Package capture brings the TCP connections of a pod to the agent: it sets rules
// in the pod's network namespace, and opens the sockets that the rules lead to.
//
// Start with [Open], which sets both up, [Network.Listener], which accepts what was
// captured, and [Destination], which says where it wanted to go. [Network.Dial] and
// [Network.DialFrom] connect from inside the namespace and are not captured again.
// [Keeper] keeps the sockets for an agent that crashes or is replaced.
//
// # What it guarantees
//
// Once Open has returned, no TCP connection reaches an application of the pod from
// outside, and none leaves the pod, but through the agent. A segment that opens a
// connection is sent to one of the agent's ports by NAT, and a second rule, which
// does not rest on NAT or on the kernel's table of connections, resets every such
// segment that would pass by them. So it stays while no agent runs: the rules
// remain, and the kernel answers for the closed ports, or the sockets wait with the
// keeper for the next agent.
//
// Who calls the agent's ports directly gains nothing. Ports 15001 and 15006 are
// reset if the call comes from outside, and [Destination] fails if it comes from
// inside. Ports 15008 and 15009 are for everybody, and ask for a certificate.
//
// # What it leaves alone
//
// UDP, ICMP and SCTP; what the pod sends to itself; what the pod forwards for
// others; and connections that were open when the rules came. A pod that is
// captured before its containers start has none of those. For the others there is
// [Network.ResetOlder].
//
// # Whom it trusts
//
// The agent's own sockets are known by a mark. Somebody in the pod who may set a
// mark (CAP_NET_ADMIN or CAP_NET_RAW) gets around the capture of what the pod itself
// sends, as they would by removing the rules. They get at no other pod: its rules are in its own
// namespace, where marks from outside are not believed: a mark does not cross from
// one namespace to another, and one of ours that arrives all the same, on whatever
// interface but the loopback, is erased before anything looks at it.
package capture

import (
	"errors"
	"fmt"
	"net/netip"
)

// The ports of the agent in each captured pod.
const (
	OutboundPort    = 15001 // what the pod sends
	PlaintextPort   = 15006 // what arrives without a tunnel
	HBONEPort       = 15008 // tunnels in the standard order
	CallerFirstPort = 15009 // tunnels in the caller-first order
)

// ports are those that are listened on, in this order.
func ports() []uint16 {
	return []uint16{OutboundPort, PlaintextPort, HBONEPort, CallerFirstPort}
}

// ErrNotCaptured is why [Destination] fails for a connection that no rule led here.
var ErrNotCaptured = errors.New("the connection was made to the agent's own port")

// checkFrom says whether a caller's address can be worn to reach an application.
func checkFrom(from netip.Addr, to netip.AddrPort) error {
	switch {
	case !to.IsValid() || to.Port() == 0:
		return fmt.Errorf("%q is no destination", to)
	case !from.IsValid() || from.IsUnspecified() || from.IsMulticast():
		return fmt.Errorf("%q is nobody's address", from)
	case from.Is4() != to.Addr().Is4():
		return fmt.Errorf("%s and %s are of two families", from, to)
	case from.IsLoopback() != to.Addr().IsLoopback():
		return fmt.Errorf("%s does not reach %s", from, to)
	}
	for _, port := range ports() {
		if to.Port() == port {
			return fmt.Errorf("%s is the agent's own port", to)
		}
	}
	return nil
}
