// Package policy says what mTLS policy means: which mode Istio's
// PeerAuthentications put in force for a workload, and whether a connection to it
// may pass. [Parse] and [Decode] read policies, a [Set] answers for one workload
// with [Set.Resolve], [Assignments] keeps the answers for many current, and
// [Effective.Decide] judges a connection.
//
// The result depends on the policies alone, never on the order in which they
// came. What Istio leaves open is settled: policies of the same age are ordered
// by name. A policy that is not valid is STRICT for what it selects, at its
// place in that order, and says why. Whatever is not known is refused: the nil
// and the zero [Effective], a mode without a name, the zero [Connection].
//
// All of it is data: nothing here reads a network, a clock or a file, and
// nothing starts a goroutine.
package policy

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"
)

// Mode is what a policy demands of connections to a workload.
type Mode uint8

// The modes, by Istio's names for them.
const (
	Unset      Mode = iota // inherit; never in force
	Disable                // plaintext and mTLS are accepted, and mTLS is not asked for
	Permissive             // plaintext and mTLS are accepted
	Strict                 // only mTLS is accepted
)

// ParseMode reads Istio's spelling of a mode and refuses every other.
func ParseMode(s string) (Mode, error) {
	for mode := Unset; mode <= Strict; mode++ {
		if s == mode.String() {
			return mode, nil
		}
	}
	return Unset, fmt.Errorf("%.64q is not UNSET, DISABLE, PERMISSIVE or STRICT", s)
}

// String returns Istio's spelling of the mode.
func (m Mode) String() string {
	switch m {
	case Unset:
		return "UNSET"
	case Disable:
		return "DISABLE"
	case Permissive:
		return "PERMISSIVE"
	case Strict:
		return "STRICT"
	default:
		return fmt.Sprintf("Mode(%d)", uint8(m))
	}
}

// MarshalText writes the mode's name; it fails for a mode that has none.
func (m Mode) MarshalText() ([]byte, error) {
	if m > Strict {
		return nil, fmt.Errorf("policy: %v is no mode", m)
	}
	return []byte(m.String()), nil
}

// UnmarshalText reads what MarshalText wrote and refuses all else.
func (m *Mode) UnmarshalText(text []byte) error {
	mode, err := ParseMode(string(text))
	if err != nil {
		return fmt.Errorf("policy: mode %w", err)
	}
	*m = mode
	return nil
}

// Ref names a policy. The zero Ref stands for the built-in default, PERMISSIVE,
// which is in force where no policy decides.
type Ref struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

// IsZero reports whether r names no policy.
func (r Ref) IsZero() bool { return r == Ref{} }

// String returns NAMESPACE/NAME, and nothing for the zero Ref.
func (r Ref) String() string {
	if r.IsZero() {
		return ""
	}
	return r.Namespace + "/" + r.Name
}

// PeerAuthentication is one policy. Its maps are shared with whoever is given it,
// and never changed.
type PeerAuthentication struct {
	Ref
	// Created is the age that decides between policies. Zero means not created
	// yet, and is newer than every time.
	Created time.Time
	// Selector is the labels that a workload of the namespace must have for the
	// policy to concern it. Without any, the policy is for the whole namespace,
	// or, in the root namespace, for the whole mesh.
	Selector map[string]string
	// Mode is Unset for a policy that inherits.
	Mode Mode
	// Ports is the modes of single container ports, which are not the ports of a
	// Service. Unset means the workload's own mode.
	Ports map[uint16]Mode
	// Problems is why the policy is not valid. If there are any, it is STRICT for
	// what it selects, and its Mode and Ports count for nothing.
	Problems []Problem

	document, line int // where Parse found it, both from 1
}

// Problem is one thing that is wrong with a policy.
type Problem struct {
	Field   string `json:"field"` // like spec.portLevelMtls[8080].mode
	Message string `json:"message"`
}

// String returns FIELD: MESSAGE.
func (p Problem) String() string { return p.Field + ": " + p.Message }

// Origin says where [Parse] found the policy, like "document 2, line 14". It is
// empty for a policy that comes from elsewhere.
func (p PeerAuthentication) Origin() string {
	if p.document == 0 {
		return ""
	}
	return fmt.Sprintf("document %d, line %d", p.document, p.line)
}

// says returns the mode that the policy asks for where it wins.
func (p *PeerAuthentication) says() Mode {
	if len(p.Problems) > 0 {
		return Strict
	}
	return known(p.Mode)
}

// ports returns the modes that the policy asks for ports where it wins, in
// ascending order.
func (p *PeerAuthentication) ports() []PortMode {
	if len(p.Problems) > 0 || len(p.Ports) == 0 {
		return nil
	}
	ports := make([]PortMode, 0, len(p.Ports))
	for _, port := range slices.Sorted(maps.Keys(p.Ports)) {
		ports = append(ports, PortMode{Port: port, Mode: known(p.Ports[port])})
	}
	return ports
}

// known makes STRICT of a mode that nobody knows.
func known(m Mode) Mode { return min(m, Strict) }

// selects reports whether a workload of the policy's namespace with these labels
// is concerned.
func (p *PeerAuthentication) selects(labels map[string]string) bool {
	for key, value := range p.Selector {
		if got, ok := labels[key]; !ok || got != value {
			return false
		}
	}
	return true
}

// compare orders policies of one scope: the first wins.
func (p *PeerAuthentication) compare(q *PeerAuthentication) int {
	switch {
	case p.Created.IsZero() && !q.Created.IsZero():
		return 1
	case !p.Created.IsZero() && q.Created.IsZero():
		return -1
	}
	return cmp.Or(p.Created.Compare(q.Created), cmp.Compare(p.Name, q.Name))
}

func (p *PeerAuthentication) equal(q *PeerAuthentication) bool {
	return p.Ref == q.Ref && p.Created.Equal(q.Created) && p.Mode == q.Mode &&
		maps.Equal(p.Selector, q.Selector) && maps.Equal(p.Ports, q.Ports) &&
		slices.Equal(p.Problems, q.Problems) && p.document == q.document && p.line == q.line
}
