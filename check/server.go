package check

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// What Troth's objects are called.
const (
	serverName  = "troth-server"
	agentName   = "troth-agent"
	keeperName  = "troth-keeper"
	keySecret   = "troth-key-encryption-key"
	keyName     = "key"
	bundleName  = "troth-bundle"
	publisher   = "troth-publisher"
	signerName  = "troth.dev/svid"
	operators   = "troth.dev"
	serverPort  = 8443
	keySize     = 32
	nameLabel   = "app.kubernetes.io/name"
	storeLabel  = "troth.dev/store"
	maxLedger   = 20_000 // ConfigMaps; a week of 10,000 SVIDs of an hour are 18,000
	manyRestart = 5
)

func serverChecks() []definition {
	return []definition{
		{Check{
			"server-deployment", "The server is rolled out",
			"While an old and a new version run side by side, or none, what was changed is not in force.",
			"kubectl -n troth-system rollout status deployment/troth-server, and describe the pods that do not get ready.",
		}, after, func(s *Snapshot) finding {
			return withDeployment(s, func(d *appsv1.Deployment) finding {
				want, st := replicas(d), d.Status
				switch {
				case st.ObservedGeneration < d.Generation:
					return warn("the newest change of the Deployment has not been taken up yet")
				case st.AvailableReplicas == 0:
					return fail("none of %s is available", count(int(want), "replica"))
				case st.UpdatedReplicas < want || st.AvailableReplicas < want || st.Replicas > want:
					return warn("of %s %d are of the newest version and %d available", count(int(want), "replica"), st.UpdatedReplicas, st.AvailableReplicas)
				}
				return pass("%s available, of the newest version", count(int(want), "replica"))
			})
		}},
		{Check{
			"server-replicas", "The server has several replicas, on several nodes",
			"While no replica runs no certificate is renewed, and those of an hour do not outlast a long outage.",
			"Install with server.replicas=3. Pods that share a node spread when they are made anew and another node has room.",
		}, after, serverReplicas},
		{Check{
			"server-store", "The replicas share a store",
			"Replicas with SQLite files of their own make authorities of their own, which do not trust each other.",
			"Start all replicas with -kubernetes-store or -postgres, or run one.",
		}, after, func(s *Snapshot) finding {
			return withDeployment(s, func(d *appsv1.Deployment) finding {
				c := container(d.Spec.Template.Spec.Containers, "server")
				for _, name := range []string{"kubernetes-store", "postgres"} {
					if value, ok := flagOf(c, name); ok && value != "" {
						return pass("they share a store: -%s", name)
					}
				}
				if replicas(d) > 1 {
					return fail("%s with a SQLite file each", count(int(replicas(d)), "replica"))
				}
				return warn("one replica with SQLite: there cannot be a second")
			})
		}},
		{Check{
			"server-disruption-budget", "A drain leaves replicas of the server",
			"Without a budget the drain of several nodes can end all replicas at once.",
			"Restore the PodDisruptionBudget troth-server of the chart.",
		}, after, func(s *Snapshot) finding {
			return with2(s.Deployment, s.Budgets, func(d *appsv1.Deployment, all []policyv1.PodDisruptionBudget) finding {
				if d == nil {
					return noDeployment(s)
				}
				for _, b := range all {
					if !selects(b.Spec.Selector, d.Spec.Template.Labels) {
						continue
					}
					if b.Status.DisruptionsAllowed == 0 && b.Status.ExpectedPods > 0 {
						return warn("PodDisruptionBudget %s allows no disruption now: %d of %d pods are healthy", b.Name, b.Status.CurrentHealthy, b.Status.ExpectedPods)
					}
					return pass("PodDisruptionBudget %s is for the server", b.Name)
				}
				return warn("no PodDisruptionBudget is for the server")
			})
		}},
		{Check{
			"server-service", "The server's Service leads to it",
			"Agents know the server by the name of this Service.",
			"Restore the Service troth-server of the chart.",
		}, after, func(s *Snapshot) finding {
			return with2(s.Deployment, s.Service, func(d *appsv1.Deployment, service *corev1.Service) finding {
				if service == nil {
					return fail("there is no Service %s/%s", s.ServerNamespace, serverName)
				}
				if d == nil {
					return noDeployment(s)
				}
				if len(service.Spec.Selector) == 0 || !labels.SelectorFromSet(service.Spec.Selector).Matches(labels.Set(d.Spec.Template.Labels)) {
					return fail("the Service selects other pods than the server's")
				}
				if !slices.ContainsFunc(service.Spec.Ports, func(p corev1.ServicePort) bool { return p.Port == serverPort }) {
					return fail("the Service has no port %d", serverPort)
				}
				return pass("the Service leads to the server, at port %d", serverPort)
			})
		}},
		{Check{
			"server-endpoints", "Replicas of the server serve",
			"A Service without a ready endpoint refuses every call.",
			"kubectl -n troth-system get endpointslices, and the log of a pod that is not ready.",
		}, after, func(s *Snapshot) finding {
			return with(s.Endpoints, func(slices []discoveryv1.EndpointSlice) finding {
				ready, all := 0, 0
				for _, slice := range slices {
					for _, e := range slice.Endpoints {
						all++
						if e.Conditions.Ready == nil || *e.Conditions.Ready {
							ready++
						}
					}
				}
				if ready == 0 {
					return fail("none of %s is ready", count(all, "endpoint"))
				}
				return pass("%s ready", count(ready, "endpoint"))
			})
		}},
		{Check{
			"server-network-policy", "The network lets everybody reach the server's port, and no other",
			"Agents and pods on all nodes call port 8443. Who reaches the port of the metrics sees how many agents there are and when authorities expire.",
			"Restore the NetworkPolicy troth-server of the chart.",
		}, after, networkPolicy},
		{Check{
			"server-resources", "The server's memory is bounded",
			"Without a request it is the first to be ended when its node runs short; without a limit it takes what others need.",
			"Install with server.resources as the chart has them.",
		}, after, func(s *Snapshot) finding {
			return withDeployment(s, func(d *appsv1.Deployment) finding { return resources(d.Spec.Template.Spec) })
		}},
		{Check{
			"server-confinement", "The server runs without privileges",
			"It holds the keys of authorities: what gets into it must get no further.",
			"Restore the securityContext of the chart.",
		}, after, func(s *Snapshot) finding {
			return withDeployment(s, func(d *appsv1.Deployment) finding { return confined(d.Spec.Template.Spec) })
		}},
		{Check{
			"server-restarts", "The server's containers stay up",
			"A container that ends again and again serves for seconds at a time.",
			"kubectl -n troth-system logs POD --previous",
		}, after, func(s *Snapshot) finding { return restarts(s, s.ServerNamespace, serverName) }},
		{Check{
			"server-rights", "The server has the rights that it needs",
			"Without one of them it is not ready, or does not do what the right is for.",
			"Restore the ClusterRole and the Role troth-server of the chart, and their bindings.",
		}, after, func(s *Snapshot) finding {
			return rights(s.ServerRights, "the server", func(Right) bool { return true }, fail)
		}},
		{Check{
			"operator-rights", "You may see to authorities",
			"Only who has these rights sees how a rotation stands and can carry one out.",
			"Bind a ClusterRole with the verbs list, prepare, activate, taint, revoke and abort on authorities of the API group troth.dev (docs/cluster.md).",
		}, after, func(s *Snapshot) finding {
			return rights(s.Mine, "you", func(r Right) bool { return r.Group == operators }, warn)
		}},
		{Check{
			"key-encryption-key", "The key-encryption key is whole",
			"The keys of authorities are sealed under it: without it the server does not start, and nothing brings them back.",
			"Restore the Secret from its backup. A new key opens nothing (docs/keys.md).",
		}, after, func(s *Snapshot) finding {
			return with2(s.Deployment, s.KeySize, func(d *appsv1.Deployment, size int) finding {
				if d != nil {
					if helper, ok := flagOf(container(d.Spec.Template.Spec.Containers, "server"), "key-helper"); ok {
						return pass("the keys are kept by another program: %s", helper)
					}
				}
				switch {
				case size < 0:
					return fail("there is no Secret %s/%s with a %q", s.ServerNamespace, keySecret, keyName)
				case size != keySize:
					return fail("the key has %s, and needs %d", count(size, "byte"), keySize)
				}
				return pass("the key has %d bytes", size)
			})
		}},
		{Check{
			"ledger-size", "The ledger fits into the cluster's store",
			"The store in Kubernetes takes room in etcd, which has 2 GiB unless told otherwise.",
			"Keep expired certificates for a shorter time (server.keepIssuances), or use PostgreSQL.",
		}, after, func(s *Snapshot) finding {
			return with2(s.Deployment, s.Ledger, func(d *appsv1.Deployment, n int) finding {
				if d == nil {
					return noDeployment(s)
				}
				if _, ok := flagOf(container(d.Spec.Template.Spec.Containers, "server"), "kubernetes-store"); !ok {
					return pass("the ledger is not kept in Kubernetes")
				}
				switch {
				case n == 0:
					return warn("the ledger is empty: nothing has been issued yet")
				case n > maxLedger:
					return warn("%s of ledger, more than %d", count(n, "ConfigMap"), maxLedger)
				}
				return pass("%s of ledger", count(n, "ConfigMap"))
			})
		}},
		{Check{
			"admission-policies", "Troth's admission policies are in force",
			"Without them, whoever may edit a namespace can ask for tokens and certificates in the name of its pods.",
			"Install with admission.enabled=true.",
		}, after, admission},
		{Check{
			"image-tags", "Server and agents run one version, by its name",
			"What is not pinned changes with the next start of a pod, and nobody knows to what.",
			"Install with image.tag=VERSION.",
		}, after, imageTags},
		{Check{
			"versions", "This program is of the same version",
			"It knows what its own version of the server and the agents need.",
			"Use the troth of the version that is installed.",
		}, after, func(s *Snapshot) finding {
			return with2(s.Deployment, s.DaemonSet, func(d *appsv1.Deployment, a *appsv1.DaemonSet) finding {
				if d == nil || a == nil {
					return unknown("not known: the server or the agents are not installed")
				}
				for _, image := range slices.Sorted(maps.Keys(images(d, a))) {
					if tag := tagOf(image); tag != s.Version {
						return warn("this program is %s, and the cluster runs %s", s.Version, image)
					}
				}
				return pass("all are %s", s.Version)
			})
		}},
		{Check{
			"trust-domain", "Server and agents have one trust domain",
			"An agent of another trust domain does not trust the server, nor the server its token.",
			"Install with trustDomain=NAME, and start the pods of both anew.",
		}, after, func(s *Snapshot) finding {
			return with(s.TrustDomain, func(want string) finding {
				return with2(s.Deployment, s.DaemonSet, func(d *appsv1.Deployment, a *appsv1.DaemonSet) finding {
					if d == nil || a == nil {
						return unknown("not known: the server or the agents are not installed")
					}
					server, _ := flagOf(container(d.Spec.Template.Spec.Containers, "server"), "trust-domain")
					agents, _ := flagOf(container(a.Spec.Template.Spec.Containers, "agent"), "trust-domain")
					if server != want || agents != want {
						return fail("the server has %q, the agents %q, want %q", server, agents, want)
					}
					return pass("it is %s", want)
				})
			})
		}},
	}
}

func withDeployment(s *Snapshot, judge func(*appsv1.Deployment) finding) finding {
	return with(s.Deployment, func(d *appsv1.Deployment) finding {
		if d == nil {
			return noDeployment(s)
		}
		return judge(d)
	})
}

// noDeployment is a failure, and not unknown: after an installation there is one.
func noDeployment(s *Snapshot) finding {
	return fail("there is no Deployment %s/%s", s.ServerNamespace, serverName)
}

func replicas(d *appsv1.Deployment) int32 {
	if d.Spec.Replicas == nil {
		return 1
	}
	return *d.Spec.Replicas
}

func serverReplicas(s *Snapshot) finding {
	return with2(s.Deployment, s.Pods, func(d *appsv1.Deployment, pods []corev1.Pod) finding {
		if d == nil {
			return noDeployment(s)
		}
		if replicas(d) < 2 {
			return warn("there is to be %s", count(int(replicas(d)), "replica"))
		}
		nodes := make(map[string]bool)
		for _, pod := range pods {
			if pod.Namespace == s.ServerNamespace && pod.Labels[nameLabel] == serverName && podReady(pod) {
				nodes[pod.Spec.NodeName] = true
			}
		}
		switch len(nodes) {
		case 0:
			return fail("none of %s is ready", count(int(replicas(d)), "replica"))
		case 1:
			return warn("all replicas that are ready share the node %s", some(slices.Collect(maps.Keys(nodes))))
		}
		return pass("%s, ready on %s", count(int(replicas(d)), "replica"), count(len(nodes), "node"))
	})
}

// networkPolicy looks at what is let in. Where no policy selects the server, everything
// is.
func networkPolicy(s *Snapshot) finding {
	return with2(s.Deployment, s.NetworkPolicies, func(d *appsv1.Deployment, all []networkingv1.NetworkPolicy) finding {
		if d == nil {
			return noDeployment(s)
		}
		selected, open := false, false
		for _, p := range all {
			if !selects(&p.Spec.PodSelector, d.Spec.Template.Labels) || !slices.Contains(p.Spec.PolicyTypes, networkingv1.PolicyTypeIngress) {
				continue
			}
			selected = true
			for _, rule := range p.Spec.Ingress {
				open = open || len(rule.From) == 0 && (len(rule.Ports) == 0 || slices.ContainsFunc(rule.Ports, isServerPort))
			}
		}
		switch {
		case !selected:
			return warn("no NetworkPolicy is for the server: its metrics are open to every pod")
		case !open:
			return fail("the NetworkPolicies do not let everybody in at port %d", serverPort)
		}
		return pass("NetworkPolicies let everybody in at port %d", serverPort)
	})
}

func isServerPort(p networkingv1.NetworkPolicyPort) bool {
	if p.Protocol != nil && *p.Protocol != corev1.ProtocolTCP {
		return false
	}
	return p.Port == nil || p.Port.String() == "grpc" || p.Port.IntValue() == serverPort
}

func selects(selector *metav1.LabelSelector, of map[string]string) bool {
	parsed, err := metav1.LabelSelectorAsSelector(selector)
	return err == nil && parsed.Matches(labels.Set(of))
}

// longRunning returns the containers that run for as long as the pod.
func longRunning(spec corev1.PodSpec) []corev1.Container {
	all := slices.Clone(spec.Containers)
	for _, c := range spec.InitContainers {
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			all = append(all, c)
		}
	}
	return all
}

func resources(spec corev1.PodSpec) finding {
	var lacks []string
	for _, c := range longRunning(spec) {
		if c.Resources.Limits.Memory().IsZero() {
			lacks = append(lacks, c.Name+" (limit of memory)")
		}
		if c.Resources.Requests.Memory().IsZero() && c.Resources.Limits.Memory().IsZero() {
			lacks = append(lacks, c.Name+" (request of memory)")
		}
	}
	if len(lacks) > 0 {
		return warn("missing: %s", some(lacks))
	}
	return pass("the memory of all containers is bounded")
}

// confined wants of each container what Pod Security calls restricted, and a root
// folder that cannot be written to.
func confined(spec corev1.PodSpec) finding {
	var wrong []string
	if spec.HostNetwork || spec.HostPID || spec.HostIPC {
		wrong = append(wrong, "the pod shares the node's network or processes")
	}
	is := func(b *bool, want bool) bool { return b != nil && *b == want }
	for _, c := range longRunning(spec) {
		sc := c.SecurityContext
		if sc == nil {
			sc = &corev1.SecurityContext{}
		}
		switch {
		case is(sc.Privileged, true):
			wrong = append(wrong, c.Name+" is privileged")
		case !is(sc.RunAsNonRoot, true) && (sc.RunAsNonRoot != nil || spec.SecurityContext == nil || !is(spec.SecurityContext.RunAsNonRoot, true)):
			wrong = append(wrong, c.Name+" may run as root")
		case !is(sc.AllowPrivilegeEscalation, false):
			wrong = append(wrong, c.Name+" may gain privileges")
		case sc.Capabilities == nil || !slices.Contains(sc.Capabilities.Drop, "ALL") || len(sc.Capabilities.Add) > 0:
			wrong = append(wrong, c.Name+" has capabilities")
		case !is(sc.ReadOnlyRootFilesystem, true):
			wrong = append(wrong, c.Name+" can write to its root folder")
		}
	}
	if len(wrong) > 0 {
		return fail("%s", some(wrong))
	}
	return pass("no root, no capabilities, nothing of the node's")
}

// restarts looks for containers that end again and again.
func restarts(s *Snapshot, namespace, name string) finding {
	return with(s.Pods, func(pods []corev1.Pod) finding {
		var failing, often []string
		n := 0
		for _, pod := range pods {
			if pod.Namespace != namespace || pod.Labels[nameLabel] != name {
				continue
			}
			n++
			for _, c := range slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses) {
				switch waiting := c.State.Waiting; {
				case waiting != nil && waiting.Reason != "ContainerCreating" && waiting.Reason != "PodInitializing" && waiting.Reason != "":
					failing = append(failing, fmt.Sprintf("%s/%s (%s)", pod.Name, c.Name, waiting.Reason))
				case c.RestartCount >= manyRestart:
					often = append(often, fmt.Sprintf("%s/%s (%d)", pod.Name, c.Name, c.RestartCount))
				}
			}
		}
		switch {
		case n == 0:
			return fail("there is no pod of %s in %s", name, namespace)
		case len(failing) > 0:
			return fail("not running: %s", some(failing))
		case len(often) > 0:
			return warn("restarted often: %s", some(often))
		}
		return pass("the containers of %s stay up", count(n, "pod"))
	})
}

// admissionPolicies are those that have to be there. The one on certificates of pods
// comes with the signer.
func admissionPolicies() []string {
	return []string{"troth-tokens", "troth-accounts", "troth-trust-bundle", "troth-folders"}
}

func admission(s *Snapshot) finding {
	return with2(s.Deployment, s.Admission, func(d *appsv1.Deployment, a Admission) finding {
		if d == nil {
			return noDeployment(s)
		}
		want := admissionPolicies()
		if signer, ok := flagOf(container(d.Spec.Template.Spec.Containers, "server"), "signer"); ok && signer != "" {
			want = append(want, "troth-pod-certificate-requests")
		}
		have := make(map[string]bool)
		for _, p := range a.Policies {
			have[p.Name] = true
		}
		bound := make(map[string]bool)
		for _, b := range a.Bindings {
			if slices.Contains(b.Spec.ValidationActions, "Deny") && b.Spec.MatchResources == nil {
				bound[b.Spec.PolicyName] = true
			}
		}
		var missing []string
		for _, name := range want {
			switch {
			case !have[name]:
				missing = append(missing, name+" (not there)")
			case !bound[name]:
				missing = append(missing, name+" (not bound, or denies nothing)")
			}
		}
		if len(missing) > 0 {
			return fail("not in force: %s", some(missing))
		}
		return pass("%s in force", count(len(want), "policy"))
	})
}

// images returns the images that the server and the agents are made of.
func images(d *appsv1.Deployment, a *appsv1.DaemonSet) map[string]bool {
	all := make(map[string]bool)
	for _, spec := range []corev1.PodSpec{d.Spec.Template.Spec, a.Spec.Template.Spec} {
		for _, c := range slices.Concat(spec.InitContainers, spec.Containers) {
			all[c.Image] = true
		}
	}
	return all
}

// tagOf returns an image's tag, or "" if it has none. The colon of a registry's port is
// before the last slash.
func tagOf(image string) string {
	image, _, _ = strings.Cut(image, "@")
	_, last, ok := strings.Cut(image[strings.LastIndex(image, "/")+1:], ":")
	if !ok {
		return ""
	}
	return last
}

func imageTags(s *Snapshot) finding {
	return with2(s.Deployment, s.DaemonSet, func(d *appsv1.Deployment, a *appsv1.DaemonSet) finding {
		if d == nil || a == nil {
			return unknown("not known: the server or the agents are not installed")
		}
		tags := make(map[string]bool)
		var loose []string
		for image := range images(d, a) {
			tag := tagOf(image)
			tags[tag] = true
			if (tag == "" || tag == "latest") && !strings.Contains(image, "@") {
				loose = append(loose, image)
			}
		}
		switch {
		case len(loose) > 0:
			return warn("not pinned: %s", some(loose))
		case len(tags) > 1:
			return fail("several versions at once: %s", some(slices.Collect(maps.Keys(tags))))
		}
		return pass("all images have the tag %s", some(slices.Collect(maps.Keys(tags))))
	})
}

// container returns the container of that name, or else the first.
func container(all []corev1.Container, name string) corev1.Container {
	for _, c := range all {
		if c.Name == name {
			return c
		}
	}
	if len(all) == 0 {
		return corev1.Container{}
	}
	return all[0]
}

// flagOf returns the value that a container's command gives to a flag, as package flag
// of Go reads it: the last one counts.
func flagOf(c corev1.Container, name string) (value string, ok bool) {
	args := slices.Concat(c.Command, c.Args)
	for i, arg := range args {
		flag, isFlag := strings.CutPrefix(arg, "-")
		flag = strings.TrimPrefix(flag, "-")
		key, inline, hasValue := strings.Cut(flag, "=")
		switch {
		case !isFlag || key != name:
		case hasValue:
			value, ok = inline, true
		case i+1 < len(args) && !strings.HasPrefix(args[i+1], "-"):
			value, ok = args[i+1], true
		default:
			value, ok = "", true
		}
	}
	return value, ok
}

func podReady(pod corev1.Pod) bool {
	return pod.DeletionTimestamp == nil && slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}
