package server_test

import (
	"context"
	"errors"
	"io"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/identity"
	"troth.dev/troth/server"
	"troth.dev/troth/storage"
)

// calls makes each method of the protocol once, with a request that is good in
// itself, over a connection.
func calls(t *testing.T, conn *grpc.ClientConn, pod identity.Pod) map[string]error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, csr := newCSR(t)
	results := make(map[string]error)
	_, results["AttestAgent"] = trothv1.NewAttestationServiceClient(conn).AttestAgent(ctx, &trothv1.AttestAgentRequest{Csr: csr})
	_, results["IssueX509SVIDs"] = trothv1.NewSVIDServiceClient(conn).IssueX509SVIDs(ctx,
		&trothv1.IssueX509SVIDsRequest{Items: []*trothv1.X509SVIDRequest{{Pod: reference(pod), Csr: csr}}})
	_, results["GetBundle"] = trothv1.NewBundleServiceClient(conn).GetBundle(ctx, &trothv1.GetBundleRequest{})
	bundles, err := trothv1.NewBundleServiceClient(conn).WatchBundles(ctx, &trothv1.WatchBundlesRequest{})
	if err == nil {
		_, err = bundles.Recv()
	}
	results["WatchBundles"] = err
	watch, err := trothv1.NewNodeServiceClient(conn).Watch(ctx, &trothv1.WatchRequest{})
	if err == nil {
		_, err = watch.Recv()
	}
	results["Watch"] = err
	resolve, err := trothv1.NewDirectoryServiceClient(conn).Resolve(ctx)
	if err == nil {
		err = resolve.Send(&trothv1.ResolveRequest{Resolve: []string{"192.0.2.1"}})
	}
	if err == nil || errors.Is(err, io.EOF) { // Recv has what was refused
		_, err = resolve.Recv()
	}
	results["Resolve"] = err
	_, results["Report"] = trothv1.NewNodeServiceClient(conn).Report(ctx, &trothv1.ReportRequest{})
	return results
}

// Who may call what, seen from outside.
func TestCallers(t *testing.T) {
	p, cluster, agentPod := startDev(t, nil)
	pod := cluster.AddPod(web, "web-1")
	agent := p.attest(t, tokenFor(t, cluster, agentPod))

	key, csr := newCSR(t)
	out, err := trothv1.NewSVIDServiceClient(p.dial(t, nil, tokenFor(t, cluster, pod))).IssueX509SVIDs(t.Context(),
		&trothv1.IssueX509SVIDsRequest{Items: []*trothv1.X509SVIDRequest{{Csr: csr}}})
	if err != nil {
		t.Fatal(err)
	}
	workload := assemble(t, key, out.GetResults()[0].GetSvid())
	if want := "spiffe://example.org/ns/shop/sa/web"; workload.ID.String() != want {
		t.Fatalf("the workload's SVID is of %q, want %q", workload.ID, want)
	}

	const notPermitted, noCredentials, notAnAgent = "PermissionDenied METHOD_NOT_PERMITTED", "Unauthenticated NO_CREDENTIALS", "PermissionDenied NOT_AN_AGENT"
	for _, test := range []struct {
		caller string
		svid   x509svid.Source
		token  string
		want   map[string]string // OK if not here
	}{
		{caller: "anonymous", want: map[string]string{
			"AttestAgent": noCredentials, "IssueX509SVIDs": noCredentials, "Watch": noCredentials, "Resolve": noCredentials, "Report": noCredentials}},
		{caller: "agent candidate", token: tokenFor(t, cluster, agentPod), want: map[string]string{
			"IssueX509SVIDs": notPermitted, "Watch": notPermitted, "Resolve": notPermitted, "Report": notPermitted}},
		{caller: "agent", svid: agent, want: map[string]string{"AttestAgent": notAnAgent}},
		{caller: "workload by token", token: tokenFor(t, cluster, pod), want: map[string]string{
			"AttestAgent": notAnAgent, "Watch": notPermitted, "Resolve": notPermitted, "Report": notPermitted}},
		{caller: "workload by SVID", svid: workload, want: map[string]string{
			"AttestAgent": notAnAgent, "IssueX509SVIDs": notAnAgent, "Watch": notAnAgent, "Resolve": notAnAgent, "Report": notAnAgent}},
		{caller: "garbage token", token: "x.y.z", want: map[string]string{
			"AttestAgent": "Unauthenticated TOKEN_MALFORMED", "IssueX509SVIDs": "Unauthenticated TOKEN_MALFORMED",
			"Watch": "Unauthenticated TOKEN_MALFORMED", "Resolve": "Unauthenticated TOKEN_MALFORMED", "Report": "Unauthenticated TOKEN_MALFORMED"}},
	} {
		t.Run(test.caller, func(t *testing.T) {
			for method, err := range calls(t, p.dial(t, test.svid, test.token), pod) {
				want := test.want[method]
				if want == "" {
					want = "OK"
				}
				if got := refusal(err); got != want {
					t.Errorf("%s by %s = %s, want %s", method, test.caller, got, want)
				}
			}
		})
	}

	t.Run("both", func(t *testing.T) {
		ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+tokenFor(t, cluster, pod))
		_, err := trothv1.NewNodeServiceClient(p.dial(t, agent, "")).Report(ctx, &trothv1.ReportRequest{})
		if got, want := refusal(err), "InvalidArgument AMBIGUOUS_CALLER"; got != want {
			t.Errorf("Report with a certificate and a token = %s, want %s", got, want)
		}
	})
	t.Run("two tokens", func(t *testing.T) {
		ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer a", "authorization", "Bearer b")
		_, err := trothv1.NewNodeServiceClient(p.dial(t, nil, "")).Report(ctx, &trothv1.ReportRequest{})
		if got, want := refusal(err), "Unauthenticated TOKEN_MALFORMED"; got != want {
			t.Errorf("Report with two tokens = %s, want %s", got, want)
		}
	})
	t.Run("after its pod is gone", func(t *testing.T) {
		cluster.RemovePod(agentPod.UID)
		_, err := trothv1.NewNodeServiceClient(p.dial(t, agent, "")).Report(t.Context(), &trothv1.ReportRequest{})
		if got, want := refusal(err), "Unauthenticated POD_NOT_FOUND"; got != want {
			t.Errorf("Report by an agent without a pod = %s, want %s", got, want)
		}
	})
}

func TestAttestAgent(t *testing.T) {
	p, cluster, agentPod := startDev(t, nil)
	svid := p.attest(t, tokenFor(t, cluster, agentPod))
	agent, err := identity.ParseAgent(svid.ID)
	if err != nil {
		t.Fatal(err)
	}
	if want := (identity.Agent{Node: agentPod.Node, PodName: agentPod.Name, PodUID: agentPod.UID}); agent != want {
		t.Errorf("the agent's SVID is bound to %+v, want %+v", agent, want)
	}
	if _, _, err := x509svid.Verify(svid.Certificates, p.bundle()); err != nil {
		t.Errorf("the agent's SVID: %v", err)
	}
	if issued, err := p.store.Query(t.Context(), storage.Query{ID: svid.ID}); err != nil || len(issued) != 1 {
		t.Errorf("the ledger has %d issuances of %q (%v), want 1", len(issued), svid.ID, err)
	}

	_, csr := newCSR(t)
	csr[len(csr)-1] ^= 1
	client := trothv1.NewAttestationServiceClient(p.dial(t, nil, tokenFor(t, cluster, agentPod)))
	_, err = client.AttestAgent(t.Context(), &trothv1.AttestAgentRequest{Csr: csr})
	if got, want := refusal(err), "InvalidArgument CSR_SIGNATURE"; got != want {
		t.Errorf("AttestAgent(without proof of possession) = %s, want %s", got, want)
	}
}

// What an agent gets for a batch: each item by itself, in its place.
func TestIssueX509SVIDs(t *testing.T) {
	p, cluster, agentPod := startDev(t, nil)
	conn := p.dial(t, p.attest(t, tokenFor(t, cluster, agentPod)), "")
	client := trothv1.NewSVIDServiceClient(conn)
	pod := cluster.AddPod(web, "web-1")
	gone := cluster.AddPod(web, "web-2")
	cluster.RemovePod(gone.UID)
	replaced := cluster.AddPod(web, "web-3")
	cluster.RemovePod(replaced.UID)
	cluster.AddPod(web, "web-3")

	lie := func(change func(*trothv1.PodReference)) *trothv1.PodReference {
		r := reference(pod)
		change(r)
		return r
	}
	_, good := newCSR(t)
	tests := []struct {
		name string
		pod  *trothv1.PodReference
		csr  []byte
		want string
	}{
		{"good", reference(pod), good, "OK"},
		{"no pod", nil, good, "InvalidArgument POD_REFERENCE_INVALID"},
		{"no UID", lie(func(r *trothv1.PodReference) { r.Uid = "" }), good, "InvalidArgument POD_REFERENCE_INVALID"},
		{"long name", lie(func(r *trothv1.PodReference) { r.Name = strings.Repeat("a", 254) }), good, "InvalidArgument POD_REFERENCE_INVALID"},
		{"other namespace", lie(func(r *trothv1.PodReference) { r.Namespace = "other" }), good, "PermissionDenied POD_NAME_MISMATCH"},
		{"other name", lie(func(r *trothv1.PodReference) { r.Name = "other" }), good, "PermissionDenied POD_NAME_MISMATCH"},
		{"other account", lie(func(r *trothv1.PodReference) { r.ServiceAccount = "admin" }), good, "PermissionDenied SERVICE_ACCOUNT_MISMATCH"},
		{"not seen", reference(gone), good, "FailedPrecondition POD_NOT_SEEN retry"},
		{"replaced", reference(replaced), good, "PermissionDenied POD_UID_MISMATCH"},
		{"no CSR", reference(pod), nil, "InvalidArgument CSR_MALFORMED"},
		{"long CSR", reference(pod), make([]byte, 5000), "InvalidArgument CSR_TOO_LARGE"},
		{"good again", reference(pod), good, "OK"},
	}
	in := &trothv1.IssueX509SVIDsRequest{}
	for _, test := range tests {
		in.Items = append(in.Items, &trothv1.X509SVIDRequest{Pod: test.pod, Csr: test.csr})
	}
	out, err := client.IssueX509SVIDs(t.Context(), in)
	if err != nil {
		t.Fatal(err)
	}
	for n, test := range tests {
		if got := itemRefusal(out.GetResults()[n]); got != test.want {
			t.Errorf("%s: %s, want %s", test.name, got, test.want)
		}
	}
	id, err := web.ID(trustDomain)
	if err != nil {
		t.Fatal(err)
	}
	issued, err := p.store.Query(t.Context(), storage.Query{ID: id})
	if err != nil || len(issued) != 2 {
		t.Errorf("the ledger has %d issuances of %q (%v), want 2", len(issued), id, err)
	}

	t.Run("bounds", func(t *testing.T) {
		_, err := client.IssueX509SVIDs(t.Context(), &trothv1.IssueX509SVIDsRequest{})
		if got, want := refusal(err), "InvalidArgument NO_ITEMS"; got != want {
			t.Errorf("no items: %s, want %s", got, want)
		}
		_, err = client.IssueX509SVIDs(t.Context(), &trothv1.IssueX509SVIDsRequest{Items: make([]*trothv1.X509SVIDRequest, 101)})
		if got, want := refusal(err), "InvalidArgument TOO_MANY_ITEMS"; got != want {
			t.Errorf("101 items: %s, want %s", got, want)
		}
	})
	t.Run("a workload for another", func(t *testing.T) {
		other := cluster.AddPod(identity.ServiceAccount{Namespace: "shop", Name: "admin"}, "admin-1")
		own := trothv1.NewSVIDServiceClient(p.dial(t, nil, tokenFor(t, cluster, pod)))
		out, err := own.IssueX509SVIDs(t.Context(), &trothv1.IssueX509SVIDsRequest{
			Items: []*trothv1.X509SVIDRequest{{Pod: reference(other), Csr: good}}})
		if err != nil {
			t.Fatal(err)
		}
		if got, want := itemRefusal(out.GetResults()[0]), "PermissionDenied NOT_YOUR_POD"; got != want {
			t.Errorf("a workload asks for another: %s, want %s", got, want)
		}
	})
}

func TestNotReady(t *testing.T) {
	p, _, _ := startDev(t, nil)
	if _, err := trothv1.NewBundleServiceClient(p.dial(t, nil, "")).GetBundle(t.Context(), &trothv1.GetBundleRequest{}); err != nil {
		t.Fatal(err)
	}
	probe := func(path string) int {
		w := httptest.NewRecorder()
		p.server.Health(prometheus.NewRegistry()).ServeHTTP(w, httptest.NewRequest("GET", path, nil))
		return w.Code
	}
	if got := probe("/readyz"); got != 200 {
		t.Errorf("GET /readyz of a server that serves = %d, want 200", got)
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	if got := probe("/readyz"); got != 503 {
		t.Errorf("GET /readyz of a server that ended = %d, want 503", got)
	}
	if got := probe("/livez"); got != 200 {
		t.Errorf("GET /livez = %d, want 200", got)
	}
}

func TestGetBundle(t *testing.T) {
	p, _, _ := startDev(t, nil)
	client := trothv1.NewBundleServiceClient(p.dial(t, nil, ""))
	for _, test := range []struct{ trustDomain, want string }{
		{"", "OK"},
		{"example.org", "OK"},
		{"example.com", "NotFound UNKNOWN_TRUST_DOMAIN"},
		{"Not A Domain", "InvalidArgument INVALID_TRUST_DOMAIN"},
	} {
		out, err := client.GetBundle(t.Context(), &trothv1.GetBundleRequest{TrustDomain: test.trustDomain})
		if got := refusal(err); got != test.want {
			t.Errorf("GetBundle(%q) = %s, want %s", test.trustDomain, got, test.want)
		}
		if err == nil && (out.GetBundle().GetRevision() != 1 || len(out.GetBundle().GetX509Authorities()) != 1) {
			t.Errorf("GetBundle(%q) = %v", test.trustDomain, out.GetBundle())
		}
	}
}

// receive returns the next message of the stream and the name of its part.
func receive(t *testing.T, stream grpc.ServerStreamingClient[trothv1.WatchResponse]) (string, *trothv1.WatchResponse) {
	t.Helper()
	m, err := stream.Recv()
	if err != nil {
		t.Fatalf("Recv: %v", err)
	}
	if m.GetBundles() != nil {
		return "bundles", m
	}
	return "workloads", m
}

func TestWatch(t *testing.T) {
	p, cluster, agentPod := startDev(t, func(c *server.Config) { c.Uncaptured = map[string]bool{agents.Namespace: true} })
	conn := p.dial(t, p.attest(t, tokenFor(t, cluster, agentPod)), "")
	client := trothv1.NewNodeServiceClient(conn)
	stream, err := client.Watch(t.Context(), &trothv1.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if part, m := receive(t, stream); part != "bundles" || m.GetBundles().GetBundles()[0].GetRevision() != 1 {
		t.Fatalf("the first message is %v, want the bundles", m)
	}
	_, m := receive(t, stream)
	if got := m.GetWorkloads().GetWorkloads(); len(got) != 1 || got[0].GetPodUid() != agentPod.UID {
		t.Fatalf("the second message is %v, want the agent's own pod", m)
	}

	pod := cluster.AddPod(web, "web-1")
	part, m := receive(t, stream)
	if part != "workloads" || len(m.GetWorkloads().GetWorkloads()) != 2 {
		t.Fatalf("after a pod was added came %v, want two workloads", m)
	}
	for _, w := range m.GetWorkloads().GetWorkloads() {
		if w.GetPodUid() == pod.UID && (w.GetSpiffeId() != "spiffe://example.org/ns/shop/sa/web" ||
			w.GetPolicy().GetMode() != trothv1.MTLSMode_MTLS_MODE_PERMISSIVE || w.GetCapture() != trothv1.Capture_CAPTURE_ENABLED) {
			t.Errorf("the new workload is %v", w)
		}
		if w.GetPodUid() == agentPod.UID && w.GetCapture() != trothv1.Capture_CAPTURE_NAMESPACE {
			t.Errorf("the agent, in a namespace that is left alone, is %v", w)
		}
	}

	t.Run("resumed", func(t *testing.T) {
		again, err := client.Watch(t.Context(), &trothv1.WatchRequest{
			HaveBundleRevisions:   map[string]uint64{"example.org": 1},
			HaveWorkloadsRevision: m.GetWorkloads().GetRevision(),
		})
		if err != nil {
			t.Fatal(err)
		}
		second := cluster.AddPod(web, "web-2")
		part, m := receive(t, again)
		if part != "workloads" || len(m.GetWorkloads().GetWorkloads()) != 3 {
			t.Errorf("the first message of a resumed stream is %v, want the news alone", m)
		}
		cluster.RemovePod(second.UID)
	})
	t.Run("too many", func(t *testing.T) {
		var last error
		for range 10 {
			stream, err := client.Watch(t.Context(), &trothv1.WatchRequest{})
			if err == nil {
				_, err = stream.Recv()
			}
			if err != nil {
				last = err
				break
			}
		}
		if got, want := refusal(last), "ResourceExhausted TOO_MANY_STREAMS retry"; got != want {
			t.Errorf("ten streams: %s, want %s", got, want)
		}
	})
	t.Run("the agent's pod goes", func(t *testing.T) {
		cluster.RemovePod(agentPod.UID)
		var err error
		for err == nil {
			_, err = stream.Recv()
		}
		if got, want := refusal(err), "Unauthenticated POD_NOT_FOUND"; got != want {
			t.Errorf("the stream ended with %s, want %s", got, want)
		}
	})
}

func TestWatchEndsWithTheSVID(t *testing.T) {
	t.Parallel()
	p, cluster, agentPod := startDev(t, nil)
	client := trothv1.NewNodeServiceClient(p.dial(t, p.attest(t, tokenFor(t, cluster, agentPod)), ""))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	stream, err := client.Watch(ctx, &trothv1.WatchRequest{})
	for err == nil {
		_, err = stream.Recv()
	}
	if got, want := refusal(err), "Unauthenticated SVID_EXPIRED"; got != want {
		t.Errorf("the stream of an agent whose SVID expired ended with %s, want %s", got, want)
	}
	_, err = client.Report(ctx, &trothv1.ReportRequest{})
	if got, want := refusal(err), "Unauthenticated SVID_EXPIRED"; got != want {
		t.Errorf("Report over a connection whose SVID expired = %s, want %s", got, want)
	}
}

func TestDrain(t *testing.T) {
	p, cluster, agentPod := startDev(t, nil)
	stream, err := trothv1.NewNodeServiceClient(p.dial(t, p.attest(t, tokenFor(t, cluster, agentPod)), "")).
		Watch(t.Context(), &trothv1.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	receive(t, stream)
	if err := p.stop(); err != nil {
		t.Errorf("Serve() = %v", err)
	}
	for err == nil {
		_, err = stream.Recv()
	}
	if got, want := refusal(err), "Unavailable SHUTTING_DOWN retry"; got != want || errors.Is(err, io.EOF) {
		t.Errorf("the stream of a server that drains ended with %s, want %s", got, want)
	}
}

func TestLimits(t *testing.T) {
	p, cluster, agentPod := startDev(t, func(c *server.Config) {
		c.Limits = server.Limits{PerCaller: 1, PerConnection: 1, AnonymousStreams: 1}
	})
	agent := p.attest(t, tokenFor(t, cluster, agentPod))
	last := func(call func() error) string {
		for range 10 {
			if err := call(); err != nil {
				return refusal(err)
			}
		}
		return "OK"
	}
	const limited = "ResourceExhausted RATE_LIMITED retry"
	nodes := trothv1.NewNodeServiceClient(p.dial(t, agent, ""))
	if got := last(func() error {
		_, err := nodes.Report(t.Context(), &trothv1.ReportRequest{})
		return err
	}); got != limited {
		t.Errorf("ten calls of an agent that may make one a second: %s, want %s", got, limited)
	}
	bundles := trothv1.NewBundleServiceClient(p.dial(t, nil, ""))
	if got := last(func() error {
		_, err := bundles.GetBundle(t.Context(), &trothv1.GetBundleRequest{})
		return err
	}); got != limited {
		t.Errorf("ten calls over a connection that may make one a second: %s, want %s", got, limited)
	}
	garbage := trothv1.NewNodeServiceClient(p.dial(t, nil, "a.b.c"))
	if got := last(func() error {
		for range 10 {
			if _, err := garbage.Report(t.Context(), &trothv1.ReportRequest{}); refusal(err) == limited {
				return err
			}
		}
		return nil
	}); got != limited {
		t.Errorf("garbage tokens over a connection that may make one call a second: %s, want %s", got, limited)
	}
}

func TestReviewHasTheLastWord(t *testing.T) {
	var answer error
	p, cluster, agentPod := startDev(t, func(c *server.Config) {
		c.ReviewToken = func(context.Context, string) error { return answer }
	})
	_, csr := newCSR(t)
	client := trothv1.NewAttestationServiceClient(p.dial(t, nil, tokenFor(t, cluster, agentPod)))
	for _, test := range []struct {
		answer error
		want   string
	}{
		{nil, "OK"},
		{identity.ErrTokenRefused, "Unauthenticated TOKEN_REVIEW"},
		{errors.New("no answer"), "Unavailable TOKEN_REVIEW_UNAVAILABLE retry"},
	} {
		answer = test.answer
		_, err := client.AttestAgent(t.Context(), &trothv1.AttestAgentRequest{Csr: csr})
		if got := refusal(err); got != test.want {
			t.Errorf("AttestAgent when the review says %v = %s, want %s", test.answer, got, test.want)
		}
	}
}

// What a server hands out has its place, and those of one batch are spread over the
// window, with what came before them.
func TestPlaces(t *testing.T) {
	p, cluster, agentPod := startDev(t, nil)
	conn := p.dial(t, p.attest(t, tokenFor(t, cluster, agentPod)), "")
	pod := cluster.AddPod(web, "web-1")
	_, csr := newCSR(t)
	const batch = 50
	in := &trothv1.IssueX509SVIDsRequest{}
	for range batch {
		in.Items = append(in.Items, &trothv1.X509SVIDRequest{Pod: reference(pod), Csr: csr})
	}
	out, err := trothv1.NewSVIDServiceClient(conn).IssueX509SVIDs(t.Context(), in)
	if err != nil {
		t.Fatal(err)
	}
	again, err := trothv1.NewAttestationServiceClient(p.dial(t, nil, tokenFor(t, cluster, agentPod))).
		AttestAgent(t.Context(), &trothv1.AttestAgentRequest{Csr: csr})
	if err != nil {
		t.Fatal(err)
	}
	svids := []*trothv1.X509SVID{again.GetSvid()}
	for _, result := range out.GetResults() {
		svids = append(svids, result.GetSvid())
	}
	var fifths [5]int
	for _, svid := range svids {
		if svid.Place == nil {
			t.Fatalf("the SVID of %s has no place", svid.GetSpiffeId())
		}
		fifths[uint64(svid.GetPlace())*5>>32]++
	}
	for _, count := range fifths {
		if count < 9 || count > 12 {
			t.Fatalf("of %d, the fifths of a window have %v", len(svids), fifths)
		}
	}
}
