package kube_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"troth.dev/troth/kube"
	"troth.dev/troth/kube/directory"
	"troth.dev/troth/test/apiserver"
)

// city is a world of two nodes in two zones, each with an agent, and a third without.
type city struct {
	world
	a, b, bare *corev1.Node
}

func newCity(t testing.TB) city {
	t.Helper()
	c := city{world: newWorld(t)}
	c.a, c.b, c.bare = zoned(t, c.node, "zone-a"), zoned(t, cluster.CreateNode(t, "node-"), "zone-b"), cluster.CreateNode(t, "node-")
	runAgent(t, c.a)
	runAgent(t, c.b)
	return c
}

func zoned(t testing.TB, node *corev1.Node, zone string) *corev1.Node {
	t.Helper()
	node = node.DeepCopy()
	node.Labels = map[string]string{corev1.LabelTopologyZone: zone}
	node, err := cluster.Client().CoreV1().Nodes().Update(t.Context(), node, metav1.UpdateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return node
}

// runAgent creates the pod of an agent on the node.
func runAgent(t testing.TB, node *corev1.Node) *corev1.Pod {
	t.Helper()
	core := cluster.Client().CoreV1()
	_, err := core.Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: agents.Namespace}}, metav1.CreateOptions{})
	if err == nil {
		cluster.CreateServiceAccount(t, agents.Namespace, agents.Name)
	} else if !apierrors.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	pod := cluster.CreatePod(t, apiserver.Pod{Namespace: agents.Namespace, Name: "agent-", ServiceAccount: agents.Name, Node: node.Name, HostNetwork: true, Labels: map[string]string{"troth.dev/capture": "enabled"}})
	return pod
}

// on creates a running pod on a node.
func (c city) on(t testing.TB, node *corev1.Node, name string, change func(*apiserver.Pod)) *corev1.Pod {
	t.Helper()
	p := apiserver.Pod{Namespace: c.namespace, Name: name, ServiceAccount: c.account.Name, Node: node.Name}
	if change != nil {
		change(&p)
	}
	return cluster.CreatePod(t, p)
}

// service creates a Service without a selector: whoever tests it writes its slices.
func (c city) service(t testing.TB, name string, change func(*corev1.ServiceSpec)) *corev1.Service {
	t.Helper()
	o := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(8080)}}},
	}
	if strings.HasSuffix(name, "-") {
		o.Name, o.GenerateName = "", name
	}
	if change != nil {
		change(&o.Spec)
	}
	service, err := cluster.Client().CoreV1().Services(c.namespace).Create(t.Context(), o, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return service
}

// slice creates an EndpointSlice of a Service, as the controller would.
func (c city) slice(t testing.TB, service *corev1.Service, s discoveryv1.EndpointSlice) *discoveryv1.EndpointSlice {
	t.Helper()
	s.GenerateName, s.Labels = service.Name+"-", map[string]string{discoveryv1.LabelServiceName: service.Name}
	if s.AddressType == "" {
		s.AddressType = discoveryv1.AddressTypeIPv4
	}
	if s.Ports == nil {
		s.Ports = ports("", 8080)
	}
	created, err := cluster.Client().DiscoveryV1().EndpointSlices(c.namespace).Create(t.Context(), &s, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return created
}

func ports(name string, number int32) []discoveryv1.EndpointPort {
	return []discoveryv1.EndpointPort{port(name, number, corev1.ProtocolTCP)}
}

func port(name string, number int32, protocol corev1.Protocol) discoveryv1.EndpointPort {
	return discoveryv1.EndpointPort{Name: &name, Port: &number, Protocol: &protocol}
}

// The states of an endpoint as the controller writes them.
var (
	yes, no     = true, false
	ready       = discoveryv1.EndpointConditions{Ready: &yes, Serving: &yes, Terminating: &no}
	notReady    = discoveryv1.EndpointConditions{Ready: &no, Serving: &no, Terminating: &no}
	terminating = discoveryv1.EndpointConditions{Ready: &no, Serving: &yes, Terminating: &yes}
	stopped     = discoveryv1.EndpointConditions{Ready: &no, Serving: &no, Terminating: &yes}
	unsaid      = discoveryv1.EndpointConditions{}
)

// of is a pod's endpoint.
func of(pod *corev1.Pod, conditions discoveryv1.EndpointConditions) discoveryv1.Endpoint {
	return discoveryv1.Endpoint{
		Addresses: []string{pod.Status.PodIP}, NodeName: &pod.Spec.NodeName, Conditions: conditions,
		TargetRef: &corev1.ObjectReference{Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID},
	}
}

// at is an endpoint that somebody wrote by hand.
func at(address string) discoveryv1.Endpoint {
	return discoveryv1.Endpoint{Addresses: []string{address}}
}

func hinted(e discoveryv1.Endpoint, hints *discoveryv1.EndpointHints) discoveryv1.Endpoint {
	e.Hints = hints
	return e
}

func zone(name string) *discoveryv1.EndpointHints {
	return &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: name}}}
}

func node(name string) *discoveryv1.EndpointHints {
	return &discoveryv1.EndpointHints{ForNodes: []discoveryv1.ForNode{{Name: name}}}
}

// spelled writes an answer down: nobody, a pod, or a Service's ports and endpoints.
func spelled(b *directory.Behind) string {
	protocols := map[directory.Protocol]string{directory.Plaintext: "plaintext", directory.HBONE: "hbone", directory.Troth: "troth"}
	endpoint := func(e directory.Endpoint) string {
		who := e.Pod.Name
		if who == "" {
			who = "-"
		}
		text := fmt.Sprintf("%s %s at %d", who, protocols[e.Protocol], e.Address.Port())
		for _, p := range e.Ports {
			text += fmt.Sprintf(", %s at %d", protocols[p.Protocol], p.Port)
		}
		return text
	}
	switch {
	case b == nil:
		return "nobody"
	case b.Pod != nil:
		return endpoint(*b.Pod)
	}
	text := b.Service.Name.Name
	for _, p := range b.Service.Ports {
		text += fmt.Sprintf(" | %d:", p.Port)
		// By name: addresses depend on what other tests made before.
		var all []string
		for _, e := range p.Endpoints {
			all = append(all, endpoint(e))
		}
		text += " " + strings.Join(all, "; ")
	}
	if b.Service.Affinity > 0 {
		text += fmt.Sprintf(" | stays %s", b.Service.Affinity)
	}
	return strings.ReplaceAll(text, ":  |", ": |")
}

// settles waits for an answer.
func settles(t *testing.T, r *directory.Reader, address, want string) {
	t.Helper()
	r.Hold(netip.MustParseAddr(address), address)
	late := time.After(patience)
	got := "no answer"
	for {
		for {
			answer, ok := r.Next()
			if !ok {
				break
			}
			if answer.Address == address {
				got = strings.TrimRight(spelled(answer.Behind), " ")
			}
		}
		if got == want {
			return
		}
		select {
		case <-r.News():
		case <-late:
			t.Fatalf("%s is %q, want %q", address, got, want)
		}
	}
}

// Which endpoints of a Service a pod may choose, by the rules of kube-proxy.
func TestServices(t *testing.T) {
	c := newCity(t)
	one, two, three := c.on(t, c.a, "one", nil), c.on(t, c.a, "two", nil), c.on(t, c.b, "three", nil)
	finished := cluster.FinishPod(t, c.on(t, c.a, "finished", nil))
	host := c.on(t, c.a, "host", func(p *apiserver.Pod) { p.HostNetwork = true })
	optedOut := c.on(t, c.a, "opted-out", func(p *apiserver.Pod) { p.Labels = map[string]string{"troth.dev/capture": "disabled"} })
	redirected := map[string]string{"ambient.istio.io/redirection": "enabled"}
	ambient := c.on(t, c.bare, "ambient", func(p *apiserver.Pod) { p.Annotations = redirected })
	bare := c.on(t, c.bare, "bare", nil)
	stranger := one.DeepCopy()
	stranger.UID = "5f5a7c0e-8a3f-4a57-9d3e-000000000000"
	moved := two.DeepCopy()
	moved.Status.PodIP = "10.127.255.1"

	local := corev1.ServiceInternalTrafficPolicyLocal
	isLocal := func(s *corev1.ServiceSpec) { s.InternalTrafficPolicy = &local }
	type slices = []discoveryv1.EndpointSlice
	only := func(endpoints ...discoveryv1.Endpoint) slices { return slices{{Endpoints: endpoints}} }
	var timeout int32 = 60

	pods, _ := runPods(t, kube.PodsConfig{})
	for n, test := range []struct {
		name   string
		change func(*corev1.ServiceSpec)
		slices slices
		caller *corev1.Node
		want   string
	}{
		{"no slice", nil, nil, c.a, "80:"},
		{"ready", nil, only(of(one, ready), of(three, ready)), c.a, "80: one troth at 8080; three troth at 8080"},
		{"conditions that are not said", nil, only(of(one, unsaid)), c.a, "80: one troth at 8080"},
		{"not ready", nil, only(of(one, ready), of(two, notReady)), c.a, "80: one troth at 8080"},
		{"terminating beside ready", nil, only(of(one, ready), of(two, terminating)), c.a, "80: one troth at 8080"},
		{"terminating alone", nil, only(of(one, notReady), of(two, terminating)), c.a, "80: two troth at 8080"},
		{"stopped", nil, only(of(one, notReady), of(two, stopped)), c.a, "80:"},
		{"as controllers write it for publishNotReadyAddresses", func(s *corev1.ServiceSpec) { s.PublishNotReadyAddresses = true },
			only(of(one, discoveryv1.EndpointConditions{Ready: &yes, Serving: &no, Terminating: &no})), c.a, "80: one troth at 8080"},
		{"publishNotReadyAddresses, before the controller has seen it", func(s *corev1.ServiceSpec) { s.PublishNotReadyAddresses = true },
			only(of(one, notReady)), c.a, "80:"},

		{"local, here", isLocal, only(of(one, ready), of(two, ready), of(three, ready)), c.a, "80: one troth at 8080; two troth at 8080"},
		{"local, there", isLocal, only(of(one, ready), of(two, ready), of(three, ready)), c.b, "80: three troth at 8080"},
		{"local, nowhere", isLocal, only(of(one, ready)), c.b, "80:"},
		{"local, terminating here and ready there", isLocal, only(of(one, terminating), of(three, ready)), c.a, "80: one troth at 8080"},

		{"several slices", nil, slices{{Endpoints: []discoveryv1.Endpoint{of(one, ready)}}, {Endpoints: []discoveryv1.Endpoint{of(one, ready), of(two, ready)}}},
			c.a, "80: one troth at 8080; two troth at 8080"},
		{"slices that disagree", nil, slices{{Endpoints: []discoveryv1.Endpoint{of(one, notReady)}}, {Endpoints: []discoveryv1.Endpoint{of(one, ready)}}},
			c.a, "80: one troth at 8080"},
		{"a target port by name, of which each slice has its own number",
			func(s *corev1.ServiceSpec) {
				s.Ports = []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromString("web")}}
			},
			slices{{Ports: ports("http", 8080), Endpoints: []discoveryv1.Endpoint{of(one, ready)}}, {Ports: ports("http", 9090), Endpoints: []discoveryv1.Endpoint{of(two, ready)}}},
			c.a, "80: one troth at 8080; two troth at 9090"},
		{"several ports, of which one is not TCP",
			func(s *corev1.ServiceSpec) {
				s.Ports = []corev1.ServicePort{{Name: "http", Port: 80}, {Name: "dns", Port: 53, Protocol: corev1.ProtocolUDP}, {Name: "admin", Port: 81}}
			},
			slices{{
				Ports:     []discoveryv1.EndpointPort{port("http", 8080, corev1.ProtocolTCP), port("dns", 5353, corev1.ProtocolUDP), port("admin", 8081, corev1.ProtocolTCP)},
				Endpoints: []discoveryv1.Endpoint{of(one, ready)},
			}}, c.a, "80: one troth at 8080 | 81: one troth at 8081"},
		{"a port that no slice has", func(s *corev1.ServiceSpec) { s.Ports = []corev1.ServicePort{{Name: "http", Port: 80}} },
			slices{{Ports: ports("grpc", 8080), Endpoints: []discoveryv1.Endpoint{of(one, ready)}}}, c.a, "80:"},
		{"UDP alone", func(s *corev1.ServiceSpec) { s.Ports = []corev1.ServicePort{{Port: 53, Protocol: corev1.ProtocolUDP}} },
			slices{{Ports: []discoveryv1.EndpointPort{port("", 5353, corev1.ProtocolUDP)}, Endpoints: []discoveryv1.Endpoint{of(one, ready)}}}, c.a, ""},
		{"affinity", func(s *corev1.ServiceSpec) { s.SessionAffinity = corev1.ServiceAffinityClientIP },
			only(of(one, ready)), c.a, "80: one troth at 8080 | stays 3h0m0s"},
		{"affinity for a minute", func(s *corev1.ServiceSpec) {
			s.SessionAffinity = corev1.ServiceAffinityClientIP
			s.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: &timeout}}
		}, only(of(one, ready)), c.a, "80: one troth at 8080 | stays 1m0s"},

		{"hints, of this zone", nil, only(hinted(of(one, ready), zone("zone-a")), hinted(of(three, ready), zone("zone-b"))), c.a, "80: one troth at 8080"},
		{"hints, of the other zone", nil, only(hinted(of(one, ready), zone("zone-a")), hinted(of(three, ready), zone("zone-b"))), c.b, "80: three troth at 8080"},
		{"hints, of no zone of ours", nil, only(hinted(of(one, ready), zone("zone-a")), hinted(of(three, ready), zone("zone-b"))), c.bare,
			"80: one troth at 8080; three troth at 8080"},
		{"hints that not all have", nil, only(hinted(of(one, ready), zone("zone-a")), of(three, ready)), c.a, "80: one troth at 8080; three troth at 8080"},
		{"hints of a node", nil, only(hinted(of(one, ready), node(c.a.Name)), hinted(of(three, ready), node(c.b.Name))), c.b, "80: three troth at 8080"},

		{"by hand", nil, only(at("192.0.2.1")), c.a, "80: - plaintext at 8080"},
		{"by hand, of a pod", nil, only(at(one.Status.PodIP)), c.a, "80: one troth at 8080"},
		{"names in the place of addresses", nil, slices{{AddressType: discoveryv1.AddressTypeFQDN, Endpoints: []discoveryv1.Endpoint{at("example.org")}}}, c.a, "80:"},
		{"of the other family", nil, slices{{AddressType: discoveryv1.AddressTypeIPv6, Endpoints: []discoveryv1.Endpoint{at("2001:db8::1")}}}, c.a, "80:"},
		{"a pod that is not known", nil, only(of(stranger, ready), of(two, ready)), c.a, "80: two troth at 8080"},
		{"a pod that has another address", nil, only(of(moved, ready)), c.a, "80:"},
		{"a pod that has finished", nil, only(of(finished, ready)), c.a, "80:"},
		{"a pod in its node's network", nil, only(of(host, ready)), c.a, "80: - plaintext at 8080"},
		{"a pod that opted out", nil, only(of(optedOut, ready)), c.a, "80: opted-out plaintext at 8080"},
		{"a pod on a node without an agent", nil, only(of(bare, ready)), c.a, "80: bare plaintext at 8080"},
		{"a pod of Istio's ambient mode there", nil, only(of(ambient, ready)), c.a, "80: ambient hbone at 8080"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			service := c.service(t, fmt.Sprintf("service-%d", n), test.change)
			for _, s := range test.slices {
				c.slice(t, service, s)
			}
			r := pods.Directory(test.caller.Name)
			defer r.Close()
			want := service.Name
			if test.want != "" {
				want += " | " + test.want
			}
			settles(t, r, service.Spec.ClusterIP, want)
		})
	}
}

// What has an address, and what has none.
func TestAddresses(t *testing.T) {
	c := newCity(t)
	pods, _ := runPods(t, kube.PodsConfig{Uncaptured: map[string]bool{"left-alone": true}})
	r := pods.Directory(c.a.Name)
	defer r.Close()

	pod := c.on(t, c.b, "pod", nil)
	settles(t, r, pod.Status.PodIP, "pod troth at 0")
	host := c.on(t, c.a, "host", func(p *apiserver.Pod) { p.HostNetwork = true })
	settles(t, r, host.Status.PodIP, "nobody")
	settles(t, r, "192.0.2.1", "nobody")

	dual := corev1.IPFamilyPolicyRequireDualStack
	both := c.service(t, "both", func(s *corev1.ServiceSpec) { s.IPFamilyPolicy = &dual })
	if len(both.Spec.ClusterIPs) != 2 {
		t.Fatalf("the Service has the addresses %q, want one of each family", both.Spec.ClusterIPs)
	}
	c.slice(t, both, discoveryv1.EndpointSlice{Endpoints: []discoveryv1.Endpoint{of(pod, ready)}})
	c.slice(t, both, discoveryv1.EndpointSlice{AddressType: discoveryv1.AddressTypeIPv6, Endpoints: []discoveryv1.Endpoint{at("2001:db8::1")}, Ports: ports("", 8081)})
	settles(t, r, both.Spec.ClusterIPs[0], "both | 80: pod troth at 8080")
	settles(t, r, both.Spec.ClusterIPs[1], "both | 80: - plaintext at 8081")

	outside := c.service(t, "outside", func(s *corev1.ServiceSpec) {
		s.Type, s.ExternalIPs = corev1.ServiceTypeLoadBalancer, []string{"192.0.2.7"}
	})
	outside.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "192.0.2.8"}}
	if _, err := cluster.Client().CoreV1().Services(c.namespace).UpdateStatus(t.Context(), outside, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	settles(t, r, outside.Spec.ClusterIP, "outside | 80:")
	settles(t, r, "192.0.2.7", "nobody")
	settles(t, r, "192.0.2.8", "nobody")

	// These have no address to ask for. The endpoints of the first are pods.
	headless := c.service(t, "headless", func(s *corev1.ServiceSpec) { s.ClusterIP = corev1.ClusterIPNone })
	c.slice(t, headless, discoveryv1.EndpointSlice{Endpoints: []discoveryv1.Endpoint{of(pod, ready)}})
	c.service(t, "external", func(s *corev1.ServiceSpec) {
		s.Type, s.ExternalName = corev1.ServiceTypeExternalName, "example.org"
	})
	// A Service that another proxy serves is nobody's to choose for.
	others := c.service(t, "others", nil)
	settles(t, r, others.Spec.ClusterIP, "others | 80:")
	others = others.DeepCopy()
	others.Labels = map[string]string{"service.kubernetes.io/service-proxy-name": "other"}
	if _, err := cluster.Client().CoreV1().Services(c.namespace).Update(t.Context(), others, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	settles(t, r, others.Spec.ClusterIP, "nobody")
	settles(t, r, pod.Status.PodIP, "pod troth at 0")
}

// Whatever an answer depends on changes it, for those who hold it.
func TestAnswersChange(t *testing.T) {
	installPolicies(t)
	c := newCity(t)
	pods, _ := runPods(t, kube.PodsConfig{})
	here, there := pods.Directory(c.a.Name), pods.Directory(c.b.Name)
	defer here.Close()
	defer there.Close()

	pod := c.on(t, c.bare, "pod", func(p *apiserver.Pod) { p.Labels = map[string]string{"app": "cart"} })
	service := c.service(t, "service", nil)
	endpoints := c.slice(t, service, discoveryv1.EndpointSlice{Endpoints: []discoveryv1.Endpoint{of(pod, ready)}})
	both := func(t *testing.T, wantPod, wantService string) {
		t.Helper()
		settles(t, here, pod.Status.PodIP, wantPod)
		settles(t, here, service.Spec.ClusterIP, strings.TrimRight("service | 80: "+wantService, " "))
	}
	both(t, "pod plaintext at 0", "pod plaintext at 8080")
	settles(t, there, pod.Status.PodIP, "pod plaintext at 0")
	settles(t, there, "192.0.2.1", "nobody")

	t.Run("an agent comes", func(t *testing.T) {
		agent := runAgent(t, c.bare)
		both(t, "pod troth at 0", "pod troth at 8080")
		// It goes, and another one comes. Until then nobody calls in plaintext.
		cluster.DeletePod(t, agent, 0)
		runAgent(t, c.bare)
		both(t, "pod troth at 0", "pod troth at 8080")
	})
	t.Run("a policy", func(t *testing.T) {
		apply(t, c.namespace, "all", "{mtls: {mode: DISABLE}}")
		both(t, "pod plaintext at 0", "pod plaintext at 8080")
		apply(t, c.namespace, "cart", "{selector: {matchLabels: {app: cart}}, mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: DISABLE}, 9090: {mode: PERMISSIVE}}}")
		both(t, "pod troth at 0, plaintext at 8080", "pod plaintext at 8080")
	})
	t.Run("labels", func(t *testing.T) {
		pod := pod.DeepCopy()
		pod.Labels = map[string]string{"troth.dev/capture": "disabled"}
		if _, err := cluster.Client().CoreV1().Pods(c.namespace).Update(t.Context(), pod, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		both(t, "pod plaintext at 0", "pod plaintext at 8080")
	})
	t.Run("endpoints", func(t *testing.T) {
		endpoints.Endpoints = []discoveryv1.Endpoint{of(pod, notReady)}
		if _, err := cluster.Client().DiscoveryV1().EndpointSlices(c.namespace).Update(t.Context(), endpoints, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		both(t, "pod plaintext at 0", "")
	})
	t.Run("the pod and the Service go", func(t *testing.T) {
		cluster.DeletePod(t, pod, 0)
		settles(t, here, pod.Status.PodIP, "nobody")
		if err := cluster.Client().CoreV1().Services(c.namespace).Delete(t.Context(), service.Name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		settles(t, here, service.Spec.ClusterIP, "nobody")
	})
	if diff := cmp.Diff(2, there.Held()); diff != "" {
		t.Errorf("addresses that the other node holds (-want +got):\n%s", diff)
	}
}

// What was missed while the API server was away is made good once it is back.
func TestServicesAfterAnOutage(t *testing.T) {
	c := newCity(t)
	pods, wire := runPods(t, kube.PodsConfig{})
	r := pods.Directory(c.a.Name)
	defer r.Close()
	pod := c.on(t, c.a, "pod", nil)
	gone, kept := c.service(t, "gone", nil), c.service(t, "kept", nil)
	c.slice(t, gone, discoveryv1.EndpointSlice{Endpoints: []discoveryv1.Endpoint{of(pod, ready)}})
	endpoints := c.slice(t, kept, discoveryv1.EndpointSlice{Endpoints: []discoveryv1.Endpoint{of(pod, ready)}})
	settles(t, r, gone.Spec.ClusterIP, "gone | 80: pod troth at 8080")
	settles(t, r, kept.Spec.ClusterIP, "kept | 80: pod troth at 8080")

	wire.sever()
	if err := cluster.Client().CoreV1().Services(c.namespace).Delete(t.Context(), gone.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := cluster.Client().DiscoveryV1().EndpointSlices(c.namespace).Delete(t.Context(), endpoints.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	settles(t, r, gone.Spec.ClusterIP, "gone | 80: pod troth at 8080")
	wire.mend()
	settles(t, r, gone.Spec.ClusterIP, "nobody")
	settles(t, r, kept.Spec.ClusterIP, "kept | 80:")
}
