package server

import (
	"context"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/ca"
	"troth.dev/troth/identity"
)

// maxItems is how many SVIDs one call may ask for: more than a node has service
// accounts at its default limit of 110 pods would be a mistake or an attack.
const maxItems = 100

type svidService struct {
	trothv1.UnimplementedSVIDServiceServer
	server *Server
}

// IssueX509SVIDs is specified in svid.proto. Its steps, and those of ca.Issue,
// are the only path by which a workload gets an identity:
//
//  1. who calls (admit has settled that);
//  2. may this caller have these identities, by the API server's record;
//  3. ca.Issue: the key and its proof, the profile, lint, record, sign, verify;
//  4. answer.
//
// The question of 2 comes before the signature of the request is looked at,
// because it costs next to nothing and refuses whoever may not ask.
func (v *svidService) IssueX509SVIDs(ctx context.Context, in *trothv1.IssueX509SVIDsRequest) (*trothv1.IssueX509SVIDsResponse, error) {
	caller := identity.FromContext(ctx)
	items := in.GetItems()
	switch {
	case len(items) == 0:
		return nil, refusals.noItems
	case len(items) > maxItems:
		return nil, refusals.tooManyItems
	case caller.Kind == identity.WorkloadCaller && len(items) != 1:
		return nil, refusals.oneItem
	}

	pods, refused := v.authorize(ctx, caller, items)

	requests := make([]ca.Request, 0, len(items))
	for n, item := range items {
		if refused[n] != nil {
			continue
		}
		id, err := pods[n].Account().ID(v.server.TrustDomain)
		if err != nil {
			return nil, err
		}
		requests = append(requests, ca.Request{
			ID: id, CSR: item.GetCsr(),
			Caller: callerText(caller), Node: pods[n].Node.Name, PodUID: pods[n].UID,
		})
	}
	issued, err := v.server.Issuer.Issue(ctx, requests...)
	if err != nil {
		return nil, err
	}

	out := &trothv1.IssueX509SVIDsResponse{Results: make([]*trothv1.X509SVIDResult, len(items))}
	for n := range items {
		if refused[n] == nil {
			if issued[0].Err != nil {
				if refused[n] = refusalOf(issued[0].Err); refused[n] == nil {
					return nil, issued[0].Err
				}
			} else {
				out.Results[n] = &trothv1.X509SVIDResult{Result: &trothv1.X509SVIDResult_Svid{Svid: v.server.svidProto(issued[0].SVID)}}
				v.server.metrics.issued.Inc()
			}
			issued = issued[1:]
		}
		if refused[n] != nil {
			out.Results[n] = &trothv1.X509SVIDResult{Result: &trothv1.X509SVIDResult_Refusal{Refusal: refused[n].proto()}}
			v.server.metrics.refusedItem(refused[n])
		}
	}
	return out, nil
}

// authorize looks every item's pod up and says which of them the caller may not
// have. Items of a batch are looked up side by side, because a pod that is not
// known yet is waited for.
func (v *svidService) authorize(ctx context.Context, caller identity.Caller, items []*trothv1.X509SVIDRequest) ([]identity.Pod, []*refusal) {
	pods, refused := make([]identity.Pod, len(items)), make([]*refusal, len(items))
	if caller.Kind == identity.WorkloadCaller {
		pods[0], refused[0] = v.authorizeWorkload(caller, items[0].GetPod())
		return pods, refused
	}
	if len(items) == 1 {
		pods[0], refused[0] = v.authorizeAgent(ctx, caller, items[0].GetPod())
		return pods, refused
	}
	var lookups sync.WaitGroup
	for n, item := range items {
		lookups.Go(func() { pods[n], refused[n] = v.authorizeAgent(ctx, caller, item.GetPod()) })
	}
	lookups.Wait()
	return pods, refused
}

// authorizeAgent decides whether an agent may have the identity of a pod. Where
// the pod is comes first: about pods of other nodes the agent learns nothing
// else.
func (v *svidService) authorizeAgent(ctx context.Context, caller identity.Caller, asked *trothv1.PodReference) (identity.Pod, *refusal) {
	if asked.GetUid() == "" || asked.GetNamespace() == "" || asked.GetName() == "" || asked.GetServiceAccount() == "" ||
		len(asked.GetUid()) > maxUID || len(asked.GetNamespace()) > 63 || len(asked.GetName()) > 253 {
		return identity.Pod{}, refusals.podReference
	}
	ref := identity.PodReference{Namespace: asked.GetNamespace(), Name: asked.GetName(), UID: asked.GetUid()}
	pod, err := v.server.Pods.Pod(ctx, ref)
	if err != nil {
		return identity.Pod{}, podRefusal(err)
	}
	switch {
	case pod.Node != caller.Agent.Node:
		return identity.Pod{}, refusals.podNotOnNode
	case pod.PodReference != ref:
		return identity.Pod{}, refusals.podNameMismatch
	case pod.ServiceAccount != asked.GetServiceAccount():
		return identity.Pod{}, refusals.serviceAccountMismatch
	}
	if err := pod.Live(time.Now()); err != nil {
		return identity.Pod{}, podRefusal(err)
	}
	return pod, nil
}

// authorizeWorkload decides the same for a pod that asks for itself. Its token,
// and the pod's record, were checked just now.
func (v *svidService) authorizeWorkload(caller identity.Caller, asked *trothv1.PodReference) (identity.Pod, *refusal) {
	pod := caller.Pod
	if asked != nil && (asked.GetUid() != pod.UID || asked.GetNamespace() != pod.Namespace ||
		asked.GetName() != pod.Name || asked.GetServiceAccount() != pod.ServiceAccount) {
		return identity.Pod{}, refusals.notYourPod
	}
	return pod, nil
}

func callerText(c identity.Caller) string {
	if c.ID == (spiffeid.ID{}) {
		return c.Kind.String()
	}
	return c.ID.String()
}

// svidProto gives an SVID its place: only what is handed out takes one.
func (s *Server) svidProto(svid ca.SVID) *trothv1.X509SVID {
	return &trothv1.X509SVID{
		SpiffeId:     svid.ID.String(),
		Certificates: svid.Certificates,
		ExpiresAt:    timestamppb.New(svid.NotAfter),
		AuthorityId:  svid.AuthorityID,
		Place:        new(s.places.Next()),
	}
}
