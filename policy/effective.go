package policy

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Effective is the policy in force for connections to a workload. The nil and
// the zero Effective refuse every connection. One that was resolved is shared and
// never changed.
type Effective struct {
	// Mode holds for every port that Ports does not have. It is never Unset if
	// the Effective was resolved.
	Mode Mode `json:"mode"`
	// DecidedBy is the policy that Mode is from. Zero is the built-in default.
	DecidedBy Ref `json:"decidedBy,omitzero"`
	// Ports has the ports whose mode is another than Mode, in ascending order.
	Ports []PortMode `json:"ports,omitempty"`
	// PortsBy is the policy that Ports are from, and zero without any.
	PortsBy Ref `json:"portsBy,omitzero"`
}

// PortMode is the mode of one container port.
type PortMode struct {
	Port uint16 `json:"port"`
	Mode Mode   `json:"mode"`
}

// At returns the mode in force at a container port, and the policy that it is
// from. For the nil Effective that is Unset, which is no mode to be in force.
func (e *Effective) At(port uint16) (Mode, Ref) {
	if e == nil {
		return Unset, Ref{}
	}
	if i, ok := slices.BinarySearchFunc(e.Ports, port, func(p PortMode, port uint16) int {
		return cmp.Compare(p.Port, port)
	}); ok {
		return e.Ports[i].Mode, e.PortsBy
	}
	return e.Mode, e.DecidedBy
}

// Equal reports whether both have the same modes from the same policies.
func (e *Effective) Equal(other *Effective) bool {
	if e == nil || other == nil || e == other {
		return e == other
	}
	return e.Mode == other.Mode && e.DecidedBy == other.DecidedBy &&
		e.PortsBy == other.PortsBy && slices.Equal(e.Ports, other.Ports)
}

// Connection is what is known of a connection to a workload.
type Connection struct {
	Peer   spiffeid.ID // whom mTLS proved; zero for plaintext
	Port   uint16      // the container port that it is for
	Source netip.Addr  // where it comes from
}

// Verdict is whether a connection may pass. The zero Verdict refuses.
type Verdict struct {
	Allowed bool   `json:"allowed"`
	Reason  Reason `json:"reason"`
	Policy  Ref    `json:"policy,omitzero"` // that decides; zero for the built-in default
}

// Reason is why a connection was judged as it was, for logs, metrics and
// programs. Reasons never change meaning.
type Reason string

// Why a connection passes.
const (
	MTLSAccepted      Reason = "MTLS_ACCEPTED"
	PlaintextAccepted Reason = "PLAINTEXT_ACCEPTED" // the mode is PERMISSIVE or DISABLE
	ProbeExempt       Reason = "PROBE_EXEMPT"       // plaintext under STRICT, from the node's own kubelet
)

// Why a connection is refused.
const (
	PlaintextRefused  Reason = "PLAINTEXT_REFUSED"  // the mode is STRICT
	PolicyUnknown     Reason = "POLICY_UNKNOWN"     // no mode is known to be in force
	ConnectionUnknown Reason = "CONNECTION_UNKNOWN" // it has no port or no source
)

// Decide judges a connection. mTLS passes under every mode, DISABLE too: that
// mode does not ask for it, and turns nobody away who has it. Plaintext passes
// under PERMISSIVE and DISABLE, and under STRICT from the addresses in kubelet,
// which are those that the node's own health probes come from. An IPv4 address
// is the same one when it is mapped into IPv6.
func (e *Effective) Decide(c Connection, kubelet ...netip.Addr) Verdict {
	if e == nil || !e.Mode.inForce() {
		return Verdict{Reason: PolicyUnknown}
	}
	if c.Port == 0 || !c.Source.IsValid() {
		return Verdict{Reason: ConnectionUnknown}
	}
	mode, by := e.At(c.Port)
	switch {
	case !mode.inForce():
		return Verdict{Reason: PolicyUnknown, Policy: by}
	case !c.Peer.IsZero():
		return Verdict{Allowed: true, Reason: MTLSAccepted, Policy: by}
	case mode != Strict:
		return Verdict{Allowed: true, Reason: PlaintextAccepted, Policy: by}
	}
	source := c.Source.Unmap()
	for _, address := range kubelet {
		if address.Unmap() == source {
			return Verdict{Allowed: true, Reason: ProbeExempt, Policy: by}
		}
	}
	return Verdict{Reason: PlaintextRefused, Policy: by}
}

func (m Mode) inForce() bool { return m == Disable || m == Permissive || m == Strict }
