package agent

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"troth.dev/troth/agent/workload"
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
}

// identities is what the agent holds: the node's pods, one SVID for each
// identity among them, and the trust bundles. It is the Workload API's source.
type identities struct {
	trustDomain spiffeid.TrustDomain
	// changed tells that there may be something to do or to report.
	changed latest.Value[struct{}]

	mu        sync.Mutex
	revision  string                   // of the pods; guarded by mu, as is all below
	synced    bool                     // whether the control plane has told of the pods
	pods      map[string]pod           // by UID
	held      map[spiffeid.ID]*holding // one for each identity of the pods
	bundles   []workload.Bundle        // immutable once set; the own trust domain's first
	followers map[string]*follower     // by pod UID
}

// holding is one identity and how its SVID is coming along.
type holding struct {
	svid      *x509svid.SVID // nil before the first
	authority string         // who signed it
	due       time.Time      // when to ask for the next
	failures  int            // since the last success
}

// follower is a pod in whose state somebody is interested.
type follower struct {
	state  latest.Value[workload.State]
	policy latest.Value[*policy.Effective]
	count  int
}

func newIdentities(td spiffeid.TrustDomain) *identities {
	return &identities{
		trustDomain: td,
		pods:        make(map[string]pod),
		held:        make(map[spiffeid.ID]*holding),
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

// publish brings every follower up to date. The caller holds mu.
func (i *identities) publish() {
	for uid, f := range i.followers {
		f.state.Set(i.state(uid))
		// Whoever follows the policy decides on all its connections again.
		if old, _ := f.policy.Load(); !old.Equal(i.pods[uid].policy) {
			f.policy.Set(i.pods[uid].policy)
		}
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

// setBundle replaces the own trust domain's bundle. It refuses one that is older
// than what it holds.
func (i *identities) setBundle(bundle *x509bundle.Bundle, revision uint64) error {
	if bundle.TrustDomain() != i.trustDomain || bundle.Empty() {
		return fmt.Errorf("agent: a bundle of trust domain %q with %d authorities", bundle.TrustDomain(), len(bundle.X509Authorities()))
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if len(i.bundles) > 0 && revision < i.bundles[0].Revision {
		return fmt.Errorf("agent: bundle revision %d is older than %d, which is here", revision, i.bundles[0].Revision)
	}
	i.bundles = []workload.Bundle{{Bundle: bundle, Revision: revision}}
	i.publish()
	return nil
}

// bundle returns the own trust domain's bundle, or nil before the first.
func (i *identities) bundle() (bundle *x509bundle.Bundle, revision uint64) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if len(i.bundles) == 0 {
		return nil, 0
	}
	return i.bundles[0].Bundle, i.bundles[0].Revision
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
		h := i.held[p.id]
		switch {
		case asked[p.id]:
		case h.due.After(now):
			if h.due.Before(next) {
				next = h.due
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

// put stores a new SVID. The old one serves until this moment.
func (i *identities) put(svid *x509svid.SVID, authority string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	h := i.held[svid.ID]
	if h == nil {
		return // its pods went while it was issued
	}
	h.svid, h.authority, h.failures = svid, authority, 0
	h.due = refreshAt(svid, time.Now())
	i.publish()
}

// failed puts the next attempt off, for longer each time, and at least for as
// long as the server asked.
func (i *identities) failed(id spiffeid.ID, now time.Time, retryAfter time.Duration) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if h := i.held[id]; h != nil {
		h.failures++
		left := time.Duration(math.MaxInt64)
		if h.svid != nil {
			left = h.svid.Certificates[0].NotAfter.Sub(now)
		}
		h.due = now.Add(max(retryAfter, backoff(h.failures, left)))
	}
}

// left returns how long the SVID that expires first still lives, and the longest of
// times if none is held.
func (i *identities) left(now time.Time) time.Duration {
	if end := i.summary().earliestExpiry; !end.IsZero() {
		return end.Sub(now)
	}
	return math.MaxInt64
}

func (i *identities) inSync() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.synced
}

// summary is what the agent reports about itself.
type summary struct {
	workloadsRevision string
	bundleRevision    uint64
	byAuthority       map[string]uint32
	earliestExpiry    time.Time // zero if no SVID is held
}

func (i *identities) summary() summary {
	i.mu.Lock()
	defer i.mu.Unlock()
	s := summary{workloadsRevision: i.revision, byAuthority: make(map[string]uint32)}
	if len(i.bundles) > 0 {
		s.bundleRevision = i.bundles[0].Revision
	}
	for _, h := range i.held {
		if h.svid == nil {
			continue
		}
		s.byAuthority[h.authority]++
		if end := h.svid.Certificates[0].NotAfter; s.earliestExpiry.IsZero() || end.Before(s.earliestExpiry) {
			s.earliestExpiry = end
		}
	}
	return s
}

// refreshAt is when half to three quarters of what is left of the SVID's life at
// the time now has passed, at a fraction that depends on its serial number alone:
// SVIDs that were issued together are not renewed together.
func refreshAt(svid *x509svid.SVID, now time.Time) time.Time {
	leaf := svid.Certificates[0]
	left := leaf.NotAfter.Sub(now)
	sum := sha256.Sum256(leaf.SerialNumber.Bytes())
	fraction := float64(binary.BigEndian.Uint32(sum[:4])) / (1 << 32)
	return now.Add(left/2 + time.Duration(fraction*float64(left/4)))
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
	if _, _, err := x509svid.Verify(svid.Certificates, trusted); err != nil {
		return nil, fmt.Errorf("agent: the SVID issued: %w", err)
	}
	return svid, nil
}
