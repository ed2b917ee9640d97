package agent_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/types/known/timestamppb"

	"troth.dev/troth/agent/workload"
	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/ca"
	"troth.dev/troth/identity"
	"troth.dev/troth/internal/latest"
)

// fake is a control plane that a test can make misbehave: it speaks the protocol by
// a real issuer, and believes whoever asks.
type fake struct {
	trothv1.UnimplementedAttestationServiceServer
	trothv1.UnimplementedSVIDServiceServer
	trothv1.UnimplementedNodeServiceServer

	issuer  *ca.Issuer
	signer  atomic.Pointer[ca.Issuer] // of SVIDs: a replica that may lag
	pods    latest.Value[[]*trothv1.Workload]
	says    latest.Value[[]*trothv1.WatchResponse] // sent to each stream, after the rest
	reports latest.Value[*trothv1.ReportRequest]
	count   atomic.Int64 // of SVIDs issued to workloads
	address string
}

func startFake(t *testing.T, life time.Duration) *fake {
	t.Helper()
	f := &fake{issuer: newIssuer(t, life)}
	f.signer.Store(f.issuer)
	run(t, f.issuer.Run)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f.address = l.Addr().String()
	var mu sync.Mutex
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, ClientAuth: tls.RequestClientCert,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			mu.Lock() // t is not for many at once
			defer mu.Unlock()
			return serverCertificate(t, f.issuer), nil
		},
	})))
	trothv1.RegisterAttestationServiceServer(s, f)
	trothv1.RegisterSVIDServiceServer(s, f)
	trothv1.RegisterNodeServiceServer(s, f)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-served; err != nil {
			t.Errorf("Serve() = %v", err)
		}
	})
	return f
}

// node starts an agent of the control plane. Processes other than the test are in
// the second pod.
func (f *fake) node(t *testing.T) *node {
	t.Helper()
	f.pods.Set([]*trothv1.Workload{workloadOf(1, web), workloadOf(2, job)})
	return startNode(t, f.address, bundleOf(f.issuer), func() (string, error) { return "token", nil }, func(p workload.Peer) (string, error) {
		if p.PID == int32(os.Getpid()) {
			return "uid-1", nil
		}
		return "uid-2", nil
	})
}

func workloadOf(n int, account identity.ServiceAccount) *trothv1.Workload {
	return &trothv1.Workload{
		PodUid: fmt.Sprintf("uid-%d", n), Namespace: account.Namespace, Name: fmt.Sprintf("pod-%d", n),
		ServiceAccount: account.Name, SpiffeId: fmt.Sprintf("spiffe://example.org/ns/%s/sa/%s", account.Namespace, account.Name),
	}
}

func (f *fake) bundle() *trothv1.Bundle {
	b, _ := f.issuer.Bundle().Load()
	out := &trothv1.Bundle{TrustDomain: b.TrustDomain.Name(), Revision: b.Revision}
	for _, a := range b.Authorities {
		one := &trothv1.Authority{Id: a.ID, Certificate: a.Certificate.Raw}
		if !a.ReissueBy.IsZero() {
			one.ReissueFrom, one.ReissueBy = timestamppb.New(a.ReissueFrom), timestamppb.New(a.ReissueBy)
		}
		out.X509Authorities = append(out.X509Authorities, one)
	}
	return out
}

func (f *fake) AttestAgent(ctx context.Context, in *trothv1.AttestAgentRequest) (*trothv1.AttestAgentResponse, error) {
	id, err := identity.Agent{Node: identity.Node{Name: "node-1", UID: "node-uid-1"}, PodName: "agent-1", PodUID: "agent-uid-1"}.ID(trustDomain)
	if err != nil {
		return nil, err
	}
	issued, err := f.signer.Load().Issue(ctx, ca.Request{ID: id, CSR: in.GetCsr(), Caller: "agent"})
	if err != nil {
		return nil, err
	}
	return &trothv1.AttestAgentResponse{Svid: svidProto(issued[0].SVID), Bundle: f.bundle()}, issued[0].Err
}

func (f *fake) IssueX509SVIDs(ctx context.Context, in *trothv1.IssueX509SVIDsRequest) (*trothv1.IssueX509SVIDsResponse, error) {
	out := &trothv1.IssueX509SVIDsResponse{}
	for _, item := range in.GetItems() {
		id, err := identity.ServiceAccount{Namespace: item.GetPod().GetNamespace(), Name: item.GetPod().GetServiceAccount()}.ID(trustDomain)
		if err != nil {
			return nil, err
		}
		issued, err := f.signer.Load().Issue(ctx, ca.Request{ID: id, CSR: item.GetCsr(), Caller: "agent"})
		if err = errors.Join(err, issued[0].Err); err != nil {
			return nil, err
		}
		out.Results = append(out.Results, &trothv1.X509SVIDResult{Result: &trothv1.X509SVIDResult_Svid{Svid: svidProto(issued[0].SVID)}})
		f.count.Add(1)
	}
	return out, nil
}

func svidProto(s ca.SVID) *trothv1.X509SVID {
	return &trothv1.X509SVID{
		SpiffeId: s.ID.String(), Certificates: s.Certificates,
		ExpiresAt: timestamppb.New(s.NotAfter), AuthorityId: s.AuthorityID,
	}
}

func (f *fake) Watch(in *trothv1.WatchRequest, stream grpc.ServerStreamingServer[trothv1.WatchResponse]) error {
	sent, probed := in.GetHaveBundleRevisions()[trustDomain.Name()], uint64(0)
	for {
		_, bundleChanged := f.issuer.Bundle().Load()
		pods, podsChanged := f.pods.Load()
		says, saysChanged := f.says.Load()
		var messages []*trothv1.WatchResponse
		if b := f.bundle(); b.GetRevision() != sent {
			sent = b.GetRevision()
			messages = append(messages, &trothv1.WatchResponse{Part: &trothv1.WatchResponse_Bundles{Bundles: &trothv1.Bundles{Bundles: []*trothv1.Bundle{b}}}})
		}
		messages = append(messages, &trothv1.WatchResponse{Part: &trothv1.WatchResponse_Workloads{
			Workloads: &trothv1.Workloads{Revision: fmt.Sprint(len(pods)), Workloads: pods}}})
		if sent != probed {
			probed = sent
			part := &trothv1.WatchResponse_Probe{Probe: &trothv1.Probe{Revision: sent}}
			probe, err := f.issuer.Probe(stream.Context())
			if err == nil {
				part.Probe = &trothv1.Probe{
					Revision: probe.Revision, AuthorityId: probe.Authority,
					Trusted: probe.Trusted, Untrusted: probe.Untrusted,
				}
			} else if !errors.Is(err, ca.ErrNothingPrepared) {
				return err
			}
			messages = append(messages, &trothv1.WatchResponse{Part: part})
		}
		for _, m := range append(messages, says...) {
			if err := stream.Send(m); err != nil {
				return err
			}
		}
		select {
		case <-stream.Context().Done():
			return stream.Context().Err()
		case <-bundleChanged:
		case <-podsChanged:
		case <-saysChanged:
		}
	}
}

func (f *fake) Report(_ context.Context, in *trothv1.ReportRequest) (*trothv1.ReportResponse, error) {
	f.reports.Set(in)
	return &trothv1.ReportResponse{}, nil
}

// reported waits for a report that is so.
func (f *fake) reported(t *testing.T, what string, ok func(*trothv1.ReportRequest, *trothv1.BundleReport) bool) *trothv1.ReportRequest {
	t.Helper()
	deadline := time.After(60 * time.Second)
	for {
		r, changed := f.reports.Load()
		if len(r.GetBundles()) == 1 && ok(r, r.GetBundles()[0]) {
			return r
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("no report in a minute: %s; the last one is %v", what, r)
		}
	}
}

// evidence is what a report says of the only agent there is.
func evidence(r *trothv1.ReportRequest) ca.Propagation {
	b := r.GetBundles()[0]
	p := ca.Propagation{
		At: time.Now(), Expected: 1, Revision: b.GetProvedRevision(), Authority: b.GetProvedAuthorityId(),
		Received: 1, Applied: 1, Reporting: 1, Reported: time.Now(), Uses: make(map[string]ca.Use),
	}
	if b.GetProvedRevision() != 0 {
		p.Proved = 1
	}
	for id, n := range r.GetSvidsByAuthority() {
		p.Uses[id] = ca.Use{SVIDs: int(n)}
	}
	return p
}

// One authority takes the place of another by what the agent reports, and of the
// mutual TLS between two unmodified go-spiffe clients nothing fails on the way. What
// a process fetched once and took along is what keeps the old authority from being
// let go, until its pod is gone.
func TestRotation(t *testing.T) {
	f := startFake(t, time.Minute)
	n := f.node(t)
	set, _ := f.issuer.Authorities().Load()
	old, _ := set.Active()
	caller, callee := source(t, n.socket), source(t, n.socket)
	if err := helper(t, "fetch", n.socket).Run(); err != nil {
		t.Fatal(err)
	}
	traffic := talk(t, caller, callee)

	// Its own SVID and those of the two pods are under the first authority.
	f.reported(t, "three SVIDs of one authority", func(r *trothv1.ReportRequest, b *trothv1.BundleReport) bool {
		return r.GetSvidsByAuthority()[old.ID] == 3 && b.GetAppliedRevision() == 1 && r.GetWorkloadStreams() == 2
	})
	next, err := f.issuer.Prepare(t.Context(), order)
	if err != nil {
		t.Fatal(err)
	}
	r := f.reported(t, "the proof", func(_ *trothv1.ReportRequest, b *trothv1.BundleReport) bool {
		return b.GetProvedRevision() == 2 && b.GetProvedAuthorityId() == next.ID && b.GetAppliedRevision() == 2
	})
	if r.GetRunningFor().AsDuration() <= 0 {
		t.Errorf("the agent runs for %v", r.GetRunningFor())
	}
	if got := n.count(t, "troth_agent_bundle_proved_revision"); got != 2 {
		t.Errorf("the metric says that revision %v is proved, want 2", got)
	}
	// The gate opens by nothing but this report.
	if _, err := f.issuer.Taint(t.Context(), old.ID, ca.Order{Actor: "test", Evidence: evidence(r)}); err != nil {
		t.Fatal(err)
	}
	if set, _ := f.issuer.Authorities().Load(); set.Authorities[0].State != ca.Tainted {
		t.Fatalf("the old authority is %v, want tainted", set.Authorities[0].State)
	}
	f.reported(t, "all replaced but what was fetched once", func(r *trothv1.ReportRequest, _ *trothv1.BundleReport) bool {
		return r.GetSvidsByAuthority()[old.ID] == 1 && r.GetSvidsByAuthority()[next.ID] == 3
	})
	if got := n.count(t, "troth_agent_replacements_total", "reissue"); got != 3 {
		t.Errorf("%v SVIDs were replaced in the window, want the agent's own and two", got)
	}
	// What is said after that is of its old session no more.
	f.pods.Set([]*trothv1.Workload{workloadOf(1, web), workloadOf(2, job), workloadOf(3, web)})
	r = f.reported(t, "the third pod", func(r *trothv1.ReportRequest, _ *trothv1.BundleReport) bool {
		return r.GetWorkloadsRevision() == "3"
	})
	if got := r.GetSvidsByAuthority(); got[old.ID] != 1 || got[next.ID] != 3 {
		t.Errorf("SVIDs by authority %v, want one that was fetched once, and three", got)
	}
	f.pods.Set([]*trothv1.Workload{workloadOf(1, web)})
	r = f.reported(t, "nothing under the old authority", func(r *trothv1.ReportRequest, _ *trothv1.BundleReport) bool {
		return r.GetSvidsByAuthority()[old.ID] == 0 && r.GetSvidsByAuthority()[next.ID] == 2
	})
	// Force is for the replica that might still sign: there is none but this one.
	if _, err := f.issuer.Revoke(t.Context(), old.ID, ca.Order{Actor: "test", Reason: "one replica", Force: true, Evidence: evidence(r)}); err != nil {
		t.Fatal(err)
	}
	f.reported(t, "the last bundle", func(_ *trothv1.ReportRequest, b *trothv1.BundleReport) bool {
		return b.GetAppliedRevision() == 4 && b.GetProvedRevision() == 0 && b.GetProbeFailure() == 0
	})
	traffic(t)
	if got := n.count(t, "troth_agent_replacements_total", "authority_gone"); got != 0 {
		t.Errorf("%v SVIDs were replaced after their authority was gone, want none", got)
	}
}

// All authorities are revoked by force under an agent that is connected: its own SVID
// and those of its workloads are replaced at once.
func TestRevokedByForce(t *testing.T) {
	f := startFake(t, time.Hour)
	n := f.node(t)
	client := source(t, n.socket)
	for range 2 {
		replaceAuthorities(t, f.issuer)
		n.anchor.Store(bundleOf(f.issuer))
		began := time.Now()
		eventually(t, "an SVID by the authority in use", func() bool {
			_, _, err := x509svid.Verify(svidOf(t, client).Certificates, bundleOf(f.issuer))
			return err == nil
		})
		t.Logf("replaced after %v", time.Since(began))
	}
}

// A control plane that lies or errs.
func TestMisbehavingControlPlane(t *testing.T) {
	f := startFake(t, time.Hour)
	n := f.node(t)
	client := source(t, n.socket)
	if _, err := f.issuer.Prepare(t.Context(), order); err != nil {
		t.Fatal(err)
	}
	f.reported(t, "the proof", func(_ *trothv1.ReportRequest, b *trothv1.BundleReport) bool { return b.GetProvedRevision() == 2 })
	probe, err := f.issuer.Probe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	says := func(p *trothv1.Probe) {
		f.says.Set([]*trothv1.WatchResponse{{Part: &trothv1.WatchResponse_Probe{Probe: p}}})
	}
	good := func() *trothv1.Probe {
		return &trothv1.Probe{Revision: 2, AuthorityId: probe.Authority, Trusted: probe.Trusted, Untrusted: probe.Untrusted}
	}

	swapped := good()
	swapped.Trusted, swapped.Untrusted = swapped.GetUntrusted(), swapped.GetTrusted()
	says(swapped)
	f.reported(t, "a probe with its leaves swapped", func(_ *trothv1.ReportRequest, b *trothv1.BundleReport) bool {
		return b.GetProvedRevision() == 0 && b.GetProbeFailure() == trothv1.ProbeFailure_PROBE_FAILURE_TRUSTED_REFUSED
	})
	trusting := good()
	trusting.Untrusted = trusting.GetTrusted()
	says(trusting)
	f.reported(t, "a probe whose leaves are both trusted", func(_ *trothv1.ReportRequest, b *trothv1.BundleReport) bool {
		return b.GetProvedRevision() == 0 && b.GetProbeFailure() == trothv1.ProbeFailure_PROBE_FAILURE_UNTRUSTED_ACCEPTED
	})
	says(good())
	f.reported(t, "a good probe again", func(_ *trothv1.ReportRequest, b *trothv1.BundleReport) bool {
		return b.GetProvedRevision() == 2 && b.GetProbeFailure() == 0
	})
	future := good()
	future.Revision = 3
	says(future)
	f.reported(t, "a probe of a revision to come", func(_ *trothv1.ReportRequest, b *trothv1.BundleReport) bool {
		return b.GetProvedRevision() == 0 && b.GetProbeFailure() == 0
	})
	says(&trothv1.Probe{Revision: 2})

	breaks := n.count(t, "troth_agent_stream_breaks_total")
	forged := f.bundle()
	forged.X509Authorities = forged.GetX509Authorities()[:1]
	f.says.Set([]*trothv1.WatchResponse{{Part: &trothv1.WatchResponse_Bundles{Bundles: &trothv1.Bundles{Bundles: []*trothv1.Bundle{forged}}}}})
	eventually(t, "the end of the stream with another bundle of the same revision", func() bool {
		return n.count(t, "troth_agent_stream_breaks_total") > breaks
	})
	if bundle, err := client.GetX509BundleForTrustDomain(trustDomain); err != nil || len(bundle.X509Authorities()) != 2 {
		t.Errorf("the workload's bundle is %v (%v), want that of two authorities", bundle, err)
	}
}

// talk has the caller greet the callee over mutual TLS on a connection that stays
// and on one new connection after the other, until the returned function is called,
// which fails the test for each greeting that failed.
func talk(t *testing.T, caller, callee *workloadapi.X509Source) (stop func(*testing.T)) {
	t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(callee, callee, tlsconfig.AuthorizeMemberOf(trustDomain)))
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer conn.Close()
				buffer := make([]byte, 16)
				for {
					n, err := conn.Read(buffer)
					if err != nil {
						return
					}
					if _, err := conn.Write(buffer[:n]); err != nil {
						return
					}
				}
			})
		}
	})
	greet := func(conn net.Conn) error {
		if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			return err
		}
		if _, err := conn.Write([]byte("hello")); err != nil {
			return err
		}
		_, err := conn.Read(make([]byte, 16))
		return err
	}
	dial := func() (net.Conn, error) {
		return tls.Dial("tcp", l.Addr().String(), tlsconfig.MTLSClientConfig(caller, caller, tlsconfig.AuthorizeMemberOf(trustDomain)))
	}
	lasting, err := dial()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	var greetings int
	var failed []error
	var talking sync.WaitGroup
	talking.Go(func() {
		pause := time.NewTicker(20 * time.Millisecond)
		defer pause.Stop()
		for {
			conn, err := dial()
			if err == nil {
				err = errors.Join(greet(conn), greet(lasting))
				conn.Close()
			}
			if err != nil {
				failed = append(failed, err)
			}
			greetings++
			select {
			case <-done:
				return
			case <-pause.C:
			}
		}
	})
	end := sync.OnceFunc(func() {
		close(done)
		talking.Wait()
		lasting.Close()
		l.Close()
		serving.Wait()
	})
	t.Cleanup(end)
	return func(t *testing.T) {
		t.Helper()
		end()
		t.Logf("%d greetings", greetings)
		if len(failed) > 0 {
			t.Errorf("%d of %d greetings failed, the first by %v", len(failed), greetings, failed[0])
		}
	}
}
