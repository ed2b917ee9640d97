package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/identity"
	"troth.dev/troth/internal/dev"
)

// defaultDir is where the sockets are found without being told. Paths of Unix
// sockets are short (unix(7): 108 bytes), so it is not below the home directory.
func defaultDir() string {
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "troth")
	}
	return filepath.Join(os.TempDir(), fmt.Sprintf("troth-%d", os.Getuid()))
}

func devCommand() *cobra.Command {
	var dir, trustDomain, fallback, policyNamespace string
	var policies []string
	var life time.Duration
	var verbose bool
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Run a control plane, an agent and a Workload API socket on this machine",
		Long: `Run a control plane, an agent and a Workload API socket on this machine, until
interrupted. It has everything that a cluster has but Kubernetes: service accounts
are made when they are named, and processes take the place of pods.

A process gets an identity in one of three ways: it is started by "troth dev exec",
it is named to "troth dev assign", or it just connects to the socket and gets that
of --service-account.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			td, err := spiffeid.TrustDomainFromString(trustDomain)
			if err != nil {
				return err
			}
			var account identity.ServiceAccount
			if fallback != "" {
				if account, err = identity.ParseServiceAccountName(fallback); err != nil {
					return err
				}
			}
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
			plane, err := dev.Open(cmd.Context(), dev.Config{
				TrustDomain: td, Dir: dir, Fallback: account, SVIDLife: life,
				Policies: policies, PolicyNamespace: policyNamespace,
				Log: devLog(cmd.ErrOrStderr(), verbose), Audit: devLog(cmd.ErrOrStderr(), verbose),
			})
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "export SPIFFE_ENDPOINT_SOCKET=unix://%s\n", plane.Socket())
			fmt.Fprintf(cmd.ErrOrStderr(), "# trust domain %s, control plane at %s; Ctrl-C ends it\n", td, plane.Address())
			return plane.Run(cmd.Context())
		},
	}
	cmd.PersistentFlags().StringVar(&dir, "dir", defaultDir(), "folder of the sockets and the database")
	cmd.Flags().StringVar(&trustDomain, "trust-domain", "dev.troth.test", "trust domain")
	cmd.Flags().StringVar(&fallback, "service-account", "default/default", "NAMESPACE/NAME for processes without another; empty for none")
	cmd.Flags().DurationVar(&life, "svid-life", time.Hour, "how long SVIDs live, 10s to 24h")
	cmd.Flags().StringArrayVar(&policies, "policies", nil, "file or folder of PeerAuthentication manifests, followed while they change; repeatable")
	cmd.Flags().StringVar(&policyNamespace, "policy-namespace", "default", "namespace of policies that name none")
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "log what happens")
	cmd.AddCommand(devExecCommand(&dir), devAssignCommand(&dir))
	return cmd
}

func devExecCommand(dir *string) *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "exec [flags] -- COMMAND [ARG]...",
		Short: "Run a command with an identity of the running troth dev",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			account, err := identity.ParseServiceAccountName(name)
			if err != nil {
				return err
			}
			path, err := exec.LookPath(args[0])
			if err != nil {
				return err
			}
			assigned, err := dev.Assign(cmd.Context(), *dir, account, 0)
			if err != nil {
				return err
			}
			// The process stays the same one, and so does its identity.
			env := append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET=unix://"+assigned.Socket)
			return fmt.Errorf("run %q: %w", path, syscall.Exec(path, args, env))
		},
	}
	cmd.Flags().StringVar(&name, "service-account", "default/default", "NAMESPACE/NAME to run as")
	return cmd
}

func devAssignCommand(dir *string) *cobra.Command {
	var name string
	var pid int32
	cmd := &cobra.Command{
		Use:   "assign --pid PID",
		Short: "Give a running process, and its children, an identity of the running troth dev",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if pid <= 0 {
				return errors.New("--pid is required")
			}
			account, err := identity.ParseServiceAccountName(name)
			if err != nil {
				return err
			}
			assigned, err := dev.Assign(cmd.Context(), *dir, account, pid)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), assigned.SPIFFEID)
			return err
		},
	}
	cmd.Flags().StringVar(&name, "service-account", "default/default", "NAMESPACE/NAME")
	cmd.Flags().Int32Var(&pid, "pid", 0, "the process")
	return cmd
}

// devLog is quiet about what is not a problem unless asked.
func devLog(w io.Writer, verbose bool) *slog.Logger {
	level := slog.LevelWarn
	if verbose {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level}))
}
