package policy_test

import "troth.dev/troth/policy"

// oracle is the rules, one after the other, as they are written down, and without
// a thought for speed. It answers for one port: which mode, and by which policy.
func oracle(root string, policies []policy.PeerAuthentication, w policy.Workload, port uint16) (policy.Mode, policy.Ref) {
	// One policy counts in each scope: the oldest; of those that are as old, the
	// one whose name comes first. What was not created yet is the youngest.
	older := func(p, q policy.PeerAuthentication) bool {
		if p.Created.Equal(q.Created) {
			return p.Name < q.Name
		}
		if p.Created.IsZero() || q.Created.IsZero() {
			return q.Created.IsZero()
		}
		return p.Created.Before(q.Created)
	}
	var mesh, namespace, workload *policy.PeerAuthentication
	for _, p := range policies {
		var scope **policy.PeerAuthentication
		switch {
		case p.Namespace == root && len(p.Selector) == 0:
			scope = &mesh
		case p.Namespace == root:
			continue // a selector in the root namespace is ignored
		case p.Namespace != w.Namespace:
			continue
		case len(p.Selector) == 0:
			scope = &namespace
		default:
			has := 0
			for key, value := range w.Labels {
				if wanted, ok := p.Selector[key]; ok && wanted == value {
					has++
				}
			}
			if has < len(p.Selector) {
				continue
			}
			scope = &workload
		}
		if *scope == nil || older(p, **scope) {
			*scope = &p
		}
	}

	// The mode is the narrowest scope's that has one.
	mode, by := policy.Permissive, policy.Ref{}
	for _, p := range []*policy.PeerAuthentication{workload, namespace, mesh} {
		if p != nil && len(p.Problems) > 0 {
			mode, by = policy.Strict, p.Ref
			break
		}
		if p != nil && p.Mode != policy.Unset {
			mode, by = p.Mode, p.Ref
			break
		}
	}
	// The port's is the winning workload policy's, if that has one.
	if workload != nil && len(workload.Problems) == 0 {
		if at := workload.Ports[port]; at != policy.Unset && at != mode {
			return at, workload.Ref
		}
	}
	return mode, by
}
