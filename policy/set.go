package policy

import (
	"cmp"
	"slices"
)

// Workload is what policies know a workload by.
type Workload struct {
	Namespace string
	Labels    map[string]string
	// ContainerPorts is those that its containers declare. A policy holds for
	// undeclared ports too: they only matter to what is said to its author.
	ContainerPorts []uint16
}

// Scope is which workloads a policy is for.
type Scope string

// The scopes. A policy of a later one overrides those before it.
const (
	MeshScope      Scope = "mesh"      // in the root namespace, without a selector
	NamespaceScope Scope = "namespace" // in another namespace, without a selector
	WorkloadScope  Scope = "workload"  // in another namespace, with a selector
)

// ignoredScope is that of policies in the root namespace with a selector: they
// concern nobody, the workloads of the root namespace included.
const ignoredScope Scope = ""

// Set is the policies of a mesh. NewSet makes it. Any number of goroutines may
// read it while nobody writes.
type Set struct {
	root       string
	policies   map[Ref]*entry
	mesh       []*entry              // of mesh scope; the first wins
	effective  *Effective            // where only mesh scope decides
	namespaces map[string]*namespace // those that have policies, the root namespace apart
}

// namespace is the policies of one namespace, and what they make of the mesh's.
type namespace struct {
	whole     []*entry // of namespace scope; the first wins
	effective *Effective
	// selective has those of workload scope, each under one label of its selector,
	// in the order in which they win.
	selective map[label][]*entry
}

// entry is a policy in a Set. Its effective is replaced, never changed.
type entry struct {
	PeerAuthentication
	scope     Scope
	under     label      // where a namespace's selective has it
	effective *Effective // where it wins; of workload scope only
}

type label struct{ key, value string }

// NewSet returns the set of these policies. The root namespace is that whose
// policies are for the whole mesh. Of policies with the same name in the same
// namespace the last one counts.
func NewSet(rootNamespace string, policies ...PeerAuthentication) *Set {
	s := &Set{
		root:       rootNamespace,
		policies:   make(map[Ref]*entry, len(policies)),
		namespaces: make(map[string]*namespace),
	}
	for _, p := range policies {
		s.remove(p.Ref)
		s.insert(p)
	}
	s.compile()
	return s
}

// Put adds p, or replaces the policy of its name. The Set keeps p's maps.
func (s *Set) Put(p PeerAuthentication) {
	removed := s.remove(p.Ref)
	s.compileFor(removed, s.insert(p))
}

// Delete removes the policy that ref names, if it is there.
func (s *Set) Delete(ref Ref) {
	s.compileFor(s.remove(ref), nil)
}

// Resolve returns the policy in force for a workload: PERMISSIVE, unless a policy
// says otherwise. It allocates nothing.
func (s *Set) Resolve(w Workload) *Effective {
	return s.inForce(w.Namespace, s.winner(w))
}

// All returns the policies, ordered by namespace and name.
func (s *Set) All() []PeerAuthentication {
	all := make([]PeerAuthentication, 0, len(s.policies))
	for _, e := range s.policies {
		all = append(all, e.PeerAuthentication)
	}
	slices.SortFunc(all, func(p, q PeerAuthentication) int { return compareRefs(p.Ref, q.Ref) })
	return all
}

// winner returns the policy of workload scope that wins for w, or nil.
func (s *Set) winner(w Workload) *entry {
	ns := s.namespaces[w.Namespace]
	if ns == nil || len(ns.selective) == 0 {
		return nil
	}
	var winner *entry
	for key, value := range w.Labels {
		for _, e := range ns.selective[label{key, value}] {
			if winner != nil && winner.compare(&e.PeerAuthentication) < 0 {
				break
			}
			if e.selects(w.Labels) {
				winner = e
				break
			}
		}
	}
	return winner
}

// inForce returns what is in force in a namespace where winner wins.
func (s *Set) inForce(namespace string, winner *entry) *Effective {
	if winner != nil {
		return winner.effective
	}
	if ns := s.namespaces[namespace]; ns != nil {
		return ns.effective
	}
	return s.effective
}

// insert adds a policy that is not there, and leaves the rest to compileFor.
func (s *Set) insert(p PeerAuthentication) *entry {
	e := &entry{PeerAuthentication: p, scope: s.scopeOf(&p)}
	s.policies[p.Ref] = e
	switch e.scope {
	case MeshScope:
		s.mesh = insertSorted(s.mesh, e)
	case NamespaceScope:
		ns := s.namespace(p.Namespace)
		ns.whole = insertSorted(ns.whole, e)
	case WorkloadScope:
		ns := s.namespace(p.Namespace)
		e.under = ns.rarest(p.Selector)
		ns.selective[e.under] = insertSorted(ns.selective[e.under], e)
	}
	return e
}

// remove takes a policy out, if it is there, and leaves the rest to compileFor.
func (s *Set) remove(ref Ref) *entry {
	e := s.policies[ref]
	if e == nil {
		return nil
	}
	delete(s.policies, ref)
	ns := s.namespaces[ref.Namespace]
	switch e.scope {
	case MeshScope:
		s.mesh = removeSorted(s.mesh, e)
	case NamespaceScope:
		ns.whole = removeSorted(ns.whole, e)
	case WorkloadScope:
		if rest := removeSorted(ns.selective[e.under], e); len(rest) > 0 {
			ns.selective[e.under] = rest
		} else {
			delete(ns.selective, e.under)
		}
	}
	if ns != nil && len(ns.whole)+len(ns.selective) == 0 {
		delete(s.namespaces, ref.Namespace)
	}
	return e
}

func (s *Set) scopeOf(p *PeerAuthentication) Scope {
	root, selective := p.Namespace == s.root, len(p.Selector) > 0
	switch {
	case root && selective:
		return ignoredScope
	case root:
		return MeshScope
	case selective:
		return WorkloadScope
	default:
		return NamespaceScope
	}
}

func (s *Set) namespace(name string) *namespace {
	ns := s.namespaces[name]
	if ns == nil {
		ns = &namespace{effective: s.effective, selective: make(map[label][]*entry)}
		s.namespaces[name] = ns
	}
	return ns
}

// rarest returns the label of a selector that the fewest policies are found
// under, so that no label that many have, like a tier, gathers them all.
func (ns *namespace) rarest(selector map[string]string) label {
	var best label
	count := -1
	for key, value := range selector {
		l := label{key, value}
		n := len(ns.selective[l])
		if count < 0 || n < count || n == count && (l.key < best.key || l.key == best.key && l.value < best.value) {
			best, count = l, n
		}
	}
	return best
}

// compileFor brings up to date what depends on the entries, which were inserted
// or removed. They may be nil.
func (s *Set) compileFor(entries ...*entry) {
	compiled := make(map[string]bool)
	for _, e := range entries {
		switch {
		case e == nil:
		case e.scope == MeshScope:
			if s.compile() {
				return
			}
		case e.scope == NamespaceScope && !compiled[e.Namespace]:
			s.compileNamespace(s.namespaces[e.Namespace])
			compiled[e.Namespace] = true
		case e.scope == WorkloadScope:
			e.effective = e.over(s.inForce(e.Namespace, nil))
		}
	}
}

// compile brings everything up to date, unless mesh scope says what it said
// before: then it reports false.
func (s *Set) compile() bool {
	effective := &Effective{Mode: Permissive}
	if len(s.mesh) > 0 {
		effective = s.mesh[0].over(effective)
	}
	if effective.Equal(s.effective) {
		return false
	}
	s.effective = effective
	for _, ns := range s.namespaces {
		s.compileNamespace(ns)
	}
	return true
}

func (s *Set) compileNamespace(ns *namespace) {
	if ns == nil {
		return
	}
	ns.effective = s.effective
	if len(ns.whole) > 0 {
		ns.effective = ns.whole[0].over(s.effective)
	}
	for _, entries := range ns.selective {
		for _, e := range entries {
			e.effective = e.over(ns.effective)
		}
	}
}

// over returns what is in force where e overrides parent.
func (e *entry) over(parent *Effective) *Effective {
	next := &Effective{Mode: parent.Mode, DecidedBy: parent.DecidedBy}
	if mode := e.says(); mode != Unset {
		next.Mode, next.DecidedBy = mode, e.Ref
	}
	if e.scope == WorkloadScope {
		for _, p := range e.ports() {
			if p.Mode != Unset && p.Mode != next.Mode {
				next.Ports, next.PortsBy = append(next.Ports, p), e.Ref
			}
		}
	}
	if next.Equal(parent) {
		return parent
	}
	return next
}

func insertSorted(entries []*entry, e *entry) []*entry {
	i, _ := slices.BinarySearchFunc(entries, e, compareEntries)
	return slices.Insert(entries, i, e)
}

func removeSorted(entries []*entry, e *entry) []*entry {
	i, _ := slices.BinarySearchFunc(entries, e, compareEntries)
	return slices.Delete(entries, i, i+1)
}

func compareEntries(d, e *entry) int { return d.compare(&e.PeerAuthentication) }

func compareRefs(r, s Ref) int {
	return cmp.Or(cmp.Compare(r.Namespace, s.Namespace), cmp.Compare(r.Name, s.Name))
}
