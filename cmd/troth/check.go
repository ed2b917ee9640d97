package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"troth.dev/troth/check"
	"troth.dev/troth/internal/version"
)

// What `troth check` says by its exit code alone. The output has said the rest.
var (
	errCheckFailed  = errors.New("a check failed")
	errExpiring     = errors.New("time runs out for something")
	errNotAllChecks = errors.New("not everything could be checked")
)

func checkCommand() *cobra.Command {
	var cluster clusterFlags
	var operator operatorFlags
	var config check.Config
	var onNode bool
	var output string
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Say whether a cluster is fit for Troth, and whether Troth is well in it",
		Long: `Say whether Troth is well in a cluster, or with --pre whether the cluster is fit
for it. Nothing is written to the cluster.

It reads what you may read. Without --server, --trust-domain, --bundle and --token
the control plane is not asked, and what only it knows is not known. On a node, as
root, --on-node looks at the node's own files too.

Each check comes to pass, warning, failure or unknown, and has a section in
` + check.Page + `. Unknown is never pass: it says what could not be read.

The exit code is 0 if all checks pass or warn, 2 if a flag is wrong, 3 if a check
failed, 4 if none did and time runs out for something, 5 if neither is so and
something is unknown, and 1 if the cluster could not be asked at all.`,
		Args: inputArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output, "text", "json"); err != nil {
				return err
			}
			for _, name := range []string{config.ServerNamespace, config.NodeNamespace} {
				if err := checkNamespaces(name, config.RootNamespace); err != nil {
					return err
				}
				if name == "" {
					return inputErrorf("--namespace and --node-namespace are the names of namespaces")
				}
			}
			if config.Patience <= 0 {
				return inputErrorf("--timeout %s: it has to be more than nothing", config.Patience)
			}
			config.TrustDomain = operator.trustDomain
			// The trust domain alone is of use too: it says whose bundle to look for.
			if operator.given() && operator != (operatorFlags{trustDomain: operator.trustDomain}) {
				if config.Before {
					return inputErrorf("--pre is about a cluster without Troth: leave --server out")
				}
				server, err := operator.config()
				if err != nil {
					return err
				}
				config.Server = &server
			}
			if onNode {
				config.NodeRoot = "/"
			}
			config.Kubeconfig, config.Context, config.Version = cluster.kubeconfig, cluster.context, version.String()
			progressing := (&authorityFlags{}).reporter(cmd.ErrOrStderr())
			if output == "json" {
				progressing.mode = silent
			}
			config.Progress = func(done, of int, what string) {
				text := fmt.Sprintf("read %d of %d: %s", done, of, what)
				progressing.progress(progress{text: text, key: text}, nil)
			}
			snapshot, err := check.Collect(cmd.Context(), config)
			progressing.clear()
			if err != nil {
				return err
			}
			if _, err := snapshot.APIServer.Get(); err != nil {
				return fmt.Errorf("the cluster cannot be asked: %w", err)
			}
			report := snapshot.Judge()
			if output == "json" {
				if err := printJSON(cmd.OutOrStdout(), report); err != nil {
					return err
				}
			} else {
				printReport(newPrinter(cmd.OutOrStdout()), report)
			}
			return inOneWord(report)
		},
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return inputError{err} })
	cluster.flags(cmd)
	operator.flags(cmd)
	cmd.Flags().BoolVar(&config.Before, "pre", false, "check whether the cluster is fit for an installation")
	cmd.Flags().BoolVar(&onNode, "on-node", false, "look at the files of this node too")
	cmd.Flags().StringVarP(&config.ServerNamespace, "namespace", "n", "troth-system", "namespace of the server")
	cmd.Flags().StringVar(&config.NodeNamespace, "node-namespace", "troth-node", "namespace of the agents")
	rootFlag(cmd, &config.RootNamespace)
	cmd.Flags().StringVar(&config.CNIFolder, "cni-conf-dir", "/etc/cni/net.d", "folder of the node's CNI configurations")
	cmd.Flags().StringVar(&config.CNIPrograms, "cni-bin-dir", "/opt/cni/bin", "folder of the node's CNI plugins")
	cmd.Flags().DurationVar(&config.Patience, "timeout", 15*time.Second, "how long each thing that is read may take")
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return cmd
}

// inOneWord returns the error that the exit code is made of, the worst first.
func inOneWord(report check.Report) error {
	switch {
	case report.Count(check.Failure) > 0:
		return errCheckFailed
	case report.Expiring():
		return errExpiring
	case report.Count(check.Unknown) > 0:
		return errNotAllChecks
	}
	return nil
}

// printReport prints a line for what passes, and for all else why it matters and what
// to do.
func printReport(out *printer, report check.Report) {
	for _, r := range report.Results {
		level := fmt.Sprintf("%-7s", r.Level)
		switch r.Level {
		case check.Pass:
			level = out.paint(green, level)
		case check.Failure:
			level = out.paint(red, level)
		case check.Unknown, check.Warning:
			level = out.paint(bold, level)
		}
		out.line("%s  %s: %s", level, r.ID, printable(r.Found))
		if r.Level == check.Pass {
			continue
		}
		out.line("         %s: %s", r.Title, r.Why)
		if r.Level != check.Unknown {
			out.line("         Do: %s", r.Do)
		}
		out.line("         %s", r.Docs)
	}
	out.line("")
	out.line("%s: %d passed, %d warned, %d failed, %d unknown.", count(len(report.Results), "check"),
		report.Count(check.Pass), report.Count(check.Warning), report.Count(check.Failure), report.Count(check.Unknown))
}
