package kube

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/pager"

	"troth.dev/troth/identity"
	"troth.dev/troth/policy"
)

// Snapshot is what a cluster has, read once.
type Snapshot struct {
	// Pods is every pod, live or not, without the UIDs of its service account and
	// node.
	Pods []identity.Pod
	// Policies is every PeerAuthentication. There are none in a cluster that does
	// not know the kind.
	Policies []policy.PeerAuthentication
}

// Read reads a cluster as a person who runs kubectl sees it: by the kubeconfig
// file, or, if kubeconfig is empty, by those that kubectl would take, with
// contextName or, if that is empty, the current context. Pods and policies are
// read one after the other, in pages. The person needs the right to list both.
func Read(ctx context.Context, kubeconfig, contextName string) (Snapshot, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = kubeconfig
	config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules,
		&clientcmd.ConfigOverrides{CurrentContext: contextName}).ClientConfig()
	if err != nil {
		return Snapshot{}, fmt.Errorf("kube: load the client's configuration: %w", err)
	}
	client, err := NewClient(config)
	if err != nil {
		return Snapshot{}, err
	}
	var s Snapshot
	if s.Policies, err = client.readPolicies(ctx); err != nil {
		return Snapshot{}, fmt.Errorf("kube: list policies: %w", err)
	}
	if s.Pods, err = client.readPods(ctx); err != nil {
		return Snapshot{}, fmt.Errorf("kube: list pods: %w", err)
	}
	return s, nil
}

func (c *Client) readPods(ctx context.Context) ([]identity.Pod, error) {
	var pods []identity.Pod
	err := inPages(ctx, func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
		return c.CoreV1().Pods(metav1.NamespaceAll).List(ctx, options)
	}, func(o *corev1.Pod) { pods = append(pods, podOf(o)) })
	return pods, err
}

// readPolicies reads the first version that is served. The API server says not
// found of a version that it does not serve, and of a kind that it does not know.
func (c *Client) readPolicies(ctx context.Context) ([]policy.PeerAuthentication, error) {
	for _, version := range policyVersions() {
		var policies []policy.PeerAuthentication
		err := inPages(ctx, func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
			return c.Dynamic.Resource(policiesIn(version)).List(ctx, options)
		}, func(o *unstructured.Unstructured) { policies = append(policies, policy.Decode(o.Object)) })
		if !apierrors.IsNotFound(err) {
			return policies, err
		}
	}
	return nil, nil
}

// inPages calls each with every object of a list.
func inPages[T runtime.Object](ctx context.Context, list pager.ListPageFunc, each func(T)) error {
	return pager.New(list).EachListItem(ctx, metav1.ListOptions{}, func(o runtime.Object) error {
		object, ok := o.(T)
		if !ok {
			return fmt.Errorf("a list brought a %T", o)
		}
		each(object)
		return nil
	})
}
