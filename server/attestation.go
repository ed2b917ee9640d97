package server

import (
	"context"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/ca"
	"troth.dev/troth/identity"
)

type attestationService struct {
	trothv1.UnimplementedAttestationServiceServer
	server *Server
}

// AttestAgent is specified in attestation.proto. The caller is a live pod of the
// agents' service account: admit has settled that.
func (a *attestationService) AttestAgent(ctx context.Context, request *trothv1.AttestAgentRequest) (*trothv1.AttestAgentResponse, error) {
	caller := identity.FromContext(ctx)
	id, err := caller.Agent.ID(a.server.TrustDomain)
	if err != nil {
		return nil, err
	}
	results, err := a.server.Issuer.Issue(ctx, ca.Request{
		ID: id, CSR: request.GetCsr(),
		Caller: caller.Kind.String(), Node: caller.Agent.Node.Name, PodUID: caller.Pod.UID,
	})
	if err != nil {
		return nil, err
	}
	if err := results[0].Err; err != nil {
		return nil, err
	}
	a.server.metrics.issued.Inc()
	bundle, _ := a.server.Issuer.Bundle().Load()
	return &trothv1.AttestAgentResponse{Svid: a.server.svidProto(results[0].SVID), Bundle: bundleProto(bundle)}, nil
}
