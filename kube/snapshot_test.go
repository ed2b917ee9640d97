package kube_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"troth.dev/troth/identity"
	"troth.dev/troth/kube"
	"troth.dev/troth/policy"
	"troth.dev/troth/test/apiserver"
)

func TestRead(t *testing.T) {
	w := newWorld(t)
	pod := cluster.CreatePod(t, apiserver.Pod{
		Namespace: w.namespace, Name: "cart-", ServiceAccount: "cart", Node: w.node.Name,
		Labels: map[string]string{"app": "cart"}, Ports: []int32{8080},
	})
	finished := cluster.FinishPod(t, w.pod(t, "done-"))
	kubeconfig := cluster.Kubeconfig(t, cluster.Admin())

	// The cluster has what other tests left behind: only this one's is compared.
	read := func(t *testing.T) ([]identity.Pod, []policy.PeerAuthentication) {
		t.Helper()
		snapshot, err := kube.Read(t.Context(), kubeconfig, "")
		if err != nil {
			t.Fatal(err)
		}
		var pods []identity.Pod
		for _, pod := range snapshot.Pods {
			if pod.Namespace == w.namespace {
				pods = append(pods, pod)
			}
		}
		return pods, snapshot.Policies
	}

	t.Run("pods", func(t *testing.T) {
		pods, policies := read(t)
		if len(pods) != 2 || len(policies) != 0 {
			t.Fatalf("Read() = %d pods, %d policies, want 2 and none", len(pods), len(policies))
		}
		if pods[0].UID != string(pod.UID) {
			pods[0], pods[1] = pods[1], pods[0]
		}
		want := identity.Pod{
			PodReference:   reference(pod),
			ServiceAccount: "cart",
			Node:           identity.Node{Name: w.node.Name},
			Phase:          identity.PodRunning,
			Labels:         map[string]string{"app": "cart"},
			ContainerPorts: []uint16{8080},
		}
		if diff := cmp.Diff(want, pods[0], comparePods, cmpopts.IgnoreFields(want, "Addresses")); diff != "" {
			t.Errorf("Read() (-want +got):\n%s", diff)
		}
		if pods[1].PodReference != reference(finished) || pods[1].Phase != identity.PodFinished {
			t.Errorf("Read() has %+v, want the pod that has finished", pods[1])
		}
	})

	for _, version := range []string{"v1", "v1beta1"} {
		t.Run("policies in "+version, func(t *testing.T) {
			installPolicies(t, only(version))
			cluster.ApplyPolicy(t, version, w.namespace, "all", "{mtls: {mode: STRICT}}")
			cluster.ApplyPolicy(t, version, w.namespace, "cart", "{selector: {matchLabels: {app: cart}}, portLevelMtls: {8080: {mode: DISABLE}}}")
			_, policies := read(t)
			want := []policy.PeerAuthentication{
				{Ref: policy.Ref{Namespace: w.namespace, Name: "all"}, Mode: policy.Strict},
				{
					Ref:      policy.Ref{Namespace: w.namespace, Name: "cart"},
					Selector: map[string]string{"app": "cart"},
					Ports:    map[uint16]policy.Mode{8080: policy.Disable},
				},
			}
			if diff := cmp.Diff(want, policies, cmpopts.EquateEmpty(), cmpopts.IgnoreUnexported(policy.PeerAuthentication{}),
				cmpopts.IgnoreFields(policy.PeerAuthentication{}, "Created")); diff != "" {
				t.Errorf("Read() (-want +got):\n%s", diff)
			}
			for _, p := range policies {
				if p.Created.IsZero() {
					t.Errorf("policy %v has no age", p.Ref)
				}
			}
		})
	}

	t.Run("kubectl's own file", func(t *testing.T) {
		t.Setenv("KUBECONFIG", kubeconfig)
		if _, err := kube.Read(t.Context(), "", "test"); err != nil {
			t.Errorf("Read(by the environment, in a context by name) = %v", err)
		}
		if _, err := kube.Read(t.Context(), "", "other"); err == nil || !strings.Contains(err.Error(), `"other"`) {
			t.Errorf("Read(in a context that there is not) = %v, want an error that names it", err)
		}
	})

	t.Run("without rights", func(t *testing.T) {
		somebody := cluster.Kubeconfig(t, cluster.Bearer(cluster.AutomountToken(t, pod)))
		for _, step := range []struct{ mayList, want string }{
			{"nothing", "kube: list policies: "},
			{"peerauthentications", "kube: list pods: "},
			{"pods", ""},
		} {
			w.grant(t, step.mayList, rbacv1.PolicyRule{
				Verbs: []string{"list"}, APIGroups: []string{"", "security.istio.io"}, Resources: []string{step.mayList},
			})
			eventually(t, "the API server knows the rule", func() bool {
				snapshot, err := kube.Read(t.Context(), somebody, "")
				if step.want == "" {
					return err == nil && len(snapshot.Pods) > 0
				}
				return apierrors.IsForbidden(err) && strings.HasPrefix(err.Error(), step.want) && snapshot.Pods == nil
			})
		}
	})

	t.Run("no such file", func(t *testing.T) {
		if _, err := kube.Read(t.Context(), kubeconfig+"-not", ""); err == nil {
			t.Error("Read(no such file) = nil, want an error")
		}
	})

	t.Run("given up", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := kube.Read(ctx, kubeconfig, ""); !errors.Is(err, context.Canceled) {
			t.Errorf("Read(context ended) = %v, want the context's error", err)
		}
	})
}
