package policy

import (
	"hash/maphash"
	"maps"
	"slices"
)

// Assignments keeps the policy in force for each of many workloads current while
// workloads and policies come, change and go. W is what the caller knows a
// workload by: a pointer, or a UID. NewAssignments makes it. While one goroutine
// writes, no other may read or write: the caller sees to that.
//
// What a change costs depends on how many workloads it concerns, and hardly on how
// many there are.
type Assignments[W comparable] struct {
	set     *Set
	changed func(W)

	places      map[W]place[W]
	populations map[string]*population[W] // the workloads, by namespace
	seed        maphash.Seed
}

// place is where a workload is.
type place[W comparable] struct {
	group  *group[W]
	member int // its index there
}

// population is the workloads of one namespace.
type population[W comparable] struct {
	groups []signed[W]
	byHash map[uint64]*group[W] // the first that had the hash
}

// signed is a group beside its signature, so that to look for the groups that a
// policy may select touches no other memory.
type signed[W comparable] struct {
	signature uint64
	group     *group[W]
}

// group is the workloads that no policy tells apart: those of one namespace with
// the same labels and declared ports, like the pods of a ReplicaSet.
type group[W comparable] struct {
	workload  Workload
	hash      uint64
	index     int // in its population
	members   []W
	winner    *entry // of workload scope; may be nil
	effective *Effective
}

// NewAssignments returns Assignments without workloads or policies. changed is
// called by the method that writes, before it returns and when all is up to date,
// once for each workload whose Effective does not equal what it was before, or
// which had none. It may read the Assignments and must not write to it. It may be
// nil.
func NewAssignments[W comparable](rootNamespace string, changed func(W)) *Assignments[W] {
	if changed == nil {
		changed = func(W) {}
	}
	return &Assignments[W]{
		set:         NewSet(rootNamespace),
		changed:     changed,
		places:      make(map[W]place[W]),
		populations: make(map[string]*population[W]),
		seed:        maphash.MakeSeed(),
	}
}

// SetWorkload adds w, or says anew what it is. The Assignments keeps the labels
// and ports that it is given, which nobody changes from then on.
func (a *Assignments[W]) SetWorkload(w W, workload Workload) {
	old, there := a.places[w]
	if there && old.group.workload.equal(workload) {
		return
	}
	next := a.groupOf(workload)
	if there {
		a.leave(old)
	}
	a.places[w] = place[W]{group: next, member: len(next.members)}
	next.members = append(next.members, w)
	if !there || !next.effective.Equal(old.group.effective) {
		a.changed(w)
	}
}

// RemoveWorkload forgets w, if it is there. It does not call changed.
func (a *Assignments[W]) RemoveWorkload(w W) {
	if old, there := a.places[w]; there {
		a.leave(old)
		delete(a.places, w)
	}
}

// SetPolicy adds p, or replaces the policy of its name. The Assignments keeps
// p's maps, which nobody changes from then on.
func (a *Assignments[W]) SetPolicy(p PeerAuthentication) {
	a.update([]PeerAuthentication{p}, nil)
}

// RemovePolicy removes the policy that ref names, if it is there.
func (a *Assignments[W]) RemovePolicy(ref Ref) {
	a.update(nil, []Ref{ref})
}

// ReplacePolicies makes policies, of which no two have the same name, all that
// there are. It costs no more than the differences.
func (a *Assignments[W]) ReplacePolicies(policies []PeerAuthentication) {
	keep := make(map[Ref]bool, len(policies))
	for _, p := range policies {
		keep[p.Ref] = true
	}
	var gone []Ref
	for ref := range a.set.policies {
		if !keep[ref] {
			gone = append(gone, ref)
		}
	}
	a.update(policies, gone)
}

// Effective returns the policy in force for w, and nil if w is not there. It is
// shared and never changed.
func (a *Assignments[W]) Effective(w W) *Effective {
	place, ok := a.places[w]
	if !ok {
		return nil
	}
	return place.group.effective
}

// Explain says how the policy in force for w comes about, and false if w is not
// there.
func (a *Assignments[W]) Explain(w W) (Explanation, bool) {
	place, ok := a.places[w]
	if !ok {
		return Explanation{}, false
	}
	return a.set.Explain(place.group.workload), true
}

// update puts and deletes policies, and then decides again for the groups that
// these concern.
func (a *Assignments[W]) update(puts []PeerAuthentication, deletes []Ref) {
	var touched []*entry
	touch := func(e *entry) {
		if e != nil {
			touched = append(touched, e)
		}
	}
	for _, p := range puts {
		old := a.set.policies[p.Ref]
		if old != nil && old.equal(&p) {
			continue
		}
		touch(a.set.remove(p.Ref))
		touch(a.set.insert(p))
	}
	for _, ref := range deletes {
		touch(a.set.remove(ref))
	}
	before := a.set.effective
	a.set.compileFor(touched...)

	var changed []*group[W]
	if a.set.effective != before {
		for namespace := range a.populations {
			changed = a.renew(changed, namespace, touched)
		}
	} else {
		byNamespace := make(map[string][]*entry)
		for _, e := range touched {
			byNamespace[e.Namespace] = append(byNamespace[e.Namespace], e)
		}
		for namespace, touched := range byNamespace {
			changed = a.renew(changed, namespace, touched)
		}
	}
	for _, g := range changed {
		for _, w := range g.members {
			a.changed(w)
		}
	}
}

// renew decides again for the groups of a namespace, of which touched may concern
// some, and appends those whose policy changed.
func (a *Assignments[W]) renew(changed []*group[W], namespace string, touched []*entry) []*group[W] {
	population := a.populations[namespace]
	if population == nil {
		return changed
	}
	signatures, all := []uint64(nil), false
	for _, e := range touched {
		switch {
		case e.scope == WorkloadScope && e.Namespace == namespace:
			signatures = append(signatures, a.signature(e.Selector))
		case e.scope == MeshScope, e.scope == NamespaceScope && e.Namespace == namespace:
			all = true
		}
	}
	for _, s := range population.groups {
		selected := slices.ContainsFunc(signatures, func(signature uint64) bool {
			return s.signature&signature == signature
		})
		if !selected && !all {
			continue
		}
		g := s.group
		if selected {
			g.winner = a.set.winner(g.workload)
		}
		effective := a.set.inForce(namespace, g.winner)
		if !effective.Equal(g.effective) {
			changed = append(changed, g)
		}
		g.effective = effective
	}
	return changed
}

// groupOf returns a group that workload belongs to, and makes one if none is
// found.
func (a *Assignments[W]) groupOf(workload Workload) *group[W] {
	population := a.populations[workload.Namespace]
	if population == nil {
		population = newPopulation[W]()
		a.populations[workload.Namespace] = population
	}
	hash := a.hash(workload)
	first := population.byHash[hash]
	if first != nil && first.workload.equal(workload) {
		return first
	}
	g := &group[W]{
		workload: workload,
		hash:     hash,
		index:    len(population.groups),
		winner:   a.set.winner(workload),
	}
	g.effective = a.set.inForce(workload.Namespace, g.winner)
	if first == nil {
		// Of groups whose hash is the same by chance, only one is found again. The
		// others stay as small as they are.
		population.byHash[hash] = g
	}
	population.groups = append(population.groups, signed[W]{a.signature(workload.Labels), g})
	return g
}

// leave takes a workload out of its group, and drops the group that is empty
// then. The caller settles where the workload is afterwards.
func (a *Assignments[W]) leave(p place[W]) {
	g := p.group
	last := len(g.members) - 1
	if moved := g.members[last]; p.member != last {
		g.members[p.member] = moved
		a.places[moved] = p
	}
	clear(g.members[last:])
	if g.members = g.members[:last]; last > 0 {
		return
	}
	namespace := g.workload.Namespace
	if a.populations[namespace].drop(g); len(a.populations[namespace].groups) == 0 {
		delete(a.populations, namespace)
	}
}

func newPopulation[W comparable]() *population[W] {
	return &population[W]{byHash: make(map[uint64]*group[W])}
}

func (p *population[W]) drop(g *group[W]) {
	last := len(p.groups) - 1
	p.groups[g.index] = p.groups[last]
	p.groups[g.index].group.index = g.index
	p.groups[last] = signed[W]{}
	p.groups = p.groups[:last]

	if p.byHash[g.hash] == g {
		delete(p.byHash, g.hash)
	}
}

// hash is the same for equal workloads of a namespace, and hardly ever for others.
func (a *Assignments[W]) hash(w Workload) uint64 {
	var sum uint64
	for key, value := range w.Labels {
		sum += a.hashLabel(key, value)
	}
	for _, port := range w.ContainerPorts {
		sum = sum*31 + uint64(port)
	}
	return sum
}

// signature has one or two bits set for each label. Whoever has all labels of a
// selector has all bits of its signature.
func (a *Assignments[W]) signature(labels map[string]string) uint64 {
	var bits uint64
	for key, value := range labels {
		hash := a.hashLabel(key, value)
		bits |= 1<<(hash%64) | 1<<(hash>>8%64)
	}
	return bits
}

func (a *Assignments[W]) hashLabel(key, value string) uint64 {
	return maphash.Comparable(a.seed, label{key, value})
}

func (w Workload) equal(other Workload) bool {
	return w.Namespace == other.Namespace && maps.Equal(w.Labels, other.Labels) &&
		slices.Equal(w.ContainerPorts, other.ContainerPorts)
}
