package agent

import (
	"crypto"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"troth.dev/troth/agent/proxy"
	"troth.dev/troth/agent/workload"
	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/identity"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/policy"
)

// pod is one pod of the node, as the control plane told it.
type pod struct {
	identity.PodReference
	serviceAccount string
	id             spiffeid.ID
	policy         *policy.Effective
	capture        trothv1.Capture
}

// identities is what the agent holds: the node's pods, one SVID for each
// identity among them, the trust bundles, and what it has proved of them. It is the Workload API's source.
type identities struct {
	trustDomain spiffeid.TrustDomain
	// changed tells that there may be something to do or to report.
	changed latest.Value[struct{}]

	mu        sync.Mutex
	revision  string                   // of the pods; guarded by mu, as is all below
	synced    bool                     // whether the control plane has told of the pods
	pods      map[string]pod           // by UID
	held      map[spiffeid.ID]*holding // one for each identity of the pods
	own       map[workload.Leaf]bool   // the agent's own SVIDs: two while it goes over to the next
	trust     *trust                   // nil before the first
	bundles   []workload.Bundle        // immutable once set; the own trust domain's first, of trust
	trusted   *x509bundle.Set          // the same, for the data path
	probe     *probe                   // nil if there is nothing to prove
	tried     outcome                  // of the newest try of a probe
	followers map[string]*follower     // by pod UID
}

// holding is one identity and how its SVID is coming along.
type holding struct {
	svid     *x509svid.SVID // nil before the first
	plan     plan           // of svid
	pause    time.Time      // when to ask for the next at the earliest; zero for no pause
	failures int            // since the last success
}

// due returns when to ask for the next SVID. A pause is by the clock that cannot be
// set: it stays as long as it was meant.
func (h *holding) due(t *trust) time.Time {
	var at time.Time
	if h.svid != nil {
		at, _ = t.due(h.plan)
	}
	if h.pause.After(at) {
		return h.pause
	}
	return at
}

// follower is a pod in whose state somebody is interested.
type follower struct {
	state    latest.Value[workload.State]
	policy   latest.Value[*policy.Effective]
	identity latest.Value[proxy.Identity]
	capture  latest.Value[wanted]
	count    int
}

// wanted is whether a pod is to be captured, as far as that is known.
type wanted struct {
	known   bool // whether the control plane has told of the node's pods
	here    bool // whether the pod is one of them
	capture trothv1.Capture
}

func newIdentities(td spiffeid.TrustDomain) *identities {
	return &identities{
		trustDomain: td,
		pods:        make(map[string]pod),
		held:        make(map[spiffeid.ID]*holding),
		own:         make(map[workload.Leaf]bool),
		followers:   make(map[string]*follower),
	}
}

// Workload implements [workload.Source].
func (i *identities) Workload(podUID string) (*latest.Value[workload.State], func()) {
	f, release := i.follow(podUID)
	return &f.state, release
}

// policyOf is [Agent.Policy].
func (i *identities) policyOf(podUID string) (*latest.Value[*policy.Effective], func()) {
	f, release := i.follow(podUID)
	return &f.policy, release
}

// follow keeps the values of a pod current until release is called.
func (i *identities) follow(podUID string) (f *follower, release func()) {
	i.mu.Lock()
	defer i.mu.Unlock()
	f = i.followers[podUID]
	if f == nil {
		f = &follower{}
		f.state.Set(i.state(podUID))
		f.policy.Set(i.pods[podUID].policy)
		f.identity.Set(i.identity(podUID))
		f.capture.Set(i.wanted(podUID))
		i.followers[podUID] = f
	}
	f.count++
	return f, sync.OnceFunc(func() {
		i.mu.Lock()
		defer i.mu.Unlock()
		if f.count--; f.count == 0 {
			delete(i.followers, podUID)
		}
	})
}

// state is what the pod is entitled to now. The caller holds mu.
func (i *identities) state(podUID string) workload.State {
	if !i.synced {
		return workload.State{Status: workload.StatusUnknown}
	}
	p, ok := i.pods[podUID]
	if !ok {
		return workload.State{Status: workload.StatusDenied}
	}
	h := i.held[p.id]
	if h.svid == nil || len(i.bundles) == 0 {
		return workload.State{Status: workload.StatusPending}
	}
	return workload.State{
		Status:     workload.StatusReady,
		Identities: []workload.Identity{{SVID: h.svid}},
		Bundles:    i.bundles,
	}
}

// identity is who the pod is for the data path. The caller holds mu.
func (i *identities) identity(podUID string) proxy.Identity {
	p, ok := i.pods[podUID]
	if !ok {
		return proxy.Identity{}
	}
	return proxy.Identity{SVID: i.held[p.id].svid, Bundles: i.trusted}
}

// wanted is whether the pod is to be captured. The caller holds mu.
func (i *identities) wanted(podUID string) wanted {
	p, ok := i.pods[podUID]
	return wanted{known: i.synced, here: ok, capture: p.capture}
}

// publish brings every follower up to date. The caller holds mu.
func (i *identities) publish() {
	for uid, f := range i.followers {
		// Whoever follows the policy decides on all its connections again.
		if old, _ := f.policy.Load(); !old.Equal(i.pods[uid].policy) {
			f.policy.Set(i.pods[uid].policy)
		}
		// Whoever follows the identity looks at every tunnel again.
		now := i.identity(uid)
		if old, _ := f.identity.Load(); old != now {
			f.identity.Set(now)
		}
		wanted := i.wanted(uid)
		if old, _ := f.capture.Load(); old != wanted {
			f.capture.Set(wanted)
		}
		// The last: whoever waits until it is ready finds all else in place.
		f.state.Set(i.state(uid))
	}
	i.changed.Set(struct{}{})
}

// setPods replaces the node's pods by those of a revision. An identity that no
// pod has any more is dropped with its key.
func (i *identities) setPods(revision string, pods []pod) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.revision, i.synced = revision, true
	i.pods = make(map[string]pod, len(pods))
	wanted := make(map[spiffeid.ID]bool)
	for _, p := range pods {
		i.pods[p.UID] = p
		wanted[p.id] = true
		if i.held[p.id] == nil {
			i.held[p.id] = &holding{} // due at once
		}
	}
	for id := range i.held {
		if !wanted[id] {
			delete(i.held, id)
		}
	}
	i.publish()
}

// setTrust replaces the own trust domain's bundle: for the streams of workloads, and
// for all that is verified on the node. It refuses one that is older than what is
// here, and one of the same revision that is another.
func (i *identities) setTrust(t *trust) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.trust != nil {
		switch {
		case t.revision < i.trust.revision:
			return fmt.Errorf("agent: bundle revision %d is older than %d, which is here", t.revision, i.trust.revision)
		case t.revision == i.trust.revision && t.content != i.trust.content:
			return fmt.Errorf("agent: bundle revision %d is here with another content", t.revision)
		case t.revision == i.trust.revision:
			return nil
		}
	}
	i.trust = t
	i.bundles = []workload.Bundle{{Bundle: t.bundle, Revision: t.revision}}
	i.trusted = x509bundle.NewSet(t.bundle)
	i.publish()
	return nil
}

// setProbe replaces what is to be proved; nil for nothing.
func (i *identities) setProbe(p *probe) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.probe = p
	i.changed.Set(struct{}{})
}

// setOwn adds an SVID of the agent's own, or removes it.
func (i *identities) setOwn(leaf workload.Leaf, held bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if held {
		i.own[leaf] = true
	} else {
		delete(i.own, leaf)
	}
	i.changed.Set(struct{}{})
}

// newestTrust returns the newest bundle with its windows, or nil before the first.
func (i *identities) newestTrust() *trust {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.trust
}

// due returns a pod for each identity whose next SVID is due, at most maxBatch
// of them, and when the next will be due after these.
func (i *identities) due(now time.Time) (pods []pod, next time.Time) {
	next = now.Add(time.Hour)
	i.mu.Lock()
	defer i.mu.Unlock()
	asked := make(map[spiffeid.ID]bool)
	// The order of a map is random, and so is the pod that stands for its
	// identity: one that the server does not know yet does not stand in the way.
	for _, p := range i.pods {
		at := i.held[p.id].due(i.trust)
		switch {
		case asked[p.id]:
		case at.After(now):
			if at.Before(next) {
				next = at
			}
		case len(pods) == maxBatch:
			next = now
		default:
			asked[p.id] = true
			pods = append(pods, p)
		}
	}
	return pods, next
}

// put stores a new SVID, with the place that the server gave it or nil. The old one
// serves until this moment. It returns why that was replaced, or "" if there was none.
func (i *identities) put(svid *x509svid.SVID, place *uint32, now time.Time) (why cause) {
	i.mu.Lock()
	defer i.mu.Unlock()
	h := i.held[svid.ID]
	if h == nil {
		return "" // its pods went while it was issued
	}
	if h.svid != nil {
		_, why = i.trust.due(h.plan)
	}
	h.svid, h.plan, h.failures = svid, newPlan(svid, place, now), 0
	h.pause = i.trust.lag(h.plan, now)
	i.publish()
	return why
}

// failed puts the next attempt off, for longer each time, and at least for as long
// as the server asked.
func (i *identities) failed(id spiffeid.ID, now time.Time, retryAfter time.Duration) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if h := i.held[id]; h != nil {
		h.failures++
		left := time.Duration(math.MaxInt64)
		if h.svid != nil {
			left = h.svid.Certificates[0].NotAfter.Sub(now)
		}
		h.pause = now.Add(max(retryAfter, backoff(h.failures, left)))
	}
}

// reached says that the server answers again: what failed while it did not is due
// now, and not only after the pause that the last of many failures has earned.
func (i *identities) reached() {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, h := range i.held {
		if h.failures > 0 {
			h.pause = time.Time{}
		}
	}
	i.changed.Set(struct{}{})
}

// left returns how long the SVID lives that is the next to expire, and the longest of
// times if there is none. One that has expired is no reason to hurry, and must not
// hide that another one is about to.
func (i *identities) left(now time.Time) time.Duration {
	i.mu.Lock()
	defer i.mu.Unlock()
	least := time.Duration(math.MaxInt64)
	for _, h := range i.held {
		if h.svid == nil {
			continue
		}
		if left := h.plan.leaf.NotAfter.Sub(now); left > 0 {
			least = min(least, left)
		}
	}
	return least
}

func (i *identities) inSync() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.synced
}

// summary is what the agent holds at one moment.
type summary struct {
	workloadsRevision string
	bundleRevision    uint64
	leaves            []workload.Leaf // of all SVIDs, its own among them
	earliestExpiry    time.Time       // of those of workloads; zero if there is none
}

func (i *identities) summary() summary {
	i.mu.Lock()
	defer i.mu.Unlock()
	s := summary{workloadsRevision: i.revision}
	if i.trust != nil {
		s.bundleRevision = i.trust.revision
	}
	for leaf := range i.own {
		s.leaves = append(s.leaves, leaf)
	}
	for _, h := range i.held {
		if h.svid == nil {
			continue
		}
		s.leaves = append(s.leaves, h.plan.leaf)
		if end := h.plan.leaf.NotAfter; s.earliestExpiry.IsZero() || end.Before(s.earliestExpiry) {
			s.earliestExpiry = end
		}
	}
	return s
}

// prove returns what the newest probe has shown at the revision that is applied,
// and whether that is news. Nothing is tried by a bundle that is not applied yet, and
// what was shown before that by another probe, or at another revision, is worth
// nothing.
//
// A proof stands, because it has been made, but a failure is tried again: the clock
// may have been wrong.
func (i *identities) prove(applied uint64, now time.Time) (result outcome, news bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.probe == nil || applied < i.probe.revision {
		return outcome{}, false
	}
	last := i.tried
	known := last.probe == i.probe && last.revision == applied
	switch {
	case known && last.proves():
		return last, false
	case i.trust == nil || i.trust.revision != applied:
		if known {
			return last, false
		}
		return outcome{}, false // what is applied is no longer here
	}
	i.tried = i.probe.try(i.trust, now)
	return i.tried, !known || i.tried.failure != last.failure
}

// backoff grows from a quarter of a second to half a minute, and is jittered over
// half of its length, so that agents which failed together do not return together.
// It stays within an eighth of what is left of the life of that which is to be
// replaced: a server that was away for long and is back is asked in time. What has
// expired already is no reason to hurry.
func backoff(failures int, left time.Duration) time.Duration {
	const first, longest = 250 * time.Millisecond, 30 * time.Second
	limit := longest
	if failures < 7 {
		limit = first << failures
	}
	if left > 0 {
		limit = min(limit, max(first, left/8))
	}
	return limit/2 + rand.N(limit/2)
}

// newSVID returns an SVID made of a chain that was issued for the key, if it is
// what was asked for.
func newSVID(key crypto.Signer, want func(spiffeid.ID) error, chain [][]byte, trusted *x509bundle.Bundle) (*x509svid.SVID, error) {
	if len(chain) == 0 {
		return nil, errors.New("agent: an SVID without a certificate")
	}
	var der []byte
	for _, each := range chain {
		der = append(der, each...)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	svid, err := x509svid.ParseRaw(der, pkcs8)
	if err != nil {
		return nil, fmt.Errorf("agent: the SVID issued: %w", err)
	}
	if err := want(svid.ID); err != nil {
		return nil, err
	}
	// A workload would be handed it and fail with its peers: find out here.
	_, chains, err := x509svid.Verify(svid.Certificates, trusted)
	if err != nil {
		return nil, fmt.Errorf("agent: the SVID issued: %w", err)
	}
	// By the authority's id it is decided when to replace it, and counted.
	signer := chains[0][1] // there is one: no leaf is its own authority
	if id, said := hex.EncodeToString(signer.SubjectKeyId), workload.LeafOf(svid).Authority; id != said {
		return nil, fmt.Errorf("agent: the SVID issued names authority %q and was signed by %q", said, id)
	}
	return svid, nil
}
