package check

import (
	"fmt"
	"slices"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
)

// maxTokenLife is how long a token may live, in seconds, that the server accepts.
const maxTokenLife = 7200

func agentChecks() []definition {
	return []definition{
		{Check{
			"agent-daemonset", "The agents are rolled out",
			"While an old and a new version run side by side, or none, what was changed is not in force.",
			"kubectl -n troth-node rollout status daemonset/troth-agent, and describe the pods that do not get ready.",
		}, after, func(s *Snapshot) finding {
			return withDaemonSet(s, func(d *appsv1.DaemonSet) finding {
				st := d.Status
				switch {
				case st.ObservedGeneration < d.Generation:
					return warn("the newest change of the DaemonSet has not been taken up yet")
				case st.DesiredNumberScheduled == 0:
					return fail("no node is to have an agent")
				case st.NumberAvailable == 0:
					return fail("none of %s is available", count(int(st.DesiredNumberScheduled), "agent"))
				case st.UpdatedNumberScheduled < st.DesiredNumberScheduled || st.NumberAvailable < st.DesiredNumberScheduled:
					return warn("of %s %d are of the newest version and %d available", count(int(st.DesiredNumberScheduled), "agent"), st.UpdatedNumberScheduled, st.NumberAvailable)
				}
				return pass("%s available, of the newest version", count(int(st.DesiredNumberScheduled), "agent"))
			})
		}},
		{Check{
			"agent-coverage", "Every node has an agent",
			"Pods on a node without one have no identity there, and where the CNI plugin is, they do not start.",
			"kubectl -n troth-node get pods -o wide; look at the node's taints and at agent.nodeSelector.",
		}, after, func(s *Snapshot) finding {
			return with2(s.Nodes, s.Pods, func(nodes []corev1.Node, pods []corev1.Pod) finding {
				there, ready := make(map[string]bool), make(map[string]bool)
				for _, pod := range pods {
					if pod.Namespace == s.NodeNamespace && pod.Labels[nameLabel] == agentName {
						there[pod.Spec.NodeName] = true
						ready[pod.Spec.NodeName] = ready[pod.Spec.NodeName] || podReady(pod)
					}
				}
				var without, notReady []string
				for _, node := range nodes {
					switch {
					case node.Labels["kubernetes.io/os"] == "windows":
					case !there[node.Name]:
						without = append(without, node.Name)
					case !ready[node.Name]:
						notReady = append(notReady, node.Name)
					}
				}
				switch {
				case len(nodes) == 0:
					return unknown("there is no node")
				case len(without) > 0:
					return fail("%s without an agent: %s", count(len(without), "node"), some(without))
				case len(notReady) > 0:
					return fail("%s whose agent is not ready: %s", count(len(notReady), "node"), some(notReady))
				}
				return pass("%s with an agent that is ready", count(len(nodes), "node"))
			})
		}},
		{Check{
			"agent-restarts", "The agents' containers stay up",
			"Each restart makes the workloads of a node wait for their next certificate and resets connections.",
			"kubectl -n troth-node logs POD --previous",
		}, after, func(s *Snapshot) finding { return restarts(s, s.NodeNamespace, agentName) }},
		{Check{
			"agent-node-access", "The agents see their node, and have no more privileges than that takes",
			"Without the node's processes an agent cannot tell who asks it; a privileged container could do anything there.",
			"Restore hostPID, hostNetwork and the securityContext of the chart.",
		}, after, func(s *Snapshot) finding {
			return withDaemonSet(s, func(d *appsv1.DaemonSet) finding {
				spec := d.Spec.Template.Spec
				switch {
				case !spec.HostPID:
					return fail("the agents do not see the node's processes (hostPID)")
				case !spec.HostNetwork:
					return fail("the agents are not on the node's network (hostNetwork)")
				}
				var privileged []string
				for _, c := range slices.Concat(spec.InitContainers, spec.Containers) {
					if sc := c.SecurityContext; sc != nil && sc.Privileged != nil && *sc.Privileged {
						privileged = append(privileged, c.Name)
					}
				}
				if len(privileged) > 0 {
					return warn("privileged: %s", some(privileged))
				}
				return pass("the agents have the node's network and processes, and no container is privileged")
			})
		}},
		{Check{
			"agent-token", "The agents' tokens are for this trust domain",
			"The server takes no token for another audience, nor one that lives longer than two hours.",
			"Restore the projected volume of the chart: audience spiffe://TRUST_DOMAIN, expirationSeconds 3600.",
		}, after, func(s *Snapshot) finding {
			return with(s.TrustDomain, func(td string) finding {
				return withDaemonSet(s, func(d *appsv1.DaemonSet) finding { return agentToken(d, "spiffe://"+td) })
			})
		}},
		{Check{
			"agent-account", "The agents run as the account that the server expects",
			"The server gives identities of a node to this account alone.",
			"Compare -agents of the server with the namespace and the service account of the DaemonSet.",
		}, after, func(s *Snapshot) finding {
			return with2(s.Deployment, s.DaemonSet, func(d *appsv1.Deployment, a *appsv1.DaemonSet) finding {
				switch {
				case d == nil:
					return noDeployment(s)
				case a == nil:
					return noDaemonSet(s)
				}
				want, ok := flagOf(container(d.Spec.Template.Spec.Containers, "server"), "agents")
				if !ok {
					want = "troth-system/troth-agent" // the server's default
				}
				if have := a.Namespace + "/" + a.Spec.Template.Spec.ServiceAccountName; have != want {
					return fail("the agents run as %s, and the server expects %s", have, want)
				}
				return pass("the agents run as %s", want)
			})
		}},
		{Check{
			"agent-rights", "The agents have no rights in the cluster",
			"An agent is as safe as its node. All that it knows comes through the server, which gives it what is of its node.",
			"Take the service account out of the bindings that name it: kubectl get clusterrolebindings,rolebindings -A -o wide | grep troth-agent.",
		}, after, func(s *Snapshot) finding {
			return with(s.AgentRights, func(all map[Right]bool) finding {
				var may []string
				for right, has := range all {
					if has {
						may = append(may, right.String())
					}
				}
				switch {
				case len(all) == 0:
					return unknown("nobody was asked for the rights")
				case len(may) > 0:
					return fail("an agent may %s", some(may))
				}
				return pass("an agent may do none of %s", count(len(all), "thing"))
			})
		}},
		{Check{
			"agent-resources", "The agents' memory is bounded",
			"Without a request an agent is the first to be ended when its node runs short; without a limit it takes what pods need.",
			"Install with agent.resources as the chart has them.",
		}, after, func(s *Snapshot) finding {
			return withDaemonSet(s, func(d *appsv1.DaemonSet) finding { return resources(d.Spec.Template.Spec) })
		}},
		{Check{
			"agent-keeper", "A keeper holds the sockets of captured pods",
			"Without it, connections are refused while an agent is restarted.",
			"Restore the DaemonSet troth-keeper of the chart, and see why its pods do not run: kubectl -n troth-node get pods -l app.kubernetes.io/name=troth-keeper.",
		}, after, func(s *Snapshot) finding {
			return with2(s.DaemonSet, s.Keepers, func(d, keepers *appsv1.DaemonSet) finding {
				switch {
				case d == nil:
					return noDaemonSet(s)
				case !captures(d):
					return warn("the agents capture no traffic (-capture)")
				case keepers == nil:
					return fail("there is no DaemonSet %s/%s", s.NodeNamespace, keeperName)
				case keepers.Status.NumberAvailable < d.Status.DesiredNumberScheduled:
					return fail("%d of %s with a keeper", keepers.Status.NumberAvailable, count(int(d.Status.DesiredNumberScheduled), "node"))
				}
				return pass("%s with a keeper", count(int(keepers.Status.NumberAvailable), "node"))
			})
		}},
	}
}

func captures(d *appsv1.DaemonSet) bool {
	_, capture := flagOf(container(d.Spec.Template.Spec.Containers, "agent"), "capture")
	return capture
}

func withDaemonSet(s *Snapshot, judge func(*appsv1.DaemonSet) finding) finding {
	return with(s.DaemonSet, func(d *appsv1.DaemonSet) finding {
		if d == nil {
			return noDaemonSet(s)
		}
		return judge(d)
	})
}

func noDaemonSet(s *Snapshot) finding {
	return fail("there is no DaemonSet %s/%s", s.NodeNamespace, agentName)
}

func agentToken(d *appsv1.DaemonSet, want string) finding {
	audiences := []string{}
	for _, v := range d.Spec.Template.Spec.Volumes {
		if v.Projected == nil {
			continue
		}
		for _, source := range v.Projected.Sources {
			token := source.ServiceAccountToken
			switch {
			case token == nil:
			case token.Audience != want:
				audiences = append(audiences, fmt.Sprintf("%q", token.Audience))
			case token.ExpirationSeconds != nil && *token.ExpirationSeconds > maxTokenLife:
				return fail("the token lives for %ds, and %ds are accepted", *token.ExpirationSeconds, maxTokenLife)
			default:
				return pass("the token is for %s", want)
			}
		}
	}
	if len(audiences) > 0 {
		return fail("the token is for %s, want %s", some(audiences), want)
	}
	return fail("no token is projected into the agents' pods")
}
