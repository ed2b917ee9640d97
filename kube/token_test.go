package kube_test

import (
	"errors"
	"testing"
	"time"

	"troth.dev/troth/kube"
	"troth.dev/troth/test/apiserver"
	"troth.dev/troth/token"
)

// The two packages together, on tokens of a real API server: a token verifies by
// the keys that kube fetches, and its claims match the record that kube has, for
// as long as the pod lives.
func TestTokensOfRealPods(t *testing.T) {
	w := newWorld(t)
	pod := w.pod(t, "cart")
	pods, _ := runPods(t, kube.PodsConfig{})
	client, _ := adminClient(t)
	verifier, err := token.New(token.Config{
		Issuers:  []string{apiserver.Issuer},
		Audience: audience,
		Keys:     kube.Keys(client),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer verifier.Close()
	check := func(raw string) error {
		claims, err := verifier.Verify(t.Context(), raw)
		if err != nil {
			return err
		}
		record, err := pods.Pod(t.Context(), claims.Pod)
		if err != nil {
			return err
		}
		return claims.Matches(record, time.Now())
	}
	refused := func(what string, err error, want token.Reason) {
		t.Helper()
		var refusal *token.Error
		if !errors.As(err, &refusal) || refusal.Reason != want {
			t.Errorf("%s: %v, want %s", what, err, want)
		}
	}

	raw := cluster.Token(t, pod, audience, 10*time.Minute)
	if err := check(raw); err != nil {
		t.Errorf("a live pod's token: %v", err)
	}
	refused("the token that is mounted by default", check(cluster.AutomountToken(t, pod)), token.WrongAudience)
	refused("a token that is not bound to a pod", check(unboundToken(t, w.account)), token.NoPod)

	onNode, release := pods.OnNode(w.node.Name)
	defer release()
	cluster.FinishPod(t, pod)
	await(t, "a finished pod", onNode, has())
	refused("a finished pod's token", check(raw), token.PodFinished)
	cluster.DeletePod(t, pod, 0)
	again := w.pod(t, "cart")
	await(t, "a pod of the same name", onNode, has(again))
	if err := check(raw); err == nil {
		t.Error("the token of a pod that was replaced is accepted")
	}
	if err := check(cluster.Token(t, again, audience, 10*time.Minute)); err != nil {
		t.Errorf("the new pod's token: %v", err)
	}
}
