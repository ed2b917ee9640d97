package handshake

import (
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Side says which of the two services one is.
type Side int

// The two sides. A caller-first handshake has them as TLS server and client, in
// this order; a standard one as client and server.
const (
	Caller Side = iota + 1 // service A, which opened the connection
	Callee                 // service B, which was called
)

// String returns the side as logs and metrics spell it.
func (s Side) String() string {
	switch s {
	case Caller:
		return "caller"
	case Callee:
		return "callee"
	default:
		return fmt.Sprintf("Side(%d)", int(s))
	}
}

func (s Side) other() Side { return Caller + Callee - s }

// presents returns the step in which the side shows its certificate.
func (s Side) presents() Step {
	if s == Caller {
		return StepCallerPresents
	}
	return StepCalleePresents
}

// verifies returns the step in which the side verifies the other.
func (s Side) verifies() Step {
	if s == Caller {
		return StepCallerVerifies
	}
	return StepCalleeVerifies
}

// Step is one step of the handshake between service A, the caller, and service
// B, the callee.
type Step int

// The steps, as the caller-first order takes them. The standard order takes 3
// and 4 before 1 and 2.
const (
	StepCallerPresents Step = iota + 1
	StepCalleeVerifies
	StepCalleePresents
	StepCallerVerifies
	StepComplete
	StepData
)

// String returns what happens in the step.
func (s Step) String() string {
	switch s {
	case StepCallerPresents:
		return "A presents its certificate"
	case StepCalleeVerifies:
		return "B verifies A's certificate"
	case StepCalleePresents:
		return "B presents its certificate"
	case StepCallerVerifies:
		return "A verifies B's certificate"
	case StepComplete:
		return "handshake completes"
	case StepData:
		return "data"
	default:
		return fmt.Sprintf("Step(%d)", int(s))
	}
}

// Event says that one side is through with one step, or was stopped in it. Each
// side has one event for each step, sent when that side has seen the step
// happen; a stopped handshake ends with one event that has an Err.
//
//   - A side presents when its certificate is handed to TLS, and sees the other
//     present when the certificate arrives.
//   - A side verifies when the certificate has passed [Verify], its owner is
//     expected or authorized and has proved that it holds the key. It sees that
//     it was verified itself when the other goes on: by its certificate, the
//     caller-first confirmation, or the first data.
//   - Data is the first application byte written or read. Only a byte read
//     shows the caller of a standard handshake that it was verified, so that
//     its events for steps 2, 5 and 6 come together.
type Event struct {
	Order Order
	Side  Side // whose event it is
	Step  Step
	// Peer is the other side. It is zero until this side has verified it. In
	// the event of a failure it is who the other side claims to be, proved or
	// not, and may be zero.
	Peer spiffeid.ID
	Err  *Error // why the handshake stopped at this step, or nil
	At   time.Time
}

// progress follows one side through the steps and tells the trace.
type progress struct {
	order Order
	side  Side
	trace func(Event) // may be nil
	peer  spiffeid.ID // zero until verified
	steps [6]Step     // in the order's order
	next  int         // index into steps: the step we are in
}

func newProgress(cfg *Config, side Side) *progress {
	p := &progress{order: cfg.Order, side: side, trace: cfg.Trace}
	if cfg.Order == CallerFirst {
		p.steps = [6]Step{
			StepCallerPresents, StepCalleeVerifies, StepCalleePresents, StepCallerVerifies, StepComplete, StepData}
	} else {
		p.steps = [6]Step{
			StepCalleePresents, StepCallerVerifies, StepCallerPresents, StepCalleeVerifies, StepComplete, StepData}
	}
	return p
}

// pass notes that the steps up to and including s are done.
func (p *progress) pass(s Step) {
	for last := slices.Index(p.steps[:], s); p.next <= last; p.next++ {
		p.emit(Event{Step: p.steps[p.next], Peer: p.peer})
	}
}

// stop notes that the handshake stopped in the step we are in, and completes err.
func (p *progress) stop(err *Error) *Error {
	err.Step, err.Side = p.steps[p.next], p.side
	p.emit(Event{Step: err.Step, Peer: err.Peer, Err: err})
	return err
}

func (p *progress) emit(e Event) {
	if p.trace == nil {
		return
	}
	e.Order, e.Side, e.At = p.order, p.side, time.Now()
	p.trace(e)
}
