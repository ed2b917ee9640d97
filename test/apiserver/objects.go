package apiserver

import (
	"fmt"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// CreateNamespace creates a namespace and returns its name. A name that ends in
// "-" is completed by the API server, here and in the other methods that create
// something: tests that share a cluster keep apart by it.
func (c *Cluster) CreateNamespace(t testing.TB, name string) string {
	t.Helper()
	namespace, err := c.client.CoreV1().Namespaces().Create(t.Context(),
		&corev1.Namespace{ObjectMeta: named(name)}, metav1.CreateOptions{})
	if err != nil {
		t.Fatalf("create namespace %q: %v", name, err)
	}
	return namespace.Name
}

// CreateServiceAccount creates a service account.
func (c *Cluster) CreateServiceAccount(t testing.TB, namespace, name string) *corev1.ServiceAccount {
	t.Helper()
	account, err := c.client.CoreV1().ServiceAccounts(namespace).Create(t.Context(),
		&corev1.ServiceAccount{ObjectMeta: named(name)}, metav1.CreateOptions{})
	if err != nil {
		t.Fatalf("create service account %q: %v", namespace+"/"+name, err)
	}
	return account
}

// CreateNode creates a node, which has no kubelet.
func (c *Cluster) CreateNode(t testing.TB, name string) *corev1.Node {
	t.Helper()
	node, err := c.client.CoreV1().Nodes().Create(t.Context(),
		&corev1.Node{ObjectMeta: named(name)}, metav1.CreateOptions{})
	if err != nil {
		t.Fatalf("create node %q: %v", name, err)
	}
	return node
}

// Pod is what a test says about a pod.
type Pod struct {
	Namespace, Name string
	ServiceAccount  string // has to exist
	Node            string // empty for a pod that is not scheduled
	Labels          map[string]string
	Ports           []int32 // that its container declares for TCP
	Annotations     map[string]string
	// HostNetwork is whether it shares its node's network. Its address is one out of
	// 10.64.0.0/10 all the same, unless it is Pending.
	HostNetwork bool
	Pending     bool // on its node, and not started: [Cluster.StartPod] does that
}

// CreatePod creates a pod. On a node it is Running at once, unless it is to be
// Pending, and has an address of its own out of 10.64.0.0/10; without a node it is
// Pending.
func (c *Cluster) CreatePod(t testing.TB, p Pod) *corev1.Pod {
	t.Helper()
	object := &corev1.Pod{
		ObjectMeta: named(p.Name),
		Spec: corev1.PodSpec{
			ServiceAccountName: p.ServiceAccount,
			NodeName:           p.Node,
			HostNetwork:        p.HostNetwork,
			Containers:         []corev1.Container{{Name: "main", Image: "none"}},
		},
	}
	object.Labels, object.Annotations = p.Labels, p.Annotations
	for _, port := range p.Ports {
		object.Spec.Containers[0].Ports = append(object.Spec.Containers[0].Ports, corev1.ContainerPort{ContainerPort: port})
	}
	pod, err := c.client.CoreV1().Pods(p.Namespace).Create(t.Context(), object, metav1.CreateOptions{})
	if err != nil {
		t.Fatalf("create pod %q: %v", p.Namespace+"/"+p.Name, err)
	}
	if p.Node == "" || p.Pending {
		return pod
	}
	n := c.addresses.Add(1)
	return c.StartPod(t, pod, fmt.Sprintf("10.%d.%d.%d", 64|n>>16&0x3f, n>>8&0xff, n&0xff))
}

// StartPod lets a pod that is on a node run, and have addresses: one, or one of each
// family.
func (c *Cluster) StartPod(t testing.TB, pod *corev1.Pod, addresses ...string) *corev1.Pod {
	t.Helper()
	pod = pod.DeepCopy()
	pod.Status.Phase = corev1.PodRunning
	pod.Status.PodIP, pod.Status.PodIPs = addresses[0], nil
	for _, address := range addresses {
		pod.Status.PodIPs = append(pod.Status.PodIPs, corev1.PodIP{IP: address})
		if pod.Spec.HostNetwork {
			pod.Status.HostIP = addresses[0]
			pod.Status.HostIPs = append(pod.Status.HostIPs, corev1.HostIP{IP: address})
		}
	}
	return c.updateStatus(t, pod)
}

// FinishPod lets a pod succeed.
func (c *Cluster) FinishPod(t testing.TB, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	pod = pod.DeepCopy()
	pod.Status.Phase = corev1.PodSucceeded
	return c.updateStatus(t, pod)
}

func (c *Cluster) updateStatus(t testing.TB, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	updated, err := c.client.CoreV1().Pods(pod.Namespace).UpdateStatus(t.Context(), pod, metav1.UpdateOptions{})
	if err != nil {
		t.Fatalf("update the status of pod %q: %v", pod.Namespace+"/"+pod.Name, err)
	}
	return updated
}

// DeletePod deletes a pod, which gets a grace in whole seconds. Without a grace
// it is gone at once. With one it stays, marked as deleted, for there is no
// kubelet to end it: a second call without a grace does.
func (c *Cluster) DeletePod(t testing.TB, pod *corev1.Pod, grace time.Duration) {
	t.Helper()
	seconds := int64(grace / time.Second)
	err := c.client.CoreV1().Pods(pod.Namespace).Delete(t.Context(), pod.Name, metav1.DeleteOptions{
		GracePeriodSeconds: &seconds,
		Preconditions:      &metav1.Preconditions{UID: &pod.UID},
	})
	if err != nil {
		t.Fatalf("delete pod %q: %v", pod.Namespace+"/"+pod.Name, err)
	}
}

// Token returns a token of the pod's service account, bound to the pod, as a
// projected volume would have it. The API server refuses a life of less than 10
// minutes.
func (c *Cluster) Token(t testing.TB, pod *corev1.Pod, audience string, life time.Duration) string {
	t.Helper()
	return c.requestToken(t, pod, []string{audience}, life)
}

// AutomountToken returns the token that Kubernetes mounts into a pod that asks
// for none: it is for the API server itself, and although one of 3607 seconds is
// asked for, it lives a year.
func (c *Cluster) AutomountToken(t testing.TB, pod *corev1.Pod) string {
	t.Helper()
	return c.requestToken(t, pod, nil, 3607*time.Second)
}

func (c *Cluster) requestToken(t testing.TB, pod *corev1.Pod, audiences []string, life time.Duration) string {
	t.Helper()
	seconds := int64(life / time.Second)
	request, err := c.client.CoreV1().ServiceAccounts(pod.Namespace).CreateToken(t.Context(), pod.Spec.ServiceAccountName,
		&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
			Audiences:         audiences,
			ExpirationSeconds: &seconds,
			BoundObjectRef: &authenticationv1.BoundObjectReference{
				APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID,
			},
		}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatalf("request a token for pod %q: %v", pod.Namespace+"/"+pod.Name, err)
	}
	return request.Status.Token
}

func named(name string) metav1.ObjectMeta {
	if strings.HasSuffix(name, "-") {
		return metav1.ObjectMeta{GenerateName: name}
	}
	return metav1.ObjectMeta{Name: name}
}
