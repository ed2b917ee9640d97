package kube_test

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"

	"troth.dev/troth/identity"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/kube"
	"troth.dev/troth/policy"
	"troth.dev/troth/test/apiserver"
)

// cluster is the control plane that all tests of the package share. A test that
// stops it starts it again.
var cluster *apiserver.Cluster

func TestMain(m *testing.M) {
	os.Exit(apiserver.Main(m, func(c *apiserver.Cluster) { cluster = c }))
}

// agents is whom node agents run as.
var agents = identity.ServiceAccount{Namespace: "troth-system", Name: "troth-agent"}

// world is a namespace, a service account and a node of one test's own.
type world struct {
	namespace string
	account   *corev1.ServiceAccount
	node      *corev1.Node
}

func newWorld(t testing.TB) world {
	t.Helper()
	namespace := cluster.CreateNamespace(t, "shop-")
	return world{
		namespace: namespace,
		account:   cluster.CreateServiceAccount(t, namespace, "cart"),
		node:      cluster.CreateNode(t, "node-"),
	}
}

// pod creates a running pod of that name. One that ends in "-" is completed.
func (w world) pod(t testing.TB, name string) *corev1.Pod {
	t.Helper()
	return cluster.CreatePod(t, apiserver.Pod{
		Namespace:      w.namespace,
		Name:           name,
		ServiceAccount: w.account.Name,
		Node:           w.node.Name,
		Labels:         map[string]string{"app": "cart"},
	})
}

// client returns a client of the product's own making, and the wire between it
// and the API server.
func client(t testing.TB, config *rest.Config) (*kube.Client, *wire) {
	t.Helper()
	wire := newWire()
	config = rest.CopyConfig(config)
	config.Wrap(wire.wrap)
	client, err := kube.NewClient(config)
	if err != nil {
		t.Fatal(err)
	}
	return client, wire
}

// runPods runs Pods until the test ends, and returns when they are synced.
func runPods(t testing.TB, config kube.PodsConfig) (*kube.Pods, *wire) {
	t.Helper()
	pods, wire := startPods(t, cluster.Admin(), config)
	select {
	case <-pods.Synced():
	case <-time.After(patience):
		t.Fatal("the pods are not synced")
	}
	return pods, wire
}

// startPods runs Pods, as whom to says, until the test ends.
func startPods(t testing.TB, to *rest.Config, config kube.PodsConfig) (*kube.Pods, *wire) {
	t.Helper()
	client, wire := client(t, to)
	config.Client, config.Dynamic, config.Agents = client, client.Dynamic, agents
	pods, err := kube.NewPods(config)
	if err != nil {
		t.Fatal(err)
	}
	run(t, pods, wire)
	return pods, wire
}

// run runs Pods until the test ends.
func run(t testing.TB, pods *kube.Pods, wire *wire) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- pods.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		wire.release()
		if err := <-ended; err != nil {
			t.Errorf("Run() = %v, want nil after its context ended", err)
		}
	})
}

// patience is when a test gives up. Nothing here takes a tenth of it.
const patience = time.Minute

// await returns the first value that fits, or fails the test.
func await[T any](t testing.TB, what string, value *latest.Value[T], fits func(T) bool) T {
	t.Helper()
	late := time.After(patience)
	for {
		current, changed := value.Load()
		if fits(current) {
			return current
		}
		select {
		case <-changed:
		case <-late:
			t.Fatalf("%s: still %v", what, current)
		}
	}
}

// eventually polls what nobody is told of.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	late := time.After(patience)
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	for !holds() {
		select {
		case <-poll.C:
		case <-late:
			t.Fatalf("%s: never", what)
		}
	}
}

func reference(pod *corev1.Pod) identity.PodReference {
	return identity.PodReference{Namespace: pod.Namespace, Name: pod.Name, UID: string(pod.UID)}
}

// has says whether a node's pods have all of these and no others.
func has(want ...*corev1.Pod) func([]policy.Assignment) bool {
	return func(pods []policy.Assignment) bool {
		got, uids := make(map[string]bool), make(map[string]bool)
		for _, pod := range pods {
			got[pod.Pod.UID] = true
		}
		for _, pod := range want {
			uids[string(pod.UID)] = true
		}
		return pods != nil && cmp.Equal(got, uids)
	}
}
