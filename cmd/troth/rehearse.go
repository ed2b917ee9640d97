package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/trothtest"
)

// errNotSurvived says that the application did not survive all of it. The output has
// told what.
var errNotSurvived = errors.New("the application did not survive all of it")

// rehearsal is what the command was told.
type rehearsal struct {
	trustDomain, path, peer string
	listen, call            string
	life, patience          time.Duration
	output                  string
}

func rehearseCommand() *cobra.Command {
	var r rehearsal
	cmd := &cobra.Command{
		Use:   "rehearse [flags] -- COMMAND [ARGUMENT]...",
		Short: "Run an application through all that happens to identities, and say what it survives",
		Long: `Run an application through all that happens to identities in production, within a
minute, and say what it survives: its SVID is renewed, the root is replaced, an
authority is tainted, an SVID expires, and the Workload API's socket goes away and
comes back.

The command is started with SPIFFE_ENDPOINT_SOCKET set to the socket of an authority
of its own, which is for tests: nobody else accepts what it issues. Nothing is left of
it afterwards.

What it survives is seen from outside. It has to keep running. With --listen, it is
called after each act by mutual TLS, and has to present its newest SVID, to accept
ours, and to refuse one of a revoked authority. With --call, it is waited for until it
has called us with its newest SVID, at the address in TROTH_PEER_ADDRESS; it has to
call every few seconds. Without either, it has to have fetched its newest SVID, which
says nothing of whether it uses it.

The exit code is 0 if it survived all, and 1 if not.`,
		Example: `  troth rehearse --listen 127.0.0.1:8443 -- ./payments --port 8443
  troth rehearse --call -- sh -c 'while sleep 1; do ./ask "https://$TROTH_PEER_ADDRESS/"; done'`,
		Args: inputArgs(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := r.check(); err != nil {
				return err
			}
			return r.run(cmd, args)
		},
	}
	f := cmd.Flags()
	f.StringVar(&r.trustDomain, "trust-domain", "troth.test", "trust `domain` of the identities")
	f.StringVar(&r.path, "path", "/ns/default/sa/app", "`path` of the application's SPIFFE ID")
	f.StringVar(&r.peer, "peer", "/ns/default/sa/peer", "`path` of the SPIFFE ID of whoever calls it and is called")
	f.StringVar(&r.listen, "listen", "", "call the application at this `address`, HOST:PORT or unix:PATH")
	f.StringVar(&r.call, "call", "", "be called by the application at this `HOST:PORT`; without a value, at any port")
	f.Lookup("call").NoOptDefVal = "127.0.0.1:0"
	f.DurationVar(&r.life, "svid-life", 20*time.Second, "how long SVIDs live, at least 10s; they are renewed at half of it")
	f.DurationVar(&r.patience, "patience", 15*time.Second, "how long the application may take after each act, and a third of what it may take to start")
	f.StringVarP(&r.output, "output", "o", "table", "table or json")
	return cmd
}

func (r *rehearsal) check() error {
	if err := checkOutput(r.output, "table", "json"); err != nil {
		return err
	}
	td, err := spiffeid.TrustDomainFromString(r.trustDomain)
	if err != nil {
		return inputErrorf("--trust-domain: %w", err)
	}
	for flag, path := range map[string]string{"--path": r.path, "--peer": r.peer} {
		if id, err := spiffeid.FromPath(td, path); err != nil || id.Path() == "" {
			return inputErrorf("%s: %q is no path of a SPIFFE ID, such as /ns/default/sa/app", flag, path)
		}
	}
	if r.path == r.peer {
		return inputErrorf("--path and --peer are the same: the application would call itself")
	}
	if r.listen != "" && !strings.HasPrefix(r.listen, "unix:") {
		if _, _, err := net.SplitHostPort(r.listen); err != nil {
			return inputErrorf("--listen: %w", err)
		}
	}
	if r.life < 10*time.Second || r.life > 24*time.Hour {
		return inputErrorf("--svid-life: %v is not from 10s to 24h", r.life)
	}
	if r.patience <= 0 {
		return inputErrorf("--patience: %v is no time", r.patience)
	}
	return nil
}

// act is one thing that happens, and how the application fared.
type act struct {
	Name     string        `json:"act"`
	Title    string        `json:"title"`
	Survived bool          `json:"survived"`
	Took     time.Duration `json:"-"`
	Seconds  float64       `json:"seconds"`
	Why      string        `json:"why,omitempty"` // it did not
}

// report is the outcome of a rehearsal.
type report struct {
	Command  []string `json:"command"`
	SPIFFEID string   `json:"spiffe_id"`
	Seen     []string `json:"seen_by"`
	Survived bool     `json:"survived"`
	Acts     []act    `json:"acts"`
}

func (r *rehearsal) run(cmd *cobra.Command, args []string) (err error) {
	ctx, cancel := context.WithCancel(cmd.Context())
	defer cancel()
	td, err := spiffeid.TrustDomainFromString(r.trustDomain)
	if err != nil {
		return err
	}
	authority, err := trothtest.Open(ctx, trothtest.Config{TrustDomain: td, SVIDLife: r.life})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, authority.Close()) }()
	s := &stage{
		rehearsal: r, authority: authority,
		app: authority.Identity(r.path), peer: authority.Identity(r.peer), former: authority.Identity(r.peer + "-former"),
	}
	environment := append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET="+s.app.Socket())
	if r.call != "" {
		if s.callers, err = listenForCalls(ctx, r.call, s.peer, s.app.ID()); err != nil {
			return err
		}
		defer s.callers.close()
		environment = append(environment, "TROTH_PEER_ADDRESS="+s.callers.address())
	}
	if err := authority.Err(); err != nil {
		return err
	}

	application, err := start(args, environment, cmd)
	if err != nil {
		return err
	}
	defer application.stop()
	s.application = application
	told := report{Command: args, SPIFFEID: s.app.ID().String(), Seen: s.probes(), Survived: true}
	out := newPrinter(cmd.OutOrStdout())
	if r.output == "table" {
		out.line("%s as %s", strings.Join(args, " "), s.app.ID())
		out.line("seen by: %s\n", strings.Join(told.Seen, "; "))
		out.line("%-52s  %-9s  %6s", "ACT", "SURVIVED", "AFTER")
	}
	for _, one := range s.acts() {
		now := s.play(ctx, one)
		if ctx.Err() != nil {
			return fmt.Errorf("stopped: %w", context.Cause(ctx))
		}
		if err := authority.Err(); err != nil {
			return err
		}
		told.Acts = append(told.Acts, now)
		told.Survived = told.Survived && now.Survived
		if r.output == "table" {
			printAct(out, now)
		}
		if now.Name == "start" && !now.Survived {
			break // all the others would say the same, after as long a wait each
		}
		if ended, _ := application.ended(); ended {
			break
		}
	}
	if r.output == "json" {
		if err := printJSON(cmd.OutOrStdout(), told); err != nil {
			return err
		}
	} else {
		printEnd(out, told, len(s.acts()))
	}
	if !told.Survived {
		return errNotSurvived
	}
	return nil
}

func printAct(out *printer, a act) {
	survived := out.paint(green, fmt.Sprintf("%-9s", "yes"))
	if !a.Survived {
		survived = out.paint(red, fmt.Sprintf("%-9s", "NO"))
	}
	out.line("%-52s  %s  %5.1fs", a.Title, survived, a.Seconds)
	if a.Why != "" {
		out.line("    %s", printable(a.Why))
	}
}

func printEnd(out *printer, told report, all int) {
	survived := 0
	for _, a := range told.Acts {
		if a.Survived {
			survived++
		}
	}
	out.line("")
	switch {
	case told.Survived:
		out.good(fmt.Sprintf("It survived all %d.", all))
	case len(told.Acts) < all:
		out.line("%s", out.paint(red, fmt.Sprintf("It survived %d of %d; %d were not tried.", survived, all, all-len(told.Acts))))
	default:
		out.line("%s", out.paint(red, fmt.Sprintf("It survived %d of %d.", survived, all)))
	}
}

// process is the command while it runs.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error         // why; to be read after done
}

// start starts the command in a process group of its own, so that what it started ends
// with it. What it prints goes to our error output: the other is ours.
func start(args, environment []string, cmd *cobra.Command) (*process, error) {
	c := exec.Command(args[0], args[1:]...) //nolint:gosec,noctx // it is what the user asks for, and stop ends it
	c.Env = environment
	c.Stdout, c.Stderr = cmd.ErrOrStderr(), cmd.ErrOrStderr()
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.WaitDelay = time.Second // for those of its children who hold its output
	if err := c.Start(); err != nil {
		return nil, inputErrorf("start the application: %w", err)
	}
	a := &process{cmd: c, done: make(chan struct{})}
	go func() {
		defer close(a.done)
		a.err = c.Wait()
	}()
	return a, nil
}

// ended says whether it has ended, and how.
func (a *process) ended() (ended bool, how string) {
	select {
	case <-a.done:
		if a.err == nil {
			return true, "it ended by itself, with exit code 0"
		}
		return true, "it died: " + a.err.Error()
	default:
		return false, ""
	}
}

// stop asks the application to end, and ends it if it does not.
func (a *process) stop() {
	const grace = 5 * time.Second
	group := -a.cmd.Process.Pid
	signal := func(s syscall.Signal) {
		// It fails if nobody is left in the group, which is what was wanted.
		syscall.Kill(group, s) //nolint:errcheck // see above
	}
	signal(syscall.SIGTERM)
	select {
	case <-a.done:
	case <-time.After(grace):
	}
	signal(syscall.SIGKILL) // those whom it left behind, too
	<-a.done
}

// stage is a rehearsal under way.
type stage struct {
	*rehearsal

	authority *trothtest.Authority
	app, peer *trothtest.Identity
	// former is left behind by rotations: it keeps what it has from before one.
	former      *trothtest.Identity
	callers     *callers // nil without --call
	application *process
}

func (s *stage) probes() []string {
	seen := []string{"whether it runs"}
	if s.listen != "" {
		seen = append(seen, "calling it at "+s.listen)
	}
	if s.callers != nil {
		seen = append(seen, "its calls to "+s.callers.address())
	}
	if s.listen == "" && s.callers == nil {
		seen = append(seen, "whether it fetches its newest SVID")
	}
	return seen
}

// trial is one act that is to happen.
type trial struct {
	name, title string
	do          func(context.Context)
	// also is looked at beside what is always looked at; it may be nil.
	also func(context.Context) error
}

// outage is how long the socket is away: long enough for a client to find out.
const outage = 2 * time.Second

func (s *stage) acts() []trial {
	return []trial{
		{"start", "it starts and gets its identity", func(context.Context) {}, nil},
		{"renewal", "its SVID is renewed", func(context.Context) { s.app.Renew() }, nil},
		{"prepare", "the next root is announced", func(context.Context) { s.authority.Prepare() }, nil},
		{"activate", "the next root signs", func(context.Context) {
			s.former.Partition(trothtest.Silent)
			s.authority.Activate()
		}, nil},
		{"revoke", "the old root is gone", func(context.Context) { s.authority.Revoke() }, s.refusesFormer},
		{"taint", "an authority is tainted, unannounced", func(context.Context) {
			s.former.Heal()
			s.former.Partition(trothtest.Silent)
			s.authority.Taint()
		}, nil},
		{"revoke-tainted", "the tainted authority is gone", func(context.Context) { s.authority.Revoke() }, s.refusesFormer},
		{"expiry", "its SVID expires, and is renewed too late", func(ctx context.Context) {
			s.app.Expire()
			s.pause(ctx, time.Second) // it goes on trying
			s.app.Renew()
		}, nil},
		{"socket", "the socket goes away, and comes back with a new SVID", func(ctx context.Context) {
			s.app.Partition(trothtest.Gone)
			s.app.Renew()
			s.pause(ctx, outage)
			s.app.Heal()
		}, nil},
	}
}

func (s *stage) pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	case <-s.application.done:
	}
}

// play has a trial happen, and looks at the application until all is as it should be or
// patience ends.
func (s *stage) play(ctx context.Context, one trial) act {
	if s.callers != nil {
		s.callers.forget()
	}
	one.do(ctx)
	s.peer.Renew() // who calls it after each act is somebody anew
	patience := s.patience
	if one.name == "start" {
		patience *= 3 // it has more to do than to hear of something
	}
	begun := time.Now()
	a := act{Name: one.name, Title: one.title}
	for {
		err := s.look(ctx, one)
		a.Took = time.Since(begun)
		a.Seconds = a.Took.Seconds()
		if ended, how := s.application.ended(); ended {
			a.Why = how
			return a
		}
		if err == nil {
			a.Survived, a.Why = true, ""
			return a
		}
		a.Why = err.Error()
		if a.Took > patience || ctx.Err() != nil || s.authority.Err() != nil {
			return a
		}
		s.pause(ctx, 50*time.Millisecond)
	}
}

// look returns what is wrong with the application at the moment.
func (s *stage) look(ctx context.Context, one trial) error {
	if s.listen == "" && s.callers == nil && !s.app.Delivered() {
		return errors.New("it has not fetched its newest SVID: it holds no stream of the Workload API, and did not ask again")
	}
	if s.listen != "" {
		if err := s.answers(ctx); err != nil {
			return err
		}
		if one.also != nil {
			if err := one.also(ctx); err != nil {
				return err
			}
		}
	}
	if s.callers != nil {
		newest, err := s.app.GetX509SVID()
		if err != nil {
			return err
		}
		return s.callers.sawCallBy(newest.Certificates[0])
	}
	return nil
}

// answers calls the application as peer.
func (s *stage) answers(ctx context.Context) error {
	newest, err := s.app.GetX509SVID()
	if err != nil {
		return err
	}
	presented, accepted, err := callApplication(ctx, s.listen, s.peer, s.peer, s.app.ID())
	switch {
	case presented == nil:
		return fmt.Errorf("calling it: %w", err)
	case !presented.Equal(newest.Certificates[0]):
		return fmt.Errorf("it presents an SVID that is not its newest: %s instead of %s", nameOf(presented), nameOf(newest.Certificates[0]))
	case !accepted:
		return fmt.Errorf("it refuses our SVID: %w", cmp.Or(err, errors.New("it closed the connection")))
	}
	return nil
}

// refusesFormer calls the application with an SVID of an authority that was revoked.
func (s *stage) refusesFormer(ctx context.Context) error {
	// One who was never accepted proves nothing, but is no danger either.
	if presented, accepted, _ := callApplication(ctx, s.listen, s.former, s.peer, s.app.ID()); presented != nil && accepted {
		return errors.New("it accepts an SVID of an authority that is revoked: it does not forget old roots")
	}
	return nil
}
