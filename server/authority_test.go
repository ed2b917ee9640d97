package server_test

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/server"
)

// scriptedAgent is an agent that does what the test says: it watches, and reports
// when it is told to.
type scriptedAgent struct {
	conn   *grpc.ClientConn
	stream grpc.ServerStreamingClient[trothv1.WatchResponse]
}

func watchAs(t *testing.T, conn *grpc.ClientConn) scriptedAgent {
	t.Helper()
	stream, err := trothv1.NewNodeServiceClient(conn).Watch(t.Context(), &trothv1.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return scriptedAgent{conn: conn, stream: stream}
}

// until reads the stream up to the first part that is wanted, and returns the
// kinds of all that it read.
func (a scriptedAgent) until(t *testing.T, wanted func(*trothv1.WatchResponse) bool) (last *trothv1.WatchResponse, read string) {
	t.Helper()
	var kinds []string
	for {
		message, err := a.stream.Recv()
		if err != nil {
			t.Fatalf("after %v: %v", kinds, err)
		}
		switch message.GetPart().(type) {
		case *trothv1.WatchResponse_Bundles:
			kinds = append(kinds, fmt.Sprint("bundles ", message.GetBundles().GetBundles()[0].GetRevision()))
		case *trothv1.WatchResponse_Workloads:
			kinds = append(kinds, "workloads")
		case *trothv1.WatchResponse_Probe:
			kinds = append(kinds, fmt.Sprint("probe ", message.GetProbe().GetRevision()))
		}
		if wanted(message) {
			return message, strings.Join(kinds, ", ")
		}
	}
}

func (a scriptedAgent) report(t *testing.T, r *trothv1.ReportRequest) {
	t.Helper()
	if _, err := trothv1.NewNodeServiceClient(a.conn).Report(t.Context(), r); err != nil {
		t.Fatal(err)
	}
}

// proof is the report of an agent that has proved what the probe asks for.
func proof(probe *trothv1.Probe) *trothv1.ReportRequest {
	return &trothv1.ReportRequest{
		Bundles: []*trothv1.BundleReport{{
			TrustDomain: trustDomain.Name(), ReceivedRevision: probe.GetRevision(), AppliedRevision: probe.GetRevision(),
			ProvedRevision: probe.GetRevision(), ProvedAuthorityId: probe.GetAuthorityId(),
		}},
		RunningFor: durationpb.New(2 * time.Hour),
	}
}

func states(s *trothv1.AuthorityStatus) string {
	var all []string
	for _, a := range s.GetAuthorities() {
		all = append(all, strings.ToLower(strings.TrimPrefix(a.GetState().String(), "AUTHORITY_STATE_")))
	}
	return strings.Join(all, ", ")
}

// An operator replaces the active authority: prepared, it is refused until the
// agent has proved it, and then it signs at once, also for the server itself.
func TestRotation(t *testing.T) {
	p, cluster, pod := startDev(t, func(c *server.Config) { c.Operator = anyOperator })
	agent := watchAs(t, p.dial(t, p.attest(t, tokenFor(t, cluster, pod)), ""))
	operator := trothv1.NewAuthorityServiceClient(p.dial(t, nil, "a token"))
	ctx := t.Context()
	following, err := operator.WatchAuthorityStatus(ctx, &trothv1.WatchAuthorityStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	// becomes follows the operator's stream until the status is as wanted.
	becomes := func(what string, wanted func(*trothv1.AuthorityStatus) bool) *trothv1.AuthorityStatus {
		t.Helper()
		for {
			message, err := following.Recv()
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			if wanted(message.GetStatus()) {
				return message.GetStatus()
			}
		}
	}
	first := becomes("at first", func(s *trothv1.AuthorityStatus) bool { return s.GetPropagation().GetExpected() == 1 })
	if got := states(first); got != "active" || first.GetSvidLife().AsDuration() != time.Hour {
		t.Errorf("at first: %s, SVIDs of %v", got, first.GetSvidLife().AsDuration())
	}

	prepared, err := operator.PrepareAuthority(ctx, &trothv1.PrepareAuthorityRequest{Reason: "yearly"})
	if err != nil {
		t.Fatal(err)
	}
	next := prepared.GetAuthority()
	if c := next.GetLastChange(); c.GetActor() != "somebody" || c.GetReason() != "yearly" || c.GetOperation() != "prepare" || c.GetBundleSha256() == "" {
		t.Errorf("the change is %v", c)
	}
	message, read := agent.until(t, func(m *trothv1.WatchResponse) bool { return m.GetProbe().GetAuthorityId() != "" })
	if want := "bundles 1, workloads, bundles 2, probe 2"; read != want {
		t.Errorf("the agent got %s, want %s", read, want)
	}

	// Not yet: and the refusal says who is waited for.
	_, err = operator.ActivateAuthority(ctx, &trothv1.ActivateAuthorityRequest{Id: next.GetId()})
	if got, want := refusal(err), "FailedPrecondition AGENTS_MISSING"; got != want {
		t.Errorf("activate before it is proved: %s, want %s", got, want)
	}
	blocked := blockedBy(t, err)
	if len(blocked.GetWaiting()) != 1 || blocked.GetWaiting()[0].GetNode() != "localhost" || !blocked.GetForcible() {
		t.Errorf("activate before it is proved is blocked by %v", blocked)
	}
	status := becomes("prepared", func(s *trothv1.AuthorityStatus) bool { return len(s.GetPropagation().GetWaiting()) == 1 })
	if got := status.GetAuthorities()[1].GetBlocked(); got.GetOperation() != "activate" || got.GetBlockers()[0].GetObstacle() != "AGENTS_MISSING" {
		t.Errorf("the status has the prepared one blocked by %v", got)
	}

	agent.report(t, proof(message.GetProbe()))
	becomes("proved", func(s *trothv1.AuthorityStatus) bool { return s.GetPropagation().GetProved() == 1 })
	if _, err := operator.ActivateAuthority(ctx, &trothv1.ActivateAuthorityRequest{Id: next.GetId()}); err != nil {
		t.Fatalf("activate once it is proved: %v", err)
	}
	status = becomes("activated", func(s *trothv1.AuthorityStatus) bool { return states(s) == "old, active" })
	old := status.GetAuthorities()[0]
	if old.GetReissueBy() == nil || old.GetBlocked().GetBlockers()[0].GetObstacle() != "REPLICAS_MAY_SIGN" {
		t.Errorf("the old one is %v", old)
	}
	message, read = agent.until(t, func(m *trothv1.WatchResponse) bool {
		return m.GetProbe() != nil
	})
	if want := "bundles 3, probe 3"; read != want || message.GetProbe().GetAuthorityId() != "" {
		t.Errorf("after the activation the agent got %s (%v), want %s without leaves", read, message.GetProbe(), want)
	}

	_, err = operator.RevokeAuthority(ctx, &trothv1.RevokeAuthorityRequest{Id: old.GetId()})
	if got, want := refusal(err), "FailedPrecondition REPLICAS_MAY_SIGN retry"; got != want {
		t.Errorf("revoke at once: %s, want %s", got, want)
	}
	// The server's own SVID is one of those that are replaced.
	eventually(t, "the server's own SVID", "by the new authority", func() string {
		conn := p.dial(t, nil, "")
		defer conn.Close()
		if _, err := trothv1.NewBundleServiceClient(conn).GetBundle(ctx, &trothv1.GetBundleRequest{}); err != nil {
			return err.Error()
		}
		if p.ownAuthority(t) == next.GetId() {
			return "by the new authority"
		}
		return "by the old one"
	})

	changes, err := operator.ListAuthorityChanges(ctx, &trothv1.ListAuthorityChangesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, c := range changes.GetChanges() {
		state := strings.ToLower(strings.TrimPrefix(c.GetState().String(), "AUTHORITY_STATE_"))
		got = append(got, fmt.Sprintf("%d %s to %s by %s", c.GetRevision(), c.GetOperation(), state, c.GetActor()))
	}
	want := []string{"3 activate to active by somebody", "3 activate to old by somebody", "2 prepare to prepared by somebody"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("what became of them (-want +got):\n%s", diff)
	}
}

// blockedBy returns what a refusal says is in the way.
func blockedBy(t *testing.T, err error) *trothv1.Blocked {
	t.Helper()
	for _, d := range status.Convert(err).Details() {
		if b, ok := d.(*trothv1.Blocked); ok {
			return b
		}
	}
	t.Fatalf("%v does not say what is in the way", err)
	return nil
}

// Each change that cannot be, and the reason.
func TestAuthorityRefusals(t *testing.T) {
	p, _, _ := startDev(t, func(c *server.Config) { c.Operator = anyOperator })
	c := trothv1.NewAuthorityServiceClient(p.dial(t, nil, "a token"))
	set, _ := p.issuer.Authorities().Load()
	active := set.Authorities[0].ID
	prepared, err := c.PrepareAuthority(t.Context(), &trothv1.PrepareAuthorityRequest{})
	if err != nil {
		t.Fatal(err)
	}
	next := prepared.GetAuthority().GetId()
	activate := func(id, reason string, force bool) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := c.ActivateAuthority(ctx, &trothv1.ActivateAuthorityRequest{Id: id, Reason: reason, Force: force})
			return err
		}
	}
	taint := func(id, reason string, force bool) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := c.TaintAuthority(ctx, &trothv1.TaintAuthorityRequest{Id: id, Reason: reason, Force: force})
			return err
		}
	}
	revoke := func(id, reason string, force bool) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := c.RevokeAuthority(ctx, &trothv1.RevokeAuthorityRequest{Id: id, Reason: reason, Force: force})
			return err
		}
	}
	abort := func(id string) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := c.AbortAuthority(ctx, &trothv1.AbortAuthorityRequest{Id: id})
			return err
		}
	}
	tests := []struct {
		name string
		call func(context.Context) error
		want string
	}{
		{"activate nothing", activate("", "", false), "NotFound UNKNOWN_AUTHORITY"},
		{"activate what there is not", activate(strings.Repeat("0", 40), "", false), "NotFound UNKNOWN_AUTHORITY"},
		{"activate the active one again", activate(active, "", false), "OK"},
		{"activate what no agent has proved", activate(next, "", false), "FailedPrecondition AGENTS_MISSING"},
		{"force without a reason", activate(next, "", true), "InvalidArgument ORDER_INVALID"},
		{"force with a blank reason", activate(next, "  ", true), "InvalidArgument ORDER_INVALID"},
		{"a reason of two lines", activate(next, "a\nb", false), "InvalidArgument ORDER_INVALID"},
		{"a reason too long", activate(next, strings.Repeat("x", 513), false), "InvalidArgument ORDER_INVALID"},
		{"taint a prepared one", taint(next, "", false), "FailedPrecondition WRONG_STATE"},
		{"force does not taint it either", taint(next, "because", true), "FailedPrecondition WRONG_STATE"},
		{"revoke the active one", revoke(active, "", false), "FailedPrecondition WRONG_STATE"},
		{"force does not revoke it either", revoke(active, "because", true), "FailedPrecondition WRONG_STATE"},
		{"revoke a prepared one", revoke(next, "", false), "FailedPrecondition WRONG_STATE"},
		{"abort the active one", abort(active), "FailedPrecondition WRONG_STATE"},
		{"abort what there is not", abort("x"), "NotFound UNKNOWN_AUTHORITY"},
		{"abort the prepared one", abort(next), "OK"},
		{"abort it again", abort(next), "OK"},
		{"activate it then", activate(next, "because", true), "FailedPrecondition WRONG_STATE"},
	}
	for _, test := range tests {
		err := test.call(t.Context())
		if got := refusal(err); got != test.want {
			t.Errorf("%s: %s, want %s", test.name, got, test.want)
		}
	}
}

// What was forced says so, who did it, and by what evidence.
func TestForcedActivation(t *testing.T) {
	p, _, _ := startDev(t, func(c *server.Config) { c.Operator = anyOperator })
	c := trothv1.NewAuthorityServiceClient(p.dial(t, nil, "a token"))
	prepared, err := c.PrepareAuthority(t.Context(), &trothv1.PrepareAuthorityRequest{})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the agent's pod", "is expected", func() string {
		s, err := c.GetAuthorityStatus(t.Context(), &trothv1.GetAuthorityStatusRequest{})
		if err != nil || s.GetStatus().GetPropagation().GetExpected() != 1 {
			return fmt.Sprint(s, err)
		}
		return "is expected"
	})
	done, err := c.ActivateAuthority(t.Context(), &trothv1.ActivateAuthorityRequest{
		Id: prepared.GetAuthority().GetId(), Force: true, Reason: "node-1 burnt down",
	})
	if err != nil {
		t.Fatal(err)
	}
	change := done.GetAuthority().GetLastChange()
	if !change.GetForced() || change.GetReason() != "node-1 burnt down" || !strings.HasPrefix(change.GetEvidence(), "proved 0/1 ") {
		t.Errorf("the record says %v", change)
	}
}

// Each method asks for its own verb, of a real API server's RBAC.
func TestAuthorityRights(t *testing.T) {
	p := startKube(t)
	p.CreateServiceAccount(t, "troth-system", "operator")
	tok := p.accountToken(t, "troth-system", "operator", audience)
	c := trothv1.NewAuthorityServiceClient(p.dial(t, nil, tok))
	ctx := t.Context()
	calls := []struct {
		verb string
		call func() error
		want string // with the right
	}{
		{"list", func() error {
			_, err := c.GetAuthorityStatus(ctx, &trothv1.GetAuthorityStatusRequest{})
			return err
		}, "OK"},
		{"list", func() error {
			_, err := c.ListAuthorityChanges(ctx, &trothv1.ListAuthorityChangesRequest{})
			return err
		}, "OK"},
		{"list", func() error {
			stream, err := c.WatchAuthorityStatus(ctx, &trothv1.WatchAuthorityStatusRequest{})
			if err == nil {
				_, err = stream.Recv()
			}
			return err
		}, "OK"},
		{"prepare", func() error {
			_, err := c.PrepareAuthority(ctx, &trothv1.PrepareAuthorityRequest{})
			return err
		}, "OK"},
		{"activate", func() error {
			_, err := c.ActivateAuthority(ctx, &trothv1.ActivateAuthorityRequest{Id: "x"})
			return err
		}, "NotFound UNKNOWN_AUTHORITY"},
		{"taint", func() error {
			_, err := c.TaintAuthority(ctx, &trothv1.TaintAuthorityRequest{Id: "x"})
			return err
		}, "NotFound UNKNOWN_AUTHORITY"},
		{"revoke", func() error {
			_, err := c.RevokeAuthority(ctx, &trothv1.RevokeAuthorityRequest{Id: "x"})
			return err
		}, "NotFound UNKNOWN_AUTHORITY"},
		{"abort", func() error {
			_, err := c.AbortAuthority(ctx, &trothv1.AbortAuthorityRequest{Id: "x"})
			return err
		}, "NotFound UNKNOWN_AUTHORITY"},
	}
	const none = "PermissionDenied OPERATOR_FORBIDDEN"
	for n, each := range calls {
		if got := refusal(each.call()); got != none {
			t.Errorf("call %d without a role: %s, want %s", n, got, none)
		}
	}
	for _, verb := range []string{"list", "prepare", "activate", "taint", "revoke", "abort"} {
		p.grant(t, "operator", verb, "authorities")
		for n, each := range calls {
			want := none
			if each.verb == verb {
				want = each.want
			}
			eventually(t, fmt.Sprintf("call %d with the right to %s", n, verb), want, func() string { return refusal(each.call()) })
		}
		p.revokeGrant(t, "operator")
	}
}

// Who may connect to the socket of a laptop is an operator by the kernel's word.
func TestServeOperators(t *testing.T) {
	p, _, _ := startDev(t, nil) // and nobody by a token
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "operator.sock"))
	if err != nil {
		t.Fatal(err)
	}
	run(t, func(ctx context.Context) error { return p.server.ServeOperators(ctx, l) })
	conn, err := grpc.NewClient("unix:"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	done, err := trothv1.NewAuthorityServiceClient(conn).PrepareAuthority(t.Context(), &trothv1.PrepareAuthorityRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := done.GetAuthority().GetLastChange().GetActor(), fmt.Sprintf("uid:%d", os.Getuid()); got != want {
		t.Errorf("it was done by %q, want %q", got, want)
	}
	if _, err := trothv1.NewPolicyServiceClient(conn).ListPlaintextPeers(t.Context(), &trothv1.ListPlaintextPeersRequest{}); err != nil {
		t.Error(err)
	}
	// Nothing else is there.
	_, err = trothv1.NewSVIDServiceClient(conn).IssueX509SVIDs(t.Context(), &trothv1.IssueX509SVIDsRequest{})
	if got, want := refusal(err), "Unimplemented"; got != want {
		t.Errorf("to ask for SVIDs: %s, want %s", got, want)
	}
}

// ownAuthority is the authority that signed the SVID which the server presents.
func (p *plane) ownAuthority(t *testing.T) string {
	t.Helper()
	conn, err := tls.Dial("tcp", p.address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}) //nolint:gosec // what it presents is the question
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	return hex.EncodeToString(conn.ConnectionState().PeerCertificates[0].AuthorityKeyId)
}
