package server

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"math"
	"net/netip"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/ca"
	"troth.dev/troth/fleet"
	"troth.dev/troth/identity"
	"troth.dev/troth/policy"
)

type nodeService struct {
	trothv1.UnimplementedNodeServiceServer
	server *Server
}

// Watch is specified in node.proto. The agent who opened the stream is looked at
// again whenever the pods of its node change, because it is one of them, and
// when its SVID ends.
func (n *nodeService) Watch(in *trothv1.WatchRequest, stream grpc.ServerStreamingServer[trothv1.WatchResponse]) error {
	ctx := stream.Context()
	// Before all pods are known, the node would seem to have none, and the agent
	// would drop what it has.
	agent, err := n.server.openAgentStream(ctx)
	if err != nil {
		return err
	}
	defer agent.close()
	caller := agent.caller
	disconnected := n.server.fleet.Connected(caller.Agent)
	defer disconnected()

	sentBundle := in.GetHaveBundleRevisions()[n.server.TrustDomain.Name()]
	sentWorkloads := in.GetHaveWorkloadsRevision()
	// The workloads are spelled again only after a change of them. For every
	// new bundle too, with ten pods on a node, it was half of this loop's CPU time
	// and left 14 KB of garbage resident for each agent.
	var podsSeen <-chan struct{}
	var sentProbe *trothv1.WatchResponse // another is another message; a new stream knows of none
	for {
		trust, trustChanged := n.server.trust.Load()
		onNode, podsChanged := agent.pods.Load()
		if err := agent.stands(ctx); err != nil {
			return err
		}
		if trust.revision != sentBundle {
			if err := stream.Send(trust.bundles); err != nil {
				return err
			}
			sentBundle = trust.revision
		}
		if trust.probe != sentProbe {
			if err := stream.Send(trust.probe); err != nil {
				return err
			}
			sentProbe = trust.probe
		}
		if podsChanged != podsSeen {
			podsSeen = podsChanged
			workloads, err := n.workloads(onNode, caller.Agent.Node)
			if err != nil {
				return err
			}
			if workloads.Revision != sentWorkloads {
				part := &trothv1.WatchResponse_Workloads{Workloads: workloads}
				if err := stream.Send(&trothv1.WatchResponse{Part: part}); err != nil {
					return err
				}
				sentWorkloads = workloads.Revision
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-n.server.draining:
			return refusals.shuttingDown
		case <-agent.expired.C:
			return refusals.svidExpired
		case <-trustChanged:
		case <-podsChanged:
		}
	}
}

// workloads spells the pods of one life of a node as the agent gets them. Its
// revision is the hash of the content, so that every replica gives the same
// content the same one.
func (n *nodeService) workloads(onNode []policy.Assignment, node identity.Node) (*trothv1.Workloads, error) {
	w := &trothv1.Workloads{}
	for _, assigned := range onNode {
		pod := assigned.Pod
		if pod.Node != node {
			continue
		}
		id, err := pod.Account().ID(n.server.TrustDomain)
		if err != nil {
			return nil, err
		}
		workload := &trothv1.Workload{
			PodUid:         pod.UID,
			Namespace:      pod.Namespace,
			Name:           pod.Name,
			ServiceAccount: pod.ServiceAccount,
			SpiffeId:       id.String(),
			Policy:         policyProto(assigned.Policy),
			Capture:        captureProto(pod.Capture(n.server.Uncaptured)),
		}
		for _, address := range pod.Addresses {
			workload.Addresses = append(workload.Addresses, address.String())
		}
		w.Workloads = append(w.Workloads, workload)
	}
	content, err := proto.MarshalOptions{Deterministic: true}.Marshal(w)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(content)
	w.Revision = hex.EncodeToString(sum[:12])
	return w, nil
}

func captureProto(c identity.Capture) trothv1.Capture {
	switch c {
	case identity.Captured:
		return trothv1.Capture_CAPTURE_ENABLED
	case identity.UncapturedHost:
		return trothv1.Capture_CAPTURE_HOST_NETWORK
	case identity.UncapturedByLabel:
		return trothv1.Capture_CAPTURE_OPTED_OUT
	case identity.UncapturedNamespace:
		return trothv1.Capture_CAPTURE_NAMESPACE
	default:
		return trothv1.Capture_CAPTURE_UNSPECIFIED
	}
}

// policyProto spells a policy. The nil one, and a mode that is none, are
// unspecified, which every receiver takes for STRICT.
func policyProto(e *policy.Effective) *trothv1.EffectivePolicy {
	if e == nil {
		return &trothv1.EffectivePolicy{}
	}
	out := &trothv1.EffectivePolicy{
		Mode: modeProto(e.Mode), DecidedBy: e.DecidedBy.String(), PortsDecidedBy: e.PortsBy.String(),
	}
	if len(e.Ports) > 0 {
		out.PortModes = make(map[uint32]trothv1.MTLSMode, len(e.Ports))
	}
	for _, p := range e.Ports {
		out.PortModes[uint32(p.Port)] = modeProto(p.Mode)
	}
	return out
}

func modeProto(m policy.Mode) trothv1.MTLSMode {
	switch m {
	case policy.Disable:
		return trothv1.MTLSMode_MTLS_MODE_DISABLE
	case policy.Permissive:
		return trothv1.MTLSMode_MTLS_MODE_PERMISSIVE
	case policy.Strict:
		return trothv1.MTLSMode_MTLS_MODE_STRICT
	default:
		return trothv1.MTLSMode_MTLS_MODE_UNSPECIFIED
	}
}

// maxReport bounds each list of a report: a bundle of more trust domains, or
// SVIDs of more authorities, than this would not work anyway, and of plaintext
// peers nobody reads more.
const maxReport = 256

// maxUID is the length of the longest UID of a pod, with room.
const maxUID = 64

// Report is specified in node.proto.
func (n *nodeService) Report(ctx context.Context, in *trothv1.ReportRequest) (*trothv1.ReportResponse, error) {
	if len(in.GetBundles()) > maxReport || len(in.GetSvidsByAuthority()) > maxReport || len(in.GetPlaintextPeers()) > maxReport ||
		len(in.GetConnectionsByAuthority()) > maxReport {
		return nil, refusals.invalidReport
	}
	for _, p := range in.GetPlaintextPeers() {
		if _, err := netip.ParseAddr(p.GetSource()); err != nil || len(p.GetPodUid()) > maxUID || p.GetPort() > math.MaxUint16 {
			return nil, refusals.invalidReport
		}
	}
	heard := fleet.Report{Uses: make(map[string]ca.Use), RunningFor: max(0, in.GetRunningFor().AsDuration())}
	for _, b := range in.GetBundles() {
		if b.GetTrustDomain() == n.server.TrustDomain.Name() {
			heard.Received, heard.Applied = b.GetReceivedRevision(), b.GetAppliedRevision()
			heard.Proved, heard.ProvedAuthority = b.GetProvedRevision(), b.GetProvedAuthorityId()
			heard.Failure = probeFailure(b.GetProbeFailure())
		}
	}
	for id, count := range in.GetSvidsByAuthority() {
		heard.Uses[id] = ca.Use{SVIDs: int(count)}
	}
	for id, count := range in.GetConnectionsByAuthority() {
		heard.Uses[id] = ca.Use{SVIDs: heard.Uses[id].SVIDs, Connections: int(count)}
	}
	caller := identity.FromContext(ctx)
	n.server.plaintext.Add(caller.Pod.UID, in.GetPlaintextPeers())
	n.server.fleet.Heard(caller.Agent, heard)
	return &trothv1.ReportResponse{}, nil
}

// probeFailure reads what a probe found to be wrong. What this server does not know
// is no proof.
func probeFailure(f trothv1.ProbeFailure) fleet.ProbeFailure {
	switch f {
	case trothv1.ProbeFailure_PROBE_FAILURE_UNSPECIFIED:
		return 0
	case trothv1.ProbeFailure_PROBE_FAILURE_UNTRUSTED_ACCEPTED:
		return fleet.UntrustedAccepted
	default:
		return fleet.TrustedRefused
	}
}
