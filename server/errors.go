package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/ca"
	"troth.dev/troth/identity"
	"troth.dev/troth/mint"
	"troth.dev/troth/storage"
	"troth.dev/troth/token"
)

// refusal is what a caller is told.
type refusal struct {
	code    codes.Code
	reason  string // of google.rpc.ErrorInfo, domain troth.dev
	message string
	retry   time.Duration // 0 if waiting does not help
}

func (r *refusal) Error() string { return r.reason + ": " + r.message }

// refusals are those that the server itself comes to. Those that other packages
// come to are in refusalOf.
var refusals = struct {
	methodNotPermitted, notAnAgent, ambiguousCaller, noCredentials, malformedAuthorization,
	svidExpired, svidAuthority, agentChanged,
	rateLimited, tooManyStreams, shuttingDown,
	noItems, tooManyItems, oneItem,
	podReference, podNotSeen, podUIDMismatch, podNameMismatch, podNotOnNode, serviceAccountMismatch, notYourPod,
	podFinished, podDeleted,
	unknownTrustDomain, invalidTrustDomain, invalidReport,
	invalidAddress, longRequest, tooManyAddresses,
	mintDisabled, tooManyMintItems, noRuleMatches, ttlInvalid, moreThanRate, tokenSpent *refusal
}{
	methodNotPermitted:     &refusal{codes.PermissionDenied, "METHOD_NOT_PERMITTED", "this kind of caller may not call this method", 0},
	notAnAgent:             &refusal{codes.PermissionDenied, "NOT_AN_AGENT", "the caller is not a node agent", 0},
	ambiguousCaller:        &refusal{codes.InvalidArgument, "AMBIGUOUS_CALLER", "a call presents a certificate or a token, not both", 0},
	noCredentials:          &refusal{codes.Unauthenticated, "NO_CREDENTIALS", "the call presents neither a certificate nor a token", 0},
	malformedAuthorization: &refusal{codes.Unauthenticated, "TOKEN_MALFORMED", "the authorization metadata is not one bearer token", 0},

	svidExpired:   &refusal{codes.Unauthenticated, "SVID_EXPIRED", "the connection's SVID has expired: connect with a new one", 0},
	svidAuthority: &refusal{codes.Unauthenticated, "SVID_AUTHORITY", "the authority that signed the connection's SVID is no longer trusted: attest again", 0},
	agentChanged:  &refusal{codes.Unauthenticated, "AGENT_CHANGED", "the agent's pod is not what its SVID was issued for: attest again", 0},

	rateLimited:    &refusal{codes.ResourceExhausted, "RATE_LIMITED", "too many calls", time.Second},
	tooManyStreams: &refusal{codes.ResourceExhausted, "TOO_MANY_STREAMS", "too many open streams", 5 * time.Second},
	shuttingDown:   &refusal{codes.Unavailable, "SHUTTING_DOWN", "this replica is shutting down: connect again", time.Second},

	noItems:      &refusal{codes.InvalidArgument, "NO_ITEMS", "the request has no items", 0},
	tooManyItems: &refusal{codes.InvalidArgument, "TOO_MANY_ITEMS", "the request has more than 100 items", 0},
	oneItem:      &refusal{codes.InvalidArgument, "TOO_MANY_ITEMS", "a workload asks for itself, with one item", 0},

	podReference:           &refusal{codes.InvalidArgument, "POD_REFERENCE_INVALID", "a pod is named by UID, namespace, name and service account", 0},
	podNotSeen:             &refusal{codes.FailedPrecondition, "POD_NOT_SEEN", "the API server does not know this pod yet", time.Second},
	podUIDMismatch:         &refusal{codes.PermissionDenied, "POD_UID_MISMATCH", "the pod of this name has another UID", 0},
	podNameMismatch:        &refusal{codes.PermissionDenied, "POD_NAME_MISMATCH", "the pod of this UID has another name", 0},
	podNotOnNode:           &refusal{codes.PermissionDenied, "POD_NOT_ON_NODE", "the pod is not on the agent's node", 0},
	serviceAccountMismatch: &refusal{codes.PermissionDenied, "SERVICE_ACCOUNT_MISMATCH", "the pod runs as another service account", 0},
	notYourPod:             &refusal{codes.PermissionDenied, "NOT_YOUR_POD", "a workload gets its own identity only", 0},
	podFinished:            &refusal{codes.PermissionDenied, "POD_FINISHED", "the pod has finished", 0},
	podDeleted:             &refusal{codes.PermissionDenied, "POD_DELETED", "the pod was deleted", 0},

	unknownTrustDomain: &refusal{codes.NotFound, "UNKNOWN_TRUST_DOMAIN", "this server has no bundle of that trust domain", 0},
	invalidTrustDomain: &refusal{codes.InvalidArgument, "INVALID_TRUST_DOMAIN", "the name is not a trust domain's", 0},
	invalidReport:      &refusal{codes.InvalidArgument, "REPORT_INVALID", "the report is longer than a report can be", 0},

	invalidAddress:   &refusal{codes.InvalidArgument, "ADDRESS_INVALID", "what is named is not an IPv4 address, nor an IPv6 one that has no IPv4 in it and no zone", 0},
	longRequest:      &refusal{codes.InvalidArgument, "TOO_MANY_ADDRESSES", "a message names more than 1,024 addresses", 0},
	tooManyAddresses: &refusal{codes.ResourceExhausted, "TOO_MANY_ADDRESSES", "the stream holds more than 65,536 addresses", 0},

	mintDisabled:     &refusal{codes.Unimplemented, "MINT_DISABLED", "this server issues nothing to CI: it has no -mint-rules", 0},
	tooManyMintItems: &refusal{codes.InvalidArgument, "TOO_MANY_ITEMS", "the request has more than 500 items", 0},
	noRuleMatches:    &refusal{codes.PermissionDenied, "NO_RULE_MATCHES", "no rule gives this token anything: troth mint explain says of each rule why", 0},
	ttlInvalid:       &refusal{codes.InvalidArgument, "TTL_INVALID", "an SVID lives for 10s at least", 0},
	moreThanRate:     &refusal{codes.ResourceExhausted, "RATE_LIMITED", "more SVIDs at once than the rule gives in a minute: ask for fewer", 0},
	tokenSpent:       &refusal{codes.Unauthenticated, "TOKEN_SPENT", "the token was used before: get another, each is good for one call", 0},
}

// callerPodError is why the pod behind a caller does not carry an identity.
type callerPodError struct{ err error }

func (e *callerPodError) Error() string { return "the caller's pod: " + e.err.Error() }
func (e *callerPodError) Unwrap() error { return e.err }

// reviewError is why the token review did not accept a token.
type reviewError struct{ err error }

func (e *reviewError) Error() string { return "token review: " + e.err.Error() }
func (e *reviewError) Unwrap() error { return e.err }

// refusalOf is the table from what the domain says to what the caller is told.
// It returns nil for an error that is not in it, which is a fault of ours.
func refusalOf(err error) *refusal {
	if own, ok := errors.AsType[*refusal](err); ok {
		return own
	}
	if e, ok := errors.AsType[*token.Error](err); ok {
		code := codes.Unauthenticated
		if e.Reason == token.KeysUnavailable {
			code = codes.Unavailable
		}
		return &refusal{code, string(e.Reason), "the token is not accepted", e.RetryAfter}
	}
	if e, ok := errors.AsType[*mint.Refusal](err); ok {
		return mintRefusal(e)
	}
	if e, ok := errors.AsType[*spendError](err); ok {
		switch {
		case errors.Is(e, storage.ErrSpent):
			return refusals.tokenSpent
		case errors.Is(e, context.Canceled), errors.Is(e, context.DeadlineExceeded):
		default:
			return &refusal{codes.Unavailable, "LEDGER_UNAVAILABLE", "whether the token is spent could not be recorded: repeat it, and get another if it is", time.Second}
		}
	}
	if e, ok := errors.AsType[*ca.Error](err); ok {
		return &refusal{codes.InvalidArgument, string(e.Reason), e.Err.Error(), 0}
	}
	if b, ok := errors.AsType[*ca.Blocked](err); ok {
		return &refusal{codes.FailedPrecondition, string(b.Blockers[0].Obstacle), b.Error(), untilUnblocked(b, time.Now())}
	}
	if e, ok := errors.AsType[*callerPodError](err); ok {
		switch {
		case errors.Is(e, identity.ErrPodNotFound):
			return &refusal{codes.Unauthenticated, "POD_NOT_FOUND", "the caller's pod is gone", 0}
		case errors.Is(e, identity.ErrPodReplaced):
			return &refusal{codes.Unauthenticated, "POD_REPLACED", "the caller's pod was replaced by another of its name", 0}
		case errors.Is(e, identity.ErrPodFinished):
			return &refusal{codes.Unauthenticated, "POD_FINISHED", "the caller's pod has finished", 0}
		case errors.Is(e, identity.ErrPodDeleted):
			return &refusal{codes.Unauthenticated, "POD_DELETED", "the caller's pod was deleted", 0}
		default:
			return &refusal{codes.Unavailable, "POD_LOOKUP_UNAVAILABLE", "the caller's pod cannot be looked up now", time.Second}
		}
	}
	if e, ok := errors.AsType[*reviewError](err); ok {
		if errors.Is(e, identity.ErrForbidden) {
			return &refusal{codes.PermissionDenied, "OPERATOR_FORBIDDEN", "the cluster's RBAC does not give the user this right", 0}
		}
		if errors.Is(e, identity.ErrTokenRefused) {
			return &refusal{codes.Unauthenticated, "TOKEN_REVIEW", "the API server does not accept the token", 0}
		}
		return &refusal{codes.Unavailable, "TOKEN_REVIEW_UNAVAILABLE", "the token cannot be reviewed now", time.Second}
	}
	switch {
	case errors.Is(err, ca.ErrOrder):
		return &refusal{codes.InvalidArgument, "ORDER_INVALID", err.Error(), 0}
	case errors.Is(err, ca.ErrUnknownAuthority):
		return &refusal{codes.NotFound, "UNKNOWN_AUTHORITY", err.Error(), 0}
	case errors.Is(err, ca.ErrStore):
		return &refusal{codes.Unavailable, "STORE_UNAVAILABLE", "the change may or may not have been stored: repeat it", time.Second}
	case errors.Is(err, ca.ErrNoActiveAuthority), errors.Is(err, ca.ErrAuthorityExpiring):
		return &refusal{codes.Unavailable, "NO_ACTIVE_AUTHORITY", "no authority can sign now: the operator has to rotate", 10 * time.Second}
	case errors.Is(err, ca.ErrUnconfirmed):
		return &refusal{codes.Unavailable, "AUTHORITY_UNCONFIRMED", "the store does not confirm which authority signs", time.Second}
	case errors.Is(err, ca.ErrLedger):
		return &refusal{codes.Unavailable, "LEDGER_UNAVAILABLE", "the issuance could not be recorded", time.Second}
	case errors.Is(err, context.Canceled), status.Code(err) == codes.Canceled, status.Code(err) == codes.Unavailable: // of a stream's Send
		return &refusal{codes.Canceled, "CANCELED", "the caller went away", 0}
	case errors.Is(err, context.DeadlineExceeded):
		return &refusal{codes.DeadlineExceeded, "DEADLINE_EXCEEDED", "the caller's deadline passed", 0}
	}
	return nil
}

// untilUnblocked is how long it takes until waiting alone has removed all that is in
// the way; 0 if that is not known.
func untilUnblocked(b *ca.Blocked, now time.Time) time.Duration {
	var longest time.Duration
	for _, each := range b.Blockers {
		if each.Until.IsZero() {
			return 0
		}
		longest = max(longest, each.Until.Sub(now), time.Second)
	}
	return longest
}

// podRefusal is the same for the pod that an item of a batch is about: what is
// said of it is said to its agent, who may have heard of it before us.
func podRefusal(err error) *refusal {
	switch {
	case errors.Is(err, identity.ErrPodNotFound):
		return refusals.podNotSeen
	case errors.Is(err, identity.ErrPodReplaced):
		return refusals.podUIDMismatch
	case errors.Is(err, identity.ErrPodFinished):
		return refusals.podFinished
	case errors.Is(err, identity.ErrPodDeleted):
		return refusals.podDeleted
	}
	return &refusal{codes.Unavailable, "POD_LOOKUP_UNAVAILABLE", "the pod cannot be looked up now", time.Second}
}

// refuse logs why a call fails and returns what the caller is told of it.
func (s *Server) refuse(ctx context.Context, method string, err error) error {
	r := refusalOf(err)
	level := slog.LevelInfo
	if r == nil {
		r = &refusal{codes.Internal, "INTERNAL", "internal error; the server's log has it", 0}
		level = slog.LevelError
	}
	if r.code == codes.Canceled || r == refusals.shuttingDown {
		level = slog.LevelDebug
	}
	s.Log.LogAttrs(ctx, level, "refused", slog.String("method", method), slog.String("reason", r.reason),
		slog.String("spiffe_id", identity.FromContext(ctx).ID.String()), slog.Any("err", err))
	st := r.status()
	if b, ok := errors.AsType[*ca.Blocked](err); ok {
		if detailed, err := st.WithDetails(blockedProto(b)); err == nil {
			st = detailed
		}
	}
	return st.Err()
}

func (r *refusal) status() *status.Status {
	st := status.New(r.code, r.message)
	details := []protoadapt.MessageV1{&errdetails.ErrorInfo{Reason: r.reason, Domain: "troth.dev"}}
	if r.retry > 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(r.retry)})
	}
	detailed, err := st.WithDetails(details...)
	if err != nil {
		panic(fmt.Sprintf("server: details of %s: %v", r.reason, err)) // the code is OK, or a detail does not marshal
	}
	return detailed
}

// proto is the refusal as it stands in a batch.
func (r *refusal) proto() *trothv1.Refusal {
	p := &trothv1.Refusal{Code: int32(r.code), Reason: r.reason, Message: r.message}
	if r.retry > 0 {
		p.RetryAfter = durationpb.New(r.retry)
	}
	return p
}
