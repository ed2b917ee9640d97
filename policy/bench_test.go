package policy_test

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"troth.dev/troth/policy"
)

// A large cluster: 100,000 pods of 10,000 ReplicaSets in 500 namespaces, and
// 2,000 policies: one for the mesh, one for each namespace, the rest for
// workloads.
const (
	benchNamespaces  = 500
	benchReplicaSets = 20 // in a namespace
	benchReplicas    = 10
	benchPods        = benchNamespaces * benchReplicaSets * benchReplicas
	benchPolicies    = 2_000
)

func benchWorkload(namespace, replicaSet int) policy.Workload {
	return policy.Workload{
		Namespace: fmt.Sprintf("team-%d", namespace),
		Labels: map[string]string{
			"app":                          fmt.Sprintf("app-%d", replicaSet),
			"app.kubernetes.io/managed-by": "Helm",
			"pod-template-hash":            fmt.Sprintf("%x", 7919*replicaSet+namespace),
			"team":                         fmt.Sprintf("team-%d", namespace),
			"tier":                         "backend",
			"version":                      "2",
		},
		ContainerPorts: []uint16{8080, 9090},
	}
}

func benchWorkloads() []policy.Workload {
	workloads := make([]policy.Workload, 0, benchPods)
	for namespace := range benchNamespaces {
		for replicaSet := range benchReplicaSets {
			for range benchReplicas {
				workloads = append(workloads, benchWorkload(namespace, replicaSet))
			}
		}
	}
	return workloads
}

func benchPolicy(namespace, name string, mode policy.Mode, selector map[string]string) policy.PeerAuthentication {
	p := policy.PeerAuthentication{
		Ref:     policy.Ref{Namespace: namespace, Name: name},
		Created: time.Unix(1_700_000_000, 0), Selector: selector, Mode: mode,
	}
	if selector != nil {
		p.Ports = map[uint16]policy.Mode{9090: policy.Permissive}
	}
	return p
}

func benchSet() []policy.PeerAuthentication {
	policies := []policy.PeerAuthentication{benchPolicy(root, "mesh", policy.Permissive, nil)}
	for i := 0; len(policies) < benchPolicies; i++ {
		namespace := fmt.Sprintf("team-%d", i%benchNamespaces)
		if i < benchNamespaces {
			policies = append(policies, benchPolicy(namespace, "all", policy.Unset, nil))
			continue
		}
		replicaSet := i / benchNamespaces
		policies = append(policies, benchPolicy(namespace, fmt.Sprintf("app-%d", replicaSet), policy.Strict,
			map[string]string{"app": fmt.Sprintf("app-%d", replicaSet), "tier": "backend"}))
	}
	return policies
}

// BenchmarkResolve asks a set of 1,000 policies of workload scope, all in one
// namespace, for a workload that the last of them selects.
func BenchmarkResolve(b *testing.B) {
	policies := make([]policy.PeerAuthentication, 1000)
	for i := range policies {
		policies[i] = benchPolicy("team-1", fmt.Sprintf("app-%03d", i), policy.Strict,
			map[string]string{"app": fmt.Sprintf("app-%d", i), "tier": "backend"})
	}
	set := policy.NewSet(root, policies...)
	w := benchWorkload(1, 999)
	b.ReportAllocs()
	for b.Loop() {
		if set.Resolve(w).Mode != policy.Strict {
			b.Fatal("another policy won")
		}
	}
}

func BenchmarkDecide(b *testing.B) {
	effective := policy.NewSet(root, read(b, "wl S 80=S 8080=P 8081=D 9090=P")...).Resolve(cart)
	for _, bench := range []struct {
		name string
		c    policy.Connection
		want policy.Reason
	}{
		{"mTLS", policy.Connection{Peer: web, Port: 8080, Source: client}, policy.MTLSAccepted},
		{"plaintext", policy.Connection{Port: 80, Source: client}, policy.PlaintextRefused},
		{"probe", policy.Connection{Port: 80, Source: probe6}, policy.ProbeExempt},
	} {
		b.Run(bench.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if got := effective.Decide(bench.c, probe4, probe6).Reason; got != bench.want {
					b.Fatal(got)
				}
			}
		})
	}
}

// BenchmarkCompile starts from nothing: policies first, as a server does that
// must not stream a pod before it knows them. bytes/pod is what is kept for a
// pod beside its labels, its share of the policies included.
func BenchmarkCompile(b *testing.B) {
	for _, bench := range []struct {
		name      string
		workloads []policy.Workload
	}{
		{"replica sets", benchWorkloads()},
		{"one namespace of singles", benchSingles()},
	} {
		b.Run(bench.name, func(b *testing.B) {
			policies := benchSet()
			var before, after runtime.MemStats
			for b.Loop() {
				b.StopTimer()
				runtime.GC()
				runtime.ReadMemStats(&before)
				b.StartTimer()
				assigned := policy.NewAssignments[*policy.Workload](root, nil)
				assigned.ReplacePolicies(policies)
				for i := range bench.workloads {
					assigned.SetWorkload(&bench.workloads[i], bench.workloads[i])
				}
				b.StopTimer()
				runtime.GC()
				runtime.ReadMemStats(&after)
				runtime.KeepAlive(assigned)
				b.StartTimer()
			}
			b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/benchPods, "bytes/pod")
		})
	}
}

func BenchmarkPolicyChange(b *testing.B) {
	modes := []policy.Mode{policy.Strict, policy.Disable}
	for _, bench := range []struct {
		name      string
		workloads []policy.Workload
		policy    policy.PeerAuthentication
		want      int // how many change
	}{
		{"workload", benchWorkloads(), benchPolicy("team-1", "app-1", 0, map[string]string{"app": "app-1", "tier": "backend"}), benchReplicas},
		{"namespace", benchWorkloads(), benchPolicy("team-1", "all", 0, nil), benchReplicas * (benchReplicaSets - 3)},
		{"mesh", benchWorkloads(), benchPolicy(root, "mesh", 0, nil), benchPods - (benchPolicies-1-benchNamespaces)*benchReplicas},
		{"one namespace of singles, one", benchSingles(), benchPolicy("team-1", "single-1", 0, map[string]string{"pod": "pod-1"}), 1},
		{"one namespace of singles, all", benchSingles(), benchPolicy("team-1", "all", 0, nil), benchPods},
	} {
		b.Run(bench.name, func(b *testing.B) {
			changed := 0
			assigned := policy.NewAssignments(root, func(*policy.Workload) { changed++ })
			assigned.ReplacePolicies(benchSet())
			for i := range bench.workloads {
				assigned.SetWorkload(&bench.workloads[i], bench.workloads[i])
			}
			p := bench.policy
			changed = 0
			changes := 0
			for b.Loop() {
				p.Mode = modes[changes%2]
				changes++
				assigned.SetPolicy(p)
			}
			// The first change may be to what is in force already.
			if changed < (changes-1)*bench.want || changed > changes*bench.want {
				b.Errorf("%d changes changed %d workloads, want %d each", changes, changed, bench.want)
			}
		})
	}
}

// benchSingles is the worst that labels can do: no two pods are alike, and all
// are in one namespace.
func benchSingles() []policy.Workload {
	workloads := make([]policy.Workload, benchPods)
	for i := range workloads {
		workloads[i] = benchWorkload(1, 0)
		workloads[i].Labels["app"] = "singles"
		workloads[i].Labels["pod"] = fmt.Sprintf("pod-%d", i)
	}
	return workloads
}

func BenchmarkFindings(b *testing.B) {
	assigned := policy.NewAssignments[*policy.Workload](root, nil)
	assigned.ReplacePolicies(benchSet())
	workloads := benchWorkloads()
	for i := range workloads {
		assigned.SetWorkload(&workloads[i], workloads[i])
	}
	for b.Loop() {
		if len(assigned.Findings("team-1")) == 0 {
			b.Fatal("no findings")
		}
	}
}

func BenchmarkParse(b *testing.B) {
	text := []byte(document)
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		if _, err := policy.Parse(text, "shop"); err != nil {
			b.Fatal(err)
		}
	}
}

const document = `
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata:
  name: cart
  namespace: shop
spec:
  selector:
    matchLabels:
      app: cart
  mtls:
    mode: STRICT
  portLevelMtls:
    8080:
      mode: DISABLE
`
