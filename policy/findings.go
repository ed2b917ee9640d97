package policy

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Finding is what the author of a policy should know about it.
type Finding struct {
	Code    FindingCode `json:"code"`
	Message string      `json:"message"`
}

// FindingCode is what a finding is about. Codes never change meaning.
type FindingCode string

// What a policy's author should know, the most important first.
const (
	// Invalid says what the problems are, and that the policy is STRICT until
	// they are mended.
	Invalid FindingCode = "INVALID"
	// SelectorInRootNamespace says that the policy concerns nobody.
	SelectorInRootNamespace FindingCode = "SELECTOR_IN_ROOT_NAMESPACE"
	// Shadowed says which other policies win, and for how many workloads if it
	// is of workload scope.
	Shadowed FindingCode = "SHADOWED"
	// SelectsNothing says that no workload has the labels of the selector.
	SelectsNothing FindingCode = "SELECTS_NOTHING"
	// PortNotDeclared says that all workloads that are selected declare ports,
	// and none of them this one: perhaps it is the port of a Service.
	PortNotDeclared FindingCode = "PORT_NOT_DECLARED"
)

// Findings returns what is to be said about each policy of a namespace, the most
// important first. A policy of which nothing is to be said has an empty slice.
func (a *Assignments[W]) Findings(namespace string) map[Ref][]Finding {
	findings := make(map[Ref][]Finding)
	selections := a.selections(namespace)
	for ref, e := range a.set.policies {
		if ref.Namespace != namespace {
			continue
		}
		found := []Finding{}
		if len(e.Problems) > 0 {
			found = append(found, e.invalid())
		}
		switch e.scope {
		case ignoredScope:
			found = append(found, Finding{SelectorInRootNamespace, ignoredBecause})
		case MeshScope:
			found = append(found, e.shadowedBy(a.set.mesh[0])...)
		case NamespaceScope:
			found = append(found, e.shadowedBy(a.set.namespaces[namespace].whole[0])...)
		case WorkloadScope:
			found = append(found, selections[e].findings(e)...)
		}
		findings[ref] = found
	}
	return findings
}

func (e *entry) invalid() Finding {
	problems := make([]string, len(e.Problems))
	for i, problem := range e.Problems {
		problems[i] = problem.String()
	}
	message := "not valid: " + strings.Join(problems, "; ")
	if e.scope != ignoredScope {
		message = "STRICT for what it selects, because it is " + message
	}
	return Finding{Invalid, message}
}

// shadowedBy is for the scopes of which one policy wins for all.
func (e *entry) shadowedBy(winner *entry) []Finding {
	if e == winner {
		return nil
	}
	return []Finding{{Shadowed, fmt.Sprintf("not in force: %s", shadowedBecause(e, winner))}}
}

// selection is what a policy of workload scope selects.
type selection struct {
	workloads int
	others    map[*entry]int // who wins instead, for how many
	declared  map[uint16]bool
	silent    bool // some declare no port
}

// selections returns what the policies of a namespace select, those that select
// something.
func (a *Assignments[W]) selections(namespace string) map[*entry]*selection {
	selections := make(map[*entry]*selection)
	population := a.populations[namespace]
	if population == nil {
		return selections
	}
	for _, s := range population.groups {
		g := s.group
		for _, e := range a.set.matching(g.workload) {
			selected := selections[e]
			if selected == nil {
				selected = &selection{others: make(map[*entry]int), declared: make(map[uint16]bool)}
				selections[e] = selected
			}
			selected.workloads += len(g.members)
			if e != g.winner {
				selected.others[g.winner] += len(g.members)
			}
			selected.silent = selected.silent || len(g.workload.ContainerPorts) == 0
			for _, port := range g.workload.ContainerPorts {
				selected.declared[port] = true
			}
		}
	}
	return selections
}

// findings returns what is to be said about e, which selects s. Nil is nothing.
func (s *selection) findings(e *entry) []Finding {
	if s == nil {
		return []Finding{{SelectsNothing, fmt.Sprintf("no workload of namespace %s has the labels of its selector", e.Namespace)}}
	}
	var found []Finding
	if len(s.others) > 0 {
		found = append(found, s.shadowed(e))
	}
	for _, p := range e.ports() {
		if !s.silent && !s.declared[p.Port] {
			found = append(found, Finding{PortNotDeclared, fmt.Sprintf(
				"no container that it selects declares port %d: ports are those of containers, not of Services", p.Port)})
		}
	}
	return found
}

func (s *selection) shadowed(e *entry) Finding {
	shadowed, who, names := 0, "older policies", []string(nil)
	for _, other := range slices.SortedFunc(maps.Keys(s.others), compareEntries) {
		if other.Created.Equal(e.Created) {
			who = "others"
		}
		shadowed += s.others[other]
		names = append(names, other.Ref.String())
	}
	const most = 5
	if more := len(names) - most; more > 0 {
		names = append(names[:most], fmt.Sprintf("%d more", more))
	}
	return Finding{Shadowed, fmt.Sprintf("not in force for %d of the %d workloads that it selects: %s win, %s",
		shadowed, s.workloads, who, strings.Join(names, ", "))}
}
