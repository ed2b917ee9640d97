package token

import (
	"fmt"
	"time"
)

// Error is why a token was refused. Its text is for the verifier's own log: it
// quotes names and never the token. The peer gets the Reason.
type Error struct {
	Reason Reason
	// RetryAfter is when to try the same token again, 0 if that is of no use.
	RetryAfter time.Duration
	// Err says what was wrong. It wraps the error of the context or of the
	// fetch, or one of package identity's ErrPod, where there is one.
	Err error
}

// Error returns the reason and what was wrong.
func (e *Error) Error() string { return fmt.Sprintf("token: %s: %v", e.Reason, e.Err) }

// Unwrap returns e.Err.
func (e *Error) Unwrap() error { return e.Err }

func refuse(reason Reason, format string, a ...any) *Error {
	return &Error{Reason: reason, Err: fmt.Errorf(format, a...)}
}

// Reason is why a token was refused, as it stands in an answer to the peer.
// Reasons never change meaning.
type Reason string

// The reasons of [Verifier.Verify], and of whoever else verifies tokens.
const (
	TooLarge        Reason = "TOKEN_TOO_LARGE"
	Malformed       Reason = "TOKEN_MALFORMED"
	WrongAlgorithm  Reason = "TOKEN_ALGORITHM" // not an accepted one, or not the key's
	CriticalHeader  Reason = "TOKEN_CRITICAL_HEADER"
	UnknownKey      Reason = "TOKEN_UNKNOWN_KEY" // with RetryAfter if the keys were not fetched for this token
	BadSignature    Reason = "TOKEN_SIGNATURE"
	WrongIssuer     Reason = "TOKEN_ISSUER"
	WrongAudience   Reason = "TOKEN_AUDIENCE" // another audience, none, or others beside it
	Expired         Reason = "TOKEN_EXPIRED"
	NotYetValid     Reason = "TOKEN_NOT_YET_VALID" // with RetryAfter
	LifetimeTooLong Reason = "TOKEN_LIFETIME"
	NoPod           Reason = "TOKEN_NO_POD"
	WrongSubject    Reason = "TOKEN_SUBJECT"          // no service account, or two different ones
	KeysUnavailable Reason = "TOKEN_KEYS_UNAVAILABLE" // with RetryAfter; says nothing about the token
	NoID            Reason = "TOKEN_NO_ID"            // of package mint: it has to name itself
)

// The reasons of [Claims.Matches].
const (
	PodReplaced            Reason = "POD_REPLACED" // errors.Is identity.ErrPodReplaced
	PodFinished            Reason = "POD_FINISHED" // errors.Is identity.ErrPodFinished
	PodDeleted             Reason = "POD_DELETED"  // errors.Is identity.ErrPodDeleted
	ServiceAccountMismatch Reason = "SERVICE_ACCOUNT_MISMATCH"
	ServiceAccountReplaced Reason = "SERVICE_ACCOUNT_REPLACED"
	NodeMismatch           Reason = "NODE_MISMATCH"
	NodeReplaced           Reason = "NODE_REPLACED"
)
