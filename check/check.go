// Package check says whether a cluster is fit for Troth, and whether Troth is well in
// it: what `troth check` prints.
//
// [Collect] reads a cluster once, into a [Snapshot], and [Snapshot.Judge] makes a
// [Report] of it. Only Collect waits for anybody, so each of its reads has a deadline;
// the checks are functions of the snapshot and of nothing else. Nothing is written to
// the cluster: what has to be tried is tried as a dry run.
//
// What could not be read is no good news: each check that rests on it is Unknown and
// says why, and so is every check of an empty Snapshot. No check passes on what is
// merely absent.
//
// platform.go has the checks on the cluster, server.go and agent.go those on the two
// programs, trust.go those on authorities and bundles, traffic.go those on policies and
// pods, node.go those on a node's own files.
package check

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Page is the document with a section for each check, under its ID.
const Page = "docs/troubleshoot.md"

// Level is what a check comes to. The zero Level is Unknown.
type Level int

// The levels.
const (
	Unknown Level = iota // what the check rests on could not be read, or is not there
	Failure              // something does not work, or is not safe
	Warning              // it works, and something should be done
	Pass
)

// String returns "unknown", "failure", "warning" or "pass".
func (l Level) String() string {
	switch l {
	case Pass:
		return "pass"
	case Warning:
		return "warning"
	case Failure:
		return "failure"
	default:
		return "unknown"
	}
}

// MarshalJSON writes what String returns.
func (l Level) MarshalJSON() ([]byte, error) { return json.Marshal(l.String()) }

// Check is one thing that is looked at.
type Check struct {
	ID    string `json:"id"` // in words with hyphens between them; never changes its meaning
	Title string `json:"title"`
	Why   string `json:"why"` // it matters
	Do    string `json:"do"`  // what helps when it does not pass
}

// Docs returns where more is said about the check.
func (c Check) Docs() string { return Page + "#" + c.ID }

// Result is what one check has found.
type Result struct {
	Check

	Level Level  `json:"level"`
	Found string `json:"found"`
	// Expiring is whether a Warning is about time that runs out: if nobody does
	// anything, it becomes a Failure by itself.
	Expiring bool   `json:"expiring,omitempty"`
	Docs     string `json:"docs"`
}

// Report is the results of all checks, in the order of the document.
type Report struct {
	At      time.Time `json:"at"`
	Results []Result  `json:"results"`
}

// Count returns how many checks have come to a level.
func (r Report) Count(level Level) int {
	n := 0
	for _, result := range r.Results {
		if result.Level == level {
			n++
		}
	}
	return n
}

// Expiring reports whether time runs out for something.
func (r Report) Expiring() bool {
	return slices.ContainsFunc(r.Results, func(result Result) bool { return result.Expiring })
}

// Checks returns all checks there are, those of a node's own files among them, in the
// order of the document.
func Checks() []Check {
	var all []Check
	for _, d := range definitions() {
		all = append(all, d.Check)
	}
	return all
}

// Judge runs the checks that are of use for how s was collected: before an
// installation or after, and with or without a node's own files. It neither blocks nor
// fails.
func (s *Snapshot) Judge() Report {
	report := Report{At: s.At}
	for _, d := range definitions() {
		switch {
		case s.Before && d.when == after, !s.Before && d.when == before, d.when == onNode && !s.OnNode:
			continue
		}
		f := d.run(s)
		report.Results = append(report.Results, Result{
			Check: d.Check, Level: f.level, Found: f.text, Expiring: f.expiring, Docs: d.Docs(),
		})
	}
	return report
}

// definition is a check and what it does.
type definition struct {
	Check

	when when
	run  func(*Snapshot) finding
}

// when is when a check is of use.
type when int

const (
	always when = iota + 1
	before      // an installation
	after       // it
	onNode      // and only on a node
)

func definitions() []definition {
	return slices.Concat(platformChecks(), serverChecks(), agentChecks(), trustChecks(), trafficChecks(), nodeChecks())
}

// finding is what a check comes to. The zero finding is Unknown.
type finding struct {
	level    Level
	text     string
	expiring bool
}

func pass(format string, args ...any) finding {
	return finding{level: Pass, text: fmt.Sprintf(format, args...)}
}

func warn(format string, args ...any) finding {
	return finding{level: Warning, text: fmt.Sprintf(format, args...)}
}

func fail(format string, args ...any) finding {
	return finding{level: Failure, text: fmt.Sprintf(format, args...)}
}

func unknown(format string, args ...any) finding {
	return finding{level: Unknown, text: fmt.Sprintf(format, args...)}
}

// expires is a warning about time that runs out.
func expires(format string, args ...any) finding {
	f := warn(format, args...)
	f.expiring = true
	return f
}

// with hands what is known to judge, and is Unknown if it is not known.
func with[T any](f Fact[T], judge func(T) finding) finding {
	value, err := f.Get()
	if err != nil {
		return unknown("not known: %v", err)
	}
	return judge(value)
}

// with2 is with, for a check that rests on two facts.
func with2[A, B any](a Fact[A], b Fact[B], judge func(A, B) finding) finding {
	return with(a, func(one A) finding {
		return with(b, func(two B) finding { return judge(one, two) })
	})
}

// some names a few of many.
func some(names []string) string {
	const most = 5
	names = slices.Sorted(slices.Values(names))
	if more := len(names) - most; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), more)
	}
	return strings.Join(names, ", ")
}

// count spells a number of things.
func count(n int, thing string) string {
	switch {
	case n == 1:
		return "1 " + thing
	case strings.HasSuffix(thing, "y"):
		return fmt.Sprintf("%d %sies", n, strings.TrimSuffix(thing, "y"))
	default:
		return fmt.Sprintf("%d %ss", n, thing)
	}
}

// span spells a length of time in its largest unit.
func span(d time.Duration) string {
	const day = 24 * time.Hour
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 2*day:
		return fmt.Sprintf("%dh", d/time.Hour)
	default:
		return fmt.Sprintf("%dd", d/day)
	}
}
