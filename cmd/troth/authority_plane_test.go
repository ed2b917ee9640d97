package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"troth.dev/troth/ca"
	"troth.dev/troth/identity"
	"troth.dev/troth/internal/dev"
	"troth.dev/troth/server"
	"troth.dev/troth/storage/sqlite"
	"troth.dev/troth/token"
)

// The scripts about authorities have a real control plane in the test's process.

// planes are those that run, by their folders, each with what ends it.
type planes struct {
	mu   sync.Mutex
	stop map[string]func() error
}

// command is the script command "plane KIND DIR": start starts one, and the kind
// "stop" ends it.
func (p *planes) command(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: plane dev|without-agents|agent-away|stop DIR")
	}
	kind, dir := args[0], ts.MkAbs(args[1])
	if kind == "stop" {
		ts.Check(p.end(dir))
		return
	}
	ts.Check(os.MkdirAll(dir, 0o700))
	ts.Check(p.start(kind, dir))
	ts.Defer(func() { ts.Check(p.end(dir)) })
}

// start starts a control plane in a folder, which keeps what there was: "dev" is a
// troth dev, "without-agents" a server that expects no agent, and "agent-away" one whose only
// agent does not run.
func (p *planes) start(kind, dir string) error {
	ctx, cancel := context.WithCancel(context.Background())
	var run func(context.Context) error
	var err error
	switch kind {
	case "dev":
		run, err = devPlane(ctx, dir)
	case "without-agents":
		run, err = serverPlane(ctx, dir, 0)
	case "agent-away":
		run, err = serverPlane(ctx, dir, 1)
	default:
		err = errors.New("there is no such plane")
	}
	if err != nil {
		cancel()
		return fmt.Errorf("plane %s: %w", kind, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- run(ctx) }()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stop[dir] = func() error {
		cancel()
		return <-ended
	}
	return nil
}

func (p *planes) end(dir string) error {
	p.mu.Lock()
	stop := p.stop[dir]
	delete(p.stop, dir)
	p.mu.Unlock()
	if stop == nil {
		return nil
	}
	return stop()
}

func testDomain() spiffeid.TrustDomain {
	return spiffeid.RequireTrustDomainFromString("dev.troth.test")
}

func devPlane(ctx context.Context, dir string) (run func(context.Context) error, err error) {
	discard := slog.New(slog.DiscardHandler)
	plane, err := dev.Open(ctx, dev.Config{
		TrustDomain: testDomain(), Dir: dir, Log: discard, Audit: discard,
		SVIDLife: 10 * time.Second, AgentReturn: time.Millisecond, // the shortest there are
	})
	if err != nil {
		return nil, err
	}
	return plane.Run, nil
}

// serverPlane is a server with its store and pods of agents that nobody runs.
func serverPlane(ctx context.Context, dir string, agents int) (run func(context.Context) error, err error) {
	td, discard := testDomain(), slog.New(slog.DiscardHandler)
	kek, err := keyIn(filepath.Join(dir, "key-encryption-key"))
	if err != nil {
		return nil, err
	}
	keys, err := ca.NewSealedKeys(kek)
	if err != nil {
		return nil, err
	}
	store, err := sqlite.Open(ctx, sqlite.Config{Path: filepath.Join(dir, "troth.db")})
	if err != nil {
		return nil, err
	}
	profile, err := ca.NewProfile(ca.ProfileConfig{})
	if err != nil {
		return nil, err
	}
	issuer, err := ca.Open(ctx, ca.Config{
		TrustDomain: td, Keys: keys, Authorities: store, Ledger: store, Audit: discard, Profile: profile,
	})
	if err != nil {
		return nil, err
	}
	cluster, err := dev.NewCluster(identity.ServiceAccount{})
	if err != nil {
		return nil, err
	}
	account := identity.ServiceAccount{Namespace: "troth-system", Name: "troth-agent"}
	for range agents {
		cluster.AddPod(account, "troth-agent")
	}
	tokens, err := token.New(token.Config{Issuers: []string{dev.Issuer}, Audience: td.IDString(), Keys: cluster.Keys})
	if err != nil {
		return nil, err
	}
	s, err := server.New(server.Config{
		TrustDomain: td, Issuer: issuer, Tokens: tokens, Pods: cluster, Agents: account,
		Fleet: store, Replica: "test", Log: discard, Metrics: prometheus.NewRegistry(),
	})
	if err != nil {
		return nil, err
	}
	agentsListener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	operators, err := net.Listen("unix", filepath.Join(dir, "operator.sock"))
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) error {
		group, ctx := errgroup.WithContext(ctx)
		group.Go(func() error { return s.Serve(ctx, agentsListener) })
		group.Go(func() error { return s.ServeOperators(ctx, operators) })
		err := group.Wait()
		tokens.Close()
		return errors.Join(err, store.Close())
	}, nil
}

func keyIn(path string) ([]byte, error) {
	key, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		key = make([]byte, ca.KeySize)
		rand.Read(key)
		err = os.WriteFile(path, key, 0o600)
	}
	return key, err
}

// ids is the script command "ids DIR", which sets $prepared, $active, $old, $tainted
// and $revoked to the ID of an authority in that state, or to nothing.
func ids(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: ids DIR")
	}
	ts.Check(ts.Exec("troth", "authority", "list", "--dir", args[0]))
	for _, state := range []string{"prepared", "active", "old", "tainted", "revoked"} {
		id := ""
		if row := regexp.MustCompile(`(?m)^([0-9a-f]{12}) +` + state + ` `).FindStringSubmatch(ts.ReadFile("stdout")); row != nil {
			id = row[1]
		}
		ts.Setenv(state, id)
	}
}

// mask is the script command "mask", which makes what the last command printed the same
// in each run: each ID is a letter, in the order in which they come, and all times and
// ages are the same. Standard error is put below standard output, after a line of dashes.
func mask(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: mask")
	}
	text := ts.ReadFile("stdout")
	if errors := ts.ReadFile("stderr"); errors != "" {
		text += "----\n" + errors
	}
	letters := make(map[string]string)
	text = regexp.MustCompile(`\b[0-9a-f]{12}\b`).ReplaceAllStringFunc(text, func(id string) string {
		if letters[id] == "" {
			letters[id] = strings.Repeat(string(rune('A'+len(letters))), len(id))
		}
		return letters[id]
	})
	text = regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ`).ReplaceAllString(text, "2006-01-02T15:04:05Z")
	text = regexp.MustCompile(`\b\d+[smh]\b *`).ReplaceAllStringFunc(text, func(age string) string {
		if trimmed := strings.TrimRight(age, " "); len(age) < len(trimmed)+2 { // no column of a table
			return "0s" + age[len(trimmed):]
		}
		return "0s" + strings.Repeat(" ", len(age)-2)
	})
	text = regexp.MustCompile(`\buid:\d+`).ReplaceAllString(text, "uid:0")
	file := ts.MkAbs("masked")
	ts.Check(os.WriteFile(file, []byte(text), 0o600))
	ts.Check(ts.Exec("cat", file)) // so that cmp compares it, and -update writes it
}

// until is the script command "until PATTERN PROGRAM [ARG]...", which runs a program
// again and again until what it prints matches.
func until(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: until PATTERN PROGRAM [ARG]...")
	}
	pattern := regexp.MustCompile(`(?m)` + args[0])
	deadline := time.Now().Add(30 * time.Second)
	for {
		ts.Check(ts.Exec(args[1], args[2:]...))
		if pattern.MatchString(ts.ReadFile("stdout")) {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("nothing that matches %q for 30s", args[0])
		}
	}
}

// printed is what a command has printed so far.
type printed struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (p *printed) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.text.Write(b)
}

func (p *printed) String() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.text.String()
}

// waitFor blocks until the text was printed.
func (p *printed) waitFor(t *testing.T, text string) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !strings.Contains(p.String(), text); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("%q was not printed in 30s, but:\n%s", text, p)
		}
	}
}

// shortFolder is one whose path leaves room for the name of a Unix socket.
func shortFolder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "troth")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// TestRotate: a rotation of a troth dev, from the first step to the last, by the
// gates alone.
func TestRotate(t *testing.T) {
	t.Parallel() // it waits for SVIDs to expire
	dir := shortFolder(t)
	running := &planes{stop: make(map[string]func() error)}
	if err := running.start("dev", dir); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := running.end(dir); err != nil {
			t.Error(err)
		}
	}()
	out := &printed{}
	err := run(t.Context(), []string{"authority", "rotate", "--dir", dir, "--timeout", "45s"}, strings.NewReader(""), out, out)
	if err != nil {
		t.Fatalf("rotate = %v\n%s", err, out)
	}
	want := regexp.MustCompile(`(?s)^prepare an authority
([0-9a-f]{12}) is prepared, and signs nothing until every agent trusts it \(uid:\d+\)
.*([0-9a-f]{12}) is old, and what it signed is replaced by \S+ \((uid:\d+|schedule)\)
([0-9a-f]{12}) is active, and signs from now on \((uid:\d+|schedule)\)
.*([0-9a-f]{12}) is revoked, and nobody trusts it any more \((uid:\d+|schedule)\)
([0-9a-f]{12}) signs, and what was before it is revoked
$`).FindStringSubmatch(out.String())
	if want == nil || want[1] != want[4] || want[1] != want[8] || want[2] != want[6] || want[1] == want[2] {
		t.Errorf("it printed\n%s", out)
	}
}

// TestRotateToWhatIsAborted: somebody drops the authority that a rotation is to.
func TestRotateToWhatIsAborted(t *testing.T) {
	dir := shortFolder(t)
	running := &planes{stop: make(map[string]func() error)}
	if err := running.start("agent-away", dir); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := running.end(dir); err != nil {
			t.Error(err)
		}
	}()
	out, ended := &printed{}, make(chan error, 1)
	go func() {
		ended <- run(t.Context(), []string{"authority", "rotate", "--dir", dir, "--timeout", "30s"}, strings.NewReader(""), out, out)
	}()
	out.waitFor(t, "proved 0/1 (0.00%), waiting: localhost offline")
	id := regexp.MustCompile(`([0-9a-f]{12}) is prepared`).FindStringSubmatch(out.String())[1]
	err := run(t.Context(), []string{"authority", "abort", "--dir", dir, "--reason", "not today", id}, strings.NewReader(""), io.Discard, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	want := regexp.MustCompile(`^` + id + ` was dropped under way by uid:\d+ \(not today\): start again to go on from there$`)
	if err := <-ended; err == nil || !want.MatchString(err.Error()) || exitCode(err) != 1 {
		t.Errorf("rotate = %v", err)
	}
}

// TestRotateThroughAll: a rotation outlasts the control plane, is interrupted, is
// gone on with, and ends when somebody else has done the rest.
func TestRotateThroughAll(t *testing.T) {
	dir := shortFolder(t)
	running := &planes{stop: make(map[string]func() error)}
	start := func() {
		t.Helper()
		if err := running.start("without-agents", dir); err != nil {
			t.Fatal(err)
		}
	}
	stop := func() {
		t.Helper()
		if err := running.end(dir); err != nil {
			t.Error(err)
		}
	}
	start()
	defer stop()
	rotate := func(ctx context.Context) (*printed, <-chan error) {
		out, ended := &printed{}, make(chan error, 1)
		go func() {
			ended <- run(ctx, []string{"authority", "rotate", "--dir", dir}, strings.NewReader(""), out, out)
		}()
		return out, ended
	}

	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	out, ended := rotate(ctx)
	out.waitFor(t, " left under ")
	stop()
	out.waitFor(t, ": trying again\n")
	start()
	out.waitFor(t, "connected again\n")
	interrupt()
	if err := <-ended; !errors.Is(err, errInterrupted) || exitCode(err) != 1 {
		t.Errorf("rotate, interrupted = %v (exit code %d)", err, exitCode(err))
	}
	stands := regexp.MustCompile(`\n([0-9a-f]{12}) signs; 0 SVIDs and 0 connections left under ([0-9a-f]{12}); .*\. The server goes on by itself; to watch: troth authority rotate\n$`).
		FindStringSubmatch(out.String())
	if stands == nil {
		t.Fatalf("it does not say where it stands, in the end:\n%s", out)
	}

	out, ended = rotate(t.Context())
	out.waitFor(t, " left under ")
	var revoked bytes.Buffer
	err := run(t.Context(), []string{"authority", "revoke", "--dir", dir, "--force", "--reason", "in a hurry", stands[2]}, strings.NewReader(""), &revoked, &revoked)
	if err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("rotate = %v", err)
	}
	for _, want := range []string{
		"go on with a rotation to " + stands[1] + "\n",
		stands[2] + " is revoked, and nobody trusts it any more (uid:",
		stands[1] + " signs, and what was before it is revoked\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q was not printed, but:\n%s", want, out)
		}
	}
}

// openTerminal returns both ends of a pseudo-terminal: what is written to the one is
// shown at the other.
func openTerminal(t *testing.T) (shown, tty *os.File) {
	t.Helper()
	shown, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { shown.Close() })
	if err := unix.IoctlSetPointerInt(int(shown.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	number, err := unix.IoctlGetInt(int(shown.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	return shown, tty
}

// TestRotateOnATerminal: progress is one line, written over and as wide as the
// terminal at most, and it is gone in the end.
func TestRotateOnATerminal(t *testing.T) {
	dir := shortFolder(t)
	running := &planes{stop: make(map[string]func() error)}
	if err := running.start("agent-away", dir); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := running.end(dir); err != nil {
			t.Error(err)
		}
	}()
	shown, tty := openTerminal(t)
	if err := unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 40}); err != nil {
		t.Fatal(err)
	}
	out, read := &printed{}, make(chan struct{})
	go func() {
		defer close(read)
		_, _ = io.Copy(out, shown) // ends with EIO, once nobody has the other end open
	}()
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	ended := make(chan error, 1)
	go func() {
		ended <- run(ctx, []string{"authority", "rotate", "--dir", dir}, strings.NewReader(""), tty, tty)
	}()
	out.waitFor(t, "waiting: localhost")
	interrupt()
	if err := <-ended; !errors.Is(err, errInterrupted) {
		t.Errorf("rotate, interrupted = %v", err)
	}
	tty.Close()
	<-read
	pattern := regexp.MustCompile(`\r\x1b\[Kproved 0/1 \(0\.00%\), waiting: localhost.{0,2}…(\r\x1b\[K.*)*\r\x1b\[K[0-9a-f]{12} is prepared, and signs nothing: `)
	if !pattern.MatchString(out.String()) {
		t.Errorf("the terminal shows %q", out)
	}
}
