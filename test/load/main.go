// Command load measures Troth against the bars that docs/performance.md names:
//
//	go run ./test/load            the first three, in less than three minutes
//	go run ./test/load issue      what a certificate costs the server
//	go run ./test/load fanout     what 1,000 agents, and a new bundle, cost it
//	go run ./test/load start      how soon troth dev serves its first SVID
//	go run ./test/load path       what bytes and connections cost a pair of proxies
//	go run ./test/load cut        how soon a change of policy ends connections
//	go run ./test/load mint       what CI at its limit costs the agents
//
// Each figure stands beside its floor: a bare gRPC server that does the least that
// the task demands. Server and floor run at the same time, each in a process of
// its own, and take turns under the same client, so that whatever else the machine
// does hits both. What counts is the CPU time of the server's process, user and
// system, and its ratio to the floor's; times on the clock are for orientation.
//
// Everything listens on loopback, and has ended when the command has.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		stop()
		os.Exit(1)
	}
}

// patience bounds a whole run.
const patience = 3 * time.Minute

// run is the whole command. The command runs itself again, with serveCommand or
// relayCommand, for each server that it measures.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	if len(args) == 1 && args[0] == serveCommand {
		return serve(ctx, stdin, stdout)
	}
	if len(args) == 1 && args[0] == relayCommand {
		return relay(ctx, stdin, stdout)
	}
	var o options
	f := flag.NewFlagSet("load", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.IntVar(&o.rounds, "rounds", 8, "rounds of each measurement")
	f.IntVar(&o.agents, "agents", 1000, "agents of the fan-out")
	f.IntVar(&o.ledger, "ledger", 100_000, "issuances in the ledger before the first one that is measured")
	f.StringVar(&o.profile, "profile", "", "folder for CPU profiles of the servers; none if empty")
	if err := f.Parse(args); err != nil {
		return err
	}
	if o.rounds < 1 || o.agents < 1 || o.ledger < 0 {
		return errors.New("-rounds and -agents are at least 1, -ledger at least 0")
	}
	measurements := map[string]func(context.Context, options, *report) error{
		"issue": measureIssue, "fanout": measureFanOut, "start": measureStart,
		"path": measurePath, "cut": measureCut, "mint": measureMint,
	}
	names := f.Args()
	if len(names) == 0 {
		names = []string{"issue", "fanout", "start"}
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var r report
	for _, name := range names {
		measure, ok := measurements[name]
		if !ok {
			return fmt.Errorf("no measurement %q: there are issue, fanout, start, path, cut and mint", name)
		}
		if err := measure(ctx, o, &r); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return r.print(stdout)
}

// options are the command's flags.
type options struct {
	rounds, agents, ledger int
	profile                string
}
