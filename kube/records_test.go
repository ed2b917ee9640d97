package kube

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"

	"troth.dev/troth/identity"
	"troth.dev/troth/internal/latest"
)

// model is what records ought to say, worked out from the start each time.
type model struct {
	pods     map[string]identity.Pod
	accounts map[identity.ServiceAccount]string
	nodes    map[string]string
}

func (m model) joined(pod identity.Pod) identity.Pod {
	pod.ServiceAccountUID = m.accounts[pod.Account()]
	if pod.Node.Name != "" {
		pod.Node.UID = m.nodes[pod.Node.Name]
	}
	return pod
}

func (m model) onNode(name string) []identity.Pod {
	var pods []identity.Pod
	for _, pod := range m.pods {
		if pod.Node.Name == name && pod.Phase != identity.PodFinished {
			pods = append(pods, m.joined(pod))
		}
	}
	slices.SortFunc(pods, func(a, b identity.Pod) int { return strings.Compare(a.UID, b.UID) })
	return pods
}

// Whatever happens in whatever order, records say what the objects say, and keep
// nothing that nobody needs.
func TestRecords(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := newRecords()
		m := model{
			pods:     make(map[string]identity.Pod),
			accounts: make(map[identity.ServiceAccount]string),
			nodes:    make(map[string]string),
		}
		r.change(func() {
			for _, resource := range []string{podResource, accountResource, nodeResource} {
				r.listed(resource)
			}
		})
		held := make(map[string]*latest.Value[[]identity.Pod])
		releases := make(map[string]func())

		name := func(t *rapid.T, prefix string) string {
			return fmt.Sprint(prefix, rapid.IntRange(1, 3).Draw(t, prefix))
		}
		drawPod := func(t *rapid.T) identity.Pod {
			pod := identity.Pod{
				PodReference:   identity.PodReference{Namespace: "shop", Name: "pod", UID: fmt.Sprint(rapid.IntRange(1, 6).Draw(t, "uid"))},
				ServiceAccount: name(t, "account"),
				Phase:          rapid.SampledFrom([]identity.PodPhase{identity.PodPending, identity.PodRunning, identity.PodFinished}).Draw(t, "phase"),
			}
			if rapid.Bool().Draw(t, "scheduled") {
				pod.Node.Name = name(t, "node")
			}
			return pod
		}
		account := func(t *rapid.T) identity.ServiceAccount {
			return identity.ServiceAccount{Namespace: "shop", Name: name(t, "account")}
		}
		uid := func(t *rapid.T) string { return name(t, "life") }

		t.Repeat(map[string]func(*rapid.T){
			"set pod": func(t *rapid.T) {
				pod := drawPod(t)
				m.pods[pod.UID] = pod
				r.change(func() { r.setPod(pod) })
			},
			"remove pod": func(t *rapid.T) {
				uid := drawPod(t).UID
				delete(m.pods, uid)
				r.change(func() { r.removePod(uid) })
			},
			"set account": func(t *rapid.T) {
				account, uid := account(t), uid(t)
				m.accounts[account] = uid
				r.change(func() { r.setAccount(account, uid) })
			},
			"remove account": func(t *rapid.T) {
				account, uid := account(t), uid(t)
				if m.accounts[account] == uid {
					delete(m.accounts, account)
				}
				r.change(func() { r.removeAccount(account, uid) })
			},
			"set node": func(t *rapid.T) {
				node, uid := name(t, "node"), uid(t)
				m.nodes[node] = uid
				r.change(func() { r.setNode(node, uid) })
			},
			"remove node": func(t *rapid.T) {
				node, uid := name(t, "node"), uid(t)
				if m.nodes[node] == uid {
					delete(m.nodes, node)
				}
				r.change(func() { r.removeNode(node, uid) })
			},
			"look at node": func(t *rapid.T) {
				node := name(t, "node")
				if held[node] == nil {
					held[node], releases[node] = r.onNode(node)
				}
			},
			"look away": func(t *rapid.T) {
				node := name(t, "node")
				if held[node] != nil {
					releases[node]()
					delete(held, node)
				}
			},
			"": func(t *rapid.T) {
				for uid, pod := range m.pods {
					want := m.joined(pod)
					complete := want.ServiceAccountUID != "" && (want.Node.Name == "" || want.Node.UID != "")
					got, ok := r.complete(uid)
					if ok != complete || ok && !equal(got, want) {
						t.Fatalf("complete(%q) = %+v, %t, want %+v, %t", uid, got, ok, want, complete)
					}
				}
				if len(r.pods) != len(m.pods) {
					t.Fatalf("there are %d records, want %d", len(r.pods), len(m.pods))
				}
				for node, value := range held {
					if got, _ := value.Load(); !slices.EqualFunc(got, m.onNode(node), equal) {
						t.Fatalf("onNode(%q) = %+v, want %+v", node, got, m.onNode(node))
					}
				}
				checkGroups(t, r, m, held)
			},
		})
	})
}

// checkGroups checks that there is a group for each thing that needs one, and no
// other: pods come and go, and what is left of them must not add up.
func checkGroups(t *rapid.T, r *records, m model, held map[string]*latest.Value[[]identity.Pod]) {
	accounts, nodes := make(map[identity.ServiceAccount]bool), make(map[string]bool)
	for account := range m.accounts {
		accounts[account] = true
	}
	for node := range m.nodes {
		nodes[node] = true
	}
	for node := range held {
		nodes[node] = true
	}
	for _, pod := range m.pods {
		accounts[pod.Account()] = true
		if pod.Node.Name != "" {
			nodes[pod.Node.Name] = true
		}
	}
	if len(r.accounts) != len(accounts) || len(r.nodes) != len(nodes) || len(r.stale) != 0 {
		t.Fatalf("there are %d accounts, %d nodes and %d stale values, want %d, %d and none",
			len(r.accounts), len(r.nodes), len(r.stale), len(accounts), len(nodes))
	}
}

// A complete list, taken while 150,000 pods are known: how long it keeps others
// from asking, and what a pod costs.
func BenchmarkReplace(b *testing.B) {
	const pods, perNode, perAccount = 150_000, 30, 10
	r := newRecords()
	m := mirror[*corev1.Pod]{
		records:  r,
		resource: podResource,
		trim:     trimPod,
		set:      func(o *corev1.Pod) { r.setPod(podOf(o)) },
		retain:   func(uids map[types.UID]bool) {},
	}
	list := make([]any, pods)
	for i := range list {
		list[i] = &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: "namespace-of-the-benchmark",
				Name:      fmt.Sprintf("a-deployment-of-the-usual-length-%d", i),
				UID:       types.UID(fmt.Sprintf("7f9d3c52-4f2b-4b8e-9a55-%012d", i)),
				Labels:    map[string]string{"app.kubernetes.io/name": "a-deployment", "pod-template-hash": fmt.Sprint(i / 3)},
			},
			Spec:   corev1.PodSpec{NodeName: fmt.Sprint("node-", i/perNode), ServiceAccountName: fmt.Sprint("account-", i/perAccount)},
			Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&0xff, i&0xff)}}},
		}
	}
	begin := time.Now()
	if err := m.Replace(list, ""); err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(time.Since(begin).Milliseconds()), "ms-first")
	for b.Loop() {
		if err := m.Replace(list, ""); err != nil {
			b.Fatal(err)
		}
	}
}
