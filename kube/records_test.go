package kube

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"

	"troth.dev/troth/identity"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/kube/directory"
	"troth.dev/troth/policy"
)

// model is what records ought to say, worked out from the start each time.
type model struct {
	pods     map[string]identity.Pod
	accounts map[identity.ServiceAccount]string
	nodes    map[string]string
	policies map[policy.Ref]policy.PeerAuthentication
}

func (m model) joined(pod identity.Pod) identity.Pod {
	pod.ServiceAccountUID = m.accounts[pod.Account()]
	if pod.Node.Name != "" {
		pod.Node.UID = m.nodes[pod.Node.Name]
	}
	return pod
}

func (m model) onNode(name string) []policy.Assignment {
	policies := policy.NewSet(root, slices.Collect(maps.Values(m.policies))...)
	var pods []policy.Assignment
	for _, pod := range m.pods {
		if pod.Node.Name == name && pod.Phase != identity.PodFinished {
			pods = append(pods, policy.Assignment{
				Pod:    m.joined(pod),
				Policy: policies.Resolve(policy.Workload{Namespace: pod.Namespace, Labels: pod.Labels}),
			})
		}
	}
	slices.SortFunc(pods, func(a, b policy.Assignment) int { return strings.Compare(a.Pod.UID, b.Pod.UID) })
	return pods
}

func (m model) of(account identity.ServiceAccount) []identity.Pod {
	var pods []identity.Pod
	for _, pod := range m.pods {
		if pod.Account() == account && pod.Phase != identity.PodFinished {
			pods = append(pods, m.joined(pod))
		}
	}
	return pods
}

// sameUIDs says whether both have the same pods, in whatever order.
func sameUIDs(a, b []identity.Pod) bool {
	byUID := func(a, b identity.Pod) int { return strings.Compare(a.UID, b.UID) }
	return slices.EqualFunc(slices.SortedFunc(slices.Values(a), byUID), slices.SortedFunc(slices.Values(b), byUID), equal)
}

const root = "istio-system"

// look is what somebody saw who looks at a node.
type look struct {
	value   *latest.Value[[]policy.Assignment]
	seen    []policy.Assignment
	changed <-chan struct{}
}

// Whatever happens in whatever order, records say what the objects say, tell nobody
// who is not concerned, and keep nothing that nobody needs.
func TestRecords(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := newRecords(root, directory.Config{Agents: identity.ServiceAccount{Namespace: "shop", Name: "account1"}})
		m := model{
			pods:     make(map[string]identity.Pod),
			accounts: make(map[identity.ServiceAccount]string),
			nodes:    make(map[string]string),
			policies: make(map[policy.Ref]policy.PeerAuthentication),
		}
		r.change(func() {
			for _, resource := range []string{podResource, accountResource, nodeResource, policyResource, serviceResource, sliceResource} {
				r.listed(resource)
			}
		})
		held := make(map[string]*look)
		releases := make(map[string]func())

		name := func(t *rapid.T, prefix string) string {
			return fmt.Sprint(prefix, rapid.IntRange(1, 3).Draw(t, prefix))
		}
		drawPod := func(t *rapid.T) identity.Pod {
			pod := identity.Pod{
				PodReference:   identity.PodReference{Namespace: "shop", Name: "pod", UID: fmt.Sprint(rapid.IntRange(1, 6).Draw(t, "uid"))},
				ServiceAccount: name(t, "account"),
				Labels:         map[string]string{"app": name(t, "app")},
				ContainerPorts: rapid.SampledFrom([][]uint16{nil, {80}}).Draw(t, "ports"),
				Phase:          rapid.SampledFrom([]identity.PodPhase{identity.PodPending, identity.PodRunning, identity.PodFinished}).Draw(t, "phase"),
			}
			if rapid.Bool().Draw(t, "scheduled") {
				pod.Node.Name = name(t, "node")
			}
			return pod
		}
		drawPolicy := func(t *rapid.T) policy.PeerAuthentication {
			p := policy.PeerAuthentication{
				Ref:     policy.Ref{Namespace: rapid.SampledFrom([]string{"shop", root}).Draw(t, "namespace"), Name: name(t, "policy")},
				Created: time.Unix(int64(rapid.IntRange(1, 3).Draw(t, "created")), 0),
				Mode:    rapid.SampledFrom([]policy.Mode{policy.Unset, policy.Disable, policy.Permissive, policy.Strict}).Draw(t, "mode"),
			}
			if rapid.Bool().Draw(t, "selective") {
				p.Selector = map[string]string{"app": name(t, "app")}
			}
			return p
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
			"declare a pod's ports anew": func(t *rapid.T) {
				pod, ok := m.pods[drawPod(t).UID]
				if !ok {
					t.Skip()
				}
				pod.ContainerPorts = rapid.SampledFrom([][]uint16{nil, {80}, {443}}).Draw(t, "ports")
				m.pods[pod.UID] = pod
				r.change(func() { r.setPod(pod) })
			},
			"remove pod": func(t *rapid.T) {
				uid := drawPod(t).UID
				delete(m.pods, uid)
				gone := r.pods[uid]
				r.change(func() { r.removePod(uid) })
				if r.policies.Effective(gone) != nil {
					t.Fatal("a policy is kept in force for a pod that is gone")
				}
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
			"set policy": func(t *rapid.T) {
				p := drawPolicy(t)
				m.policies[p.Ref] = p
				r.change(func() { r.policies.SetPolicy(p) })
			},
			"remove policy": func(t *rapid.T) {
				ref := drawPolicy(t).Ref
				delete(m.policies, ref)
				r.change(func() { r.policies.RemovePolicy(ref) })
			},
			"look at node": func(t *rapid.T) {
				node := name(t, "node")
				if held[node] == nil {
					value, release := r.onNode(node)
					seen, changed := value.Load()
					held[node], releases[node] = &look{value, seen, changed}, release
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
				for n := range 3 {
					who := identity.ServiceAccount{Namespace: "shop", Name: fmt.Sprint("account", n+1)}
					var got []identity.Pod
					r.of(who, time.Now(), func(p identity.Pod) { got = append(got, p) })
					if want := m.of(who); !sameUIDs(got, want) {
						t.Fatalf("of(%v) = %+v, want %+v", who, got, want)
					}
					node := fmt.Sprint("node", n+1)
					if got, want := r.occupied(node, time.Now()), len(m.onNode(node)) > 0; got != want {
						t.Fatalf("occupied(%q) = %t, want %t", node, got, want)
					}
				}
				for node, look := range held {
					before, changed := look.seen, look.changed
					look.seen, look.changed = look.value.Load()
					if !cmp.Equal(look.seen, m.onNode(node), cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Addr{})) {
						t.Fatalf("onNode(%q) = %+v, want %+v", node, look.seen, m.onNode(node))
					}
					select {
					case <-changed:
						if slices.EqualFunc(before, look.seen, same) {
							t.Fatalf("onNode(%q) became what it was: %+v", node, before)
						}
					default:
					}
				}
				checkGroups(t, r, m, held)
			},
		})
	})
}

// checkGroups checks that there is a group for each thing that needs one, and no
// other: pods come and go, and what is left of them must not add up.
func checkGroups(t *rapid.T, r *records, m model, held map[string]*look) {
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

// The cluster of the benchmarks.
const (
	manyPods       = 150_000
	podsPerNode    = 30
	podsPerAccount = 10
)

func manyPodsOf(r *records) (mirror[*corev1.Pod], []any) {
	m := mirror[*corev1.Pod]{
		records:  r,
		resource: podResource,
		trim:     trimPod,
		set:      func(o *corev1.Pod) { r.setPod(podOf(o)) },
		replace: func(pods []*corev1.Pod) {
			for _, o := range pods {
				r.setPod(podOf(o))
			}
		},
	}
	list := make([]any, manyPods)
	for i := range list {
		list[i] = &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: "namespace-of-the-benchmark",
				Name:      fmt.Sprintf("a-deployment-of-the-usual-length-%d", i),
				UID:       types.UID(fmt.Sprintf("7f9d3c52-4f2b-4b8e-9a55-%012d", i)),
				Labels:    map[string]string{"app.kubernetes.io/name": "a-deployment", "pod-template-hash": fmt.Sprint(i / 3)},
			},
			Spec: corev1.PodSpec{
				NodeName: fmt.Sprint("node-", i/podsPerNode), ServiceAccountName: fmt.Sprint("account-", i/podsPerAccount),
				Containers: []corev1.Container{{Name: "main", Ports: []corev1.ContainerPort{{ContainerPort: 8080}}}},
			},
			Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&0xff, i&0xff)}}},
		}
	}
	return m, list
}

// A complete list, taken while 150,000 pods are known: how long it keeps others
// from asking, and what a pod costs.
func BenchmarkReplace(b *testing.B) {
	m, list := manyPodsOf(newRecords(root, directory.Config{}))
	begin := time.Now()
	if err := m.Replace(list, ""); err != nil {
		b.Fatal(err)
	}
	first := time.Since(begin)
	for b.Loop() {
		if err := m.Replace(list, ""); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(first.Milliseconds()), "ms-first")
}

// One pod of 150,000 becomes another, and its node is told.
func BenchmarkPodChanges(b *testing.B) {
	r := newRecords(root, directory.Config{})
	m, list := manyPodsOf(r)
	listAll(b, r, m, list)
	_, release := r.onNode("node-0")
	defer release()
	for i := 0; b.Loop(); i++ {
		o := list[0].(*corev1.Pod).DeepCopy()
		o.Status.PodIPs[0].IP = fmt.Sprintf("10.0.0.%d", i%250+1)
		if err := m.Update(o); err != nil {
			b.Fatal(err)
		}
	}
}

// The mesh's policy changes for 150,000 pods on 5,000 nodes, all of which are told.
func BenchmarkMeshPolicyChanges(b *testing.B) {
	r := newRecords(root, directory.Config{})
	m, list := manyPodsOf(r)
	listAll(b, r, m, list)
	for i := range manyPods / podsPerNode {
		_, release := r.onNode(fmt.Sprint("node-", i))
		defer release()
	}
	p := policy.PeerAuthentication{Ref: policy.Ref{Namespace: root, Name: "default"}}
	for i := 0; b.Loop(); i++ {
		p.Mode = []policy.Mode{policy.Strict, policy.Permissive}[i%2]
		r.change(func() { r.policies.SetPolicy(p) })
	}
}

func listAll(b *testing.B, r *records, m mirror[*corev1.Pod], list []any) {
	b.Helper()
	if err := m.Replace(list, ""); err != nil {
		b.Fatal(err)
	}
	r.change(func() {
		for _, resource := range []string{accountResource, nodeResource, policyResource, serviceResource, sliceResource} {
			r.listed(resource)
		}
	})
}
