package kube

import (
	"fmt"
	"math"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"troth.dev/troth/identity"
)

// reflectors returns what lists and watches the kinds that are always there.
//
// They are client-go's reflectors, as inside its informers, without the
// informers: those would keep each object a second time, deliver its events later
// than they store it, and wait for up to a minute after an outage.
func (p *Pods) reflectors() []*cache.Reflector {
	core, index := p.client.CoreV1().RESTClient(), p.records.directory
	return append(p.serviceReflectors(),
		builtIn(core, "", mirror[*corev1.Pod]{
			records:  p.records,
			resource: podResource,
			trim:     trimPod,
			set:      func(o *corev1.Pod) { p.records.setPod(podOf(o)) },
			remove:   func(o *corev1.Pod) { p.records.removePod(string(o.UID)) },
			replace: func(pods []*corev1.Pod) {
				listed := uidsOf(pods)
				for uid := range p.records.pods {
					if !listed[types.UID(uid)] {
						p.records.removePod(uid)
					}
				}
				for _, o := range pods {
					p.records.setPod(podOf(o))
				}
			},
		}),
		builtIn(core, "", mirror[*corev1.ServiceAccount]{
			records:  p.records,
			resource: accountResource,
			trim: func(o *corev1.ServiceAccount) {
				*o = corev1.ServiceAccount{ObjectMeta: trimMeta(o.ObjectMeta)}
			},
			set:    func(o *corev1.ServiceAccount) { p.records.setAccount(accountOf(o), string(o.UID)) },
			remove: func(o *corev1.ServiceAccount) { p.records.removeAccount(accountOf(o), string(o.UID)) },
			replace: func(accounts []*corev1.ServiceAccount) {
				listed := uidsOf(accounts)
				for name, g := range p.records.accounts {
					if !listed[types.UID(g.uid)] {
						p.records.removeAccount(name, g.uid)
					}
				}
				for _, o := range accounts {
					p.records.setAccount(accountOf(o), string(o.UID))
				}
			},
		}),
		builtIn(core, "", mirror[*corev1.Node]{
			records:  p.records,
			resource: nodeResource,
			trim: func(o *corev1.Node) {
				meta := trimMeta(o.ObjectMeta)
				if zone := o.Labels[corev1.LabelTopologyZone]; zone != "" {
					meta.Labels = map[string]string{corev1.LabelTopologyZone: zone}
				}
				*o = corev1.Node{ObjectMeta: meta}
			},
			set: func(o *corev1.Node) {
				p.records.setNode(o.Name, string(o.UID))
				index.SetZone(o.Name, o.Labels[corev1.LabelTopologyZone])
			},
			remove: func(o *corev1.Node) {
				p.records.removeNode(o.Name, string(o.UID))
				index.SetZone(o.Name, "")
			},
			replace: func(nodes []*corev1.Node) {
				listed := uidsOf(nodes)
				for name, g := range p.records.nodes {
					if !listed[types.UID(g.uid)] {
						p.records.removeNode(name, g.uid)
					}
				}
				names := make(map[string]bool, len(nodes))
				for _, o := range nodes {
					names[o.Name] = true
				}
				index.KeepZones(func(node string) bool { return names[node] })
				for _, o := range nodes {
					p.records.setNode(o.Name, string(o.UID))
					index.SetZone(o.Name, o.Labels[corev1.LabelTopologyZone])
				}
			},
		}),
	)
}

// object is one of any kind.
type object interface {
	runtime.Object
	metav1.Object
}

// builtIn mirrors what the selector selects of one of Kubernetes' own kinds.
func builtIn[T object](client rest.Interface, selector string, m mirror[T]) *cache.Reflector {
	var example T
	source := cache.NewFilteredListWatchFromClient(client, m.resource, metav1.NamespaceAll,
		func(options *metav1.ListOptions) { options.LabelSelector = selector })
	return reflector(source, example, m)
}

func reflector[T object](source cache.ListerWatcher, example T, m mirror[T]) *cache.Reflector {
	return cache.NewReflectorWithOptions(source, example, m, cache.ReflectorOptions{
		Name: m.resource,
		// client-go would wait for up to a minute, in which a pod deleted
		// during an outage keeps its identity. A request for each kind every 3
		// seconds is nothing to an API server that comes back.
		Backoff: &wait.Backoff{
			Duration: 200 * time.Millisecond,
			Factor:   2,
			Steps:    4,
			Cap:      3 * time.Second,
			Jitter:   0.5,
		},
	})
}

// mirror is where a reflector writes the objects of one resource. It keeps none
// of them: it changes records. set, remove and replace run inside [records.change].
type mirror[T object] struct {
	records  *records
	resource string
	trim     func(T)
	set      func(T)
	remove   func(T)
	replace  func([]T) // makes these all that there are
}

// Add implements [cache.ReflectorStore], as the methods below do.
func (m mirror[T]) Add(o any) error { return m.each(o, m.set) }

func (m mirror[T]) Update(o any) error { return m.each(o, m.set) }

func (m mirror[T]) Delete(o any) error { return m.each(o, m.remove) }

func (m mirror[T]) each(o any, f func(T)) error {
	object, ok := o.(T)
	if !ok {
		return fmt.Errorf("kube: a watch brought a %T", o)
	}
	m.records.change(func() { f(object) })
	return nil
}

// Replace takes a complete list: the first, and one whenever a watch could not go
// on where it had stopped. What was deleted in between is missing from it.
func (m mirror[T]) Replace(list []any, _ string) error {
	objects := make([]T, 0, len(list))
	for _, o := range list {
		object, ok := o.(T)
		if !ok {
			return fmt.Errorf("kube: a list brought a %T", o)
		}
		objects = append(objects, object)
	}
	m.records.change(func() {
		m.replace(objects)
		m.records.listed(m.resource)
	})
	return nil
}

func (m mirror[T]) Resync() error { return nil }

// Transformer implements [cache.TransformingStore]: while the first list arrives,
// the reflector collects it, and 150,000 whole pods are more than a gigabyte.
func (m mirror[T]) Transformer() cache.TransformFunc {
	return func(o any) (any, error) {
		if object, ok := o.(T); ok {
			m.trim(object)
		}
		return o, nil
	}
}

func uidsOf[T object](objects []T) map[types.UID]bool {
	uids := make(map[types.UID]bool, len(objects))
	for _, o := range objects {
		uids[o.GetUID()] = true
	}
	return uids
}

// redirectionAnnotation is what Istio's ambient mode sets to "enabled" on a pod when
// it takes HBONE for it.
const redirectionAnnotation = "ambient.istio.io/redirection"

// trimPod leaves what podOf and the reflector read.
func trimPod(o *corev1.Pod) {
	meta := trimMeta(o.ObjectMeta)
	meta.Labels = o.Labels
	meta.DeletionTimestamp = o.DeletionTimestamp
	if v, ok := o.Annotations[redirectionAnnotation]; ok {
		meta.Annotations = map[string]string{redirectionAnnotation: v}
	}
	*o = corev1.Pod{
		ObjectMeta: meta,
		Spec: corev1.PodSpec{
			NodeName:           o.Spec.NodeName,
			ServiceAccountName: o.Spec.ServiceAccountName,
			HostNetwork:        o.Spec.HostNetwork,
			InitContainers:     trimContainers(o.Spec.InitContainers),
			Containers:         trimContainers(o.Spec.Containers),
			Volumes:            trimVolumes(o.Spec.Volumes),
		},
		Status: corev1.PodStatus{Phase: o.Status.Phase, PodIPs: o.Status.PodIPs},
	}
}

// trimContainers leaves the ports, and of containers that declare none nothing.
func trimContainers(containers []corev1.Container) []corev1.Container {
	var trimmed []corev1.Container
	for _, c := range containers {
		if len(c.Ports) > 0 {
			trimmed = append(trimmed, corev1.Container{Ports: c.Ports, RestartPolicy: c.RestartPolicy})
		}
	}
	return trimmed
}

// trimVolumes leaves the signers of projected certificates, and of volumes that project
// none nothing.
func trimVolumes(volumes []corev1.Volume) []corev1.Volume {
	var trimmed []corev1.Volume
	for i := range volumes {
		if volumes[i].Projected == nil {
			continue
		}
		for _, source := range volumes[i].Projected.Sources {
			if source.PodCertificate == nil {
				continue
			}
			trimmed = append(trimmed, corev1.Volume{VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
				Sources: []corev1.VolumeProjection{{
					PodCertificate: &corev1.PodCertificateProjection{SignerName: source.PodCertificate.SignerName},
				}},
			}}})
		}
	}
	return trimmed
}

func trimMeta(meta metav1.ObjectMeta) metav1.ObjectMeta {
	return metav1.ObjectMeta{
		Namespace:       meta.Namespace,
		Name:            meta.Name,
		UID:             meta.UID,
		ResourceVersion: meta.ResourceVersion,
	}
}

// podOf returns what the API server's object says of a pod: all but the UIDs of
// its service account and node.
func podOf(o *corev1.Pod) identity.Pod {
	pod := identity.Pod{
		PodReference:   identity.PodReference{Namespace: o.Namespace, Name: o.Name, UID: string(o.UID)},
		ServiceAccount: o.Spec.ServiceAccountName,
		Node:           identity.Node{Name: o.Spec.NodeName},
		Phase:          phaseOf(o.Status.Phase),
		Labels:         o.Labels,
		HostNetwork:    o.Spec.HostNetwork,
		HBONE:          o.Annotations[redirectionAnnotation] == "enabled",
	}
	if o.DeletionTimestamp != nil {
		// The API server has added the grace already.
		pod.DeletedAt = o.DeletionTimestamp.Time
	}
	for _, ip := range o.Status.PodIPs {
		if address, err := netip.ParseAddr(ip.IP); err == nil {
			pod.Addresses = append(pod.Addresses, address)
		}
	}
	pod.ContainerPorts = portsOf(o)
	pod.CertificateSigners = signersOf(o)
	return pod
}

// signersOf returns the signers of the certificates that the pod's volumes project, in
// ascending order.
func signersOf(o *corev1.Pod) []string {
	var signers []string
	for i := range o.Spec.Volumes {
		if o.Spec.Volumes[i].Projected == nil {
			continue
		}
		for _, source := range o.Spec.Volumes[i].Projected.Sources {
			if source.PodCertificate != nil {
				signers = append(signers, source.PodCertificate.SignerName)
			}
		}
	}
	slices.Sort(signers)
	return slices.Compact(signers)
}

// portsOf returns the TCP ports that the pod's containers declare, in ascending
// order. Of those that start it up, only the ones that stay count: sidecars.
func portsOf(o *corev1.Pod) []uint16 {
	var ports []uint16
	add := func(c *corev1.Container) {
		for _, p := range c.Ports {
			if (p.Protocol == corev1.ProtocolTCP || p.Protocol == "") && 0 < p.ContainerPort && p.ContainerPort <= math.MaxUint16 {
				ports = append(ports, uint16(p.ContainerPort))
			}
		}
	}
	for i := range o.Spec.Containers {
		add(&o.Spec.Containers[i])
	}
	for i := range o.Spec.InitContainers {
		if c := &o.Spec.InitContainers[i]; c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			add(c)
		}
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}

func phaseOf(phase corev1.PodPhase) identity.PodPhase {
	switch phase {
	case corev1.PodPending:
		return identity.PodPending
	case corev1.PodRunning:
		return identity.PodRunning
	case corev1.PodSucceeded, corev1.PodFailed:
		return identity.PodFinished
	default:
		return identity.PodPhaseUnknown
	}
}

func accountOf(o *corev1.ServiceAccount) identity.ServiceAccount {
	return identity.ServiceAccount{Namespace: o.Namespace, Name: o.Name}
}
