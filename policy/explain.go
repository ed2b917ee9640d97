package policy

import (
	"fmt"
	"slices"
	"time"
)

// Explanation is why a policy is in force for a workload.
type Explanation struct {
	// Levels are mesh, namespace and workload, each overriding those before it.
	// A workload of the root namespace has the first only.
	Levels []Level `json:"levels"`
	// Ports is what the winner of the last level asks for ports, in ascending
	// order, also where it makes no difference.
	Ports []PortLevel `json:"ports,omitempty"`
	// Ignored is the policies of the root namespace that have a selector: they
	// concern nobody.
	Ignored   []Candidate `json:"ignored,omitempty"`
	Effective *Effective  `json:"effective"`
}

// Level is what one scope adds.
type Level struct {
	Scope Scope `json:"scope"`
	// Winner is the one policy of this scope that counts; nil if there is none.
	Winner *Candidate `json:"winner,omitempty"`
	// Shadowed is the others, in the order in which they would follow.
	Shadowed []Candidate `json:"shadowed,omitempty"`
	// Mode is in force after this level, and DecidedBy is the policy that it is
	// from: of this level or, where that inherits, of one before.
	Mode      Mode `json:"mode"`
	DecidedBy Ref  `json:"decidedBy,omitzero"`
}

// Candidate is a policy that is for a workload, or would be.
type Candidate struct {
	Policy  Ref       `json:"policy"`
	Created time.Time `json:"created,omitzero"`
	// Mode is what it asks for: UNSET to inherit, and STRICT if it has problems.
	Mode Mode `json:"mode"`
	// Ports is what it asks for ports, in ascending order.
	Ports    []PortMode `json:"ports,omitempty"`
	Problems []Problem  `json:"problems,omitempty"`
	// Why says why it does not count; empty for a winner.
	Why string `json:"why,omitempty"`
}

// PortLevel is what the winning policy of workload scope asks for one port.
type PortLevel struct {
	Port uint16 `json:"port"`
	Asks Mode   `json:"asks"` // UNSET for the workload's own mode
	Mode Mode   `json:"mode"` // in force
	// Undeclared says that the workload's containers declare ports, and not
	// this one.
	Undeclared bool `json:"undeclared,omitempty"`
}

// Explain says how what [Set.Resolve] returns for w comes about.
func (s *Set) Explain(w Workload) Explanation {
	explained := Explanation{
		Levels:    []Level{level(MeshScope, s.mesh, s.effective)},
		Ignored:   s.ignored(),
		Effective: s.Resolve(w),
	}
	if w.Namespace == s.root {
		return explained
	}

	var whole []*entry
	if ns := s.namespaces[w.Namespace]; ns != nil {
		whole = ns.whole
	}
	matching := s.matching(w)
	explained.Levels = append(explained.Levels,
		level(NamespaceScope, whole, s.inForce(w.Namespace, nil)),
		level(WorkloadScope, matching, explained.Effective))
	if len(matching) > 0 {
		for _, p := range matching[0].ports() {
			mode, _ := explained.Effective.At(p.Port)
			explained.Ports = append(explained.Ports, PortLevel{
				Port: p.Port, Asks: p.Mode, Mode: mode,
				Undeclared: len(w.ContainerPorts) > 0 && !slices.Contains(w.ContainerPorts, p.Port),
			})
		}
	}
	return explained
}

// level describes a scope by its policies, of which the first wins, and by what
// is in force after it.
func level(scope Scope, entries []*entry, after *Effective) Level {
	l := Level{Scope: scope, Mode: after.Mode, DecidedBy: after.DecidedBy}
	for i, e := range entries {
		c := candidate(e)
		if i == 0 {
			l.Winner = &c
			continue
		}
		c.Why = shadowedBecause(e, entries[0])
		l.Shadowed = append(l.Shadowed, c)
	}
	return l
}

// matching returns the policies of workload scope that are for w, in the order
// in which they win.
func (s *Set) matching(w Workload) []*entry {
	ns := s.namespaces[w.Namespace]
	if ns == nil || len(ns.selective) == 0 {
		return nil
	}
	var matching []*entry
	for key, value := range w.Labels {
		for _, e := range ns.selective[label{key, value}] {
			if e.selects(w.Labels) {
				matching = append(matching, e)
			}
		}
	}
	slices.SortFunc(matching, compareEntries)
	return matching
}

func (s *Set) ignored() []Candidate {
	var ignored []*entry
	for _, e := range s.policies {
		if e.scope == ignoredScope {
			ignored = append(ignored, e)
		}
	}
	slices.SortFunc(ignored, compareEntries)
	var candidates []Candidate
	for _, e := range ignored {
		c := candidate(e)
		c.Why = ignoredBecause
		candidates = append(candidates, c)
	}
	return candidates
}

func candidate(e *entry) Candidate {
	c := Candidate{Policy: e.Ref, Created: e.Created, Mode: e.says(), Problems: e.Problems}
	if e.scope == WorkloadScope {
		c.Ports = e.ports()
	}
	return c
}

const ignoredBecause = "a policy with a selector is ignored in the root namespace"

// shadowedBecause says why winner wins over e.
func shadowedBecause(e, winner *entry) string {
	switch {
	case e.Created.IsZero() && !winner.Created.IsZero():
		return fmt.Sprintf("%s exists already", winner.Ref)
	case e.Created.Equal(winner.Created):
		return fmt.Sprintf("%s is as old, and its name comes first", winner.Ref)
	default:
		return fmt.Sprintf("%s is older", winner.Ref)
	}
}
