package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"

	"github.com/spf13/cobra"

	"troth.dev/troth/internal/manifest"
	"troth.dev/troth/policy"
)

// errChanges says that a dry run found changes, to whoever asked for it by the
// exit code. The output has said which.
var errChanges = errors.New("the policies change the mode of pods")

// inputError says that what the command was given is wrong, and that it will be
// no better next time: a flag, or a policy.
type inputError struct{ err error }

func (e inputError) Error() string { return e.err.Error() }
func (e inputError) Unwrap() error { return e.err }

// inputErrorf is fmt.Errorf for an inputError.
func inputErrorf(format string, args ...any) error {
	return inputError{fmt.Errorf(format, args...)}
}

func policyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "policy",
		Short: "Say which mTLS mode applies to a workload, and why",
		Long: `Say which mTLS mode applies to a workload, and why, by the PeerAuthentication
policies in files or in a cluster.

The exit code is 0 if there is an answer, 2 if a flag or a policy in a file is
wrong, and 1 if something else failed.`,
		Args: inputArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	// The commands below inherit it.
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return inputError{err} })
	cmd.AddCommand(policyEvaluateCommand(), policyExplainCommand(), policyDryRunCommand(), policyPeersCommand())
	return cmd
}

// inputArgs makes what check says against the arguments an inputError.
func inputArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return inputError{err}
		}
		return nil
	}
}

func policyEvaluateCommand() *cobra.Command {
	var files []string
	var output string
	var q question
	cmd := &cobra.Command{
		Use:   "evaluate --file FILE... --namespace NAMESPACE [--labels KEY=VALUE,...] [--port PORT]",
		Short: "Print STRICT, PERMISSIVE or DISABLE",
		Long: `Print the mTLS mode of a workload with these labels in this namespace, or of one
of its container ports: STRICT, PERMISSIVE or DISABLE. Only files are read.

Without --port it is the mode of all ports that the policies name no other for;
-o json tells those too, and which policy decides.`,
		Args: inputArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output, "text", "json"); err != nil {
				return err
			}
			workload, err := q.workload(cmd)
			if err != nil {
				return err
			}
			if len(files) == 0 {
				return inputErrorf("--file is required")
			}
			policies, err := readPolicies(files, cmd.InOrStdin(), q.namespace)
			if err != nil {
				return err
			}
			if err := policies.Invalid(); err != nil {
				return err
			}
			effective := policy.NewSet(q.root, policies.List...).Resolve(workload)
			if output == "json" {
				return printJSON(cmd.OutOrStdout(), verdictOf(effective, q.port))
			}
			mode, _ := effective.At(q.port)
			_, err = fmt.Fprintln(cmd.OutOrStdout(), mode)
			return err
		},
	}
	filesFlag(cmd, &files, "file", "f", "`file` of policies, a folder of them, or - for standard input; may be repeated")
	q.flags(cmd)
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return cmd
}

// question is about whom evaluate and explain are asked.
type question struct {
	namespace string
	labels    []string
	port      uint16 // 0: the workload as a whole
	root      string
}

func (q *question) flags(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&q.namespace, "namespace", "n", "", "namespace of the workload, and of policies that name none")
	cmd.Flags().StringSliceVarP(&q.labels, "labels", "l", nil, "labels of the workload, KEY=VALUE,...")
	cmd.Flags().Uint16Var(&q.port, "port", 0, "container port, not the port of a Service")
	rootFlag(cmd, &q.root)
}

// workload checks the flags and returns the workload that they describe.
func (q *question) workload(cmd *cobra.Command) (policy.Workload, error) {
	if cmd.Flags().Changed("port") && q.port == 0 {
		return policy.Workload{}, inputErrorf("--port 0: it must be from 1 to 65535")
	}
	if err := checkNamespaces(q.namespace, q.root); err != nil {
		return policy.Workload{}, err
	}
	if q.namespace == "" {
		return policy.Workload{}, inputErrorf("--namespace is required")
	}
	labels := make(map[string]string, len(q.labels))
	for _, label := range q.labels {
		key, value, ok := strings.Cut(label, "=")
		if _, twice := labels[key]; twice {
			return policy.Workload{}, inputErrorf("--labels: %q is there twice", key)
		}
		if !ok || !isLabelKey(key) || !labelValue.MatchString(value) {
			return policy.Workload{}, inputErrorf("--labels: %q is not KEY=VALUE as Kubernetes has labels", label)
		}
		labels[key] = value
	}
	return policy.Workload{Namespace: q.namespace, Labels: labels}, nil
}

// readPolicies reads the policies in files, in folders and, for "-", in stdin. Those
// that name no namespace are of the one given, as with kubectl apply -n.
func readPolicies(paths []string, stdin io.Reader, namespace string) (manifest.PolicySet, error) {
	files, err := manifest.Read(paths, stdin)
	if err != nil {
		return manifest.PolicySet{}, err
	}
	return manifest.Policies(files, namespace)
}

// verdict is what evaluate prints as JSON.
type verdict struct {
	Mode      policy.Mode       `json:"mode"`
	DecidedBy *policy.Ref       `json:"decidedBy"`      // null: no policy, PERMISSIVE is the default
	Port      uint16            `json:"port,omitempty"` // that Mode is of; without it, of all but Ports
	Ports     []policy.PortMode `json:"ports"`          // that have another mode than the workload
	PortsBy   *policy.Ref       `json:"portsBy"`
}

func verdictOf(effective *policy.Effective, port uint16) verdict {
	mode, by := effective.At(port)
	return verdict{
		Mode: mode, DecidedBy: orNull(by), Port: port,
		Ports: append([]policy.PortMode{}, effective.Ports...), PortsBy: orNull(effective.PortsBy),
	}
}

// orNull makes JSON's null of a reference to no policy.
func orNull(ref policy.Ref) *policy.Ref {
	if ref.IsZero() {
		return nil
	}
	return &ref
}

// clusterFlags say which cluster to read, as they do for kubectl.
type clusterFlags struct{ kubeconfig, context string }

func (c *clusterFlags) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&c.kubeconfig, "kubeconfig", "", "file that says how to reach the cluster; kubectl's if empty")
	cmd.Flags().StringVar(&c.context, "context", "", "context of the kubeconfig; its current one if empty")
}

func (c *clusterFlags) given() bool { return c.kubeconfig != "" || c.context != "" }

func rootFlag(cmd *cobra.Command, root *string) {
	cmd.Flags().StringVar(root, "root-namespace", "istio-system", "namespace whose policies are for the whole mesh")
}

func filesFlag(cmd *cobra.Command, files *[]string, name, short, usage string) {
	cmd.Flags().StringArrayVarP(files, name, short, nil, usage)
}

func checkOutput(output string, known ...string) error {
	for _, name := range known {
		if output == name {
			return nil
		}
	}
	return inputErrorf("--output %q: it must be %s", output, strings.Join(known, " or "))
}

// checkNamespaces refuses what no namespace of Kubernetes is called. An empty
// namespace may be one that was not given.
func checkNamespaces(namespace, root string) error {
	if namespace != "" && !dnsLabel.MatchString(namespace) {
		return inputErrorf("--namespace: %q is not the name of a namespace", namespace)
	}
	if !dnsLabel.MatchString(root) {
		return inputErrorf("--root-namespace: %q is not the name of a namespace", root)
	}
	return nil
}

var (
	dnsLabel   = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	dnsName    = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	labelName  = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$`)
	labelValue = regexp.MustCompile(`^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$`)
)

// isLabelKey reports whether Kubernetes allows key: a name, after a DNS name and
// a slash if it has one.
func isLabelKey(key string) bool {
	prefix, name, ok := strings.Cut(key, "/")
	if !ok {
		return labelName.MatchString(key)
	}
	return len(prefix) <= 253 && dnsName.MatchString(prefix) && labelName.MatchString(name)
}

func printJSON(w io.Writer, value any) error {
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", "  ")
	return encoder.Encode(value)
}
