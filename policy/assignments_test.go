package policy_test

import (
	"maps"
	"slices"
	"strconv"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"troth.dev/troth/policy"
)

// Whatever happened before, what is in force is what the policies and workloads
// that are there now make of it, and changed is called for those for whom it
// became another, and for nobody else.
func TestAssignments(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		policies := make(map[policy.Ref]policy.PeerAuthentication)
		workloads := make(map[int]policy.Workload)
		inForce := make(map[int]*policy.Effective)

		var changed []int
		var assigned *policy.Assignments[int]
		assigned = policy.NewAssignments(root, func(w int) {
			if assigned.Effective(w).Equal(inForce[w]) {
				t.Errorf("changed(%d), and it has what it had", w)
			}
			changed = append(changed, w)
		})
		check := func(t *rapid.T) {
			fresh := policy.NewSet(root, slices.Collect(maps.Values(policies))...)
			var want []int
			for w, workload := range workloads {
				effective := fresh.Resolve(workload)
				if !effective.Equal(inForce[w]) {
					want = append(want, w)
				}
				inForce[w] = effective
				if diff := cmp.Diff(effective, assigned.Effective(w)); diff != "" {
					t.Fatalf("workload %d (-anew +kept):\n%s", w, diff)
				}
			}
			anew := policy.NewAssignments[int](root, nil)
			for w, workload := range workloads {
				anew.SetWorkload(w, workload)
			}
			for _, p := range policies {
				anew.SetPolicy(p)
			}
			for _, namespace := range []string{root, "shop", "bank", "empty"} {
				if diff := cmp.Diff(anew.Findings(namespace), assigned.Findings(namespace)); diff != "" {
					t.Fatalf("Findings(%s) (-anew +kept):\n%s", namespace, diff)
				}
			}
			slices.Sort(want)
			slices.Sort(changed)
			if diff := cmp.Diff(want, changed); diff != "" {
				t.Fatalf("changed was called for other workloads (-want +got):\n%s", diff)
			}
			changed = nil
		}
		random := func(t *rapid.T) random { return newRandom(rapid.Uint64().Draw(t, "random")) }
		t.Repeat(map[string]func(*rapid.T){
			"": check,
			"SetWorkload": func(t *rapid.T) {
				w := rapid.IntRange(0, 9).Draw(t, "workload")
				workloads[w] = random(t).workload()
				assigned.SetWorkload(w, workloads[w])
			},
			"SetWorkload as another": func(t *rapid.T) {
				w := rapid.IntRange(0, 9).Draw(t, "workload")
				other, ok := workloads[rapid.IntRange(0, 9).Draw(t, "other")]
				if !ok {
					t.Skip()
				}
				other.Labels = maps.Clone(other.Labels)
				other.ContainerPorts = rapid.SampledFrom([][]uint16{{1}, {2}, {1, 2}, {1, 33}, {2, 2}}).Draw(t, "ports")
				workloads[w] = other
				assigned.SetWorkload(w, other)
			},
			"RemoveWorkload": func(t *rapid.T) {
				w := rapid.IntRange(0, 9).Draw(t, "workload")
				delete(workloads, w)
				delete(inForce, w)
				assigned.RemoveWorkload(w)
				if got := assigned.Effective(w); got != nil {
					t.Fatalf("Effective(removed) = %+v, want nil", got)
				}
			},
			"SetPolicy": func(t *rapid.T) {
				p := random(t).policy()
				policies[p.Ref] = p
				assigned.SetPolicy(p)
			},
			"SetPolicy, changed in one thing": func(t *rapid.T) {
				random := random(t)
				p, ok := policies[random.policy().Ref]
				if !ok {
					t.Skip()
				}
				switch other := random.policy(); rapid.IntRange(0, 4).Draw(t, "thing") {
				case 0:
					p.Created = other.Created
				case 1:
					p.Selector = other.Selector
				case 2:
					p.Mode = other.Mode
				case 3:
					p.Ports = other.Ports
				case 4:
					p.Problems = other.Problems
				}
				policies[p.Ref] = p
				assigned.SetPolicy(p)
			},
			"RemovePolicy": func(t *rapid.T) {
				ref := random(t).policy().Ref
				delete(policies, ref)
				assigned.RemovePolicy(ref)
			},
			"ReplacePolicies": func(t *rapid.T) {
				random := random(t)
				keep := random.IntN(3)
				maps.DeleteFunc(policies, func(policy.Ref, policy.PeerAuthentication) bool { return random.IntN(3) < keep })
				for range random.IntN(6) {
					p := random.policy()
					policies[p.Ref] = p
				}
				assigned.ReplacePolicies(slices.Collect(maps.Values(policies)))
			},
			"ReplacePolicies by the same": func(*rapid.T) {
				assigned.ReplacePolicies(slices.Collect(maps.Values(policies)))
			},
		})
	})
}

// PA40: a selector starts to match a pod, and stops.
func TestRelabel(t *testing.T) {
	var changed []string
	assigned := policy.NewAssignments("istio-system", func(w string) { changed = append(changed, w) })
	assigned.ReplacePolicies(read(t, "mesh P; wl S@1 80=D"))
	other := policy.Workload{Namespace: "shop", Labels: map[string]string{"app": "other"}}
	for i, test := range []struct {
		workload policy.Workload
		want     string
		changed  bool
	}{
		{other, "80=P *=P", true},
		{cart, "80=D *=S", true},
		{policy.Workload{Namespace: "shop", Labels: map[string]string{"app": "cart", "version": "3"}}, "80=D *=S", false},
		{other, "80=P *=P", true},
		{policy.Workload{Namespace: "bank", Labels: cart.Labels}, "80=P *=P", false},
		{cart, "80=D *=S", true},
	} {
		changed = nil
		assigned.SetWorkload("pod", test.workload)
		if got := modes(assigned.Effective("pod"), test.want); got != test.want {
			t.Errorf("step %d: %s, want %s", i, got, test.want)
		}
		if slices.Contains(changed, "pod") != test.changed {
			t.Errorf("step %d: changed was called for %q", i, changed)
		}
	}
}

// PA41 and PA43, with workloads that live on.
func TestPoliciesChangeUnderWorkloads(t *testing.T) {
	changes := 0
	assigned := policy.NewAssignments(root, func(string) { changes++ })
	assigned.SetWorkload("one", cart)
	assigned.SetWorkload("two", cart)
	assigned.SetWorkload("root", policy.Workload{Namespace: root, Labels: cart.Labels})
	step := func(name string, wantChanges int, want string, do func()) {
		t.Helper()
		changes = 0
		do()
		if changes != wantChanges {
			t.Errorf("%s: changed was called %d times, want %d", name, changes, wantChanges)
		}
		for _, w := range []string{"one", "two"} {
			if got := modes(assigned.Effective(w), want); got != want {
				t.Errorf("%s: %s has %s, want %s", name, w, got, want)
			}
		}
	}
	put := func(s string) func() {
		return func() {
			for _, p := range read(t, s) {
				assigned.SetPolicy(p)
			}
		}
	}
	remove := func(namespace, name string) func() {
		return func() { assigned.RemovePolicy(policy.Ref{Namespace: namespace, Name: name}) }
	}
	step("a workload policy", 2, "80=P *=S", put("wl/a S@1 80=P"))
	step("a younger one", 0, "80=P *=S", put("wl/b D@2"))
	step("the same again", 0, "80=P *=S", put("wl/a S@1 80=P"))
	step("the oldest is deleted", 2, "80=D *=D", remove("shop", "a"))
	step("a namespace policy", 0, "80=D *=D", put("ns S@1"))
	step("it inherits", 2, "80=S *=S", put("wl/b U@2"))
	step("the mesh's, overridden", 1, "80=S *=S", put("mesh D@1"))
	step("no workload policy", 0, "80=S *=S", remove("shop", "b"))
	step("no namespace policy", 2, "80=D *=D", remove("shop", "ns"))
	step("a selector in the root namespace", 0, "80=D *=D", put("root S@0"))
	step("without its selector", 3, "80=S *=S", func() {
		p := read(t, "root S@0")[0]
		p.Selector = nil
		assigned.SetPolicy(p)
	})
	step("none at all", 3, "80=P *=P", func() { assigned.ReplacePolicies(nil) })
	step("deleted twice", 0, "80=P *=P", remove("shop", "a"))
	step("a workload is gone", 0, "80=P *=P", func() { assigned.RemoveWorkload("root"); assigned.RemoveWorkload("root") })

	renamed := policy.NewAssignments[string]("mesh-root", nil)
	renamed.SetWorkload("one", cart)
	renamed.SetWorkload("root", policy.Workload{Namespace: root, Labels: cart.Labels})
	renamed.ReplacePolicies(read(t, "mesh S; root D 80=P"))
	for w, want := range map[string]string{"one": "80=P *=P", "root": "80=P *=D"} {
		if got := modes(renamed.Effective(w), want); got != want {
			t.Errorf("the root namespace is another, and %s has %s, want %s", w, got, want)
		}
	}
}

func TestFindings(t *testing.T) {
	shadowed := func(message string) policy.Finding {
		return policy.Finding{Code: policy.Shadowed, Message: message}
	}
	undeclared := func(port string) policy.Finding {
		return policy.Finding{Code: policy.PortNotDeclared, Message: "no container that it selects declares port " + port + ": ports are those of containers, not of Services"}
	}
	for _, test := range []struct {
		name      string
		policies  string
		namespace string
		workloads []policy.Workload
		want      map[string][]policy.Finding
	}{
		{"all is well", "mesh S; ns P; wl S 8080=D", "shop", []policy.Workload{cart}, map[string][]policy.Finding{"ns": {}, "wl": {}}},
		{"none", "mesh S", "shop", []policy.Workload{cart}, map[string][]policy.Finding{}},
		{"the mesh's", "mesh/b S@1; mesh/a S@2; mesh/c D@1; root P; wl S", root, nil, map[string][]policy.Finding{
			"a":    {shadowed("not in force: istio-system/b is older")},
			"b":    {},
			"c":    {shadowed("not in force: istio-system/b is as old, and its name comes first")},
			"root": {{Code: policy.SelectorInRootNamespace, Message: "a policy with a selector is ignored in the root namespace"}},
		}},
		{"the namespace's", "ns/a S@1; ns/b S", "shop", nil, map[string][]policy.Finding{
			"a": {},
			"b": {shadowed("not in force: shop/a exists already")},
		}},
		{"a port of a Service", "wl S 80=D 8080=D", "shop", []policy.Workload{cart, cart}, map[string][]policy.Finding{"wl": {undeclared("80")}}},
		{"a port that some declare", "wl S 80=D", "shop", []policy.Workload{cart, withPorts(80)}, map[string][]policy.Finding{"wl": {}}},
		{"a port that some may have", "wl S 80=D", "shop", []policy.Workload{cart, withPorts()}, map[string][]policy.Finding{"wl": {}}},
		// Ports whose hashes are the same.
		{"ports that are alike", "wl S 2=D 33=D", "shop", []policy.Workload{withPorts(1, 33), withPorts(2, 2)}, map[string][]policy.Finding{"wl": {}}},
		{"nothing selected", "miss S 80=D", "shop", []policy.Workload{cart}, map[string][]policy.Finding{
			"miss": {{Code: policy.SelectsNothing, Message: "no workload of namespace shop has the labels of its selector"}},
		}},
		{"nobody there", "wl S", "shop", nil, map[string][]policy.Finding{
			"wl": {{Code: policy.SelectsNothing, Message: "no workload of namespace shop has the labels of its selector"}},
		}},
		{"shadowed for some", "wl/all S@3; version/one S@1; version/two S@2", "shop", []policy.Workload{cart, cart, withPorts(80), {Namespace: "shop", Labels: map[string]string{"app": "cart"}}},
			map[string][]policy.Finding{
				"all": {shadowed("not in force for 3 of the 4 workloads that it selects: older policies win, shop/one")},
				"one": {},
				"two": {shadowed("not in force for 3 of the 3 workloads that it selects: older policies win, shop/one")},
			}},
		{"shadowed by name", "wl/b S@1; wl/a S@1", "shop", []policy.Workload{cart}, map[string][]policy.Finding{
			"a": {},
			"b": {shadowed("not in force for 1 of the 1 workloads that it selects: others win, shop/a")},
		}},
		{"invalid", "wl/a !@1 80=D; wl/b S@2", "shop", []policy.Workload{cart}, map[string][]policy.Finding{
			"a": {{Code: policy.Invalid, Message: "STRICT for what it selects, because it is not valid: spec: is wrong"}},
			"b": {shadowed("not in force for 1 of the 1 workloads that it selects: older policies win, shop/a")},
		}},
		{"invalid and ignored", "root !", root, nil, map[string][]policy.Finding{
			"root": {
				{Code: policy.Invalid, Message: "not valid: spec: is wrong"},
				{Code: policy.SelectorInRootNamespace, Message: "a policy with a selector is ignored in the root namespace"},
			},
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			assigned := policy.NewAssignments[string](root, nil)
			for i, w := range test.workloads {
				assigned.SetWorkload(strconv.Itoa(i), w)
			}
			for _, p := range read(t, test.policies) {
				assigned.SetPolicy(p)
			}
			got := make(map[string][]policy.Finding)
			for ref, findings := range assigned.Findings(test.namespace) {
				if ref.Namespace != test.namespace || findings == nil {
					t.Errorf("Findings(%s) has %v: %v", test.namespace, ref, findings)
				}
				got[ref.Name] = findings
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("Findings(%s) (-want +got):\n%s", test.namespace, diff)
			}
		})
	}
}

// Many shadowing policies are named in part.
func TestFindingsAreShort(t *testing.T) {
	assigned := policy.NewAssignments[int](root, nil)
	for i := range 9 {
		label := map[string]string{"app": "cart", "shard": strconv.Itoa(i)}
		assigned.SetWorkload(i, policy.Workload{Namespace: "shop", Labels: label})
		p := read(t, "wl/shard-"+strconv.Itoa(i)+" S@1")[0]
		p.Selector = label
		assigned.SetPolicy(p)
	}
	assigned.SetPolicy(read(t, "wl S@2")[0])
	want := "not in force for 9 of the 9 workloads that it selects: older policies win, " +
		"shop/shard-0, shop/shard-1, shop/shard-2, shop/shard-3, shop/shard-4, 4 more"
	got := assigned.Findings("shop")[policy.Ref{Namespace: "shop", Name: "wl"}]
	if diff := cmp.Diff([]policy.Finding{{Code: policy.Shadowed, Message: want}}, got); diff != "" {
		t.Errorf("Findings() (-want +got):\n%s", diff)
	}
}

func withPorts(ports ...uint16) policy.Workload {
	w := cart
	w.ContainerPorts = ports
	return w
}
