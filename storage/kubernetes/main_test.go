package kubernetes_test

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"k8s.io/client-go/rest"

	"troth.dev/troth/kube"
	"troth.dev/troth/storage/kubernetes"
	"troth.dev/troth/test/apiserver"
)

// cluster is the control plane that all tests of the package share. A test that
// stops part of it starts it again.
var cluster *apiserver.Cluster

func TestMain(m *testing.M) {
	if kubeconfig := os.Getenv(childKubeconfig); kubeconfig != "" {
		fmt.Fprintln(os.Stderr, writeUntilKilled(context.Background(), kubeconfig, os.Getenv(childNamespace)))
		os.Exit(1)
	}
	os.Exit(apiserver.Main(m, func(c *apiserver.Cluster) { cluster = c }))
}

// open opens a store in a namespace of the test's own.
func open(t testing.TB) *kubernetes.Store {
	t.Helper()
	return openAt(t, cluster.Admin(), cluster.CreateNamespace(t, "troth-"))
}

// openAt opens the store of a namespace and closes it when the test ends, if it
// did not.
func openAt(t testing.TB, as *rest.Config, namespace string) *kubernetes.Store {
	t.Helper()
	s, err := kubernetes.Open(t.Context(), config(t, as, namespace))
	if err != nil {
		t.Fatalf("Open(%q) = %v", namespace, err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	})
	return s
}

func config(t testing.TB, as *rest.Config, namespace string) kubernetes.Config {
	t.Helper()
	client, err := kube.NewClient(as)
	if err != nil {
		t.Fatal(err)
	}
	return kubernetes.Config{Client: client, Namespace: namespace}
}

// patience is when a test gives up. Nothing here takes a tenth of it.
const patience = 2 * time.Minute

// eventually polls what nobody is told of.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	late := time.After(patience)
	poll := time.NewTicker(10 * time.Millisecond)
	defer poll.Stop()
	for !holds() {
		select {
		case <-poll.C:
		case <-late:
			t.Fatalf("%s: never", what)
		}
	}
}
