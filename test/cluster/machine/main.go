// Command machine makes a machine of its own out of Linux namespaces: a process 1,
// a network, mounts, cgroups and a host name that nothing else on the computer has.
// Package cluster runs a Kubernetes node in each. People do not run it.
//
// "machine keep SPEC" is the parent of a machine and outside of it. It ends the
// machine, with everything in it, and removes its cgroups and its state when its
// standard input ends: also when whoever holds the other end was killed. If it is
// killed itself the kernel ends the machine, and empty cgroups remain.
//
// "machine init SPEC" is the machine's process 1: it mounts what a machine has, is
// the parent of all orphans, and starts programs for whoever calls its socket.
package main

import (
	"encoding/json"
	"fmt"
	"os"

	"troth.dev/troth/test/cluster/machine/spec"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "machine:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("want a command and a file, have %q", args)
	}
	content, err := os.ReadFile(args[1])
	if err != nil {
		return err
	}
	var m spec.Machine
	if err := json.Unmarshal(content, &m); err != nil {
		return fmt.Errorf("read %q: %w", args[1], err)
	}
	switch args[0] {
	case "keep":
		return keep(m, args[1])
	case "init":
		return enter(m, args[1])
	case "serve":
		return serve(m)
	default:
		return fmt.Errorf("unknown command %q", args[0])
	}
}
