package proxy

import (
	"time"
)

// Connection is one that is open now, for whoever looks at a node.
type Connection struct {
	Direction   Direction `json:"direction"`
	Protocol    string    `json:"protocol"`
	Pod         string    `json:"pod"`         // the UID of the pod that it comes from or goes to
	Source      string    `json:"source"`      // address and port
	Destination string    `json:"destination"` // address and port that were called
	Service     string    `json:"service,omitempty"`
	Peer        string    `json:"peer,omitempty"`     // the SPIFFE ID at the other end; none in plaintext
	PeerPod     string    `json:"peer_pod,omitempty"` // NAMESPACE/NAME, if known
	Policy      string    `json:"policy,omitempty"`   // by which it passes
	Reason      string    `json:"reason,omitempty"`   // why it passes
	Begun       time.Time `json:"begun"`
	In          int64     `json:"bytes_in"`  // to the pod
	Out         int64     `json:"bytes_out"` // from the pod
}

// Tunnel is one that is open now, for whoever looks at a node.
type Tunnel struct {
	Direction   Direction `json:"direction"`
	Order       string    `json:"order"`
	Pod         string    `json:"pod"` // the UID of the pod whose it is
	Remote      string    `json:"remote"`
	Own         string    `json:"own"`  // the pod's SPIFFE ID
	Peer        string    `json:"peer"` // the SPIFFE ID at the other end
	Begun       time.Time `json:"begun"`
	Until       time.Time `json:"until"` // when its proof ends, unless renewed
	Authorities []string  `json:"authorities"`
	Connections int       `json:"connections"` // that it carries
}

// ByAuthority returns how many connections there are, and tunnels without one, by the
// id of each authority that signed the SVID of either end.
func ByAuthority(tunnels []Tunnel) map[string]int {
	count := make(map[string]int)
	for _, t := range tunnels {
		for _, id := range t.Authorities {
			count[id] += max(t.Connections, 1)
		}
	}
	return count
}
