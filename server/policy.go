package server

import (
	"cmp"
	"context"
	"slices"

	trothv1 "troth.dev/troth/api/troth/v1"
)

type policyService struct {
	trothv1.UnimplementedPolicyServiceServer
	server *Server
}

// ListPlaintextPeers is specified in policy.proto.
func (p *policyService) ListPlaintextPeers(context.Context, *trothv1.ListPlaintextPeersRequest) (*trothv1.ListPlaintextPeersResponse, error) {
	out := &trothv1.ListPlaintextPeersResponse{}
	for _, reported := range p.server.plaintext.Values() {
		out.Peers = append(out.Peers, reported...)
		out.Agents++
	}
	slices.SortFunc(out.Peers, func(a, b *trothv1.PlaintextPeer) int {
		return cmp.Or(cmp.Compare(a.GetPodUid(), b.GetPodUid()), cmp.Compare(a.GetPort(), b.GetPort()),
			cmp.Compare(a.GetSource(), b.GetSource()))
	})
	return out, nil
}
