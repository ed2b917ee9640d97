package server_test

import (
	"context"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/identity"
	"troth.dev/troth/kube"
	"troth.dev/troth/server"
	"troth.dev/troth/test/apiserver"
)

// kubePlane is a server that knows pods and tokens from a real API server.
type kubePlane struct {
	*plane
	*apiserver.Cluster
}

func startKube(t testing.TB) *kubePlane {
	t.Helper()
	c := apiserver.Start(t)
	client, err := kube.NewClient(c.Admin())
	if err != nil {
		t.Fatal(err)
	}
	pods, err := kube.NewPods(kube.PodsConfig{Client: client, Dynamic: client.Dynamic, Agents: agents})
	if err != nil {
		t.Fatal(err)
	}
	run(t, pods.Run)
	issuer, err := kube.Issuer(t.Context(), client)
	if err != nil {
		t.Fatal(err)
	}
	p := startPlane(t, pods, kube.Keys(client), issuer, func(c *server.Config) {
		c.Operator = func(ctx context.Context, raw string, right server.Right) (string, error) {
			return kube.Authorize(ctx, client, raw, audience, right.Verb, right.Resource)
		}
	})
	c.CreateNode(t, "node-1")
	c.CreateNode(t, "node-2")
	c.CreateNamespace(t, agents.Namespace)
	c.CreateServiceAccount(t, agents.Namespace, agents.Name)
	c.CreateNamespace(t, web.Namespace)
	c.CreateServiceAccount(t, web.Namespace, web.Name)
	return &kubePlane{plane: p, Cluster: c}
}

// run runs until the test ends, whatever became of it.
func run(t testing.TB, f func(context.Context) error) {
	t.Helper()
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- f(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("Run() = %v", err)
		}
	})
}

func (p *kubePlane) pod(t testing.TB, account identity.ServiceAccount, name, node string) *corev1.Pod {
	t.Helper()
	pod := apiserver.Pod{Namespace: account.Namespace, Name: name, ServiceAccount: account.Name, Node: node}
	if account == agents {
		pod.Labels = map[string]string{identity.CaptureLabel: "enabled"}
	}
	return p.CreatePod(t, pod)
}

// issue asks for the SVID of the pod that the token belongs to.
func (p *kubePlane) issue(t *testing.T, tok string) string {
	t.Helper()
	_, csr := newCSR(t)
	out, err := trothv1.NewSVIDServiceClient(p.dial(t, nil, tok)).IssueX509SVIDs(t.Context(),
		&trothv1.IssueX509SVIDsRequest{Items: []*trothv1.X509SVIDRequest{{Csr: csr}}})
	if err != nil {
		return refusal(err)
	}
	return itemRefusal(out.GetResults()[0])
}

// eventually waits for the server to have heard of a change that the API server
// has made.
func eventually(t *testing.T, what, want string, got func() string) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	last := got()
	for last != want && time.Now().Before(deadline) {
		last = got()
	}
	if last != want {
		t.Errorf("%s: %s, want %s", what, last, want)
	}
}

func podReference(pod *corev1.Pod) *trothv1.PodReference {
	return &trothv1.PodReference{Uid: string(pod.UID), Namespace: pod.Namespace, Name: pod.Name, ServiceAccount: pod.Spec.ServiceAccountName}
}

// The tokens of a real API server, and what becomes of them when what they speak
// of changes.
func TestTokensOfAnAPIServer(t *testing.T) {
	p := startKube(t)
	const life = 10 * time.Minute

	t.Run("at once", func(t *testing.T) {
		// The watch has not heard of the pod when its token arrives.
		pod := p.pod(t, web, "at-once", "node-1")
		if got := p.issue(t, p.Token(t, pod, audience, life)); got != "OK" {
			t.Errorf("the token of a pod that was made just now: %s, want OK", got)
		}
	})
	t.Run("API server's audience", func(t *testing.T) {
		pod := p.pod(t, web, "audience", "node-1")
		if got, want := p.issue(t, p.AutomountToken(t, pod)), "Unauthenticated TOKEN_AUDIENCE"; got != want {
			t.Errorf("an automounted token: %s, want %s", got, want)
		}
	})
	t.Run("a year-long token", func(t *testing.T) {
		pod := p.pod(t, web, "long", "node-1")
		if got, want := p.issue(t, p.Token(t, pod, audience, 365*24*time.Hour)), "Unauthenticated TOKEN_LIFETIME"; got != want {
			t.Errorf("a token for a year: %s, want %s", got, want)
		}
	})
	t.Run("pod deleted", func(t *testing.T) {
		pod := p.pod(t, web, "deleted", "node-1")
		tok := p.Token(t, pod, audience, life)
		if got := p.issue(t, tok); got != "OK" {
			t.Fatalf("before: %s", got)
		}
		p.DeletePod(t, pod, 0)
		eventually(t, "the token of a deleted pod", "Unauthenticated POD_NOT_FOUND", func() string { return p.issue(t, tok) })
	})
	t.Run("pod deleted with grace", func(t *testing.T) {
		pod := p.pod(t, web, "grace", "node-1")
		tok := p.Token(t, pod, audience, life)
		p.DeletePod(t, pod, 2*time.Second)
		if got := p.issue(t, tok); got != "OK" {
			t.Errorf("while its grace runs: %s, want OK", got)
		}
		eventually(t, "the token of a pod whose grace is over", "Unauthenticated POD_DELETED", func() string { return p.issue(t, tok) })
	})
	t.Run("pod recreated", func(t *testing.T) {
		pod := p.pod(t, web, "recreated", "node-1")
		tok := p.Token(t, pod, audience, life)
		p.DeletePod(t, pod, 0)
		p.pod(t, web, "recreated", "node-1")
		eventually(t, "the token of a pod whose name another has", "Unauthenticated POD_REPLACED", func() string { return p.issue(t, tok) })
	})
	t.Run("pod finished", func(t *testing.T) {
		pod := p.pod(t, web, "finished", "node-1")
		tok := p.Token(t, pod, audience, life)
		p.FinishPod(t, pod)
		eventually(t, "the token of a pod that finished", "Unauthenticated POD_FINISHED", func() string { return p.issue(t, tok) })
	})
	t.Run("service account recreated", func(t *testing.T) {
		p.CreateServiceAccount(t, web.Namespace, "shortlived")
		pod := p.pod(t, identity.ServiceAccount{Namespace: web.Namespace, Name: "shortlived"}, "account", "node-1")
		tok := p.Token(t, pod, audience, life)
		if got := p.issue(t, tok); got != "OK" {
			t.Fatalf("before: %s", got)
		}
		if err := p.Client().CoreV1().ServiceAccounts(web.Namespace).Delete(t.Context(), "shortlived", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		p.CreateServiceAccount(t, web.Namespace, "shortlived")
		eventually(t, "the token of an account that was made anew", "Unauthenticated SERVICE_ACCOUNT_REPLACED", func() string { return p.issue(t, tok) })
	})
	t.Run("node recreated", func(t *testing.T) {
		p.CreateNode(t, "node-3")
		pod := p.pod(t, web, "node", "node-3")
		tok := p.Token(t, pod, audience, life)
		if got := p.issue(t, tok); got != "OK" {
			t.Fatalf("before: %s", got)
		}
		if err := p.Client().CoreV1().Nodes().Delete(t.Context(), "node-3", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		p.CreateNode(t, "node-3")
		eventually(t, "a token of the node's former life", "Unauthenticated NODE_REPLACED", func() string { return p.issue(t, tok) })
	})
	t.Run("agent", func(t *testing.T) {
		pod := p.pod(t, agents, "agent-1", "node-1")
		if svid := p.attest(t, p.Token(t, pod, audience, life)); svid.ID.Path() == "" {
			t.Errorf("the agent's SVID is of %q", svid.ID)
		}
	})
}

// The signing key of the API server is rotated: new tokens are accepted at once,
// and old ones until the API server no longer publishes their key.
func TestSigningKeyRotated(t *testing.T) {
	p := startKube(t)
	pod := p.pod(t, web, "web-1", "node-1")
	old := p.Token(t, pod, audience, 10*time.Minute)
	if got := p.issue(t, old); got != "OK" {
		t.Fatalf("before: %s", got)
	}
	p.RotateSigningKey(t)
	renewed := p.Token(t, pod, audience, 10*time.Minute)
	// The keys were fetched a moment ago, and are fetched for an unknown key at
	// most every 30 seconds: the answer until then is "not yet".
	got := p.issue(t, renewed)
	if want := "Unauthenticated TOKEN_UNKNOWN_KEY retry"; got != want && got != "OK" {
		t.Errorf("a token of the new key, at once: %s, want %s or OK", got, want)
	}
	if got := p.issue(t, old); got != "OK" {
		t.Errorf("a token of the old key, which is still published: %s, want OK", got)
	}
}

// Two nodes, and an agent that asks for what is on the other, with every lie.
func TestANodeIsItsOwnBlastRadius(t *testing.T) {
	p := startKube(t)
	p.CreateServiceAccount(t, web.Namespace, "admin")
	admin := identity.ServiceAccount{Namespace: web.Namespace, Name: "admin"}
	agent := p.pod(t, agents, "agent-1", "node-1")
	here := p.pod(t, web, "here", "node-1")
	there := p.pod(t, admin, "there", "node-2")
	unscheduled := p.pod(t, web, "unscheduled", "")
	finished := p.pod(t, web, "finished", "node-1")
	p.FinishPod(t, finished)
	deleted := p.pod(t, web, "deleted", "node-1")
	p.DeletePod(t, deleted, 0)

	client := trothv1.NewSVIDServiceClient(p.dial(t, p.attest(t, p.Token(t, agent, audience, 10*time.Minute)), ""))
	lie := func(pod *corev1.Pod, change func(*trothv1.PodReference)) *trothv1.PodReference {
		r := podReference(pod)
		change(r)
		return r
	}
	_, csr := newCSR(t)
	for _, test := range []struct {
		name string
		pod  *trothv1.PodReference
		want string
	}{
		{"own pod", podReference(here), "OK"},
		{"pod of another node", podReference(there), "PermissionDenied POD_NOT_ON_NODE"},
		{"the same, as another namespace's", lie(there, func(r *trothv1.PodReference) { r.Namespace = "default" }), "PermissionDenied POD_NOT_ON_NODE"},
		{"the same, by a local pod's name", lie(there, func(r *trothv1.PodReference) { r.Name = here.Name }), "PermissionDenied POD_NOT_ON_NODE"},
		{"the same, by a local account", lie(there, func(r *trothv1.PodReference) { r.ServiceAccount = web.Name }), "PermissionDenied POD_NOT_ON_NODE"},
		{"own pod with the UID of the other", lie(here, func(r *trothv1.PodReference) { r.Uid = string(there.UID) }), "PermissionDenied POD_NOT_ON_NODE"},
		{"own pod, other account", lie(here, func(r *trothv1.PodReference) { r.ServiceAccount = "admin" }), "PermissionDenied SERVICE_ACCOUNT_MISMATCH"},
		{"own pod, other name", lie(here, func(r *trothv1.PodReference) { r.Name = "elsewhere" }), "PermissionDenied POD_NAME_MISMATCH"},
		{"own pod, other namespace", lie(here, func(r *trothv1.PodReference) { r.Namespace = "default" }), "PermissionDenied POD_NAME_MISMATCH"},
		{"made-up UID of a pod that is there", lie(here, func(r *trothv1.PodReference) { r.Uid = "5f5a7c0e-8a3f-4a57-9d3e-000000000000" }), "PermissionDenied POD_UID_MISMATCH"},
		{"made-up pod", lie(here, func(r *trothv1.PodReference) {
			r.Uid, r.Name = "5f5a7c0e-8a3f-4a57-9d3e-000000000000", "nowhere"
		}), "FailedPrecondition POD_NOT_SEEN retry"},
		{"unscheduled pod", podReference(unscheduled), "PermissionDenied POD_NOT_ON_NODE"},
		{"finished pod", podReference(finished), "PermissionDenied POD_FINISHED"},
		{"deleted pod", podReference(deleted), "FailedPrecondition POD_NOT_SEEN retry"},
	} {
		t.Run(test.name, func(t *testing.T) {
			eventually(t, test.name, test.want, func() string {
				out, err := client.IssueX509SVIDs(t.Context(), &trothv1.IssueX509SVIDsRequest{
					Items: []*trothv1.X509SVIDRequest{{Pod: test.pod, Csr: csr}}})
				if err != nil {
					return refusal(err)
				}
				return itemRefusal(out.GetResults()[0])
			})
		})
	}
}
