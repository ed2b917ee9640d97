package server

import (
	"context"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/ca"
	"troth.dev/troth/identity"
)

type authorityService struct {
	trothv1.UnimplementedAuthorityServiceServer
	server *Server
}

// GetAuthorityStatus is specified in authority.proto.
func (a *authorityService) GetAuthorityStatus(ctx context.Context, _ *trothv1.GetAuthorityStatusRequest) (*trothv1.GetAuthorityStatusResponse, error) {
	known, _ := a.server.fleet.Propagation().Load()
	return &trothv1.GetAuthorityStatusResponse{Status: a.status(ctx, known)}, nil
}

// statusPause is what lies between two messages of a stream of statuses at least:
// while 1,000 agents prove a new authority, each report changes the counts.
const statusPause = 200 * time.Millisecond

// WatchAuthorityStatus is specified in authority.proto.
func (a *authorityService) WatchAuthorityStatus(_ *trothv1.WatchAuthorityStatusRequest, stream grpc.ServerStreamingServer[trothv1.WatchAuthorityStatusResponse]) error {
	ctx := stream.Context()
	for {
		_, changed := a.server.Issuer.Authorities().Load()
		_, alarmed := a.server.Issuer.Overdue().Load()
		known, heard := a.server.fleet.Propagation().Load()
		if err := stream.Send(&trothv1.WatchAuthorityStatusResponse{Status: a.status(ctx, known)}); err != nil {
			return err
		}
		pause := time.NewTimer(statusPause)
		select {
		case <-ctx.Done():
		case <-a.server.draining:
		case <-pause.C:
		}
		pause.Stop()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-a.server.draining:
			return refusals.shuttingDown
		case <-changed:
		case <-alarmed:
		case <-heard:
		}
	}
}

// ListAuthorityChanges is specified in authority.proto.
func (a *authorityService) ListAuthorityChanges(context.Context, *trothv1.ListAuthorityChangesRequest) (*trothv1.ListAuthorityChangesResponse, error) {
	set, _ := a.server.Issuer.Authorities().Load()
	out := &trothv1.ListAuthorityChangesResponse{}
	for _, c := range slices.Backward(set.History) {
		out.Changes = append(out.Changes, changeProto(c))
	}
	return out, nil
}

// PrepareAuthority is specified in authority.proto.
func (a *authorityService) PrepareAuthority(ctx context.Context, in *trothv1.PrepareAuthorityRequest) (*trothv1.PrepareAuthorityResponse, error) {
	done, err := a.server.Issuer.Prepare(ctx, a.order(ctx, in.GetReason(), false))
	if err != nil {
		return nil, err
	}
	return &trothv1.PrepareAuthorityResponse{Authority: authorityProto(done)}, nil
}

// ActivateAuthority is specified in authority.proto.
func (a *authorityService) ActivateAuthority(ctx context.Context, in *trothv1.ActivateAuthorityRequest) (*trothv1.ActivateAuthorityResponse, error) {
	done, err := a.server.Issuer.Activate(ctx, in.GetId(), a.order(ctx, in.GetReason(), in.GetForce()))
	if err != nil {
		return nil, err
	}
	return &trothv1.ActivateAuthorityResponse{Authority: authorityProto(done)}, nil
}

// TaintAuthority is specified in authority.proto.
func (a *authorityService) TaintAuthority(ctx context.Context, in *trothv1.TaintAuthorityRequest) (*trothv1.TaintAuthorityResponse, error) {
	done, err := a.server.Issuer.Taint(ctx, in.GetId(), a.order(ctx, in.GetReason(), in.GetForce()))
	if err != nil {
		return nil, err
	}
	return &trothv1.TaintAuthorityResponse{Authority: authorityProto(done)}, nil
}

// RevokeAuthority is specified in authority.proto.
func (a *authorityService) RevokeAuthority(ctx context.Context, in *trothv1.RevokeAuthorityRequest) (*trothv1.RevokeAuthorityResponse, error) {
	done, err := a.server.Issuer.Revoke(ctx, in.GetId(), a.order(ctx, in.GetReason(), in.GetForce()))
	if err != nil {
		return nil, err
	}
	return &trothv1.RevokeAuthorityResponse{Authority: authorityProto(done)}, nil
}

// AbortAuthority is specified in authority.proto.
func (a *authorityService) AbortAuthority(ctx context.Context, in *trothv1.AbortAuthorityRequest) (*trothv1.AbortAuthorityResponse, error) {
	done, err := a.server.Issuer.Abort(ctx, in.GetId(), a.order(ctx, in.GetReason(), false))
	if err != nil {
		return nil, err
	}
	return &trothv1.AbortAuthorityResponse{Authority: authorityProto(done)}, nil
}

// order is what the caller wants, by what is known of the agents now.
func (a *authorityService) order(ctx context.Context, reason string, force bool) ca.Order {
	known, _ := a.server.fleet.Propagation().Load()
	return ca.Order{Actor: identity.FromContext(ctx).User, Reason: reason, Force: force, Evidence: known}
}

// status puts together all there is to know, at what is known of the agents.
func (a *authorityService) status(ctx context.Context, known ca.Propagation) *trothv1.AuthorityStatus {
	set, _ := a.server.Issuer.Authorities().Load()
	overdue, _ := a.server.Issuer.Overdue().Load()
	out := &trothv1.AuthorityStatus{
		TrustDomain: set.TrustDomain.Name(), Revision: set.Revision,
		Propagation: propagationProto(known), Overdue: blockedProto(overdue),
		SvidLife: durationpb.New(a.server.Issuer.SVIDLife()),
	}
	blocked := make(map[string]*ca.Blocked)
	for _, b := range a.server.Issuer.Obstacles(ctx, known) {
		blocked[b.Authority] = b
	}
	for _, each := range set.Authorities {
		one := authorityProto(each)
		use := known.Uses[each.ID]
		one.Svids, one.Connections = uint32(use.SVIDs), uint32(use.Connections)
		one.Blocked = blockedProto(blocked[each.ID])
		out.Authorities = append(out.Authorities, one)
	}
	return out
}

func authorityProto(a ca.Authority) *trothv1.AuthorityRecord {
	p := &trothv1.AuthorityRecord{
		Id: a.ID, State: stateProto(a.State), Certificate: a.Certificate.Raw, TaintPending: a.TaintPending,
		ReissueBy: timeProto(a.ReissueBy),
	}
	for _, each := range a.Upstream {
		p.Upstream = append(p.Upstream, each.Raw)
	}
	if a.Changed.Revision != 0 {
		p.LastChange = changeProto(a.Changed)
	}
	return p
}

func changeProto(c ca.Change) *trothv1.AuthorityChange {
	return &trothv1.AuthorityChange{
		AuthorityId: c.AuthorityID, State: stateProto(c.State), At: timestamppb.New(c.At), Revision: c.Revision, Operation: c.Operation,
		Actor: c.Actor, Reason: c.Reason, Forced: c.Forced, Evidence: c.Evidence, BundleSha256: c.BundleSHA256,
	}
}

func stateProto(s ca.State) trothv1.AuthorityState {
	switch s {
	case ca.Prepared:
		return trothv1.AuthorityState_AUTHORITY_STATE_PREPARED
	case ca.Active:
		return trothv1.AuthorityState_AUTHORITY_STATE_ACTIVE
	case ca.Old:
		return trothv1.AuthorityState_AUTHORITY_STATE_OLD
	case ca.Tainted:
		return trothv1.AuthorityState_AUTHORITY_STATE_TAINTED
	case ca.Revoked:
		return trothv1.AuthorityState_AUTHORITY_STATE_REVOKED
	default:
		return trothv1.AuthorityState_AUTHORITY_STATE_UNSPECIFIED
	}
}

func propagationProto(p ca.Propagation) *trothv1.AuthorityPropagation {
	return &trothv1.AuthorityPropagation{
		KnownAt: timeProto(p.At), Expected: uint32(p.Expected), Received: uint32(p.Received), Applied: uint32(p.Applied),
		Proved: uint32(p.Proved), Revision: p.Revision, AuthorityId: p.Authority, Waiting: waitingProto(p.Waiting),
		Reporting: uint32(p.Reporting),
	}
}

func waitingProto(all []ca.Waiting) []*trothv1.WaitingAgent {
	var out []*trothv1.WaitingAgent
	for _, w := range all {
		out = append(out, &trothv1.WaitingAgent{Node: w.Node, Lacks: w.Lacks, Since: timeProto(w.Since)})
	}
	return out
}

func blockedProto(b *ca.Blocked) *trothv1.Blocked {
	if b == nil {
		return nil
	}
	p := &trothv1.Blocked{Operation: b.Operation, AuthorityId: b.Authority, Waiting: waitingProto(b.Waiting), Forcible: b.Forcible()}
	for _, each := range b.Blockers {
		p.Blockers = append(p.Blockers, &trothv1.Blocker{
			Obstacle: string(each.Obstacle), Detail: each.Detail, Until: timeProto(each.Until),
		})
	}
	return p
}

// timeProto spells a time; the zero time is none.
func timeProto(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
