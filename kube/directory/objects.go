package directory

import (
	"maps"
	"net/netip"
	"slices"
	"time"
)

// ServiceObject is what a Service of the API server says. An [Index] keeps what it is
// given, which nobody changes from then on.
type ServiceObject struct {
	Name
	Addresses []netip.Addr  // cluster IPs, at most one of each family; none if it is headless
	Ports     []NamedPort   // for TCP, by the numbers that clients call
	Local     bool          // whether the internal traffic policy is Local
	Affinity  time.Duration // of the session affinity ClientIP; zero for none
}

// NamedPort is a port of a Service, or the one behind it in an EndpointSlice. The
// name tells which belong together; it may be empty.
type NamedPort struct {
	Name string
	Port uint16
}

// Slice is what an EndpointSlice of the API server says, of whose endpoints all have
// addresses of one family. An [Index] keeps what it is given, which nobody changes
// from then on.
type Slice struct {
	Name
	Service   Name
	Ports     []NamedPort // for TCP, by the numbers that endpoints listen at
	Endpoints []SliceEndpoint
}

// SliceEndpoint is one endpoint of an EndpointSlice.
type SliceEndpoint struct {
	Address netip.Addr
	PodUID  string // empty if no pod is named, or not by its UID
	Node    string // empty if it is on none, or on one that is not known
	Hints   *Hints // whose it is to be; nil for everybody's

	// IsPod is whether the endpoint is said to be a pod. Ready, Serving and
	// Terminating are its conditions, with the defaults of those that were not given.
	IsPod, Ready, Serving, Terminating bool
}

// Hints says for whom an endpoint is meant.
type Hints struct{ Zones, Nodes []string }

func (s *ServiceObject) equal(other *ServiceObject) bool {
	return s.Name == other.Name && s.Local == other.Local && s.Affinity == other.Affinity &&
		slices.Equal(s.Addresses, other.Addresses) && slices.Equal(s.Ports, other.Ports)
}

func (s *Slice) equal(other *Slice) bool {
	return s.Name == other.Name && s.Service == other.Service && slices.Equal(s.Ports, other.Ports) &&
		slices.EqualFunc(s.Endpoints, other.Endpoints, func(a, b SliceEndpoint) bool {
			same := a.Hints == b.Hints || a.Hints != nil && b.Hints != nil &&
				slices.Equal(a.Hints.Zones, b.Hints.Zones) && slices.Equal(a.Hints.Nodes, b.Hints.Nodes)
			a.Hints, b.Hints = nil, nil
			return same && a == b
		})
}

// SetService adds a Service, or says anew what it is.
func (i *Index) SetService(o ServiceObject) {
	i.mu.Lock()
	defer i.mu.Unlock()
	s := i.serviceOf(o.Name)
	if s.object != nil && s.object.equal(&o) {
		return
	}
	i.withdraw(s)
	s.object = &o
	s.version++
	for _, a := range o.Addresses {
		at := i.addressOf(a)
		at.services = append(at.services, s)
		// One address of two Services is a mistake of the moment; the answer must not
		// depend on who came first.
		slices.SortFunc(at.services, func(a, b *service) int { return compareNames(a.name, b.name) })
		at.touch()
	}
	s.forget(i)
}

// RemoveService forgets a Service, if it is there.
func (i *Index) RemoveService(name Name) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.removeService(name)
}

// KeepServices forgets the Services that keep refuses.
func (i *Index) KeepServices(keep func(Name) bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for name := range i.services {
		if !keep(name) {
			i.removeService(name)
		}
	}
}

func (i *Index) removeService(name Name) {
	if s := i.services[name]; s != nil {
		i.withdraw(s)
		s.views = nil
		i.dropService(s)
	}
}

// withdraw takes what a Service's object said out of the index.
func (i *Index) withdraw(s *service) {
	if s.object == nil {
		return
	}
	for _, a := range s.object.Addresses {
		at := i.addresses[a]
		at.services = without(at.services, s)
		at.touch()
		i.dropAddress(at)
	}
	s.object = nil
}

// SetSlice adds an EndpointSlice, or says anew what it is.
func (i *Index) SetSlice(o Slice) {
	i.mu.Lock()
	defer i.mu.Unlock()
	known := i.slices[o.Name]
	if known != nil {
		if known.equal(&o) {
			return
		}
		i.removeSlice(known)
	}
	slice := &slice{Slice: o, service: i.serviceOf(o.Service)}
	i.slices[o.Name] = slice
	slice.service.slices[slice] = true
	for n := range o.Endpoints {
		at := i.addressOf(o.Endpoints[n].Address)
		at.slices = append(at.slices, slice)
	}
	slice.service.touch(i)
}

// RemoveSlice forgets an EndpointSlice, if it is there.
func (i *Index) RemoveSlice(name Name) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if s := i.slices[name]; s != nil {
		i.removeSlice(s)
	}
}

// KeepSlices forgets the EndpointSlices that keep refuses.
func (i *Index) KeepSlices(keep func(Name) bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for name, s := range i.slices {
		if !keep(name) {
			i.removeSlice(s)
		}
	}
}

func (i *Index) removeSlice(s *slice) {
	for n := range s.Endpoints {
		at := i.addresses[s.Endpoints[n].Address]
		at.slices = without(at.slices, s)
		i.dropAddress(at)
	}
	delete(i.slices, s.Name)
	delete(s.service.slices, s)
	s.service.touch(i)
	i.dropService(s.service)
}

// SetZone says in which zone a node is; "" means none, or that there is no such node.
func (i *Index) SetZone(name, zone string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if n := i.nodes[name]; n == nil && zone == "" || n != nil && n.zone == zone {
		return
	}
	n := i.nodeOf(name)
	n.zone = zone
	for r := range n.readers {
		for _, h := range r.held {
			if services := h.at.services; len(services) > 0 && services[0].byZone() {
				h.mark()
			}
		}
	}
	i.dropNode(n)
}

// KeepZones forgets the zones of the nodes that keep refuses.
func (i *Index) KeepZones(keep func(node string) bool) {
	i.mu.Lock()
	names := slices.Collect(maps.Keys(i.nodes))
	i.mu.Unlock()
	for _, name := range names {
		if !keep(name) {
			i.SetZone(name, "")
		}
	}
}
