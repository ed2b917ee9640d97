package e2e_test

import (
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// kubeService is a Service of a mesh.
type kubeService struct {
	*corev1.Service
	addresses        // zero if it is headless
	port      uint16 // its own
	nodePort  uint16 // zero if it has none
}

// service creates a Service in front of pods that listen at port 80. In the place of
// the controllers that there are not it writes the EndpointSlices, and in kube-proxy's
// the rules of the nodes, which send all to the first endpoint.
func (m *mesh) service(t *testing.T, spec corev1.ServiceSpec, behind ...*sandbox) *kubeService {
	t.Helper()
	const port = 8080
	both := corev1.IPFamilyPolicyRequireDualStack
	spec.IPFamilyPolicy = &both
	spec.Ports = []corev1.ServicePort{{Name: "http", Port: port, TargetPort: intstr.FromInt32(80), Protocol: corev1.ProtocolTCP}}
	created, err := cluster.Client().CoreV1().Services(m.shop).Create(t.Context(),
		&corev1.Service{ObjectMeta: metav1.ObjectMeta{GenerateName: "web-"}, Spec: spec}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	s := &kubeService{Service: created, port: port, nodePort: uint16(created.Spec.Ports[0].NodePort)}
	for _, address := range created.Spec.ClusterIPs {
		a, err := netip.ParseAddr(address)
		switch {
		case err != nil: // headless
		case a.Is4():
			s.v4 = a
		default:
			s.v6 = a
		}
	}
	for n, family := range []discoveryv1.AddressType{discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6} {
		slice := &discoveryv1.EndpointSlice{
			ObjectMeta: metav1.ObjectMeta{
				GenerateName: created.Name + "-", Labels: map[string]string{discoveryv1.LabelServiceName: created.Name},
			},
			AddressType: family,
			Ports:       []discoveryv1.EndpointPort{{Name: new("http"), Port: new(int32(80)), Protocol: new(corev1.ProtocolTCP)}},
		}
		for _, b := range behind {
			slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
				Addresses:  []string{b.each()[n].String()},
				Conditions: discoveryv1.EndpointConditions{Ready: new(true), Serving: new(true), Terminating: new(false)},
				NodeName:   &b.host.name,
				TargetRef:  &corev1.ObjectReference{Kind: "Pod", Namespace: b.Namespace, Name: b.Name, UID: b.UID},
			})
		}
		if _, err := cluster.Client().DiscoveryV1().EndpointSlices(m.shop).Create(t.Context(), slice, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if len(behind) > 0 {
		for _, h := range m.hosts {
			h.proxy(t, s, behind[0])
		}
	}
	return s
}

// kubeProxy makes the node ready for the rules of Services.
func (h *host) kubeProxy(t *testing.T) {
	t.Helper()
	h.nft(t, `table inet services {
	chain prerouting { type nat hook prerouting priority -100; }
	chain output { type nat hook output priority -100; }
	chain postrouting {
		type nat hook postrouting priority 100;
		meta mark & 0x4000 == 0x4000 masquerade
	}
}`)
}

func (h *host) proxy(t *testing.T, s *kubeService, to *sandbox) {
	t.Helper()
	var rules strings.Builder
	for _, chain := range []string{"prerouting", "output"} {
		if s.v4.IsValid() {
			fmt.Fprintf(&rules, "add rule inet services %s ip daddr %s tcp dport %d dnat ip to %s:80\n", chain, s.v4, s.port, to.v4)
			fmt.Fprintf(&rules, "add rule inet services %s ip6 daddr %s tcp dport %d dnat ip6 to [%s]:80\n", chain, s.v6, s.port, to.v6)
		}
		if s.nodePort != 0 {
			// Answers have to come back this way: with the node's address as their caller's.
			fmt.Fprintf(&rules, "add rule inet services %s ip daddr %s tcp dport %d meta mark set 0x4000 dnat ip to %s:80\n", chain, h.addresses.v4, s.nodePort, to.v4)
			fmt.Fprintf(&rules, "add rule inet services %s ip6 daddr %s tcp dport %d meta mark set 0x4000 dnat ip6 to [%s]:80\n", chain, h.addresses.v6, s.nodePort, to.v6)
		}
	}
	h.nft(t, rules.String())
}

func (h *host) nft(t *testing.T, rules string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "nsenter", "--net="+h.ns.path(), "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules + "\n")
	if output, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v\n%s\n%s", err, output, rules)
	}
}
