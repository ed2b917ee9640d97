package agent

import (
	"context"
	"log/slog"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"troth.dev/troth/agent/proxy"
	"troth.dev/troth/agent/workload"
	trothv1 "troth.dev/troth/api/troth/v1"
)

const (
	// reportEvery is how long nothing may change before the agent reports anyway.
	reportEvery = time.Minute
	// reportPause is how long a report waits for more to report: a new bundle wakes
	// the reporter once for each stream that has been sent it, and the probe of a
	// prepared authority follows it. In one report they cost the server half.
	reportPause = 30 * time.Millisecond
	// plaintextMemory is for how long somebody who came in plaintext is told of: a
	// job that runs once a day has come.
	plaintextMemory = 25 * time.Hour
)

// report tells the server what the agent holds, whenever that changes, until ctx
// ends. A report that fails is made up for by the next.
func (a *Agent) report(ctx context.Context, s *session) {
	client := trothv1.NewNodeServiceClient(s.conn)
	for ctx.Err() == nil {
		_, held := a.identities.changed.Load()
		_, delivered := a.workload.Delivered().Load()
		_, handed := a.workload.HandedOut(time.Now())
		newest := a.newReport()
		call, cancel := context.WithTimeout(ctx, callPatience)
		_, err := client.Report(call, newest)
		cancel()
		if err != nil && ctx.Err() == nil {
			a.config.Log.LogAttrs(ctx, slog.LevelDebug, "not reported", slog.Any("err", err))
		}
		again := time.NewTimer(reportAfter(newest))
		select {
		case <-ctx.Done():
		case <-held:
		case <-delivered:
		case <-handed:
		case <-again.C:
		}
		again.Stop()
		if sleep(ctx, reportPause) != nil {
			return
		}
	}
}

// reportAfter is how long nothing may change after a report before there is another. That a
// tunnel ends or is renewed is no change that wakes the reporter: while there are
// tunnels of more than one authority, somebody may be waiting for the last of the old.
func reportAfter(r *trothv1.ReportRequest) time.Duration {
	if len(r.GetConnectionsByAuthority()) > 1 {
		return 2 * time.Second
	}
	return reportEvery
}

// standing is how far the own trust domain's bundle has come on the node.
type standing struct {
	received, applied uint64
	outcome           outcome
	delivered         workload.Delivered
	held              summary
}

// standing returns what is so already, and never more. What is held is read first:
// a stream that is sent anything but the newest of then is on record by now.
func (a *Agent) standing() standing {
	s := standing{held: a.identities.summary()}
	s.delivered, _ = a.workload.Delivered().Load()
	s.received = s.held.bundleRevision
	s.applied = s.received // by whoever opens a stream from now on
	if s.delivered.Streams > 0 {
		s.applied = min(s.applied, s.delivered.Revisions[a.config.TrustDomain])
	}
	var news bool
	if s.outcome, news = a.identities.prove(s.applied, time.Now()); news && s.outcome.err != nil {
		a.config.Log.LogAttrs(context.Background(), slog.LevelError, "the node does not trust the prepared authority as it should",
			slog.String("failure", s.outcome.failure.String()), slog.Uint64("revision", s.applied), slog.Any("err", s.outcome.err))
	}
	return s
}

func (a *Agent) newReport() *trothv1.ReportRequest {
	s := a.standing()
	bundle := &trothv1.BundleReport{
		TrustDomain:      a.config.TrustDomain.Name(),
		ReceivedRevision: s.received,
		AppliedRevision:  s.applied,
		ProbeFailure:     s.outcome.failure,
	}
	if s.outcome.proves() {
		bundle.ProvedRevision, bundle.ProvedAuthorityId = s.outcome.revision, s.outcome.probe.authority
	}
	r := &trothv1.ReportRequest{
		Bundles:           []*trothv1.BundleReport{bundle},
		WorkloadsRevision: s.held.workloadsRevision,
		SvidsByAuthority:  a.svidsByAuthority(s.held, time.Now()),
		WorkloadStreams:   uint32(s.delivered.Streams),
		RunningFor:        durationpb.New(time.Since(a.begun)),

		ConnectionsByAuthority: make(map[string]uint32),
	}
	for id, count := range proxy.ByAuthority(a.Tunnels()) {
		r.ConnectionsByAuthority[id] = uint32(count)
	}
	if a.pods != nil {
		r.CapturedPods = uint32(a.pods.Captured())
		r.UncapturedPods = a.pods.Uncaptured()
		r.UncapturedPods = r.UncapturedPods[:min(len(r.UncapturedPods), maxPeers)]
	}
	for _, p := range a.peers.Recent(time.Now().Add(-plaintextMemory)) {
		r.PlaintextPeers = append(r.PlaintextPeers, &trothv1.PlaintextPeer{
			PodUid: p.Pod, Port: uint32(p.Port), Source: p.Source.String(), LastSeen: timestamppb.New(p.Last),
		})
	}
	if end := s.held.earliestExpiry; !end.IsZero() {
		r.EarliestExpiry = timestamppb.New(end)
	}
	return r
}

// svidsByAuthority counts the SVIDs that have not expired, each once: what was held,
// and what workloads have been sent up to now.
func (a *Agent) svidsByAuthority(held summary, now time.Time) map[string]uint32 {
	out, _ := a.workload.HandedOut(now)
	seen := make(map[workload.Leaf]bool, len(out)+len(held.leaves))
	counts := make(map[string]uint32)
	for _, leaf := range slices.Concat(held.leaves, out) {
		if !seen[leaf] && now.Before(leaf.NotAfter) {
			seen[leaf] = true
			counts[leaf.Authority]++
		}
	}
	return counts
}
