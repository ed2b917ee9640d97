package main

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	trothv1 "troth.dev/troth/api/troth/v1"
)

// A rotation is what it is by the state of the authorities on the server, and
// nothing else is remembered of it: whoever starts it again, here or elsewhere, goes
// on with it, and the server's schedule may be first with each step.

func authorityRotateCommand() *cobra.Command {
	var f authorityFlags
	var o order
	var taint bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "rotate",
		Short: "Replace the active authority, from preparing another to revoking the old one",
		Long: `Replace the active authority: prepare another, activate it once every agent has
proved that it trusts it, and revoke the old one once nothing depends on it. What is
under way already is gone on with: an authority that is prepared, or an old one that
is yet to be revoked.

It may be interrupted at every moment, and started again. Nothing that is trusted is
lost by it, and the server's schedule may be first with each step.

With --taint the active authority is tainted, as one whose key somebody may have: it
is replaced as soon as all agents trust another, and what it signed is replaced at
once.

The JSON is an object on each line: "at", "event" (begin, progress, change,
disconnected, connected, interrupted, blocked or done), "message", and the
AuthorityStatus of the protocol as "status".`,
		Args: inputArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkTimeout(cmd, timeout); err != nil {
				return err
			}
			a, err := f.dial(cmd)
			if err != nil {
				return err
			}
			defer a.close()
			report := f.reporter(cmd.OutOrStdout())
			s, err := a.status(cmd.Context())
			if err != nil {
				return err
			}
			operation, id := begin(s, taint)
			report.event("begin", beginText(s, operation, id), s)
			if operation != "" {
				if _, err := a.change(cmd.Context(), operation, order{id: id, reason: o.reason}); err != nil {
					return err
				}
				before := s
				if s, err = a.status(cmd.Context()); err != nil {
					return err
				}
				report.changes(before, s)
			}
			to := target(s)
			last, err := a.drive(cmd.Context(), s, drive{
				order: o, timeout: timeout, report: report,
				next: func(s *trothv1.AuthorityStatus) (rotateStep, error) { return next(s, to) },
			})
			switch refused := (*refusedError)(nil); {
			case err == nil:
				report.event("done", short(to)+" signs, and what was before it is revoked", last)
				return nil
			case errors.Is(err, errInterrupted):
				report.event("interrupted", standsText(last, to), last)
			case errors.As(err, &refused):
				report.event("blocked", standsText(last, to), last)
			}
			return err
		},
	}
	f.flags(cmd)
	reasonFlag(cmd, &o)
	cmd.Flags().BoolVar(&taint, "taint", false, "taint the active authority: what it signed is replaced at once")
	timeoutFlag(cmd, &timeout)
	return cmd
}

// rotateStep is what comes next: something to do, something to wait for, or neither, in
// the end.
type rotateStep struct {
	do     string // the operation
	id     string // of the authority that it is done to
	waits  *trothv1.Blocked
	behind int // how many more authorities wait for the same
}

func (s rotateStep) done() bool { return s.do == "" }

// stepOf is an operation on an authority that may be blocked.
func stepOf(operation string, a *trothv1.AuthorityRecord) rotateStep {
	return rotateStep{do: operation, id: a.GetId(), waits: a.GetBlocked()}
}

func recordOf(s *trothv1.AuthorityStatus, id string) *trothv1.AuthorityRecord {
	for _, a := range s.GetAuthorities() {
		if a.GetId() == id {
			return a
		}
	}
	return nil
}

// inState returns the authorities that are in one of the states.
func inState(s *trothv1.AuthorityStatus, states ...trothv1.AuthorityState) []*trothv1.AuthorityRecord {
	var found []*trothv1.AuthorityRecord
	for _, a := range s.GetAuthorities() {
		if slices.Contains(states, a.GetState()) {
			found = append(found, a)
		}
	}
	return found
}

// begin returns how a rotation begins, by what there is: with an operation, or
// with none if it is under way.
func begin(s *trothv1.AuthorityStatus, taint bool) (operation, id string) {
	active := inState(s, trothv1.AuthorityState_AUTHORITY_STATE_ACTIVE)
	prepared := inState(s, trothv1.AuthorityState_AUTHORITY_STATE_PREPARED)
	tainted := inState(s, trothv1.AuthorityState_AUTHORITY_STATE_TAINTED)
	old := inState(s, trothv1.AuthorityState_AUTHORITY_STATE_OLD)
	switch {
	case taint && len(active) > 0 && (active[0].GetTaintPending() || len(tainted) > 0):
		return "", ""
	case taint && len(active) > 0:
		return "taint", active[0].GetId()
	case len(prepared) == 0 && len(active) > 0 && len(old)+len(tainted) > 0:
		return "", ""
	default:
		// One that is prepared already is returned, unless it would end too soon.
		return "prepare", ""
	}
}

// beginText says how it begins.
func beginText(s *trothv1.AuthorityStatus, operation, id string) string {
	prepared := inState(s, trothv1.AuthorityState_AUTHORITY_STATE_PREPARED)
	switch {
	case operation == "taint":
		return "taint " + short(id) + ", which is active"
	case operation == "prepare" && len(prepared) > 0:
		return "go on with " + short(target(s)) + ", which is prepared"
	case operation == "prepare":
		return "prepare an authority"
	}
	text := "go on with a rotation to " + short(target(s))
	for _, a := range inState(s, trothv1.AuthorityState_AUTHORITY_STATE_TAINTED) {
		if c := a.GetLastChange(); c != nil {
			text += fmt.Sprintf("; %s was tainted at %s by %s", short(a.GetId()), timeText(c.GetAt()), printable(c.GetActor()))
		}
	}
	return text
}

// target returns the authority that a rotation is to: the one that is prepared,
// and if there is none, the one that is active.
func target(s *trothv1.AuthorityStatus) string {
	prepared := inState(s, trothv1.AuthorityState_AUTHORITY_STATE_PREPARED)
	for _, a := range prepared {
		if a.GetId() == s.GetPropagation().GetAuthorityId() { // of several, the one that agents prove
			return a.GetId()
		}
	}
	if len(prepared) > 0 {
		return prepared[len(prepared)-1].GetId()
	}
	for _, a := range inState(s, trothv1.AuthorityState_AUTHORITY_STATE_ACTIVE) {
		return a.GetId()
	}
	return ""
}

// next returns what comes next on the way to an authority that signs, with none
// trusted that came before it.
func next(s *trothv1.AuthorityStatus, to string) (rotateStep, error) {
	switch a := recordOf(s, to); a.GetState() {
	case trothv1.AuthorityState_AUTHORITY_STATE_PREPARED:
		return stepOf("activate", a), nil
	case trothv1.AuthorityState_AUTHORITY_STATE_ACTIVE:
		var first rotateStep
		for n, a := range inState(s, trothv1.AuthorityState_AUTHORITY_STATE_OLD, trothv1.AuthorityState_AUTHORITY_STATE_TAINTED) {
			if n == 0 || a.GetBlocked() == nil && first.waits != nil {
				first = stepOf("revoke", a)
			}
			first.behind = n
		}
		return first, nil
	case trothv1.AuthorityState_AUTHORITY_STATE_OLD, trothv1.AuthorityState_AUTHORITY_STATE_TAINTED:
		return rotateStep{}, fmt.Errorf("%s was replaced under way%s: start again to go on from there", short(to), byWhom(a))
	case trothv1.AuthorityState_AUTHORITY_STATE_REVOKED:
		return rotateStep{}, fmt.Errorf("%s was dropped under way%s: start again to go on from there", short(to), byWhom(a))
	default:
		return rotateStep{}, fmt.Errorf("%s is gone, or in a state that this troth does not know", short(to))
	}
}

func byWhom(a *trothv1.AuthorityRecord) string {
	c := a.GetLastChange()
	if c.GetActor() == "" {
		return ""
	}
	text := " by " + printable(c.GetActor())
	if why := whyText(c); why != "" {
		text += " (" + printable(why) + ")"
	}
	return text
}

// only returns what comes next of one operation on one authority.
func only(s *trothv1.AuthorityStatus, operation, id string) rotateStep {
	a := recordOf(s, id)
	if a == nil || nextOperation(a) != operation {
		return rotateStep{} // for the server to return, or to refuse
	}
	if a.GetBlocked() == nil {
		return rotateStep{}
	}
	return stepOf(operation, a)
}

// passes reports whether waiting may remove what is in the way.
func passes(b *trothv1.Blocked) bool {
	for _, blocker := range b.GetBlockers() {
		switch blocker.GetObstacle() {
		case "WRONG_STATE", "LIFE_TOO_SHORT":
			return false
		}
	}
	return true
}

// progress is what is shown of a step that is waited for.
type progress struct {
	text string
	// key is the text without what changes by the clock alone.
	key string
}

// progressOf says how far a step is, in one line.
func progressOf(s *trothv1.AuthorityStatus, now rotateStep) progress {
	if now.waits == nil {
		text := now.do + " " + short(now.id)
		return progress{text: text, key: text}
	}
	line := func(known time.Time) string {
		const named = 5
		var parts []string
		switch now.do {
		case "activate":
			parts = append(parts, provedText(s.GetPropagation(), now.id, known, named))
		case "revoke":
			parts = append(parts, heldText(recordOf(s, now.id)))
		}
		for _, blocker := range now.waits.GetBlockers() {
			switch blocker.GetObstacle() {
			case "AGENTS_MISSING", "HELD_BY_AGENTS": // the same in other words
			default:
				parts = append(parts, printable(blocker.GetDetail()))
			}
		}
		if now.behind > 0 {
			parts = append(parts, fmt.Sprintf("and %s to be revoked", some(uint32(now.behind), "more authority")))
		}
		return strings.Join(parts, "; ")
	}
	return progress{text: line(asOf(s)), key: timeInText.ReplaceAllString(line(time.Time{}), "")}
}

// timeInText finds the times in what the server says of an obstacle.
var timeInText = regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ`)

// changesBetween says what became of authorities between two moments, in the order
// in which they were made.
func changesBetween(before, after *trothv1.AuthorityStatus) []string {
	var lines []string
	for _, a := range after.GetAuthorities() {
		was := recordOf(before, a.GetId())
		switch {
		case was.GetState() != a.GetState():
			line := short(a.GetId()) + " is " + stateText(a.GetState())
			switch a.GetState() {
			case trothv1.AuthorityState_AUTHORITY_STATE_PREPARED:
				line += ", and signs nothing until every agent trusts it"
			case trothv1.AuthorityState_AUTHORITY_STATE_ACTIVE:
				line += ", and signs from now on"
			case trothv1.AuthorityState_AUTHORITY_STATE_OLD, trothv1.AuthorityState_AUTHORITY_STATE_TAINTED:
				if by := a.GetReissueBy(); by != nil {
					line += ", and what it signed is replaced by " + timeText(by)
				}
			case trothv1.AuthorityState_AUTHORITY_STATE_REVOKED:
				line += ", and nobody trusts it any more"
			}
			lines = append(lines, line+byActor(a))
		case !was.GetTaintPending() && a.GetTaintPending():
			lines = append(lines, short(a.GetId())+" is to be tainted as soon as its successor is active"+byActor(a))
		}
	}
	return lines
}

func byActor(a *trothv1.AuthorityRecord) string {
	if actor := a.GetLastChange().GetActor(); actor != "" {
		return " (" + printable(actor) + ")"
	}
	return ""
}

// standsText says where a rotation stands that is not at its end, and how to go on.
func standsText(s *trothv1.AuthorityStatus, to string) string {
	now, err := next(s, to)
	switch {
	case err != nil:
		return err.Error()
	case now.do == "activate" && len(taintPending(s)) > 0:
		return fmt.Sprintf("%s is prepared: %s. The server goes on by itself; to watch: troth authority rotate --taint", short(to), progressOf(s, now).text)
	case now.do == "activate":
		return fmt.Sprintf("%s is prepared, and signs nothing: %s. To go on: troth authority rotate; to drop it: troth authority abort %s",
			short(to), progressOf(s, now).text, short(to))
	case now.do == "revoke":
		return fmt.Sprintf("%s signs; %s. The server goes on by itself; to watch: troth authority rotate", short(to), progressOf(s, now).text)
	default:
		return short(to) + " signs, and what was before it is revoked"
	}
}

func taintPending(s *trothv1.AuthorityStatus) []*trothv1.AuthorityRecord {
	return slices.DeleteFunc(inState(s, trothv1.AuthorityState_AUTHORITY_STATE_ACTIVE),
		func(a *trothv1.AuthorityRecord) bool { return !a.GetTaintPending() })
}
