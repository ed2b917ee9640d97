package policy_test

import (
	"encoding/json"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"troth.dev/troth/policy"
)

const root = "istio-system"

// cart is the workload that the tables ask about.
var cart = policy.Workload{Namespace: "shop", Labels: map[string]string{"app": "cart", "version": "2"}, ContainerPorts: []uint16{8080, 9090}}

// The cases are those of Istio's own tests and documentation, and those that it
// has none for. Each policy is a scope, perhaps a name, a mode, perhaps an age in
// seconds, and perhaps ports.
var cases = []struct {
	id       string
	policies string
	root     string // if it is not istio-system
	want     string // the modes at ports, and * for every other port
}{
	{id: "PA01", policies: "", want: "*=P"},
	{id: "PA02", policies: "mesh S", want: "*=S"},
	{id: "PA03", policies: "mesh U", want: "*=P"},
	{id: "PA04", policies: "mesh D", want: "*=D"},
	{id: "PA05", policies: "mesh{} S; ns P", want: "*=P"},
	{id: "PA05 alone", policies: "mesh{} S", want: "*=S"},
	{id: "PA05 namespace", policies: "mesh D; ns{} S", want: "*=S"},
	{id: "PA06", policies: "mesh S; ns U", want: "*=S"},
	{id: "PA07", policies: "mesh P; ns S", want: "*=S"},
	{id: "PA08", policies: "root S", want: "*=P"},
	{id: "PA09", policies: "ns U; wl U", want: "*=P"},
	{id: "PA10", policies: "mesh D; ns P", want: "*=P"},
	{id: "PA11", policies: "mesh/a D@2; mesh/b P@1; mesh/c S@1", want: "*=P"},
	{id: "PA11 by name", policies: "mesh/a D@2; mesh/c P@1; mesh/b S@1", want: "*=S"},
	{id: "PA12", policies: "ns/a D@2; ns/b P@1; ns/c S@1", want: "*=P"},
	{id: "PA12 by name", policies: "ns/a D@2; ns/c P@1; ns/b S@1", want: "*=S"},
	{id: "PA13", policies: "wl/a D@2; wl/b P@1; wl/c S@1", want: "*=P"},
	{id: "PA13 by name", policies: "wl/a D@2; wl/c P@1; wl/b S@1", want: "*=S"},
	{id: "PA13 not created", policies: "wl/a D; wl/b P@1; wl/c S", want: "*=P"},
	{id: "PA13 none created", policies: "wl/b D; wl/a P; wl/c S", want: "*=P"},
	{id: "PA14", policies: "wl/old S@1; wl/new U@2 80=D", want: "80=S *=S"},
	{id: "PA15", policies: "mesh S; wl U", want: "*=S"},
	{id: "PA16", policies: "ns S; wl U", want: "*=S"},
	{id: "PA17", policies: "mesh S; ns U; wl U", want: "*=S"},
	{id: "PA18", policies: "mesh S; wl U 80=D 90=U 100=U", want: "80=D 90=S 100=S *=S"},
	{id: "PA19", policies: "wl S 9090=D", want: "9090=D *=S"},
	{id: "PA20", policies: "wl S 9090=P", want: "9090=P *=S"},
	{id: "PA21", policies: "wl S 9090=S 8080=P", want: "8080=P 9090=S *=S"},
	{id: "PA22", policies: "wl S 8080=S", want: "8080=S *=S"},
	{id: "PA23", policies: "wl P 9090=S", want: "9090=S *=P"},
	{id: "PA24", policies: "wl P 9090=S 8080=P", want: "9090=S 8080=P *=P"},
	{id: "PA25", policies: "wl D 9090=S", want: "9090=S *=D"},
	{id: "PA26", policies: "wl U 8080=S", want: "8080=S *=P"},
	{id: "PA27", policies: "mesh P; ns S; wl U 9090=P", want: "9090=P *=S"},
	{id: "PA28", policies: "mesh P; ns P; wl U 9090=S 8080=S", want: "9090=S 8080=S *=P"},
	{id: "PA29", policies: "mesh P; ns U; wl U 9090=S 8080=P", want: "9090=S 8080=P *=P"},
	{id: "PA30", policies: "mesh S; ns P; wl U 9090=S", want: "9090=S *=P"},
	{id: "PA31", policies: "mesh S; wl U 9090=P", want: "9090=P *=S"},
	{id: "PA32", policies: "mesh S; wl U 9090=P 8080=S", want: "9090=P 8080=S *=S"},
	{id: "PA33", policies: "mesh P; wl U 9090=P", want: "9090=P *=P"},
	{id: "PA34", policies: "wl S", want: "*=S"},
	{id: "PA35", policies: "mesh S; wl U 8080=D", want: "8080=D *=S"},
	{id: "PA35 inherited", policies: "mesh S; ns U; wl U 8080=D", want: "8080=D *=S"},
	{id: "PA35 by namespace", policies: "ns S; wl U 8080=D", want: "8080=D *=S"},
	{id: "PA36", policies: "mesh S; wl P 80=S", want: "80=S *=P"},
	{id: "PA36 disable", policies: "mesh S; wl D 80=S", want: "80=S *=D"},
	{id: "PA36 unset", policies: "mesh S; ns U; wl P 80=S", want: "80=S *=P"},
	{id: "PA37", policies: "mesh S; ns U; wl U 80=P", want: "80=P *=S"},
	{id: "PA38", policies: "mesh P; miss S", want: "*=P"},
	{id: "PA39", policies: "mesh D; elsewhere S", want: "*=D"},
	{id: "PA42", policies: "wl S 80=D", want: "8080=S 80=D *=S"},
	{id: "PA43 before", policies: "mesh S; wl U 80=D", want: "80=D *=S"},
	// The namespace that was the root is one like any other.
	{id: "PA43", policies: "mesh S; wl U 80=D", root: "mesh-root", want: "80=D *=P"},
	{id: "PA43 own", policies: "mesh D; ns S; wl U 80=P", root: "shop", want: "80=S *=S"},

	{id: "invalid", policies: "mesh P; wl ! 80=D", want: "80=S *=S"},
	{id: "invalid namespace", policies: "mesh P; ns !; wl U 80=D", want: "80=D *=S"},
	{id: "invalid, overridden", policies: "mesh !; ns P", want: "*=P"},
	{id: "invalid, shadowed", policies: "wl/a P@1; wl/b !@2", want: "*=P"},
	{id: "invalid, first", policies: "wl/a !@1; wl/b P@2", want: "*=S"},
	{id: "invalid, ignored", policies: "root !", want: "*=P"},
	{id: "unknown mode", policies: "mesh ?", want: "*=S"},
	{id: "unknown mode of a port", policies: "wl P 80=?", want: "80=S *=P"},
}

func TestResolve(t *testing.T) {
	for _, test := range cases {
		t.Run(test.id, func(t *testing.T) {
			rootNamespace := root
			if test.root != "" {
				rootNamespace = test.root
			}
			policies := read(t, test.policies)
			check := func(how string, got *policy.Effective) {
				t.Helper()
				if s := modes(got, test.want); s != test.want {
					t.Errorf("%s: %s, want %s", how, s, test.want)
				}
			}
			check("NewSet", policy.NewSet(rootNamespace, policies...).Resolve(cart))

			// Whatever was there, and in whichever order it came.
			for i, order := range permutations(policies) {
				set := policy.NewSet(rootNamespace)
				assigned := policy.NewAssignments[string](rootNamespace, nil)
				if i%2 == 0 {
					assigned.SetWorkload("cart", cart)
				}
				for _, p := range order {
					for _, earlier := range earlier(p) {
						set.Put(earlier)
						assigned.SetPolicy(earlier)
					}
				}
				for _, p := range order {
					set.Put(p)
					assigned.SetPolicy(p)
				}
				for _, p := range order {
					set.Delete(policy.Ref{Namespace: p.Namespace, Name: p.Name + "-earlier"})
					assigned.RemovePolicy(policy.Ref{Namespace: p.Namespace, Name: p.Name + "-earlier"})
				}
				assigned.SetWorkload("cart", cart)
				check("Put and Delete", set.Resolve(cart))
				check("SetPolicy and RemovePolicy", assigned.Effective("cart"))
			}
		})
	}
}

// earlier returns what might have been there before p.
func earlier(p policy.PeerAuthentication) []policy.PeerAuthentication {
	other, before := p, p
	other.Mode = (p.Mode + 1) % 4
	other.Created = time.Unix(0, 0)
	other.Selector = map[string]string{"version": "2"}
	before.Name += "-earlier"
	before.Created = time.Unix(0, 0)
	before.Ports = map[uint16]policy.Mode{80: policy.Permissive}
	return []policy.PeerAuthentication{other, before}
}

// The whole space of one policy in each scope, with up to two ports.
func TestResolveAgainstOracle(t *testing.T) {
	modes := []string{"absent", "none", "UNSET", "DISABLE", "PERMISSIVE", "STRICT"}
	points := 0
	for _, mesh := range modes {
		for _, namespace := range modes {
			for _, workload := range modes {
				for _, port1 := range modes {
					for _, port2 := range modes {
						if workload == "absent" && (port1 != "absent" || port2 != "absent") {
							continue
						}
						var policies []policy.PeerAuthentication
						add := func(namespace, mode string, selector, ports map[string]any) {
							if mode == "absent" {
								return
							}
							p := policy.Decode(object(namespace, mode, selector, ports))
							if len(p.Problems) > 0 {
								t.Fatal(p.Problems)
							}
							policies = append(policies, p)
						}
						ports := make(map[string]any)
						for port, mode := range map[string]string{"8080": port1, "9090": port2} {
							if mode != "absent" {
								ports[port] = mtls(mode)
							}
						}
						add(root, mesh, nil, nil)
						add("shop", namespace, nil, nil)
						add("shop", workload, map[string]any{"matchLabels": map[string]any{"app": "cart"}}, ports)

						effective := policy.NewSet(root, policies...).Resolve(cart)
						for _, port := range []uint16{8080, 9090, 1} {
							points++
							mode, by := effective.At(port)
							wantMode, wantBy := oracle(root, policies, cart, port)
							if mode != wantMode || by != wantBy {
								t.Errorf("mesh %s, namespace %s, workload %s, 8080 %s, 9090 %s: At(%d) = %v by %q, want %v by %q",
									mesh, namespace, workload, port1, port2, port, mode, by, wantMode, wantBy)
							}
						}
						for _, p := range effective.Ports {
							if p.Mode == effective.Mode {
								t.Errorf("%+v has a port that does not differ", effective)
							}
						}
						if (len(effective.Ports) == 0) != effective.PortsBy.IsZero() {
							t.Errorf("%+v has ports from nowhere, or none from somewhere", effective)
						}
					}
				}
			}
		}
	}
	if points < 7950 {
		t.Errorf("%d points, want all", points)
	}
}

// Shadowing, ties and several labels, over many random sets, against the oracle.
func TestResolveRandomAgainstOracle(t *testing.T) {
	random := newRandom(1)
	for range 20_000 {
		policies := make([]policy.PeerAuthentication, random.IntN(12))
		for i := range policies {
			policies[i] = random.policy()
		}
		// Of two with the same name the last counts.
		byRef := make(map[policy.Ref]policy.PeerAuthentication)
		for _, p := range policies {
			byRef[p.Ref] = p
		}
		w := random.workload()
		effective := policy.NewSet(root, policies...).Resolve(w)
		for _, port := range []uint16{1, 2, 3} {
			mode, by := effective.At(port)
			wantMode, wantBy := oracle(root, slices.Collect(maps.Values(byRef)), w, port)
			if mode != wantMode || by != wantBy {
				t.Fatalf("%+v at port %d among %+v: %v by %q, want %v by %q", w, port, policies, mode, by, wantMode, wantBy)
			}
		}
	}
}

// PA41: the second-oldest takes over.
func TestOldestDeleted(t *testing.T) {
	policies := read(t, "wl/a S@1; wl/b D@2; wl/c P@3")
	set := policy.NewSet(root, policies...)
	for _, want := range []string{"S", "D", "P"} {
		if got := letter(set.Resolve(cart).Mode); got != want {
			t.Errorf("%d policies are left, and the mode is %s, want %s", len(set.All()), got, want)
		}
		set.Delete(set.Resolve(cart).DecidedBy)
	}
	if diff := cmp.Diff(&policy.Effective{Mode: policy.Permissive}, set.Resolve(cart)); diff != "" {
		t.Errorf("without policies (-want +got):\n%s", diff)
	}
	set.Delete(policies[0].Ref) // not there any more
}

func TestSetAll(t *testing.T) {
	policies := read(t, "wl/b S; mesh S; ns/a D; root P")
	var got []string
	for _, p := range policy.NewSet(root, policies...).All() {
		got = append(got, p.String())
	}
	if diff := cmp.Diff([]string{"istio-system/mesh", "istio-system/root", "shop/a", "shop/b"}, got); diff != "" {
		t.Errorf("All() (-want +got):\n%s", diff)
	}
}

// The race detector is the judge.
func TestSetReaders(t *testing.T) {
	set := policy.NewSet(root, read(t, "mesh S; ns U; wl U 80=D; wl/b P")...)
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			for range 100 {
				set.Resolve(cart)
				set.Explain(cart)
				set.All()
			}
		})
	}
	readers.Wait()
}

func TestZeroSet(t *testing.T) {
	var set policy.Set
	if got := set.Resolve(cart); got != nil {
		t.Errorf("Resolve() of the zero Set = %+v, want nil, which refuses", got)
	}
}

func TestMode(t *testing.T) {
	for mode, name := range map[policy.Mode]string{
		policy.Unset: "UNSET", policy.Disable: "DISABLE", policy.Permissive: "PERMISSIVE", policy.Strict: "STRICT",
	} {
		if got, err := policy.ParseMode(name); got != mode || err != nil || mode.String() != name {
			t.Errorf("ParseMode(%q) = %v, %v", name, got, err)
		}
		text, err := json.Marshal(mode)
		if err != nil || string(text) != strconv.Quote(name) {
			t.Errorf("Marshal(%v) = %s, %v", mode, text, err)
		}
		var back policy.Mode
		if err := json.Unmarshal(text, &back); err != nil || back != mode {
			t.Errorf("Unmarshal(%s) = %v, %v", text, back, err)
		}
	}
	for _, name := range []string{"", "strict", "STRICT ", "MUTUAL", "Mode(4)", "3"} {
		if got, err := policy.ParseMode(name); got != policy.Unset || err == nil {
			t.Errorf("ParseMode(%q) = %v, %v, want it refused", name, got, err)
		}
		mode := policy.Strict
		if err := mode.UnmarshalText([]byte(name)); err == nil || mode != policy.Strict {
			t.Errorf("UnmarshalText(%q) = %v, and the mode is %v, want it refused", name, err, mode)
		}
	}
	if text, err := policy.Mode(4).MarshalText(); err == nil || policy.Mode(4).String() != "Mode(4)" {
		t.Errorf("Mode(4).MarshalText() = %q, want it refused", text)
	}
}

func TestRef(t *testing.T) {
	if got := (policy.Ref{Namespace: "shop", Name: "strict"}).String(); got != "shop/strict" {
		t.Errorf("String() = %q", got)
	}
	if zero := (policy.Ref{}); !zero.IsZero() || zero.String() != "" {
		t.Errorf("the zero Ref is %q", zero)
	}
	if (policy.Ref{Name: "a"}).IsZero() || (policy.Ref{Namespace: "a"}).IsZero() {
		t.Error("half a Ref is zero")
	}
}

// read makes policies of a case's notation. A mode of ! is that of a policy with
// a problem.
func read(t testing.TB, s string) []policy.PeerAuthentication {
	t.Helper()
	var policies []policy.PeerAuthentication
	for text := range strings.SplitSeq(s, ";") {
		words := strings.Fields(text)
		if len(words) == 0 {
			continue
		}
		scope, name, named := strings.Cut(words[0], "/")
		if !named {
			name = strings.TrimSuffix(scope, "{}")
		}
		p := policy.PeerAuthentication{Ref: policy.Ref{Namespace: "shop", Name: name}}
		switch scope {
		case "mesh":
			p.Namespace = root
		case "mesh{}":
			p.Namespace, p.Selector = root, map[string]string{}
		case "root":
			p.Namespace, p.Selector = root, map[string]string{"app": "cart"}
		case "ns":
		case "ns{}":
			p.Selector = map[string]string{}
		case "wl":
			p.Selector = map[string]string{"app": "cart"}
		case "version":
			p.Selector = map[string]string{"version": "2"}
		case "miss":
			p.Selector = map[string]string{"app": "cart", "tier": "back"}
		case "elsewhere":
			p.Namespace, p.Selector = "bank", map[string]string{"app": "cart"}
		default:
			t.Fatalf("scope %q", scope)
		}
		mode, age, aged := strings.Cut(words[1], "@")
		if aged {
			seconds, err := strconv.Atoi(age)
			if err != nil {
				t.Fatal(err)
			}
			p.Created = time.Unix(int64(1_700_000_000+seconds), 0).UTC()
		}
		if mode == "!" {
			p.Problems = []policy.Problem{{Field: "spec", Message: "is wrong"}}
			mode = "P"
		}
		p.Mode = modeOf(t, mode)
		for _, word := range words[2:] {
			port, mode, _ := strings.Cut(word, "=")
			number, err := strconv.ParseUint(port, 10, 16)
			if err != nil {
				t.Fatal(err)
			}
			if p.Ports == nil {
				p.Ports = make(map[uint16]policy.Mode)
			}
			p.Ports[uint16(number)] = modeOf(t, mode)
		}
		policies = append(policies, p)
	}
	return policies
}

const letters = "UDPS?"

func modeOf(t testing.TB, s string) policy.Mode {
	t.Helper()
	i := strings.Index(letters, s)
	if i < 0 {
		t.Fatalf("mode %q", s)
	}
	return policy.Mode(i)
}

func letter(m policy.Mode) string { return letters[m : m+1] }

// modes asks e for the modes at the ports in want.
func modes(e *policy.Effective, want string) string {
	var got []string
	for word := range strings.FieldsSeq(want) {
		port, _, _ := strings.Cut(word, "=")
		number, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			number = 12345
		}
		mode, _ := e.At(uint16(number))
		got = append(got, port+"="+letter(mode))
	}
	return strings.Join(got, " ")
}

func mtls(mode string) map[string]any {
	if mode == "none" {
		return map[string]any{}
	}
	return map[string]any{"mode": mode}
}

func object(namespace, mode string, selector, ports map[string]any) map[string]any {
	spec := make(map[string]any)
	if mode != "none" {
		spec["mtls"] = mtls(mode)
	}
	name := "namespace"
	if selector != nil {
		name, spec["selector"] = "workload", selector
	}
	if len(ports) > 0 {
		spec["portLevelMtls"] = ports
	}
	return map[string]any{
		"apiVersion": "security.istio.io/v1",
		"kind":       "PeerAuthentication",
		"metadata":   map[string]any{"name": name, "namespace": namespace},
		"spec":       spec,
	}
}

func permutations[T any](items []T) [][]T {
	if len(items) == 0 {
		return [][]T{nil}
	}
	var all [][]T
	for i := range items {
		rest := slices.Delete(slices.Clone(items), i, i+1)
		for _, tail := range permutations(rest) {
			all = append(all, append([]T{items[i]}, tail...))
		}
	}
	return all
}

// comparePolicies takes policies for equal that say the same.
var comparePolicies = cmp.Options{
	cmpopts.IgnoreUnexported(policy.PeerAuthentication{}),
	cmpopts.EquateEmpty(),
	cmp.Comparer(func(a, b time.Time) bool { return a.Equal(b) }),
}
