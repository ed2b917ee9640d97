package apiserver

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/dynamic"
)

// Dynamic returns an admin's client for objects of any kind.
func (c *Cluster) Dynamic() dynamic.Interface { return c.dynamic }

// ApplyCRD creates or changes a CustomResourceDefinition, which is YAML, and
// returns its name once objects of each version that it serves can be listed.
func (c *Cluster) ApplyCRD(t testing.TB, definition []byte) string {
	t.Helper()
	object := make(map[string]any)
	if err := yaml.Unmarshal(definition, &object); err != nil {
		t.Fatalf("read a CustomResourceDefinition: %v", err)
	}
	crd := &unstructured.Unstructured{Object: object}
	name := crd.GetName()
	ctx := context.WithoutCancel(t.Context()) // a cleanup, too, may change or delete one
	applied, err := c.crds().Apply(ctx, name, crd, metav1.ApplyOptions{FieldManager: "test", Force: true})
	if err != nil {
		t.Fatalf("apply CustomResourceDefinition %q: %v", name, err)
	}
	for _, resource := range resourcesOf(t, applied) {
		poll(t, fmt.Sprintf("%v is served", resource), func(ctx context.Context) (bool, error) {
			_, err := c.dynamic.Resource(resource).List(ctx, metav1.ListOptions{Limit: 1})
			return err == nil, err
		})
	}
	return name
}

// ChangeCRD returns a CustomResourceDefinition, which is YAML, with its spec
// changed.
func ChangeCRD(t testing.TB, definition []byte, changes ...func(spec map[string]any)) []byte {
	t.Helper()
	crd := make(map[string]any)
	if err := yaml.Unmarshal(definition, &crd); err != nil {
		t.Fatalf("read a CustomResourceDefinition: %v", err)
	}
	for _, change := range changes {
		change(crd["spec"].(map[string]any))
	}
	changed, err := (&unstructured.Unstructured{Object: crd}).MarshalJSON()
	if err != nil {
		t.Fatalf("write a CustomResourceDefinition: %v", err)
	}
	return changed
}

// AnyObject is a change by which a CustomResourceDefinition takes every object, as
// one does that somebody wrote in haste.
func AnyObject(spec map[string]any) {
	for _, v := range spec["versions"].([]any) {
		v.(map[string]any)["schema"] = map[string]any{"openAPIV3Schema": map[string]any{
			"type": "object", "x-kubernetes-preserve-unknown-fields": true,
		}}
	}
}

// Policies returns an admin's client for the PeerAuthentications of a namespace.
func (c *Cluster) Policies(version, namespace string) dynamic.ResourceInterface {
	return c.dynamic.Resource(schema.GroupVersionResource{
		Group: "security.istio.io", Version: version, Resource: "peerauthentications",
	}).Namespace(namespace)
}

// ApplyPolicy creates or changes a PeerAuthentication, whose spec is YAML.
func (c *Cluster) ApplyPolicy(t testing.TB, version, namespace, name, spec string) *unstructured.Unstructured {
	t.Helper()
	object := make(map[string]any)
	if err := yaml.Unmarshal([]byte("spec: "+spec), &object); err != nil {
		t.Fatal(err)
	}
	object["apiVersion"], object["kind"] = "security.istio.io/"+version, "PeerAuthentication"
	object["metadata"] = map[string]any{"name": name, "namespace": namespace}
	applied, err := c.Policies(version, namespace).Apply(t.Context(), name, &unstructured.Unstructured{Object: object},
		metav1.ApplyOptions{FieldManager: "author", Force: true})
	if err != nil {
		t.Fatalf("apply PeerAuthentication %s/%s: %v", namespace, name, err)
	}
	return applied
}

// DeletePolicy deletes a PeerAuthentication.
func (c *Cluster) DeletePolicy(t testing.TB, namespace, name string) {
	t.Helper()
	if err := c.Policies("v1", namespace).Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
		t.Fatalf("delete PeerAuthentication %s/%s: %v", namespace, name, err)
	}
}

// DeleteCRD deletes a CustomResourceDefinition and all objects of its kind, and
// returns once the API server knows the kind no more.
func (c *Cluster) DeleteCRD(t testing.TB, name string) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	crd, err := c.crds().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		t.Fatalf("delete CustomResourceDefinition %q: %v", name, err)
	}
	if err := c.crds().Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
		t.Fatalf("delete CustomResourceDefinition %q: %v", name, err)
	}
	poll(t, fmt.Sprintf("CustomResourceDefinition %q is gone", name), func(ctx context.Context) (bool, error) {
		_, err := c.crds().Get(ctx, name, metav1.GetOptions{})
		return apierrors.IsNotFound(err), err
	})
	for _, resource := range resourcesOf(t, crd) {
		poll(t, fmt.Sprintf("%v is not served", resource), func(ctx context.Context) (bool, error) {
			_, err := c.dynamic.Resource(resource).List(ctx, metav1.ListOptions{Limit: 1})
			return apierrors.IsNotFound(err), err
		})
	}
}

func (c *Cluster) crds() dynamic.ResourceInterface {
	return c.dynamic.Resource(schema.GroupVersionResource{
		Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions",
	})
}

// resourcesOf returns what a CustomResourceDefinition serves.
func resourcesOf(t testing.TB, crd *unstructured.Unstructured) []schema.GroupVersionResource {
	t.Helper()
	group, _, err1 := unstructured.NestedString(crd.Object, "spec", "group")
	plural, _, err2 := unstructured.NestedString(crd.Object, "spec", "names", "plural")
	versions, _, err3 := unstructured.NestedSlice(crd.Object, "spec", "versions")
	if err := errors.Join(err1, err2, err3); err != nil {
		t.Fatalf("read CustomResourceDefinition %q: %v", crd.GetName(), err)
	}
	var resources []schema.GroupVersionResource
	for _, version := range versions {
		if version, ok := version.(map[string]any); ok && version["served"] == true {
			name, _ := version["name"].(string)
			resources = append(resources, schema.GroupVersionResource{Group: group, Version: name, Resource: plural})
		}
	}
	return resources
}

// poll asks until what it waits for is true, of which the API server tells
// nobody, for a minute at most.
func poll(t testing.TB, what string, holds func(context.Context) (bool, error)) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
	defer cancel()
	ticker := time.NewTicker(20 * time.Millisecond)
	defer ticker.Stop()
	for {
		ok, err := holds(ctx)
		if ok {
			return
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			t.Fatalf("%s: never; at last: %v", what, err)
		}
	}
}
