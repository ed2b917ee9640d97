package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"helm.sh/helm/v4/pkg/action"
	chart "helm.sh/helm/v4/pkg/chart/v2"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/cli"
	"helm.sh/helm/v4/pkg/kube"
	appsv1 "k8s.io/api/apps/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"troth.dev/troth/test/apiserver"
)

// cluster is one that helm installs into. There is no controller: nothing runs, and
// what is deleted is gone at once.
type cluster struct {
	*apiserver.Cluster

	kubeconfig string
	chart      *chart.Chart
}

const (
	installed = "troth"
	namespace = "troth-system"
	timeout   = 2 * time.Minute
)

// startCluster starts one from the root of the checkout, where its parts are found.
func startCluster(t *testing.T) *cluster {
	t.Helper()
	c, err := loader.LoadDir(filepath.Join(deployFolder, "chart"))
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(filepath.Join("..", ".."))
	s := apiserver.Start(t)
	return &cluster{Cluster: s, kubeconfig: s.Kubeconfig(t, s.Admin()), chart: c}
}

// configuration returns what each of helm's commands begins with.
func (c *cluster) configuration(t *testing.T) *action.Configuration {
	t.Helper()
	settings := cli.New()
	settings.KubeConfig = c.kubeconfig
	settings.SetNamespace(namespace)
	configuration := action.NewConfiguration()
	if err := configuration.Init(settings.RESTClientGetter(), namespace, "secret"); err != nil {
		t.Fatal(err)
	}
	return configuration
}

func (c *cluster) install(t *testing.T, values string) error {
	t.Helper()
	install := action.NewInstall(c.configuration(t))
	install.ReleaseName, install.Namespace, install.CreateNamespace = installed, namespace, true
	install.ServerSideApply, install.WaitStrategy, install.Timeout = true, kube.HookOnlyStrategy, timeout
	_, err := install.RunWithContext(t.Context(), c.chart, parse(t, values))
	return err
}

func (c *cluster) upgrade(t *testing.T, values string) error {
	t.Helper()
	upgrade := action.NewUpgrade(c.configuration(t))
	upgrade.Namespace, upgrade.WaitStrategy, upgrade.Timeout = namespace, kube.HookOnlyStrategy, timeout
	_, err := upgrade.RunWithContext(t.Context(), installed, c.chart, parse(t, values))
	return err
}

func (c *cluster) uninstall(t *testing.T) error {
	t.Helper()
	uninstall := action.NewUninstall(c.configuration(t))
	uninstall.WaitStrategy, uninstall.Timeout = kube.HookOnlyStrategy, timeout
	_, err := uninstall.Run(installed)
	return err
}

func (c *cluster) key(t *testing.T) []byte {
	t.Helper()
	secret, err := c.Client().CoreV1().Secrets(namespace).Get(t.Context(), "troth-key-encryption-key", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return secret.Data["key"]
}

func (c *cluster) daemons(t *testing.T) map[string]*appsv1.DaemonSet {
	t.Helper()
	list, err := c.Client().AppsV1().DaemonSets("troth-node").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	byName := make(map[string]*appsv1.DaemonSet)
	for i := range list.Items {
		byName[list.Items[i].Name] = &list.Items[i]
	}
	return byName
}

// The key is made once, whatever comes; and after the release is gone there is what cleans the nodes, and what must not be lost.
func TestHelm(t *testing.T) {
	c := startCluster(t)
	if err := c.install(t, "trustDomain: example.org"); err != nil {
		t.Fatal(err)
	}
	key := c.key(t)
	if len(key) != 32 || bytes.Equal(key, make([]byte, 32)) {
		t.Fatalf("the key is %x, want 32 random bytes", key)
	}
	if daemons := c.daemons(t); daemons["troth-agent"] == nil || daemons["troth-cleanup"] != nil {
		t.Errorf("after the install there are the DaemonSets %v", daemons)
	}

	shop := c.CreateNamespace(t, "shop")
	if err := c.upgrade(t, "{trustDomain: example.org, agent: {drain: 10s}}"); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(c.key(t), key) {
		t.Error("an upgrade made another key")
	}

	// Whoever renders without asking the cluster makes another key, and is refused.
	secret, err := c.Client().CoreV1().Secrets(namespace).Get(t.Context(), "troth-key-encryption-key", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	secret.Data["key"] = bytes.Repeat([]byte{1}, 32)
	if _, err := c.Client().CoreV1().Secrets(namespace).Update(t.Context(), secret, metav1.UpdateOptions{}); err == nil || !strings.Contains(err.Error(), "immutable") {
		t.Errorf("another key in the place of the first: %v, want it to be immutable", err)
	}

	c.ApplyPolicy(t, "v1", shop, "default", "{mtls: {mode: STRICT}}")
	if err := c.uninstall(t); err != nil {
		t.Fatal(err)
	}
	if daemons := c.daemons(t); daemons["troth-agent"] != nil || daemons["troth-cleanup"] == nil {
		t.Errorf("after the uninstall there are the DaemonSets %v", daemons)
	}
	if !bytes.Equal(c.key(t), key) {
		t.Error("an uninstall took the key")
	}
	if _, err := c.Policies("v1", shop).Get(t.Context(), "default", metav1.GetOptions{}); err != nil {
		t.Errorf("an uninstall took the policies: %v", err)
	}
	c.checkGone(t)

	if err := c.install(t, "trustDomain: example.org"); err == nil || !strings.Contains(err.Error(), "troth-cleanup") {
		t.Errorf("a release while the nodes are being cleaned: %v, want it refused", err)
	}
	if err := c.Client().AppsV1().DaemonSets("troth-node").Delete(t.Context(), "troth-cleanup", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := c.install(t, "trustDomain: example.org"); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(c.key(t), key) {
		t.Error("the release after that made another key")
	}
}

// checkGone says what of the release is left that should not be.
func (c *cluster) checkGone(t *testing.T) {
	t.Helper()
	for _, of := range []struct {
		resource        schema.GroupVersionResource
		namespace, name string
	}{
		{schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "deployments"}, namespace, "troth-server"},
		{schema.GroupVersionResource{Version: "v1", Resource: "services"}, namespace, "troth-server"},
		{schema.GroupVersionResource{Version: "v1", Resource: "serviceaccounts"}, "troth-node", "troth-agent"},
		{schema.GroupVersionResource{Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "clusterroles"}, "", "troth-server"},
		{schema.GroupVersionResource{Group: "admissionregistration.k8s.io", Version: "v1", Resource: "validatingadmissionpolicies"}, "", "troth-tokens"},
		{schema.GroupVersionResource{Group: "admissionregistration.k8s.io", Version: "v1", Resource: "validatingadmissionpolicybindings"}, "", "troth-tokens"},
	} {
		if _, err := c.Dynamic().Resource(of.resource).Namespace(of.namespace).Get(t.Context(), of.name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			t.Errorf("after the uninstall %s %s: %v, want it not found", of.resource.Resource, of.name, err)
		}
	}
}

// A definition of PeerAuthentication that somebody else installed is left as it is,
// through install, upgrade and uninstall.
func TestDefinitionOfOthers(t *testing.T) {
	c := startCluster(t)
	theirs, err := os.ReadFile(filepath.Join("deploy", "crds", "peerauthentications.security.istio.io.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	name := c.ApplyCRD(t, apiserver.ChangeCRD(t, theirs, apiserver.AnyObject))
	crds := c.Dynamic().Resource(schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"})
	before, err := crds.Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"install", func() error { return c.install(t, "") }},
		{"upgrade", func() error { return c.upgrade(t, "server: {replicas: 2}") }},
		{"uninstall", func() error { return c.uninstall(t) }},
	} {
		if err := step.do(); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		after, err := crds.Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			t.Fatalf("after %s: %v", step.name, err)
		}
		if after.GetGeneration() != before.GetGeneration() || len(after.GetAnnotations()) != len(before.GetAnnotations()) {
			t.Errorf("after %s the definition is another: %v", step.name, after.GetAnnotations())
		}
	}
	if err := c.Client().AppsV1().DaemonSets("troth-node").Delete(t.Context(), "troth-cleanup", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := c.install(t, "peerAuthentication: {install: always}"); err == nil || !strings.Contains(err.Error(), "peerauthentications.security.istio.io") {
		t.Errorf("install over the definition of others: %v, want helm to refuse", err)
	}
}
