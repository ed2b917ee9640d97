package main

import (
	"cmp"
	"io"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"troth.dev/troth/identity"
	"troth.dev/troth/kube"
	"troth.dev/troth/policy"
)

func policyDryRunCommand() *cobra.Command {
	var files, against, workloads []string
	var namespace, root, output, peersFile string
	var exitCode bool
	var c clusterFlags
	var o operatorFlags
	cmd := &cobra.Command{
		Use:   "dry-run --file FILE... [--against FILE... --workloads FILE...]",
		Short: "Show whose mode changes if policies are applied, and whose plaintext is then refused",
		Long: `Show which pods of the cluster change their mTLS mode if the policies in the files
are applied to it. Nothing is written. --against and --workloads take the place of
the cluster: policies and pods, as "kubectl get -A -o yaml" prints them.

The exit code is 0, and with --exit-code 3 if the mode of a pod changes.`,
		Args: inputArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output, "table", "json"); err != nil {
				return err
			}
			if err := checkNamespaces(namespace, root); err != nil {
				return err
			}
			offline := len(against) > 0 || len(workloads) > 0
			switch {
			case len(files) == 0:
				return inputErrorf("--file is required")
			case offline && len(workloads) == 0:
				return inputErrorf("--against is of use only with --workloads")
			case offline && (c.given() || o.given()):
				return inputErrorf("--workloads takes the place of the cluster: leave --context, --kubeconfig and --server out")
			case o.given() && peersFile != "":
				return inputErrorf("the plaintext peers are the control plane's or those of --peers, not both")
			}
			if err := onceFromStdin(files, against, workloads, []string{peersFile}); err != nil {
				return err
			}
			proposed, err := readPolicies(files, cmd.InOrStdin(), namespace)
			if err != nil {
				return err
			}
			if err := proposed.Invalid(); err != nil {
				return err
			}
			var peers []peer
			if peersFile != "" {
				if peers, err = readPeers(peersFile, cmd.InOrStdin()); err != nil {
					return err
				}
			}
			var world kube.Snapshot
			if offline {
				world, err = readWorld(against, workloads, cmd.InOrStdin(), namespace)
			} else {
				world, err = kube.Read(cmd.Context(), c.kubeconfig, c.context)
			}
			if err != nil {
				return err
			}

			agents := 0
			if o.given() {
				if peers, agents, err = o.peers(cmd.Context(), world.Pods); err != nil {
					return err
				}
			}

			result := dryRun(root, world, proposed.List, peers)
			result.Agents = agents
			if output == "json" {
				err = printJSON(cmd.OutOrStdout(), result)
			} else {
				result.print(newPrinter(cmd.OutOrStdout()))
			}
			if err == nil && exitCode && len(result.Changes) > 0 {
				return errChanges
			}
			return err
		},
	}
	filesFlag(cmd, &files, "file", "f", "`file` of policies to be applied, a folder of them, or - for standard input; may be repeated")
	filesFlag(cmd, &against, "against", "", "`file` of the policies in force now, in the place of the cluster's; may be repeated")
	filesFlag(cmd, &workloads, "workloads", "", "`file` of pods, in the place of the cluster's; may be repeated")
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "namespace of policies and pods that name none")
	rootFlag(cmd, &root)
	cmd.Flags().StringVar(&peersFile, "peers", "", "`file` that says who connected in plaintext of late, JSON")
	cmd.Flags().BoolVar(&exitCode, "exit-code", false, "exit with 3 if the mode of a pod changes")
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	c.flags(cmd)
	o.flags(cmd)
	return cmd
}

// onceFromStdin refuses to read standard input for two purposes.
func onceFromStdin(purposes ...[]string) error {
	readers := 0
	for _, paths := range purposes {
		if slices.Contains(paths, "-") {
			readers++
		}
	}
	if readers > 1 {
		return inputErrorf("standard input can be read for one flag only")
	}
	return nil
}

// readWorld reads what stands for a cluster. As in a cluster, a policy that is
// invalid is no error: it is STRICT for what it selects.
func readWorld(against, workloads []string, stdin io.Reader, namespace string) (kube.Snapshot, error) {
	policies, err := readPolicies(against, stdin, namespace)
	if err != nil {
		return kube.Snapshot{}, err
	}
	pods, err := readPods(workloads, stdin, namespace)
	if err != nil {
		return kube.Snapshot{}, err
	}
	return kube.Snapshot{Pods: pods, Policies: policies.List}, nil
}

// forecast is what becomes of a cluster if policies are applied to it.
type forecast struct {
	Pods     int       `json:"pods"` // that have not finished
	Changing int       `json:"changing"`
	Changes  []change  `json:"changes"`
	Refused  []refused `json:"refused"`          // plaintext of late
	Gone     int       `json:"gone"`             // connections of late to pods that are no more
	Agents   int       `json:"agents,omitempty"` // by whose reports Refused is known
	Warnings []warning `json:"warnings"`
}

// change is what becomes of pods of one service account that change alike.
type change struct {
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"serviceAccount"`
	// Labels tell these pods from others of the account that do not change
	// alike; empty if there are none, or no label does.
	Labels map[string]string `json:"labels"`
	Pods   []string          `json:"pods"`
	Of     int               `json:"of"` // pods of the account
	Before verdict           `json:"before"`
	After  verdict           `json:"after"`

	steps []step
}

// step is one row of a change.
type step struct {
	ports         string
	before, after policy.Mode
	by            policy.Ref
}

// warning is what is to be said to the author of a proposed policy.
type warning struct {
	Policy policy.Ref `json:"policy"`
	policy.Finding
}

// dryRun applies the proposed policies to the world on paper.
func dryRun(root string, world kube.Snapshot, proposed []policy.PeerAuthentication, peers []peer) forecast {
	pods := slices.DeleteFunc(slices.Clone(world.Pods), func(pod identity.Pod) bool { return pod.Phase == identity.PodFinished })
	slices.SortFunc(pods, func(a, b identity.Pod) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.ServiceAccount, b.ServiceAccount), cmp.Compare(a.Name, b.Name))
	})
	assignments := assign(root, pods, world.Policies)
	before := make([]*policy.Effective, len(pods))
	for n := range pods {
		before[n] = assignments.Effective(n)
	}
	assignments.ReplacePolicies(applied(world.Policies, proposed))
	after := make([]*policy.Effective, len(pods))
	for n := range pods {
		after[n] = assignments.Effective(n)
	}

	f := forecast{Pods: len(pods), Changes: []change{}, Warnings: []warning{}}
	for first := 0; first < len(pods); {
		end := first
		for end < len(pods) && pods[end].Account() == pods[first].Account() {
			end++
		}
		f.Changes = append(f.Changes, changesOf(pods[first:end], before[first:end], after[first:end])...)
		first = end
	}
	for _, c := range f.Changes {
		f.Changing += len(c.Pods)
	}
	for _, p := range proposed {
		for _, finding := range assignments.Findings(p.Namespace)[p.Ref] {
			f.Warnings = append(f.Warnings, warning{p.Ref, finding})
		}
	}
	f.Refused, f.Gone = refusals(pods, before, after, peers)
	return f
}

// assign works out the policy of each pod, known by its place in pods.
func assign(root string, pods []identity.Pod, policies []policy.PeerAuthentication) *policy.Assignments[int] {
	assignments := policy.NewAssignments[int](root, func(int) {})
	for n, pod := range pods {
		assignments.SetWorkload(n, workloadOf(pod))
	}
	assignments.ReplacePolicies(policies)
	return assignments
}

func workloadOf(pod identity.Pod) policy.Workload {
	return policy.Workload{Namespace: pod.Namespace, Labels: pod.Labels, ContainerPorts: pod.ContainerPorts}
}

// applied returns the policies there are after those proposed were applied to
// the current ones: who replaces another keeps its age, who is new is the newest,
// whatever its file says.
func applied(current, proposed []policy.PeerAuthentication) []policy.PeerAuthentication {
	all := make(map[policy.Ref]policy.PeerAuthentication, len(current)+len(proposed))
	for _, p := range current {
		all[p.Ref] = p
	}
	for _, p := range proposed {
		p.Created = all[p.Ref].Created
		all[p.Ref] = p
	}
	return slices.Collect(maps.Values(all))
}

// changesOf groups the pods of one service account by what becomes of them, and
// leaves out those whose mode stays.
func changesOf(pods []identity.Pod, before, after []*policy.Effective) []change {
	type fate struct{ before, after *policy.Effective }
	var fates []fate
	var groups [][]identity.Pod
	for n := range pods {
		place := slices.IndexFunc(fates, func(f fate) bool {
			return f.before.Equal(before[n]) && f.after.Equal(after[n])
		})
		if place < 0 {
			place = len(fates)
			fates, groups = append(fates, fate{before[n], after[n]}), append(groups, nil)
		}
		groups[place] = append(groups[place], pods[n])
	}
	var changes []change
	for n, group := range groups {
		steps := stepsBetween(fates[n].before, fates[n].after)
		if len(steps) == 0 {
			continue
		}
		c := change{
			Namespace: group[0].Namespace, ServiceAccount: group[0].ServiceAccount,
			Labels: telling(group, pods), Of: len(pods),
			Before: verdictOf(fates[n].before, 0), After: verdictOf(fates[n].after, 0),
			steps: steps,
		}
		for _, pod := range group {
			c.Pods = append(c.Pods, pod.Name)
		}
		changes = append(changes, c)
	}
	return changes
}

// telling returns the labels that all pods of the group have, and that not all
// others of the account have. Labels that controllers put on pods tell nobody
// anything.
func telling(group, all []identity.Pod) map[string]string {
	labels := make(map[string]string)
	if len(group) == len(all) {
		return labels
	}
	for key, value := range group[0].Labels {
		has := func(pod identity.Pod) bool {
			own, ok := pod.Labels[key]
			return ok && own == value
		}
		lacks := func(pod identity.Pod) bool { return !has(pod) }
		made := key == "pod-template-hash" || key == "controller-revision-hash"
		if !made && !slices.ContainsFunc(group, lacks) && slices.ContainsFunc(all, lacks) {
			labels[key] = value
		}
	}
	return labels
}

// stepsBetween returns the ports whose mode differs: all that have no mode of
// their own in one row, and one row for each that has.
func stepsBetween(before, after *policy.Effective) []step {
	var own []uint16
	for _, e := range []*policy.Effective{before, after} {
		for _, exception := range e.Ports {
			own = append(own, exception.Port)
		}
	}
	slices.Sort(own)
	own = slices.Compact(own)

	var steps []step
	add := func(ports string, port uint16) {
		from, _ := before.At(port)
		to, by := after.At(port)
		if from != to {
			steps = append(steps, step{ports, from, to, by})
		}
	}
	rest := "all"
	if len(own) > 0 {
		rest += " but " + join(own)
	}
	add(rest, 0)
	for _, port := range own {
		add(strconv.Itoa(int(port)), port)
	}
	return steps
}

func (f forecast) print(out *printer) {
	if len(f.Changes) == 0 {
		out.line("None of %s changes its mode.", count(f.Pods, "pod"))
	} else {
		rows := [][]string{{"NAMESPACE", "SERVICE ACCOUNT", "PODS", "PORT", "BEFORE", "AFTER", "BY"}}
		for _, c := range f.Changes {
			account := c.ServiceAccount
			if len(c.Labels) > 0 {
				account += " (" + labelText(c.Labels) + ")"
			}
			pods := strconv.Itoa(len(c.Pods))
			if len(c.Pods) < c.Of {
				pods += " of " + strconv.Itoa(c.Of)
			}
			for _, s := range c.steps {
				rows = append(rows, []string{c.Namespace, account, pods, s.ports, s.before.String(), s.after.String(), byText(s.by)})
			}
		}
		out.grid(rows)
		out.line("")
		out.line("Changing: %d of %s.", f.Changing, count(f.Pods, "pod"))
	}
	if len(f.Refused) > 0 {
		out.heading("Plaintext of late that will be refused")
		rows := [][]string{{"FROM", "TO", "PORT", "LAST", "BY"}}
		for _, r := range f.Refused {
			rows = append(rows, []string{r.from(), r.To.String(), strconv.Itoa(int(r.Port)), r.Last.UTC().Format(time.RFC3339), byText(r.By)})
		}
		out.grid(rows)
	}
	if f.Agents > 0 {
		out.line("")
		out.line("Plaintext of late is known from %s.", count(f.Agents, "agent"))
	}
	if f.Gone > 0 {
		out.line("")
		out.line("%s of late went to pods that are gone, and are not judged.", count(f.Gone, "connection"))
	}
	if len(f.Warnings) > 0 {
		out.heading("Warnings")
		for _, w := range f.Warnings {
			out.line("%s: %s: %s", printable(w.Policy.String()), w.Code, printable(w.Message))
		}
	}
}
