package agent

import (
	"context"
	"log/slog"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	trothv1 "troth.dev/troth/api/troth/v1"
)

const (
	// reportEvery is how long nothing may change before the agent reports anyway.
	reportEvery = time.Minute
	// reportPause is what lies between two reports at least: a change of the
	// bundle wakes the reporter once for each stream that has been sent it.
	reportPause = 100 * time.Millisecond
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
		call, cancel := context.WithTimeout(ctx, callPatience)
		_, err := client.Report(call, a.newReport())
		cancel()
		if err != nil && ctx.Err() == nil {
			a.config.Log.LogAttrs(ctx, slog.LevelDebug, "not reported", slog.Any("err", err))
		}
		if sleep(ctx, reportPause) != nil {
			return
		}
		again := time.NewTimer(reportEvery)
		select {
		case <-ctx.Done():
		case <-held:
		case <-delivered:
		case <-again.C:
		}
		again.Stop()
	}
}

func (a *Agent) newReport() *trothv1.ReportRequest {
	// What was delivered is read first: a bundle that arrives in between makes
	// the report too modest, never too bold.
	delivered, _ := a.workload.Delivered().Load()
	held := a.identities.summary()
	bundle := &trothv1.BundleReport{
		TrustDomain:      a.config.TrustDomain.Name(),
		ReceivedRevision: held.bundleRevision,
		AppliedRevision:  held.bundleRevision, // by whoever opens a stream from now on
	}
	if delivered.Streams > 0 {
		bundle.AppliedRevision = delivered.Revisions[a.config.TrustDomain]
	}
	r := &trothv1.ReportRequest{
		Bundles:           []*trothv1.BundleReport{bundle},
		WorkloadsRevision: held.workloadsRevision,
		SvidsByAuthority:  held.byAuthority,
		WorkloadStreams:   uint32(delivered.Streams),
	}
	for _, p := range a.peers.Recent(time.Now().Add(-plaintextMemory)) {
		r.PlaintextPeers = append(r.PlaintextPeers, &trothv1.PlaintextPeer{
			PodUid: p.Pod, Port: uint32(p.Port), Source: p.Source.String(), LastSeen: timestamppb.New(p.Last),
		})
	}
	if !held.earliestExpiry.IsZero() {
		r.EarliestExpiry = timestamppb.New(held.earliestExpiry)
	}
	return r
}
