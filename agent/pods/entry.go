package pods

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"time"

	"troth.dev/troth/agent/capture"
	"troth.dev/troth/agent/cni"
)

// entry is one pod that has a network of its own, from when it is heard of until it is
// gone. One goroutine decides on it and owns its network. What is to become of it is
// put into next by whoever knows, and the newest word counts.
type entry struct {
	pods *Pods
	uid  string
	wake chan struct{} // of size 1: there is something in next
	done chan struct{} // closed when the entry is gone and holds nothing

	// Guarded by Pods.mu.
	next     *target
	newest   sighting      // of all targets
	state    state         // what the goroutine has come to
	news     chan struct{} // closed and renewed with each state
	attached []string      // the interfaces of the newest sandbox

	// The goroutine's own.
	target target
	serving
}

// target is what an entry is to be about. Whoever takes it owns its files.
type target struct {
	sighting

	pod  cni.Pod    // as far as it is known
	ns   *os.File   // nil if gone
	kept []*os.File // what Files returned before, or what there is of it
	// held means that the pod was captured already, and goes on being captured until
	// the control plane says otherwise.
	held bool
	gone bool
}

// sighting is a point in the life of an entry: the number of targets there had been,
// and the network that the last of them was about.
type sighting struct {
	generation uint64
	id         cni.Namespace
	sandbox    string // empty if not known
	netns      string // path on the host; empty if not known
}

func (t *target) close() {
	if t.ns != nil {
		t.ns.Close()
	}
	closeAll(t.kept)
	t.ns, t.kept = nil, nil
}

// state is what has come of a target.
type state struct {
	generation uint64 // of the target
	id         cni.Namespace
	outcome    outcome
	wanted     bool
	network    *capture.Network // if captured
	err        error            // why it failed, or is not decided
}

type outcome int

const (
	undecided outcome = iota
	captured
	unwanted
	failed
	gone
)

// serving is a network that is open, and the goroutine that serves it.
type serving struct {
	network *capture.Network
	stop    context.CancelFunc
	ended   chan struct{} // closed when Serve has returned
	looked  time.Time     // when it was last seen to stand
}

// targetOf makes a target of what the plugin sent. netns stays the caller's.
func (p *Pods) targetOf(pod cni.Pod, netns *os.File) (*target, error) {
	id, err := cni.NamespaceOf(netns)
	if err != nil {
		return nil, err
	}
	if p.isHost(id) {
		return nil, errors.New("it is the node's own network")
	}
	ns, err := duplicate(netns)
	if err != nil {
		return nil, err
	}
	return &target{sighting: sighting{id: id, sandbox: pod.Sandbox, netns: pod.Netns}, pod: pod, ns: ns}, nil
}

// post puts t before the pod's entry, which it makes if there is none, and returns the
// entry and the generation that t is. It fails once Run is to end.
func (p *Pods) post(uid string, t *target) (*entry, uint64, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.context.Err() != nil {
		t.close()
		return nil, 0, errEnding
	}
	e := p.entries[uid]
	if e == nil {
		e = &entry{pods: p, uid: uid, wake: make(chan struct{}, 1), done: make(chan struct{}), news: make(chan struct{})}
		e.state.wanted = t.held
		p.entries[uid] = e
		ctx := p.context
		p.running.Go(func() { e.run(ctx) })
	}
	if t.sandbox != e.newest.sandbox {
		e.attached = nil
	}
	if t.pod.Interface != "" && !slices.Contains(e.attached, t.pod.Interface) {
		e.attached = append(e.attached, t.pod.Interface)
	}
	e.put(t)
	return e, t.generation, nil
}

// put is called with Pods.mu held.
func (e *entry) put(t *target) {
	t.generation = e.newest.generation + 1
	e.newest = t.sighting
	if e.next != nil {
		e.next.close()
	}
	e.next = t
	select {
	case e.wake <- struct{}{}:
	default: // it is told already
	}
}

// detach takes an interface away from the sandbox that the plugin names, and with the
// last of them the entry, which it returns then, with the generation that is its end.
func (p *Pods) detach(pod cni.Pod) (*entry, uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for uid, e := range p.entries {
		// Of a pod that was found by its processes, no sandbox is known.
		if e.newest.sandbox != pod.Sandbox && (e.newest.sandbox != "" || uid != pod.UID) {
			continue
		}
		e.attached = slices.DeleteFunc(e.attached, func(name string) bool { return name == pod.Interface })
		if len(e.attached) > 0 {
			return nil, 0
		}
		e.put(&target{sighting: e.newest, gone: true})
		return e, e.newest.generation
	}
	return nil, 0
}

// generations returns how far each entry is.
func (p *Pods) generations() map[*entry]sighting {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := make(map[*entry]sighting, len(p.entries))
	for _, e := range p.entries {
		now[e] = e.newest
	}
	return now
}

// await blocks until the entry has decided on a target no older than generation.
func (e *entry) await(ctx context.Context, generation uint64) (state, error) {
	for {
		e.pods.mu.Lock()
		state, news := e.state, e.news
		e.pods.mu.Unlock()
		if state.generation >= generation && state.outcome != undecided {
			return state, nil
		}
		select {
		case <-news:
		case <-e.done:
			if state.outcome != gone {
				return state, errEnding
			}
			return state, nil
		case <-ctx.Done():
			return state, ctx.Err()
		}
	}
}

func (e *entry) publish(outcome outcome, wanted bool, err error) {
	s := state{generation: e.target.generation, id: e.target.id, outcome: outcome, wanted: wanted, err: err}
	if outcome == captured {
		s.network = e.network
	}
	e.pods.mu.Lock()
	defer e.pods.mu.Unlock()
	e.state = s
	close(e.news)
	e.news = make(chan struct{})
}

// run decides on the pod again and again, until it is gone or the agent ends.
func (e *entry) run(ctx context.Context) {
	defer close(e.done)
	defer func() {
		e.suspend()
		e.target.close()
		e.pods.mu.Lock()
		defer e.pods.mu.Unlock()
		if e.next != nil {
			e.next.close()
		}
	}()
	failures := 0
	for ctx.Err() == nil {
		var changed <-chan struct{}
		if e.pods.config.Changed != nil {
			changed = e.pods.config.Changed() // before Wanted is asked: what comes between is not missed
		}
		e.pods.mu.Lock()
		next := e.next
		e.next = nil
		e.pods.mu.Unlock()
		if next != nil {
			failures = 0
			e.adopt(*next)
		}
		if e.target.gone {
			if e.leave() {
				return
			}
			continue
		}
		pause := e.pods.config.Interval
		switch err := e.settle(ctx); {
		case errors.Is(err, errInterrupted):
			continue
		case err != nil:
			pause = backOff(failures)
			failures++
		default:
			failures = 0
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
		case <-e.wake:
		case <-changed:
		case <-e.ended: // nil and never, if nothing is served
		case <-timer.C:
		}
		timer.Stop()
	}
}

// backOff returns how long to wait after so many failures in a row: from 50 to 100 ms,
// doubling up to 15 to 30 s.
func backOff(failures int) time.Duration {
	longest := min(100*time.Millisecond<<min(failures, 16), 30*time.Second)
	return longest/2 + rand.N(longest/2)
}

// adopt makes t what the entry is about. What there is of the same namespace stays.
func (e *entry) adopt(t target) {
	if t.gone || t.id != e.target.id {
		e.abandon()
		e.target.close()
		e.target = t
		return
	}
	t.close()
	t.ns, t.kept, t.held = e.target.ns, e.target.kept, e.target.held
	if t.pod.Sandbox == "" {
		t.pod = e.target.pod
	}
	e.target = t
}

// leave lets go of all that there is of the pod, and reports whether that was the end
// of the entry: not if it was heard of again.
func (e *entry) leave() bool {
	e.abandon()
	e.forget()
	e.target.close()
	e.publish(gone, false, nil)
	e.pods.mu.Lock()
	defer e.pods.mu.Unlock()
	if e.next != nil {
		return false
	}
	delete(e.pods.entries, e.uid)
	return true
}

var errInterrupted = errors.New("there is something newer to decide on")

// settle brings the pod to what it should be, or returns what stands in the way.
func (e *entry) settle(ctx context.Context) error {
	if e.network != nil && closed(e.ended) {
		e.suspend()
	}
	if e.network == nil && e.target.held {
		// Its last good state: it waits for nobody's word.
		if err := e.capture(ctx); err != nil {
			return err
		}
	}
	want, reason, err := e.wanted(ctx)
	switch {
	case errors.Is(err, errInterrupted):
		return err
	case err != nil && e.network == nil:
		e.publish(undecided, false, err)
		return err
	case err == nil && !want:
		if err := e.release(); err != nil {
			return err
		}
		if e.state.outcome != unwanted {
			e.log("pod not captured", "reason", reason)
		}
		e.publish(unwanted, false, nil)
		return nil
	case e.network == nil:
		return e.capture(ctx)
	}
	e.publish(captured, true, nil)
	return e.look()
}

// wanted asks the control plane, for as long as there is nothing newer or, of a pod that
// is captured, for Interval.
func (e *entry) wanted(ctx context.Context) (want bool, reason string, err error) {
	if e.network != nil {
		// It has to be looked after meanwhile, however long nobody answers.
		var done context.CancelFunc
		ctx, done = context.WithTimeout(ctx, e.pods.config.Interval)
		defer done()
	}
	asking, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	finished := make(chan struct{})
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-e.wake:
			cancel(errInterrupted)
		case <-e.ended:
			cancel(errInterrupted)
		case <-finished:
		}
	}()
	want, reason, err = e.pods.config.Wanted(asking, e.uid)
	close(finished)
	<-watched
	if errors.Is(context.Cause(asking), errInterrupted) {
		return false, "", errInterrupted
	}
	return want, reason, err
}

// capture opens the network and serves it. From then on the pod is held.
func (e *entry) capture(ctx context.Context) error {
	err := e.open()
	if err != nil {
		err = fmt.Errorf("capture pod %s: %w", e.uid, err)
		e.pods.config.Log.Error("pod should be captured and is not", "pod", e.uid, "namespace", e.target.pod.Namespace, "name", e.target.pod.Name, "err", err)
		e.publish(failed, true, err)
		return err
	}
	serveCtx, cancel := context.WithCancel(ctx)
	ended, n := make(chan struct{}), e.network
	e.stop, e.ended = cancel, ended
	go func() {
		defer close(ended)
		err := e.pods.config.Serve(serveCtx, e.uid, n)
		if serveCtx.Err() == nil {
			e.pods.config.Log.Error("pod is not served any more", "pod", e.uid, "err", err)
		}
	}()
	e.log("pod captured")
	e.publish(captured, true, nil)
	return nil
}

// open records the pod before it changes anything in its namespace: no rule is left
// behind that nobody knows of.
func (e *entry) open() error {
	if err := e.pods.records.write(recordOf(e.uid, e.target)); err != nil {
		return err
	}
	n, err := capture.Open(e.target.ns, e.target.kept)
	closeAll(e.target.kept)
	e.target.kept = nil
	if err != nil {
		return err
	}
	e.network, e.looked, e.target.held = n, time.Now(), true
	e.keep()
	return nil
}

// keep gives the sockets to the keeper, again and again: one that was restarted has
// forgotten them. That it is away is no reason to refuse a pod.
func (e *entry) keep() {
	if e.pods.config.Keeper == nil {
		return
	}
	files, err := e.network.Files()
	if err == nil {
		err = e.pods.config.Keeper.Keep(e.uid, files)
		closeAll(files)
	}
	if err != nil {
		e.pods.config.Log.Warn("pod's sockets are not kept", "pod", e.uid, "err", err)
	}
}

// look sees to a network that is open: that the keeper has it, and that it still stands.
func (e *entry) look() error {
	if time.Since(e.looked) < e.pods.config.Interval {
		return nil
	}
	e.keep()
	err := e.network.Check()
	if err == nil {
		e.looked = time.Now()
		return nil
	}
	err = fmt.Errorf("capture of pod %s does not stand any more: %w", e.uid, err)
	e.pods.config.Log.Error("pod should be captured and is not", "pod", e.uid, "err", err)
	e.publish(failed, true, err)
	// The sockets are kept open, so that nobody is refused in between.
	if files, err := e.network.Files(); err == nil {
		e.target.kept = files
	}
	e.suspend()
	return err
}

// suspend stops serving and closes the sockets. The rules stay. What Serve still does
// after it is told to end may need the network.
func (e *entry) suspend() {
	if e.network == nil {
		return
	}
	e.stop()
	<-e.ended
	e.closeNetwork()
}

// abandon is suspend for a pod that is gone: there is nobody to be nice to.
func (e *entry) abandon() {
	if e.network == nil {
		return
	}
	e.stop()
	ended := e.ended
	e.closeNetwork()
	<-ended
}

func (e *entry) closeNetwork() {
	if err := e.network.Close(); err != nil {
		e.pods.config.Log.Warn("pod's sockets not closed", "pod", e.uid, "err", err)
	}
	e.serving = serving{}
}

// release ends the capture of a pod that goes on without it. The rules do not wait for
// Serve: what they would still capture nobody would answer.
func (e *entry) release() error {
	if e.network == nil {
		return nil
	}
	e.stop()
	if err := e.network.Release(); err != nil {
		err = fmt.Errorf("release pod %s: %w", e.uid, err)
		e.pods.config.Log.Error("pod should not be captured and is", "pod", e.uid, "err", err)
		e.suspend() // it is held, and is captured again before the next try
		return err
	}
	<-e.ended
	e.serving = serving{}
	e.target.held = false
	e.forget()
	return nil
}

// forget takes away what would let the next start capture the pod.
func (e *entry) forget() {
	if e.pods.config.Keeper != nil {
		if err := e.pods.config.Keeper.Drop(e.uid); err != nil {
			e.pods.config.Log.Warn("keeper still has the pod's sockets", "pod", e.uid, "err", err)
		}
	}
	if err := e.pods.records.remove(e.uid); err != nil {
		e.pods.config.Log.Warn("pod's record not removed", "pod", e.uid, "err", err)
	}
}

func (e *entry) log(message string, args ...any) {
	e.pods.config.Log.Info(message, append([]any{"pod", e.uid, "namespace", e.target.pod.Namespace, "name", e.target.pod.Name}, args...)...)
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
