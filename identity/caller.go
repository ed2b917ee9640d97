package identity

import (
	"context"
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Kind is what a caller was proved to be.
type Kind int

// The kinds of callers. The zero Kind has proved nothing.
const (
	Anonymous      Kind = iota
	AgentCandidate      // a live pod of the agents' service account, by its token
	AgentCaller         // an agent, by its SVID
	WorkloadCaller      // a live pod, by its token
	Operator            // a user with a right to the method, by a token and the API server's word
)

// String returns the kind as logs and metrics spell it.
func (k Kind) String() string {
	switch k {
	case AgentCandidate:
		return "agent-candidate"
	case AgentCaller:
		return "agent"
	case WorkloadCaller:
		return "workload"
	case Operator:
		return "operator"
	default:
		return "anonymous"
	}
}

// Caller is who stands at the other end of a call, as proved by a token or a
// certificate and by the API server's record of the pod behind it.
type Caller struct {
	Kind  Kind
	ID    spiffeid.ID // zero if Anonymous, AgentCandidate or Operator
	Pod   Pod         // zero if Anonymous or Operator
	Agent Agent       // zero unless AgentCandidate or AgentCaller
	User  string      // the API server's name of an Operator; empty otherwise
	// Until is when the proof ends: the expiry of the token or certificate. Zero
	// for an Operator, who is asked about at each call.
	Until time.Time
}

// Why a token does not settle who calls. Whoever asks the API server returns them,
// wrapped or not; every other error means that there was no answer.
var (
	// ErrTokenRefused says that the API server does not accept the token for that
	// audience, or that it is not the token of one who may present it.
	ErrTokenRefused = errors.New("the API server refuses the token")
	// ErrForbidden says that the cluster's RBAC does not give a user a right.
	ErrForbidden = errors.New("the API server does not allow it")
)

type callerKey struct{}

// NewContext returns a context that carries the caller of an RPC.
func NewContext(ctx context.Context, c Caller) context.Context {
	return context.WithValue(ctx, callerKey{}, c)
}

// FromContext returns the caller that [NewContext] put into ctx, or the zero
// Caller, which is Anonymous.
func FromContext(ctx context.Context) Caller {
	c, _ := ctx.Value(callerKey{}).(Caller)
	return c
}
