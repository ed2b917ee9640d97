package main

import (
	"crypto/x509"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	trothv1 "troth.dev/troth/api/troth/v1"
)

// rotationPage is where operators read what to do; it has a heading for each
// obstacle.
const rotationPage = "docs/rotate-a-root.md"

// short is an ID as far as people read it.
func short(id string) string {
	const digits = 12
	return printable(id[:min(len(id), digits)])
}

// stateText names a state as operators write it.
func stateText(s trothv1.AuthorityState) string {
	switch s {
	case trothv1.AuthorityState_AUTHORITY_STATE_PREPARED:
		return "prepared"
	case trothv1.AuthorityState_AUTHORITY_STATE_ACTIVE:
		return "active"
	case trothv1.AuthorityState_AUTHORITY_STATE_OLD:
		return "old"
	case trothv1.AuthorityState_AUTHORITY_STATE_TAINTED:
		return "tainted"
	case trothv1.AuthorityState_AUTHORITY_STATE_REVOKED:
		return "revoked"
	default:
		return "unknown"
	}
}

// asOf is the moment that ages are computed against: when the server put together
// what it knows. Its clock and ours may differ.
func asOf(s *trothv1.AuthorityStatus) time.Time {
	if at := s.GetPropagation().GetKnownAt(); at != nil {
		return at.AsTime()
	}
	return time.Now()
}

// ageText is a length of time in its largest unit.
func ageText(age time.Duration) string {
	const day = 24 * time.Hour
	switch age = max(0, age); {
	case age < time.Minute:
		return fmt.Sprintf("%ds", age/time.Second)
	case age < time.Hour:
		return fmt.Sprintf("%dm", age/time.Minute)
	case age < 2*day:
		return fmt.Sprintf("%dh", age/time.Hour)
	default:
		return fmt.Sprintf("%dd", age/day)
	}
}

func timeText(t *timestamppb.Timestamp) string { return t.AsTime().UTC().Format(time.RFC3339) }

// grouped writes 1997 as 1,997.
func grouped(n uint32) string {
	text := strconv.FormatUint(uint64(n), 10)
	for at := len(text) - 3; at > 0; at -= 3 {
		text = text[:at] + "," + text[at:]
	}
	return text
}

// some spells a number of things.
func some(n uint32, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return grouped(n) + " " + thing + "s"
}

// waitingText says who is waited for, by name as far as most people read. The ages
// are as of known; a zero known leaves them out.
func waitingText(waiting []*trothv1.WaitingAgent, known time.Time, named int, all uint32) string {
	var b strings.Builder
	for n, w := range waiting[:min(len(waiting), named)] {
		if n > 0 {
			b.WriteString(", ")
		}
		b.WriteString(printable(w.GetNode() + " " + w.GetLacks()))
		if since := w.GetSince(); since != nil && !known.IsZero() {
			b.WriteString(" " + ageText(known.Sub(since.AsTime())))
		}
	}
	if left := int64(all) - int64(min(len(waiting), named)); len(waiting) > 0 && left > 0 {
		fmt.Fprintf(&b, " and %s more", grouped(uint32(min(left, math.MaxUint32))))
	}
	return b.String()
}

// provedText says how far agents are with trusting an authority:
// "proved 1,997/2,000 (99.85%), waiting: node-17 offline 3m".
func provedText(p *trothv1.AuthorityPropagation, id string, known time.Time, named int) string {
	switch {
	case p.GetKnownAt() == nil:
		return "nothing is known of the agents yet"
	case p.GetExpected() == 0:
		return "no agent is expected"
	case p.GetAuthorityId() != id:
		return "proved 0/" + grouped(p.GetExpected()) + ": nothing is known of it yet"
	}
	// Cut, not rounded: 100% is all of them.
	hundredths := uint64(p.GetProved()) * 10_000 / uint64(p.GetExpected())
	text := fmt.Sprintf("proved %s/%s (%d.%02d%%)", grouped(p.GetProved()), grouped(p.GetExpected()), hundredths/100, hundredths%100)
	if p.GetProved() >= p.GetExpected() {
		return text
	}
	if waiting := waitingText(p.GetWaiting(), known, named, p.GetExpected()-p.GetProved()); waiting != "" {
		text += ", waiting: " + waiting
	}
	return text
}

// heldText says what is left under an authority that is to go.
func heldText(a *trothv1.AuthorityRecord) string {
	return some(a.GetSvids(), "SVID") + " and " + some(a.GetConnections(), "connection") + " left under " + short(a.GetId())
}

// advice is what to do about an obstacle, in one sentence.
func advice(operation, obstacle string) string {
	switch obstacle {
	case "WRONG_STATE":
		return "Ask troth authority status for the next step: the state of the authority does not permit this one."
	case "LIFE_TOO_SHORT":
		return "Prepare again, which drops this one and makes another."
	case "UPSTREAM_UNCHANGED":
		return "Have the upstream issue another one, with a new key, to the files that the server reads."
	case "EVIDENCE_MISSING":
		return "See that agents run, that they reach a server, and that the server reaches its store: nothing is decided on silence."
	case "AGENTS_MISSING":
		return "Bring back the agents that are waited for, or delete the nodes that are gone: an agent proves it by itself within seconds."
	case "BUNDLE_UNPUBLISHED":
		return "Wait, or see why the server cannot publish the bundle: its log says so, and names the place."
	case "REPLICAS_MAY_SIGN":
		return "Wait: a replica that was stopped may still sign with it until then."
	case "SVIDS_LIVE":
		if operation == "activate" {
			return "Wait until they have expired."
		}
		return "Wait: agents replace what it signed, and when all of them report that they hold nothing under it, it need not expire."
	case "HELD_BY_AGENTS":
		return "Wait for agents to replace their SVIDs, and restart workloads that keep old connections open, or a callee that does not end them."
	case "HELD_ELSEWHERE":
		return "Wait until it has expired, or have whoever asked for it without an agent ask for another and connect anew."
	default:
		return "This troth does not know this obstacle: one as new as the server does."
	}
}

// adviceLink is where there is more about an obstacle.
func adviceLink(obstacle string) string {
	switch obstacle {
	case "WRONG_STATE", "LIFE_TOO_SHORT", "UPSTREAM_UNCHANGED", "EVIDENCE_MISSING", "AGENTS_MISSING",
		"BUNDLE_UNPUBLISHED", "REPLICAS_MAY_SIGN", "SVIDS_LIVE", "HELD_BY_AGENTS", "HELD_ELSEWHERE":
		return rotationPage + "#" + strings.ToLower(obstacle)
	default:
		return rotationPage
	}
}

// forceBreaks says what an operation breaks that is carried out against the
// evidence.
func forceBreaks(operation string) string {
	switch operation {
	case "activate":
		return "workloads refuse what it signs wherever agents do not trust it yet"
	case "taint":
		return "workloads refuse what the successor signs wherever agents do not trust it yet"
	case "revoke":
		return "whoever still holds an SVID under it is refused by everybody"
	default:
		return ""
	}
}

// obstacles prints what is in the way of a change, and what to do about each.
func (p *printer) obstacles(b *trothv1.Blocked, known time.Time) {
	for _, blocker := range b.GetBlockers() {
		p.line("  %s: %s", p.paint(red, printable(blocker.GetObstacle())), printable(blocker.GetDetail()))
		if until := blocker.GetUntil(); until != nil {
			p.line("    gone by %s, by waiting alone", timeText(until))
		}
		p.line("    %s (%s)", advice(b.GetOperation(), blocker.GetObstacle()), adviceLink(blocker.GetObstacle()))
	}
	if len(b.GetWaiting()) > 0 {
		p.line("  waiting for: %s", waitingText(b.GetWaiting(), known, len(b.GetWaiting()), 0))
	}
}

// authorities prints the table of authorities.
func (p *printer) authorities(s *trothv1.AuthorityStatus) {
	now := asOf(s)
	rows := [][]string{{"ID", "STATE", "AGE", "EXPIRES", "SVIDS", "CONNECTIONS", "CHANGED BY", "WHY"}}
	for _, a := range s.GetAuthorities() {
		since, expires := "?", "?"
		if certificate, err := x509.ParseCertificate(a.GetCertificate()); err == nil {
			since = ageText(now.Sub(certificate.NotBefore))
			expires = certificate.NotAfter.UTC().Format(time.RFC3339)
		}
		change := a.GetLastChange()
		if change != nil {
			since = ageText(now.Sub(change.GetAt().AsTime()))
		}
		rows = append(rows, []string{
			short(a.GetId()), stateText(a.GetState()), since, expires,
			grouped(a.GetSvids()), grouped(a.GetConnections()), change.GetActor(), whyText(change),
		})
	}
	p.grid(rows)
}

// whyText is the reason for a change, and that it was forced.
func whyText(c *trothv1.AuthorityChange) string {
	if c.GetForced() {
		return "FORCED: " + c.GetReason()
	}
	return c.GetReason()
}

// status prints all there is to know, and what to do.
func (p *printer) status(s *trothv1.AuthorityStatus) {
	p.line("trust domain %s, revision %d", printable(s.GetTrustDomain()), s.GetRevision())
	p.line("")
	p.authorities(s)

	known := asOf(s)
	p.heading("Agents")
	p.line("%s", agentsText(s.GetPropagation()))
	if id := s.GetPropagation().GetAuthorityId(); id != "" {
		p.line("%s: %s", short(id), provedText(s.GetPropagation(), id, known, len(s.GetPropagation().GetWaiting())))
	}

	p.heading("Next")
	idle := true
	for _, a := range s.GetAuthorities() {
		operation := nextOperation(a)
		if a.GetTaintPending() {
			idle = false
			p.line("%s is tainted as soon as its successor is active", short(a.GetId()))
		}
		if operation == "" {
			continue
		}
		idle = false
		if a.GetBlocked() == nil {
			p.line("%s %s: nothing is in the way: %s", operation, short(a.GetId()),
				p.paint(green, "troth authority "+operation+" "+short(a.GetId())))
			continue
		}
		p.line("%s %s: blocked", operation, short(a.GetId()))
		p.obstacles(a.GetBlocked(), known)
	}
	if idle {
		p.line("nothing is under way: troth authority rotate begins a rotation")
	}
	if overdue := s.GetOverdue(); overdue != nil {
		p.heading("Overdue")
		p.line("%s", p.paint(red, fmt.Sprintf("%s %s should have been done by now, and is blocked",
			printable(overdue.GetOperation()), short(overdue.GetAuthorityId()))))
		p.obstacles(overdue, known)
	}
}

// nextOperation is the next step of an authority's life, if it is somebody's to
// take.
func nextOperation(a *trothv1.AuthorityRecord) string {
	switch a.GetState() {
	case trothv1.AuthorityState_AUTHORITY_STATE_PREPARED:
		return "activate"
	case trothv1.AuthorityState_AUTHORITY_STATE_OLD, trothv1.AuthorityState_AUTHORITY_STATE_TAINTED:
		return "revoke"
	default:
		return ""
	}
}

// agentsText says how far agents are with the bundle.
func agentsText(p *trothv1.AuthorityPropagation) string {
	if p.GetKnownAt() == nil {
		return "nothing is known of the agents yet"
	}
	text := fmt.Sprintf("%s expected, as of %s", some(p.GetExpected(), "agent"), timeText(p.GetKnownAt()))
	if p.GetExpected() == 0 {
		return text
	}
	return fmt.Sprintf("%s: revision %d is received by %s and in use by %s; all that they hold is known of %s", text,
		p.GetRevision(), grouped(p.GetReceived()), grouped(p.GetApplied()), grouped(p.GetReporting()))
}

// history prints what became of authorities.
func (p *printer) history(changes []*trothv1.AuthorityChange) {
	if len(changes) == 0 {
		p.line("nothing has changed since the trust domain began")
		return
	}
	rows := [][]string{{"AT", "REVISION", "AUTHORITY", "OPERATION", "STATE", "BY", "WHY"}}
	for _, c := range changes {
		rows = append(rows, []string{
			timeText(c.GetAt()), strconv.FormatUint(c.GetRevision(), 10), short(c.GetAuthorityId()),
			c.GetOperation(), stateText(c.GetState()), c.GetActor(), whyText(c),
		})
	}
	p.grid(rows)
}

// became says what an operation has made of an authority, and what comes next.
func became(operation string, a *trothv1.AuthorityRecord) string {
	id := short(a.GetId())
	text := id + " is " + stateText(a.GetState())
	switch {
	case operation == "prepare" && a.GetState() == trothv1.AuthorityState_AUTHORITY_STATE_PREPARED:
		text += ": trusted, and signs nothing\nnext: troth authority activate --wait " + id
	case operation == "activate" && a.GetState() == trothv1.AuthorityState_AUTHORITY_STATE_ACTIVE:
		text += ", and signs from now on\nnext: troth authority status says when the one before it may go"
	case a.GetTaintPending():
		text += ", and is tainted as soon as its successor is active\nnext: troth authority status says what is in the way"
	case operation == "taint" && a.GetState() == trothv1.AuthorityState_AUTHORITY_STATE_TAINTED:
		if by := a.GetReissueBy(); by != nil {
			text += ", and what it signed is replaced by " + timeText(by)
		}
		text += "\nnext: troth authority revoke --wait " + id
	case a.GetState() == trothv1.AuthorityState_AUTHORITY_STATE_REVOKED:
		text += ": nobody trusts it any more"
	}
	return text
}
