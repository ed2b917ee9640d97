// Command troth-cni is the CNI plugin by which a pod's traffic is captured before its
// containers start. It runs after the plugins that make the pod's network, asks the
// node's agent, and lets the pod start only when the agent says that capture stands.
//
// The container runtime runs it, by the CNI specification. A person runs
// "troth-cni install", which puts it on a node and keeps it in the node's CNI
// configuration, and "troth-cni uninstall", which takes it away.
//
// plugin.go has what the runtime asks for, install.go the two commands, and conflist.go
// how a configuration of somebody else is changed.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/version"

	"troth.dev/troth/agent/cni"
)

func main() {
	if len(os.Args) == 1 {
		plugin()
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "troth-cni:", err)
		stop()
		os.Exit(1)
	}
}

// plugin is the whole command for a container runtime. Chains came with version 0.3.0
// of the specification.
func plugin() {
	skel.PluginMainFuncs(skel.CNIFuncs{
		Add:    add,
		Del:    del,
		Check:  check,
		GC:     collect,
		Status: status,
	}, version.VersionsStartingFrom("0.3.0"), "CNI plugin troth-cni: lets pods start when their traffic is captured")
}

// run is the whole command for a person.
func run(ctx context.Context, args []string, stderr io.Writer) error {
	f := flag.NewFlagSet("troth-cni "+args[0], flag.ContinueOnError)
	f.SetOutput(stderr)
	i := installation{log: slog.New(slog.NewJSONHandler(stderr, nil))}
	f.StringVar(&i.binDir, "bin-dir", "/opt/cni/bin", "folder of the node's CNI plugins")
	f.StringVar(&i.confDir, "conf-dir", "/etc/cni/net.d", "folder of the node's CNI configurations")
	switch args[0] {
	case "install":
		f.StringVar(&i.config.Socket, "socket", cni.Socket, "the agent's Unix socket, as the node's container runtime sees it")
		exclude := f.String("exclude-namespaces", "kube-system,troth-system", "namespaces whose pods start without the agent and are not captured, with commas between")
		timeout := f.Duration("timeout", defaultTimeout, "how long a pod waits for the agent before its start fails and is tried again")
		once := f.Bool("once", false, "end when installed, instead of keeping it so until told to end")
		if err := parse(f, args[1:]); err != nil {
			return err
		}
		i.config.ExcludeNamespaces = strings.FieldsFunc(*exclude, func(r rune) bool { return r == ',' })
		i.config.Timeout = timeout.String()
		if err := i.config.check(); err != nil {
			return err
		}
		if *once {
			return i.install()
		}
		return i.keep(ctx, time.Second, 30*time.Second)
	case "uninstall":
		if err := parse(f, args[1:]); err != nil {
			return err
		}
		return i.uninstall()
	}
	return fmt.Errorf("command %q is not known: install and uninstall are; without one this is a CNI plugin", args[0])
}

func parse(f *flag.FlagSet, args []string) error {
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	return nil
}
