package pods_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"troth.dev/troth/agent/capture"
	"troth.dev/troth/agent/cni"
	"troth.dev/troth/agent/pods"
)

var _ cni.Handler = (*pods.Pods)(nil)

func reason(err error) string {
	if e, ok := errors.AsType[*cni.Error](err); ok {
		return e.Reason
	}
	return fmt.Sprint(err)
}

func TestAddAndDelete(t *testing.T) {
	n := newNode(t, nil)
	s := newSandbox(t, uuid.NewString())
	n.say(s.UID, true)

	// A runtime deletes what it is not sure of, more than once.
	for range 2 {
		if err := n.remove(s); err != nil {
			t.Errorf("Delete(not added) = %v", err)
		}
	}
	if err := n.add(s); err != nil {
		t.Fatalf("Add() = %v", err)
	}
	if answer, err := s.dial(5 * time.Second); err != nil || answer != s.UID {
		t.Errorf("a connection out of the pod was answered %q, %v, want by the agent, at once after Add", answer, err)
	}
	if got := n.recorded(); !slices.Equal(got, []string{s.UID}) {
		t.Errorf("records of %v, want of %s", got, s.UID)
	}
	if n.Captured() != 1 || len(n.Uncaptured()) != 0 {
		t.Errorf("%d captured, %v not, want 1 and none", n.Captured(), n.Uncaptured())
	}
	if err := n.add(s); err != nil {
		t.Errorf("Add(again) = %v", err)
	}
	if err := n.Check(t.Context(), s.Pod, s.ns); err != nil {
		t.Errorf("Check() = %v", err)
	}
	for range 2 {
		if err := n.remove(s); err != nil {
			t.Errorf("Delete() = %v", err)
		}
		if n.Captured() != 0 || len(n.recorded()) != 0 || n.serving.Load() != 0 {
			t.Errorf("after Delete %d are captured, %v recorded, %d served", n.Captured(), n.recorded(), n.serving.Load())
		}
	}
	// Whatever still runs in it gets out no more.
	if _, err := s.dial(200 * time.Millisecond); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a connection out of a deleted pod: %v, want %v", err, unix.ECONNREFUSED)
	}
}

func TestWhoIsNotCaptured(t *testing.T) {
	n := newNode(t, nil)
	unwanted, static := newSandbox(t, uuid.NewString()), newSandbox(t, strings.Repeat("0a", 16))
	n.say(unwanted.UID, false)
	for _, s := range []*sandbox{unwanted, static} {
		if err := n.add(s); err != nil {
			t.Errorf("Add(%s) = %v", s.UID, err)
		}
		if s.isCaptured() {
			t.Errorf("pod %s is captured", s.UID)
		}
		if err := n.Check(t.Context(), s.Pod, s.ns); err != nil {
			t.Errorf("Check(%s) = %v", s.UID, err)
		}
	}
	if n.Captured() != 0 || len(n.Uncaptured()) != 0 || len(n.recorded()) != 0 {
		t.Errorf("%d captured, %v not, %v recorded, want nothing of all", n.Captured(), n.Uncaptured(), n.recorded())
	}

	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	if err := n.Add(t.Context(), unwanted.Pod, own); reason(err) != cni.ReasonNamespace {
		t.Errorf("Add(the node's own network) = %v, want %s", err, cni.ReasonNamespace)
	}
}

func TestNotKnownYet(t *testing.T) {
	n := newNode(t, nil)
	s := newSandbox(t, uuid.NewString())
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := n.Add(ctx, s.Pod, s.ns); reason(err) != pods.ReasonUnknown {
		t.Errorf("Add() = %v, want %s", err, pods.ReasonUnknown)
	}
	if s.isCaptured() || n.Captured() != 0 {
		t.Error("a pod that nobody knows is captured")
	}
	waiting := make(chan error)
	go func() { waiting <- n.add(s) }()
	n.say(s.UID, true)
	if err := <-waiting; err != nil {
		t.Errorf("Add(known meanwhile) = %v", err)
	}
	if !s.isCaptured() {
		t.Error("it is not captured")
	}
}

func TestTheControlPlaneChangesItsMind(t *testing.T) {
	n := newNode(t, nil)
	s := newSandbox(t, uuid.NewString())
	n.say(s.UID, true)
	if err := n.add(s); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		n.say(s.UID, false)
		eventually(t, "the pod is released", func() bool { return n.Captured() == 0 && len(n.recorded()) == 0 })
		if _, err := s.dial(100 * time.Millisecond); !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINPROGRESS) {
			t.Errorf("a connection out of a released pod: %v, want it to go out, where nobody is", err)
		}
		n.say(s.UID, true)
		eventually(t, "the pod is captured again", s.isCaptured)
	}
}

func TestWhatFailsIsTriedAgain(t *testing.T) {
	n := newNode(t, nil)
	s := newSandbox(t, uuid.NewString())
	n.say(s.UID, true)
	// The pod has the agent's port.
	var taken int
	err := s.inside(func() (err error) {
		if taken, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if err := unix.Bind(taken, &unix.SockaddrInet4{Port: capture.OutboundPort}); err != nil {
			return err
		}
		return unix.Listen(taken, 1)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := n.add(s); reason(err) != pods.ReasonFailed {
		t.Errorf("Add() = %v, want %s", err, pods.ReasonFailed)
	}
	if got := n.Uncaptured(); !slices.Equal(got, []string{s.UID}) || n.Captured() != 0 {
		t.Errorf("Uncaptured() = %v, Captured() = %d, want %s and 0", got, n.Captured(), s.UID)
	}
	if err := n.Check(t.Context(), s.Pod, s.ns); reason(err) != pods.ReasonNotCaptured {
		t.Errorf("Check() = %v, want %s", err, pods.ReasonNotCaptured)
	}
	unix.Close(taken)
	eventually(t, "the pod is captured", func() bool { return s.isCaptured() && n.Captured() == 1 && len(n.Uncaptured()) == 0 })
}

func TestWhatBreaksIsMended(t *testing.T) {
	// The control plane is away all the while.
	silent := make(chan struct{})
	n := newNode(t, func(c *pods.Config) {
		wanted := c.Wanted
		c.Wanted = func(ctx context.Context, uid string) (bool, string, error) {
			select {
			case <-silent:
				<-ctx.Done()
				return false, "", ctx.Err()
			default:
				return wanted(ctx, uid)
			}
		}
	})
	s := newSandbox(t, uuid.NewString())
	n.say(s.UID, true)
	if err := n.add(s); err != nil {
		t.Fatal(err)
	}
	close(silent)
	for range 2 {
		if err := s.inside(exec.Command("nft", "flush", "ruleset").Run); err != nil {
			t.Fatalf("nft flush ruleset: %v", err)
		}
		eventually(t, "the rules stand again", s.isCaptured)
	}
}

func TestManyAtOnce(t *testing.T) {
	n := newNode(t, nil)
	s := newSandbox(t, uuid.NewString())
	n.say(s.UID, true)
	var adding sync.WaitGroup
	for range 8 {
		adding.Go(func() {
			if err := n.add(s); err != nil {
				t.Errorf("Add() = %v", err)
			}
		})
	}
	adding.Wait()
	if !s.isCaptured() || n.Captured() != 1 || n.serving.Load() != 1 {
		t.Errorf("captured %v, %d captured, %d served, want once", s.isCaptured(), n.Captured(), n.serving.Load())
	}
	// And with the end of it, in any order. What matters is that it ends, and that
	// nothing is left when the last word was Delete.
	for range 8 {
		adding.Go(func() { n.add(s) })
		adding.Go(func() { n.remove(s) })
	}
	adding.Wait()
	if err := n.remove(s); err != nil {
		t.Errorf("Delete() = %v", err)
	}
	if n.Captured() != 0 || len(n.recorded()) != 0 || n.serving.Load() != 0 {
		t.Errorf("after Delete %d are captured, %v recorded, %d served", n.Captured(), n.recorded(), n.serving.Load())
	}
}

func TestANewSandbox(t *testing.T) {
	n := newNode(t, nil)
	uid := uuid.NewString()
	first, second := newSandbox(t, uid), newSandbox(t, uid)
	n.say(uid, true)
	firstOther := *first // of which nobody hears again
	firstOther.Interface = "net7"
	for _, s := range []*sandbox{first, &firstOther} {
		if err := n.add(s); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.add(second); err != nil {
		t.Fatal(err)
	}
	if first.isCaptured() || !second.isCaptured() || n.Captured() != 1 {
		t.Errorf("captured: %v and %v, %d in all, want the second", first.isCaptured(), second.isCaptured(), n.Captured())
	}
	if err := n.remove(first); err != nil {
		t.Error(err)
	}
	if !second.isCaptured() {
		t.Error("the end of the old sandbox ended the capture of the new")
	}
	// Another interface of the same sandbox is the same network.
	other := *second
	other.Interface = "net1"
	if err := n.add(&other); err != nil {
		t.Error(err)
	}
	if err := n.remove(&other); err != nil {
		t.Error(err)
	}
	if !second.isCaptured() {
		t.Error("the end of one interface ended the capture of the other")
	}
	second.UID, second.Name = "", "" // a runtime may have forgotten
	if err := n.remove(second); err != nil {
		t.Error(err)
	}
	if n.Captured() != 0 {
		t.Error("the last interface is gone, and the pod is captured")
	}
}

func TestRestart(t *testing.T) {
	for _, kept := range []bool{false, true} {
		t.Run(fmt.Sprintf("keeper=%v", kept), func(t *testing.T) {
			n := newNode(t, func(c *pods.Config) {
				if kept {
					c.Keeper = keeper(t)
				}
			})
			uid, goneUID := uuid.NewString(), uuid.NewString()
			s, gone := newSandbox(t, uid), newSandbox(t, goneUID)
			for _, s := range []*sandbox{s, gone} {
				n.say(s.UID, true)
				if err := n.add(s); err != nil {
					t.Fatal(err)
				}
			}
			n.stop()
			// Meanwhile one pod ends, and another calls.
			gone.remove()
			gone.ns.Close()
			answered := make(chan string, 1)
			if kept {
				go func() {
					answer, err := s.dial(10 * time.Second)
					answered <- fmt.Sprint(answer, err)
				}()
			} else if _, err := s.dial(time.Second); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("a connection while the agent is away: %v, want %v", err, unix.ECONNREFUSED)
			}
			// And the control plane has nothing to say yet.
			n.said.Set(nil)
			if err := os.WriteFile(filepath.Join(n.config.Records, ".new-1"), []byte("{"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(n.config.Records, "b"), []byte("{"), 0o600); err != nil {
				t.Fatal(err)
			}
			n.start()
			eventually(t, "the pod is captured again", func() bool { return n.Captured() == 1 })
			if kept {
				if got, want := <-answered, fmt.Sprint(uid, error(nil)); got != want {
					t.Errorf("a connection that waited was answered %q, want %q", got, want)
				}
			}
			if !s.isCaptured() {
				t.Error("the pod of before is not captured")
			}
			if got := n.recorded(); !slices.Equal(got, []string{uid}) {
				t.Errorf("records of %v, want of %s alone", got, uid)
			}
			if kept {
				files, err := n.config.Keeper.Take()
				if err != nil {
					t.Fatal(err)
				}
				for key, files := range files {
					if key != uid {
						t.Errorf("the keeper has pod %s, which is gone", key)
					}
					for _, f := range files {
						f.Close()
					}
				}
			}
			n.say(uid, false)
			eventually(t, "the pod is released", func() bool { return n.Captured() == 0 })
		})
	}
}

// TestKilled kills an agent that serves a pod. Its rules stand, and the next one goes on.
func TestKilled(t *testing.T) {
	for _, kept := range []bool{false, true} {
		t.Run(fmt.Sprintf("keeper=%v", kept), func(t *testing.T) {
			s := newSandbox(t, uuid.NewString())
			records := filepath.Join(t.TempDir(), "pods")
			path := ""
			var k *capture.Keeper
			if kept {
				k = keeper(t)
				path = k.Path
			}
			self, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			agent := exec.Command(self, records, path, s.Netns, s.UID, s.Sandbox)
			agent.Env = append(os.Environ(), "PODS_TEST_HELPER=agent")
			agent.Stderr = os.Stderr
			stdout, err := agent.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := agent.Start(); err != nil {
				t.Fatal(err)
			}
			line, err := bufio.NewReader(stdout).ReadString('\n')
			if err == nil && !s.isCaptured() {
				err = errors.New("the pod is not captured")
			}
			agent.Process.Kill()
			agent.Wait()
			if err != nil {
				t.Fatalf("the agent said %q: %v", line, err)
			}
			if answer, err := s.dial(100 * time.Millisecond); err == nil {
				t.Errorf("with the agent dead somebody answers %q", answer)
			}
			n := newNode(t, func(c *pods.Config) { c.Records, c.Keeper = records, k })
			eventually(t, "the pod is captured again", s.isCaptured)
			if err := n.remove(s); err != nil {
				t.Errorf("Delete() = %v", err)
			}
		})
	}
}

// TestRelease takes Troth off a node on which an agent has run, with one pod that goes
// on and one that has ended meanwhile.
func TestRelease(t *testing.T) {
	n := newNode(t, nil)
	s, gone := newSandbox(t, uuid.NewString()), newSandbox(t, uuid.NewString())
	for _, s := range []*sandbox{s, gone} {
		n.say(s.UID, true)
		if err := n.add(s); err != nil {
			t.Fatal(err)
		}
	}
	n.stop()
	gone.remove()
	gone.ns.Close()
	if _, err := s.dial(time.Second); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a connection while the agent is away: %v, want %v", err, unix.ECONNREFUSED)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	// The second time there is nothing to be done.
	for range 2 {
		if err := pods.Release(ctx, n.config); err != nil {
			t.Fatalf("Release() = %v", err)
		}
	}
	if _, err := s.dial(100 * time.Millisecond); errors.Is(err, unix.ECONNREFUSED) {
		t.Error("the pod's connections are refused still")
	}
	if rules, err := exec.Command("nsenter", "--net="+s.Netns, "nft", "list", "ruleset").CombinedOutput(); err != nil || len(rules) > 0 {
		t.Errorf("rules of the pod: %s, %v; want none", rules, err)
	}
	if got := n.recorded(); len(got) > 0 {
		t.Errorf("records of %v, want none", got)
	}
}

func TestFoundByItsProcesses(t *testing.T) {
	n := newNode(t, nil)
	s := newSandbox(t, uuid.NewString())
	host := uuid.NewString()
	n.say(s.UID, true)
	n.say(host, true)
	process(t, "wait", host, nil)
	stop := s.process("wait")
	eventually(t, "the pod is found and captured", func() bool { return n.Captured() == 1 && s.isCaptured() })
	// A process with a network of its own does not take the pod's place.
	stopOther := s.process("unshare")
	n.stop()
	if err := os.Remove(filepath.Join(n.config.Records, s.UID)); err != nil {
		t.Fatal(err)
	}
	n.start()
	eventually(t, "the pod is found again", func() bool { return n.Captured() == 1 && s.isCaptured() })
	if got := n.recorded(); !slices.Equal(got, []string{s.UID}) {
		t.Errorf("records of %v: the pod with the node's network, %s, is captured", got, host)
	}
	// Nobody is told when it ends; its last process says so.
	s.remove()
	stopOther()
	stop()
	eventually(t, "the pod is gone", func() bool { return n.Captured() == 0 && len(n.recorded()) == 0 })
}

// A network in which there is anybody but one pod is the node's, for all that is known.
func TestNetworkThatIsNotThePodsAlone(t *testing.T) {
	n := newNode(t, nil)
	mixed, fence := newSandbox(t, uuid.NewString()), newSandbox(t, uuid.NewString())
	n.say(mixed.UID, true)
	n.say(fence.UID, true)
	stopOther := process(t, "wait", "", mixed) // in no pod
	stop := mixed.process("wait")
	defer stop()
	defer fence.process("wait")() // seen by the same search, or a later one
	eventually(t, "the other pod is captured", fence.isCaptured)
	if mixed.isCaptured() {
		t.Error("a network that is not one pod's alone is captured")
	}
	stopOther()
	eventually(t, "it is captured once it is the pod's alone", mixed.isCaptured)
}

func TestCollect(t *testing.T) {
	n := newNode(t, func(c *pods.Config) { c.Interval = time.Hour })
	var all []*sandbox
	for range 3 {
		s := newSandbox(t, uuid.NewString())
		n.say(s.UID, true)
		if err := n.add(s); err != nil {
			t.Fatal(err)
		}
		all = append(all, s)
	}
	all[0].remove()
	// all[1] is not in the list either, but there: of another network of the runtime.
	if err := n.Collect(t.Context(), []cni.Attachment{{Sandbox: all[2].Sandbox, Interface: "eth0"}}); err != nil {
		t.Errorf("Collect() = %v", err)
	}
	if n.Captured() != 2 || !all[1].isCaptured() || !all[2].isCaptured() || slices.Contains(n.recorded(), all[0].UID) {
		t.Errorf("%d captured, records of %v, want all but %s", n.Captured(), n.recorded(), all[0].UID)
	}
}

func TestStarting(t *testing.T) {
	p, err := pods.New(pods.Config{
		Records: t.TempDir() + "/pods", Log: slog.New(slog.DiscardHandler),
		Wanted: func(context.Context, string) (bool, string, error) { return true, "", nil },
		Serve:  func(context.Context, string, *capture.Network) error { return io.EOF },
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Status(t.Context()); reason(err) != pods.ReasonStarting {
		t.Errorf("Status() = %v, want %s", err, pods.ReasonStarting)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s := newSandbox(t, uuid.NewString())
	if err := p.Add(ctx, s.Pod, s.ns); reason(err) != pods.ReasonStarting {
		t.Errorf("Add() = %v, want %s", err, pods.ReasonStarting)
	}
	n := newNode(t, nil)
	eventually(t, "the agent has started", func() bool { return n.Status(t.Context()) == nil })
	n.stop()
	if err := n.add(s); reason(err) != cni.ReasonEnding {
		t.Errorf("Add(after the end) = %v, want %s", err, cni.ReasonEnding)
	}
}

func TestNewRefuses(t *testing.T) {
	good := pods.Config{
		Records: t.TempDir() + "/pods", Log: slog.New(slog.DiscardHandler),
		Wanted: func(context.Context, string) (bool, string, error) { return true, "", nil },
		Serve:  func(context.Context, string, *capture.Network) error { return io.EOF },
	}
	open := t.TempDir()
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*pods.Config){
		"no records":              func(c *pods.Config) { c.Records = "" },
		"no log":                  func(c *pods.Config) { c.Log = nil },
		"nobody to ask":           func(c *pods.Config) { c.Wanted = nil },
		"nobody to serve":         func(c *pods.Config) { c.Serve = nil },
		"an interval before zero": func(c *pods.Config) { c.Interval = -1 },
		"records of everybody":    func(c *pods.Config) { c.Records = open },
	} {
		c := good
		change(&c)
		if _, err := pods.New(c); err == nil {
			t.Errorf("New(%s) is taken", name)
		}
	}
	if _, err := pods.New(good); err != nil {
		t.Errorf("New() = %v", err)
	}
}

func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"pod":{"uid":"a","netns":"/run/netns/x"},"id":{"device":4,"inode":5}}`))
	f.Fuzz(func(t *testing.T, content []byte) {
		if uid, err := pods.ParseRecord(content); err == nil && uid == "" {
			t.Errorf("record %q is of no pod", content)
		}
	})
}
