package trothtest

import (
	"errors"
	"fmt"
	"net/netip"

	"troth.dev/troth/policy"
)

// rootNamespace is whose policies are for the whole mesh, as Troth and Istio have it
// unless told otherwise.
const rootNamespace = "istio-system"

// ApplyPolicies puts the PeerAuthentications of a text in force, in the place of those
// before: YAML, as they are applied to a cluster. Those that name no namespace belong to
// "default". One that is not valid is a failure, where in a cluster it would be STRICT
// for what it selects. Without any, every workload is PERMISSIVE.
func (a *Authority) ApplyPolicies(manifests string) {
	if a.t != nil {
		a.t.Helper()
	}
	a.act("apply policies", func() error {
		policies, err := policy.Parse([]byte(manifests), "default")
		if err != nil {
			return err
		}
		for _, p := range policies {
			for _, problem := range p.Problems {
				err = errors.Join(err, fmt.Errorf("%s: %v", p.Ref, problem))
			}
		}
		if err != nil {
			return err
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		a.policies = policy.NewSet(rootNamespace, policies...)
		return nil
	})
}

// Decide says whether the policies let a connection to a port of a workload pass, why,
// and by which of them, with the code by which agents decide in a cluster. A nil caller
// speaks plaintext.
func (a *Authority) Decide(workload policy.Workload, port uint16, caller *Identity) policy.Verdict {
	a.mu.Lock()
	defer a.mu.Unlock()
	// From somewhere: the address matters only if it is a kubelet's.
	connection := policy.Connection{Port: port, Source: netip.AddrFrom4([4]byte{192, 0, 2, 1})}
	if caller != nil {
		connection.Peer = caller.id
	}
	return a.policies.Resolve(workload).Decide(connection)
}
