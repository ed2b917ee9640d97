package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"runtime/pprof"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

// serveCommand is the argument with which the command runs itself as a server.
const serveCommand = "serve"

// spec says what a server process is to be.
type spec struct {
	Floor bool // the bare server, not Troth
	// The cluster that is simulated: an agent on each node, and as many pods
	// beside it.
	Nodes, PodsPerNode int
	Ledger             int    // issuances in the ledger from the start
	Profile            string // file for a CPU profile; none if empty
	MintKeys           string // file of the keys of CI tokens; without it, CI gets nothing
}

// ready is what a server process tells when it listens.
type ready struct {
	Address     string
	Authorities [][]byte // DER
	Agents      []agent
}

// usage is what a process has used by now.
type usage struct {
	CPU time.Duration // user and system
	RSS int64         // resident memory, in bytes
}

// Commands to a server process. It answers each with its usage.
const (
	askUsage   = "usage"
	askPush    = "push"    // a new bundle for every agent
	askPrepare = "prepare" // a new authority for every agent to prove
	askProof   = "proof"   // an answer when all have
	askAbort   = "abort"   // that authority to be dropped
)

// process is a server in a process of its own. Whoever starts one stops it.
type process struct {
	ready
	command  *exec.Cmd
	stdin    io.WriteCloser
	requests *json.Encoder
	answers  *json.Decoder
}

// start returns once the server listens.
func start(ctx context.Context, s spec) (*process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &process{command: exec.CommandContext(ctx, self, serveCommand)}
	p.command.Stderr = os.Stderr
	if p.stdin, err = p.command.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := p.command.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.command.Start(); err != nil {
		return nil, err
	}
	p.requests, p.answers = json.NewEncoder(p.stdin), json.NewDecoder(stdout)
	if err := errors.Join(p.requests.Encode(s), p.answers.Decode(&p.ready)); err != nil {
		return nil, errors.Join(fmt.Errorf("start a server: %w", err), p.stop())
	}
	return p, nil
}

// startBoth starts Troth and its floor.
func startBoth(ctx context.Context, s spec, o options) (troth, floor *process, err error) {
	if o.profile != "" {
		s.Profile = filepath.Join(o.profile, "troth.pprof")
	}
	if troth, err = start(ctx, s); err != nil {
		return nil, nil, err
	}
	s.Floor = true
	if o.profile != "" {
		s.Profile = filepath.Join(o.profile, "floor.pprof")
	}
	if floor, err = start(ctx, s); err != nil {
		return nil, nil, errors.Join(err, troth.stop())
	}
	return troth, floor, nil
}

func (p *process) ask(command string) (usage, error) {
	if err := p.requests.Encode(command); err != nil {
		return usage{}, err
	}
	var u usage
	return u, p.answers.Decode(&u)
}

// cost returns the CPU time that the server spends on what do makes it do.
func (p *process) cost(do func() error) (time.Duration, error) {
	before, err := p.ask(askUsage)
	if err != nil {
		return 0, err
	}
	if err := do(); err != nil {
		return 0, err
	}
	after, err := p.ask(askUsage)
	return after.CPU - before.CPU, err
}

// stop ends the process and waits for it.
func (p *process) stop() error {
	return errors.Join(p.stdin.Close(), p.command.Wait())
}

// target is what can be measured: Troth, and its floor.
type target interface {
	authorities() [][]byte
	agents() []agent
	// push gives every agent that watches a new bundle. It does not wait for them.
	push(ctx context.Context) error
	// prepare gives every agent an authority to prove, awaitProof waits until all
	// have, and abort drops it.
	prepare(ctx context.Context) error
	awaitProof(ctx context.Context) error
	abort(ctx context.Context) error
	// serve answers calls until ctx ends, and closes l.
	serve(ctx context.Context, l net.Listener) error
	close() error
}

// serve is a server process. It ends when its standard input does, so that no
// server outlives whoever measures it.
func serve(ctx context.Context, stdin io.Reader, stdout io.Writer) (err error) {
	requests, answers := json.NewDecoder(stdin), json.NewEncoder(stdout)
	var s spec
	if err := requests.Decode(&s); err != nil {
		return err
	}
	open := openTroth
	if s.Floor {
		open = openFloor
	}
	t, err := open(ctx, s)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	// What is left over from the preparations must not pass for free memory that
	// the first agents then take.
	debug.FreeOSMemory()

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return t.serve(ctx, l) })
	group.Go(func() (err error) {
		defer cancel()
		if s.Profile != "" {
			f, err := os.Create(s.Profile)
			if err != nil {
				return err
			}
			defer f.Close()
			if err := pprof.StartCPUProfile(f); err != nil {
				return err
			}
			defer pprof.StopCPUProfile()
		}
		if err := answers.Encode(ready{l.Addr().String(), t.authorities(), t.agents()}); err != nil {
			return err
		}
		return obey(ctx, t, requests, answers)
	})
	return group.Wait()
}

func obey(ctx context.Context, t target, requests *json.Decoder, answers *json.Encoder) error {
	for {
		var command string
		if err := requests.Decode(&command); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		does := map[string]func(context.Context) error{
			askUsage: func(context.Context) error { return nil },
			askPush:  t.push, askPrepare: t.prepare, askProof: t.awaitProof, askAbort: t.abort,
		}[command]
		if does == nil {
			return fmt.Errorf("unknown command %q", command)
		}
		if err := does(ctx); err != nil {
			return err
		}
		u, err := used()
		if err != nil {
			return err
		}
		if err := answers.Encode(u); err != nil {
			return err
		}
	}
}

// used returns what this process has used: getrusage(2) is exact to the
// microsecond, and /proc/self/statm counts pages.
func used() (usage, error) {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		return usage{}, err
	}
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return usage{}, err
	}
	fields := bytes.Fields(statm)
	if len(fields) < 2 {
		return usage{}, fmt.Errorf("/proc/self/statm reads %q", statm)
	}
	pages, err := strconv.ParseInt(string(fields[1]), 10, 64)
	if err != nil {
		return usage{}, err
	}
	return usage{
		CPU: time.Duration(r.Utime.Nano() + r.Stime.Nano()),
		RSS: pages * int64(os.Getpagesize()),
	}, nil
}
