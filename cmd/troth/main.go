// Command troth is Troth on a laptop and in CI: a demonstration, a development
// mode, and whatever operators do by hand.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"syscall"

	"github.com/spf13/cobra"

	"troth.dev/troth/internal/manifest"
	"troth.dev/troth/internal/version"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	if err == nil {
		return
	}
	if !hasTold(err) {
		fmt.Fprintln(os.Stderr, "troth:", err)
	}
	stop()
	os.Exit(exitCode(err))
}

// hasTold reports whether the output has told all there is to tell.
func hasTold(err error) bool {
	for _, told := range []error{errUnexpected, errChanges, errStepBlocked, errOverdue, errNotSurvived, errCheckFailed, errExpiring, errNotAllChecks} {
		if errors.Is(err, told) {
			return true
		}
	}
	return false
}

// exitCode tells a script what to make of an error: 2 if what the command was
// given has to be mended, 3 if a dry run found changes, something is in the way of a
// change or a check failed, 4 if a change is overdue or time runs out for something,
// 5 if not everything could be checked, 1 for all else.
func exitCode(err error) int {
	var input inputError
	var manifests manifest.Errors
	var refused *refusedError
	switch {
	case errors.As(err, &input), errors.As(err, &manifests):
		return 2
	case errors.Is(err, errChanges), errors.Is(err, errStepBlocked), errors.Is(err, errCheckFailed), errors.As(err, &refused):
		return 3
	case errors.Is(err, errOverdue), errors.Is(err, errExpiring):
		return 4
	case errors.Is(err, errNotAllChecks):
		return 5
	default:
		return 1
	}
}

// run is the whole command, so that tests can call it.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	root := &cobra.Command{
		Use:           "troth",
		Short:         "Mutual TLS identities for services in Kubernetes",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.AddCommand(demoCommand(), demoServiceCommand(), devCommand(), policyCommand(), authorityCommand(), connectionsCommand(),
		checkCommand(), mintCommand(), rehearseCommand(), versionCommand())
	return root.ExecuteContext(ctx)
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), version.String(), runtime.Version())
			return err
		},
	}
}
