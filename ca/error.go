package ca

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// Why nothing can be issued at all.
var (
	// ErrNoActiveAuthority says that no authority is active.
	ErrNoActiveAuthority = errors.New("ca: no active authority")
	// ErrAuthorityExpiring says that the active authority ends before an SVID
	// made now would.
	ErrAuthorityExpiring = errors.New("ca: the active authority is about to expire")
	// ErrLedger says that the issuance could not be recorded.
	ErrLedger = errors.New("ca: record the issuance")
	// ErrUnconfirmed says that the store did not confirm for too long that the
	// active authority is still the active one.
	ErrUnconfirmed = errors.New("ca: the active authority is not confirmed")
)

// Why a change of the authorities is refused before anything else is looked at.
var (
	// ErrOrder says that the order lacks what every order has to have.
	ErrOrder = errors.New("ca: the order")
	// ErrUnknownAuthority says that the trust domain has no such authority.
	ErrUnknownAuthority = errors.New("ca: unknown authority")
	// ErrStore says that the store failed, before or after it stored the change.
	// Whoever repeats the operation finds out, and does no harm.
	ErrStore = errors.New("ca: the store of authorities failed")
)

// Blocked says what is in the way of a change of an authority.
type Blocked struct {
	Operation string // "prepare", "activate", "taint", "revoke", "abort"
	Authority string
	Blockers  []Blocker // at least one
	// Waiting names agents that are waited for, at most MaxWaiting.
	Waiting []Waiting
}

// Blocker is one thing in the way.
type Blocker struct {
	Obstacle Obstacle
	// Detail tells an operator more, in one line.
	Detail string
	// Until is when it is gone by waiting alone; zero if that is not known.
	Until time.Time
}

// Obstacle is a machine-readable kind of Blocker.
type Obstacle string

// The kinds of obstacles. Force removes all but the first three.
const (
	WrongState   Obstacle = "WRONG_STATE"    // the authority is in no state for it
	LifeTooShort Obstacle = "LIFE_TOO_SHORT" // it ends too soon to sign for long
	// UpstreamUnchanged: only the upstream can issue another authority, and has not.
	UpstreamUnchanged Obstacle = "UPSTREAM_UNCHANGED"
	EvidenceMissing   Obstacle = "EVIDENCE_MISSING" // nothing of use is known of the agents
	AgentsMissing     Obstacle = "AGENTS_MISSING"   // agents have not proved that they trust it
	// BundleUnpublished: who has no agent may not have got the bundle with it.
	BundleUnpublished Obstacle = "BUNDLE_UNPUBLISHED"
	ReplicasMaySign   Obstacle = "REPLICAS_MAY_SIGN" // a replica may still take it for the active one
	SVIDsLive         Obstacle = "SVIDS_LIVE"        // what it signed has not expired
	HeldByAgents      Obstacle = "HELD_BY_AGENTS"    // agents hold SVIDs or connections under it
	HeldElsewhere     Obstacle = "HELD_ELSEWHERE"    // so does somebody whom no agent reports
)

// Error returns all of it in one line.
func (b *Blocked) Error() string {
	details := make([]string, len(b.Blockers))
	for n, blocker := range b.Blockers {
		details[n] = blocker.Detail
	}
	return fmt.Sprintf("ca: %s authority %s: %s", b.Operation, b.Authority, strings.Join(details, "; "))
}

// Forcible says whether the same order with Force would be carried out.
func (b *Blocked) Forcible() bool {
	for _, blocker := range b.Blockers {
		if blocker.Obstacle == WrongState || blocker.Obstacle == LifeTooShort || blocker.Obstacle == UpstreamUnchanged {
			return false
		}
	}
	return true
}

// Reason is a machine-readable reason for the refusal of a certificate request.
type Reason string

// The reasons why a certificate request is refused.
const (
	CSRTooLarge  Reason = "CSR_TOO_LARGE"
	CSRMalformed Reason = "CSR_MALFORMED"
	CSRKeyType   Reason = "CSR_KEY_TYPE"
	CSRSignature Reason = "CSR_SIGNATURE"
)

// Error says why a certificate request was refused.
type Error struct {
	Reason Reason
	Err    error
}

// Error returns the reason and what led to it.
func (e *Error) Error() string {
	return "certificate request: " + string(e.Reason) + ": " + e.Err.Error()
}

// Unwrap returns what led to the refusal.
func (e *Error) Unwrap() error { return e.Err }
