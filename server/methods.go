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
var permitted = map[string]permission{
	trothv1.AttestationService_AttestAgent_FullMethodName:   to(identity.AgentCandidate),
	trothv1.SVIDService_IssueX509SVIDs_FullMethodName:       to(identity.AgentCaller, identity.WorkloadCaller),
	trothv1.BundleService_GetBundle_FullMethodName:          to(identity.Anonymous),
	trothv1.BundleService_WatchBundles_FullMethodName:       to(identity.Anonymous),
	trothv1.NodeService_Watch_FullMethodName:                to(identity.AgentCaller),
	trothv1.NodeService_Report_FullMethodName:               to(identity.AgentCaller),
	trothv1.DirectoryService_Resolve_FullMethodName:         to(identity.AgentCaller),
	trothv1.PolicyService_ListPlaintextPeers_FullMethodName: toOperators("list", "plaintextpeers"),

	trothv1.MintService_MintX509SVIDs_FullMethodName: {jobs: true},
	trothv1.MintService_ExplainMint_FullMethodName:   toOperators("explain", "mintrules"),

	trothv1.AuthorityService_GetAuthorityStatus_FullMethodName:   toOperators("list", "authorities"),
	trothv1.AuthorityService_WatchAuthorityStatus_FullMethodName: toOperators("list", "authorities"),
	trothv1.AuthorityService_ListAuthorityChanges_FullMethodName: toOperators("list", "authorities"),
	trothv1.AuthorityService_PrepareAuthority_FullMethodName:     toOperators("prepare", "authorities"),
	trothv1.AuthorityService_ActivateAuthority_FullMethodName:    toOperators("activate", "authorities"),
	trothv1.AuthorityService_TaintAuthority_FullMethodName:       toOperators("taint", "authorities"),
	trothv1.AuthorityService_RevokeAuthority_FullMethodName:      toOperators("revoke", "authorities"),
	trothv1.AuthorityService_AbortAuthority_FullMethodName:       toOperators("abort", "authorities"),
}

// permission is who may call a method.
type permission struct {
	kinds []identity.Kind
	right Right // that an operator has to have
	// jobs says that the method is for CI jobs, who are nobody in this trust domain:
	// it settles by itself whose token it is.
	jobs bool
}

// Right is what the cluster's RBAC gives to operators: a verb on a resource of the
// API group troth.dev.
type Right struct{ Verb, Resource string }

func to(kinds ...identity.Kind) permission { return permission{kinds: kinds} }

func toOperators(verb, resource string) permission {
	return permission{kinds: []identity.Kind{identity.Operator}, right: Right{Verb: verb, Resource: resource}}
}

// admit settles who calls and whether they may.
func (s *Server) admit(ctx context.Context, method string) (identity.Caller, error) {
	may, ok := permitted[method]
	if !ok {
		return identity.Caller{}, refusals.methodNotPermitted
	}
	if may.jobs && isLocal(ctx) {
		return identity.Caller{}, refusals.methodNotPermitted
	}
	if may.jobs || slices.Contains(may.kinds, identity.Anonymous) {
		return identity.Caller{}, s.limitUnproven(ctx)
	}
	if slices.Contains(may.kinds, identity.Operator) {
		return s.operatorCaller(ctx, may.right)
	}
	caller, err := s.caller(ctx)
	if err != nil {
		return identity.Caller{}, err
	}
	if !slices.Contains(may.kinds, caller.Kind) {
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
