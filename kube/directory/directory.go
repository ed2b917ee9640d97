// Package directory says who is behind each address of a cluster: a pod, a
// Service, or nobody, and how each is called. Start with [Index], which is told
// what the API server says, and [Reader], by which one node's agent holds addresses
// and gets their answers.
//
// It chooses the endpoints of a Service as kube-proxy does, and then knows better in
// two things. An endpoint that is said to be a pod, by its UID or without, is left out
// while no such pod is known to have that address: the lists of pods and of endpoints arrive
// independently of each other, and an endpoint taken for nobody's would be called in
// plaintext. And of several pods that claim one address, one that is called by
// mutual TLS goes before one that is not: a claim takes no protection away.
//
// It guarantees that a change reaches those who hold what it changes, the newest
// state only, and that nobody is given the same answer twice without having asked
// again. Nothing in it blocks, and a reader that is slow costs one mark for each
// address that it holds.
package directory

import (
	"net/netip"
	"slices"
	"time"

	"troth.dev/troth/identity"
)

// Protocol is how an endpoint is called. The zero Protocol is none.
type Protocol int

// The protocols, of which a greater one protects more.
const (
	Plaintext Protocol = iota + 1 // as it is
	HBONE                         // in the standard order
	Troth                         // HBONE in the caller-first order: another agent of Troth's
)

// Behind is what an address stands for: one of the two. The nil Behind is nobody. It
// is shared and never changed, and two that are equal are the same for as long as
// somebody holds the address.
type Behind struct {
	Pod     *Endpoint // without a port
	Service *Service
}

// Endpoint is a pod, or an address without one, that can be called.
type Endpoint struct {
	Address netip.AddrPort
	Pod     identity.PodReference   // zero if no pod is known there
	Account identity.ServiceAccount // that the pod runs as
	// Protocol is how it is called at each port that Ports does not have; within a
	// Service, at its own port.
	Protocol Protocol
	Ports    []PortProtocol // ascending; none within a Service
}

// PortProtocol is how one container port is called.
type PortProtocol struct {
	Port     uint16
	Protocol Protocol
}

// Service is what a Service's address stands for, for the pods of one node.
type Service struct {
	Name
	Ports    []ServicePort // its TCP ports, in the order of the object
	Affinity time.Duration // for how long a client keeps its endpoint; zero for not at all
}

// ServicePort is one TCP port of a Service.
type ServicePort struct {
	Port      uint16
	Endpoints []Endpoint // by address and port
}

// Name names a namespaced object.
type Name struct{ Namespace, Name string }

func (b *Behind) equal(other *Behind) bool {
	if b == nil || other == nil || b == other {
		return b == other
	}
	return equalOr(b.Pod, other.Pod, Endpoint.equal) && equalOr(b.Service, other.Service, Service.equal)
}

func equalOr[T any](a, b *T, equal func(T, T) bool) bool {
	if a == nil || b == nil {
		return a == b
	}
	return equal(*a, *b)
}

func (e Endpoint) equal(other Endpoint) bool {
	return e.Address == other.Address && e.Pod == other.Pod && e.Account == other.Account &&
		e.Protocol == other.Protocol && slices.Equal(e.Ports, other.Ports)
}

func (s Service) equal(other Service) bool {
	return s.Name == other.Name && s.Affinity == other.Affinity &&
		slices.EqualFunc(s.Ports, other.Ports, func(a, b ServicePort) bool {
			return a.Port == b.Port && slices.EqualFunc(a.Endpoints, b.Endpoints, Endpoint.equal)
		})
}
