package directory

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/agent/proxy"
	trothv1 "troth.dev/troth/api/troth/v1"
)

// answer is what the control plane said of one address, checked. It is never
// changed. That of an address which nobody has is zero.
type answer struct {
	refused error    // why it makes no sense; then nothing else is set
	pod     *pod     // nil if it is no pod's
	service *service // nil if it is no Service's
}

// pod is how a pod is called.
type pod struct {
	id    spiffeid.ID // zero if it is called in plaintext alone
	name  string      // NAMESPACE/NAME
	other proxy.Protocol
	ports map[uint16]proxy.Protocol // that are not called as other
}

// service is a Service's ports.
type service struct {
	ports map[uint16]*proxy.Destination
	none  *proxy.Destination // for every other port
}

// nobody reports whether it says that nobody in the cluster has the address.
func (a *answer) nobody() bool { return a.refused == nil && a.pod == nil && a.service == nil }

// at returns what is at the address's port.
func (a *answer) at(destination netip.AddrPort) *proxy.Destination {
	switch {
	case a.service != nil:
		if at, ok := a.service.ports[destination.Port()]; ok {
			return at
		}
		return a.service.none
	case a.pod != nil:
		return &proxy.Destination{Endpoints: []proxy.Endpoint{a.pod.at(destination)}}
	default:
		return &proxy.Destination{Endpoints: []proxy.Endpoint{{Address: destination, Protocol: proxy.Plaintext}}}
	}
}

func (p *pod) at(address netip.AddrPort) proxy.Endpoint {
	e := proxy.Endpoint{Address: address, Pod: p.name, Protocol: p.other}
	if protocol, ok := p.ports[address.Port()]; ok {
		e.Protocol = protocol
	}
	if proves(e.Protocol) {
		e.ID = p.id
	}
	return e
}

// What an answer may have at most. Before, a message has maxMessage bytes at most.
const (
	maxEndpoints = 65_536 // of a Service, at all ports
	maxName      = 253    // bytes of a name, as Kubernetes has it
	maxID        = 2048   // bytes of a SPIFFE ID (SPIFFE-ID §2.3)
	maxMessage   = 16 << 20
	maxAffinity  = 24 * time.Hour // of a client's affinity, as Kubernetes has it
)

// parseAnswer reads what the control plane says of an address.
func parseAnswer(address netip.Addr, in *trothv1.ResolveResponse) (*answer, error) {
	switch behind := in.GetBehind().(type) {
	case *trothv1.ResolveResponse_Pod:
		at, p, err := parseEndpoint(behind.Pod)
		switch {
		case err != nil:
			return nil, fmt.Errorf("a pod: %w", err)
		case p.name == "":
			return nil, errors.New("a pod without a UID")
		case at != address:
			return nil, fmt.Errorf("the pod of another address, %v", at)
		}
		return &answer{pod: p}, nil
	case *trothv1.ResolveResponse_Service:
		s, err := parseService(behind.Service)
		if err != nil {
			return nil, fmt.Errorf("a Service: %w", err)
		}
		return &answer{service: s}, nil
	default:
		// Somebody of a kind that only newer agents know is not nobody.
		if len(in.ProtoReflect().GetUnknown()) > 0 {
			return nil, errors.New("somebody of an unknown kind")
		}
		return new(answer), nil
	}
}

func parseService(in *trothv1.Service) (*service, error) {
	name, err := parseName(in.GetNamespace(), in.GetName())
	if err != nil {
		return nil, err
	}
	var affinity time.Duration
	if in.GetAffinity() != nil {
		if err := in.GetAffinity().CheckValid(); err != nil {
			return nil, fmt.Errorf("affinity: %w", err)
		}
		if affinity = in.GetAffinity().AsDuration(); affinity < 0 {
			return nil, fmt.Errorf("affinity of %v", affinity)
		}
		affinity = min(affinity, maxAffinity)
	}
	s := &service{
		ports: make(map[uint16]*proxy.Destination, len(in.GetPorts())),
		none:  &proxy.Destination{Service: name, Affinity: affinity},
	}
	var count int
	for _, at := range in.GetPorts() {
		port, err := parsePort(at.GetPort())
		if err != nil {
			return nil, err
		}
		if s.ports[port] != nil {
			return nil, fmt.Errorf("port %d twice", port)
		}
		if count += len(at.GetEndpoints()); count > maxEndpoints {
			return nil, fmt.Errorf("more than %d endpoints", maxEndpoints)
		}
		d := &proxy.Destination{Service: name, Affinity: affinity, Endpoints: make([]proxy.Endpoint, 0, len(at.GetEndpoints()))}
		for _, e := range at.GetEndpoints() {
			address, p, err := parseEndpoint(e)
			if err != nil {
				return nil, fmt.Errorf("port %d: an endpoint: %w", port, err)
			}
			target, err := parsePort(e.GetPort())
			if err != nil {
				return nil, fmt.Errorf("port %d: an endpoint: %w", port, err)
			}
			d.Endpoints = append(d.Endpoints, p.at(netip.AddrPortFrom(address, target)))
		}
		s.ports[port] = d
	}
	return s, nil
}

// parseEndpoint reads an endpoint and its address.
func parseEndpoint(in *trothv1.Endpoint) (netip.Addr, *pod, error) {
	address, err := parseAddress(in.GetAddress())
	if err != nil {
		return netip.Addr{}, nil, err
	}
	if address.IsUnspecified() || address.IsMulticast() {
		return netip.Addr{}, nil, fmt.Errorf("nobody can have %v", address)
	}
	p := &pod{other: parseProtocol(in.GetProtocol())}
	if in.GetPodUid() != "" {
		if p.name, err = parseName(in.GetNamespace(), in.GetName()); err != nil {
			return netip.Addr{}, nil, err
		}
	}
	needsID := proves(p.other)
	for number, protocol := range in.GetPortProtocols() {
		port, err := parsePort(number)
		if err != nil {
			return netip.Addr{}, nil, err
		}
		parsed := parseProtocol(protocol)
		if parsed == p.other {
			continue
		}
		if p.ports == nil {
			p.ports = make(map[uint16]proxy.Protocol)
		}
		p.ports[port] = parsed
		needsID = needsID || proves(parsed)
	}
	if needsID {
		if p.id, err = parseID(in.GetSpiffeId()); err != nil {
			return netip.Addr{}, nil, err
		}
	}
	return address, p, nil
}

// proves reports whether the callee shows by the protocol who it is.
func proves(p proxy.Protocol) bool { return p == proxy.HBONE || p == proxy.Troth }

// parseProtocol returns zero, which is refused, for what it does not know.
func parseProtocol(in trothv1.Protocol) proxy.Protocol {
	switch in {
	case trothv1.Protocol_PROTOCOL_PLAINTEXT:
		return proxy.Plaintext
	case trothv1.Protocol_PROTOCOL_HBONE:
		return proxy.HBONE
	case trothv1.Protocol_PROTOCOL_TROTH:
		return proxy.Troth
	default:
		return 0
	}
}

// parseAddress reads an address as the protocol spells it: never IPv4 mapped into
// IPv6, and of no link.
func parseAddress(in string) (netip.Addr, error) {
	if len(in) > len("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff") {
		return netip.Addr{}, fmt.Errorf("an address of %d bytes", len(in))
	}
	address, err := netip.ParseAddr(in)
	switch {
	case err != nil:
		return netip.Addr{}, fmt.Errorf("%q is no address", in)
	case address.Is4In6() || address.Zone() != "":
		return netip.Addr{}, fmt.Errorf("%q is not how an address is spelled", in)
	}
	return address, nil
}

func parsePort(in uint32) (uint16, error) {
	if in == 0 || in > math.MaxUint16 {
		return 0, fmt.Errorf("there is no port %d", in)
	}
	return uint16(in), nil
}

func parseName(namespace, name string) (string, error) {
	for _, part := range []string{namespace, name} {
		if part == "" || len(part) > maxName {
			return "", fmt.Errorf("a name of %d bytes", len(part))
		}
	}
	return namespace + "/" + name, nil
}

func parseID(in string) (spiffeid.ID, error) {
	if len(in) > maxID {
		return spiffeid.ID{}, fmt.Errorf("a SPIFFE ID of %d bytes", len(in))
	}
	id, err := spiffeid.FromString(in)
	switch {
	case err != nil:
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID %q: %w", in, err)
	case id.Path() == "":
		return spiffeid.ID{}, fmt.Errorf("%q is a trust domain and no workload", in)
	}
	return id, nil
}
