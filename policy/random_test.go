package policy_test

import (
	"math/rand/v2"
	"time"

	"troth.dev/troth/policy"
)

// random makes policies and workloads of few names, labels and ages, so that they
// meet.
type random struct{ *rand.Rand }

func newRandom(seed uint64) random { return random{rand.New(rand.NewPCG(seed, seed))} }

func (r random) policy() policy.PeerAuthentication {
	p := policy.PeerAuthentication{
		Ref:      policy.Ref{Namespace: r.one(root, "shop", "shop", "bank"), Name: r.one("a", "b", "c", "d", "e")},
		Selector: r.labels(2),
		Mode:     policy.Mode(r.IntN(4)),
	}
	if r.IntN(4) > 0 {
		p.Created = time.Unix(int64(1_700_000_000+r.IntN(3)), 0)
	}
	if r.IntN(8) == 0 {
		p.Problems = []policy.Problem{{Field: "spec", Message: "is wrong"}}
	}
	for range r.IntN(3) {
		if p.Ports == nil {
			p.Ports = make(map[uint16]policy.Mode)
		}
		p.Ports[uint16(1+r.IntN(3))] = policy.Mode(r.IntN(4))
	}
	return p
}

func (r random) workload() policy.Workload {
	return policy.Workload{Namespace: r.one(root, "shop", "shop", "shop", "bank", "empty"), Labels: r.labels(4)}
}

func (r random) labels(most int) map[string]string {
	labels := make(map[string]string)
	for range r.IntN(most + 1) {
		labels[r.one("app", "tier", "version")] = r.one("1", "2")
	}
	return labels
}

func (r random) one(words ...string) string { return words[r.IntN(len(words))] }
