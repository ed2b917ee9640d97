package apiserver_test

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"troth.dev/troth/test/apiserver"
)

// One cluster, because each costs seconds: its stages build on each other.
func TestCluster(t *testing.T) {
	const audience = "spiffe://test.troth.dev"
	c := apiserver.Start(t)
	namespace := c.CreateNamespace(t, "shop")
	c.CreateServiceAccount(t, namespace, "cart")
	node := c.CreateNode(t, "node-a")
	pod := c.CreatePod(t, apiserver.Pod{Namespace: namespace, Name: "cart-", ServiceAccount: "cart", Node: node.Name})
	if pod.Status.Phase != corev1.PodRunning || pod.Status.PodIP == "" {
		t.Fatalf("CreatePod(on a node): phase %q, address %q, want Running and an address", pod.Status.Phase, pod.Status.PodIP)
	}
	token := c.Token(t, pod, audience, 10*time.Minute)

	t.Run("version", func(t *testing.T) {
		version, err := c.Client().Discovery().ServerVersion()
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(version.GitVersion, "v1.") || version.Major != "1" || version.Minor == "" {
			t.Errorf("the API server calls itself %q (%q, %q), want the version that it was built from",
				version.GitVersion, version.Major, version.Minor)
		}
	})

	t.Run("node authorizer", func(t *testing.T) {
		mine, other := connect(t, c.Node(t, "node-a")), connect(t, c.Node(t, "node-b"))
		if _, err := mine.CoreV1().Nodes().Get(t.Context(), "node-a", metav1.GetOptions{}); err != nil {
			t.Errorf("node-a reads itself: %v", err)
		}
		if _, err := other.CoreV1().Nodes().Get(t.Context(), "node-a", metav1.GetOptions{}); !apierrors.IsForbidden(err) {
			t.Errorf("node-b reads node-a: %v, want forbidden", err)
		}
	})

	t.Run("kubeconfig", func(t *testing.T) {
		config, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig(t, c.Bearer(c.AutomountToken(t, pod))))
		if err != nil {
			t.Fatal(err)
		}
		review, err := connect(t, config).AuthenticationV1().SelfSubjectReviews().Create(t.Context(),
			&authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if got, want := review.Status.UserInfo.Username, "system:serviceaccount:shop:cart"; got != want {
			t.Errorf("the API server knows the token's holder as %q, want %q", got, want)
		}
	})

	t.Run("tokens", func(t *testing.T) {
		claims := decode(t, token)
		if len(claims.Audience) != 1 || claims.Audience[0] != audience || claims.life() != 10*time.Minute {
			t.Errorf("Token(%q, 10m) is for %q and lives %s", audience, claims.Audience, claims.life())
		}
		if got, want := claims.Kubernetes.Pod.UID, string(pod.UID); got != want {
			t.Errorf("Token() is bound to pod %q, want %q", got, want)
		}
		if got, want := claims.Kubernetes.Node.UID, string(node.UID); got != want {
			t.Errorf("Token() names node %q, want %q", got, want)
		}
		claims = decode(t, c.AutomountToken(t, pod))
		if len(claims.Audience) != 1 || claims.Audience[0] != apiserver.Issuer || claims.life() != 365*24*time.Hour {
			t.Errorf("AutomountToken() is for %q and lives %s, want the API server and a year", claims.Audience, claims.life())
		}
	})

	t.Run("pods end", func(t *testing.T) {
		if got := c.FinishPod(t, pod).Status.Phase; got != corev1.PodSucceeded {
			t.Errorf("FinishPod(): phase %q, want Succeeded", got)
		}
		c.DeletePod(t, pod, 30*time.Second)
		deleted, err := c.Client().CoreV1().Pods(namespace).Get(t.Context(), pod.Name, metav1.GetOptions{})
		if !apierrors.IsNotFound(err) {
			t.Errorf("a finished pod that was deleted with a grace: %v, %v, want not found", deleted, err)
		}
		pod = c.CreatePod(t, apiserver.Pod{Namespace: namespace, Name: "cart-", ServiceAccount: "cart", Node: node.Name})
		c.DeletePod(t, pod, 30*time.Second)
		deleted, err = c.Client().CoreV1().Pods(namespace).Get(t.Context(), pod.Name, metav1.GetOptions{})
		if err != nil || deleted.DeletionTimestamp == nil {
			t.Errorf("a running pod that was deleted with a grace: %v, %v, want it marked", deleted, err)
		}
		c.DeletePod(t, pod, 0)
		if _, err = c.Client().CoreV1().Pods(namespace).Get(t.Context(), pod.Name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			t.Errorf("a pod that was deleted without a grace: %v, want not found", err)
		}
	})

	t.Run("outage", func(t *testing.T) {
		c.StopAPIServer(t)
		if _, err := c.Client().Discovery().ServerVersion(); err == nil {
			t.Error("the API server answers during an outage")
		}
		c.StartAPIServer(t)
		if _, err := c.Client().CoreV1().Namespaces().Get(t.Context(), namespace, metav1.GetOptions{}); err != nil {
			t.Errorf("a namespace after an outage: %v, want what it was", err)
		}
	})

	t.Run("crashes", func(t *testing.T) {
		c.KillAPIServer(t)
		if _, err := c.Client().Discovery().ServerVersion(); err == nil {
			t.Error("the API server answers after it was killed")
		}
		c.StartAPIServer(t)
		c.RestartEtcd(t)
		if _, err := c.Client().CoreV1().Namespaces().Get(t.Context(), namespace, metav1.GetOptions{}); err != nil {
			t.Errorf("a namespace after two crashes: %v, want what it was", err)
		}
	})

	t.Run("signing keys", func(t *testing.T) {
		pod := c.CreatePod(t, apiserver.Pod{Namespace: namespace, Name: "cart-", ServiceAccount: "cart", Node: node.Name})
		before := c.Token(t, pod, audience, 10*time.Minute)
		c.RotateSigningKey(t)
		after := c.Token(t, pod, audience, 10*time.Minute)
		if !accepted(t, c, before, audience) || !accepted(t, c, after, audience) {
			t.Error("after RotateSigningKey a token is refused, want both keys accepted")
		}
		c.DropOldSigningKeys(t)
		if accepted(t, c, before, audience) || !accepted(t, c, after, audience) {
			t.Error("after DropOldSigningKeys: want the old key's token refused and the new one's accepted")
		}
	})

	t.Run("audit log", func(t *testing.T) {
		file, err := os.Open(c.AuditLog())
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		lines := bufio.NewScanner(file)
		lines.Buffer(nil, 1<<20)
		denied := false
		for lines.Scan() {
			if strings.Contains(lines.Text(), token) {
				t.Error("the audit log has a token")
			}
			denied = denied || strings.Contains(lines.Text(), `"system:node:node-b"`) && strings.Contains(lines.Text(), `"code":403`)
		}
		if !denied {
			t.Error("the audit log does not have the request that was refused")
		}
	})
}

// Two clusters at a time are apart: each has a port and an etcd of its own.
func TestClustersAreApart(t *testing.T) {
	one, two := apiserver.Start(t), apiserver.Start(t)
	one.CreateNamespace(t, "only-here")
	_, err := two.Client().CoreV1().Namespaces().Get(t.Context(), "only-here", metav1.GetOptions{})
	if !apierrors.IsNotFound(err) {
		t.Errorf("the other cluster's namespace: %v, want not found", err)
	}
}

func connect(t *testing.T, config *rest.Config) kubernetes.Interface {
	t.Helper()
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

func accepted(t *testing.T, c *apiserver.Cluster, token, audience string) bool {
	t.Helper()
	review, err := c.Client().AuthenticationV1().TokenReviews().Create(t.Context(), &authenticationv1.TokenReview{
		Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{audience}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatalf("review a token: %v", err)
	}
	return review.Status.Authenticated
}

type claims struct {
	Audience   []string `json:"aud"`
	IssuedAt   int64    `json:"iat"`
	Expiry     int64    `json:"exp"`
	Kubernetes struct {
		Pod  struct{ UID string }
		Node struct{ UID string }
	} `json:"kubernetes.io"`
}

func (c claims) life() time.Duration { return time.Duration(c.Expiry-c.IssuedAt) * time.Second }

func decode(t *testing.T, token string) claims {
	t.Helper()
	payload, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[1])
	if err != nil {
		t.Fatal(err)
	}
	var c claims
	if err := json.Unmarshal(payload, &c); err != nil {
		t.Fatal(err)
	}
	return c
}
