package e2e_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"

	"troth.dev/troth/handshake"
)

// workloadVariable makes the test binary the process of a workload.
const workloadVariable = "TROTH_E2E_WORKLOAD"

// command is what the test tells a workload to do, one line of JSON each.
type command struct {
	Do      string // watch, accept, initiate, count, serve, drive or tally
	Socket  string // of the Workload API, to watch
	Order   handshake.Order
	Address string        // to initiate with
	Peer    string        // the SPIFFE ID to accept, or to expect
	Targets []target      // to drive: whom to call
	Every   time.Duration // to drive: how often
}

// event is what a workload tells, one line of JSON each.
type event struct {
	// Kind is update (of the Workload API), error (of its stream), invalid (what
	// the source holds is of no use), listening, handshake, count, serving or tally.
	Kind    string
	IDs     []string  // update: the SPIFFE IDs of all SVIDs
	Chain   []byte    // update: the first SVID's, DER
	At      time.Time // update: when it came
	Address string    // listening
	Peer    string    // handshake: who the other end was proved to be
	Code    string    // error: the gRPC code
	Error   string    // error, invalid, and a handshake that failed
	Count   int64     // count: how often the source was found valid
	Target  target    // serving
	Tally   tally     // tally
}

// service is the workload's own side: a program with an unmodified SPIFFE client.
type service struct {
	source *workloadapi.X509Source // nil before watch
	driver *driver                 // nil before drive
	valid  atomic.Int64            // how often the source was found valid

	mu     sync.Mutex
	events *json.Encoder // guarded by mu
}

// runWorkload does as it is told until its input ends.
func runWorkload(in io.Reader, out io.Writer) error {
	s := &service{events: json.NewEncoder(out)}
	for commands := json.NewDecoder(in); ; {
		var c command
		if err := commands.Decode(&c); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if err := s.do(c); err != nil {
			return fmt.Errorf("%s: %w", c.Do, err)
		}
	}
}

func (s *service) do(c command) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	switch c.Do {
	case "watch":
		return s.watch(c.Socket)
	case "accept":
		return s.accept(ctx, c)
	case "initiate":
		return s.initiate(ctx, c)
	case "serve":
		return s.serve()
	case "drive":
		s.driver = &driver{own: s.source, self: c.Peer, targets: c.Targets}
		go s.driver.drive(context.Background(), c.Every) // it ends with the process
		return nil
	case "tally":
		s.tell(event{Kind: "tally", Tally: s.driver.tally()})
		return nil
	case "count":
		s.tell(event{Kind: "count", Count: s.valid.Load()})
		return nil
	}
	return errors.New("no such command")
}

func (s *service) tell(e event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.events.Encode(e); err != nil {
		panic("e2e: the test does not listen any more: " + err.Error())
	}
}

// watch returns once the source has its first SVID, and goes on until the process
// ends. The source hides what goes wrong with its stream; a second stream on the
// same connection tells of it.
func (s *service) watch(socket string) error {
	ctx := context.Background()
	client, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+socket))
	if err != nil {
		return err
	}
	// It ends with the process: go-spiffe tries again whatever the error.
	go client.WatchX509Context(ctx, s)
	if s.source, err = workloadapi.NewX509Source(ctx, workloadapi.WithClient(client)); err != nil {
		return err
	}
	go s.check()
	return nil
}

// OnX509ContextUpdate implements [workloadapi.X509ContextWatcher].
func (s *service) OnX509ContextUpdate(c *workloadapi.X509Context) {
	e := event{Kind: "update", At: time.Now()}
	for _, svid := range c.SVIDs {
		e.IDs = append(e.IDs, svid.ID.String())
	}
	for _, certificate := range c.DefaultSVID().Certificates {
		e.Chain = append(e.Chain, certificate.Raw...)
	}
	s.tell(e)
}

// OnX509ContextWatchError implements [workloadapi.X509ContextWatcher].
func (s *service) OnX509ContextWatchError(err error) {
	s.tell(event{Kind: "error", Code: status.Code(err).String(), Error: err.Error()})
}

// check looks, a hundred times a second, whether a peer would accept what the
// source holds.
func (s *service) check() {
	for now := range time.Tick(10 * time.Millisecond) {
		if err := s.holds(now); err != nil {
			s.tell(event{Kind: "invalid", Error: err.Error()})
			return
		}
		s.valid.Add(1)
	}
}

func (s *service) holds(now time.Time) error {
	svid, err := s.source.GetX509SVID()
	if err != nil {
		return err
	}
	_, err = handshake.Verify(svid.Certificates, s.source, now)
	return err
}

// serve accepts in each manner until the process ends.
func (s *service) serve() error {
	svid, err := s.source.GetX509SVID()
	if err != nil {
		return err
	}
	addresses, err := listen(context.Background(), s.source)
	s.tell(event{Kind: "serving", Target: target{Peer: svid.ID.String(), Addresses: addresses}})
	return err
}

// accept takes one connection and sends back the first bytes that it is sent.
func (s *service) accept(ctx context.Context, c command) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.Close()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	s.tell(event{Kind: "listening", Address: l.Addr().String()})
	raw, err := l.Accept()
	if err != nil {
		return err
	}
	defer raw.Close()
	conn, err := handshake.Accept(ctx, raw, s.config(c), func(id spiffeid.ID) error {
		if id.String() != c.Peer {
			return fmt.Errorf("it is not %q", c.Peer)
		}
		return nil
	})
	return s.conclude(conn, err, func() error {
		_, err := io.CopyN(conn, conn, int64(len(greeting)))
		return err
	})
}

// greeting is what the caller sends and wants back.
const greeting = "good morrow"

func (s *service) initiate(ctx context.Context, c command) error {
	raw, err := new(net.Dialer).DialContext(ctx, "tcp", c.Address)
	if err != nil {
		return err
	}
	defer raw.Close()
	peer, err := spiffeid.FromString(c.Peer)
	if err != nil {
		return err
	}
	conn, err := handshake.Initiate(ctx, raw, s.config(c), peer)
	return s.conclude(conn, err, func() error { return greet(conn) })
}

func (s *service) config(c command) *handshake.Config {
	return &handshake.Config{Order: c.Order, SVID: s.source, Bundles: s.source}
}

// conclude moves data over a connection that was made, and tells the outcome.
func (s *service) conclude(conn *handshake.Conn, err error, talk func() error) error {
	e := event{Kind: "handshake"}
	if err == nil {
		e.Peer = conn.PeerID().String()
		err = talk()
	}
	if err != nil {
		e.Error = err.Error()
	}
	s.tell(e)
	return nil
}

// workload is the test's side of a workload's process.
type workload struct {
	*process

	commands *json.Encoder
}

// startWorkload starts a process that is in no pod yet.
func startWorkload(t *testing.T) *workload {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), workloadVariable+"=1")
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	return &workload{process: start(t, cmd, stdout), commands: json.NewEncoder(stdin)}
}

// enter puts the process into a container of the pod.
func (w *workload) enter(t *testing.T, root cgroup, pod *corev1.Pod) *workload {
	t.Helper()
	container := filepath.Join(string(root), "kubepods", "besteffort", "pod"+string(pod.UID), containerID)
	if err := os.MkdirAll(container, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(container, "cgroup.procs"), fmt.Append(nil, w.cmd.Process.Pid), 0o644); err != nil {
		t.Fatal(err)
	}
	return w
}

const containerID = "5e0c1f3a9b7d24685e0c1f3a9b7d24685e0c1f3a9b7d24685e0c1f3a9b7d2468"

// watch makes the workload a client of the node's agent.
func (w *workload) watch(t *testing.T, n *node) *workload {
	t.Helper()
	w.tell(t, command{Do: "watch", Socket: n.socket})
	return w
}

func (w *workload) tell(t *testing.T, c command) {
	t.Helper()
	if err := w.commands.Encode(c); err != nil {
		t.Fatalf("tell a workload to %s: %v", c.Do, err)
	}
}

// next returns the next event of a kind.
func (w *workload) next(t *testing.T, kind string) event {
	t.Helper()
	return await(t, w.process, kind, func(e event) bool { return e.Kind == kind })
}

// svid returns the leaf of the SVID in the next update. It has to be the only
// one, of the identity, and good by the trust bundle.
func (w *workload) svid(t *testing.T, p *plane, id string) *x509.Certificate {
	t.Helper()
	return leaf(t, p, w.next(t, "update"), id)
}

// rotated returns the leaf of the next SVID that is another than before.
func (w *workload) rotated(t *testing.T, p *plane, id string, before *x509.Certificate) *x509.Certificate {
	t.Helper()
	for {
		next := w.svid(t, p, id)
		if next.SerialNumber.Cmp(before.SerialNumber) == 0 {
			continue
		}
		if next.NotAfter.Before(before.NotAfter) || bytes.Equal(next.RawSubjectPublicKeyInfo, before.RawSubjectPublicKeyInfo) {
			t.Fatalf("the SVID after that of %s until %s is until %s, want it no earlier and with another key",
				id, before.NotAfter, next.NotAfter)
		}
		return next
	}
}

func leaf(t *testing.T, p *plane, update event, id string) *x509.Certificate {
	t.Helper()
	if !slices.Equal(update.IDs, []string{id}) {
		t.Fatalf("a workload has SVIDs of %q, want one, of %q", update.IDs, id)
	}
	chain, err := x509.ParseCertificates(update.Chain)
	if err != nil {
		t.Fatal(err)
	}
	// The test may look later than it came.
	peer, err := handshake.Verify(chain, p.trusted(t), update.At)
	if err != nil || peer.ID.String() != id {
		t.Fatalf("the SVID of %q verifies as %q, %v", id, peer.ID, err)
	}
	return chain[0]
}

// checkValid fails the test if the workload ever held an SVID that a peer would
// have refused, or has not looked.
func (w *workload) checkValid(t *testing.T) {
	t.Helper()
	w.tell(t, command{Do: "count"})
	if w.next(t, "count").Count == 0 {
		t.Error("a workload has never looked at its SVID")
	}
	for _, e := range written(w.process, func(e event) bool { return e.Kind == "invalid" }) {
		t.Errorf("a workload held an SVID of no use: %s", e.Error)
	}
}

// shake lets two workloads shake hands, and demands that both do.
func shake(t *testing.T, order handshake.Order, caller, callee *workload, callerID, calleeID string) {
	t.Helper()
	callee.tell(t, command{Do: "accept", Order: order, Peer: callerID})
	caller.tell(t, command{Do: "initiate", Order: order, Peer: calleeID, Address: callee.next(t, "listening").Address})
	if got := caller.next(t, "handshake"); got.Error != "" || got.Peer != calleeID {
		t.Errorf("%s, at the caller: peer %q, error %q, want %q", order, got.Peer, got.Error, calleeID)
	}
	if got := callee.next(t, "handshake"); got.Error != "" || got.Peer != callerID {
		t.Errorf("%s, at the callee: peer %q, error %q, want %q", order, got.Peer, got.Error, callerID)
	}
}

// cgroup is a folder of a cgroup hierarchy, with room for a node's pods.
type cgroup string

// newCgroup makes a cgroup that is removed when all workloads started after it
// have ended. It takes the first hierarchy of any kind that can be written to.
func newCgroup(t *testing.T) cgroup {
	t.Helper()
	var failed []error
	for _, mount := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/pids", "/sys/fs/cgroup/systemd"} {
		// Both kinds have this file in each of their folders, and nothing else has.
		if _, err := os.Stat(filepath.Join(mount, "cgroup.procs")); err != nil {
			continue
		}
		root := filepath.Join(mount, "troth-e2e-"+uuid.NewString())
		if err := os.Mkdir(root, 0o755); err != nil {
			failed = append(failed, err)
			continue
		}
		t.Cleanup(func() { removeCgroup(t, root) })
		return cgroup(root)
	}
	t.Fatalf("no cgroup hierarchy can be written to: this test needs root, and /sys/fs/cgroup mounted read-write; tried: %v", failed)
	return ""
}

// removeCgroup removes a cgroup and those below it. Their files go with them.
func removeCgroup(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Error(err)
	}
	for _, entry := range entries {
		if entry.IsDir() {
			removeCgroup(t, filepath.Join(dir, entry.Name()))
		}
	}
	if err := os.Remove(dir); err != nil {
		t.Error(err)
	}
}
