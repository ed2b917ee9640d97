package deploy_test

import (
	"bufio"
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/restmapper"

	"troth.dev/troth/test/apiserver"
)

// The names and the trust domain of the plain manifests.
const (
	systemNamespace = "troth-system"
	nodeNamespace   = "troth-node"
	trustDomain     = "cluster.local"
	audience        = "spiffe://" + trustDomain
	signer          = "troth.dev/svid"
	bundleName      = "troth.dev:svid:" + trustDomain
)

// patience is how long anything may take that the API server or a program of ours
// does by itself.
const patience = time.Minute

// manifests is what deploy/manifests/troth.yaml has, as a cluster has it.
type manifests struct {
	*apiserver.Cluster

	objects []*unstructured.Unstructured
	mapper  meta.RESTMapper
}

// install starts a cluster, and applies the manifests as kubectl does, with the API
// server strict about fields that it does not know.
func install(t *testing.T) *manifests {
	t.Helper()
	m := &manifests{Cluster: apiserver.Start(t), objects: read(t, "manifests/troth.yaml")}
	groups, err := restmapper.GetAPIGroupResources(m.Client().Discovery())
	if err != nil {
		t.Fatal(err)
	}
	m.mapper = restmapper.NewDiscoveryRESTMapper(groups)
	for _, o := range m.objects {
		switch o.GetKind() {
		case "Namespace", "CustomResourceDefinition":
			// What is in a namespace is not taken, not even for show, before that is there.
			m.apply(t, o)
		}
	}
	for _, o := range m.objects {
		m.apply(t, o, metav1.DryRunAll)
	}
	for _, o := range m.objects {
		m.apply(t, o)
	}
	return m
}

func (m *manifests) apply(t *testing.T, o *unstructured.Unstructured, dryRun ...string) {
	t.Helper()
	body, err := o.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	mapping, err := m.mapper.RESTMapping(o.GroupVersionKind().GroupKind(), o.GroupVersionKind().Version)
	if err != nil {
		t.Fatal(err)
	}
	client := m.Dynamic().Resource(mapping.Resource)
	options := metav1.PatchOptions{FieldManager: "kubectl", FieldValidation: metav1.FieldValidationStrict, DryRun: dryRun, Force: new(true)}
	if mapping.Scope.Name() == meta.RESTScopeNameNamespace {
		if o.GetNamespace() == "" {
			t.Errorf("%s %s has no namespace: it would land in whoever's applies it", o.GetKind(), o.GetName())
		}
		_, err = client.Namespace(o.GetNamespace()).Patch(t.Context(), o.GetName(), types.ApplyPatchType, body, options)
	} else {
		_, err = client.Patch(t.Context(), o.GetName(), types.ApplyPatchType, body, options)
	}
	if err != nil {
		t.Fatalf("apply %s %s (dry run: %t): %v", o.GetKind(), o.GetName(), len(dryRun) > 0, err)
	}
}

// find returns the object of that kind and name as another type.
func find[T any](t *testing.T, m *manifests, kind, name string) *T {
	t.Helper()
	for _, o := range m.objects {
		if o.GetKind() == kind && o.GetName() == name {
			into := new(T)
			if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, into); err != nil {
				t.Fatal(err)
			}
			return into
		}
	}
	t.Fatalf("the manifests have no %s %q", kind, name)
	return nil
}

// pod returns a pod of a template, on a node or, if that is empty, on none.
func pod(namespace string, template *corev1.PodTemplateSpec, node string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: *template.ObjectMeta.DeepCopy(), Spec: *template.Spec.DeepCopy()}
	p.Namespace, p.GenerateName = namespace, "template-"
	p.Spec.NodeName = node
	return p
}

// read returns the objects of a file of manifests.
func read(t *testing.T, path string) []*unstructured.Unstructured {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatalf("%v: run make generate", err)
	}
	defer f.Close()
	var objects []*unstructured.Unstructured
	for documents := yaml.NewYAMLReader(bufio.NewReader(f)); ; {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			return objects
		}
		if err != nil {
			t.Fatal(err)
		}
		object := make(map[string]any)
		if err := yaml.Unmarshal(document, &object); err != nil {
			t.Fatal(err)
		}
		if len(object) > 0 {
			objects = append(objects, &unstructured.Unstructured{Object: object})
		}
	}
}

// eventually waits until f returns no error.
func eventually(t *testing.T, what string, f func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	ticker := time.NewTicker(20 * time.Millisecond)
	defer ticker.Stop()
	var last error
	for {
		err := f(ctx)
		if err == nil {
			return
		}
		if ctx.Err() == nil {
			last = err
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			t.Fatalf("%s: not within %s: %v", what, patience, last)
		}
	}
}

// The manifests are taken as they are, by an API server that refuses what it does not
// know; the server's pod is one that the restricted profile admits, and is not by luck;
// and admission guards what identities are made of.
func TestManifests(t *testing.T) {
	m := install(t)
	t.Run("PodSecurity", m.testPodSecurity)
	t.Run("Admission", m.testAdmission)
	t.Run("Secrets", m.testSecrets)
}

// A file that is for all to read has no key in it.
func (m *manifests) testSecrets(t *testing.T) {
	for _, o := range m.objects {
		if o.GetKind() == "Secret" {
			t.Errorf("the manifests have Secret %s", o.GetName())
		}
	}
}

func (m *manifests) testPodSecurity(t *testing.T) {
	deployment := find[appsv1.Deployment](t, m, "Deployment", "troth-server")
	daemons := find[appsv1.DaemonSet](t, m, "DaemonSet", "troth-agent")
	for _, c := range []struct {
		name, namespace string
		template        corev1.PodTemplateSpec
		change          func(*corev1.PodSpec)
		want            string // in the refusal; empty if it is admitted
	}{
		{name: "the server", namespace: systemNamespace, template: deployment.Spec.Template},
		{name: "the agent", namespace: nodeNamespace, template: daemons.Spec.Template},
		{name: "the agent among servers", namespace: systemNamespace, template: daemons.Spec.Template, want: "host namespaces",
			change: func(s *corev1.PodSpec) { s.ServiceAccountName = "troth-server" }},
		{name: "root", namespace: systemNamespace, template: deployment.Spec.Template, want: "runAsUser=0",
			change: func(s *corev1.PodSpec) { s.SecurityContext.RunAsUser = new(int64(0)) }},
		{name: "perhaps root", namespace: systemNamespace, template: deployment.Spec.Template, want: "runAsNonRoot",
			change: func(s *corev1.PodSpec) { s.SecurityContext.RunAsNonRoot = nil }},
		{name: "without seccomp", namespace: systemNamespace, template: deployment.Spec.Template, want: "seccompProfile",
			change: func(s *corev1.PodSpec) { s.SecurityContext.SeccompProfile = nil }},
		{name: "with more privileges than its parent", namespace: systemNamespace, template: deployment.Spec.Template, want: "allowPrivilegeEscalation",
			change: func(s *corev1.PodSpec) { s.Containers[0].SecurityContext.AllowPrivilegeEscalation = nil }},
		{name: "with capabilities", namespace: systemNamespace, template: deployment.Spec.Template, want: "unrestricted capabilities",
			change: func(s *corev1.PodSpec) { s.Containers[0].SecurityContext.Capabilities.Drop = nil }},
		{name: "on the node's network", namespace: systemNamespace, template: deployment.Spec.Template, want: "host namespaces",
			change: func(s *corev1.PodSpec) { s.HostNetwork = true }},
		{name: "with the node's files", namespace: systemNamespace, template: deployment.Spec.Template, want: `restricted volume type "hostPath"`,
			change: func(s *corev1.PodSpec) {
				s.Volumes = append(s.Volumes, corev1.Volume{Name: "host", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/etc"}}})
			}},
	} {
		p := pod(c.namespace, &c.template, "")
		if c.change != nil {
			c.change(&p.Spec)
		}
		_, err := m.Client().CoreV1().Pods(c.namespace).Create(t.Context(), p, metav1.CreateOptions{
			DryRun: []string{metav1.DryRunAll}, FieldValidation: metav1.FieldValidationStrict,
		})
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%s: %v, want it admitted", c.name, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), "PodSecurity") || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: %v, want a refusal by PodSecurity that names %q", c.name, err, c.want)
		}
	}
	for _, c := range daemons.Spec.Template.Spec.InitContainers {
		checkConfined(t, &c, nil)
	}
	checkConfined(t, &daemons.Spec.Template.Spec.Containers[0], []corev1.Capability{"NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE"})
}

// checkConfined says what no profile checks of a container among the privileged.
func checkConfined(t *testing.T, c *corev1.Container, capabilities []corev1.Capability) {
	t.Helper()
	s := c.SecurityContext
	if s == nil || s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem || s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation ||
		s.Privileged != nil && *s.Privileged || s.Capabilities == nil || len(s.Capabilities.Drop) != 1 || s.Capabilities.Drop[0] != "ALL" {
		t.Errorf("container %s: %v is not confined", c.Name, s)
		return
	}
	if got := s.Capabilities.Add; strings.Join(strs(got), ",") != strings.Join(strs(capabilities), ",") {
		t.Errorf("container %s has the capabilities %q, want %q", c.Name, got, capabilities)
	}
	if len(c.Resources.Limits) == 0 || len(c.Resources.Requests) == 0 {
		t.Errorf("container %s has no bounds: %v", c.Name, c.Resources)
	}
}

func strs(capabilities []corev1.Capability) []string {
	all := make([]string, 0, len(capabilities))
	for _, c := range capabilities {
		all = append(all, string(c))
	}
	return all
}

// nodeUID returns a node's UID.
func (m *manifests) nodeUID(t *testing.T, name string) types.UID {
	t.Helper()
	node, err := m.Client().CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return node.UID
}
