package agent

import (
	"cmp"
	"math"
	"slices"
	"strings"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/policy"
)

// Policy returns the mTLS policy in force for a pod, kept current until release is
// called. It is nil, and refuses every connection, while the control plane has not
// said that the pod is on this node, and again when the pod is gone.
func (a *Agent) Policy(podUID string) (value *latest.Value[*policy.Effective], release func()) {
	return a.identities.policyOf(podUID)
}

// parsePolicy reads the policy that the control plane sent for a workload. What it
// does not know, or did not get, is STRICT.
func parsePolicy(in *trothv1.EffectivePolicy) *policy.Effective {
	e := &policy.Effective{Mode: parseMode(in.GetMode()), DecidedBy: parseRef(in.GetDecidedBy())}
	for port, mode := range in.GetPortModes() {
		if port == 0 || port > math.MaxUint16 {
			continue // no connection has it
		}
		if m := parseMode(mode); m != e.Mode {
			e.Ports = append(e.Ports, policy.PortMode{Port: uint16(port), Mode: m})
		}
	}
	if len(e.Ports) > 0 {
		slices.SortFunc(e.Ports, func(a, b policy.PortMode) int { return cmp.Compare(a.Port, b.Port) })
		e.PortsBy = parseRef(in.GetPortsDecidedBy())
	}
	return e
}

func parseMode(in trothv1.MTLSMode) policy.Mode {
	switch in {
	case trothv1.MTLSMode_MTLS_MODE_DISABLE:
		return policy.Disable
	case trothv1.MTLSMode_MTLS_MODE_PERMISSIVE:
		return policy.Permissive
	default:
		return policy.Strict
	}
}

func parseRef(in string) policy.Ref {
	namespace, name, _ := strings.Cut(in, "/")
	return policy.Ref{Namespace: namespace, Name: name}
}
