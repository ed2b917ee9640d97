package policy_test

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"troth.dev/troth/policy"
)

func TestExplain(t *testing.T) {
	at := func(seconds int64) time.Time { return time.Unix(1_700_000_000+seconds, 0) }
	ref := func(namespace, name string) policy.Ref { return policy.Ref{Namespace: namespace, Name: name} }
	wrong := problems("spec", "is wrong")
	const inRoot = "a policy with a selector is ignored in the root namespace"

	for _, test := range []struct {
		name     string
		policies string
		workload policy.Workload
		want     policy.Explanation
	}{
		{"nothing", "", cart, policy.Explanation{
			Levels: []policy.Level{
				{Scope: policy.MeshScope, Mode: policy.Permissive},
				{Scope: policy.NamespaceScope, Mode: policy.Permissive},
				{Scope: policy.WorkloadScope, Mode: policy.Permissive},
			},
			Effective: &policy.Effective{Mode: policy.Permissive},
		}},
		{"everything", "mesh/old S@1; mesh/new D@2; ns/a U@1; ns/b !@1; wl/1 U@1 80=D 8080=S 9090=U; wl/2 P@2 80=P; version/3 S; miss D@0; elsewhere D@0; root P@0", cart, policy.Explanation{
			Levels: []policy.Level{
				{
					Scope:     policy.MeshScope,
					Winner:    &policy.Candidate{Policy: ref(root, "old"), Created: at(1), Mode: policy.Strict},
					Shadowed:  []policy.Candidate{{Policy: ref(root, "new"), Created: at(2), Mode: policy.Disable, Why: "istio-system/old is older"}},
					Mode:      policy.Strict,
					DecidedBy: ref(root, "old"),
				},
				{
					Scope:     policy.NamespaceScope,
					Winner:    &policy.Candidate{Policy: ref("shop", "a"), Created: at(1), Mode: policy.Unset},
					Shadowed:  []policy.Candidate{{Policy: ref("shop", "b"), Created: at(1), Mode: policy.Strict, Problems: wrong, Why: "shop/a is as old, and its name comes first"}},
					Mode:      policy.Strict,
					DecidedBy: ref(root, "old"),
				},
				{
					Scope: policy.WorkloadScope,
					Winner: &policy.Candidate{Policy: ref("shop", "1"), Created: at(1), Mode: policy.Unset, Ports: []policy.PortMode{
						{Port: 80, Mode: policy.Disable}, {Port: 8080, Mode: policy.Strict}, {Port: 9090, Mode: policy.Unset},
					}},
					Shadowed: []policy.Candidate{
						{Policy: ref("shop", "2"), Created: at(2), Mode: policy.Permissive, Ports: []policy.PortMode{{Port: 80, Mode: policy.Permissive}}, Why: "shop/1 is older"},
						{Policy: ref("shop", "3"), Mode: policy.Strict, Why: "shop/1 exists already"},
					},
					Mode:      policy.Strict,
					DecidedBy: ref(root, "old"),
				},
			},
			Ports: []policy.PortLevel{
				{Port: 80, Asks: policy.Disable, Mode: policy.Disable, Undeclared: true},
				{Port: 8080, Asks: policy.Strict, Mode: policy.Strict},
				{Port: 9090, Asks: policy.Unset, Mode: policy.Strict},
			},
			Ignored: []policy.Candidate{{Policy: ref(root, "root"), Created: at(0), Mode: policy.Permissive, Why: inRoot}},
			Effective: &policy.Effective{
				Mode: policy.Strict, DecidedBy: ref(root, "old"),
				Ports: []policy.PortMode{{Port: 80, Mode: policy.Disable}}, PortsBy: ref("shop", "1"),
			},
		}},
		{"invalid", "ns P; wl !@1 80=D", cart, policy.Explanation{
			Levels: []policy.Level{
				{Scope: policy.MeshScope, Mode: policy.Permissive},
				{Scope: policy.NamespaceScope, Winner: &policy.Candidate{Policy: ref("shop", "ns"), Mode: policy.Permissive}, Mode: policy.Permissive, DecidedBy: ref("shop", "ns")},
				{Scope: policy.WorkloadScope, Winner: &policy.Candidate{Policy: ref("shop", "wl"), Created: at(1), Mode: policy.Strict, Problems: wrong}, Mode: policy.Strict, DecidedBy: ref("shop", "wl")},
			},
			Effective: &policy.Effective{Mode: policy.Strict, DecidedBy: ref("shop", "wl")},
		}},
		{"in the root namespace", "mesh D; root S@2; root/b !@1; wl S", policy.Workload{Namespace: root, Labels: cart.Labels}, policy.Explanation{
			Levels: []policy.Level{
				{Scope: policy.MeshScope, Winner: &policy.Candidate{Policy: ref(root, "mesh"), Mode: policy.Disable}, Mode: policy.Disable, DecidedBy: ref(root, "mesh")},
			},
			Ignored: []policy.Candidate{
				{Policy: ref(root, "b"), Created: at(1), Mode: policy.Strict, Problems: wrong, Why: inRoot},
				{Policy: ref(root, "root"), Created: at(2), Mode: policy.Strict, Why: inRoot},
			},
			Effective: &policy.Effective{Mode: policy.Disable, DecidedBy: ref(root, "mesh")},
		}},
		// Who declares no port may have every port.
		{"no ports declared", "wl S 80=D", withPorts(), policy.Explanation{
			Levels: []policy.Level{
				{Scope: policy.MeshScope, Mode: policy.Permissive},
				{Scope: policy.NamespaceScope, Mode: policy.Permissive},
				{
					Scope: policy.WorkloadScope, Mode: policy.Strict, DecidedBy: ref("shop", "wl"),
					Winner: &policy.Candidate{Policy: ref("shop", "wl"), Mode: policy.Strict, Ports: []policy.PortMode{{Port: 80, Mode: policy.Disable}}},
				},
			},
			Ports: []policy.PortLevel{{Port: 80, Asks: policy.Disable, Mode: policy.Disable}},
			Effective: &policy.Effective{
				Mode: policy.Strict, DecidedBy: ref("shop", "wl"),
				Ports: []policy.PortMode{{Port: 80, Mode: policy.Disable}}, PortsBy: ref("shop", "wl"),
			},
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			policies := read(t, test.policies)
			for _, order := range permutations(policies[:min(len(policies), 3)]) {
				got := policy.NewSet(root, append(order, policies[len(order):]...)...).Explain(test.workload)
				if diff := cmp.Diff(test.want, got, comparePolicies); diff != "" {
					t.Fatalf("Explain() (-want +got):\n%s", diff)
				}
			}

			assigned := policy.NewAssignments[string](root, nil)
			assigned.ReplacePolicies(policies)
			if got, ok := assigned.Explain("pod"); ok {
				t.Errorf("Explain() of a workload that is not there = %+v", got)
			}
			assigned.SetWorkload("pod", test.workload)
			got, ok := assigned.Explain("pod")
			if diff := cmp.Diff(test.want, got, comparePolicies); diff != "" || !ok {
				t.Errorf("Explain() by Assignments, %v (-want +got):\n%s", ok, diff)
			}
		})
	}
}

func TestExplainJSON(t *testing.T) {
	text, err := json.Marshal(policy.NewSet(root, read(t, "mesh/a S@1; mesh/b !@2; wl U@1 80=D")...).Explain(cart))
	want := `{"levels":[` +
		`{"scope":"mesh","winner":{"policy":{"namespace":"istio-system","name":"a"},"created":"2023-11-14T22:13:21Z","mode":"STRICT"},` +
		`"shadowed":[{"policy":{"namespace":"istio-system","name":"b"},"created":"2023-11-14T22:13:22Z","mode":"STRICT","problems":[{"field":"spec","message":"is wrong"}],"why":"istio-system/a is older"}],` +
		`"mode":"STRICT","decidedBy":{"namespace":"istio-system","name":"a"}},` +
		`{"scope":"namespace","mode":"STRICT","decidedBy":{"namespace":"istio-system","name":"a"}},` +
		`{"scope":"workload","winner":{"policy":{"namespace":"shop","name":"wl"},"created":"2023-11-14T22:13:21Z","mode":"UNSET","ports":[{"port":80,"mode":"DISABLE"}]},` +
		`"mode":"STRICT","decidedBy":{"namespace":"istio-system","name":"a"}}],` +
		`"ports":[{"port":80,"asks":"DISABLE","mode":"DISABLE","undeclared":true}],` +
		`"effective":{"mode":"STRICT","decidedBy":{"namespace":"istio-system","name":"a"},"ports":[{"port":80,"mode":"DISABLE"}],"portsBy":{"namespace":"shop","name":"wl"}}}`
	if diff := cmp.Diff(want, string(text)); diff != "" || err != nil {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
}
