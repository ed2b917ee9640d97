package ca

import (
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Propagation is what is known, at one moment, of the agents that verify by the
// bundle: which of them trust what, and what they hold. It is the evidence for
// changes of authorities, and comes from whoever listens to agents. The zero
// Propagation is no evidence, and every gate that needs some refuses it.
//
// All times are by the clock of the replica that received the reports.
type Propagation struct {
	// At is when the counts were put together. Evidence older than a minute
	// counts for nothing: agents come and go.
	At time.Time

	// Expected is how many agents should be running, whether anybody heard of
	// them or not. Each count of agents is of these.
	Expected int

	// Received, Applied and Proved are how many have the bundle of this Revision
	// or a later one, how many use it for all that they serve, and how many also
	// accepted a leaf under Authority and refused one under a root that nobody
	// trusts, through the code that verifies for workloads.
	Revision                  uint64
	Authority                 string // what [Set.Successor] returns for the Revision
	Received, Applied, Proved int
	// Waiting names those that did not prove it, the most important ones first;
	// at most MaxWaiting.
	Waiting []Waiting

	// Reporting is how many said what they hold, and Reported when the oldest of
	// these reports came in. Uses is their sum, by authority. An authority that
	// is not in it is one that they hold nothing under.
	Reporting int
	Reported  time.Time
	Uses      map[string]Use
}

// MaxWaiting is how many waiting agents a Propagation names at most.
const MaxWaiting = 20

// Waiting is an agent that has not proved what it is asked to.
type Waiting struct {
	Node  string
	Since time.Time
	// Lacks says in a word or two what is missing: "offline", "at revision 41".
	Lacks string
}

// Use is what agents hold under one authority.
type Use struct {
	SVIDs       int // unexpired ones, their own and those of their workloads
	Connections int // live ones that were authenticated by such an SVID, at either end
}

const (
	evidenceAge = time.Minute // how old evidence may be
	// maxSkew is how far the clocks of two replicas may be apart.
	maxSkew = 30 * time.Second
)

// check returns an error unless the evidence is whole and of this moment.
func (p Propagation) check(now time.Time) error {
	counts := []int{0, p.Proved, p.Applied, p.Received, p.Expected}
	switch {
	case p.At.IsZero():
		return errors.New("nothing is known of the agents")
	case !slices.IsSorted(counts), p.Reporting < 0, p.Reporting > p.Expected, len(p.Waiting) > MaxWaiting:
		return fmt.Errorf("what is known of the agents contradicts itself: %d expected, %d received, %d applied, %d proved, %d reporting, %d waiting",
			p.Expected, p.Received, p.Applied, p.Proved, p.Reporting, len(p.Waiting))
	case now.Sub(p.At) > evidenceAge:
		return fmt.Errorf("what is known of the agents is %v old", now.Sub(p.At).Round(time.Second))
	case p.At.Sub(now) > maxSkew:
		return fmt.Errorf("what is known of the agents is %v ahead of the clock", p.At.Sub(now).Round(time.Second))
	}
	return nil
}

// Published tells what is published: everywhere says of a trust anchor whether each
// place at which the bundle is published has it. A prepared authority counts as
// published since the first call that says so of its anchor, until one says that it is
// not. Whoever publishes calls it when a place changes, and when the bundle does.
func (i *Issuer) Published(everywhere func(anchor *x509.Certificate) bool) {
	state, _ := i.state.Load()
	before, _ := i.published.Load()
	now := time.Now()
	published := make(map[string]time.Time)
	for _, a := range state.set.Authorities {
		if a.State != Prepared || !everywhere(a.anchor()) {
			continue
		}
		if published[a.ID] = now; !before[a.ID].IsZero() {
			published[a.ID] = before[a.ID]
		}
	}
	if !maps.Equal(before, published) {
		i.published.Set(published)
	}
}

// Progress returns how many proved it, and who is waited for at the time given,
// in one line: "proved 1,997/2,000, waiting: node-17 offline 3m".
func (p Propagation) Progress(now time.Time) string {
	var b strings.Builder
	fmt.Fprintf(&b, "proved %s/%s", grouped(p.Proved), grouped(p.Expected))
	const named = 5
	for n, w := range p.Waiting[:min(len(p.Waiting), named)] {
		b.WriteString([]string{", waiting: ", ", "}[min(n, 1)])
		b.WriteString(w.text(now))
	}
	if more := p.Expected - p.Proved - named; len(p.Waiting) > 0 && more > 0 {
		fmt.Fprintf(&b, " and %s more", grouped(more))
	}
	return b.String()
}

// text returns who waits, for what and for how long at the time given.
func (w Waiting) text(now time.Time) string {
	text := w.Node + " " + w.Lacks
	if w.Since.IsZero() {
		return text
	}
	switch age := max(0, now.Sub(w.Since)); {
	case age < time.Minute:
		return fmt.Sprintf("%s %ds", text, age/time.Second)
	case age < time.Hour:
		return fmt.Sprintf("%s %dm", text, age/time.Minute)
	default:
		return fmt.Sprintf("%s %dh", text, age/time.Hour)
	}
}

// grouped writes 1997 as 1,997.
func grouped(n int) string {
	text := fmt.Sprint(n)
	for at := len(text) - 3; at > 0; at -= 3 {
		text = text[:at] + "," + text[at:]
	}
	return text
}
