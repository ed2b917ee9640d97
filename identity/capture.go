package identity

// CaptureLabel is the label by which a pod opts out of being captured, when it has
// the value "disabled", and by which an agent's pod says that it captures the pods of
// its node, when it has the value "enabled". Every other value is as if it were not
// there.
const CaptureLabel = "troth.dev/capture"

// Capture is whether a pod's traffic is captured, or why not. The zero Capture is
// neither: who gets it leaves the pod alone.
type Capture int

// What becomes of a pod's traffic.
const (
	Captured            Capture = iota + 1
	UncapturedHost              // it shares its node's network, whose traffic is not the pod's alone
	UncapturedByLabel           // its label CaptureLabel is "disabled"
	UncapturedNamespace         // the pods of its namespace are left alone
)

// Capture says whether the pod's traffic is captured. uncaptured has the namespaces
// whose pods are left alone. An agent captures by it, and callers are told by the
// same: neither may know better.
func (p Pod) Capture(uncaptured map[string]bool) Capture {
	switch {
	case p.HostNetwork:
		return UncapturedHost
	case p.Labels[CaptureLabel] == "disabled":
		return UncapturedByLabel
	case uncaptured[p.Namespace]:
		return UncapturedNamespace
	default:
		return Captured
	}
}

// Captures says whether the pod, which is an agent's, captures the pods of its node.
func (p Pod) Captures() bool { return p.Labels[CaptureLabel] == "enabled" }
