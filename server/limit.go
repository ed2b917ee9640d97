package server

import (
	"context"
	"sync/atomic"

	"golang.org/x/time/rate"

	"troth.dev/troth/identity"
)

// callerLimits is what one agent may do.
type callerLimits struct {
	calls   *rate.Limiter
	streams atomic.Int64
}

func (s *Server) limitsOf(agent identity.Agent) *callerLimits {
	if known, ok := s.callers.Get(agent.PodUID); ok {
		return known
	}
	fresh := &callerLimits{calls: rate.NewLimiter(s.Limits.PerCaller, 2*int(s.Limits.PerCaller))}
	if known, ok, _ := s.callers.PeekOrAdd(agent.PodUID, fresh); ok {
		return known // another call was faster
	}
	return fresh
}

// limitCaller is for callers whose certificate was verified.
func (s *Server) limitCaller(agent identity.Agent) error {
	if !s.limitsOf(agent).calls.Allow() {
		return refusals.rateLimited
	}
	return nil
}

// limitUnproven is for callers who have proved nothing yet, ahead of the work
// that a proof costs. The connection's own share comes first, so that one
// connection cannot use up everybody's.
func (s *Server) limitUnproven(ctx context.Context) error {
	conn, err := connectionOf(ctx)
	if err != nil {
		return err
	}
	if !conn.unproven.Allow() || !s.unproven.Allow() {
		return refusals.rateLimited
	}
	return nil
}

// openStream counts a stream, if there may be one more. Whoever gets done calls
// it when the stream ends.
func (s *Server) openStream(ctx context.Context, method string) (done func(), err error) {
	count, limit := &s.anonymous, s.Limits.AnonymousStreams
	if caller := identity.FromContext(ctx); caller.Kind == identity.AgentCaller {
		count, limit = &s.limitsOf(caller.Agent).streams, s.Limits.AgentStreams
	}
	if count.Add(1) > int64(limit) {
		count.Add(-1)
		return nil, refusals.tooManyStreams
	}
	open := s.metrics.streams.WithLabelValues(method)
	open.Inc()
	return func() {
		count.Add(-1)
		open.Dec()
	}, nil
}
