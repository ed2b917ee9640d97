package ca

import "errors"

// Why nothing can be issued at all.
var (
	// ErrNoActiveAuthority says that no authority is active.
	ErrNoActiveAuthority = errors.New("ca: no active authority")
	// ErrAuthorityExpiring says that the active authority ends before an SVID
	// made now would.
	ErrAuthorityExpiring = errors.New("ca: the active authority is about to expire")
	// ErrLedger says that the issuance could not be recorded.
	ErrLedger = errors.New("ca: record the issuance")
)

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
