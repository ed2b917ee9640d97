package check_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/netip"
	"net/url"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/check"
	"troth.dev/troth/identity"
	"troth.dev/troth/kube"
	"troth.dev/troth/policy"
)

// now is when the snapshots of the tables were taken.
var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// certificate returns one that is valid between two moments of the tables.
func certificate(t testing.TB, name string, from, to time.Duration) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
		NotBefore: now.Add(from), NotAfter: now.Add(to),
		URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: name}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

const day = 24 * time.Hour

func pointer[T any](value T) *T { return &value }

// healthy is a cluster in which every check passes: two nodes, two replicas, one
// workload that is STRICT.
func healthy(t *testing.T) *check.Snapshot {
	t.Helper()
	root, next := certificate(t, "", -10*day, 20*day), certificate(t, "", -10*day, 20*day)
	serving := certificate(t, "/troth/server", -10*time.Minute, 50*time.Minute)
	meta := func(namespace, name string) metav1.ObjectMeta {
		return metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{"app.kubernetes.io/name": name}}
	}
	node := func(name string) corev1.Node {
		return corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"kubernetes.io/os": "linux"}},
			Status: corev1.NodeStatus{
				NodeInfo:   corev1.NodeSystemInfo{KubeletVersion: "v1.37.2", KernelVersion: "6.12.57+deb13-amd64"},
				Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}},
			},
		}
	}
	ready := func(namespace, name, suffix, node string) corev1.Pod {
		pod := corev1.Pod{
			ObjectMeta: meta(namespace, name),
			Spec:       corev1.PodSpec{NodeName: node},
			Status: corev1.PodStatus{
				Conditions:        []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}},
				ContainerStatuses: []corev1.ContainerStatus{{Name: "main"}},
			},
		}
		pod.Name += suffix
		return pod
	}
	limits := corev1.ResourceRequirements{
		Requests: corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("256Mi")},
		Limits:   corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("256Mi")},
	}
	confined := &corev1.SecurityContext{
		AllowPrivilegeEscalation: pointer(false), ReadOnlyRootFilesystem: pointer(true),
		Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
	}
	selector := &metav1.LabelSelector{MatchLabels: map[string]string{"app.kubernetes.io/name": "troth-server"}}
	deployment := &appsv1.Deployment{
		ObjectMeta: meta("troth-system", "troth-server"),
		Spec: appsv1.DeploymentSpec{
			Replicas: pointer[int32](2),
			Selector: selector,
			Template: corev1.PodTemplateSpec{
				ObjectMeta: meta("", "troth-server"),
				Spec: corev1.PodSpec{
					ServiceAccountName: "troth-server",
					SecurityContext: &corev1.PodSecurityContext{
						RunAsNonRoot: pointer(true), SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
					},
					Containers: []corev1.Container{{
						Name: "server", Image: "troth-server:v1.0.0", Resources: limits, SecurityContext: confined,
						Command: []string{"/troth-server"},
						Args: []string{
							"-trust-domain=example.org", "-agents=troth-node/troth-agent", "-kubernetes-store=troth-system",
							"-uncaptured-namespaces=kube-system,troth-system,troth-node", "-signer=troth.dev/svid",
							"-trust-bundle=clustertrustbundle",
						},
					}},
				},
			},
		},
		Status: appsv1.DeploymentStatus{Replicas: 2, UpdatedReplicas: 2, AvailableReplicas: 2},
	}
	daemonset := &appsv1.DaemonSet{
		ObjectMeta: meta("troth-node", "troth-agent"),
		Spec: appsv1.DaemonSetSpec{Template: corev1.PodTemplateSpec{
			ObjectMeta: meta("", "troth-agent"),
			Spec: corev1.PodSpec{
				ServiceAccountName: "troth-agent", HostPID: true, HostNetwork: true,
				InitContainers: []corev1.Container{{
					Name: "cni", Image: "troth-agent:v1.0.0", Resources: limits, Command: []string{"/troth-cni", "install"},
					RestartPolicy: pointer(corev1.ContainerRestartPolicyAlways),
				}},
				Containers: []corev1.Container{{
					Name: "agent", Image: "troth-agent:v1.0.0", Resources: limits, Command: []string{"/troth-agent"},
					Args: []string{"-trust-domain=example.org", "-capture", "-cni-socket=/run/troth-agent/cni.sock"},
				}},
				Volumes: []corev1.Volume{{Name: "token", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
					Sources: []corev1.VolumeProjection{{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{
						Audience: "spiffe://example.org", ExpirationSeconds: pointer[int64](3600), Path: "troth",
					}}},
				}}}},
			},
		}},
		Status: appsv1.DaemonSetStatus{DesiredNumberScheduled: 2, UpdatedNumberScheduled: 2, NumberAvailable: 2},
	}
	keepers := &appsv1.DaemonSet{
		ObjectMeta: meta("troth-node", "troth-keeper"),
		Spec: appsv1.DaemonSetSpec{Template: corev1.PodTemplateSpec{
			ObjectMeta: meta("", "troth-keeper"),
			Spec: corev1.PodSpec{Containers: []corev1.Container{{
				Name: "keeper", Image: "troth-agent:v1.0.0", Resources: limits, Command: []string{"/troth-agent", "keep"},
			}}},
		}},
		Status: appsv1.DaemonSetStatus{DesiredNumberScheduled: 2, UpdatedNumberScheduled: 1, NumberAvailable: 2},
	}
	var admission check.Admission
	for _, name := range []string{"troth-tokens", "troth-accounts", "troth-trust-bundle", "troth-folders", "troth-pod-certificate-requests"} {
		admission.Policies = append(admission.Policies, admissionv1.ValidatingAdmissionPolicy{ObjectMeta: metav1.ObjectMeta{Name: name}})
		admission.Bindings = append(admission.Bindings, admissionv1.ValidatingAdmissionPolicyBinding{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec: admissionv1.ValidatingAdmissionPolicyBindingSpec{
				PolicyName: name, ValidationActions: []admissionv1.ValidationAction{admissionv1.Deny, admissionv1.Audit},
			},
		})
	}
	namespace := func(name, level string) corev1.Namespace {
		return corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"pod-security.kubernetes.io/enforce": level}}}
	}
	bundle := []*x509.Certificate{root, next}
	return &check.Snapshot{
		At: now, OnNode: true, Version: "v1.0.0",
		ServerNamespace: "troth-system", NodeNamespace: "troth-node", RootNamespace: "istio-system",
		TrustDomain: check.Known("example.org"),

		APIServer: check.Known(check.APIServer{Version: "v1.37.2"}),
		Resources: check.Known(map[string]bool{
			"certificates.k8s.io/v1/podcertificaterequests": true, "certificates.k8s.io/v1/clustertrustbundles": true,
			"admissionregistration.k8s.io/v1/validatingadmissionpolicies": true, "discovery.k8s.io/v1/endpointslices": true,
		}),
		TokenIssuer:     check.Known("https://kubernetes.default.svc"),
		NodeRestriction: check.Known(true),
		Nodes:           check.Known([]corev1.Node{node("n1"), node("n2")}),
		NodeLeases: check.Known([]coordinationv1.Lease{{
			ObjectMeta: metav1.ObjectMeta{Name: "n1"}, Spec: coordinationv1.LeaseSpec{RenewTime: pointer(metav1.NewMicroTime(now.Add(-5 * time.Second)))},
		}}),
		Namespaces: check.Known([]corev1.Namespace{namespace("troth-system", "restricted"), namespace("troth-node", "privileged"), namespace("shop", "")}),
		Mine: check.Known(map[check.Right]bool{
			{Verb: "list", Group: "troth.dev", Resource: "authorities"}: true, {Verb: "create", Resource: "namespaces"}: true,
		}),

		Deployment: check.Known(deployment),
		DaemonSet:  check.Known(daemonset),
		Keepers:    check.Known(keepers),
		Pods: check.Known([]corev1.Pod{
			ready("troth-system", "troth-server", "-a", "n1"), ready("troth-system", "troth-server", "-b", "n2"),
			ready("troth-node", "troth-agent", "-a", "n1"), ready("troth-node", "troth-agent", "-b", "n2"),
		}),
		Budgets: check.Known([]policyv1.PodDisruptionBudget{{
			ObjectMeta: meta("troth-system", "troth-server"), Spec: policyv1.PodDisruptionBudgetSpec{Selector: selector},
			Status: policyv1.PodDisruptionBudgetStatus{ExpectedPods: 2, CurrentHealthy: 2, DisruptionsAllowed: 1},
		}}),
		Service: check.Known(&corev1.Service{ObjectMeta: meta("troth-system", "troth-server"), Spec: corev1.ServiceSpec{
			Selector: selector.MatchLabels, Ports: []corev1.ServicePort{{Port: 8443}},
		}}),
		Endpoints: check.Known([]discoveryv1.EndpointSlice{{Endpoints: []discoveryv1.Endpoint{
			{Conditions: discoveryv1.EndpointConditions{Ready: pointer(true)}}, {},
		}}}),
		NetworkPolicies: check.Known([]networkingv1.NetworkPolicy{{Spec: networkingv1.NetworkPolicySpec{
			PodSelector: *selector, PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress},
			Ingress: []networkingv1.NetworkPolicyIngressRule{{Ports: []networkingv1.NetworkPolicyPort{{Port: pointer(intstr.FromString("grpc"))}}}},
		}}}),
		KeySize:      check.Known(32),
		ServerRights: check.Known(map[check.Right]bool{{Verb: "list", Resource: "pods"}: true}),
		AgentRights:  check.Known(map[check.Right]bool{{Verb: "list", Resource: "pods"}: false}),
		Admission:    check.Known(admission),
		Published:    check.Known([]check.Bundle{{Where: "ClusterTrustBundle troth.dev:svid:example.org", Authorities: bundle}}),
		Publisher: check.Known(&coordinationv1.Lease{Spec: coordinationv1.LeaseSpec{
			HolderIdentity: pointer("troth-server-a"), RenewTime: pointer(metav1.NewMicroTime(now.Add(-5 * time.Second))),
		}}),
		Ledger: check.Known(3),
		Requests: check.Known([]certificatesv1.PodCertificateRequest{{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", CreationTimestamp: metav1.NewTime(now.Add(-time.Hour))},
			Spec:       certificatesv1.PodCertificateRequestSpec{SignerName: "troth.dev/svid", PodName: "cart-1"},
			Status:     certificatesv1.PodCertificateRequestStatus{Conditions: []metav1.Condition{{Type: "Issued"}}},
		}}),

		Definition: check.Known(&check.Definition{Versions: []string{"v1", "v1beta1"}, Established: true}),
		Cluster: check.Known(kube.Snapshot{
			Pods: []identity.Pod{
				pod("shop", "cart-1", func(p *identity.Pod) { p.Labels, p.ContainerPorts = map[string]string{"app": "cart"}, []uint16{8080} }),
				pod("kube-system", "proxy", func(p *identity.Pod) { p.HostNetwork = true }),
				pod("shop", "done", func(p *identity.Pod) { p.Phase, p.HostNetwork = identity.PodFinished, true }),
			},
			Policies: []policy.PeerAuthentication{peerAuthentication("istio-system", "default", policy.Strict, nil)},
		}),

		Served: check.Known(check.Served{Authorities: []*x509.Certificate{next, root}, Revision: 4, Certificate: serving}),
		Status: check.Known(status(root, func(*trothv1.AuthorityStatus) {})),
		Peers:  check.Known(&trothv1.ListPlaintextPeersResponse{Agents: 2}),

		Node: check.Known(check.Node{
			Conflist: "/etc/cni/net.d/10-calico.conflist", Plugins: []string{"calico", "portmap", "troth-cni"}, Binary: true,
			Sockets: map[string]bool{"/run/troth/workload.sock": true, "/run/troth-agent/cni.sock": true},
		}),
	}
}

func pod(namespace, name string, change func(*identity.Pod)) identity.Pod {
	p := identity.Pod{
		PodReference:   identity.PodReference{Namespace: namespace, Name: name},
		ServiceAccount: "default", Phase: identity.PodRunning, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")},
	}
	change(&p)
	return p
}

func peerAuthentication(namespace, name string, mode policy.Mode, selector map[string]string) policy.PeerAuthentication {
	return policy.PeerAuthentication{Ref: policy.Ref{Namespace: namespace, Name: name}, Mode: mode, Selector: selector}
}

// status is what the server says, with one authority that signs.
func status(active *x509.Certificate, change func(*trothv1.AuthorityStatus)) *trothv1.AuthorityStatus {
	s := &trothv1.AuthorityStatus{
		TrustDomain: "example.org", Revision: 4, SvidLife: durationpb.New(time.Hour),
		Authorities: []*trothv1.AuthorityRecord{{
			Id: "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", State: trothv1.AuthorityState_AUTHORITY_STATE_ACTIVE, Certificate: active.Raw,
		}},
		Propagation: &trothv1.AuthorityPropagation{
			KnownAt: timestamppb.New(now.Add(-5 * time.Second)), Expected: 2, Received: 2, Applied: 2, Proved: 2, Reporting: 2, Revision: 4,
		},
	}
	change(s)
	return s
}
