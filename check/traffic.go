package check

import (
	"slices"
	"strings"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/identity"
	"troth.dev/troth/kube"
	"troth.dev/troth/policy"
)

func trafficChecks() []definition {
	return []definition{
		{Check{
			"policies-valid", "All policies can be read",
			"One that cannot is STRICT for what it selects, whatever its author meant.",
			"kubectl describe peerauthentication, which says in the status what is wrong.",
		}, always, func(s *Snapshot) finding {
			return findings(s, fail, "%s not valid: %s", policy.Invalid)
		}},
		{Check{
			"policies-in-force", "All policies are in force",
			"A policy that another one takes the place of, or that selects nothing, does not do what its author thinks.",
			"troth policy explain POD says which policy decides; delete the others, or mend their selectors.",
		}, always, func(s *Snapshot) finding {
			return findings(s, warn, "%s without effect, in whole or in part: %s", policy.Shadowed, policy.SelectsNothing, policy.SelectorInRootNamespace)
		}},
		{Check{
			"policy-ports", "Policies name ports of containers",
			"portLevelMtls is about the container's port: the port of a Service in its place means nothing.",
			"Write the container's port (targetPort of the Service).",
		}, always, func(s *Snapshot) finding {
			return findings(s, warn, "%s with a port that no container declares: %s", policy.PortNotDeclared)
		}},
		{Check{
			"strict-uncaptured", "Whoever is STRICT is captured",
			"A pod that is not captured takes plaintext, whatever the policy says.",
			"Take hostNetwork or the label troth.dev/capture=disabled off the pod, or give it a policy of its own that says what is so.",
		}, always, func(s *Snapshot) finding {
			return with(s.Cluster, func(c kube.Snapshot) finding {
				all, alone := assign(s.RootNamespace, c), s.leftAlone()
				var open []string
				n := 0
				for i, pod := range c.Pods {
					if pod.Phase == identity.PodFinished || alone[pod.Namespace] || !strict(all.Effective(i)) {
						continue
					}
					n++
					if pod.Capture(nil) != identity.Captured {
						open = append(open, pod.Namespace+"/"+pod.Name)
					}
				}
				if len(open) > 0 {
					return fail("%s STRICT and not captured: %s", count(len(open), "pod"), some(open))
				}
				return pass("%s STRICT, none of them uncaptured", count(n, "pod"))
			})
		}},
		{Check{
			"uncaptured-pods", "Pods are captured",
			"Who calls a pod that is not captured calls it in plaintext.",
			"If that is not meant, take the label troth.dev/capture=disabled or hostNetwork off the pod.",
		}, always, func(s *Snapshot) finding {
			return with(s.Cluster, func(c kube.Snapshot) finding {
				alone := s.leftAlone()
				var out []string
				n := 0
				for _, pod := range c.Pods {
					if pod.Phase == identity.PodFinished || alone[pod.Namespace] {
						continue
					}
					n++
					if pod.Capture(nil) != identity.Captured {
						out = append(out, pod.Namespace+"/"+pod.Name)
					}
				}
				if len(out) > 0 {
					return warn("%d of %s not captured: %s", len(out), count(n, "pod"), some(out))
				}
				return pass("no pod is left out, of %s in the namespaces that are captured", count(n, "pod"))
			})
		}},
		{Check{
			"plaintext-peers", "Nobody calls in plaintext",
			"Who does is refused as soon as the policy is STRICT.",
			"troth policy peers says who they are, and troth policy dry-run what a stricter policy would refuse.",
		}, after, func(s *Snapshot) finding {
			return with(s.Peers, func(p *trothv1.ListPlaintextPeersResponse) finding {
				if p.GetAgents() == 0 {
					return unknown("no agent has reported")
				}
				if n := len(p.GetPeers()); n > 0 {
					return warn("%s in plaintext of late, by %s", count(n, "connection"), count(int(p.GetAgents()), "agent"))
				}
				return pass("none of late, by %s", count(int(p.GetAgents()), "agent"))
			})
		}},
	}
}

// leftAlone returns the namespaces whose pods are not captured, as the server's flag
// says.
func (s *Snapshot) leftAlone() map[string]bool {
	names := []string{"kube-system", s.ServerNamespace, s.NodeNamespace}
	if d, err := s.Deployment.Get(); err == nil && d != nil {
		if list, ok := flagOf(container(d.Spec.Template.Spec.Containers, "server"), "uncaptured-namespaces"); ok {
			names = strings.Split(list, ",")
		}
	}
	alone := make(map[string]bool)
	for _, name := range names {
		alone[name] = true
	}
	return alone
}

// strict reports whether some port takes mutual TLS alone.
func strict(e *policy.Effective) bool {
	return e.Mode == policy.Strict || slices.ContainsFunc(e.Ports, func(p policy.PortMode) bool { return p.Mode == policy.Strict })
}

// assign works out the policy of each pod that has not finished, known by its place
// among the pods.
func assign(root string, c kube.Snapshot) *policy.Assignments[int] {
	all := policy.NewAssignments(root, func(int) {})
	for i, pod := range c.Pods {
		if pod.Phase != identity.PodFinished {
			all.SetWorkload(i, policy.Workload{Namespace: pod.Namespace, Labels: pod.Labels, ContainerPorts: pod.ContainerPorts})
		}
	}
	all.ReplacePolicies(c.Policies)
	return all
}

// findings is about the policies of which one of the codes is said.
func findings(s *Snapshot, otherwise func(string, ...any) finding, format string, codes ...policy.FindingCode) finding {
	return with(s.Cluster, func(c kube.Snapshot) finding {
		all := assign(s.RootNamespace, c)
		var said []string
		seen := make(map[string]bool)
		for _, p := range c.Policies {
			if seen[p.Namespace] {
				continue
			}
			seen[p.Namespace] = true
			for ref, found := range all.Findings(p.Namespace) {
				if slices.ContainsFunc(found, func(f policy.Finding) bool { return slices.Contains(codes, f.Code) }) {
					said = append(said, ref.String())
				}
			}
		}
		if len(said) > 0 {
			return otherwise(format, count(len(said), "policy"), some(said))
		}
		return pass("nothing of the kind is to be said of %s", count(len(c.Policies), "policy"))
	})
}
