package server

import (
	"context"
	"slices"
	"time"

	"google.golang.org/grpc"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/identity"
)

// permitted says who may call which method. A method that is not here is
// refused. Where Anonymous is permitted, no proof is asked for and none is looked
// at.
var permitted = map[string][]identity.Kind{
	trothv1.AttestationService_AttestAgent_FullMethodName: {identity.AgentCandidate},
	trothv1.SVIDService_IssueX509SVIDs_FullMethodName:     {identity.AgentCaller, identity.WorkloadCaller},
	trothv1.BundleService_GetBundle_FullMethodName:        {identity.Anonymous},
	trothv1.BundleService_WatchBundles_FullMethodName:     {identity.Anonymous},
	trothv1.NodeService_Watch_FullMethodName:              {identity.AgentCaller},
	trothv1.NodeService_Report_FullMethodName:             {identity.AgentCaller},
}

// admit settles who calls and whether they may.
func (s *Server) admit(ctx context.Context, method string) (identity.Caller, error) {
	kinds, ok := permitted[method]
	if !ok {
		return identity.Caller{}, refusals.methodNotPermitted
	}
	if slices.Contains(kinds, identity.Anonymous) {
		return identity.Caller{}, s.limitUnproven(ctx)
	}
	caller, err := s.caller(ctx)
	if err != nil {
		return identity.Caller{}, err
	}
	if !slices.Contains(kinds, caller.Kind) {
		if method == trothv1.AttestationService_AttestAgent_FullMethodName {
			return identity.Caller{}, refusals.notAnAgent
		}
		return identity.Caller{}, refusals.methodNotPermitted
	}
	return caller, nil
}

// unary is the path of every unary call.
func (s *Server) unary(ctx context.Context, request any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	began := time.Now()
	var response any
	caller, err := s.admit(ctx, info.FullMethod)
	if err == nil {
		ctx = identity.NewContext(ctx, caller)
		response, err = handle(ctx, request)
	}
	s.metrics.called(info.FullMethod, err, time.Since(began))
	if err != nil {
		return nil, s.refuse(ctx, info.FullMethod, err)
	}
	return response, nil
}

// stream is the path of every stream.
func (s *Server) stream(service any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	ctx := stream.Context()
	caller, err := s.admit(ctx, info.FullMethod)
	if err == nil {
		ctx = identity.NewContext(ctx, caller)
		var done func()
		if done, err = s.openStream(ctx, info.FullMethod); err == nil {
			err = handle(service, &callerStream{ServerStream: stream, ctx: ctx})
			done()
		}
	}
	s.metrics.called(info.FullMethod, err, 0)
	if err != nil {
		return s.refuse(ctx, info.FullMethod, err)
	}
	return nil
}

// callerStream is a stream whose context carries the caller.
type callerStream struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // grpc.ServerStream is an interface that returns its context
}

func (s *callerStream) Context() context.Context { return s.ctx }
