package agent

import (
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"time"

	"troth.dev/troth/agent/proxy"
)

// Workload is one pod of the node, for whoever looks at it.
type Workload struct {
	UID       string    `json:"uid"`
	Namespace string    `json:"namespace"`
	Name      string    `json:"name"`
	SPIFFEID  string    `json:"spiffe_id"`
	Capture   string    `json:"capture"` // whether its traffic is captured, or why not
	Mode      string    `json:"mode"`    // of mTLS, for the ports that have none of their own
	Serial    string    `json:"serial,omitempty"`
	NotBefore time.Time `json:"not_before,omitzero"` // of its SVID
	NotAfter  time.Time `json:"not_after,omitzero"`
}

// Workloads returns the pods of the node, by namespace and name.
func (a *Agent) Workloads() []Workload {
	i := a.identities
	i.mu.Lock()
	defer i.mu.Unlock()
	out := make([]Workload, 0, len(i.pods))
	for _, p := range i.pods {
		w := Workload{
			UID: p.UID, Namespace: p.Namespace, Name: p.Name, SPIFFEID: p.id.String(),
			Capture: captureName(p.capture), Mode: p.policy.Mode.String(),
		}
		if svid := i.held[p.id].svid; svid != nil {
			leaf := svid.Certificates[0]
			w.Serial, w.NotBefore, w.NotAfter = leaf.SerialNumber.Text(16), leaf.NotBefore, leaf.NotAfter
		}
		out = append(out, w)
	}
	slices.SortFunc(out, func(a, b Workload) int {
		return strings.Compare(a.Namespace+"/"+a.Name+"/"+a.UID, b.Namespace+"/"+b.Name+"/"+b.UID)
	})
	return out
}

// Connections returns the connections that the node carries now, the oldest first.
func (a *Agent) Connections() []proxy.Connection {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := []proxy.Connection{}
	for s := range a.served {
		out = append(out, s.inbound.Connections()...)
		if s.outbound != nil {
			out = append(out, s.outbound.Connections()...)
		}
	}
	slices.SortFunc(out, func(a, b proxy.Connection) int { return a.Begun.Compare(b.Begun) })
	return out
}

// Tunnels returns the tunnels that the node has now, the oldest first.
func (a *Agent) Tunnels() []proxy.Tunnel {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := []proxy.Tunnel{}
	for s := range a.served {
		out = append(out, s.inbound.Tunnels()...)
	}
	if a.pool != nil {
		out = append(out, a.pool.Tunnels()...)
	}
	slices.SortFunc(out, func(a, b proxy.Tunnel) int { return a.Begun.Compare(b.Begun) })
	return out
}

// Admin returns the handler of the page that tells what the node does: /workloads,
// /tunnels and /connections, in JSON. It tells everybody who asks which service talks
// to which: it is for the loopback alone.
func (a *Agent) Admin() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /workloads", answer(a.Workloads))
	mux.HandleFunc("GET /tunnels", answer(a.Tunnels))
	mux.HandleFunc("GET /connections", answer(a.Connections))
	return mux
}

func answer[T any](list func() []T) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		encoder := json.NewEncoder(w)
		encoder.SetIndent("", "  ")
		_ = encoder.Encode(list()) // fails only if nobody reads on
	}
}
