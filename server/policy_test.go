package server_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"troth.dev/troth/agent"
	"troth.dev/troth/agent/workload"
	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/deploy"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/policy"
	"troth.dev/troth/server"
	"troth.dev/troth/test/apiserver"
)

// What an operator does to policies and pods reaches the agents: they hold what is
// in force for each of their pods, and nothing that they hold on the way is more
// open than before or after.
func TestPoliciesReachAgents(t *testing.T) {
	p := startKube(t)
	old := p.pod(t, web, "web-1", "node-1")
	other := p.pod(t, web, "web-2", "node-2")
	one, two := p.startAgent(t, "node-1").holds(t, string(old.UID)), p.startAgent(t, "node-2").holds(t, string(other.UID))
	one.becomes(t, "no definition", "PERMISSIVE")
	two.becomes(t, "no definition", "PERMISSIVE")

	p.installPolicies(t)
	p.apply(t, web.Namespace, "default", "mtls: {mode: STRICT}")
	one.becomes(t, "the definition installed late, and a policy", "STRICT by shop/default")
	two.becomes(t, "the definition installed late, and a policy", "STRICT by shop/default")

	p.apply(t, web.Namespace, "ports", "selector: {matchLabels: {app: web}}, portLevelMtls: {8080: {mode: DISABLE}}")
	p.label(t, old, "app", "web")
	one.becomes(t, "relabelled", "STRICT by shop/default, 8080 DISABLE by shop/ports")
	p.label(t, old, "app", "other")
	one.becomes(t, "relabelled back", "STRICT by shop/default")

	p.apply(t, web.Namespace, "younger", "mtls: {mode: PERMISSIVE}")
	p.apply(t, "troth-system", "elsewhere", "mtls: {mode: DISABLE}") // concerns neither
	p.DeletePolicy(t, web.Namespace, "default")
	one.becomes(t, "the oldest deleted", "PERMISSIVE by shop/younger")
	two.becomes(t, "the oldest deleted", "PERMISSIVE by shop/younger")

	p.StopAPIServer(t)
	p.StartAPIServer(t)
	p.apply(t, web.Namespace, "younger", "mtls: {mode: STRICT}")
	one.becomes(t, "after an outage", "STRICT by shop/younger")
	two.becomes(t, "after an outage", "STRICT by shop/younger")

	// From here on nothing may open anything.
	p.allowInvalid(t)
	p.apply(t, web.Namespace, "younger", "mtls: {mode: WIDE_OPEN}")
	p.apply(t, web.Namespace, "broken", "selector: {matchLabels: {app: 7}}, mtls: {mode: DISABLE}")
	p.apply(t, web.Namespace, "after", "selector: {matchLabels: {app: other}}, mtls: {mode: STRICT}")
	one.becomes(t, "objects that nobody can read", "STRICT by shop/after")
	two.becomes(t, "objects that nobody can read", "STRICT by shop/younger")
}

// The right of an operator is what the cluster's RBAC says at that moment.
func TestOperators(t *testing.T) {
	p := startKube(t)
	p.CreateServiceAccount(t, "troth-system", "operator")
	tok := p.accountToken(t, "troth-system", "operator", audience)
	list := func(tok string) string {
		_, err := trothv1.NewPolicyServiceClient(p.dial(t, nil, tok)).ListPlaintextPeers(t.Context(), &trothv1.ListPlaintextPeersRequest{})
		return refusal(err)
	}
	if got, want := list(tok), "PermissionDenied OPERATOR_FORBIDDEN"; got != want {
		t.Errorf("without a role: %s, want %s", got, want)
	}
	p.grant(t, "operator", "list", "plaintextpeers")
	eventually(t, "with the role", "OK", func() string { return list(tok) })
	if got, want := list(p.accountToken(t, "troth-system", "operator", "")), "Unauthenticated TOKEN_REVIEW"; got != want {
		t.Errorf("a token for the API server's audience: %s, want %s", got, want)
	}
	if got, want := list("not a token"), "Unauthenticated TOKEN_REVIEW"; got != want {
		t.Errorf("no token: %s, want %s", got, want)
	}
	if got, want := list(""), "Unauthenticated NO_CREDENTIALS"; got != want {
		t.Errorf("no credentials: %s, want %s", got, want)
	}
	p.StopAPIServer(t)
	if got, want := list(tok), "Unavailable TOKEN_REVIEW_UNAVAILABLE retry"; got != want {
		t.Errorf("without the API server: %s, want %s", got, want)
	}
	p.StartAPIServer(t)
}

// What agents report of plaintext is what operators read, and what no agent could
// mean is refused.
func TestPlaintextPeers(t *testing.T) {
	p, cluster, agentPod := startDev(t, func(c *server.Config) { c.Operator = anyOperator })
	conn := p.dial(t, p.attest(t, tokenFor(t, cluster, agentPod)), "")
	seen := timestamppb.New(time.Now().Truncate(time.Second))
	peers := []*trothv1.PlaintextPeer{
		{PodUid: "uid-2", Port: 8080, Source: "10.0.0.2", LastSeen: seen},
		{PodUid: "uid-1", Port: 9090, Source: "fd00::1", LastSeen: seen},
	}
	report := func(peers ...*trothv1.PlaintextPeer) string {
		_, err := trothv1.NewNodeServiceClient(conn).Report(t.Context(), &trothv1.ReportRequest{PlaintextPeers: peers})
		return refusal(err)
	}
	if got := report(peers...); got != "OK" {
		t.Fatalf("Report = %s", got)
	}
	for name, wrong := range map[string][]*trothv1.PlaintextPeer{
		"an address that is none": {{PodUid: "uid", Port: 1, Source: "here"}},
		"no address":              {{PodUid: "uid", Port: 1}},
		"a port that is none":     {{PodUid: "uid", Port: 1 << 16, Source: "10.0.0.1"}},
		"a UID without end":       {{PodUid: string(make([]byte, 65)), Port: 1, Source: "10.0.0.1"}},
		"peers without end":       slices.Repeat(peers[:1], 257),
	} {
		if got, want := report(wrong...), "InvalidArgument REPORT_INVALID"; got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
	got, err := trothv1.NewPolicyServiceClient(p.dial(t, nil, "token")).ListPlaintextPeers(t.Context(), &trothv1.ListPlaintextPeersRequest{})
	if err != nil {
		t.Fatal(err)
	}
	want := &trothv1.ListPlaintextPeersResponse{Agents: 1, Peers: []*trothv1.PlaintextPeer{peers[1], peers[0]}}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("ListPlaintextPeers (-want +got):\n%s", diff)
	}
	if _, err := trothv1.NewPolicyServiceClient(conn).ListPlaintextPeers(t.Context(), &trothv1.ListPlaintextPeersRequest{}); refusal(err) != "PermissionDenied METHOD_NOT_PERMITTED" {
		t.Errorf("an agent asks: %s", refusal(err))
	}
}

// Who comes in plaintext is known to operators by way of the agent that let them
// through.
func TestPlaintextIsReported(t *testing.T) {
	p, cluster, agentPod := startDev(t, func(c *server.Config) { c.Operator = anyOperator })
	pod := cluster.AddPod(web, "web-1")
	a := p.startAgentWith(t, func() (string, error) { return cluster.Token(agentPod.UID, audience, time.Hour) })
	a.holds(t, pod.UID).becomes(t, "the start", "PERMISSIVE")

	application := listen(t)
	go func() {
		for {
			conn, err := application.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}()
	captured := listen(t)
	run(t, func(ctx context.Context) error {
		return a.ServePod(ctx, pod.UID, agent.Captured{
			Plaintext:   captured,
			Destination: func(net.Conn) (netip.AddrPort, error) { return netip.MustParseAddrPort("10.0.0.7:8080"), nil },
			DialFrom: func(context.Context, netip.Addr, netip.AddrPort) (net.Conn, error) {
				return net.Dial("tcp", application.Addr().String())
			},
		})
	})
	conn, err := net.Dial("tcp", captured.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.ReadAll(conn); err != nil { // until the application closes
		t.Fatal(err)
	}
	cluster.AddPod(web, "web-2") // the agent reports when something changes, or after a minute

	operator := trothv1.NewPolicyServiceClient(p.dial(t, nil, "token"))
	eventually(t, "the peers", pod.UID+" 8080 127.0.0.1", func() string {
		out, err := operator.ListPlaintextPeers(t.Context(), &trothv1.ListPlaintextPeersRequest{})
		if err != nil {
			return refusal(err)
		}
		var all []string
		for _, peer := range out.GetPeers() {
			all = append(all, fmt.Sprintf("%s %d %s", peer.GetPodUid(), peer.GetPort(), peer.GetSource()))
		}
		return strings.Join(all, ", ")
	})
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// BenchmarkPolicyToAgents measures from the moment at which a policy is applied to
// that at which each of 20 agents holds it, against a real API server.
func BenchmarkPolicyToAgents(b *testing.B) {
	const agents = 20
	p := startKube(b)
	p.installPolicies(b)
	p.apply(b, web.Namespace, "default", "mtls: {mode: PERMISSIVE}")
	var all []*held
	for n := range agents {
		node := fmt.Sprintf("node-%d", n+1)
		if n >= 2 { // startKube made two
			p.CreateNode(b, node)
		}
		pod := p.pod(b, web, "web-"+node, node)
		all = append(all, p.startAgent(b, node).holds(b, string(pod.UID)))
	}
	for _, h := range all {
		h.becomes(b, "the start", "PERMISSIVE by shop/default")
	}

	var mu sync.Mutex
	var took []time.Duration
	modes := []string{"STRICT", "PERMISSIVE"}
	for n := 0; b.Loop(); n++ {
		mode := modes[n%2]
		var waiting sync.WaitGroup
		began := time.Now()
		for _, h := range all {
			waiting.Go(func() {
				h.becomes(b, "in the benchmark", mode+" by shop/default")
				mu.Lock()
				defer mu.Unlock()
				took = append(took, time.Since(began))
			})
		}
		p.apply(b, web.Namespace, "default", "mtls: {mode: "+mode+"}")
		waiting.Wait()
	}
	slices.Sort(took)
	for _, percent := range []int{50, 99} {
		at := took[(len(took)-1)*percent/100]
		b.ReportMetric(float64(at.Microseconds())/1000, fmt.Sprintf("p%d-ms", percent))
	}
}

// installPolicies lets the cluster know PeerAuthentications.
func (p *kubePlane) installPolicies(t testing.TB) { p.ApplyCRD(t, policyCRD(t)) }

// allowInvalid has the cluster take every PeerAuthentication, whatever is in it.
func (p *kubePlane) allowInvalid(t testing.TB) {
	t.Helper()
	p.ApplyCRD(t, apiserver.ChangeCRD(t, policyCRD(t), apiserver.AnyObject))
}

func policyCRD(t testing.TB) []byte {
	t.Helper()
	content, err := deploy.CRDs.ReadFile("crds/peerauthentications.security.istio.io.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// apply applies a policy. spec is the fields of its spec, in YAML.
func (p *kubePlane) apply(t testing.TB, namespace, name, spec string) {
	t.Helper()
	p.ApplyPolicy(t, "v1", namespace, name, "{"+spec+"}")
}

func (p *kubePlane) label(t testing.TB, pod *corev1.Pod, key, value string) {
	t.Helper()
	patch := fmt.Appendf(nil, `{"metadata": {"labels": {%q: %q}}}`, key, value)
	_, err := p.Client().CoreV1().Pods(pod.Namespace).Patch(t.Context(), pod.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	if err != nil {
		t.Fatal(err)
	}
}

// accountToken returns a token that is bound to no pod: that of an operator. No
// audience means the API server's.
func (p *kubePlane) accountToken(t testing.TB, namespace, name, audience string) string {
	t.Helper()
	request := &authenticationv1.TokenRequest{}
	if audience != "" {
		request.Spec.Audiences = []string{audience}
	}
	out, err := p.Client().CoreV1().ServiceAccounts(namespace).CreateToken(t.Context(), name, request, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return out.Status.Token
}

// grant gives a right on resources of the API group troth.dev to a service account
// of troth-system.
func (p *kubePlane) grant(t testing.TB, account, verb, resource string) {
	t.Helper()
	rbac := p.Client().RbacV1()
	role := &rbacv1.ClusterRole{
		ObjectMeta: metav1.ObjectMeta{Name: account},
		Rules:      []rbacv1.PolicyRule{{APIGroups: []string{"troth.dev"}, Resources: []string{resource}, Verbs: []string{verb}}},
	}
	if _, err := rbac.ClusterRoles().Create(t.Context(), role, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	binding := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: account},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: account},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: "troth-system", Name: account}},
	}
	if _, err := rbac.ClusterRoleBindings().Create(t.Context(), binding, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func (p *kubePlane) revokeGrant(t testing.TB, account string) {
	t.Helper()
	rbac := p.Client().RbacV1()
	err := errors.Join(rbac.ClusterRoleBindings().Delete(t.Context(), account, metav1.DeleteOptions{}),
		rbac.ClusterRoles().Delete(t.Context(), account, metav1.DeleteOptions{}))
	if err != nil {
		t.Fatal(err)
	}
}

// anyOperator takes everybody for an operator with every right.
func anyOperator(context.Context, string, server.Right) (string, error) { return "somebody", nil }

// runningAgent is an agent in this process.
type runningAgent struct{ *agent.Agent }

func (p *kubePlane) startAgent(t testing.TB, node string) runningAgent {
	t.Helper()
	pod := p.pod(t, agents, "agent-"+node, node)
	return p.startAgentWith(t, func() (string, error) { return p.Token(t, pod, audience, time.Hour), nil })
}

func (p *plane) startAgentWith(t testing.TB, token func() (string, error)) runningAgent {
	t.Helper()
	socket, err := workload.Listen(filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	a, err := agent.New(agent.Config{
		Server:      p.address,
		TrustDomain: trustDomain,
		Anchor:      func() (*x509bundle.Bundle, error) { return p.bundle(), nil },
		Token:       token,
		Listener:    socket,
		Log:         slog.New(slog.DiscardHandler),
		Metrics:     prometheus.NewRegistry(),
	})
	if err != nil {
		t.Fatal(err)
	}
	run(t, a.Run)
	return runningAgent{a}
}

// held is the policy that an agent holds for one pod.
type held struct {
	value *latest.Value[*policy.Effective]
}

func (a runningAgent) holds(t testing.TB, podUID string) *held {
	value, release := a.Policy(podUID)
	t.Cleanup(release)
	return &held{value}
}

// becomes waits until the agent holds what is wanted.
func (h *held) becomes(t testing.TB, when, want string) {
	t.Helper()
	patience := time.After(20 * time.Second)
	for {
		effective, changed := h.value.Load()
		if spelled(effective) == want {
			return
		}
		select {
		case <-changed:
		case <-patience:
			t.Errorf("%s: the agent holds %q, want %q", when, spelled(effective), want)
			return
		}
	}
}

func spelled(e *policy.Effective) string {
	if e == nil {
		return "nothing"
	}
	text := e.Mode.String()
	if !e.DecidedBy.IsZero() {
		text += " by " + e.DecidedBy.String()
	}
	for _, p := range e.Ports {
		text += fmt.Sprintf(", %d %s by %s", p.Port, p.Mode, e.PortsBy)
	}
	return text
}
