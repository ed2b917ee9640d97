package check_test

import (
	"bytes"
	"crypto/x509"
	"errors"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/timestamppb"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/check"
	"troth.dev/troth/identity"
	"troth.dev/troth/kube"
	"troth.dev/troth/policy"
)

// passes is what each check says of the healthy cluster.
var passes = map[string]string{
	"api-server-version":       "the API server has version v1.37.2",
	"api-pod-certificates":     "certificates.k8s.io/v1/podcertificaterequests is served",
	"api-trust-bundles":        "certificates.k8s.io/v1/clustertrustbundles is served",
	"api-admission":            "admissionregistration.k8s.io/v1/validatingadmissionpolicies is served",
	"api-endpoints":            "discovery.k8s.io/v1/endpointslices is served",
	"node-restriction":         "a kubelet may not give its node a label of node-restriction.kubernetes.io",
	"token-issuer":             "the issuer is https://kubernetes.default.svc, and its keys can be fetched",
	"clock-api-server":         "the API server's clock is within 30s of this one",
	"clock-nodes":              "no node's clock is more than 30s ahead",
	"nodes-ready":              "2 nodes ready",
	"node-kubelets":            "every kubelet is 1.37 or later",
	"node-kernels":             "every kernel is 5.3 or later",
	"namespace-server":         "namespace troth-system enforces restricted",
	"namespace-agents":         "namespace troth-node enforces privileged",
	"other-meshes":             "no namespace asks another mesh to capture its pods",
	"policy-definition":        "the definition is Troth's and serves v1, v1beta1",
	"server-deployment":        "2 replicas available, of the newest version",
	"server-replicas":          "2 replicas, ready on 2 nodes",
	"server-store":             "they share a store: -kubernetes-store",
	"server-disruption-budget": "PodDisruptionBudget troth-server is for the server",
	"server-service":           "the Service leads to the server, at port 8443",
	"server-endpoints":         "2 endpoints ready",
	"server-network-policy":    "NetworkPolicies let everybody in at port 8443",
	"server-resources":         "the memory of all containers is bounded",
	"server-confinement":       "no root, no capabilities, nothing of the node's",
	"server-restarts":          "the containers of 2 pods stay up",
	"server-rights":            "the server may do all of 1 thing",
	"operator-rights":          "you may do all of 1 thing",
	"key-encryption-key":       "the key has 32 bytes",
	"ledger-size":              "3 ConfigMaps of ledger",
	"admission-policies":       "5 policies in force",
	"image-tags":               "all images have the tag v1.0.0",
	"versions":                 "all are v1.0.0",
	"trust-domain":             "it is example.org",
	"agent-daemonset":          "2 agents available, of the newest version",
	"agent-coverage":           "2 nodes with an agent that is ready",
	"agent-restarts":           "the containers of 2 pods stay up",
	"agent-node-access":        "the agents have the node's network and processes, and no container is privileged",
	"agent-token":              "the token is for spiffe://example.org",
	"agent-account":            "the agents run as troth-node/troth-agent",
	"agent-rights":             "an agent may do none of 1 thing",
	"agent-resources":          "the memory of all containers is bounded",
	"agent-keeper":             "2 nodes with a keeper",
	"bundle-published":         "2 authorities in ClusterTrustBundle troth.dev:svid:example.org, DIGEST",
	"bundle-expiry":            "the authority that lives longest is good for 20d",
	"bundle-agreement":         "both are DIGEST",
	"publisher":                "troth-server-a publishes it",
	"server-reachable":         "revision 4 of the bundle, from spiffe://example.org/troth/server",
	"server-certificate":       "it is good for 50m",
	"clock-server":             "the server's clock is within 2m of this one",
	"authority-active":         "aaaaaaaaaaaa is good for 20d",
	"authority-tainted":        "none is tainted",
	"rotation-overdue":         "nothing is overdue",
	"agents-reporting":         "2 agents said what they hold",
	"agents-applied":           "revision 4 is in use by 2 agents",
	"agents-proved":            "no authority is prepared",
	"pod-certificates":         "1 request of late, none refused and none waiting",
	"policies-valid":           "nothing of the kind is to be said of 1 policy",
	"policies-in-force":        "nothing of the kind is to be said of 1 policy",
	"policy-ports":             "nothing of the kind is to be said of 1 policy",
	"strict-uncaptured":        "1 pod STRICT, none of them uncaptured",
	"uncaptured-pods":          "no pod is left out, of 1 pod in the namespaces that are captured",
	"plaintext-peers":          "none of late, by 2 agents",
	"cni-order":                "/etc/cni/net.d/10-calico.conflist: calico, portmap, troth-cni",
	"cni-program":              "the program is there",
	"node-sockets":             "/run/troth-agent/cni.sock, /run/troth/workload.sock",
}

// masked is a text without the digests of certificates, which are new in each run.
func masked(text string) string {
	return regexp.MustCompile(`sha256:[0-9a-f]{12}`).ReplaceAllString(text, "DIGEST")
}

func TestHealthy(t *testing.T) {
	got := make(map[string]string)
	report := healthy(t).Judge()
	for _, r := range report.Results {
		got[r.ID] = masked(r.Found)
		if r.Level != check.Pass || r.Expiring {
			t.Errorf("%s: %s", r.ID, r.Level)
		}
	}
	if diff := cmp.Diff(passes, got); diff != "" {
		t.Errorf("- want, + got:\n%s", diff)
	}
	if n := report.Count(check.Pass); n != len(passes) || report.Expiring() {
		t.Errorf("%d checks pass, want %d; expiring: %v", n, len(passes), report.Expiring())
	}
}

func deployment(s *check.Snapshot) *appsv1.Deployment          { d, _ := s.Deployment.Get(); return d }
func server(s *check.Snapshot) *corev1.PodSpec                 { return &deployment(s).Spec.Template.Spec }
func daemonset(s *check.Snapshot) *appsv1.DaemonSet            { d, _ := s.DaemonSet.Get(); return d }
func keepers(s *check.Snapshot) *appsv1.DaemonSet              { d, _ := s.Keepers.Get(); return d }
func agents(s *check.Snapshot) *corev1.PodSpec                 { return &daemonset(s).Spec.Template.Spec }
func nodes(s *check.Snapshot) []corev1.Node                    { n, _ := s.Nodes.Get(); return n }
func pods(s *check.Snapshot) []corev1.Pod                      { p, _ := s.Pods.Get(); return p }
func namespaces(s *check.Snapshot) []corev1.Namespace          { n, _ := s.Namespaces.Get(); return n }
func budgets(s *check.Snapshot) []policyv1.PodDisruptionBudget { b, _ := s.Budgets.Get(); return b }
func authority(s *check.Snapshot) *trothv1.AuthorityStatus     { a, _ := s.Status.Get(); return a }
func requests(s *check.Snapshot) []certificatesv1.PodCertificateRequest {
	r, _ := s.Requests.Get()
	return r
}
func networkPolicies(s *check.Snapshot) []networkingv1.NetworkPolicy {
	n, _ := s.NetworkPolicies.Get()
	return n
}

// replaceArg replaces an argument of a container.
func replaceArg(c *corev1.Container, old string, to ...string) {
	i := slices.Index(c.Args, old)
	c.Args = slices.Concat(c.Args[:i], to, c.Args[i+1:])
}

type row struct {
	id, what string
	change   func(*check.Snapshot)
	level    check.Level
	found    string
}

const expiring = check.Pass + 1 // a warning about time that runs out

// rows are what each check says of a cluster in which one thing is not as it should be.
func rows(t *testing.T) []row {
	const (
		fail, warn, unknown, pass = check.Failure, check.Warning, check.Unknown, check.Pass
	)
	crashing := func(reason string, restarts int32) corev1.ContainerStatus {
		return corev1.ContainerStatus{Name: "main", RestartCount: restarts,
			State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason}}}
	}
	bundles := func(s *check.Snapshot, certificates ...*x509.Certificate) {
		s.Published = check.Known([]check.Bundle{{Where: "ConfigMap troth-node/troth-bundle", Authorities: certificates}})
	}
	noServer := func(s *check.Snapshot) { s.Deployment = check.Known[*appsv1.Deployment](nil) }
	noAgents := func(s *check.Snapshot) { s.DaemonSet = check.Known[*appsv1.DaemonSet](nil) }
	cluster := func(pods []identity.Pod, policies ...policy.PeerAuthentication) func(*check.Snapshot) {
		return func(s *check.Snapshot) { s.Cluster = check.Known(kube.Snapshot{Pods: pods, Policies: policies}) }
	}
	same := func(*identity.Pod) {}
	const missing, missingAgents = "there is no Deployment troth-system/troth-server", "there is no DaemonSet troth-node/troth-agent"
	return []row{
		{"api-server-version", "old", func(s *check.Snapshot) { s.APIServer = check.Known(check.APIServer{Version: "v1.36.4"}) }, fail,
			"the API server has version v1.36.4, which is older than 1.37"},
		{"api-server-version", "a vendor's", func(s *check.Snapshot) { s.APIServer = check.Known(check.APIServer{Version: "v1.37.0-gke.1"}) }, pass,
			"the API server has version v1.37.0-gke.1"},
		{"api-server-version", "nonsense", func(s *check.Snapshot) { s.APIServer = check.Known(check.APIServer{Version: "new"}) }, unknown,
			`the API server says that its version is "new", which cannot be read`},
		{"api-pod-certificates", "not served", func(s *check.Snapshot) { s.Resources = check.Known(map[string]bool{}) }, fail,
			"certificates.k8s.io/v1/podcertificaterequests is not served"},
		{"api-trust-bundles", "not served", func(s *check.Snapshot) { s.Resources = check.Known(map[string]bool{}) }, fail,
			"certificates.k8s.io/v1/clustertrustbundles is not served"},
		{"api-admission", "not served", func(s *check.Snapshot) { s.Resources = check.Known(map[string]bool{}) }, fail,
			"admissionregistration.k8s.io/v1/validatingadmissionpolicies is not served"},
		{"api-endpoints", "not served", func(s *check.Snapshot) { s.Resources = check.Known(map[string]bool{}) }, fail,
			"discovery.k8s.io/v1/endpointslices is not served"},
		{"node-restriction", "off", func(s *check.Snapshot) { s.NodeRestriction = check.Known(false) }, fail,
			"a kubelet may give its node a label of node-restriction.kubernetes.io: NodeRestriction is off"},
		{"token-issuer", "no https", func(s *check.Snapshot) { s.TokenIssuer = check.Known("kubernetes/serviceaccount") }, fail,
			`the issuer is "kubernetes/serviceaccount", which is no https URL`},
		{"clock-api-server", "ahead", func(s *check.Snapshot) {
			s.APIServer = check.Known(check.APIServer{Version: "v1.37.2", Ahead: 90 * time.Second})
		}, fail, "the API server's clock is 1m ahead of this one"},
		{"clock-api-server", "behind", func(s *check.Snapshot) {
			s.APIServer = check.Known(check.APIServer{Version: "v1.37.2", Ahead: -31 * time.Second})
		}, fail, "the API server's clock is 31s behind this one"},
		{"clock-nodes", "ahead", func(s *check.Snapshot) {
			s.NodeLeases = check.Known([]coordinationv1.Lease{{ObjectMeta: metav1.ObjectMeta{Name: "n2"},
				Spec: coordinationv1.LeaseSpec{RenewTime: pointer(metav1.NewMicroTime(now.Add(2 * time.Minute)))}}})
		}, fail, "ahead of the API server: n2 by 2m"},
		{"clock-nodes", "ahead as the API server is", func(s *check.Snapshot) {
			s.APIServer = check.Known(check.APIServer{Ahead: 2 * time.Minute})
			s.NodeLeases = check.Known([]coordinationv1.Lease{{ObjectMeta: metav1.ObjectMeta{Name: "n2"},
				Spec: coordinationv1.LeaseSpec{RenewTime: pointer(metav1.NewMicroTime(now.Add(2 * time.Minute)))}}})
		}, pass, "no node's clock is more than 30s ahead"},
		{"clock-nodes", "no lease", func(s *check.Snapshot) { s.NodeLeases = check.Known([]coordinationv1.Lease{}) }, unknown, "no kubelet has a lease"},
		{"nodes-ready", "one away", func(s *check.Snapshot) { nodes(s)[1].Status.Conditions[0].Status = corev1.ConditionUnknown }, warn,
			"1 of 2 nodes not ready: n2"},
		{"nodes-ready", "none", func(s *check.Snapshot) { s.Nodes = check.Known([]corev1.Node{}) }, fail, "there is no node"},
		{"node-kubelets", "old", func(s *check.Snapshot) { nodes(s)[0].Status.NodeInfo.KubeletVersion = "v1.36.0" }, fail,
			"1 kubelet older than 1.37: n1 (v1.36.0)"},
		{"node-kubelets", "nonsense", func(s *check.Snapshot) { nodes(s)[0].Status.NodeInfo.KubeletVersion = "" }, unknown,
			"these nodes do not tell the version of their kubelet: n1"},
		{"node-kernels", "old", func(s *check.Snapshot) { nodes(s)[1].Status.NodeInfo.KernelVersion = "4.18.0-553.el8.x86_64" }, fail,
			"1 kernel older than 5.3: n2 (4.18.0-553.el8.x86_64)"},
		{"node-kernels", "no node", func(s *check.Snapshot) { s.Nodes = check.Known([]corev1.Node{}) }, unknown, "there is no node"},
		{"install-rights", "all", func(s *check.Snapshot) { s.Before = true }, pass, "you may do all of 1 thing"},
		{"install-rights", "one missing", func(s *check.Snapshot) {
			s.Before = true
			s.Mine = check.Known(map[check.Right]bool{{Verb: "create", Group: "apps", Resource: "deployments", Namespace: "troth-system"}: false})
		}, fail, "you may not create deployments.apps in troth-system"},
		{"install-rights", "none asked", func(s *check.Snapshot) { s.Before, s.Mine = true, check.Known(map[check.Right]bool{}) }, unknown,
			"nobody was asked for the rights"},
		{"namespace-server", "not there", func(s *check.Snapshot) { s.Namespaces = check.Known([]corev1.Namespace{}) }, fail, "there is no namespace troth-system"},
		{"namespace-server", "not there yet", func(s *check.Snapshot) { s.Before, s.Namespaces = true, check.Known([]corev1.Namespace{}) }, pass,
			"namespace troth-system is not there yet"},
		{"namespace-server", "no label", func(s *check.Snapshot) { namespaces(s)[0].Labels = nil }, fail, "namespace troth-system enforces nothing, want restricted"},
		{"namespace-server", "privileged", func(s *check.Snapshot) {
			namespaces(s)[0].Labels["pod-security.kubernetes.io/enforce"] = "privileged"
		}, fail, `namespace troth-system enforces "privileged", want restricted`},
		{"namespace-server", "going", func(s *check.Snapshot) { namespaces(s)[0].DeletionTimestamp = &metav1.Time{Time: now} }, fail,
			"namespace troth-system is being deleted"},
		{"namespace-agents", "baseline", func(s *check.Snapshot) { namespaces(s)[1].Labels["pod-security.kubernetes.io/enforce"] = "baseline" }, fail,
			`namespace troth-node enforces "baseline", want privileged`},
		{"namespace-agents", "no label", func(s *check.Snapshot) { namespaces(s)[1].Labels = nil }, warn,
			"namespace troth-node enforces nothing of its own, want privileged"},
		{"other-meshes", "ambient", func(s *check.Snapshot) {
			namespaces(s)[2].Labels = map[string]string{"istio.io/dataplane-mode": "ambient"}
		}, warn,
			"1 namespace captured by another mesh: shop (Istio ambient)"},
		{"other-meshes", "sidecars", func(s *check.Snapshot) { namespaces(s)[2].Labels = map[string]string{"istio-injection": "enabled"} }, warn,
			"1 namespace captured by another mesh: shop (Istio sidecars)"},
		{"other-meshes", "linkerd", func(s *check.Snapshot) {
			namespaces(s)[2].Annotations = map[string]string{"linkerd.io/inject": "enabled"}
		}, warn,
			"1 namespace captured by another mesh: shop (Linkerd)"},
		{"policy-definition", "missing", func(s *check.Snapshot) { s.Definition = check.Known[*check.Definition](nil) }, fail,
			"peerauthentications.security.istio.io is not defined"},
		{"policy-definition", "missing before", func(s *check.Snapshot) { s.Before, s.Definition = true, check.Known[*check.Definition](nil) }, warn,
			"peerauthentications.security.istio.io is not defined: the chart brings it"},
		{"policy-definition", "Istio's", func(s *check.Snapshot) {
			s.Definition = check.Known(&check.Definition{Versions: []string{"v1"}, Established: true, Istio: true})
		}, pass, "the definition is Istio's and serves v1"},
		{"policy-definition", "not established", func(s *check.Snapshot) { s.Definition = check.Known(&check.Definition{Versions: []string{"v1"}}) }, fail,
			"the definition, Troth's, is not established"},
		{"policy-definition", "another version", func(s *check.Snapshot) {
			s.Definition = check.Known(&check.Definition{Versions: []string{"v2"}, Established: true})
		}, fail, `the definition, Troth's, serves neither v1 nor v1beta1, but "v2"`},

		{"server-deployment", "missing", noServer, fail, missing},
		{"server-deployment", "none available", func(s *check.Snapshot) { deployment(s).Status.AvailableReplicas = 0 }, fail, "none of 2 replicas is available"},
		{"server-deployment", "halfway", func(s *check.Snapshot) {
			deployment(s).Status.UpdatedReplicas, deployment(s).Status.AvailableReplicas = 1, 2
		}, warn, "of 2 replicas 1 are of the newest version and 2 available"},
		{"server-deployment", "not taken up", func(s *check.Snapshot) { deployment(s).Generation = 7 }, warn,
			"the newest change of the Deployment has not been taken up yet"},
		{"server-replicas", "one", func(s *check.Snapshot) { deployment(s).Spec.Replicas = nil }, warn, "there is to be 1 replica"},
		{"server-replicas", "one node", func(s *check.Snapshot) { pods(s)[1].Spec.NodeName = "n1" }, warn, "all replicas that are ready share the node n1"},
		{"server-replicas", "none ready", func(s *check.Snapshot) { s.Pods = check.Known([]corev1.Pod{}) }, fail, "none of 2 replicas is ready"},
		{"server-store", "SQLite for two", func(s *check.Snapshot) {
			replaceArg(&server(s).Containers[0], "-kubernetes-store=troth-system")
		}, fail, "2 replicas with a SQLite file each"},
		{"server-store", "SQLite for one", func(s *check.Snapshot) {
			replaceArg(&server(s).Containers[0], "-kubernetes-store=troth-system")
			deployment(s).Spec.Replicas = pointer[int32](1)
		}, warn, "one replica with SQLite: there cannot be a second"},
		{"server-store", "PostgreSQL, in two words", func(s *check.Snapshot) {
			replaceArg(&server(s).Containers[0], "-kubernetes-store=troth-system", "--postgres", "/etc/url")
		}, pass, "they share a store: -postgres"},
		{"server-disruption-budget", "none", func(s *check.Snapshot) { s.Budgets = check.Known([]policyv1.PodDisruptionBudget{}) }, warn,
			"no PodDisruptionBudget is for the server"},
		{"server-disruption-budget", "nothing allowed", func(s *check.Snapshot) {
			budgets(s)[0].Status = policyv1.PodDisruptionBudgetStatus{ExpectedPods: 2, CurrentHealthy: 1}
		}, warn, "PodDisruptionBudget troth-server allows no disruption now: 1 of 2 pods are healthy"},
		{"server-disruption-budget", "no server", noServer, fail, missing},
		{"server-service", "none", func(s *check.Snapshot) { s.Service = check.Known[*corev1.Service](nil) }, fail, "there is no Service troth-system/troth-server"},
		{"server-service", "another's pods", func(s *check.Snapshot) {
			service, _ := s.Service.Get()
			service.Spec.Selector = map[string]string{"app": "x"}
		}, fail,
			"the Service selects other pods than the server's"},
		{"server-service", "no selector", func(s *check.Snapshot) { service, _ := s.Service.Get(); service.Spec.Selector = nil }, fail,
			"the Service selects other pods than the server's"},
		{"server-service", "another port", func(s *check.Snapshot) { service, _ := s.Service.Get(); service.Spec.Ports[0].Port = 443 }, fail,
			"the Service has no port 8443"},
		{"server-endpoints", "none", func(s *check.Snapshot) { s.Endpoints = check.Known([]discoveryv1.EndpointSlice{}) }, fail, "none of 0 endpoints is ready"},
		{"server-endpoints", "none ready", func(s *check.Snapshot) {
			s.Endpoints = check.Known([]discoveryv1.EndpointSlice{{Endpoints: []discoveryv1.Endpoint{{Conditions: discoveryv1.EndpointConditions{Ready: pointer(false)}}}}})
		}, fail, "none of 1 endpoint is ready"},
		{"server-network-policy", "none", func(s *check.Snapshot) { s.NetworkPolicies = check.Known([]networkingv1.NetworkPolicy{}) }, warn,
			"no NetworkPolicy is for the server: its metrics are open to every pod"},
		{"server-network-policy", "closed", func(s *check.Snapshot) {
			networkPolicies(s)[0].Spec.Ingress[0].From = []networkingv1.NetworkPolicyPeer{{}}
		}, fail, "the NetworkPolicies do not let everybody in at port 8443"},
		{"server-network-policy", "another port", func(s *check.Snapshot) {
			networkPolicies(s)[0].Spec.Ingress[0].Ports[0].Port = pointer(intstr.FromInt32(8080))
		}, fail, "the NetworkPolicies do not let everybody in at port 8443"},
		{"server-resources", "no limit", func(s *check.Snapshot) { server(s).Containers[0].Resources.Limits = nil }, warn, "missing: server (limit of memory)"},
		{"server-confinement", "root", func(s *check.Snapshot) { server(s).SecurityContext = nil }, fail, "server may run as root"},
		{"server-confinement", "privileged", func(s *check.Snapshot) { server(s).Containers[0].SecurityContext.Privileged = pointer(true) }, fail, "server is privileged"},
		{"server-confinement", "nothing said", func(s *check.Snapshot) { server(s).Containers[0].SecurityContext = nil }, fail, "server may gain privileges"},
		{"server-confinement", "capabilities", func(s *check.Snapshot) {
			server(s).Containers[0].SecurityContext.Capabilities.Add = []corev1.Capability{"NET_ADMIN"}
		}, fail,
			"server has capabilities"},
		{"server-confinement", "host network", func(s *check.Snapshot) { server(s).HostNetwork = true }, fail, "the pod shares the node's network or processes"},
		{"server-confinement", "writable", func(s *check.Snapshot) { server(s).Containers[0].SecurityContext.ReadOnlyRootFilesystem = nil }, fail,
			"server can write to its root folder"},
		{"server-restarts", "crashing", func(s *check.Snapshot) { pods(s)[0].Status.ContainerStatuses[0] = crashing("CrashLoopBackOff", 9) }, fail,
			"not running: troth-server-a/main (CrashLoopBackOff)"},
		{"server-restarts", "often", func(s *check.Snapshot) { pods(s)[0].Status.ContainerStatuses[0].RestartCount = 5 }, warn,
			"restarted often: troth-server-a/main (5)"},
		{"server-restarts", "no pod", func(s *check.Snapshot) { s.Pods = check.Known([]corev1.Pod{}) }, fail, "there is no pod of troth-server in troth-system"},
		{"server-rights", "one missing", func(s *check.Snapshot) {
			s.ServerRights = check.Known(map[check.Right]bool{
				{Verb: "patch", Group: "security.istio.io", Resource: "peerauthentications", Subresource: "status"}: false, {Verb: "list", Resource: "pods"}: true,
			})
		}, fail, "the server may not patch peerauthentications/status.security.istio.io"},
		{"operator-rights", "missing", func(s *check.Snapshot) {
			s.Mine = check.Known(map[check.Right]bool{{Verb: "revoke", Group: "troth.dev", Resource: "authorities"}: false})
		}, warn, "you may not revoke authorities.troth.dev"},
		{"key-encryption-key", "missing", func(s *check.Snapshot) { s.KeySize = check.Known(-1) }, fail,
			`there is no Secret troth-system/troth-key-encryption-key with a "key"`},
		{"key-encryption-key", "short", func(s *check.Snapshot) { s.KeySize = check.Known(16) }, fail, "the key has 16 bytes, and needs 32"},
		{"key-encryption-key", "a helper", func(s *check.Snapshot) {
			s.KeySize = check.Known(-1)
			server(s).Containers[0].Args = append(server(s).Containers[0].Args, "-key-helper=/troth-pkcs11")
		}, pass, "the keys are kept by another program: /troth-pkcs11"},
		{"ledger-size", "empty", func(s *check.Snapshot) { s.Ledger = check.Known(0) }, warn, "the ledger is empty: nothing has been issued yet"},
		{"ledger-size", "large", func(s *check.Snapshot) { s.Ledger = check.Known(20_001) }, warn, "20001 ConfigMaps of ledger, more than 20000"},
		{"ledger-size", "elsewhere", func(s *check.Snapshot) {
			replaceArg(&server(s).Containers[0], "-kubernetes-store=troth-system", "-postgres=/etc/url")
		}, pass, "the ledger is not kept in Kubernetes"},
		{"ledger-size", "no server", noServer, fail, missing},
		{"admission-policies", "missing", func(s *check.Snapshot) { s.Admission = check.Known(check.Admission{}) }, fail,
			"not in force: troth-accounts (not there), troth-folders (not there), troth-pod-certificate-requests (not there), troth-tokens (not there), troth-trust-bundle (not there)"},
		{"admission-policies", "only audits", func(s *check.Snapshot) {
			a, _ := s.Admission.Get()
			a.Bindings[0].Spec.ValidationActions = []admissionv1.ValidationAction{admissionv1.Audit}
		}, fail, "not in force: troth-tokens (not bound, or denies nothing)"},
		{"admission-policies", "for some", func(s *check.Snapshot) {
			a, _ := s.Admission.Get()
			a.Bindings[1].Spec.MatchResources = &admissionv1.MatchResources{}
		}, fail, "not in force: troth-accounts (not bound, or denies nothing)"},
		{"admission-policies", "without a signer", func(s *check.Snapshot) { replaceArg(&server(s).Containers[0], "-signer=troth.dev/svid") }, pass, "4 policies in force"},
		{"image-tags", "latest", func(s *check.Snapshot) { server(s).Containers[0].Image = "registry:5000/troth-server" }, warn, "not pinned: registry:5000/troth-server"},
		{"image-tags", "two", func(s *check.Snapshot) { agents(s).InitContainers[0].Image = "troth-agent:v0.9.0" }, fail, "several versions at once: v0.9.0, v1.0.0"},
		{"image-tags", "not installed", noAgents, unknown, "not known: the server or the agents are not installed"},
		{"versions", "another", func(s *check.Snapshot) { s.Version = "v1.1.0" }, warn, "this program is v1.1.0, and the cluster runs troth-agent:v1.0.0"},
		{"versions", "not installed", noServer, unknown, "not known: the server or the agents are not installed"},
		{"trust-domain", "another", func(s *check.Snapshot) {
			replaceArg(&agents(s).Containers[0], "-trust-domain=example.org", "-trust-domain=example.com")
		}, fail,
			`the server has "example.org", the agents "example.com", want "example.org"`},
		{"trust-domain", "not installed", noAgents, unknown, "not known: the server or the agents are not installed"},

		{"agent-daemonset", "missing", noAgents, fail, missingAgents},
		{"agent-daemonset", "halfway", func(s *check.Snapshot) { daemonset(s).Status.UpdatedNumberScheduled = 1 }, warn,
			"of 2 agents 1 are of the newest version and 2 available"},
		{"agent-daemonset", "none", func(s *check.Snapshot) { daemonset(s).Status.NumberAvailable = 0 }, fail, "none of 2 agents is available"},
		{"agent-daemonset", "nowhere", func(s *check.Snapshot) { daemonset(s).Status = appsv1.DaemonSetStatus{} }, fail, "no node is to have an agent"},
		{"agent-daemonset", "not taken up", func(s *check.Snapshot) { daemonset(s).Generation = 2 }, warn,
			"the newest change of the DaemonSet has not been taken up yet"},
		{"agent-coverage", "a node without", func(s *check.Snapshot) {
			s.Nodes = check.Known(append(nodes(s), corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n3"}}))
		}, fail,
			"1 node without an agent: n3"},
		{"agent-coverage", "Windows", func(s *check.Snapshot) {
			s.Nodes = check.Known(append(nodes(s), corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n3", Labels: map[string]string{"kubernetes.io/os": "windows"}}}))
		}, pass, "3 nodes with an agent that is ready"},
		{"agent-coverage", "not ready", func(s *check.Snapshot) { pods(s)[3].Status.Conditions = nil }, fail, "1 node whose agent is not ready: n2"},
		{"agent-coverage", "no node", func(s *check.Snapshot) { s.Nodes = check.Known([]corev1.Node{}) }, unknown, "there is no node"},
		{"agent-restarts", "no image", func(s *check.Snapshot) {
			pods(s)[2].Status.InitContainerStatuses = []corev1.ContainerStatus{crashing("ErrImagePull", 0)}
		}, fail,
			"not running: troth-agent-a/main (ErrImagePull)"},
		{"agent-node-access", "no processes", func(s *check.Snapshot) { agents(s).HostPID = false }, fail, "the agents do not see the node's processes (hostPID)"},
		{"agent-node-access", "no network", func(s *check.Snapshot) { agents(s).HostNetwork = false }, fail, "the agents are not on the node's network (hostNetwork)"},
		{"agent-node-access", "privileged", func(s *check.Snapshot) {
			agents(s).Containers[0].SecurityContext = &corev1.SecurityContext{Privileged: pointer(true)}
		}, warn, "privileged: agent"},
		{"agent-token", "another audience", func(s *check.Snapshot) {
			agents(s).Volumes[0].Projected.Sources[0].ServiceAccountToken.Audience = "troth"
		}, fail, `the token is for "troth", want spiffe://example.org`},
		{"agent-token", "too long", func(s *check.Snapshot) {
			agents(s).Volumes[0].Projected.Sources[0].ServiceAccountToken.ExpirationSeconds = pointer[int64](86400)
		}, fail, "the token lives for 86400s, and 7200s are accepted"},
		{"agent-token", "none", func(s *check.Snapshot) { agents(s).Volumes = nil }, fail, "no token is projected into the agents' pods"},
		{"agent-account", "another", func(s *check.Snapshot) { agents(s).ServiceAccountName = "default" }, fail,
			"the agents run as troth-node/default, and the server expects troth-node/troth-agent"},
		{"agent-account", "no agents", noAgents, fail, missingAgents},
		{"agent-rights", "one", func(s *check.Snapshot) {
			s.AgentRights = check.Known(map[check.Right]bool{{Verb: "list", Resource: "secrets"}: true})
		}, fail,
			"an agent may list secrets"},
		{"agent-rights", "none asked", func(s *check.Snapshot) { s.AgentRights = check.Known(map[check.Right]bool{}) }, unknown, "nobody was asked for the rights"},
		{"agent-resources", "installer", func(s *check.Snapshot) { agents(s).InitContainers[0].Resources = corev1.ResourceRequirements{} }, warn,
			"missing: cni (limit of memory), cni (request of memory)"},
		{"agent-keeper", "none", func(s *check.Snapshot) { s.Keepers = check.Known[*appsv1.DaemonSet](nil) }, fail, "there is no DaemonSet troth-node/troth-keeper"},
		{"agent-keeper", "one is down", func(s *check.Snapshot) { keepers(s).Status.NumberAvailable = 1 }, fail, "1 of 2 nodes with a keeper"},
		{"agent-keeper", "no agents", noAgents, fail, missingAgents},
		{"agent-keeper", "no capture", func(s *check.Snapshot) { replaceArg(&agents(s).Containers[0], "-capture") }, warn, "the agents capture no traffic (-capture)"},

		{"bundle-published", "nothing", func(s *check.Snapshot) { s.Published = check.Known([]check.Bundle{}) }, fail,
			"neither a ClusterTrustBundle nor a ConfigMap of Troth's has a bundle"},
		{"bundle-published", "empty", func(s *check.Snapshot) { bundles(s) }, fail, "ConfigMap troth-node/troth-bundle has no certificate"},
		{"bundle-published", "two that differ", func(s *check.Snapshot) {
			all, _ := s.Published.Get()
			s.Published = check.Known(append(all, check.Bundle{Where: "ConfigMap troth-node/troth-bundle", Authorities: all[0].Authorities[:1]}))
		}, fail, "ClusterTrustBundle troth.dev:svid:example.org and ConfigMap troth-node/troth-bundle differ"},
		{"bundle-expiry", "soon", func(s *check.Snapshot) { bundles(s, certificate(t, "", -30*day, 6*day)) }, expiring, "the authority that lives longest expires in 6d"},
		{"bundle-expiry", "a short life", func(s *check.Snapshot) { bundles(s, certificate(t, "", -time.Hour, 2*time.Hour)) }, pass,
			"the authority that lives longest is good for 2h"},
		{"bundle-expiry", "over", func(s *check.Snapshot) { bundles(s, certificate(t, "", -30*day, -3*time.Hour)) }, fail, "the authority that lives longest expired 3h ago"},
		{"bundle-expiry", "not yet", func(s *check.Snapshot) { bundles(s, certificate(t, "", time.Hour, day)) }, fail,
			"the authority that lives longest is not valid for another 1h"},
		{"bundle-expiry", "nothing", func(s *check.Snapshot) { bundles(s) }, unknown, "nothing is published"},
		{"bundle-agreement", "stale", func(s *check.Snapshot) { bundles(s, certificate(t, "", -day, 20*day)) }, fail,
			"ConfigMap troth-node/troth-bundle has DIGEST, and the server serves DIGEST"},
		{"bundle-agreement", "nothing", func(s *check.Snapshot) { s.Published = check.Known([]check.Bundle{}) }, fail, "nothing is published"},
		{"publisher", "none", func(s *check.Snapshot) { s.Publisher = check.Known[*coordinationv1.Lease](nil) }, fail, "there is no Lease troth-system/troth-publisher"},
		{"publisher", "nobody", func(s *check.Snapshot) { s.Publisher = check.Known(&coordinationv1.Lease{}) }, fail, "nobody holds the Lease troth-publisher"},
		{"publisher", "gone", func(s *check.Snapshot) {
			l, _ := s.Publisher.Get()
			l.Spec.RenewTime = pointer(metav1.NewMicroTime(now.Add(-time.Hour)))
		}, fail,
			"troth-server-a holds the Lease and has not renewed it for 1h"},
		{"server-reachable", "not asked", func(s *check.Snapshot) { s.Served = check.Unread[check.Served](check.ErrNoServer) }, unknown,
			"not known: the control plane was not asked: give --server, --trust-domain, --bundle and --token"},
		{"server-certificate", "soon", func(s *check.Snapshot) {
			s.Served = check.Known(check.Served{Certificate: certificate(t, "", -50*time.Minute, 10*time.Minute)})
		}, expiring, "it expires in 10m"},
		{"server-certificate", "none", func(s *check.Snapshot) { s.Served = check.Known(check.Served{}) }, unknown, "the server's certificate was not seen"},
		{"clock-server", "ahead", func(s *check.Snapshot) { authority(s).Propagation.KnownAt = timestamppb.New(now.Add(time.Minute)) }, fail,
			"the server's clock is 1m ahead of this one"},
		{"clock-server", "behind", func(s *check.Snapshot) { authority(s).Propagation.KnownAt = timestamppb.New(now.Add(-time.Hour)) }, fail,
			"the server's clock is 1h behind this one, or it has not counted its agents since"},
		{"clock-server", "nothing counted", func(s *check.Snapshot) { authority(s).Propagation.KnownAt = nil }, unknown,
			"the server has not counted its agents yet, and tells no time"},
		{"authority-active", "none", func(s *check.Snapshot) { authority(s).Authorities = nil }, fail, "0 authorities are active, want one"},
		{"authority-active", "soon", func(s *check.Snapshot) {
			s.Status = check.Known(status(certificate(t, "", -28*day, 2*day), func(*trothv1.AuthorityStatus) {}))
		}, expiring, "aaaaaaaaaaaa expires in 2d"},
		{"authority-active", "nonsense", func(s *check.Snapshot) { authority(s).Authorities[0].Certificate = []byte("x") }, unknown,
			"the certificate of the active authority cannot be read: x509: malformed certificate"},
		{"authority-active", "no status", func(s *check.Snapshot) { s.Status = check.Known[*trothv1.AuthorityStatus](nil) }, unknown, "the server sent no status"},
		{"authority-tainted", "one", func(s *check.Snapshot) {
			authority(s).Authorities = append(authority(s).Authorities, &trothv1.AuthorityRecord{
				Id: "bbbbbbbbbbbbbbbbbbbb", State: trothv1.AuthorityState_AUTHORITY_STATE_TAINTED})
		}, warn, "tainted, and still trusted: bbbbbbbbbbbb"},
		{"rotation-overdue", "one", func(s *check.Snapshot) {
			authority(s).Overdue = &trothv1.Blocked{Operation: "activate", AuthorityId: "bbbbbbbbbbbbbbbbbbbb", Blockers: []*trothv1.Blocker{{Obstacle: "AGENTS_MISSING"}}}
		}, expiring, "activate of bbbbbbbbbbbb is overdue: AGENTS_MISSING"},
		{"agents-reporting", "one", func(s *check.Snapshot) {
			authority(s).Propagation.Reporting = 1
			authority(s).Propagation.Waiting = []*trothv1.WaitingAgent{{Node: "n2", Lacks: "offline"}}
		}, warn, "1 of 2 agents said what they hold, waiting for n2 (offline)"},
		{"agents-reporting", "nothing counted", func(s *check.Snapshot) { authority(s).Propagation = nil }, unknown, "the server has not counted its agents yet"},
		{"agents-applied", "one", func(s *check.Snapshot) { authority(s).Propagation.Applied = 1 }, warn, "revision 4 is received by 2 and in use by 1 of 2 agents"},
		{"agents-proved", "one", func(s *check.Snapshot) {
			authority(s).Propagation.AuthorityId, authority(s).Propagation.Proved = "bbbbbbbbbbbbbbbbbbbb", 1
		}, warn, "bbbbbbbbbbbb is proved by 1 of 2 agents"},
		{"agents-proved", "all", func(s *check.Snapshot) { authority(s).Propagation.AuthorityId = "bbbbbbbbbbbbbbbbbbbb" }, pass, "bbbbbbbbbbbb is proved by 2 agents"},
		{"pod-certificates", "waiting", func(s *check.Snapshot) { requests(s)[0].Status.Conditions = nil }, fail, "not answered for more than 2m: shop/cart-1"},
		{"pod-certificates", "denied", func(s *check.Snapshot) {
			requests(s)[0].Status.Conditions = []metav1.Condition{{Type: "Denied", Reason: "PodNotFound"}}
		}, warn, "refused: shop/cart-1 (PodNotFound)"},
		{"pod-certificates", "another signer's", func(s *check.Snapshot) {
			requests(s)[0].Status.Conditions, requests(s)[0].Spec.SignerName = nil, "example.com/x"
		}, pass, "0 requests of late, none refused and none waiting"},
		{"pod-certificates", "not ours to sign", func(s *check.Snapshot) { replaceArg(&server(s).Containers[0], "-signer=troth.dev/svid") }, pass,
			"the server does not sign for troth.dev/svid"},

		{"policies-valid", "one not", cluster(nil, policy.PeerAuthentication{Ref: policy.Ref{Namespace: "shop", Name: "p"}, Problems: []policy.Problem{{Field: "f", Message: "m"}}}), fail,
			"1 policy not valid: shop/p"},
		{"policies-in-force", "shadowed", cluster(nil, peerAuthentication("shop", "a", policy.Strict, nil), peerAuthentication("shop", "b", policy.Strict, nil)), warn,
			"1 policy without effect, in whole or in part: shop/b"},
		{"policies-in-force", "selects nothing", cluster(nil, peerAuthentication("shop", "a", policy.Strict, map[string]string{"app": "x"})), warn,
			"1 policy without effect, in whole or in part: shop/a"},
		{"policy-ports", "no such port", cluster(
			[]identity.Pod{pod("shop", "cart-1", func(p *identity.Pod) { p.Labels, p.ContainerPorts = map[string]string{"app": "cart"}, []uint16{8080} })},
			policy.PeerAuthentication{Ref: policy.Ref{Namespace: "shop", Name: "p"}, Selector: map[string]string{"app": "cart"}, Ports: map[uint16]policy.Mode{80: policy.Disable}}), warn,
			"1 policy with a port that no container declares: shop/p"},
		{"strict-uncaptured", "host network", cluster([]identity.Pod{pod("shop", "a", func(p *identity.Pod) { p.HostNetwork = true }), pod("shop", "b", same)},
			peerAuthentication("istio-system", "default", policy.Strict, nil)), fail, "1 pod STRICT and not captured: shop/a"},
		{"strict-uncaptured", "by label, on one port", cluster([]identity.Pod{pod("shop", "a", func(p *identity.Pod) {
			p.Labels = map[string]string{"troth.dev/capture": "disabled", "app": "a"}
		})}, policy.PeerAuthentication{Ref: policy.Ref{Namespace: "shop", Name: "p"}, Selector: map[string]string{"app": "a"}, Mode: policy.Permissive, Ports: map[uint16]policy.Mode{80: policy.Strict}}),
			fail, "1 pod STRICT and not captured: shop/a"},
		{"strict-uncaptured", "permissive", cluster([]identity.Pod{pod("shop", "a", func(p *identity.Pod) { p.HostNetwork = true })}), pass,
			"0 pods STRICT, none of them uncaptured"},
		{"uncaptured-pods", "by label", cluster([]identity.Pod{pod("shop", "a", func(p *identity.Pod) { p.Labels = map[string]string{"troth.dev/capture": "disabled"} }), pod("shop", "b", same)}), warn,
			"1 of 2 pods not captured: shop/a"},
		{"uncaptured-pods", "the server says no more", func(s *check.Snapshot) {
			replaceArg(&server(s).Containers[0], "-uncaptured-namespaces=kube-system,troth-system,troth-node", "-uncaptured-namespaces=")
		}, warn, "1 of 2 pods not captured: kube-system/proxy"},
		{"plaintext-peers", "one", func(s *check.Snapshot) {
			s.Peers = check.Known(&trothv1.ListPlaintextPeersResponse{Agents: 2, Peers: []*trothv1.PlaintextPeer{{}}})
		}, warn, "1 connection in plaintext of late, by 2 agents"},
		{"plaintext-peers", "no report", func(s *check.Snapshot) { s.Peers = check.Known(&trothv1.ListPlaintextPeersResponse{}) }, unknown, "no agent has reported"},

		{"cni-order", "none", func(s *check.Snapshot) { s.Node = check.Known(check.Node{}) }, fail, "this node has no CNI configuration"},
		{"cni-order", "not ours", func(s *check.Snapshot) { s.Node = check.Known(check.Node{Conflist: "/c", Plugins: []string{"bridge"}}) }, fail,
			"/c does not name troth-cni, but bridge"},
		{"cni-order", "not last", func(s *check.Snapshot) {
			s.Node = check.Known(check.Node{Conflist: "/c", Plugins: []string{"bridge", "troth-cni", "portmap"}})
		}, fail,
			"troth-cni comes before portmap in /c"},
		{"cni-program", "gone", func(s *check.Snapshot) { n, _ := s.Node.Get(); n.Binary = false; s.Node = check.Known(n) }, fail,
			"the configuration names troth-cni, and the program is not there"},
		{"cni-program", "never there", func(s *check.Snapshot) { s.Node = check.Known(check.Node{}) }, fail, "the program is not there"},
		{"node-sockets", "one", func(s *check.Snapshot) { n, _ := s.Node.Get(); n.Sockets["/run/troth/workload.sock"] = false }, fail,
			"nobody listens at /run/troth/workload.sock"},
		{"node-sockets", "none looked for", func(s *check.Snapshot) { s.Node = check.Known(check.Node{}) }, unknown, "no socket was looked for"},
	}
}

func TestJudge(t *testing.T) {
	covered := make(map[string]bool)
	for _, r := range rows(t) {
		s := healthy(t)
		r.change(s)
		report := s.Judge()
		i := slices.IndexFunc(report.Results, func(result check.Result) bool { return result.ID == r.id })
		if i < 0 {
			t.Errorf("%s, %s: it was not checked", r.id, r.what)
			continue
		}
		got, level := report.Results[i], r.level
		if level == expiring {
			level = check.Warning
		}
		if got.Level != level || masked(got.Found) != r.found || got.Expiring != (r.level == expiring) {
			t.Errorf("%s, %s: %s (expiring: %v) %q, want\n%s (expiring: %v) %q", r.id, r.what,
				got.Level, got.Expiring, masked(got.Found), level, r.level == expiring, r.found)
		}
		if level != check.Pass {
			covered[r.id] = true
		}
	}
	for _, c := range check.Checks() {
		if !covered[c.ID] {
			t.Errorf("no row has a cluster in which %s does not pass", c.ID)
		}
	}
}

// TestNothingIsKnown: what was not read is no good news, for any check.
func TestNothingIsKnown(t *testing.T) {
	for _, s := range []*check.Snapshot{{OnNode: true}, {OnNode: true, Before: true}} {
		for _, r := range s.Judge().Results {
			if r.Level != check.Unknown || r.Found != "not known: it was not read" {
				t.Errorf("%s of an empty snapshot: %s %q", r.ID, r.Level, r.Found)
			}
		}
	}
}

// TestOneThingIsNotKnown takes away each fact in turn: whatever changes by that is
// unknown, and says why.
func TestOneThingIsNotKnown(t *testing.T) {
	gone := errors.New("no right to list")
	of := reflect.TypeFor[check.Snapshot]()
	for i := range of.NumField() {
		if !strings.HasPrefix(of.Field(i).Type.Name(), "Fact[") {
			continue
		}
		s := healthy(t)
		field := reflect.ValueOf(s).Elem().Field(i)
		unread(t, s, of.Field(i).Name, gone)
		if _, err := call(field); !errors.Is(err, gone) {
			t.Fatalf("%s is still known", of.Field(i).Name)
		}
		n := 0
		for _, r := range s.Judge().Results {
			switch {
			case r.Level == check.Pass && masked(r.Found) == passes[r.ID]:
			case r.Level == check.Unknown && r.Found == "not known: no right to list":
				n++
			default:
				t.Errorf("%s, while %s is not known: %s %q", r.ID, of.Field(i).Name, r.Level, r.Found)
			}
		}
		if n == 0 {
			t.Errorf("no check needs %s", of.Field(i).Name)
		}
	}
}

// call calls Get of a fact.
func call(fact reflect.Value) (any, error) {
	out := fact.MethodByName("Get").Call(nil)
	err, _ := out[1].Interface().(error)
	return out[0].Interface(), err
}

// unread makes a fact of a snapshot one that could not be read.
func unread(t *testing.T, s *check.Snapshot, field string, err error) {
	t.Helper()
	switch field {
	case "TrustDomain":
		s.TrustDomain = check.Unread[string](err)
	case "APIServer":
		s.APIServer = check.Unread[check.APIServer](err)
	case "Resources":
		s.Resources = check.Unread[map[string]bool](err)
	case "TokenIssuer":
		s.TokenIssuer = check.Unread[string](err)
	case "NodeRestriction":
		s.NodeRestriction = check.Unread[bool](err)
	case "Nodes":
		s.Nodes = check.Unread[[]corev1.Node](err)
	case "NodeLeases":
		s.NodeLeases = check.Unread[[]coordinationv1.Lease](err)
	case "Namespaces":
		s.Namespaces = check.Unread[[]corev1.Namespace](err)
	case "Mine":
		s.Mine = check.Unread[map[check.Right]bool](err)
	case "Deployment":
		s.Deployment = check.Unread[*appsv1.Deployment](err)
	case "DaemonSet":
		s.DaemonSet = check.Unread[*appsv1.DaemonSet](err)
	case "Keepers":
		s.Keepers = check.Unread[*appsv1.DaemonSet](err)
	case "Pods":
		s.Pods = check.Unread[[]corev1.Pod](err)
	case "Budgets":
		s.Budgets = check.Unread[[]policyv1.PodDisruptionBudget](err)
	case "Service":
		s.Service = check.Unread[*corev1.Service](err)
	case "Endpoints":
		s.Endpoints = check.Unread[[]discoveryv1.EndpointSlice](err)
	case "NetworkPolicies":
		s.NetworkPolicies = check.Unread[[]networkingv1.NetworkPolicy](err)
	case "KeySize":
		s.KeySize = check.Unread[int](err)
	case "ServerRights":
		s.ServerRights = check.Unread[map[check.Right]bool](err)
	case "AgentRights":
		s.AgentRights = check.Unread[map[check.Right]bool](err)
	case "Admission":
		s.Admission = check.Unread[check.Admission](err)
	case "Published":
		s.Published = check.Unread[[]check.Bundle](err)
	case "Publisher":
		s.Publisher = check.Unread[*coordinationv1.Lease](err)
	case "Ledger":
		s.Ledger = check.Unread[int](err)
	case "Requests":
		s.Requests = check.Unread[[]certificatesv1.PodCertificateRequest](err)
	case "Definition":
		s.Definition = check.Unread[*check.Definition](err)
	case "Cluster":
		s.Cluster = check.Unread[kube.Snapshot](err)
	case "Served":
		s.Served = check.Unread[check.Served](err)
	case "Status":
		s.Status = check.Unread[*trothv1.AuthorityStatus](err)
	case "Peers":
		s.Peers = check.Unread[*trothv1.ListPlaintextPeersResponse](err)
	case "Node":
		s.Node = check.Unread[check.Node](err)
	default:
		t.Fatalf("this test does not know how to take %s away", field)
	}
}

// TestPage: each check has its section in the document, each section its check, in the
// same order, and what a check is about is said in the same words.
func TestPage(t *testing.T) {
	page, err := os.ReadFile("../" + check.Page)
	if err != nil {
		t.Fatal(err)
	}
	var sections, ids []string
	for _, match := range regexp.MustCompile(`(?m)^### (\S+)$`).FindAllSubmatch(page, -1) {
		sections = append(sections, string(match[1]))
	}
	for _, c := range check.Checks() {
		ids = append(ids, c.ID)
		if !regexp.MustCompile(`^[a-z]+(-[a-z]+)*$`).MatchString(c.ID) {
			t.Errorf("%q is no ID: lower-case words with hyphens between them", c.ID)
		}
		if c.Title == "" || c.Why == "" || c.Do == "" || c.Docs() != "docs/troubleshoot.md#"+c.ID {
			t.Errorf("%s lacks a title, a reason, a remedy or a place: %+v", c.ID, c)
		}
		if !bytes.Contains(page, []byte("### "+c.ID+"\n\n**"+c.Title+".** ")) {
			t.Errorf("the section on %s does not begin with %q", c.ID, c.Title)
		}
	}
	if diff := cmp.Diff(ids, sections); diff != "" {
		t.Errorf("sections of %s (- want, + got):\n%s", check.Page, diff)
	}
	if len(ids) < 40 {
		t.Errorf("%d checks", len(ids))
	}
}
