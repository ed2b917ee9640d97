package check_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"troth.dev/troth/api"
	"troth.dev/troth/check"
	"troth.dev/troth/deploy"
	"troth.dev/troth/test/apiserver"
)

// found is what a check came to, with what differs from run to run made equal.
type found struct{ Level, Found string }

func summary(report check.Report) map[string]found {
	volatile := []struct{ pattern, by string }{
		{`sha256:[0-9a-f]{12}`, "DIGEST"}, {`\b[0-9a-f]{12}\b`, "AUTHORITY"}, {`\b\d+[smhd]\b`, "SPAN"}, {`revision \d+`, "revision N"},
	}
	all := make(map[string]found)
	for _, r := range report.Results {
		text := r.Found
		for _, v := range volatile {
			text = regexp.MustCompile(v.pattern).ReplaceAllString(text, v.by)
		}
		all[r.ID] = found{r.Level.String(), text}
	}
	return all
}

func config(kubeconfig string) check.Config {
	return check.Config{
		Kubeconfig: kubeconfig, ServerNamespace: "troth-system", NodeNamespace: "troth-node", RootNamespace: "istio-system", Version: "v1.0.0",
	}
}

func collect(t *testing.T, c check.Config) check.Report {
	t.Helper()
	s, err := check.Collect(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return s.Judge()
}

// TestCollect reads a real API server, before there is anything of Troth's in it and
// after, with a real control plane beside it.
func TestCollect(t *testing.T) {
	cluster := apiserver.Start(t)
	kubeconfig := cluster.Kubeconfig(t, cluster.Admin())
	node := cluster.CreateNode(t, "n1")

	before := config(kubeconfig)
	before.Before = true
	var read []string
	before.Progress = func(done, of int, what string) {
		read = append(read, what)
		if done != len(read) || of != 12 {
			t.Errorf("%d of %d have been read after %d", done, of, len(read))
		}
	}
	wantBefore := map[string]found{
		"api-server-version":   {"pass", "the API server has version v1.37.2"},
		"api-pod-certificates": {"pass", "certificates.k8s.io/v1/podcertificaterequests is served"},
		"api-trust-bundles":    {"pass", "certificates.k8s.io/v1/clustertrustbundles is served"},
		"api-admission":        {"pass", "admissionregistration.k8s.io/v1/validatingadmissionpolicies is served"},
		"api-endpoints":        {"pass", "discovery.k8s.io/v1/endpointslices is served"},
		"node-restriction":     {"pass", "a kubelet may not give its node a label of node-restriction.kubernetes.io"},
		"token-issuer":         {"pass", "the issuer is https://kubernetes.default.svc.cluster.local, and its keys can be fetched"},
		"clock-api-server":     {"pass", "the API server's clock is within SPAN of this one"},
		"clock-nodes":          {"unknown", "no kubelet has a lease"},
		"nodes-ready":          {"warning", "1 of 1 node not ready: n1"},
		"node-kubelets":        {"unknown", "these nodes do not tell the version of their kubelet: n1"},
		"node-kernels":         {"unknown", "these nodes do not tell the version of their kernel: n1"},
		"install-rights":       {"pass", "you may do all of 8 things"},
		"namespace-server":     {"pass", "namespace troth-system is not there yet"},
		"namespace-agents":     {"pass", "namespace troth-node is not there yet"},
		"other-meshes":         {"pass", "no namespace asks another mesh to capture its pods"},
		"policy-definition":    {"warning", "peerauthentications.security.istio.io is not defined: the chart brings it"},
		"policies-valid":       {"pass", "nothing of the kind is to be said of 0 policies"},
		"policies-in-force":    {"pass", "nothing of the kind is to be said of 0 policies"},
		"policy-ports":         {"pass", "nothing of the kind is to be said of 0 policies"},
		"strict-uncaptured":    {"pass", "0 pods STRICT, none of them uncaptured"},
		"uncaptured-pods":      {"pass", "no pod is left out, of 0 pods in the namespaces that are captured"},
	}
	if diff := cmp.Diff(wantBefore, summary(collect(t, before))); diff != "" {
		t.Errorf("before the installation (- want, + got):\n%s", diff)
	}
	if len(read) != 12 {
		t.Errorf("%d things were read: %q", len(read), read)
	}
	if n, err := cluster.Client().CoreV1().Nodes().Get(t.Context(), node.Name, metav1.GetOptions{}); err != nil || len(n.Labels) > 0 {
		t.Errorf("what was tried stayed: %v, %v", n.Labels, err)
	}

	// Nothing is there that should be.
	for id, got := range summary(collect(t, config(kubeconfig))) {
		_, platform := wantBefore[id]
		switch {
		case got.Level == "pass" && !platform && id != "agent-rights" && id != "operator-rights":
			t.Errorf("%s passes without Troth: %s", id, got.Found)
		case strings.Contains(got.Found, "it was not read"):
			t.Errorf("%s: %s", id, got.Found)
		}
	}

	installed := install(t, cluster)
	want := map[string]found{
		"clock-nodes":       {"pass", "no node's clock is more than SPAN ahead"},
		"nodes-ready":       {"pass", "1 node ready"},
		"node-kubelets":     {"pass", "every kubelet is 1.37 or later"},
		"node-kernels":      {"pass", "every kernel is 5.3 or later"},
		"namespace-server":  {"pass", "namespace troth-system enforces restricted"},
		"namespace-agents":  {"pass", "namespace troth-node enforces privileged"},
		"policy-definition": {"pass", "the definition is Troth's and serves v1, v1beta1"},

		"server-deployment":        {"pass", "2 replicas available, of the newest version"},
		"server-replicas":          {"warning", "all replicas that are ready share the node n1"},
		"server-store":             {"pass", "they share a store: -kubernetes-store"},
		"server-disruption-budget": {"pass", "PodDisruptionBudget troth-server is for the server"},
		"server-service":           {"pass", "the Service leads to the server, at port 8443"},
		"server-endpoints":         {"pass", "1 endpoint ready"},
		"server-network-policy":    {"pass", "NetworkPolicies let everybody in at port 8443"},
		"server-resources":         {"pass", "the memory of all containers is bounded"},
		"server-confinement":       {"pass", "no root, no capabilities, nothing of the node's"},
		"server-restarts":          {"pass", "the containers of 1 pod stay up"},
		"server-rights": {"failure", "the server may not attest signers.certificates.k8s.io troth.dev/svid, create configmaps in troth-system, " +
			"create subjectaccessreviews.authorization.k8s.io, create tokenreviews.authentication.k8s.io, delete configmaps in troth-system and 26 more"},
		"operator-rights":    {"pass", "you may do all of 7 things"},
		"key-encryption-key": {"pass", "the key has 32 bytes"},
		"ledger-size":        {"pass", "1 ConfigMap of ledger"},
		"admission-policies": {"failure", "not in force: troth-accounts (not there), troth-folders (not there), troth-pod-certificate-requests (not there), troth-trust-bundle (not there)"},
		"image-tags":         {"pass", "all images have the tag v1.0.0"},
		"versions":           {"pass", "all are v1.0.0"},
		"trust-domain":       {"pass", "it is example.org"},

		"agent-daemonset":   {"pass", "1 agent available, of the newest version"},
		"agent-coverage":    {"pass", "1 node with an agent that is ready"},
		"agent-restarts":    {"pass", "the containers of 1 pod stay up"},
		"agent-node-access": {"pass", "the agents have the node's network and processes, and no container is privileged"},
		"agent-token":       {"pass", "the token is for spiffe://example.org"},
		"agent-account":     {"pass", "the agents run as troth-node/troth-agent"},
		"agent-rights":      {"failure", "an agent may list secrets"},
		"agent-resources":   {"pass", "the memory of all containers is bounded"},
		"agent-keeper":      {"pass", "1 node with a keeper"},

		"bundle-published":   {"pass", "1 authority in ClusterTrustBundle troth.dev:svid:example.org and ConfigMap troth-node/troth-bundle, DIGEST"},
		"bundle-expiry":      {"pass", "the authority that lives longest is good for SPAN"},
		"bundle-agreement":   {"pass", "both are DIGEST"},
		"publisher":          {"pass", "troth-server-a publishes it"},
		"server-reachable":   {"pass", "revision N of the bundle, from spiffe://example.org/troth/server"},
		"server-certificate": {"pass", "it is good for SPAN"},
		"clock-server":       {"pass", "the server's clock is within SPAN of this one"},
		"authority-active":   {"pass", "AUTHORITY is good for SPAN"},
		"authority-tainted":  {"pass", "none is tainted"},
		"rotation-overdue":   {"pass", "nothing is overdue"},
		"agents-reporting":   {"warning", "0 of 1 agent said what they hold, waiting for n1 (offline)"},
		"agents-applied":     {"warning", "revision N is received by 0 and in use by 0 of 1 agent, waiting for n1 (offline)"},
		"agents-proved":      {"pass", "no authority is prepared"},
		"pod-certificates":   {"pass", "0 requests of late, none refused and none waiting"},

		"policies-valid":    {"pass", "nothing of the kind is to be said of 2 policies"},
		"policies-in-force": {"warning", "1 policy without effect, in whole or in part: shop/nobody"},
		"policy-ports":      {"pass", "nothing of the kind is to be said of 2 policies"},
		"strict-uncaptured": {"failure", "1 pod STRICT and not captured: shop/logs"},
		"uncaptured-pods":   {"warning", "1 of 2 pods not captured: shop/logs"},
		"plaintext-peers":   {"unknown", "no agent has reported"},

		"cni-order":    {"pass", "CNI/10-calico.conflist: calico, portmap, troth-cni"},
		"cni-program":  {"pass", "the program is there"},
		"node-sockets": {"failure", "nobody listens at /run/troth-agent/cni.sock"},
	}
	for id, f := range wantBefore {
		if _, ok := want[id]; !ok && id != "install-rights" {
			want[id] = f
		}
	}

	root, conf := thisNode(t)
	after := config(kubeconfig)
	after.Server, after.NodeRoot, after.CNIFolder, after.CNIPrograms = &installed, root, "/etc/cni/net.d", "/opt/cni/bin"
	// The control plane counts its agents by and by.
	var got map[string]found
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
		got = summary(collect(t, after))
		if got["clock-server"].Level == "pass" && got["agents-reporting"].Level == "warning" {
			break
		}
	}
	got["cni-order"] = found{got["cni-order"].Level, strings.Replace(got["cni-order"].Found, conf, "CNI", 1)}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("after the installation (- want, + got):\n%s", diff)
	}

	t.Run("a bundle that is out of date", func(t *testing.T) {
		stale := installed
		stale.Bundles = x509bundle.FromX509Authorities(stale.TrustDomain, []*x509.Certificate{certificate(t, "", -day, day)})
		c := config(kubeconfig)
		c.Server = &stale
		got := summary(collect(t, c))["server-reachable"]
		if got.Level != "unknown" || !strings.Contains(got.Found, "the control plane says Unavailable: ") {
			t.Errorf("server-reachable: %v", got)
		}
	})
	t.Run("somebody without rights", func(t *testing.T) {
		pod := cluster.CreatePod(t, apiserver.Pod{Namespace: "shop", Name: "nobody", ServiceAccount: "cart", Node: "n1"})
		c := config(cluster.Kubeconfig(t, cluster.Bearer(cluster.AutomountToken(t, pod))))
		for id, got := range summary(collect(t, c)) {
			switch id {
			case "api-server-version", "api-pod-certificates", "api-trust-bundles", "api-admission", "api-endpoints", "token-issuer", "clock-api-server":
				// Everybody may ask for these.
				if got.Level != "pass" {
					t.Errorf("%s: %v", id, got)
				}
			case "operator-rights":
				if got.Level != "warning" {
					t.Errorf("%s: %v", id, got)
				}
			default:
				if got.Level != "unknown" {
					t.Errorf("%s: %v", id, got)
				}
			}
		}
	})
}

// TestCollectFromNobody: an API server that takes connections and says nothing holds
// nobody up for longer than it may.
func TestCollectFromNobody(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	content := fmt.Sprintf(`{apiVersion: v1, kind: Config, current-context: x, contexts: [{name: x, context: {cluster: x, user: x}}],
clusters: [{name: x, cluster: {server: "https://%s"}}], users: [{name: x, user: {token: x}}]}`, silent.Addr())
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	c := config(path)
	c.Patience = 100 * time.Millisecond
	began := time.Now()
	for id, got := range summary(collect(t, c)) {
		if got.Level != "unknown" {
			t.Errorf("%s: %v", id, got)
		}
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("it took %s", took)
	}

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := check.Collect(ctx, c); err == nil || err.Error() != context.Canceled.Error() {
		t.Errorf("Collect of a context that has ended: %v", err)
	}
	for _, c := range []check.Config{{Kubeconfig: path}, {Kubeconfig: path, ServerNamespace: "a", NodeNamespace: "b", RootNamespace: "c", NodeRoot: "/"}, config(path + "x")} {
		if _, err := check.Collect(t.Context(), c); err == nil {
			t.Errorf("Collect takes %+v", c)
		}
	}
}

// install creates what the chart creates, as far as checks look at it, with a few
// mistakes in it, and starts a control plane. It returns an operator's way there.
func install(t *testing.T, cluster *apiserver.Cluster) api.Config {
	t.Helper()
	client, admin := cluster.Client(), metav1.CreateOptions{}
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, level := range map[string]string{"troth-system": "restricted", "troth-node": "privileged", "istio-system": "", "shop": ""} {
		namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
		if level != "" {
			namespace.Labels = map[string]string{"pod-security.kubernetes.io/enforce": level}
		}
		must(client.CoreV1().Namespaces().Create(t.Context(), namespace, admin))
	}
	for _, account := range [][2]string{{"troth-system", "troth-server"}, {"troth-node", "troth-agent"}, {"shop", "cart"}, {"troth-system", "operator"}} {
		cluster.CreateServiceAccount(t, account[0], account[1])
	}
	s := healthy(t)

	node, err := client.CoreV1().Nodes().Get(t.Context(), "n1", metav1.GetOptions{})
	must(nil, err)
	node.Status.NodeInfo = nodes(s)[0].Status.NodeInfo
	node.Status.Conditions = nodes(s)[0].Status.Conditions
	must(client.CoreV1().Nodes().UpdateStatus(t.Context(), node, metav1.UpdateOptions{}))
	lease := func(namespace, name, holder string) {
		now := metav1.NowMicro()
		must(client.CoordinationV1().Leases(namespace).Create(t.Context(), &coordinationv1.Lease{
			ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: coordinationv1.LeaseSpec{HolderIdentity: &holder, RenewTime: &now},
		}, admin))
	}
	if _, err := client.CoreV1().Namespaces().Get(t.Context(), corev1.NamespaceNodeLease, metav1.GetOptions{}); err != nil {
		cluster.CreateNamespace(t, corev1.NamespaceNodeLease)
	}
	lease(corev1.NamespaceNodeLease, "n1", "n1")
	lease("troth-system", "troth-publisher", "troth-server-a")

	// As the healthy cluster of the tables has them, and as controllers would leave them.
	d := deployment(s)
	status := d.Status
	status.ObservedGeneration, status.ReadyReplicas = 1, 2
	d, err = client.AppsV1().Deployments(d.Namespace).Create(t.Context(), d, admin)
	must(nil, err)
	d.Status = status
	must(client.AppsV1().Deployments(d.Namespace).UpdateStatus(t.Context(), d, metav1.UpdateOptions{}))
	for _, a := range []*appsv1.DaemonSet{daemonset(s), keepers(s)} {
		a.Spec.Selector = &metav1.LabelSelector{MatchLabels: a.Spec.Template.Labels}
		a.Spec.Template.Name = ""
		a, err = client.AppsV1().DaemonSets(a.Namespace).Create(t.Context(), a, admin)
		must(nil, err)
		a.Status = appsv1.DaemonSetStatus{ObservedGeneration: 1, DesiredNumberScheduled: 1, UpdatedNumberScheduled: 1, NumberAvailable: 1, CurrentNumberScheduled: 1}
		must(client.AppsV1().DaemonSets(a.Namespace).UpdateStatus(t.Context(), a, metav1.UpdateOptions{}))
	}
	b := &budgets(s)[0]
	budget := b.Status
	b, err = client.PolicyV1().PodDisruptionBudgets(b.Namespace).Create(t.Context(), b, admin)
	must(nil, err)
	b.Status = budget
	must(client.PolicyV1().PodDisruptionBudgets(b.Namespace).UpdateStatus(t.Context(), b, metav1.UpdateOptions{}))
	service, _ := s.Service.Get()
	must(client.CoreV1().Services(service.Namespace).Create(t.Context(), service, admin))
	must(client.DiscoveryV1().EndpointSlices("troth-system").Create(t.Context(), &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: "troth-server-x", Labels: map[string]string{discoveryv1.LabelServiceName: "troth-server"}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{"10.1.2.3"}, Conditions: discoveryv1.EndpointConditions{Ready: pointer(true)}}},
	}, admin))
	n := networkPolicies(s)[0]
	n.ObjectMeta = metav1.ObjectMeta{Name: "troth-server"}
	must(client.NetworkingV1().NetworkPolicies("troth-system").Create(t.Context(), &n, admin))

	key := make([]byte, 32)
	rand.Read(key)
	must(client.CoreV1().Secrets("troth-system").Create(t.Context(), &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: "troth-key-encryption-key"}, Data: map[string][]byte{"key": key},
	}, admin))
	must(client.CoreV1().ConfigMaps("troth-system").Create(t.Context(), &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "troth-ledger-x", Labels: map[string]string{"troth.dev/store": "ledger"}},
	}, admin))
	must(client.AdmissionregistrationV1().ValidatingAdmissionPolicies().Create(t.Context(), &admissionv1.ValidatingAdmissionPolicy{
		ObjectMeta: metav1.ObjectMeta{Name: "troth-tokens"},
		Spec: admissionv1.ValidatingAdmissionPolicySpec{
			FailurePolicy: pointer(admissionv1.Fail),
			MatchConstraints: &admissionv1.MatchResources{ResourceRules: []admissionv1.NamedRuleWithOperations{{
				RuleWithOperations: admissionv1.RuleWithOperations{
					Operations: []admissionv1.OperationType{admissionv1.Create},
					Rule:       admissionv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"endpoints"}},
				},
			}}},
			Validations: []admissionv1.Validation{{Expression: "true"}},
		},
	}, admin))
	must(client.AdmissionregistrationV1().ValidatingAdmissionPolicyBindings().Create(t.Context(), &admissionv1.ValidatingAdmissionPolicyBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "troth-tokens"},
		Spec: admissionv1.ValidatingAdmissionPolicyBindingSpec{
			PolicyName: "troth-tokens", ValidationActions: []admissionv1.ValidationAction{admissionv1.Deny},
		},
	}, admin))

	role := func(name, namespace, account string, rules ...rbacv1.PolicyRule) {
		must(client.RbacV1().ClusterRoles().Create(t.Context(), &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: name}, Rules: rules}, admin))
		must(client.RbacV1().ClusterRoleBindings().Create(t.Context(), &rbacv1.ClusterRoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: name},
			Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: namespace, Name: account}},
		}, admin))
	}
	role("agents", "troth-node", "troth-agent", rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"secrets"}, Verbs: []string{"list"}})
	role("operators", "troth-system", "operator", rbacv1.PolicyRule{APIGroups: []string{"troth.dev"}, Resources: []string{"*"}, Verbs: []string{"*"}})

	pod := func(namespace, name, account string, hostNetwork bool) *corev1.Pod {
		made := cluster.CreatePod(t, apiserver.Pod{
			Namespace: namespace, Name: name, ServiceAccount: account, Node: "n1", HostNetwork: hostNetwork, Pending: true,
			Labels: map[string]string{"app.kubernetes.io/name": account},
		})
		made.Status.Conditions = append(made.Status.Conditions, corev1.PodCondition{Type: corev1.PodReady, Status: corev1.ConditionTrue})
		return cluster.StartPod(t, made, "10.64.0."+fmt.Sprint(len(name)))
	}
	pod("troth-node", "troth-agent-a", "troth-agent", true)
	pod("shop", "cart-1", "cart", false)
	pod("shop", "logs", "cart", true)
	// Pod Security does not let it in as it is.
	labels := []byte(`{"metadata":{"labels":{"pod-security.kubernetes.io/enforce":"privileged"}}}`)
	relabel := func(content []byte) {
		must(client.CoreV1().Namespaces().Patch(t.Context(), "troth-system", "application/merge-patch+json", content, metav1.PatchOptions{}))
	}
	relabel(labels)
	pod("troth-system", "troth-server-a", "troth-server", false)
	operator := pod("troth-system", "operator", "operator", false)
	relabel(bytes.Replace(labels, []byte("privileged"), []byte("restricted"), 1))

	definition, err := deploy.CRDs.ReadFile("crds/peerauthentications.security.istio.io.yaml")
	must(nil, err)
	cluster.ApplyCRD(t, definition)
	cluster.ApplyPolicy(t, "v1", "istio-system", "default", "{mtls: {mode: STRICT}}")
	cluster.ApplyPolicy(t, "v1", "shop", "nobody", "{selector: {matchLabels: {app: nobody}}}")

	address, bundle := startServer(t, cluster, key)
	must(client.CertificatesV1().ClusterTrustBundles().Create(t.Context(), &certificatesv1.ClusterTrustBundle{
		ObjectMeta: metav1.ObjectMeta{Name: "troth.dev:svid:example.org"},
		Spec:       certificatesv1.ClusterTrustBundleSpec{SignerName: "troth.dev/svid", TrustBundle: pemOf(bundle)},
	}, admin))
	must(client.CoreV1().ConfigMaps("troth-node").Create(t.Context(), &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "troth-bundle"}, Data: map[string]string{"bundle.pem": pemOf(bundle)},
	}, admin))
	token := cluster.Token(t, operator, "spiffe://example.org", 10*time.Minute)
	return api.Config{
		Address: address, TrustDomain: bundle.TrustDomain(), Bundles: bundle, Token: func() (string, error) { return token, nil },
	}
}

func pemOf(bundle *x509bundle.Bundle) string {
	var content strings.Builder
	for _, c := range bundle.X509Authorities() {
		_ = pem.Encode(&content, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}) // a Builder takes all
	}
	return content.String()
}

// startServer builds and starts a control plane that ends with the test, and returns
// its address and its trust bundle.
func startServer(t *testing.T, cluster *apiserver.Cluster, key []byte) (string, *x509bundle.Bundle) {
	t.Helper()
	dir := t.TempDir()
	program, keyFile, bundleFile := filepath.Join(dir, "troth-server"), filepath.Join(dir, "key"), filepath.Join(dir, "bundle.pem")
	if err := os.WriteFile(keyFile, key, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("go", "build", "-o", program, "troth.dev/troth/cmd/troth-server").CombinedOutput(); err != nil {
		t.Fatalf("build troth-server: %v\n%s", err, out)
	}
	server := exec.Command(program, "-trust-domain=example.org", "-agents=troth-node/troth-agent", "-listen=127.0.0.1:0", "-health=127.0.0.1:0",
		"-database="+filepath.Join(dir, "troth.db"), "-key-encryption-key="+keyFile, "-bundle="+bundleFile,
		"-kubeconfig="+cluster.Kubeconfig(t, cluster.Admin()))
	server.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	log, err := server.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	address, ended := make(chan string, 1), make(chan struct{})
	go func() {
		defer close(ended)
		for lines := bufio.NewScanner(log); lines.Scan(); {
			var line struct {
				Message string `json:"msg"`
				Address string `json:"address"`
			}
			if err := json.Unmarshal(lines.Bytes(), &line); err == nil && line.Message == "serving" {
				address <- line.Address
			}
		}
	}()
	t.Cleanup(func() {
		_ = server.Process.Kill() // it may have ended
		<-ended
		_ = server.Wait() // it was killed
	})
	select {
	case at := <-address:
		td := spiffeid.RequireTrustDomainFromString("example.org")
		for deadline := time.Now().Add(time.Minute); ; {
			bundle, err := x509bundle.Load(td, bundleFile)
			if err == nil {
				return at, bundle
			}
			if time.Now().After(deadline) {
				t.Fatal(err)
			}
		}
	case <-ended:
		t.Fatal("the server ended")
	case <-time.After(time.Minute):
		t.Fatal("the server does not serve")
	}
	return "", nil
}

// thisNode makes the files of a node, on which one socket is missing, and returns where
// they are and where the CNI configurations are.
func thisNode(t *testing.T) (root, conf string) {
	t.Helper()
	// Not t.TempDir: the path of a socket is 107 bytes at most.
	root, err := os.MkdirTemp("", "node-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	conf = filepath.Join(root, "etc/cni/net.d")
	for _, folder := range []string{conf, filepath.Join(root, "opt/cni/bin"), filepath.Join(root, "run/troth")} {
		if err := os.MkdirAll(folder, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, content := range map[string]string{
		"00-readme.txt":      "not for the runtime",
		"10-calico.conflist": `{"cniVersion":"1.0.0","name":"k8s","plugins":[{"type":"calico"},{"type":"portmap"},{"type":"troth-cni"}]}`,
		"99-other.conf":      `{"type":"bridge"}`,
	} {
		if err := os.WriteFile(filepath.Join(conf, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "opt/cni/bin/troth-cni"), []byte("x"), 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(root, "run/troth/workload.sock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return root, conf
}
