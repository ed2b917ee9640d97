package kube_test

import (
	"bytes"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"troth.dev/troth/deploy"
	"troth.dev/troth/identity"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/kube"
	"troth.dev/troth/policy"
	"troth.dev/troth/test/apiserver"
)

const policyPath = "/apis/security.istio.io/"

// installPolicies lets the cluster know policies until the test ends, by our own
// definition as change has it.
func installPolicies(t testing.TB, change ...func(spec map[string]any)) {
	t.Helper()
	name := cluster.ApplyCRD(t, policyDefinition(t, change...))
	t.Cleanup(func() { cluster.DeleteCRD(t, name) })
}

func policyDefinition(t testing.TB, change ...func(spec map[string]any)) []byte {
	t.Helper()
	content, err := deploy.CRDs.ReadFile("crds/peerauthentications.security.istio.io.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return apiserver.ChangeCRD(t, content, change...)
}

// only leaves one version.
func only(version string) func(map[string]any) {
	return func(spec map[string]any) {
		for _, v := range spec["versions"].([]any) {
			if v := v.(map[string]any); v["name"] == version {
				v["storage"] = true
				spec["versions"] = []any{v}
				return
			}
		}
	}
}

// serving stops all versions but these.
func serving(versions ...string) func(map[string]any) {
	return func(spec map[string]any) {
		for _, v := range spec["versions"].([]any) {
			v := v.(map[string]any)
			v["served"] = strings.Contains(strings.Join(versions, " ")+" ", v["name"].(string)+" ")
		}
	}
}

// apply creates or changes a policy, whose spec is YAML.
func apply(t testing.TB, namespace, name, spec string) *unstructured.Unstructured {
	t.Helper()
	return cluster.ApplyPolicy(t, "v1", namespace, name, spec)
}

func relabel(t testing.TB, pod *corev1.Pod, app string) {
	t.Helper()
	patch := fmt.Sprintf(`{"metadata": {"labels": {"app": %q}}}`, app)
	_, err := cluster.Client().CoreV1().Pods(pod.Namespace).Patch(t.Context(), pod.Name, "application/merge-patch+json", []byte(patch), metav1.PatchOptions{})
	if err != nil {
		t.Fatal(err)
	}
}

// inForce says whether all of a node's pods, of which there are some, have this in
// force.
func inForce(want string) func([]policy.Assignment) bool {
	return func(pods []policy.Assignment) bool {
		for _, pod := range pods {
			if written(pod.Policy) != want {
				return false
			}
		}
		return len(pods) > 0
	}
}

// running says whether a node has these pods and no others, and all of them run.
func running(want ...*corev1.Pod) func([]policy.Assignment) bool {
	return func(pods []policy.Assignment) bool {
		return has(want...)(pods) && !slices.ContainsFunc(pods, func(pod policy.Assignment) bool {
			return pod.Pod.Phase != identity.PodRunning
		})
	}
}

// written is the mode, who decides, and the ports that differ.
func written(e *policy.Effective) string {
	s := fmt.Sprint(e.Mode)
	if !e.DecidedBy.IsZero() {
		s += " by " + e.DecidedBy.Name
	}
	for _, p := range e.Ports {
		s += fmt.Sprintf(", %d %v by %s", p.Port, p.Mode, e.PortsBy.Name)
	}
	return s
}

func onNode(t testing.TB, pods *kube.Pods, node *corev1.Node) *latest.Value[[]policy.Assignment] {
	t.Helper()
	value, release := pods.OnNode(node.Name)
	t.Cleanup(release)
	return value
}

// log is what was logged, for tests that read it.
type log struct {
	mu      sync.Mutex
	content bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.content.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.content.String()
}

func (l *log) count(text string) int { return strings.Count(l.String(), text) }

func TestPolicies(t *testing.T) {
	installPolicies(t)
	here, there := newWorld(t), newWorld(t)
	root := cluster.CreateNamespace(t, "root-")
	pods, _ := runPods(t, kube.PodsConfig{RootNamespace: root})
	value, elsewhere := onNode(t, pods, here.node), onNode(t, pods, there.node)
	one, two := here.pod(t, "cart-"), here.pod(t, "cart-")
	await(t, "two pods", value, running(one, two))
	await(t, "one pod", elsewhere, running(there.pod(t, "cart-")))

	// Each step is what somebody does, and what is in force then for the two pods
	// here and the one there. Whoever is not concerned is not told, and who is
	// learns of all at once.
	was := "PERMISSIVE"
	wasThere := was
	for _, step := range []struct {
		name, want, there string
		do                func()
	}{
		{"a policy of the namespace", "STRICT by all", "PERMISSIVE", func() {
			apply(t, here.namespace, "all", "{mtls: {mode: STRICT}}")
		}},
		{"one with a selector and a port", "DISABLE by cart-a, 8080 STRICT by cart-a", "PERMISSIVE", func() {
			apply(t, here.namespace, "cart-a", "{selector: {matchLabels: {app: cart}}, mtls: {mode: DISABLE}, portLevelMtls: {8080: {mode: STRICT}}}")
		}},
		{"a younger one, then the older one changes", "STRICT by all, 8080 DISABLE by cart-a", "PERMISSIVE", func() {
			apply(t, here.namespace, "cart-b", "{selector: {matchLabels: {app: cart}}, mtls: {mode: PERMISSIVE}}")
			apply(t, here.namespace, "cart-a", "{selector: {matchLabels: {app: cart}}, portLevelMtls: {8080: {mode: DISABLE}}}")
		}},
		{"the older one is deleted", "PERMISSIVE by cart-b", "PERMISSIVE", func() {
			cluster.DeletePolicy(t, here.namespace, "cart-a")
		}},
		{"the mesh's", "PERMISSIVE by cart-b", "STRICT by mesh", func() {
			apply(t, root, "mesh", "{mtls: {mode: STRICT}}")
		}},
		{"one with a selector in the root namespace, then none here", "STRICT by mesh", "STRICT by mesh", func() {
			apply(t, root, "selective", "{selector: {matchLabels: {app: cart}}, mtls: {mode: DISABLE}}")
			cluster.DeletePolicy(t, here.namespace, "all")
			cluster.DeletePolicy(t, here.namespace, "cart-b")
		}},
		{"the mesh's is deleted", "PERMISSIVE", "PERMISSIVE", func() {
			cluster.DeletePolicy(t, root, "mesh")
		}},
	} {
		_, changed := value.Load()
		_, changedThere := elsewhere.Load()
		step.do()
		await(t, step.name, value, inForce(step.want))
		await(t, step.name+", elsewhere", elsewhere, inForce(step.there))
		if ended(changed) && step.want == was {
			t.Errorf("%s: the node was told, and nothing changed for it", step.name)
		}
		if ended(changedThere) && step.there == wasThere {
			t.Errorf("%s: the node elsewhere was told, and nothing changed for it", step.name)
		}
		was, wasThere = step.want, step.there
	}

	t.Run("a pod is relabelled", func(t *testing.T) {
		apply(t, here.namespace, "cart", "{selector: {matchLabels: {app: cart}}, mtls: {mode: STRICT}}")
		await(t, "both selected", value, inForce("STRICT by cart"))
		relabel(t, one, "till")
		got := await(t, "one selected", value, func(pods []policy.Assignment) bool {
			return written(pods[0].Policy) != written(pods[1].Policy)
		})
		for _, pod := range got {
			want := "STRICT by cart"
			if pod.Pod.UID == string(one.UID) {
				want = "PERMISSIVE"
			}
			if got := written(pod.Policy); got != want {
				t.Errorf("pod %q has %s, want %s", pod.Pod.Name, got, want)
			}
		}
		relabel(t, one, "cart")
		await(t, "both selected again", value, inForce("STRICT by cart"))
	})

	t.Run("all pods of a node at once", func(t *testing.T) {
		_, changed := value.Load()
		apply(t, here.namespace, "cart", "{selector: {matchLabels: {app: cart}}, mtls: {mode: DISABLE}}")
		<-changed
		if got, _ := value.Load(); !inForce("DISABLE by cart")(got) {
			t.Errorf("the first news is %v, want every pod to have the policy", got)
		}
	})
}

// The root namespace is Istio's unless somebody says otherwise.
func TestRootNamespaceIsIstios(t *testing.T) {
	installPolicies(t)
	w := newWorld(t)
	w.pod(t, "cart-")
	const root = "istio-system"
	// A run of this test before may have left it.
	_, err := cluster.Client().CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: root}}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	apply(t, root, "mesh", "{mtls: {mode: STRICT}}")
	pods, _ := runPods(t, kube.PodsConfig{})
	if got, _ := onNode(t, pods, w.node).Load(); !inForce("STRICT by mesh")(got) {
		t.Errorf("OnNode() has %v, want the policy of istio-system in force", got)
	}
}

// Policies that are there from the start are there before any pod is shown.
func TestPoliciesBeforePods(t *testing.T) {
	installPolicies(t)
	w := newWorld(t)
	w.pod(t, "cart-")
	apply(t, w.namespace, "all", "{mtls: {mode: STRICT}}")

	client, wire := client(t, cluster.Admin())
	log := new(log)
	pods, err := kube.NewPods(kube.PodsConfig{Client: client, Dynamic: client.Dynamic, Agents: agents, Log: slog.New(slog.NewTextHandler(log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	// A 404 says nothing of whether there are policies.
	wire.misroute(policyPath)
	run(t, pods, wire)
	value := onNode(t, pods, w.node)
	eventually(t, "policies were asked for", func() bool { return wire.count("GET", policyPath+"v1/peerauthentications") > 2 })
	if got, _ := value.Load(); got != nil || ended(pods.Synced()) {
		t.Errorf("OnNode() = %v without policies, synced: %t; want nothing to be known", got, ended(pods.Synced()))
	}
	if n := log.count("policies cannot be read now"); n != 1 {
		t.Errorf("it was logged %d times that policies cannot be read, want once:\n%s", n, log.String())
	}
	wire.misroute("")
	<-pods.Synced()
	if got, _ := value.Load(); !inForce("STRICT by all")(got) {
		t.Errorf("OnNode() = %v at first, want the policy in force", got)
	}
}

// The kind may be installed, removed and installed again while Troth runs.
func TestPoliciesComeLate(t *testing.T) {
	w := newWorld(t)
	w.pod(t, "cart-")
	pods, wire := runPods(t, kube.PodsConfig{})
	value := onNode(t, pods, w.node)
	await(t, "no policies", value, inForce("PERMISSIVE"))
	if n := wire.count("WATCH", policyPath+"v1/peerauthentications"); n != 0 {
		t.Errorf("policies were asked for %d times in a cluster without them, want never", n)
	}
	for range 2 {
		name := cluster.ApplyCRD(t, policyDefinition(t))
		apply(t, w.namespace, "all", "{mtls: {mode: STRICT}}")
		await(t, "the first policy", value, inForce("STRICT by all"))
		cluster.DeleteCRD(t, name)
		await(t, "no policies any more", value, inForce("PERMISSIVE"))
	}
	if n := wire.count("WATCH", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"); n != 1 {
		t.Errorf("definitions were watched %d times, want once", n)
	}
}

// The kind is removed while the policies themselves cannot be seen.
func TestPoliciesGoUnseen(t *testing.T) {
	for name, blind := range map[string]func(*testing.T, *wire){
		"and all watches break": func(_ *testing.T, wire *wire) {
			wire.misroute(policyPath)
			wire.sever()
			wire.mend()
		},
		"and the definition is watched": func(t *testing.T, wire *wire) {
			wire.misroute(policyPath + "v1beta1")
			cluster.ApplyCRD(t, policyDefinition(t, serving("v1beta1")))
		},
	} {
		t.Run(name, func(t *testing.T) {
			definition := cluster.ApplyCRD(t, policyDefinition(t))
			w := newWorld(t)
			w.pod(t, "cart-")
			apply(t, w.namespace, "all", "{mtls: {mode: STRICT}}")
			pods, wire := runPods(t, kube.PodsConfig{})
			value := onNode(t, pods, w.node)
			blind(t, wire)
			eventually(t, "a policy that is not found", func() bool { return wire.total("GET", policyPath) > 1 })
			if got, _ := value.Load(); !inForce("STRICT by all")(got) {
				t.Errorf("OnNode() = %v, want what it was", got)
			}
			cluster.DeleteCRD(t, definition)
			await(t, "no policies any more", value, inForce("PERMISSIVE"))
		})
	}
}

func TestPoliciesOfAnOlderVersion(t *testing.T) {
	installPolicies(t, only("v1beta1"))
	w := newWorld(t)
	w.pod(t, "cart-")
	cluster.ApplyPolicy(t, "v1beta1", w.namespace, "all", "{mtls: {mode: STRICT}}")
	pods, wire := runPods(t, kube.PodsConfig{})
	if got, _ := onNode(t, pods, w.node).Load(); !inForce("STRICT by all")(got) {
		t.Errorf("OnNode() = %v, want the policy in force", got)
	}
	if n := wire.count("WATCH", policyPath+"v1/peerauthentications"); n != 0 {
		t.Errorf("a version that is not served was asked for %d times, want never", n)
	}
}

// The version that is watched ceases to be served, and then every version that is
// known. Neither changes what is in force.
func TestPoliciesChangeVersion(t *testing.T) {
	installPolicies(t)
	w, marker := newWorld(t), newWorld(t)
	w.pod(t, "cart-")
	marker.pod(t, "cart-")
	apply(t, w.namespace, "all", "{mtls: {mode: STRICT}}")
	pods, wire := runPods(t, kube.PodsConfig{})
	value, other := onNode(t, pods, w.node), onNode(t, pods, marker.node)
	before, changed := value.Load()
	if !inForce("STRICT by all")(before) {
		t.Fatalf("OnNode() = %v, want the policy in force", before)
	}

	cluster.ApplyCRD(t, policyDefinition(t, serving("v1beta1")))
	cluster.ApplyPolicy(t, "v1beta1", marker.namespace, "first", "{mtls: {mode: DISABLE}}")
	await(t, "a policy in the older version", other, inForce("DISABLE by first"))
	if wire.count("WATCH", policyPath+"v1beta1/peerauthentications") == 0 {
		t.Error("the older version was not watched")
	}

	// Now the cluster serves only what nobody here has heard of.
	cluster.ApplyCRD(t, policyDefinition(t, serving("v2"), func(spec map[string]any) {
		versions := spec["versions"].([]any)
		v2 := (&unstructured.Unstructured{Object: versions[0].(map[string]any)}).DeepCopy().Object
		v2["name"], v2["served"], v2["storage"] = "v2", true, false
		spec["versions"] = append(versions, v2)
	}))
	cluster.ApplyPolicy(t, "v2", marker.namespace, "second", "{selector: {matchLabels: {app: cart}}, mtls: {mode: STRICT}}")
	cluster.ApplyCRD(t, policyDefinition(t))
	await(t, "a policy in the newer version", other, inForce("STRICT by second"))
	if ended(changed) {
		after, _ := value.Load()
		t.Errorf("OnNode() changed from %v to %v, and no policy of the node did", before, after)
	}
}

// What cannot be asked for stays as it was, also when the answer looks as if there
// were nothing.
func TestPoliciesInOutage(t *testing.T) {
	installPolicies(t)
	w := newWorld(t)
	w.pod(t, "cart-")
	apply(t, w.namespace, "all", "{mtls: {mode: STRICT}}")
	pods, wire := runPods(t, kube.PodsConfig{})
	value := onNode(t, pods, w.node)
	_, changed := value.Load()

	wire.misroute(policyPath)
	wire.sever()
	wire.mend()
	asked := wire.count("GET", policyPath+"v1/peerauthentications")
	eventually(t, "two lists that are not found", func() bool {
		return wire.count("GET", policyPath+"v1/peerauthentications") > asked+1
	})
	if ended(changed) {
		t.Error("a 404 changed what is in force")
	}

	// The wire is cut, so that the deletion cannot be seen.
	wire.sever()
	wire.misroute("")
	cluster.DeletePolicy(t, w.namespace, "all")
	cluster.StopAPIServer(t)
	wire.mend()
	watches := wire.count("WATCH", "/api/v1/pods")
	eventually(t, "a watch that fails", func() bool { return wire.count("WATCH", "/api/v1/pods") > watches })
	if got, _ := value.Load(); ended(changed) || !inForce("STRICT by all")(got) {
		t.Errorf("OnNode() during the outage = %v, want what it was", got)
	}
	cluster.StartAPIServer(t)
	await(t, "what is there after the outage", value, inForce("PERMISSIVE"))
	apply(t, w.namespace, "new", "{mtls: {mode: STRICT}}")
	await(t, "a policy created after the outage", value, inForce("STRICT by new"))
}

// A policy that makes no sense is STRICT for what it selects, and harms no other.
func TestInvalidPolicies(t *testing.T) {
	installPolicies(t, apiserver.AnyObject)
	w, other := newWorld(t), newWorld(t)
	w.pod(t, "cart-")
	other.pod(t, "cart-")
	apply(t, w.namespace, "typo", "{selector: {matchLabels: {app: cart}}, mtls: {mode: PERMISIVE}}")
	apply(t, other.namespace, "all", "{mtls: {mode: DISABLE}}")
	apply(t, other.namespace, "list", "[]")
	pods, _ := runPods(t, kube.PodsConfig{})
	value, elsewhere := onNode(t, pods, w.node), onNode(t, pods, other.node)
	await(t, "a mode that nobody knows", value, inForce("STRICT by typo"))
	await(t, "a policy beside it", elsewhere, inForce("DISABLE by all"))
	apply(t, other.namespace, "all", "{mtls: strict}")
	await(t, "a policy that became invalid", elsewhere, inForce("STRICT by all"))
	apply(t, w.namespace, "typo", "{selector: {matchLabels: {app: cart}}, mtls: {mode: PERMISSIVE}}")
	await(t, "a policy that was mended", value, inForce("PERMISSIVE by typo"))
}

// Without the right to read policies nothing is shown, and it is said once which
// right is missing. What is granted here is all that Troth needs.
func TestPoliciesForbidden(t *testing.T) {
	installPolicies(t)
	w := newWorld(t)
	pod := w.pod(t, "cart-")
	apply(t, w.namespace, "all", "{mtls: {mode: STRICT}}")
	read := []string{"list", "watch"}
	w.grant(t, "pods", rbacv1.PolicyRule{Verbs: read, APIGroups: []string{""}, Resources: []string{"pods", "serviceaccounts", "nodes", "services"}},
		rbacv1.PolicyRule{Verbs: read, APIGroups: []string{"discovery.k8s.io"}, Resources: []string{"endpointslices"}})

	log := new(log)
	pods, wire := startPods(t, cluster.Bearer(cluster.AutomountToken(t, pod)), kube.PodsConfig{
		Log: slog.New(slog.NewTextHandler(log, nil)), PolicyStatus: true,
	})
	value := onNode(t, pods, w.node)
	for _, step := range []struct {
		resource, asked string
		rule            rbacv1.PolicyRule
	}{
		{"customresourcedefinitions.apiextensions.k8s.io", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", rbacv1.PolicyRule{
			Verbs: read, APIGroups: []string{"apiextensions.k8s.io"}, Resources: []string{"customresourcedefinitions"},
			ResourceNames: []string{"peerauthentications.security.istio.io"},
		}},
		{"peerauthentications.security.istio.io", policyPath + "v1/peerauthentications", rbacv1.PolicyRule{
			Verbs: read, APIGroups: []string{"security.istio.io"}, Resources: []string{"peerauthentications"},
		}},
	} {
		eventually(t, step.resource+" is asked for again and again", func() bool { return wire.count("GET", step.asked) > 1 })
		if got, _ := value.Load(); got != nil || ended(pods.Synced()) {
			t.Errorf("OnNode() = %v without the right to read %s, synced: %t; want nothing to be known", got, step.resource, ended(pods.Synced()))
		}
		if n := log.count("policies cannot be read: Troth lacks the right to list and watch this resource\" resource=" + step.resource); n != 1 {
			t.Errorf("it was logged %d times that %s cannot be read, want once:\n%s", n, step.resource, log.String())
		}
		w.grant(t, step.resource, step.rule)
	}
	await(t, "the rights are granted", value, inForce("STRICT by all"))

	// The right to write statuses is one of its own.
	const denied = "the statuses of policies cannot be written: Troth lacks the right"
	eventually(t, "a status that may not be written", func() bool { return log.count(denied) == 1 })
	apply(t, w.namespace, "all", "{mtls: {mode: DISABLE}}")
	await(t, "a policy that changes meanwhile", value, inForce("DISABLE by all"))
	patches := func() int { return wire.total("PATCH", policyPath) }
	asked := patches()
	eventually(t, "another attempt", func() bool { return patches() > asked })
	w.grant(t, "status", rbacv1.PolicyRule{
		Verbs: []string{"patch"}, APIGroups: []string{"security.istio.io"}, Resources: []string{"peerauthentications/status"},
	})
	says(t, w.namespace, "all", "True", "InForce", allIsWell, 2)
	if n := log.count(denied); n != 1 {
		t.Errorf("it was logged %d times that statuses cannot be written, want once:\n%s", n, log)
	}
}

// grant gives the service account rights in the whole cluster.
func (w world) grant(t testing.TB, name string, rules ...rbacv1.PolicyRule) {
	t.Helper()
	name = w.namespace + "-" + name
	rbac := cluster.Client().RbacV1()
	_, err := rbac.ClusterRoles().Create(t.Context(), &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: name}, Rules: rules}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = rbac.ClusterRoleBindings().Create(t.Context(), &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: name},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: w.namespace, Name: w.account.Name}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
}
