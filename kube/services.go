package kube

import (
	"math"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/client-go/tools/cache"

	"troth.dev/troth/kube/directory"
)

// ours selects the Services and EndpointSlices that kube-proxy serves: those that
// no other proxy is asked to serve, and that have an address to be reached by.
const ours = "!service.kubernetes.io/service-proxy-name,!" + corev1.IsHeadlessService

// serviceReflectors returns what lists and watches Services and EndpointSlices.
func (p *Pods) serviceReflectors() []*cache.Reflector {
	index := p.records.directory
	return []*cache.Reflector{
		builtIn(p.client.CoreV1().RESTClient(), ours, mirror[*corev1.Service]{
			records:  p.records,
			resource: serviceResource,
			trim:     trimService,
			set:      func(o *corev1.Service) { index.SetService(serviceOf(o)) },
			remove:   func(o *corev1.Service) { index.RemoveService(nameOf(o)) },
			replace: func(services []*corev1.Service) {
				listed := namesOf(services)
				index.KeepServices(func(name directory.Name) bool { return listed[name] })
				for _, o := range services {
					index.SetService(serviceOf(o))
				}
			},
		}),
		builtIn(p.client.DiscoveryV1().RESTClient(), ours, mirror[*discoveryv1.EndpointSlice]{
			records:  p.records,
			resource: sliceResource,
			trim:     trimSlice,
			set:      func(o *discoveryv1.EndpointSlice) { index.SetSlice(sliceOf(o)) },
			remove:   func(o *discoveryv1.EndpointSlice) { index.RemoveSlice(nameOf(o)) },
			replace: func(slices []*discoveryv1.EndpointSlice) {
				listed := namesOf(slices)
				index.KeepSlices(func(name directory.Name) bool { return listed[name] })
				for _, o := range slices {
					index.SetSlice(sliceOf(o))
				}
			},
		}),
	}
}

// trimService leaves what serviceOf and the reflector read.
func trimService(o *corev1.Service) {
	*o = corev1.Service{
		ObjectMeta: trimMeta(o.ObjectMeta),
		Spec: corev1.ServiceSpec{
			Type:                  o.Spec.Type,
			ClusterIP:             o.Spec.ClusterIP,
			ClusterIPs:            o.Spec.ClusterIPs,
			Ports:                 o.Spec.Ports,
			InternalTrafficPolicy: o.Spec.InternalTrafficPolicy,
			SessionAffinity:       o.Spec.SessionAffinity,
			SessionAffinityConfig: o.Spec.SessionAffinityConfig,
		},
	}
}

// serviceOf returns what the API server's object says of a Service. One of type
// ExternalName is another name of somebody else, and has no address whatever its
// object says.
func serviceOf(o *corev1.Service) directory.ServiceObject {
	s := directory.ServiceObject{
		Name:  nameOf(o),
		Local: o.Spec.InternalTrafficPolicy != nil && *o.Spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal,
	}
	if o.Spec.Type != corev1.ServiceTypeExternalName {
		ips := o.Spec.ClusterIPs
		if len(ips) == 0 {
			ips = []string{o.Spec.ClusterIP}
		}
		for _, ip := range ips { // a headless one has "None"
			if a, err := netip.ParseAddr(ip); err == nil && a.Zone() == "" {
				s.Addresses = append(s.Addresses, a.Unmap())
			}
		}
	}
	for _, p := range o.Spec.Ports {
		if isTCP(&p.Protocol) && isPort(p.Port) {
			s.Ports = append(s.Ports, directory.NamedPort{Name: p.Name, Port: uint16(p.Port)})
		}
	}
	if o.Spec.SessionAffinity == corev1.ServiceAffinityClientIP {
		seconds := corev1.DefaultClientIPServiceAffinitySeconds
		if c := o.Spec.SessionAffinityConfig; c != nil && c.ClientIP != nil && c.ClientIP.TimeoutSeconds != nil && *c.ClientIP.TimeoutSeconds > 0 {
			seconds = *c.ClientIP.TimeoutSeconds
		}
		s.Affinity = time.Duration(seconds) * time.Second
	}
	return s
}

// trimSlice leaves what sliceOf and the reflector read.
func trimSlice(o *discoveryv1.EndpointSlice) {
	meta := trimMeta(o.ObjectMeta)
	meta.Labels = map[string]string{discoveryv1.LabelServiceName: o.Labels[discoveryv1.LabelServiceName]}
	endpoints := make([]discoveryv1.Endpoint, len(o.Endpoints))
	for n, e := range o.Endpoints {
		endpoints[n] = discoveryv1.Endpoint{
			Addresses: e.Addresses, Conditions: e.Conditions, NodeName: e.NodeName, Hints: e.Hints,
		}
		if e.TargetRef != nil {
			endpoints[n].TargetRef = &corev1.ObjectReference{Kind: e.TargetRef.Kind, UID: e.TargetRef.UID}
		}
	}
	*o = discoveryv1.EndpointSlice{ObjectMeta: meta, AddressType: o.AddressType, Ports: o.Ports, Endpoints: endpoints}
}

// sliceOf returns what the API server's object says of endpoints. Of an endpoint's
// addresses the first counts: they stand for the same (KEP-0752).
func sliceOf(o *discoveryv1.EndpointSlice) directory.Slice {
	s := directory.Slice{
		Name:    nameOf(o),
		Service: directory.Name{Namespace: o.Namespace, Name: o.Labels[discoveryv1.LabelServiceName]},
	}
	if o.AddressType != discoveryv1.AddressTypeIPv4 && o.AddressType != discoveryv1.AddressTypeIPv6 {
		return s
	}
	for _, p := range o.Ports {
		if p.Port != nil && isTCP(p.Protocol) && isPort(*p.Port) {
			s.Ports = append(s.Ports, directory.NamedPort{Name: or(p.Name, ""), Port: uint16(*p.Port)})
		}
	}
	s.Endpoints = make([]directory.SliceEndpoint, 0, len(o.Endpoints))
	for i := range o.Endpoints {
		if e, ok := endpointOf(&o.Endpoints[i]); ok && e.Address.Is6() == (o.AddressType == discoveryv1.AddressTypeIPv6) {
			s.Endpoints = append(s.Endpoints, e)
		}
	}
	return s
}

// endpointOf returns one endpoint, with the defaults that the API has for conditions
// that are not known.
func endpointOf(o *discoveryv1.Endpoint) (directory.SliceEndpoint, bool) {
	if len(o.Addresses) == 0 {
		return directory.SliceEndpoint{}, false
	}
	a, err := netip.ParseAddr(o.Addresses[0])
	if err != nil || a.Zone() != "" {
		return directory.SliceEndpoint{}, false
	}
	e := directory.SliceEndpoint{
		Address:     a.Unmap(),
		Node:        or(o.NodeName, ""),
		Ready:       or(o.Conditions.Ready, true),
		Serving:     or(o.Conditions.Serving, true),
		Terminating: or(o.Conditions.Terminating, false),
	}
	if o.TargetRef != nil && o.TargetRef.Kind == "Pod" {
		e.IsPod, e.PodUID = true, string(o.TargetRef.UID)
	}
	if h := o.Hints; h != nil && len(h.ForZones)+len(h.ForNodes) > 0 {
		e.Hints = &directory.Hints{}
		for _, z := range h.ForZones {
			e.Hints.Zones = append(e.Hints.Zones, z.Name)
		}
		for _, n := range h.ForNodes {
			e.Hints.Nodes = append(e.Hints.Nodes, n.Name)
		}
	}
	return e, true
}

func isTCP(p *corev1.Protocol) bool { return p == nil || *p == "" || *p == corev1.ProtocolTCP }

func isPort(n int32) bool { return 0 < n && n <= math.MaxUint16 }

func or[T any](p *T, unset T) T {
	if p == nil {
		return unset
	}
	return *p
}

func nameOf(o object) directory.Name {
	return directory.Name{Namespace: o.GetNamespace(), Name: o.GetName()}
}

func namesOf[T object](objects []T) map[directory.Name]bool {
	names := make(map[directory.Name]bool, len(objects))
	for _, o := range objects {
		names[nameOf(o)] = true
	}
	return names
}
