package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"golang.org/x/term"

	"troth.dev/troth/handshake"
	"troth.dev/troth/identity"
	"troth.dev/troth/internal/dev"
)

// errUnexpected says that the demonstration did not go as it should. The output
// has said why.
var errUnexpected = errors.New("the demonstration did not go as expected")

// demoNamespace is where the services of the demonstration are.
const demoNamespace = "shop"

// demoPatience bounds the whole demonstration.
const demoPatience = time.Minute

func demoCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "demo",
		Short: "Show two services prove themselves to each other, four that cannot, and what policy decides",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), demoPatience)
			defer cancel()
			return demo(ctx, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
}

// scene is one connection from service A to service B and what has to come of it.
type scene struct {
	title  string
	caller callerConfig
	// stopsAt is the step in which it has to stop, 0 for none, and by the word of
	// which side, with which code.
	stopsAt handshake.Step
	side    handshake.Side
	code    handshake.Code
	// told is the outcome in the reader's words.
	told string
}

func demo(ctx context.Context, stdout, stderr io.Writer) (err error) {
	ctx, stop := context.WithCancel(ctx)
	group, ctx := errgroup.WithContext(ctx)
	var homes []*home
	defer func() {
		stop()
		err = errors.Join(err, group.Wait())
		for _, h := range homes { // once nothing runs in them any more
			err = errors.Join(err, h.remove())
		}
	}()
	for _, trustDomain := range []string{"example.org", "elsewhere.example"} {
		h, err := startPlane(ctx, group, trustDomain, stderr)
		if err != nil {
			return err
		}
		homes = append(homes, h)
	}
	home, elsewhere := homes[0], homes[1]

	out := newPrinter(stdout)
	a := identity.ServiceAccount{Namespace: demoNamespace, Name: "frontend"}
	b := identity.ServiceAccount{Namespace: demoNamespace, Name: "payments"}
	idB, err := b.ID(home.trustDomain)
	if err != nil {
		return err
	}
	other, err := identity.ServiceAccount{Namespace: demoNamespace, Name: "ledger"}.ID(home.trustDomain)
	if err != nil {
		return err
	}
	out.heading("Troth: two services prove themselves to each other")
	out.line("control plane  %s, trust domain %s, SQLite in a temporary folder", home.plane.Address(), home.trustDomain)
	out.line("Workload API   %s", home.plane.Socket())

	callee, err := startService(ctx, home, b, "callee", callerConfig{}, stderr)
	if err != nil {
		return err
	}
	defer callee.end()
	address, err := callee.next()
	if err != nil {
		return fmt.Errorf("service B did not start: %w", err)
	}
	out.line("service A      process of its own, service account %s", a)
	out.line("service B      process of its own, service account %s, at %s", b, address.Address)

	scenes := []scene{
		{
			title:  "A calls B",
			caller: callerConfig{Peer: idB.String()},
		},
		{
			title:   "A has no certificate",
			caller:  callerConfig{Peer: idB.String(), Fault: noCertificate},
			stopsAt: handshake.StepCallerPresents, side: handshake.Callee, code: handshake.PeerRefused,
			told: "A has nothing to present",
		},
		{
			title:   "A is from another trust domain",
			caller:  callerConfig{Peer: idB.String(), foreign: true},
			stopsAt: handshake.StepCalleeVerifies, side: handshake.Callee, code: handshake.TrustDomainUnknown,
			told: "B does not trust A's trust domain",
		},
		{
			title:   "B is not the one that A meant",
			caller:  callerConfig{Peer: other.String()},
			stopsAt: handshake.StepCallerVerifies, side: handshake.Caller, code: handshake.PeerUnexpected,
			told: "A meant " + other.String(),
		},
		{
			title:   "A speaks plaintext",
			caller:  callerConfig{Peer: idB.String(), Fault: plaintext},
			stopsAt: handshake.StepCallerPresents, side: handshake.Callee, code: handshake.NotTLS,
			told: "B hears no TLS",
		},
	}
	wrong := 0
	for n, s := range scenes {
		home := home
		if s.caller.foreign {
			home = elsewhere
		}
		s.caller.Address = address.Address
		seenA, seenB, err := play(ctx, home, a, s.caller, callee, stderr)
		if err != nil {
			return fmt.Errorf("%s: %w", s.title, err)
		}
		problem := s.check(seenA, seenB)
		if n == 0 {
			out.heading(s.title)
			out.table(seenA.Events, seenB.Events)
			out.heading("And four who cannot")
		} else {
			out.refusal(s, seenB)
		}
		if problem != nil {
			out.problem(problem)
			wrong++
		}
	}
	out.heading("And what policy makes of plaintext")
	if problem, err := playPolicy(ctx, group, home, out, stderr); err != nil {
		return err
	} else if problem != nil {
		out.problem(problem)
		wrong++
	}
	if wrong > 0 {
		return errUnexpected
	}
	out.line("")
	out.good("Every step, every refusal and every decision was as expected.")
	return nil
}

// check returns what was not as it has to be.
func (s scene) check(a, b outcome) error {
	if s.stopsAt == 0 {
		for _, seen := range []outcome{a, b} {
			if seen.Error != "" {
				return fmt.Errorf("it stopped: %s", seen.Error)
			}
			for n, e := range seen.Events {
				if e.Step != handshake.Step(n+1) || e.Code != "" {
					return fmt.Errorf("event %d is step %d", n+1, e.Step)
				}
			}
			if len(seen.Events) != int(handshake.StepData) {
				return fmt.Errorf("%d steps were seen, not %d", len(seen.Events), handshake.StepData)
			}
		}
		if a.Received != greeting || b.Received != greeting {
			return errors.New("the data did not arrive")
		}
		return nil
	}
	if a.Received != "" || b.Received != "" {
		return errors.New("application data crossed")
	}
	by := b
	if s.side == handshake.Caller {
		by = a
	}
	if len(by.Events) == 0 {
		return fmt.Errorf("the %v saw nothing", s.side)
	}
	last := by.Events[len(by.Events)-1]
	if last.Step != s.stopsAt || last.Code != s.code {
		return fmt.Errorf("it stopped at step %d with %q, not at step %d with %q", last.Step, last.Code, s.stopsAt, s.code)
	}
	if s.stopsAt < handshake.StepCalleePresents {
		for _, e := range b.Events {
			if e.Step >= handshake.StepCalleePresents {
				return errors.New("service B showed its certificate")
			}
		}
	}
	return nil
}

// play runs service A once and returns what both sides saw.
func play(ctx context.Context, home *home, account identity.ServiceAccount, caller callerConfig, callee *service, stderr io.Writer) (a, b outcome, err error) {
	s, err := startService(ctx, home, account, "caller", caller, stderr)
	if err != nil {
		return a, b, err
	}
	defer s.end()
	if a, err = s.next(); err != nil {
		return a, b, fmt.Errorf("service A: %w", err)
	}
	if b, err = callee.next(); err != nil {
		return a, b, fmt.Errorf("service B: %w", err)
	}
	return a, b, nil
}

// home is a trust domain of the demonstration.
type home struct {
	trustDomain spiffeid.TrustDomain
	plane       *dev.Plane
	dir         string
}

func startPlane(ctx context.Context, group *errgroup.Group, trustDomain string, stderr io.Writer) (*home, error) {
	td, err := spiffeid.TrustDomainFromString(trustDomain)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "troth-demo-")
	if err != nil {
		return nil, err
	}
	h := &home{trustDomain: td, dir: dir}
	if err := os.Mkdir(h.policies(), 0o755); err != nil {
		return nil, errors.Join(err, h.remove())
	}
	log := devLog(stderr, false)
	h.plane, err = dev.Open(ctx, dev.Config{
		TrustDomain: td, Dir: dir, Policies: []string{h.policies()}, PolicyNamespace: demoNamespace, Log: log, Audit: log,
	})
	if err != nil {
		return nil, errors.Join(err, h.remove())
	}
	group.Go(func() error { return h.plane.Run(ctx) })
	return h, nil
}

func (h *home) remove() error { return os.RemoveAll(h.dir) }

// policies is the folder whose manifests are in force.
func (h *home) policies() string { return filepath.Join(h.dir, "policies") }

// service is a service of the demonstration, a process of its own.
type service struct {
	pod      string // the UID of the pod that it stands for
	cmd      *exec.Cmd
	stdin    io.Closer
	outcomes *bufio.Scanner
	ended    sync.Once
}

// startService starts a process, makes it stand for a pod of the account, and
// only then lets it go on.
func startService(ctx context.Context, h *home, account identity.ServiceAccount, role string, config callerConfig, stderr io.Writer) (*service, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self, "demo-service", role)
	cmd.Env = append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET=unix://"+h.plane.Socket())
	cmd.Stderr = stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	pod := h.plane.Cluster.AddPod(account, account.Name)
	s := &service{pod: pod.UID, cmd: cmd, stdin: stdin, outcomes: bufio.NewScanner(stdout)}
	if err := h.plane.Cluster.Bind(int32(cmd.Process.Pid), pod.UID); err != nil {
		s.end()
		return nil, err
	}
	if err := json.NewEncoder(stdin).Encode(config); err != nil {
		s.end()
		return nil, err
	}
	return s, nil
}

// next returns the next thing that the service has to tell.
func (s *service) next() (outcome, error) {
	if !s.outcomes.Scan() {
		return outcome{}, errors.Join(errors.New("it ended"), s.outcomes.Err())
	}
	var o outcome
	return o, json.Unmarshal(s.outcomes.Bytes(), &o)
}

// end closes the service's input, which ends it, and waits for that.
func (s *service) end() {
	s.ended.Do(func() {
		// What it has to tell was read, and how it exits adds nothing.
		_ = s.stdin.Close()
		_ = s.cmd.Wait()
	})
}

// printer writes the demonstration: coloured and aligned on a terminal, plain
// lines elsewhere.
type printer struct {
	w        io.Writer
	coloured bool
}

func newPrinter(w io.Writer) *printer {
	f, ok := w.(*os.File)
	return &printer{w: w, coloured: ok && term.IsTerminal(int(f.Fd())) && os.Getenv("NO_COLOR") == ""}
}

const (
	bold  = "1"
	green = "32"
	red   = "31"
)

func (p *printer) paint(colour, text string) string {
	if !p.coloured {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

func (p *printer) line(format string, args ...any) { fmt.Fprintf(p.w, format+"\n", args...) }
func (p *printer) heading(text string)             { p.line("\n%s", p.paint(bold, text)) }
func (p *printer) good(text string)                { p.line("%s", p.paint(green, text)) }
func (p *printer) problem(err error)               { p.line("%s", p.paint(red, "  UNEXPECTED: "+err.Error())) }

func (p *printer) table(a, b []event) {
	// What each step means for each side, and in the end. Whether it happened is
	// for the events to say.
	rows := []struct{ action, doneA, doneB, result string }{
		{"A connects and presents its certificate", "sent its certificate", "has A's certificate", "attempt started"},
		{"B verifies A's certificate", "was verified", "verified A", "client authenticated"},
		{"B presents its certificate", "has B's certificate", "sent its certificate", "server certificate sent"},
		{"A verifies B's certificate", "verified B", "was verified", "server authenticated"},
		{"the handshake completes", "both verified", "both verified", "mutual trust"},
		{"data", "encrypted, authenticated", "encrypted, authenticated", "secure exchange"},
	}
	const widths = "%-4s  %-39s  %-24s  %-24s  %s"
	p.line(widths, "step", "action", "service A", "service B", "result")
	p.line("%s", strings.Repeat("-", 120))
	for n, row := range rows {
		sideA, sideB, result, colour := "-", "-", "not reached", red
		if n < len(a) && a[n].Code == "" {
			sideA = row.doneA
		}
		if n < len(b) && b[n].Code == "" {
			sideB = row.doneB
		}
		if sideA != "-" && sideB != "-" {
			result, colour = row.result, green
		}
		p.line(widths, fmt.Sprint(n+1), row.action, sideA, sideB, p.paint(colour, result))
	}
	if len(a) > 0 && len(b) > 0 {
		p.line("A knows B as   %s", a[len(a)-1].Peer)
		p.line("B knows A as   %s", b[len(b)-1].Peer)
	}
}

func (p *printer) refusal(s scene, b outcome) {
	revealed := "B's certificate was not sent"
	for _, e := range b.Events {
		if e.Step >= handshake.StepCalleePresents && e.Code == "" {
			revealed = "B's certificate went to A, whom it had verified"
		}
	}
	p.line("%-32s  stopped at step %d  %-22s  %s", s.title, s.stopsAt, p.paint(red, string(s.code)), s.told)
	p.line("%-32s  no application byte crossed; %s", "", revealed)
}
