package directory

import (
	"cmp"
	"net/netip"
	"slices"

	"troth.dev/troth/identity"
)

// seen returns what the Service is for a pod of the node. What is chosen once is
// kept for all who would get the same.
func (s *service) seen(i *Index, ipv6 bool, n *node) *Behind {
	key := viewer{ipv6: ipv6}
	if s.byNode() {
		key.node = n.name
	}
	if s.byZone() {
		key.zone = n.zone
	}
	known := s.views[key]
	if known != nil && known.version == s.version {
		return known.behind
	}
	behind := &Behind{Service: s.choose(i, key)}
	if known != nil && known.behind.equal(behind) {
		behind = known.behind
	}
	if s.views == nil {
		s.views = make(map[viewer]*view)
	}
	s.views[key] = &view{behind: behind, version: s.version}
	return behind
}

// byNode says whether the choice depends on the caller's node.
func (s *service) byNode() bool {
	return s.object != nil && (s.object.Local || s.hints(func(h *Hints) bool { return len(h.Nodes) > 0 }))
}

// byZone says whether it depends on the caller's zone.
func (s *service) byZone() bool {
	return s.object != nil && !s.object.Local && s.hints(func(h *Hints) bool { return len(h.Zones) > 0 })
}

func (s *service) hints(of func(*Hints) bool) bool {
	for slice := range s.slices {
		for n := range slice.Endpoints {
			if h := slice.Endpoints[n].Hints; h != nil && of(h) {
				return true
			}
		}
	}
	return false
}

// choose chooses the Service's endpoints.
func (s *service) choose(i *Index, v viewer) *Service {
	chosen := &Service{Name: s.name, Affinity: s.object.Affinity, Ports: make([]ServicePort, 0, len(s.object.Ports))}
	for _, port := range s.object.Ports {
		p := ServicePort{Port: port.Port}
		for _, c := range s.choosePort(port.Name, v) {
			if e, ok := i.resolve(c); ok {
				p.Endpoints = append(p.Endpoints, e)
			}
		}
		slices.SortFunc(p.Endpoints, func(a, b Endpoint) int { return a.Address.Compare(b.Address) })
		chosen.Ports = append(chosen.Ports, p)
	}
	return chosen
}

// candidate is an endpoint at the port that a slice has for it.
type candidate struct {
	*SliceEndpoint
	port uint16
}

// choosePort chooses as kube-proxy does: those that are ready, and within them those
// that topology hints give to the caller; if there are none, those that still serve
// while they terminate. With the internal traffic policy Local it is the same among
// the endpoints of the caller's node, without hints.
func (s *service) choosePort(name string, v viewer) []candidate {
	all := s.merge(name, v)
	if s.object.Local {
		all = slices.DeleteFunc(all, func(c candidate) bool { return c.Node != v.node })
	}
	ready := filter(all, func(c candidate) bool { return c.Ready })
	if !s.object.Local {
		ready = meantFor(ready, v)
	}
	if len(ready) > 0 {
		return ready
	}
	return filter(all, func(c candidate) bool { return c.Serving && c.Terminating })
}

// merge returns the endpoints for a port out of all slices, each address and port
// once. While an endpoint moves from one slice to another it is in both, and they
// need not agree: the better news count.
func (s *service) merge(name string, v viewer) []candidate {
	merged := make(map[netip.AddrPort]candidate)
	for slice := range s.slices {
		for _, port := range slice.Ports {
			if port.Name != name {
				continue
			}
			for n := range slice.Endpoints {
				e := &slice.Endpoints[n]
				if e.Address.Is6() != v.ipv6 {
					continue
				}
				at := netip.AddrPortFrom(e.Address, port.Port)
				if known, ok := merged[at]; !ok || e.compare(known.SliceEndpoint, v.node) > 0 {
					merged[at] = candidate{e, port.Port}
				}
			}
		}
	}
	all := make([]candidate, 0, len(merged))
	for _, c := range merged {
		all = append(all, c)
	}
	return all
}

// compare says which of two that are the same endpoint counts, for a caller on the
// node: the greater one. It is total, so that no order of slices matters.
func (e *SliceEndpoint) compare(other *SliceEndpoint, node string) int {
	local := func(e *SliceEndpoint) bool { return node != "" && e.Node == node }
	return cmp.Or(
		compareBools(local(e), local(other)),
		compareBools(e.Ready, other.Ready),
		compareBools(e.Serving && e.Terminating, other.Serving && other.Terminating),
		compareBools(e.IsPod, other.IsPod),
		cmp.Compare(e.PodUID, other.PodUID),
		cmp.Compare(e.Node, other.Node),
		slices.Compare(e.Hints.zones(), other.Hints.zones()),
		slices.Compare(e.Hints.nodes(), other.Hints.nodes()),
	)
}

func compareBools(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	default:
		return -1
	}
}

func (h *Hints) zones() []string {
	if h == nil {
		return nil
	}
	return h.Zones
}

func (h *Hints) nodes() []string {
	if h == nil {
		return nil
	}
	return h.Nodes
}

// meantFor returns those of the ready endpoints that hints give to the caller, by
// node before zone. Hints count only if every ready endpoint has one and somebody is
// left: otherwise they are of a moment that is over.
func meantFor(ready []candidate, v viewer) []candidate {
	for _, hint := range []struct {
		of   func(*Hints) []string
		mine string
	}{{(*Hints).nodes, v.node}, {(*Hints).zones, v.zone}} {
		every := !slices.ContainsFunc(ready, func(c candidate) bool { return len(hint.of(c.Hints)) == 0 })
		if !every {
			continue
		}
		if mine := filter(ready, func(c candidate) bool { return slices.Contains(hint.of(c.Hints), hint.mine) }); len(mine) > 0 {
			return mine
		}
	}
	return ready
}

// resolve says who is at an endpoint, and false if that is not known.
func (i *Index) resolve(c candidate) (Endpoint, bool) {
	at := netip.AddrPortFrom(c.Address, c.port)
	var there *pod
	if c.PodUID != "" {
		there = i.pods[c.PodUID]
		if there == nil || !there.live || !slices.Contains(there.addresses, c.Address) {
			return Endpoint{}, false
		}
	} else if known := i.addresses[c.Address]; known != nil {
		there = known.owner()
	}
	if there == nil && c.IsPod {
		return Endpoint{}, false
	}
	if there == nil || there.capture == identity.UncapturedHost {
		return Endpoint{Address: at, Protocol: Plaintext}, true
	}
	e := there.named(at)
	e.Protocol = there.at(c.port)
	return e, true
}

func filter(all []candidate, keep func(candidate) bool) []candidate {
	var kept []candidate
	for _, c := range all {
		if keep(c) {
			kept = append(kept, c)
		}
	}
	return kept
}
