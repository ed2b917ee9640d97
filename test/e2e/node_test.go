package e2e_test

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/identity"
	"troth.dev/troth/storage"
	"troth.dev/troth/test/apiserver"
)

// Whoever has an agent's credentials gets the identities of the live pods of that
// agent's node, and no others, whatever is said of a pod. Whoever has a workload's
// gets the workload's.
func TestNodeIsItsOwnBlastRadius(t *testing.T) {
	t.Parallel()
	p := newPlane(t, time.Minute)
	one, two := p.newNode(t), p.newNode(t)
	cart, web := p.account(t, "cart"), p.account(t, "web")
	mine, theirs := p.pod(t, one, cart), p.pod(t, two, web)
	unscheduled := p.pod(t, &node{}, cart)

	ctx := bounded(t)
	c := p.client(t)
	svid, err := c.attest(ctx, one.token)
	if err != nil {
		t.Fatal(err)
	}
	agent := closing(t)(c.withSVID(svid))

	denied := func(reason string) answer { return answer{Code: codes.PermissionDenied, Reason: reason} }
	notSeen := answer{Code: codes.FailedPrecondition, Reason: "POD_NOT_SEEN", Retry: true}
	granted := answer{ID: p.id(cart)}

	t.Run("an agent and the pods that are there", func(t *testing.T) {
		m, o := reference(mine), reference(theirs)
		for _, test := range []struct {
			name string
			pod  *trothv1.PodReference
			want answer
		}{
			{"its own pod", m, granted},
			{"another node's pod", o, denied("POD_NOT_ON_NODE")},
			{"another node's pod in another namespace",
				&trothv1.PodReference{Uid: o.Uid, Namespace: system, Name: o.Name, ServiceAccount: o.ServiceAccount}, denied("POD_NOT_ON_NODE")},
			{"another node's pod by its own pod's name",
				&trothv1.PodReference{Uid: o.Uid, Namespace: o.Namespace, Name: m.Name, ServiceAccount: o.ServiceAccount}, denied("POD_NOT_ON_NODE")},
			{"another node's pod as its own pod's account",
				&trothv1.PodReference{Uid: o.Uid, Namespace: o.Namespace, Name: o.Name, ServiceAccount: m.ServiceAccount}, denied("POD_NOT_ON_NODE")},
			{"another node's pod, all else its own pod's",
				&trothv1.PodReference{Uid: o.Uid, Namespace: m.Namespace, Name: m.Name, ServiceAccount: m.ServiceAccount}, denied("POD_NOT_ON_NODE")},
			{"its own pod, all else another node's pod's",
				&trothv1.PodReference{Uid: m.Uid, Namespace: o.Namespace, Name: o.Name, ServiceAccount: o.ServiceAccount}, denied("POD_NAME_MISMATCH")},
			{"its own pod by another name",
				&trothv1.PodReference{Uid: m.Uid, Namespace: m.Namespace, Name: "cart-0", ServiceAccount: m.ServiceAccount}, denied("POD_NAME_MISMATCH")},
			{"its own pod in another namespace",
				&trothv1.PodReference{Uid: m.Uid, Namespace: system, Name: m.Name, ServiceAccount: m.ServiceAccount}, denied("POD_NAME_MISMATCH")},
			{"its own pod as another account",
				&trothv1.PodReference{Uid: m.Uid, Namespace: m.Namespace, Name: m.Name, ServiceAccount: web}, denied("SERVICE_ACCOUNT_MISMATCH")},
			{"its own pod with a forged UID",
				&trothv1.PodReference{Uid: uuid.NewString(), Namespace: m.Namespace, Name: m.Name, ServiceAccount: m.ServiceAccount}, denied("POD_UID_MISMATCH")},
			{"another node's pod with a forged UID",
				&trothv1.PodReference{Uid: uuid.NewString(), Namespace: o.Namespace, Name: o.Name, ServiceAccount: o.ServiceAccount}, denied("POD_UID_MISMATCH")},
			{"a pod that is not there",
				&trothv1.PodReference{Uid: uuid.NewString(), Namespace: p.shop, Name: "nobody", ServiceAccount: cart}, notSeen},
			{"a pod that is on no node", reference(unscheduled), denied("POD_NOT_ON_NODE")},
			{"a pod without a UID",
				&trothv1.PodReference{Namespace: m.Namespace, Name: m.Name, ServiceAccount: m.ServiceAccount},
				answer{Code: codes.InvalidArgument, Reason: "POD_REFERENCE_INVALID"}},
			{"no pod", nil, answer{Code: codes.InvalidArgument, Reason: "POD_REFERENCE_INVALID"}},
		} {
			if got := answerTo(c.issue(ctx, agent, test.pod)); got != test.want {
				t.Errorf("%s: %+v, want %+v", test.name, got, test.want)
			}
		}

		results, err := c.issue(ctx, agent, o, m, o)
		if err != nil {
			t.Fatal(err)
		}
		var got []answer
		for _, r := range results {
			got = append(got, result(r))
		}
		want := []answer{denied("POD_NOT_ON_NODE"), granted, denied("POD_NOT_ON_NODE")}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("a batch of all sorts (-want +got):\n%s", diff)
		}
	})

	t.Run("an agent and pods that end", func(t *testing.T) {
		finished, ending, gone := p.pod(t, one, cart), p.pod(t, one, cart), p.pod(t, one, cart)
		for _, pod := range []*trothv1.PodReference{reference(finished), reference(ending), reference(gone)} {
			if got := answerTo(c.issue(ctx, agent, pod)); got != granted {
				t.Fatalf("a pod that lives: %+v, want %+v", got, granted)
			}
		}
		cluster.FinishPod(t, finished)
		cluster.DeletePod(t, ending, time.Second) // and nobody ends it
		cluster.DeletePod(t, gone, 0)
		replaced := reference(gone)
		for _, test := range []struct {
			name string
			pod  *trothv1.PodReference
			want answer
		}{
			{"finished", reference(finished), denied("POD_FINISHED")},
			{"deleted, and its grace over", reference(ending), denied("POD_DELETED")},
			{"gone", reference(gone), notSeen},
		} {
			// The server hears of it a moment after the API server has done it.
			var got answer
			eventually(t, test.name, func() bool {
				got = answerTo(c.issue(ctx, agent, test.pod))
				return got != granted
			})
			if got != test.want {
				t.Errorf("a pod that is %s: %+v, want %+v", test.name, got, test.want)
			}
		}
		cluster.CreatePod(t, apiserver.Pod{Namespace: gone.Namespace, Name: gone.Name, ServiceAccount: cart, Node: one.name})
		if got, want := answerTo(c.issue(ctx, agent, replaced)), denied("POD_UID_MISMATCH"); got != want {
			t.Errorf("a pod that was replaced: %+v, want %+v", got, want)
		}
	})

	t.Run("a workload", func(t *testing.T) {
		token := cluster.Token(t, theirs, trustDomain.IDString(), 10*time.Minute)
		own := closing(t)(c.withToken(token))
		lie := proto.CloneOf(reference(theirs))
		lie.ServiceAccount = cart
		for _, test := range []struct {
			name string
			pods []*trothv1.PodReference
			want answer
		}{
			{"itself, unnamed", []*trothv1.PodReference{nil}, answer{ID: p.id(web)}},
			{"itself, named", []*trothv1.PodReference{reference(theirs)}, answer{ID: p.id(web)}},
			{"itself, as another account", []*trothv1.PodReference{lie}, denied("NOT_YOUR_POD")},
			{"another", []*trothv1.PodReference{reference(mine)}, denied("NOT_YOUR_POD")},
			{"itself and another", []*trothv1.PodReference{nil, reference(mine)}, answer{Code: codes.InvalidArgument, Reason: "TOO_MANY_ITEMS"}},
		} {
			if got := answerTo(c.issue(ctx, own, test.pods...)); got != test.want {
				t.Errorf("%s: %+v, want %+v", test.name, got, test.want)
			}
		}
		_, err := c.attest(ctx, token)
		if got, want := refusal(err), denied("NOT_AN_AGENT"); got != want {
			t.Errorf("attest as an agent: %+v, want %+v", got, want)
		}
		candidate := closing(t)(c.withToken(one.token))
		if got, want := answerTo(c.issue(ctx, candidate, reference(mine))), denied("METHOD_NOT_PERMITTED"); got != want {
			t.Errorf("an agent that has not attested: %+v, want %+v", got, want)
		}
	})

	t.Run("an agent whose node was replaced", func(t *testing.T) {
		if err := cluster.Client().CoreV1().Nodes().Delete(ctx, one.name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		cluster.CreateNode(t, one.name)
		var got answer
		eventually(t, "the node to be another", func() bool {
			got = answerTo(c.issue(ctx, agent, reference(mine)))
			return got != granted
		})
		if want := (answer{Code: codes.Unauthenticated, Reason: "AGENT_CHANGED"}); got != want {
			t.Errorf("the agent of the node before: %+v, want %+v", got, want)
		}
	})

	t.Run("an agent that is gone", func(t *testing.T) {
		other, err := c.attest(ctx, two.token)
		if err != nil {
			t.Fatal(err)
		}
		conn := closing(t)(c.withSVID(other))
		if got, want := answerTo(c.issue(ctx, conn, reference(mine))), denied("POD_NOT_ON_NODE"); got != want {
			t.Errorf("before: %+v, want %+v", got, want)
		}
		cluster.DeletePod(t, two.agent, 0)
		var got answer
		// The API server may mark a pod as deleted a moment before it is gone.
		eventually(t, "the agent to be gone", func() bool {
			got = answerTo(c.issue(ctx, conn, reference(mine)))
			return got.Reason != "POD_NOT_ON_NODE" && got.Reason != "POD_DELETED"
		})
		if want := (answer{Code: codes.Unauthenticated, Reason: "POD_NOT_FOUND"}); got != want {
			t.Errorf("the certificate of an agent that is gone: %+v, want %+v", got, want)
		}
		_, err = c.attest(ctx, two.token)
		if got, want := refusal(err), (answer{Code: codes.Unauthenticated, Reason: "POD_NOT_FOUND"}); got != want {
			t.Errorf("the token of an agent that is gone: %+v, want %+v", got, want)
		}
	})

	// All of it in one sentence, by the ledger's word.
	issued, err := p.ledger(t).Query(ctx, storage.Query{})
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range issued {
		account, err := identity.ParseServiceAccount(i.ID)
		if err != nil {
			continue // the server's own, and the agents'
		}
		if on := map[string]string{cart: one.name, web: two.name}[account.Name]; i.Node != on {
			t.Errorf("%q was issued for node %q, want %q only", i.ID, i.Node, on)
		}
		caller, err := identity.ParseAgent(spiffeid.RequireFromString(i.Caller))
		if account.Name == web && i.Caller != p.id(web) || account.Name == cart && (err != nil || caller.Node.Name != one.name) {
			t.Errorf("%q was issued to %q", i.ID, i.Caller)
		}
	}
}

// closing takes what dialling returns, and closes the connection with the test.
func closing(t *testing.T) func(*grpc.ClientConn, error) *grpc.ClientConn {
	return func(conn *grpc.ClientConn, err error) *grpc.ClientConn {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
}
