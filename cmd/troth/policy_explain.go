package main

import (
	"fmt"
	"slices"
	"strconv"

	"github.com/spf13/cobra"

	"troth.dev/troth/identity"
	"troth.dev/troth/kube"
	"troth.dev/troth/policy"
)

func policyExplainCommand() *cobra.Command {
	var files []string
	var output string
	var q question
	var c clusterFlags
	cmd := &cobra.Command{
		Use:   "explain {POD | --file FILE... [--labels KEY=VALUE,...]} --namespace NAMESPACE [--port PORT]",
		Short: "Show which policies make the mode of a workload, and which do not",
		Long: `Show how the mTLS mode of a workload comes about: for mesh, namespace, workload and
port the policy that counts, what it asks for and what is then in force; the
policies that others shadow; and those that do not do what their author meant.

POD is a pod of a cluster. Without it the policies are in files, and --labels say
what the workload is.`,
		Args: inputArgs(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(output, "table", "json"); err != nil {
				return err
			}
			workload, err := q.workload(cmd)
			if err != nil {
				return err
			}
			e := explanation{Port: q.port}
			var policies []policy.PeerAuthentication
			var invalid error
			switch {
			case len(args) > 0 && (len(files) > 0 || len(q.labels) > 0):
				return inputErrorf("a pod's policies and labels are the cluster's: leave --file and --labels out")
			case len(args) > 0:
				world, err := kube.Read(cmd.Context(), c.kubeconfig, c.context)
				if err != nil {
					return err
				}
				place := slices.IndexFunc(world.Pods, func(pod identity.Pod) bool {
					return pod.Namespace == q.namespace && pod.Name == args[0]
				})
				if place < 0 {
					return fmt.Errorf("there is no pod %q in namespace %q", args[0], q.namespace)
				}
				e.Pod, workload, policies = args[0], workloadOf(world.Pods[place]), world.Policies
			case len(files) == 0:
				return inputErrorf("name a POD, or policies by --file")
			case c.given():
				return inputErrorf("--context and --kubeconfig are of use only with a POD")
			default:
				read, err := readPolicies(files, cmd.InOrStdin(), q.namespace)
				if err != nil {
					return err
				}
				policies, invalid = read.List, read.Invalid()
			}
			e.Namespace, e.Labels = workload.Namespace, workload.Labels
			e.Explanation = policy.NewSet(q.root, policies...).Explain(workload)
			mode, by := e.Effective.At(q.port)
			e.Mode, e.DecidedBy = mode, orNull(by)
			declared := workload.ContainerPorts
			e.Undeclared = q.port != 0 && len(declared) > 0 && !slices.Contains(declared, q.port)
			if output == "json" {
				err = printJSON(cmd.OutOrStdout(), e)
			} else {
				e.print(newPrinter(cmd.OutOrStdout()))
			}
			if err != nil {
				return err
			}
			// It is explained what an invalid policy does, and still said that it is wrong.
			return invalid
		},
	}
	filesFlag(cmd, &files, "file", "f", "`file` of policies, a folder of them, or - for standard input; may be repeated")
	q.flags(cmd)
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	c.flags(cmd)
	return cmd
}

// explanation is what explain prints.
type explanation struct {
	Namespace string            `json:"namespace"`
	Pod       string            `json:"pod,omitempty"`
	Labels    map[string]string `json:"labels"`
	Port      uint16            `json:"port,omitempty"` // that Mode is of; without it, of the workload
	Mode      policy.Mode       `json:"mode"`
	DecidedBy *policy.Ref       `json:"decidedBy"` // null: no policy, PERMISSIVE is the default
	// Undeclared says that the pod's containers declare ports, and not Port.
	Undeclared bool `json:"undeclared,omitempty"`
	policy.Explanation
}

func (e explanation) print(out *printer) {
	workload := "workload"
	if e.Pod != "" {
		workload = "pod " + e.Pod
	}
	labels := "without labels"
	if len(e.Labels) > 0 {
		labels = "with " + labelText(e.Labels)
	}
	out.line("%s in namespace %s, %s", printable(workload), e.Namespace, printable(labels))
	out.line("")
	out.grid(append([][]string{{"LEVEL", "POLICY", "ASKS FOR", "IN FORCE", "NOTE"}}, e.rows()...))
	if warnings := e.warnings(); len(warnings) > 0 {
		out.heading("Warnings")
		for _, warning := range warnings {
			out.line("%s", printable(warning))
		}
	}
	out.line("")
	out.line("%s", e.result(out))
}

// rows is the chain from the default to the ports, with the policies that do not
// count below those that do.
func (e explanation) rows() [][]string {
	rows := [][]string{{"default", "", "", policy.Permissive.String()}}
	for _, level := range e.Levels {
		row := []string{string(level.Scope), "none", "", level.Mode.String(), ""}
		if w := level.Winner; w != nil {
			row[1], row[2] = w.Policy.String(), asks(*w)
			switch {
			case len(w.Problems) > 0:
				row[4] = "invalid, so STRICT"
			case w.Mode == policy.Unset:
				row[4] = "inherits"
			}
		}
		rows = append(rows, row)
		for _, c := range level.Shadowed {
			rows = append(rows, []string{"", c.Policy.String(), asks(c), "", "shadowed: " + c.Why})
		}
	}
	asked := false
	for _, p := range e.Ports {
		if e.Port != 0 && p.Port != e.Port {
			continue
		}
		asked = true
		row := []string{"port " + strconv.Itoa(int(p.Port)), e.winner().Policy.String(), p.Asks.String(), p.Mode.String(), ""}
		if p.Asks == policy.Unset {
			row[4] = "inherits"
		}
		rows = append(rows, row)
	}
	if e.Port != 0 && !asked {
		rows = append(rows, []string{"port " + strconv.Itoa(int(e.Port)), "none", "", e.Mode.String()})
	}
	return rows
}

// winner is the policy that Ports are of. There is one if there are Ports.
func (e explanation) winner() *policy.Candidate {
	return e.Levels[len(e.Levels)-1].Winner
}

// asks says what a policy asks for, with its ports where they count for nothing.
func asks(c policy.Candidate) string {
	text := c.Mode.String()
	if c.Why != "" {
		for _, p := range c.Ports {
			text += fmt.Sprintf(", %d=%s", p.Port, p.Mode)
		}
	}
	return text
}

// warnings is what does not do what its author seems to have meant.
func (e explanation) warnings() []string {
	var warnings []string
	for _, level := range e.Levels {
		candidates := level.Shadowed
		if level.Winner != nil {
			candidates = append([]policy.Candidate{*level.Winner}, candidates...)
		}
		for _, c := range candidates {
			for _, problem := range c.Problems {
				warnings = append(warnings, fmt.Sprintf("%s is invalid: %s", c.Policy, problem))
			}
			if c.Why != "" && len(c.Ports) > 0 {
				warnings = append(warnings, fmt.Sprintf("%s names ports, which count for nothing: policies for the same workload are not merged", c.Policy))
			}
		}
	}
	for _, p := range e.Ports {
		if p.Undeclared {
			warnings = append(warnings, fmt.Sprintf("%s names port %d, which no container of the pod declares: "+
				"it has to be the container's port, not the Service's", e.winner().Policy, p.Port))
		}
	}
	if e.Undeclared && !slices.ContainsFunc(e.Ports, func(p policy.PortLevel) bool { return p.Port == e.Port }) {
		warnings = append(warnings, fmt.Sprintf("no container of the pod declares port %d: "+
			"--port has to be the container's port, not the Service's", e.Port))
	}
	for _, c := range e.Ignored {
		warnings = append(warnings, fmt.Sprintf("%s concerns nobody: %s", c.Policy, c.Why))
	}
	return warnings
}

func (e explanation) result(out *printer) string {
	mode, by := e.Effective.At(e.Port)
	text := fmt.Sprintf("%s, by %s", out.mode(mode.String()), printable(byText(by)))
	if e.Port != 0 {
		return fmt.Sprintf("port %d: %s", e.Port, text)
	}
	for _, p := range e.Effective.Ports {
		text += fmt.Sprintf("\nport %d: %s, by %s", p.Port, out.mode(p.Mode.String()), printable(byText(e.Effective.PortsBy)))
	}
	return text
}
