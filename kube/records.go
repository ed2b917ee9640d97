package kube

import (
	"cmp"
	"maps"
	"slices"
	"sync"
	"time"

	"troth.dev/troth/identity"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/kube/directory"
	"troth.dev/troth/policy"
)

// records is what the watches have brought: the pods, each joined to its service
// account, its node and the policy in force for it. The watches run independently
// of each other, so a pod may be here before its service account or its node is.
type records struct {
	synced    chan struct{}    // closed once every resource has been listed
	directory *directory.Index // told of each change of a pod; has a lock of its own, taken after mu

	mu       sync.RWMutex
	unlisted map[string]bool                    // guarded by mu; by resource
	pods     map[string]*record                 // guarded by mu; by UID
	accounts map[identity.ServiceAccount]*group // guarded by mu
	nodes    map[string]*group                  // guarded by mu; by name
	followed map[string]*follower               // guarded by mu; by UID of the pod
	stale    map[*group]bool                    // guarded by mu; nodes whose value is to be renewed
	policies *policy.Assignments[*record]       // guarded by mu; to the pods that have not finished
	reports  *reports                           // guarded by mu; nil if nobody reports
}

// The resources that are watched.
const (
	podResource     = "pods"
	accountResource = "serviceaccounts"
	nodeResource    = "nodes"
	policyResource  = "peerauthentications"
	serviceResource = "services"
	sliceResource   = "endpointslices"
)

// record is one pod. Its groups know the two UIDs that pod lacks.
type record struct {
	pod     identity.Pod
	account *group
	node    *group            // nil before the pod is scheduled
	policy  *policy.Effective // nil once the pod has finished
}

// group is a service account or a node, and its pods. It is here while there is
// such an object, a pod that names it, or somebody who holds its value.
type group struct {
	uid  string // empty while there is no such object
	pods map[*record]bool

	// Of a node that somebody looks at.
	value   *latest.Value[[]policy.Assignment]
	holders int
	expiry  time.Time // when the first grace among the value's pods ends; zero if none runs
}

// follower tells those who wait for a pod of its changes. It turns true when the
// pod is gone, and stays so: a UID never comes back.
type follower struct {
	gone    latest.Value[bool]
	waiting int
}

func newRecords(rootNamespace string, c directory.Config) *records {
	r := &records{
		synced:    make(chan struct{}),
		directory: directory.New(c),
		unlisted: map[string]bool{
			podResource: true, accountResource: true, nodeResource: true, policyResource: true, serviceResource: true, sliceResource: true,
		},
		pods:     make(map[string]*record),
		accounts: make(map[identity.ServiceAccount]*group),
		nodes:    make(map[string]*group),
		followed: make(map[string]*follower),
		stale:    make(map[*group]bool),
	}
	r.policies = policy.NewAssignments(rootNamespace, func(record *record) {
		record.policy = r.policies.Effective(record)
		r.directory.SetPod(time.Now(), record.pod, record.policy)
		r.outdate(record)
	})
	return r
}

// complete returns the pod with that UID if its service account is known, and,
// if it is scheduled, its node.
func (r *records) complete(uid string) (identity.Pod, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	record := r.pods[uid]
	if record == nil || record.account.uid == "" || record.node != nil && record.node.uid == "" {
		return identity.Pod{}, false
	}
	return record.joined(), true
}

// uids returns the UIDs of a pod's service account and node, or empty ones.
func (r *records) uids(account identity.ServiceAccount, node string) (accountUID, nodeUID string) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if g := r.accounts[account]; g != nil {
		accountUID = g.uid
	}
	if g := r.nodes[node]; g != nil {
		nodeUID = g.uid
	}
	return accountUID, nodeUID
}

// follow returns a value that is set whenever the pod with that UID changes, and
// true once it is gone. The caller calls done.
func (r *records) follow(uid string) (gone *latest.Value[bool], done func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f := r.followed[uid]
	if f == nil {
		f = new(follower)
		r.followed[uid] = f
	}
	f.waiting++
	return &f.gone, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if f.waiting--; f.waiting == 0 {
			delete(r.followed, uid)
		}
	}
}

// onNode is [Pods.OnNode].
func (r *records) onNode(name string) (value *latest.Value[[]policy.Assignment], release func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	g := groupOf(r.nodes, name)
	if g.value == nil {
		g.value = new(latest.Value[[]policy.Assignment])
		r.stale[g] = true
		r.renew(time.Now())
	}
	g.holders++
	return g.value, sync.OnceFunc(func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if g.holders--; g.holders == 0 {
			g.value = nil
			delete(r.stale, g)
			dropIdle(r.nodes, name)
		}
	})
}

// of is [Pods.Of].
func (r *records) of(account identity.ServiceAccount, now time.Time, yield func(identity.Pod)) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	g := r.accounts[account]
	if g == nil {
		return
	}
	for record := range g.pods {
		if record.pod.Live(now) == nil {
			yield(record.joined())
		}
	}
}

// occupied is [Pods.Occupied].
func (r *records) occupied(node string, now time.Time) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if g := r.nodes[node]; g != nil {
		for record := range g.pods {
			if record.pod.Live(now) == nil {
				return true
			}
		}
	}
	return false
}

// expire renews the values that have a pod whose grace has ended.
func (r *records) expire(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, g := range r.nodes {
		if g.value != nil && !g.expiry.IsZero() && !now.Before(g.expiry) {
			r.stale[g] = true
		}
	}
	r.renew(now)
}

// change runs f, which may call the methods below, and then renews the values
// that it made stale: once, however much f changed. Whoever sees that the last
// list is here finds every value there.
func (r *records) change(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
	r.renew(time.Now())
	if len(r.unlisted) > 0 {
		return
	}
	select {
	case <-r.synced:
	default:
		close(r.synced)
	}
}

// listed notes that all there was of a resource is here.
func (r *records) listed(resource string) { delete(r.unlisted, resource) }

func (r *records) setPod(pod identity.Pod) {
	known := r.pods[pod.UID]
	if known != nil {
		if equal(known.pod, pod) {
			return // most updates of a pod are none of ours: conditions, readiness, restarts
		}
		r.unlink(known)
	} else {
		known = new(record)
		r.pods[pod.UID] = known
	}
	known.pod, known.account, known.node = pod, groupOf(r.accounts, pod.Account()), nil
	known.account.pods[known] = true
	if pod.Node.Name != "" {
		known.node = groupOf(r.nodes, pod.Node.Name)
		known.node.pods[known] = true
	}
	if pod.Phase == identity.PodPending || pod.Phase == identity.PodRunning {
		r.policies.SetWorkload(known, policy.Workload{
			Namespace: pod.Namespace, Labels: pod.Labels, ContainerPorts: pod.ContainerPorts,
		})
	} else {
		r.policies.RemoveWorkload(known)
		known.policy = nil
	}
	r.directory.SetPod(time.Now(), pod, known.policy)
	r.reports.touch(pod.Namespace)
	r.changed(known)
}

func (r *records) removePod(uid string) {
	record := r.pods[uid]
	if record == nil {
		return
	}
	r.unlink(record)
	delete(r.pods, uid)
	r.policies.RemoveWorkload(record)
	r.directory.RemovePod(time.Now(), uid)
	r.reports.touch(record.pod.Namespace)
	if f := r.followed[uid]; f != nil {
		f.gone.Set(true)
	}
}

// unlink takes a record out of its groups.
func (r *records) unlink(record *record) {
	r.changed(record)
	delete(record.account.pods, record)
	dropIdle(r.accounts, record.pod.Account())
	if record.node != nil {
		delete(record.node.pods, record)
		dropIdle(r.nodes, record.pod.Node.Name)
	}
}

func (r *records) setAccount(name identity.ServiceAccount, uid string) {
	r.setUID(groupOf(r.accounts, name), uid)
}

func (r *records) setNode(name, uid string) {
	r.setUID(groupOf(r.nodes, name), uid)
}

// removeAccount forgets a service account, unless another of its name has taken
// its place.
func (r *records) removeAccount(name identity.ServiceAccount, uid string) {
	if g := r.accounts[name]; g != nil && g.uid == uid {
		r.setUID(g, "")
		dropIdle(r.accounts, name)
	}
}

// removeNode forgets a node, unless another of its name has taken its place.
func (r *records) removeNode(name, uid string) {
	if g := r.nodes[name]; g != nil && g.uid == uid {
		r.setUID(g, "")
		dropIdle(r.nodes, name)
	}
}

func (r *records) setUID(g *group, uid string) {
	if g.uid == uid {
		return
	}
	g.uid = uid
	for record := range g.pods {
		r.changed(record)
	}
}

// changed tells those whom a pod's change concerns.
func (r *records) changed(record *record) {
	r.outdate(record)
	if f := r.followed[record.pod.UID]; f != nil {
		f.gone.Set(false)
	}
}

// outdate makes the value of a pod's node stale.
func (r *records) outdate(record *record) {
	if record.node != nil && record.node.value != nil {
		r.stale[record.node] = true
	}
}

// renew brings the stale values up to date, and wakes whoever waits for one if
// it became another. Half a list is no value: before all lists are here, it does
// nothing.
func (r *records) renew(now time.Time) {
	if len(r.unlisted) != 0 {
		return
	}
	for g := range r.stale {
		delete(r.stale, g)
		renewed := g.live(now)
		if current, _ := g.value.Load(); current == nil || !slices.EqualFunc(current, renewed, same) {
			g.value.Set(renewed)
		}
	}
}

// live returns the group's live pods by UID, never nil, and notes when the next
// of them ends.
func (g *group) live(now time.Time) []policy.Assignment {
	live := make([]policy.Assignment, 0, len(g.pods))
	g.expiry = time.Time{}
	for record := range g.pods {
		if record.pod.Live(now) != nil {
			continue
		}
		live = append(live, policy.Assignment{Pod: record.joined(), Policy: record.policy})
		if end := record.pod.DeletedAt; !end.IsZero() && (g.expiry.IsZero() || end.Before(g.expiry)) {
			g.expiry = end
		}
	}
	slices.SortFunc(live, func(a, b policy.Assignment) int { return cmp.Compare(a.Pod.UID, b.Pod.UID) })
	return live
}

// joined returns the record's pod with the UIDs of its service account and node.
func (r *record) joined() identity.Pod {
	pod := r.pod
	pod.ServiceAccountUID = r.account.uid
	if r.node != nil {
		pod.Node.UID = r.node.uid
	}
	return pod
}

// groupOf returns the group of that name, which it makes if there is none.
func groupOf[K comparable](groups map[K]*group, name K) *group {
	g := groups[name]
	if g == nil {
		g = &group{pods: make(map[*record]bool)}
		groups[name] = g
	}
	return g
}

// dropIdle drops the group of that name if nothing needs it.
func dropIdle[K comparable](groups map[K]*group, name K) {
	if g := groups[name]; g != nil && g.uid == "" && len(g.pods) == 0 && g.holders == 0 {
		delete(groups, name)
	}
}

// same reports whether a node would do the same with both.
func same(a, b policy.Assignment) bool {
	return equal(a.Pod, b.Pod) && a.Policy.Equal(b.Policy)
}

func equal(a, b identity.Pod) bool {
	return a.PodReference == b.PodReference &&
		a.ServiceAccount == b.ServiceAccount &&
		a.ServiceAccountUID == b.ServiceAccountUID &&
		a.Node == b.Node &&
		a.Phase == b.Phase &&
		a.DeletedAt.Equal(b.DeletedAt) &&
		a.HostNetwork == b.HostNetwork &&
		a.HBONE == b.HBONE &&
		slices.Equal(a.Addresses, b.Addresses) &&
		slices.Equal(a.ContainerPorts, b.ContainerPorts) &&
		slices.Equal(a.CertificateSigners, b.CertificateSigners) &&
		maps.Equal(a.Labels, b.Labels)
}
