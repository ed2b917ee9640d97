package fleet_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/ca"
	"troth.dev/troth/fleet"
	"troth.dev/troth/identity"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/storage"
)

var (
	trustDomain = spiffeid.RequireTrustDomainFromString("example.org")
	account     = identity.ServiceAccount{Namespace: "troth-system", Name: "troth-agent"}
)

const life = time.Hour

// cluster is the pods that there are. The real ones are package kube's: its tests,
// and the server's on a real API server, have what is said here of pods.
type cluster struct {
	mu       sync.Mutex
	agents   map[string]identity.Pod // by UID
	occupied map[string]bool
	synced   chan struct{}
}

func (c *cluster) Of(_ identity.ServiceAccount, yield func(identity.Pod)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range c.agents {
		yield(p)
	}
}

func (c *cluster) Occupied(node string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.occupied[node]
}

func (c *cluster) Synced() <-chan struct{} { return c.synced }

func (c *cluster) add(n int, uid string) identity.Agent {
	c.mu.Lock()
	defer c.mu.Unlock()
	node := identity.Node{Name: fmt.Sprintf("node-%d", n), UID: fmt.Sprintf("node-uid-%d", n)}
	c.agents[uid] = identity.Pod{
		PodReference: identity.PodReference{Namespace: account.Namespace, Name: "agent-" + uid, UID: uid}, Node: node,
	}
	c.occupied[node.Name] = true
	return identity.Agent{Node: node, PodName: "agent-" + uid, PodUID: uid}
}

func (c *cluster) remove(uid string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.agents, uid)
}

func (c *cluster) empty(node string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.occupied, node)
}

// world is a trust domain, its agents' pods, and a store.
type world struct {
	t      *testing.T
	pods   *cluster
	issuer *ca.Issuer
	store  storage.FleetStore
	stop   context.CancelFunc
	ctx    context.Context
	done   sync.WaitGroup
}

func newWorld(t *testing.T) *world {
	keys, err := ca.NewSealedKeys(bytes.Repeat([]byte{7}, ca.KeySize))
	if err != nil {
		t.Fatal(err)
	}
	memory := storage.NewMemory()
	issuer, err := ca.Open(t.Context(), ca.Config{
		TrustDomain: trustDomain, Keys: keys, Authorities: memory, Ledger: memory, Audit: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{
		t: t, issuer: issuer, store: memory,
		pods: &cluster{agents: make(map[string]identity.Pod), occupied: make(map[string]bool), synced: make(chan struct{})},
	}
	close(w.pods.synced)
	w.ctx, w.stop = context.WithCancel(t.Context())
	t.Cleanup(w.end)
	return w
}

// end stops all that runs.
func (w *world) end() {
	w.stop()
	w.done.Wait()
}

// replica runs a fleet until the test, or stop, ends it.
func (w *world) replica(name string) (f *fleet.Fleet, stop func()) {
	w.t.Helper()
	f, err := fleet.New(fleet.Config{
		Agents: account, Pods: w.pods, Authorities: w.issuer.Authorities(), Store: w.store, Replica: name,
		SVIDLife: life, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(w.ctx)
	ended := make(chan struct{})
	w.done.Go(func() {
		defer close(ended)
		if err := f.Run(ctx); err != nil {
			w.t.Errorf("Run() = %v", err)
		}
	})
	return f, func() { cancel(); <-ended }
}

// prepare makes the trust domain's next authority, and returns what an agent
// reports that has proved it.
func (w *world) prepare() (proof fleet.Report) {
	w.t.Helper()
	a, err := w.issuer.Prepare(w.t.Context(), ca.Order{Actor: "test"})
	if err != nil {
		w.t.Fatal(err)
	}
	revision := a.Changed.Revision
	return fleet.Report{Received: revision, Applied: revision, Proved: revision, ProvedAuthority: a.ID, RunningFor: 2 * life}
}

// wants compares what is known, once the fleet has had the time to work it out.
func (w *world) wants(f *fleet.Fleet, want string) {
	w.t.Helper()
	time.Sleep(3 * time.Second) // in the bubble
	synctest.Wait()
	p, _ := f.Propagation().Load()
	got := fmt.Sprintf("%d expected, %d received, %d applied, %d proved, %d reporting", p.Expected, p.Received, p.Applied, p.Proved, p.Reporting)
	for _, each := range p.Waiting {
		got += fmt.Sprintf("; %s %s", each.Node, each.Lacks)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		w.t.Errorf("what is known (-want +got):\n%s", diff)
	}
}

// One agent of two, and what it has reported: the counts, and what is said of it.
func TestLevels(t *testing.T) {
	const one = "2 expected, "
	tests := []struct {
		name   string
		report func(proof fleet.Report) fleet.Report
		want   string
	}{
		{"proved", func(r fleet.Report) fleet.Report { return r }, "2 received, 2 applied, 2 proved, 2 reporting"},
		{"an older bundle", func(r fleet.Report) fleet.Report {
			r.Received, r.Applied = r.Received-1, r.Applied-1
			r.Proved, r.ProvedAuthority = 0, ""
			return r
		}, "1 received, 1 applied, 1 proved, 2 reporting; node-1 at revision 1"},
		{"no bundle", func(fleet.Report) fleet.Report { return fleet.Report{RunningFor: 2 * life} },
			"1 received, 1 applied, 1 proved, 2 reporting; node-1 without a bundle"},
		{"received only", func(r fleet.Report) fleet.Report {
			r.Applied--
			return r
		}, "2 received, 1 applied, 1 proved, 2 reporting; node-1 not applied"},
		{"applied only", func(r fleet.Report) fleet.Report {
			r.Proved, r.ProvedAuthority = 0, ""
			return r
		}, "2 received, 2 applied, 1 proved, 2 reporting; node-1 not proved"},
		{"proved by an older bundle", func(r fleet.Report) fleet.Report {
			r.Proved--
			return r
		}, "2 received, 2 applied, 1 proved, 2 reporting; node-1 not proved"},
		{"proved of an authority that there is not", func(r fleet.Report) fleet.Report {
			r.ProvedAuthority = strings.Repeat("0", 40)
			return r
		}, "2 received, 2 applied, 1 proved, 2 reporting; node-1 not proved"},
		{"refused", func(r fleet.Report) fleet.Report {
			r.Failure = fleet.TrustedRefused
			return r
		}, "2 received, 2 applied, 1 proved, 2 reporting; node-1 refuses the prepared authority"},
		{"accepted whom nobody trusts", func(r fleet.Report) fleet.Report {
			r.Failure = fleet.UntrustedAccepted
			return r
		}, "2 received, 2 applied, 1 proved, 2 reporting; node-1 trusts what nobody does"},
		{"a failure of a kind that is not known", func(r fleet.Report) fleet.Report {
			r.Failure = 77
			return r
		}, "2 received, 2 applied, 1 proved, 2 reporting; node-1 refuses the prepared authority"},
		{"just started", func(r fleet.Report) fleet.Report {
			r.RunningFor = 30 * time.Second
			return r
		}, "2 received, 1 applied, 1 proved, 1 reporting; node-1 just started"},
		{"younger than an SVID", func(r fleet.Report) fleet.Report {
			r.RunningFor = life - time.Second
			return r
		}, "2 received, 2 applied, 2 proved, 1 reporting"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.end()
				sound, other := w.pods.add(0, "a"), w.pods.add(1, "b")
				f, _ := w.replica("r")
				proof := w.prepare()
				defer f.Connected(sound)()
				defer f.Connected(other)()
				f.Heard(sound, proof)
				f.Heard(other, test.report(proof))
				w.wants(f, one+test.want)
			})
		})
	}
}

// An agent is expected because its pod is there, whoever has heard of it.
func TestExpected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		f, _ := w.replica("r")
		proof := w.prepare()
		w.wants(f, "0 expected, 0 received, 0 applied, 0 proved, 0 reporting")

		a := w.pods.add(0, "a")
		w.wants(f, "1 expected, 0 received, 0 applied, 0 proved, 0 reporting; node-0 offline")
		disconnect := f.Connected(a)
		f.Heard(a, proof)
		w.wants(f, "1 expected, 1 received, 1 applied, 1 proved, 1 reporting")

		// What it proved holds while it is away: those on its node have it.
		disconnect()
		disconnect() // counts once
		w.wants(f, "1 expected, 1 received, 1 applied, 1 proved, 1 reporting")

		// Its pod goes, and what it gave to its node's workloads lives on there.
		w.pods.remove("a")
		w.wants(f, "1 expected, 1 received, 1 applied, 1 proved, 1 reporting")
		if _, err := w.issuer.Abort(t.Context(), proof.ProvedAuthority, ca.Order{Actor: "test"}); err != nil {
			t.Fatal(err)
		}
		w.prepare()
		w.wants(f, "1 expected, 0 received, 0 applied, 0 proved, 1 reporting; node-0 offline")

		// Another pod takes its place: now that one is asked, and has said nothing.
		w.pods.add(0, "b")
		w.wants(f, "1 expected, 0 received, 0 applied, 0 proved, 0 reporting; node-0 offline")
		w.pods.remove("b")
		w.wants(f, "0 expected, 0 received, 0 applied, 0 proved, 0 reporting")
	})
}

// A node whose agent is gone is waited for until the last SVID has ended, or
// nobody is there any more.
func TestNodeWithoutAgent(t *testing.T) {
	for _, test := range []struct {
		name string
		ends func(w *world)
	}{
		{"nobody is there", func(w *world) { w.pods.empty("node-0") }},
		{"the last SVID has ended", func(*world) { time.Sleep(life + 3*time.Minute) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.end()
				f, _ := w.replica("r")
				a := w.pods.add(0, "a")
				f.Heard(a, fleet.Report{Received: 1, Applied: 1, RunningFor: 2 * life})
				w.prepare()
				w.pods.remove("a")
				time.Sleep(30 * time.Minute)
				w.wants(f, "1 expected, 0 received, 0 applied, 0 proved, 1 reporting; node-0 offline")
				test.ends(w)
				w.wants(f, "0 expected, 0 received, 0 applied, 0 proved, 0 reporting")
			})
		})
	}
}

// A proof counts as soon as the workloads have had the time to come back, and not
// if the agent was gone by then.
func TestJustStarted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		f, _ := w.replica("r")
		steady, crashing := w.pods.add(0, "a"), w.pods.add(1, "b")
		proof := w.prepare()
		proof.RunningFor = time.Second
		defer f.Connected(steady)()
		disconnect := f.Connected(crashing)
		f.Heard(steady, proof)
		f.Heard(crashing, proof)
		w.wants(f, "2 expected, 2 received, 0 applied, 0 proved, 0 reporting; node-0 just started; node-1 just started")
		time.Sleep(20 * time.Second)
		disconnect()
		time.Sleep(20 * time.Second)
		w.wants(f, "2 expected, 2 received, 1 applied, 1 proved, 0 reporting; node-1 offline")
	})
}

// Who waits is named, the gravest first, and no more than there is room for.
func TestWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		f, _ := w.replica("r")
		proof := w.prepare()
		var disconnect []func()
		for n := range 40 {
			a := w.pods.add(n, fmt.Sprintf("uid-%02d", n))
			if n >= 35 {
				continue // never heard of
			}
			disconnect = append(disconnect, f.Connected(a))
			r := proof
			switch {
			case n == 7:
				r.Failure = fleet.UntrustedAccepted
			case n < 30:
				r.Received, r.Applied, r.Proved = 1, 1, 0
			}
			f.Heard(a, r)
		}
		time.Sleep(time.Second)
		disconnect[3]() // was behind, and is away
		time.Sleep(5 * time.Second)
		synctest.Wait()
		p, _ := f.Propagation().Load()
		if p.Expected != 40 || p.Proved != 5 || len(p.Waiting) != ca.MaxWaiting {
			t.Fatalf("%d of %d proved, %d named", p.Proved, p.Expected, len(p.Waiting))
		}
		var got []string
		for _, each := range p.Waiting[:7] {
			got = append(got, each.Node+" "+each.Lacks)
		}
		want := []string{"node-7 trusts what nobody does", "node-35 offline", "node-36 offline", "node-37 offline", "node-38 offline", "node-39 offline", "node-3 offline"}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("who waits (-want +got):\n%s", diff)
		}
		if !p.Waiting[6].Since.After(p.Waiting[1].Since) {
			t.Errorf("one that left later waits since %v, and one that was never here since %v", p.Waiting[6].Since, p.Waiting[1].Since)
		}
		for _, done := range disconnect {
			done()
		}
	})
}

// Uses are summed over agents, and those of authorities that are none do not count.
func TestUses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		f, _ := w.replica("r")
		set, _ := w.issuer.Authorities().Load()
		active := set.Authorities[0].ID
		a, b := w.pods.add(0, "a"), w.pods.add(1, "b")
		f.Heard(a, fleet.Report{Uses: map[string]ca.Use{active: {SVIDs: 3, Connections: 1}, "stranger": {SVIDs: 9}}, RunningFor: 2 * life})
		f.Heard(b, fleet.Report{Uses: map[string]ca.Use{active: {SVIDs: 4}}, RunningFor: 2 * life})
		time.Sleep(3 * time.Second)
		synctest.Wait()
		p, _ := f.Propagation().Load()
		if diff := cmp.Diff(map[string]ca.Use{active: {SVIDs: 7, Connections: 1}}, p.Uses); diff != "" {
			t.Errorf("uses (-want +got):\n%s", diff)
		}
	})
}

// What one replica heard, the other knows; an agent that moves is where it is; and
// what was heard outlives the replica that heard it.
func TestReplicas(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		first, stopFirst := w.replica("first")
		second, _ := w.replica("second")
		a, b := w.pods.add(0, "a"), w.pods.add(1, "b")
		proof := w.prepare()
		behind := fleet.Report{Received: 1, Applied: 1, RunningFor: 2 * life}

		leave := first.Connected(a)
		first.Heard(a, proof)
		defer second.Connected(b)()
		second.Heard(b, behind)
		const half = "2 expected, 1 received, 1 applied, 1 proved, 2 reporting; node-1 at revision 1"
		w.wants(first, half)
		w.wants(second, half)
		second.Heard(b, proof)
		const both = "2 expected, 2 received, 2 applied, 2 proved, 2 reporting"
		w.wants(second, both)
		w.wants(first, both)

		// The agent of node-0 starts anew, at the other replica, and knows nothing yet.
		leave()
		time.Sleep(time.Second)
		defer second.Connected(a)()
		second.Heard(a, fleet.Report{RunningFor: time.Second})
		const anew = "2 expected, 1 received, 1 applied, 1 proved, 1 reporting; node-0 without a bundle"
		w.wants(second, anew)
		w.wants(first, anew)

		second.Heard(a, proof)
		w.wants(first, both)
		stopFirst()
		w.wants(second, both)
		again, _ := w.replica("first")
		w.wants(again, both)
	})
}

// A replica of the same name takes up what was heard before it was restarted.
func TestRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		f, stop := w.replica("r")
		a := w.pods.add(0, "a")
		proof := w.prepare()
		f.Connected(a)
		f.Heard(a, proof)
		w.wants(f, "1 expected, 1 received, 1 applied, 1 proved, 1 reporting")
		stop()
		f, _ = w.replica("r")
		w.wants(f, "1 expected, 1 received, 1 applied, 1 proved, 1 reporting")
		// It never came back, and of another bundle nobody has heard.
		if _, err := w.issuer.Abort(t.Context(), proof.ProvedAuthority, ca.Order{Actor: "test"}); err != nil {
			t.Fatal(err)
		}
		w.prepare()
		w.wants(f, "1 expected, 0 received, 0 applied, 0 proved, 1 reporting; node-0 offline")
	})
}

// A replica that is gone is believed for as long as what its agents handed out may
// live, and is then swept from the store.
func TestReplicaIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		gone, stop := w.replica("gone")
		gone.Heard(w.pods.add(0, "a"), fleet.Report{Received: 1, Applied: 1, RunningFor: 2 * life})
		time.Sleep(5 * time.Second)
		stop()
		w.replica("here")
		time.Sleep(life)
		if got := replicas(t, w.store); len(got) != 2 {
			t.Errorf("after an SVID's life the store has %v", got)
		}
		time.Sleep(15 * time.Minute)
		if got := replicas(t, w.store); len(got) != 1 || got[0] != "here" {
			t.Errorf("later the store has %v, want the one that is here", got)
		}
	})
}

func replicas(t *testing.T, s storage.FleetStore) (names []string) {
	t.Helper()
	all, err := s.Summaries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, one := range all {
		names = append(names, one.Replica)
	}
	return names
}

// failing is a store that can be away, and counts what is written.
type failing struct {
	storage.FleetStore
	away    latest.Value[bool]
	written latest.Value[int]
	read    latest.Value[int]
}

func (f *failing) Publish(ctx context.Context, replica string, data []byte) error {
	n, _ := f.written.Load()
	f.written.Set(n + 1)
	if away, _ := f.away.Load(); away {
		return errors.New("the store is away")
	}
	return f.FleetStore.Publish(ctx, replica, data)
}

func (f *failing) Summaries(ctx context.Context) ([]storage.Summary, error) {
	n, _ := f.read.Load()
	f.read.Set(n + 1)
	if away, _ := f.away.Load(); away {
		return nil, errors.New("the store is away")
	}
	return f.FleetStore.Summaries(ctx)
}

// While the store is away the evidence grows old, so that nobody decides by half
// of it; what agents report here is kept for when it is back.
func TestStoreIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		store := &failing{FleetStore: w.store}
		w.store = store
		defer w.end()
		f, _ := w.replica("r")
		a := w.pods.add(0, "a")
		proof := w.prepare()
		time.Sleep(20 * time.Second)
		store.away.Set(true)
		before, _ := store.read.Load()
		for range 1200 { // news all the time
			f.Heard(a, proof)
			time.Sleep(100 * time.Millisecond)
		}
		if after, _ := store.read.Load(); after-before > 121 {
			t.Errorf("a store that is away was asked %d times in two minutes", after-before)
		}
		p, _ := f.Propagation().Load()
		if age := time.Since(p.At); age < time.Minute {
			t.Errorf("the evidence is %v old after two minutes without the store", age)
		}
		store.away.Set(false)
		w.wants(f, "1 expected, 1 received, 1 applied, 1 proved, 1 reporting")
		p, _ = f.Propagation().Load()
		if age := time.Since(p.At); age > 15*time.Second {
			t.Errorf("the evidence is %v old though the store is back", age)
		}
	})
}

// However much is reported, a replica writes once in a second at most; and if
// nothing changes, three times in a minute.
func TestWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		store := &failing{FleetStore: w.store}
		w.store = store
		defer w.end()
		f, _ := w.replica("r")
		a := w.pods.add(0, "a")
		time.Sleep(time.Minute)
		before, _ := store.written.Load()
		for n := range 1000 {
			f.Heard(a, fleet.Report{Received: uint64(n), RunningFor: 2 * life})
			time.Sleep(10 * time.Millisecond)
		}
		if after, _ := store.written.Load(); after-before > 11 {
			t.Errorf("%d writes in ten seconds of changes", after-before)
		}
		time.Sleep(2 * time.Second)
		before, _ = store.written.Load()
		for range 10 {
			time.Sleep(time.Minute)
			f.Heard(a, fleet.Report{Received: 999, RunningFor: 2 * life}) // no news
		}
		if after, _ := store.written.Load(); after-before > 31 {
			t.Errorf("%d writes in ten minutes without news", after-before)
		}
	})
}

// Before the pods are known, nothing is known of the agents.
func TestNotSynced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		w.pods.synced = make(chan struct{})
		f, _ := w.replica("r")
		time.Sleep(time.Hour)
		if p, _ := f.Propagation().Load(); !p.At.IsZero() {
			t.Errorf("known before the pods are: %+v", p)
		}
	})
}

func TestNewRefuses(t *testing.T) {
	sound := fleet.Config{
		Agents: account, Pods: &cluster{}, Authorities: new(latest.Value[ca.Set]), Store: storage.NewMemory(), Replica: "r",
		SVIDLife: life, Log: slog.New(slog.DiscardHandler),
	}
	if _, err := fleet.New(sound); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*fleet.Config){
		"no agents":       func(c *fleet.Config) { c.Agents = identity.ServiceAccount{} },
		"no pods":         func(c *fleet.Config) { c.Pods = nil },
		"no authorities":  func(c *fleet.Config) { c.Authorities = nil },
		"no store":        func(c *fleet.Config) { c.Store = nil },
		"no log":          func(c *fleet.Config) { c.Log = nil },
		"no replica":      func(c *fleet.Config) { c.Replica = "" },
		"a bad replica":   func(c *fleet.Config) { c.Replica = "a/b" },
		"no life":         func(c *fleet.Config) { c.SVIDLife = 0 },
		"negative return": func(c *fleet.Config) { c.Return = -1 },
	} {
		c := sound
		change(&c)
		if _, err := fleet.New(c); err == nil {
			t.Errorf("New(%s) = nil", name)
		}
	}
}
