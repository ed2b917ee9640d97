package kube_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"troth.dev/troth/kube"
	"troth.dev/troth/test/apiserver"
)

// condition is what a client sees of the condition of that type.
type condition struct {
	Status, Reason, Message string
	Generation              int64
	Since                   time.Time
}

// conditions returns those of a policy by their types. A type that is there twice
// fails the test.
func conditions(t testing.TB, namespace, name string) map[string]condition {
	t.Helper()
	object, err := cluster.Policies("v1", namespace).Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	list, _, err := unstructured.NestedSlice(object.Object, "status", "conditions")
	if err != nil {
		t.Fatal(err)
	}
	found := make(map[string]condition)
	for _, c := range list {
		fields := c.(map[string]any)
		text := func(field string) string { s, _ := fields[field].(string); return s }
		generation, _ := fields["observedGeneration"].(int64)
		since, err := time.Parse(time.RFC3339, text("lastTransitionTime"))
		if err != nil {
			t.Errorf("a condition's time: %v", err)
		}
		if _, twice := found[text("type")]; twice {
			t.Errorf("policy %s/%s has the condition %q twice", namespace, name, text("type"))
		}
		found[text("type")] = condition{text("status"), text("reason"), text("message"), generation, since}
	}
	return found
}

// says waits until a policy's condition is that, with these words in its message,
// and returns it.
func says(t testing.TB, namespace, name, status, reason, words string, generation int64) condition {
	t.Helper()
	var got condition
	eventually(t, fmt.Sprintf("policy %s/%s is %s for %s: %s", namespace, name, status, reason, words), func() bool {
		got = conditions(t, namespace, name)["troth.dev/InForce"]
		return got.Status == status && got.Reason == reason && got.Generation == generation && strings.Contains(got.Message, words)
	})
	return got
}

const allIsWell = "in force for all that it selects"

// The author of a policy is told what became of it, in its status.
func TestPolicyStatus(t *testing.T) {
	installPolicies(t, apiserver.AnyObject) // an invalid one among them
	w := newWorld(t)
	root := cluster.CreateNamespace(t, "root-")
	cart := cluster.CreatePod(t, apiserver.Pod{
		Namespace: w.namespace, Name: "cart-", ServiceAccount: "cart", Node: w.node.Name,
		Labels: map[string]string{"app": "cart"}, Ports: []int32{8080},
	})
	apply(t, w.namespace, "all", "{mtls: {mode: STRICT}}")
	apply(t, w.namespace, "second", "{mtls: {mode: DISABLE}}")
	apply(t, w.namespace, "cart", "{selector: {matchLabels: {app: cart}}, portLevelMtls: {8080: {mode: DISABLE}}}")
	apply(t, w.namespace, "late", "{selector: {matchLabels: {app: cart}}}")
	apply(t, w.namespace, "nobody", "{selector: {matchLabels: {app: till}}}")
	apply(t, w.namespace, "typo", "{selector: {matchLabels: {app: till}}, mtls: {mode: PERMISIVE}}")
	apply(t, root, "mesh", "{mtls: {mode: STRICT}}")
	apply(t, root, "selective", "{selector: {matchLabels: {app: cart}}}")
	pods, wire := runPods(t, kube.PodsConfig{RootNamespace: root, PolicyStatus: true})
	value := onNode(t, pods, w.node)

	shop := w.namespace
	inForceSince := says(t, shop, "all", "True", "InForce", allIsWell, 1)
	says(t, shop, "second", "False", "SHADOWED", shop+"/all is", 1)
	says(t, shop, "cart", "True", "InForce", allIsWell, 1)
	says(t, shop, "late", "False", "SHADOWED", shop+"/cart", 1)
	says(t, shop, "nobody", "False", "SELECTS_NOTHING", "no workload", 1)
	says(t, shop, "typo", "False", "INVALID", `spec.mtls.mode: "PERMISIVE"`, 1)
	says(t, shop, "typo", "False", "INVALID", "\nno workload", 1)
	says(t, root, "mesh", "True", "InForce", allIsWell, 1)
	says(t, root, "selective", "False", "SELECTOR_IN_ROOT_NAMESPACE", "ignored in the root namespace", 1)
	if since := time.Since(inForceSince.Since); since < 0 || since > patience {
		t.Errorf("lastTransitionTime is %s ago", since)
	}

	// Eight policies, one write each. What another replica finds written it leaves.
	writes := func() int { return wire.total("PATCH", policyPath) }
	if n := writes(); n != 8 {
		t.Errorf("8 policies were written %d times", n)
	}
	_, replica := runPods(t, kube.PodsConfig{RootNamespace: root, PolicyStatus: true})

	t.Run("it is edited", func(t *testing.T) {
		apply(t, shop, "cart", "{selector: {matchLabels: {app: cart}}, portLevelMtls: {80: {mode: DISABLE}}}")
		was := conditions(t, shop, "cart")["troth.dev/InForce"]
		is := says(t, shop, "cart", "True", "PORT_NOT_DECLARED", "declares port 80", 2)
		if !is.Since.Equal(was.Since) {
			t.Errorf("lastTransitionTime went from %s to %s, and the status stayed %s", was.Since, is.Since, is.Status)
		}
	})

	t.Run("others have conditions too", func(t *testing.T) {
		object, err := cluster.Policies("v1", shop).Get(t.Context(), "second", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		list, _, _ := unstructured.NestedSlice(object.Object, "status", "conditions")
		list = append(list, map[string]any{"type": "example.org/Seen", "status": "True", "lastTransitionTime": "2026-01-02T03:04:05Z"})
		if err := unstructured.SetNestedSlice(object.Object, list, "status", "conditions"); err != nil {
			t.Fatal(err)
		}
		if _, err := cluster.Policies("v1", shop).UpdateStatus(t.Context(), object, metav1.UpdateOptions{FieldManager: "other"}); err != nil {
			t.Fatal(err)
		}
		apply(t, shop, "second", "{mtls: {mode: PERMISSIVE}}")
		says(t, shop, "second", "False", "SHADOWED", shop+"/all is", 2)
		want := condition{Status: "True", Since: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}
		if diff := cmp.Diff(want, conditions(t, shop, "second")["example.org/Seen"]); diff != "" {
			t.Errorf("the condition of another (-written +now):\n%s", diff)
		}
	})

	// Statuses are news for nobody else, and once all is said nothing is written.
	await(t, "the pod runs", value, running(cart))
	_, changed := value.Load()
	before, beforeReplica := writes(), replica.total("PATCH", policyPath)
	apply(t, root, "mesh", "{mtls: {mode: DISABLE}}")
	says(t, root, "mesh", "True", "InForce", allIsWell, 2)
	if n := writes() - before + replica.total("PATCH", policyPath) - beforeReplica; n < 1 || n > 2 {
		t.Errorf("two replicas wrote one policy's condition %d times, want once each at most", n)
	}
	if ended(changed) {
		t.Error("the pods' node was told of a status")
	}
}

// A policy's condition follows all that it depends on.
func TestPolicyStatusFollows(t *testing.T) {
	installPolicies(t)
	w, other := newWorld(t), newWorld(t)
	shop := w.namespace
	labelled := func(app string) *corev1.Pod {
		return cluster.CreatePod(t, apiserver.Pod{
			Namespace: shop, Name: app + "-", ServiceAccount: "cart", Node: w.node.Name, Labels: map[string]string{"app": app},
		})
	}
	cart, done, gone := labelled("cart"), labelled("done"), labelled("gone")
	apply(t, shop, "done", "{selector: {matchLabels: {app: done}}}")
	apply(t, shop, "gone", "{selector: {matchLabels: {app: gone}}}")
	apply(t, shop, "cart", "{selector: {matchLabels: {app: cart}}, mtls: {mode: STRICT}}")
	apply(t, shop, "late", "{selector: {matchLabels: {app: cart}}}")
	apply(t, shop, "till", "{selector: {matchLabels: {app: till}}}")
	runPods(t, kube.PodsConfig{PolicyStatus: true})
	markers := 0
	for _, step := range []struct {
		what, policy   string
		status, reason string
		do             func()
	}{
		{"at first", "late", "False", "SHADOWED", func() {}},
		{"the older policy is deleted", "late", "True", "InForce", func() { cluster.DeletePolicy(t, shop, "cart") }},
		{"a pod is relabelled", "till", "True", "InForce", func() { relabel(t, cart, "till") }},
		{"a pod finishes", "done", "False", "SELECTS_NOTHING", func() { cluster.FinishPod(t, done) }},
		{"a pod is deleted", "gone", "False", "SELECTS_NOTHING", func() { cluster.DeletePod(t, gone, 0) }},
	} {
		step.do()
		was := conditions(t, shop, step.policy)["troth.dev/InForce"]
		is := says(t, shop, step.policy, step.status, step.reason, "", 1)
		if was.Status != is.Status && is.Since.Before(was.Since) || time.Since(is.Since) > patience {
			t.Errorf("%s: lastTransitionTime went from %s to %s with the status", step.what, was.Since, is.Since)
		}
		// When this is written, all that the step caused here has been looked at,
		// and what comes next is noticed for its own sake.
		markers++
		marker := fmt.Sprint("marker-", markers)
		apply(t, other.namespace, marker, "{selector: {matchLabels: {app: none}}}")
		says(t, other.namespace, marker, "False", "SELECTS_NOTHING", "", 1)
	}
}

// Before all pods are known, every selector would seem to select nothing.
func TestPolicyStatusWaits(t *testing.T) {
	installPolicies(t)
	w := newWorld(t)
	w.pod(t, "cart-")
	apply(t, w.namespace, "cart", "{selector: {matchLabels: {app: cart}}}")
	client, wire := client(t, cluster.Admin())
	pods, err := kube.NewPods(kube.PodsConfig{Client: client, Dynamic: client.Dynamic, Agents: agents, PolicyStatus: true})
	if err != nil {
		t.Fatal(err)
	}
	const path = "/api/v1/pods"
	wire.misroute(path)
	run(t, pods, wire)
	eventually(t, "pods are asked for for a while", func() bool { return wire.count("GET", path) > 3 })
	if n := wire.total("PATCH", policyPath); n != 0 {
		t.Errorf("%d conditions were written before the pods were known", n)
	}
	wire.misroute("")
	says(t, w.namespace, "cart", "True", "InForce", allIsWell, 1)
}

// What one replica has written, those that come after it leave alone.
func TestPolicyStatusIsWrittenOnce(t *testing.T) {
	installPolicies(t)
	w := newWorld(t)
	apply(t, w.namespace, "all", "{mtls: {mode: STRICT}}")
	apply(t, w.namespace, "nobody", "{selector: {matchLabels: {app: till}}}")
	t.Run("one writes", func(t *testing.T) {
		runPods(t, kube.PodsConfig{PolicyStatus: true})
		says(t, w.namespace, "all", "True", "InForce", allIsWell, 1)
		says(t, w.namespace, "nobody", "False", "SELECTS_NOTHING", "no workload", 1)
	})
	t.Run("one finds it written", func(t *testing.T) {
		_, wire := runPods(t, kube.PodsConfig{PolicyStatus: true})
		// Those of a namespace are looked at together, and this one comes last.
		apply(t, w.namespace, "zz", "{selector: {matchLabels: {app: till}}}")
		says(t, w.namespace, "zz", "False", "SELECTS_NOTHING", "no workload", 1)
		if n := wire.total("PATCH", policyPath); n != 1 {
			t.Errorf("%d conditions were written, want the one that was not there", n)
		}
	})
	t.Run("somebody takes it back", func(t *testing.T) {
		begin := time.Now()
		runPods(t, kube.PodsConfig{PolicyStatus: true})
		apply(t, w.namespace, "all", "{mtls: {mode: PERMISSIVE}}")
		says(t, w.namespace, "all", "True", "InForce", allIsWell, 2)
		object, err := cluster.Policies("v1", w.namespace).Get(t.Context(), "all", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		unstructured.RemoveNestedField(object.Object, "status")
		if _, err := cluster.Policies("v1", w.namespace).UpdateStatus(t.Context(), object, metav1.UpdateOptions{FieldManager: "other"}); err != nil {
			t.Fatal(err)
		}
		says(t, w.namespace, "all", "True", "InForce", allIsWell, 2)
		if d := time.Since(begin); d < 5*time.Second {
			t.Errorf("the condition was there again after %s: two who disagree must not keep each other busy", d)
		}
	})
	t.Run("nobody asked", func(t *testing.T) {
		pods, wire := runPods(t, kube.PodsConfig{})
		value := onNode(t, pods, w.node)
		pod := w.pod(t, "cart-")
		apply(t, w.namespace, "all", "{mtls: {mode: DISABLE}}")
		await(t, "the policy", value, inForce("DISABLE by all"))
		// Who writes would have done so by then.
		cluster.DeletePod(t, pod, 2*time.Second)
		await(t, "the end of the pod's grace", value, has())
		if n := wire.total("PATCH", policyPath); n != 0 {
			t.Errorf("%d conditions were written, and nobody asked for them", n)
		}
	})
}
