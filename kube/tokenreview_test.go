package kube_test

import (
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"troth.dev/troth/identity"
	"troth.dev/troth/kube"
)

const audience = "spiffe://test.troth.dev"

const tokenReviews = "/apis/authentication.k8s.io/v1/tokenreviews"

func newReviewer(t *testing.T, config kube.TokenReviewerConfig) *kube.TokenReviewer {
	t.Helper()
	reviewer, err := kube.NewTokenReviewer(config)
	if err != nil {
		t.Fatal(err)
	}
	return reviewer
}

func adminClient(t *testing.T) (kubernetes.Interface, *wire) {
	t.Helper()
	return client(t, cluster.Admin())
}

func TestReview(t *testing.T) {
	w := newWorld(t)
	pod := w.pod(t, "cart-")
	gone := w.pod(t, "gone-")
	tokenOfGone := cluster.Token(t, gone, audience, 10*time.Minute)
	cluster.DeletePod(t, gone, 0)
	good := cluster.Token(t, pod, audience, 10*time.Minute)
	client, wire := adminClient(t)
	reviewer := newReviewer(t, kube.TokenReviewerConfig{Client: client})

	got, err := reviewer.Review(t.Context(), good, audience)
	if err != nil {
		t.Fatal(err)
	}
	want := kube.Review{
		ServiceAccount:    identity.ServiceAccount{Namespace: w.namespace, Name: "cart"},
		ServiceAccountUID: string(w.account.UID),
		Pod:               reference(pod),
		Node:              identity.Node{Name: w.node.Name, UID: string(w.node.UID)},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Review() (-want +got):\n%s", diff)
	}

	for _, test := range []struct {
		name, token, audience string
		requests              int
	}{
		{"another audience", good, "spiffe://next.troth.dev", 1},
		{"no audience", good, "", 0},
		{"for the API server", cluster.AutomountToken(t, pod), audience, 1},
		{"its pod is gone", tokenOfGone, audience, 1},
		{"not bound to a pod", unboundToken(t, w.account), audience, 1},
		{"garbage", "garbage", audience, 1},
		{"bad signature", good[:len(good)-8] + "AAAAAAAA", audience, 1},
		{"empty", "", audience, 0},
		{"huge", strings.Repeat("x", 1<<20), audience, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			for range 2 { // a refusal is not remembered
				before := wire.count("POST", tokenReviews)
				got, err := reviewer.Review(t.Context(), test.token, test.audience)
				if !errors.Is(err, identity.ErrTokenRefused) || errors.Is(err, kube.ErrUnavailable) {
					t.Errorf("Review() = %v, %v, want ErrTokenRefused", got, err)
				}
				if err != nil && test.token != "" && strings.Contains(err.Error(), test.token) && test.name != "garbage" {
					t.Error("the error has the token")
				}
				if n := wire.count("POST", tokenReviews) - before; n != test.requests {
					t.Errorf("Review() sent %d requests, want %d", n, test.requests)
				}
			}
		})
	}
}

func TestReviewIsRemembered(t *testing.T) {
	w := newWorld(t)
	token := cluster.Token(t, w.pod(t, "cart-"), audience, 10*time.Minute)
	client, wire := adminClient(t)
	reviewer := newReviewer(t, kube.TokenReviewerConfig{Client: client})
	review := func(want int) {
		t.Helper()
		var all sync.WaitGroup
		for range 20 {
			all.Go(func() {
				if _, err := reviewer.Review(t.Context(), token, audience); err != nil {
					t.Errorf("Review() = %v", err)
				}
			})
		}
		all.Wait()
		if n := wire.count("POST", tokenReviews); n != want {
			t.Errorf("%d requests so far, want %d", n, want)
		}
	}
	review(1)
	reviewer.Age(9 * time.Second)
	review(1)
	reviewer.Age(time.Second)
	review(2)
}

func TestReviewUnavailable(t *testing.T) {
	w := newWorld(t)
	pod := w.pod(t, "cart-")
	one, two := cluster.Token(t, pod, audience, 10*time.Minute), cluster.Token(t, pod, audience, 11*time.Minute)
	unavailable := func(t *testing.T, reviewer *kube.TokenReviewer, token string) {
		t.Helper()
		if _, err := reviewer.Review(t.Context(), token, audience); !errors.Is(err, kube.ErrUnavailable) || errors.Is(err, identity.ErrTokenRefused) {
			t.Errorf("Review() = %v, want ErrUnavailable", err)
		}
	}

	t.Run("no right to ask", func(t *testing.T) {
		client, _ := client(t, cluster.Bearer(cluster.AutomountToken(t, pod)))
		unavailable(t, newReviewer(t, kube.TokenReviewerConfig{Client: client}), one)
	})

	t.Run("rate", func(t *testing.T) {
		client, wire := adminClient(t)
		reviewer := newReviewer(t, kube.TokenReviewerConfig{Client: client, Rate: 0.001})
		if _, err := reviewer.Review(t.Context(), one, audience); err != nil {
			t.Fatal(err)
		}
		unavailable(t, reviewer, two)
		if n := wire.asked(); n != 1 {
			t.Errorf("%d requests were sent, want 1", n)
		}
	})

	t.Run("outage", func(t *testing.T) {
		client, _ := adminClient(t)
		reviewer := newReviewer(t, kube.TokenReviewerConfig{Client: client})
		if _, err := reviewer.Review(t.Context(), one, audience); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cluster.StartAPIServer(t) })
		cluster.StopAPIServer(t)
		if _, err := reviewer.Review(t.Context(), one, audience); err != nil {
			t.Errorf("Review(accepted just before the outage) = %v", err)
		}
		unavailable(t, reviewer, two)
	})

	t.Run("after the outage", func(t *testing.T) {
		client, _ := adminClient(t)
		if _, err := newReviewer(t, kube.TokenReviewerConfig{Client: client}).Review(t.Context(), two, audience); err != nil {
			t.Errorf("Review() = %v", err)
		}
	})
}

// What other authenticators than that of service accounts may answer.
func TestReadReview(t *testing.T) {
	good := func() authenticationv1.TokenReviewStatus {
		return authenticationv1.TokenReviewStatus{
			Authenticated: true,
			Audiences:     []string{"other", audience},
			User: authenticationv1.UserInfo{
				Username: "system:serviceaccount:shop:cart",
				UID:      "account-uid",
				Extra: map[string]authenticationv1.ExtraValue{
					"authentication.kubernetes.io/pod-name":      {"cart-1"},
					"authentication.kubernetes.io/pod-uid":       {"pod-uid"},
					"authentication.kubernetes.io/credential-id": {"JTI=1"},
				},
			},
		}
	}
	if got, err := kube.ReadReview(good(), audience); err != nil || got.Node != (identity.Node{}) || got.Pod.UID != "pod-uid" {
		t.Errorf("readReview(not scheduled) = %+v, %v", got, err)
	}
	for name, spoil := range map[string]func(*authenticationv1.TokenReviewStatus){
		"not authenticated": func(s *authenticationv1.TokenReviewStatus) { s.Authenticated = false },
		"no audiences":      func(s *authenticationv1.TokenReviewStatus) { s.Audiences = nil },
		"other audiences":   func(s *authenticationv1.TokenReviewStatus) { s.Audiences = []string{"other"} },
		"a person":          func(s *authenticationv1.TokenReviewStatus) { s.User.Username = "alice" },
		"a node":            func(s *authenticationv1.TokenReviewStatus) { s.User.Username = "system:node:a" },
		"no name":           func(s *authenticationv1.TokenReviewStatus) { s.User.Username = "system:serviceaccount:shop" },
		"no account UID":    func(s *authenticationv1.TokenReviewStatus) { s.User.UID = "" },
		"no pod name":       without("pod-name"),
		"no pod UID":        without("pod-uid"),
		"no credential":     without("credential-id"),
		"two pods":          with("pod-uid", "one", "two"),
		"an empty pod UID":  with("pod-uid", ""),
	} {
		status := good()
		spoil(&status)
		if got, err := kube.ReadReview(status, audience); !errors.Is(err, identity.ErrTokenRefused) || got != (kube.Review{}) {
			t.Errorf("readReview(%s) = %+v, %v, want ErrTokenRefused", name, got, err)
		}
	}
}

func without(key string) func(*authenticationv1.TokenReviewStatus) { return with(key) }

func with(key string, values ...string) func(*authenticationv1.TokenReviewStatus) {
	return func(s *authenticationv1.TokenReviewStatus) {
		s.User.Extra["authentication.kubernetes.io/"+key] = values
	}
}

func TestNewTokenReviewerRefuses(t *testing.T) {
	for name, config := range map[string]kube.TokenReviewerConfig{
		"no client":           {},
		"negative rate":       {Client: cluster.Client(), Rate: -1},
		"negative cache size": {Client: cluster.Client(), CacheSize: -1},
	} {
		if _, err := kube.NewTokenReviewer(config); err == nil {
			t.Errorf("NewTokenReviewer(%s) = nil, want an error", name)
		}
	}
}

func unboundToken(t *testing.T, account *corev1.ServiceAccount) string {
	t.Helper()
	request, err := cluster.Client().CoreV1().ServiceAccounts(account.Namespace).CreateToken(t.Context(), account.Name,
		&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: []string{audience}}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return request.Status.Token
}
