// Package fleet knows which node agents there should be, how far each has come
// with the newest trust bundle, and what each holds under which authority. It is
// the evidence by which authorities are activated and revoked.
//
// Start with [New] and [Fleet.Run]. [Fleet.Heard] takes what agents report, and
// [Fleet.Propagation] is what follows from it.
//
// It guarantees to err on the side of "not yet". An agent is expected because
// Kubernetes has its pod, not because it is connected; one whose pod is gone stays
// expected for as long as workloads of its node may still live by what it gave
// them. A proof of an agent that has just started counts only when whoever hung on
// its predecessor has had the time to come back. What cannot be known because the
// store cannot be read grows old, and package ca refuses what is old.
//
// Replicas share what they heard through a [storage.FleetStore], each in one
// summary that it replaces, at most once in a second and bounded in size.
package fleet

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"troth.dev/troth/ca"
	"troth.dev/troth/identity"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/storage"
)

// Pods is what a Fleet has to know about pods.
type Pods interface {
	// Of calls yield with each live pod that runs as the service account. yield calls
	// nothing of what it is called by.
	Of(account identity.ServiceAccount, yield func(identity.Pod))
	// Occupied says whether the node has a live pod.
	Occupied(node string) bool
	// Synced is closed once all pods are known.
	Synced() <-chan struct{}
}

// Config is what a Fleet needs. Every field is required unless it says otherwise.
type Config struct {
	// Agents is the service account that node agents run as.
	Agents identity.ServiceAccount
	Pods   Pods
	// Authorities is the authorities whose propagation is of interest.
	Authorities *latest.Value[ca.Set]
	Store       storage.FleetStore
	// Replica is this replica's name, as storage.CheckReplica demands it. Whoever has
	// the name after a restart goes on with what was heard before.
	Replica string
	// SVIDLife is how long SVIDs live at most.
	SVIDLife time.Duration
	// Return is how long the workloads of a node may take to come back to an agent
	// that was restarted; 0 means 40 seconds: go-spiffe's clients try again after 30
	// at most.
	Return time.Duration
	Log    *slog.Logger
}

// Fleet is the agents of a trust domain. Its methods may be called from many
// goroutines.
type Fleet struct {
	config      Config // immutable after New
	propagation latest.Value[ca.Propagation]
	news        chan struct{} // has one element while there is something to work out

	mu     sync.Mutex
	own    map[string]record            // what this replica heard, by the agents' pod UIDs; guarded by mu, as is all below
	open   map[string]int               // streams to this replica, by pod UID
	others map[string]map[string]record // what other replicas heard, by replica and pod UID
	missed map[string]time.Time         // since when an agent of whom nobody heard is expected, by pod UID
	asked  time.Time                    // when the others were last asked
	agreed time.Time                    // and when they last answered
	told   map[string]materially        // what was published last, by pod UID
	posted time.Time                    // when something was last to be published

	// What a working-out needs and the next one uses again: 1,000 agents 20 times in
	// a second were 10 MB of garbage. Of Run alone.
	pods    []agentPod
	expect  []expectation
	present map[string]bool // the UIDs of pods
	covered map[string]bool // nodes that have an agent's pod
}

// agentPod is the pod of an agent, and where it is.
type agentPod struct{ uid, node string }

// record is the newest that was heard of one agent.
type record struct {
	node      string
	report    Report
	heard     time.Time // in whole milliseconds, by the clock of the replica that heard it
	connected bool
	lost      time.Time // when the last stream ended; zero while connected
}

// Report is what an agent says that it has and does.
type Report struct {
	// Received and Applied are bundle revisions.
	Received, Applied uint64
	// Proved is the bundle revision by which the agent proved that it trusts
	// ProvedAuthority; 0 if it has proved nothing.
	Proved          uint64
	ProvedAuthority string
	// Failure is what its newest probe found to be wrong.
	Failure ProbeFailure
	// Uses is what it knows to be held and carried on its node, by authority.
	Uses map[string]ca.Use
	// RunningFor is for how long it has known.
	RunningFor time.Duration
}

// ProbeFailure is what a probe has found to be wrong.
type ProbeFailure int

// The failures of a probe. The zero ProbeFailure is none.
const (
	TrustedRefused    ProbeFailure = iota + 1 // the leaf of the prepared authority was refused
	UntrustedAccepted                         // the leaf that nobody trusts was accepted
)

// MaxAgents is for how many agents a Fleet is made. Of more than these a replica
// shares what it heard of MaxAgents, and the others are waited for.
const MaxAgents = 10_000

// New checks the config. It starts nothing.
func New(c Config) (*Fleet, error) {
	switch {
	case c.Pods == nil, c.Authorities == nil, c.Store == nil, c.Log == nil:
		return nil, errors.New("fleet: Pods, Authorities, Store and Log are required")
	case c.Agents == identity.ServiceAccount{}:
		return nil, errors.New("fleet: no service account of the agents")
	case c.SVIDLife <= 0, c.Return < 0:
		return nil, errors.New("fleet: SVIDLife is required, and Return is not negative")
	}
	if err := storage.CheckReplica(c.Replica); err != nil {
		return nil, err
	}
	if c.Return == 0 {
		c.Return = 40 * time.Second
	}
	return &Fleet{
		config: c,
		news:   make(chan struct{}, 1),
		own:    make(map[string]record),
		open:   make(map[string]int),
		others: make(map[string]map[string]record),
		missed: make(map[string]time.Time),
		told:   make(map[string]materially),

		present: make(map[string]bool),
		covered: make(map[string]bool),
	}, nil
}

// Propagation is what is known of the agents, kept current while Run runs. Before
// that it is the zero Propagation, which is no evidence.
func (f *Fleet) Propagation() *latest.Value[ca.Propagation] { return &f.propagation }

// Connected notes that an agent has opened a stream to this replica. The caller
// calls disconnected when it ends.
func (f *Fleet) Connected(agent identity.Agent) (disconnected func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.open[agent.PodUID]++
	f.update(agent.PodUID)
	return sync.OnceFunc(func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.open[agent.PodUID]--; f.open[agent.PodUID] == 0 {
			delete(f.open, agent.PodUID)
		}
		f.update(agent.PodUID)
	})
}

// update brings the record of an agent in line with its streams. The caller holds
// mu.
func (f *Fleet) update(podUID string) {
	r, ok := f.own[podUID]
	if !ok {
		return // it has not reported yet
	}
	switch connected := f.open[podUID] > 0; {
	case connected == r.connected:
		return
	case connected:
		r.connected, r.lost = true, time.Time{}
	default:
		r.connected, r.lost = false, now()
	}
	f.own[podUID] = r
	f.wake()
}

// Heard takes an agent's report. Of authorities that there are not it keeps
// nothing.
func (f *Fleet) Heard(agent identity.Agent, report Report) {
	set, _ := f.config.Authorities.Load()
	uses := report.Uses
	report.Uses = nil
	for id, use := range uses {
		if _, ok := set.Authority(id); ok && use != (ca.Use{}) {
			if report.Uses == nil {
				report.Uses = make(map[string]ca.Use, len(uses))
			}
			report.Uses[id] = use
		}
	}
	if _, ok := set.Authority(report.ProvedAuthority); !ok {
		report.Proved, report.ProvedAuthority = 0, ""
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	r := record{node: agent.Node.Name, report: report, heard: now(), connected: f.open[agent.PodUID] > 0}
	if !r.connected {
		r.lost = r.heard
	}
	f.own[agent.PodUID] = r
	f.wake()
}

// wake has Run work out what follows.
func (f *Fleet) wake() {
	select {
	case f.news <- struct{}{}:
	default:
	}
}

// now is the time as records have it.
func now() time.Time { return time.Now().Round(0).UTC().Truncate(time.Millisecond) }

const (
	// pause is what lies between two workings-out at least while authorities change:
	// 1,000 agents report within a few hundred milliseconds, and each working-out
	// looks at all of them.
	pause = 50 * time.Millisecond
	// idle is how often everything is looked at again while they do not change, and
	// if nobody reports.
	idle = time.Second
	// blink is for how long an agent is away that changes its connection.
	blink = 2 * time.Second
	// fresh is how old the evidence may get before it is set again as it is.
	fresh = 10 * time.Second
)

// Run keeps the propagation current until ctx ends. It returns no error: while the
// store cannot be read, what is known grows old.
func (f *Fleet) Run(ctx context.Context) error {
	select {
	case <-f.config.Pods.Synced():
	case <-ctx.Done():
		return nil
	}
	f.resume(ctx)
	ticker := time.NewTicker(idle)
	defer ticker.Stop()
	for {
		f.share(ctx)
		set, changed := f.config.Authorities.Load()
		f.workOut(set)
		news := f.news
		if !changing(set) {
			news = nil // the ticker will do
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		select {
		case <-ctx.Done():
			return nil
		case <-news:
		case <-changed:
		case <-ticker.C:
		}
	}
}

// workOut sets the propagation if it is another, or old.
func (f *Fleet) workOut(set ca.Set) {
	f.pods = f.pods[:0]
	f.config.Pods.Of(f.config.Agents, func(p identity.Pod) {
		if p.Node.Name != "" { // or nobody can depend on it yet
			f.pods = append(f.pods, agentPod{p.UID, p.Node.Name})
		}
	})
	next := f.work(now(), set)
	before, _ := f.propagation.Load()
	if next.At.Sub(before.At) < fresh && alike(before, next) {
		return
	}
	f.propagation.Set(next)
}

// alike says whether two propagations differ in their times alone. Those who wait
// have to be told apart from when they were waited for.
func alike(a, b ca.Propagation) bool {
	return a.Expected == b.Expected && a.Received == b.Received && a.Applied == b.Applied && a.Proved == b.Proved &&
		a.Revision == b.Revision && a.Authority == b.Authority && a.Reporting == b.Reporting && maps.Equal(a.Uses, b.Uses) && slices.Equal(a.Waiting, b.Waiting)
}

// work says what follows from the records of all replicas for the agents that are
// expected.
func (f *Fleet) work(at time.Time, set ca.Set) ca.Propagation {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := ca.Propagation{At: f.agreed, Revision: set.Revision, Uses: make(map[string]ca.Use)}
	successor, prepared := set.Successor()
	if prepared {
		p.Revision, p.Authority = successor.Changed.Revision, successor.ID
	}
	f.findExpected(at)
	p.Expected = len(f.expect)
	var waiting []waiting
	for n := range f.expect {
		e := &f.expect[n]
		r := &e.record
		lacks, rank := "", lacksNothing
		switch {
		case !e.known:
			lacks, rank = "offline", lacksContact
		case r.report.Received < p.Revision:
			lacks, rank = atRevision(r.report.Received), lacksBundle
		case r.report.Applied < p.Revision:
			p.Received++
			lacks, rank = "not applied", lacksUse
		case r.ranFor(at) < f.config.Return:
			p.Received++
			lacks, rank = "just started", lacksUse
		case !prepared:
			p.Received, p.Applied = p.Received+1, p.Applied+1
		case r.report.Failure != 0:
			p.Received, p.Applied = p.Received+1, p.Applied+1
			lacks, rank = r.report.Failure.text(), lacksSoundness
		case r.report.ProvedAuthority != p.Authority, r.report.Proved < p.Revision:
			p.Received, p.Applied = p.Received+1, p.Applied+1
			lacks, rank = "not proved", lacksProof
		default:
			p.Received, p.Applied, p.Proved = p.Received+1, p.Applied+1, p.Proved+1
		}
		if rank != lacksNothing {
			since := successor.Changed.At
			switch {
			case !e.known:
				since = e.missed
			case !r.connected && at.Sub(r.lost) >= blink:
				lacks, rank, since = "offline", lacksContact, r.lost
			}
			waiting = append(waiting, waits(rank, e.node, lacks, since))
		}
		for id, use := range r.report.Uses {
			sum := p.Uses[id]
			p.Uses[id] = ca.Use{SVIDs: sum.SVIDs + use.SVIDs, Connections: sum.Connections + use.Connections}
		}
		// What its predecessor handed out has expired.
		if r.report.RunningFor >= f.config.SVIDLife {
			p.Reporting++
			if p.Reported.IsZero() || r.heard.Before(p.Reported) {
				p.Reported = r.heard
			}
		}
	}
	slices.SortFunc(waiting, byImportance)
	for _, w := range waiting[:min(len(waiting), ca.MaxWaiting)] {
		p.Waiting = append(p.Waiting, w.Waiting)
	}
	return p
}

// expectation is one agent that should be there, and what was heard of it.
type expectation struct {
	node   string
	record record // zero unless known
	known  bool
	missed time.Time // since when nothing is known of it
}

// findExpected puts into expect each pod of an agent, and each node that lost its
// agent while workloads on it may still live by what that agent gave them. The
// caller holds mu.
func (f *Fleet) findExpected(at time.Time) {
	clear(f.present)
	clear(f.covered)
	f.expect = f.expect[:0]
	for _, pod := range f.pods {
		f.present[pod.uid], f.covered[pod.node] = true, true
		e := expectation{node: pod.node}
		if e.record, e.known = f.newest(pod.uid); !e.known {
			if f.missed[pod.uid].IsZero() {
				f.missed[pod.uid] = at
			}
			e.missed = f.missed[pod.uid]
		}
		f.expect = append(f.expect, e)
	}
	for uid := range f.missed {
		if _, known := f.own[uid]; known || !f.present[uid] {
			delete(f.missed, uid)
		}
	}
	// Agents whose pods are gone.
	last := make(map[string]record)
	consider := func(uid string, r record) (needed bool) {
		switch over := at.Sub(r.heard) > f.config.SVIDLife+afterReport; {
		case f.present[uid]:
			return true
		case over, f.covered[r.node], !f.config.Pods.Occupied(r.node):
			return false
		case r.heard.After(last[r.node].heard):
			last[r.node] = r
		}
		return true
	}
	for uid, r := range f.own {
		if !consider(uid, r) {
			delete(f.own, uid)
		}
	}
	for _, heard := range f.others { // who forget for themselves
		for uid, r := range heard {
			consider(uid, r)
			if own, ok := f.own[uid]; ok && !own.connected && r.connected && r.heard.Sub(own.heard) > skew {
				delete(f.own, uid) // the agent is theirs now
			}
		}
	}
	for node, r := range last {
		f.expect = append(f.expect, expectation{node: node, record: r, known: true})
	}
}

// newest returns what is to be believed of an agent, of all that replicas heard. The
// caller holds mu.
func (f *Fleet) newest(uid string) (newest record, known bool) {
	newest, known = f.own[uid]
	for _, heard := range f.others {
		if r, ok := heard[uid]; ok && (!known || r.supersedes(newest)) {
			newest, known = r, true
		}
	}
	return newest, known
}

// afterReport is for how long after its last report an agent may have handed out
// more: it reports once in a minute.
const afterReport = 2 * time.Minute

// skew is how far the clocks of two replicas may be apart.
const skew = 30 * time.Second

// supersedes says whether r is to be believed rather than s, which another replica
// heard of the same agent. That an agent is connected counts for more than the time
// of its report, which is by clocks that differ.
func (r record) supersedes(s record) bool {
	if r.connected != s.connected {
		return r.connected
	}
	return r.heard.After(s.heard)
}

// ranFor is for how long the agent has run, in so far as it is known.
func (r record) ranFor(at time.Time) time.Duration {
	until := at
	if !r.connected {
		until = r.lost
	}
	return r.report.RunningFor + max(0, until.Sub(r.heard))
}

// waiting is an agent that is waited for, with the importance of its lack.
type waiting struct {
	ca.Waiting
	rank lack
}

func waits(rank lack, node, lacks string, since time.Time) waiting {
	return waiting{ca.Waiting{Node: node, Lacks: lacks, Since: since}, rank}
}

// byImportance puts first what goes away last: those who will never prove it as
// they are, those who are away, the longest first, and those on their way.
func byImportance(a, b waiting) int {
	return cmp.Or(cmp.Compare(a.rank, b.rank), a.Since.Compare(b.Since), cmp.Compare(a.Node, b.Node))
}

// lack is a kind of what an agent lacks, the most important first.
type lack int

const (
	lacksSoundness lack = iota
	lacksContact
	lacksBundle
	lacksUse
	lacksProof
	lacksNothing
)

func atRevision(revision uint64) string {
	if revision == 0 {
		return "without a bundle"
	}
	return fmt.Sprintf("at revision %d", revision)
}

func (p ProbeFailure) text() string {
	if p == UntrustedAccepted {
		return "trusts what nobody does"
	}
	return "refuses the prepared authority"
}
