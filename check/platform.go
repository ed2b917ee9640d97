package check

import (
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/version"
)

// oldest is the first release of Kubernetes whose PodCertificateRequests and
// ClusterTrustBundles are served without being asked for.
const oldest = "1.37.0"

// oldestKernel is the first with pidfd_open, by which an agent holds on to a process.
const oldestKernel = "5.3.0"

// maxSkew is how far clocks may be apart: tokens and SVIDs are good from a minute
// before they are made, and half of it may be the other side's.
const maxSkew = 30 * time.Second

func platformChecks() []definition {
	return []definition{
		{Check{
			"api-server-version", "The API server is new enough",
			"Troth rests on PodCertificateRequests and ClusterTrustBundles as version 1.37 has them.",
			"Upgrade the control plane of the cluster to 1.37 or later.",
		}, always, func(s *Snapshot) finding {
			return with(s.APIServer, func(a APIServer) finding { return atLeast("the API server", a.Version, oldest) })
		}},
		{Check{
			"api-pod-certificates", "PodCertificateRequests are served",
			"Kubelets ask for the certificates of pods by them.",
			"Do not switch certificates.k8s.io/v1 off in the API server's --runtime-config.",
		}, always, served("certificates.k8s.io/v1/podcertificaterequests")},
		{Check{
			"api-trust-bundles", "ClusterTrustBundles are served",
			"Agents and pods take the trust bundle from one.",
			"Do not switch certificates.k8s.io/v1 off, or install with trustBundle.source=ConfigMap.",
		}, always, served("certificates.k8s.io/v1/clustertrustbundles")},
		{Check{
			"api-admission", "Admission policies are served",
			"They keep everybody but kubelets from asking for tokens and certificates of pods.",
			"Do not switch admissionregistration.k8s.io/v1 off in the API server's --runtime-config.",
		}, always, served("admissionregistration.k8s.io/v1/validatingadmissionpolicies")},
		{Check{
			"api-endpoints", "EndpointSlices are served",
			"The server learns from them who is behind a Service.",
			"Do not switch discovery.k8s.io/v1 off in the API server's --runtime-config.",
		}, always, served("discovery.k8s.io/v1/endpointslices")},
		{Check{
			"node-restriction", "Kubelets are restricted to their own node",
			"Without the admission plugin NodeRestriction, who has taken one node can speak for the pods of every other.",
			"Start the API server with --enable-admission-plugins=NodeRestriction.",
		}, always, func(s *Snapshot) finding {
			return with(s.NodeRestriction, func(on bool) finding {
				if !on {
					return fail("a kubelet may give its node a label of node-restriction.kubernetes.io: NodeRestriction is off")
				}
				return pass("a kubelet may not give its node a label of node-restriction.kubernetes.io")
			})
		}},
		{Check{
			"token-issuer", "The API server publishes the keys of its tokens",
			"Agents and operators prove themselves by tokens, which the server verifies by those keys.",
			"Give the API server --service-account-issuer, an https URL, and let system:serviceaccounts read its discovery documents (ClusterRole system:service-account-issuer-discovery).",
		}, always, func(s *Snapshot) finding {
			return with(s.TokenIssuer, func(issuer string) finding {
				if u, err := url.Parse(issuer); err != nil || u.Scheme != "https" || u.Host == "" {
					return fail("the issuer is %q, which is no https URL", issuer)
				}
				return pass("the issuer is %s, and its keys can be fetched", issuer)
			})
		}},
		{Check{
			"clock-api-server", "This clock agrees with the API server's",
			"Tokens and certificates are good for a time, which each side reads off its own clock.",
			"Run NTP on both machines.",
		}, always, func(s *Snapshot) finding {
			return with(s.APIServer, func(a APIServer) finding {
				if a.Ahead.Abs() > maxSkew {
					return fail("the API server's clock is %s", apart(a.Ahead))
				}
				return pass("the API server's clock is within %s of this one", span(maxSkew))
			})
		}},
		{Check{
			"clock-nodes", "No node's clock is ahead",
			"A node whose clock is ahead takes certificates that have just been renewed for expired, and one that is behind takes new ones for not yet valid.",
			"Run NTP on those nodes.",
		}, always, func(s *Snapshot) finding {
			return with2(s.APIServer, s.NodeLeases, func(a APIServer, leases []coordinationv1.Lease) finding {
				return clockNodes(s.At.Add(a.Ahead), leases)
			})
		}},
		{Check{
			"nodes-ready", "All nodes are ready",
			"What a node that is away has to prove holds a rotation up until the node is back or deleted.",
			"kubectl describe node NAME; delete the Node if the machine is gone for good.",
		}, always, func(s *Snapshot) finding {
			return with(s.Nodes, func(nodes []corev1.Node) finding {
				if len(nodes) == 0 {
					return fail("there is no node")
				}
				var away []string
				for _, node := range nodes {
					if !isReady(node) {
						away = append(away, node.Name)
					}
				}
				if len(away) > 0 {
					return warn("%d of %s not ready: %s", len(away), count(len(nodes), "node"), some(away))
				}
				return pass("%s ready", count(len(nodes), "node"))
			})
		}},
		{Check{
			"node-kubelets", "The kubelets are new enough",
			"A kubelet before 1.37 may not mount ClusterTrustBundles, nor ask for certificates of pods: agents do not start there.",
			"Upgrade those nodes, or install with trustBundle.source=ConfigMap.",
		}, always, nodesAtLeast("kubelet", oldest, func(n corev1.Node) string { return n.Status.NodeInfo.KubeletVersion })},
		{Check{
			"node-kernels", "The kernels are new enough",
			"Capture needs nftables and pidfd_open, which came with Linux 5.3.",
			"Upgrade the kernel of those nodes, or keep agents off them by agent.nodeSelector.",
		}, always, nodesAtLeast("kernel", oldestKernel, func(n corev1.Node) string { return n.Status.NodeInfo.KernelVersion })},
		{Check{
			"install-rights", "You may install",
			"The chart makes namespaces, roles and admission policies, which takes an administrator.",
			"Install as somebody who has these rights, cluster-admin for instance.",
		}, before, func(s *Snapshot) finding {
			return rights(s.Mine, "you", func(r Right) bool { return r.Verb == "create" && r.Group != operators }, fail)
		}},
		{Check{
			"namespace-server", "The server's namespace is restricted",
			"Whoever runs a privileged pod next to the server can read the keys of authorities.",
			"kubectl label namespace NAME pod-security.kubernetes.io/enforce=restricted",
		}, always, func(s *Snapshot) finding { return podSecurity(s, s.ServerNamespace, "restricted") }},
		{Check{
			"namespace-agents", "The agents' namespace lets agents run",
			"Agents need the node's network and processes, which Pod Security forbids unless the namespace is privileged.",
			"kubectl label namespace NAME pod-security.kubernetes.io/enforce=privileged",
		}, always, func(s *Snapshot) finding { return podSecurity(s, s.NodeNamespace, "privileged") }},
		{Check{
			"other-meshes", "No other mesh captures the same pods",
			"Two proxies that redirect the same connections break them, or one takes them away from the other.",
			"Take the label off the namespace, or add the namespace to capture.uncapturedNamespaces.",
		}, always, otherMeshes},
		{Check{
			"policy-definition", "PeerAuthentication is defined",
			"Without the definition there are no policies, and every workload takes plaintext.",
			"kubectl apply -f deploy/crds/peerauthentications.security.istio.io.yaml, or install with peerAuthentication.install=always.",
		}, always, func(s *Snapshot) finding {
			return with(s.Definition, func(d *Definition) finding {
				if d == nil {
					text := "peerauthentications.security.istio.io is not defined"
					if s.Before {
						return warn("%s: the chart brings it", text)
					}
					return fail("%s", text)
				}
				whose := "Troth's"
				if d.Istio {
					whose = "Istio's"
				}
				switch {
				case !d.Established:
					return fail("the definition, %s, is not established", whose)
				case !slices.Contains(d.Versions, "v1") && !slices.Contains(d.Versions, "v1beta1"):
					return fail("the definition, %s, serves neither v1 nor v1beta1, but %q", whose, strings.Join(d.Versions, ", "))
				}
				return pass("the definition is %s and serves %s", whose, strings.Join(d.Versions, ", "))
			})
		}},
	}
}

// atLeast compares a version, as Kubernetes and Linux spell theirs.
func atLeast(who, have, want string) finding {
	parsed, err := version.ParseGeneric(have)
	if err != nil {
		return unknown("%s says that its version is %q, which cannot be read", who, have)
	}
	if parsed.LessThan(version.MustParseGeneric(want)) {
		return fail("%s has version %s, which is older than %s", who, have, strings.TrimSuffix(want, ".0"))
	}
	return pass("%s has version %s", who, have)
}

func nodesAtLeast(what, want string, versionOf func(corev1.Node) string) func(*Snapshot) finding {
	return func(s *Snapshot) finding {
		return with(s.Nodes, func(nodes []corev1.Node) finding {
			var old, unclear []string
			for _, node := range nodes {
				switch f := atLeast(what, versionOf(node), want); f.level {
				case Failure:
					old = append(old, fmt.Sprintf("%s (%s)", node.Name, versionOf(node)))
				case Unknown:
					unclear = append(unclear, node.Name)
				}
			}
			switch {
			case len(old) > 0:
				return fail("%s older than %s: %s", count(len(old), what), strings.TrimSuffix(want, ".0"), some(old))
			case len(unclear) > 0:
				return unknown("these nodes do not tell the version of their %s: %s", what, some(unclear))
			case len(nodes) == 0:
				return unknown("there is no node")
			}
			return pass("every %s is %s or later", what, strings.TrimSuffix(want, ".0"))
		})
	}
}

func served(resource string) func(*Snapshot) finding {
	return func(s *Snapshot) finding {
		return with(s.Resources, func(all map[string]bool) finding {
			if !all[resource] {
				return fail("%s is not served", resource)
			}
			return pass("%s is served", resource)
		})
	}
}

func apart(ahead time.Duration) string {
	if ahead < 0 {
		return span(-ahead) + " behind this one"
	}
	return span(ahead) + " ahead of this one"
}

// clockNodes looks at when kubelets say that they renewed their leases. One that is
// ahead of the API server's clock is told by it; one that is behind cannot be told from
// one that has not renewed lately.
func clockNodes(now time.Time, leases []coordinationv1.Lease) finding {
	var ahead []string
	for _, lease := range leases {
		if at := lease.Spec.RenewTime; at != nil && at.Sub(now) > maxSkew {
			ahead = append(ahead, fmt.Sprintf("%s by %s", lease.Name, span(at.Sub(now))))
		}
	}
	if len(ahead) > 0 {
		return fail("ahead of the API server: %s", some(ahead))
	}
	if len(leases) == 0 {
		return unknown("no kubelet has a lease")
	}
	return pass("no node's clock is more than %s ahead", span(maxSkew))
}

func isReady(node corev1.Node) bool {
	return slices.ContainsFunc(node.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	})
}

// rights is about those of the rights that are of interest, which who has to have.
func rights(f Fact[map[Right]bool], who string, ofInterest func(Right) bool, lacking func(string, ...any) finding) finding {
	return with(f, func(all map[Right]bool) finding {
		var lacks []string
		n := 0
		for right, has := range all {
			if !ofInterest(right) {
				continue
			}
			n++
			if !has {
				lacks = append(lacks, right.String())
			}
		}
		switch {
		case n == 0:
			return unknown("nobody was asked for the rights")
		case len(lacks) > 0:
			return lacking("%s may not %s", who, some(lacks))
		}
		return pass("%s may do all of %s", who, count(n, "thing"))
	})
}

const enforceLabel = "pod-security.kubernetes.io/enforce"

func podSecurity(s *Snapshot, name, want string) finding {
	return with(s.Namespaces, func(all []corev1.Namespace) finding {
		i := slices.IndexFunc(all, func(n corev1.Namespace) bool { return n.Name == name })
		if i < 0 {
			if s.Before {
				return pass("namespace %s is not there yet", name)
			}
			return fail("there is no namespace %s", name)
		}
		have := all[i].Labels[enforceLabel]
		switch {
		case all[i].DeletionTimestamp != nil:
			return fail("namespace %s is being deleted", name)
		case have == want:
			return pass("namespace %s enforces %s", name, want)
		case want == "privileged" && have == "":
			// The cluster's own default decides, which nobody can ask for.
			return warn("namespace %s enforces nothing of its own, want %s", name, want)
		case have == "":
			return fail("namespace %s enforces nothing, want %s", name, want)
		}
		return fail("namespace %s enforces %q, want %s", name, have, want)
	})
}

func otherMeshes(s *Snapshot) finding {
	return with(s.Namespaces, func(all []corev1.Namespace) finding {
		var theirs []string
		for _, n := range all {
			switch {
			case n.Labels["istio.io/dataplane-mode"] == "ambient":
				theirs = append(theirs, n.Name+" (Istio ambient)")
			case n.Labels["istio-injection"] == "enabled" || n.Labels["istio.io/rev"] != "":
				theirs = append(theirs, n.Name+" (Istio sidecars)")
			case n.Annotations["linkerd.io/inject"] == "enabled":
				theirs = append(theirs, n.Name+" (Linkerd)")
			}
		}
		if len(theirs) > 0 {
			return warn("%s captured by another mesh: %s", count(len(theirs), "namespace"), some(theirs))
		}
		return pass("no namespace asks another mesh to capture its pods")
	})
}
