// Package pods knows which of the node's pods are captured, and sees to it that those
// which should be are.
//
// Start with [New] and [Pods.Run]. *[Pods] is what the CNI plugin talks to
// (a cni.Handler); entry.go has the life of one pod, processes.go how a pod is found
// that the plugin has not told of, records.go what outlives the process.
//
// A pod comes to be known in four ways: the plugin adds it, before its containers
// start; a keeper has kept its sockets, or a record its namespace, from before the
// agent was restarted; or its processes run. Whether it is to be captured is the
// control plane's word alone ([Config.Wanted]), asked again whenever that may have
// changed.
//
// It guarantees that the plugin is told of success only when capture stands, or the pod
// is not to be captured; that what was captured before a restart is captured after it
// without asking anybody first; that a pod which should be captured and is not is
// tried again and reported by name until it is; and that nobody's capture ends but for
// the control plane's word or the end of the pod. While the control plane has not
// spoken, a new pod waits and an old one stays as it is. The network of the node
// itself is never captured, whoever names it.
//
// What is true if the process dies, step by step as a pod is added:
//
//	before its record is written    nothing was done, and the plugin's request fails
//	after that                      the next start captures it from the record, if the
//	                                namespace is still there; the runtime, whose request
//	                                failed, takes it down and the next start finds it gone
//	once the rules stand            the same; until then its connections are refused
//	once the keeper has its sockets the same; until then its connections wait
//	once the plugin was answered    the same: the record came before the answer
package pods

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"troth.dev/troth/agent/capture"
	"troth.dev/troth/agent/cni"
)

// Config is what Pods needs. Every field is required unless it says otherwise.
type Config struct {
	// Records is a folder for a file per pod, of root's alone; it is made if there is
	// none. It has to outlive the process, not the machine.
	Records string
	// HostRoot is where this process sees the root of the host's files, by which the
	// runtime names a pod's namespace; empty means by the host's first process.
	HostRoot string
	// Wanted says whether a pod is to be captured, and why not. It blocks until that
	// is known, or ctx ends, which is an error: not known is neither yes nor no.
	Wanted func(ctx context.Context, podUID string) (want bool, reason string, err error)
	// Changed returns a channel that is closed as soon as Wanted may say something
	// else of any pod; optional. Pods are asked about again after Interval anyway.
	Changed func() <-chan struct{}
	// Serve answers what comes in on n until ctx ends, and returns only when all that
	// it started has ended. If it ends before that, the pod is captured anew.
	Serve func(ctx context.Context, podUID string, n *capture.Network) error
	// Keeper holds the sockets, under the pods' UIDs, while the agent is away. It is
	// optional: without one, connections that arrive then are refused.
	Keeper *capture.Keeper
	// Interval is how often the node is searched for pods, and capture looked after;
	// 0 means 10 s.
	Interval time.Duration
	Log      *slog.Logger
}

// Pods is the pods of one node.
type Pods struct {
	config  Config            // immutable after New
	host    []cni.Namespace   // the networks that are never captured; immutable after New
	records records           // immutable after New
	started chan struct{}     // closed when what was captured before is known again
	running sync.WaitGroup    // the entries' goroutines
	mu      sync.Mutex        // guards all below
	entries map[string]*entry // by UID
	context context.Context   //nolint:containedctx // Run's, which entries that are added later end with
}

// New checks the config and makes the folder of records. It starts nothing.
func New(c Config) (*Pods, error) {
	switch {
	case c.Records == "", c.Log == nil:
		return nil, errors.New("pods: Records and Log are required")
	case c.Wanted == nil, c.Serve == nil:
		return nil, errors.New("pods: Wanted and Serve are required")
	case c.Interval < 0:
		return nil, fmt.Errorf("pods: the interval %v is negative", c.Interval)
	}
	if c.HostRoot == "" {
		c.HostRoot = "/proc/1/root"
	}
	if c.Interval == 0 {
		c.Interval = 10 * time.Second
	}
	p := &Pods{config: c, records: records(c.Records), started: make(chan struct{}), entries: make(map[string]*entry)}
	var err error
	if p.host, err = hostNamespaces(c.Log); err != nil {
		return nil, fmt.Errorf("pods: %w", err)
	}
	if err := p.records.prepare(); err != nil {
		return nil, fmt.Errorf("pods: %w", err)
	}
	return p, nil
}

// Run captures what was captured before, serves it, and looks after all pods until ctx
// ends. Then it stops serving and closes the sockets; the rules stay, and the keeper
// keeps what it has. It fails only if the node's processes cannot be read at the start.
func (p *Pods) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer func() {
		cancel()
		// Who holds the lock may be adding an entry; who takes it later will not.
		p.mu.Lock()
		p.mu.Unlock() //nolint:staticcheck // an empty section is the point
		p.running.Wait()
	}()
	p.mu.Lock()
	p.context = ctx
	p.mu.Unlock()

	found, err := p.search()
	if err != nil {
		return fmt.Errorf("pods: %w", err)
	}
	p.restore(found)
	close(p.started)
	for {
		p.discover(found)
		select {
		case <-time.After(p.config.Interval):
		case <-ctx.Done():
			return nil
		}
		before := p.generations()
		next, err := p.search()
		if err != nil {
			p.config.Log.Error("node not searched for pods", "err", err)
			continue
		}
		found = next
		p.bury(before, found)
	}
}

// Captured returns how many pods are captured.
func (p *Pods) Captured() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, e := range p.entries {
		if e.state.outcome == captured {
			n++
		}
	}
	return n
}

// Uncaptured returns the UIDs of the pods that should be captured and are not, sorted.
func (p *Pods) Uncaptured() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var uids []string
	for _, uid := range slices.Sorted(maps.Keys(p.entries)) {
		if e := p.entries[uid]; e.state.wanted && e.state.outcome != captured {
			uids = append(uids, uid)
		}
	}
	return uids
}

// The reasons why the plugin is refused.
const (
	ReasonStarting    = "AGENT_STARTING"   // what was captured before is not known yet
	ReasonUnknown     = "POD_NOT_KNOWN"    // the control plane has not said what the pod is
	ReasonFailed      = "CAPTURE_FAILED"   // the rules or sockets could not be made
	ReasonSuperseded  = "POD_SUPERSEDED"   // the pod has a newer sandbox, or is gone
	ReasonNotCaptured = "POD_NOT_CAPTURED" // to Check: it should be captured and is not
)

// Add returns nil when the pod is captured or is not to be. It waits for the control
// plane's word, for as long as ctx lasts.
func (p *Pods) Add(ctx context.Context, pod cni.Pod, netns *os.File) error {
	if err := p.wait(ctx); err != nil {
		return err
	}
	if isStatic(pod.UID) {
		p.config.Log.Info("pod not captured", "pod", pod.UID, "reason", reasonStatic)
		return nil
	}
	t, err := p.targetOf(pod, netns)
	if err != nil {
		return &cni.Error{Reason: cni.ReasonNamespace, Message: err.Error()}
	}
	e, generation, err := p.post(pod.UID, t)
	if err != nil {
		return err
	}
	state, err := e.await(ctx, generation)
	switch {
	case errors.Is(err, errEnding):
		return err
	case err != nil && state.err != nil:
		return &cni.Error{Reason: ReasonUnknown, Message: state.err.Error(), Retry: true}
	case err != nil:
		return &cni.Error{Reason: ReasonUnknown, Message: "the control plane has not said yet whether the pod is to be captured", Retry: true}
	case state.outcome == gone:
		return &cni.Error{Reason: ReasonSuperseded, Message: "the sandbox was deleted meanwhile"}
	case state.id != t.id:
		return &cni.Error{Reason: ReasonSuperseded, Message: "the pod has another sandbox by now"}
	case state.outcome == failed:
		return &cni.Error{Reason: ReasonFailed, Message: state.err.Error(), Retry: true}
	}
	return nil
}

// Check returns nil if the pod is captured as it was made, or is not to be captured.
func (p *Pods) Check(ctx context.Context, pod cni.Pod, netns *os.File) error {
	if err := p.wait(ctx); err != nil {
		return err
	}
	if isStatic(pod.UID) {
		return nil
	}
	id, err := cni.NamespaceOf(netns)
	if err != nil {
		return err
	}
	p.mu.Lock()
	var state state
	if e := p.entries[pod.UID]; e != nil {
		state = e.state
	}
	p.mu.Unlock()
	if state.id == id && state.outcome == captured {
		if err := state.network.Check(); err != nil {
			return &cni.Error{Reason: ReasonNotCaptured, Message: err.Error(), Retry: true}
		}
		return nil
	}
	want, _, err := p.config.Wanted(ctx, pod.UID)
	switch {
	case err != nil:
		return &cni.Error{Reason: ReasonUnknown, Message: err.Error(), Retry: true}
	case want:
		return &cni.Error{Reason: ReasonNotCaptured, Message: "the pod is to be captured and is not", Retry: true}
	}
	return nil
}

// Delete forgets the sandbox, and returns when nothing is held of it any more. Its
// rules go with its namespace. A sandbox that the pod no longer has is not the pod's
// end, and one that is not known is no error.
func (p *Pods) Delete(ctx context.Context, pod cni.Pod) error {
	if err := p.wait(ctx); err != nil {
		return err
	}
	e, generation := p.detach(pod)
	if e == nil {
		return nil
	}
	_, err := e.await(ctx, generation)
	return err
}

// Collect forgets the sandboxes that are not in keep, if their namespaces are gone. The
// runtime's list is of one of its networks, and a pod that still runs may be in
// another: it is never its list alone that ends a capture.
func (p *Pods) Collect(ctx context.Context, keep []cni.Attachment) error {
	if err := p.wait(ctx); err != nil {
		return err
	}
	valid := make(map[string]bool, len(keep))
	for _, a := range keep {
		valid[a.Sandbox] = true
	}
	before := p.generations()
	maps.DeleteFunc(before, func(e *entry, seen sighting) bool { return valid[seen.sandbox] })
	if len(before) == 0 {
		return nil
	}
	found, err := p.search()
	if err != nil {
		return err
	}
	for e, generation := range p.bury(before, found) {
		if _, err := e.await(ctx, generation); err != nil {
			return err
		}
	}
	return nil
}

// Status returns nil if an Add would be looked at now. Whether the control plane can be
// asked is no part of it: a runtime that hears "no" may take the node for one without a
// network, and the control plane may have to start on it.
func (p *Pods) Status(ctx context.Context) error {
	select {
	case <-p.started:
	default:
		return errStarting
	}
	return ctx.Err()
}

var (
	errStarting = &cni.Error{Reason: ReasonStarting, Message: "the agent has not yet found the pods of before its start", Retry: true}
	errEnding   = &cni.Error{Reason: cni.ReasonEnding, Message: "the agent is shutting down", Retry: true}
)

// wait blocks until Run has restored what was there before.
func (p *Pods) wait(ctx context.Context) error {
	select {
	case <-p.started:
		return nil
	case <-ctx.Done():
		return errStarting
	}
}
