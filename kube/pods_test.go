package kube_test

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"troth.dev/troth/identity"
	"troth.dev/troth/kube"
	"troth.dev/troth/policy"
	"troth.dev/troth/test/apiserver"
)

var comparePods = cmp.Options{cmpopts.EquateComparable(netip.Addr{}), cmpopts.EquateEmpty()}

func TestNewPodsRefuses(t *testing.T) {
	some, dynamic := cluster.Client(), cluster.Dynamic()
	for _, test := range []struct {
		config kube.PodsConfig
		want   string
	}{
		{kube.PodsConfig{Dynamic: dynamic}, "kube: no client"},
		{kube.PodsConfig{Client: some}, "kube: no dynamic client"},
		{kube.PodsConfig{Client: some, Dynamic: dynamic}, "kube: no service account of the agents"},
		{kube.PodsConfig{Client: some, Dynamic: dynamic, Agents: agents, RootNamespace: "Root"}, `kube: root namespace "Root" is not a DNS label (RFC 1123)`},
		{kube.PodsConfig{Client: some, Dynamic: dynamic, Agents: agents, Patience: -1}, "kube: patience of -1ns"},
		{kube.PodsConfig{Client: some, Dynamic: dynamic, Agents: agents, LookupLimit: -1}, "kube: look-up limit of -1"},
		{kube.PodsConfig{Client: some, Dynamic: dynamic, Agents: agents, LookupRate: -1}, "kube: look-up rate of -1"},
	} {
		if _, err := kube.NewPods(test.config); err == nil || err.Error() != test.want {
			t.Errorf("NewPods() = %v, want %q", err, test.want)
		}
	}
}

// The record is what the API server has, whichever way it came.
func TestPod(t *testing.T) {
	w := newWorld(t)
	pod := w.pod(t, "cart-")
	want := identity.Pod{
		PodReference:      reference(pod),
		ServiceAccount:    "cart",
		ServiceAccountUID: string(w.account.UID),
		Node:              identity.Node{Name: w.node.Name, UID: string(w.node.UID)},
		Phase:             identity.PodRunning,
		Addresses:         []netip.Addr{netip.MustParseAddr(pod.Status.PodIP)},
		Labels:            map[string]string{"app": "cart"},
	}

	t.Run("watched", func(t *testing.T) {
		pods, wire := runPods(t, kube.PodsConfig{})
		got, err := pods.Pod(t.Context(), reference(pod))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, comparePods); diff != "" {
			t.Errorf("Pod() (-want +got):\n%s", diff)
		}
		if n := wire.asked(); n != 0 {
			t.Errorf("Pod() of a pod that is known sent %d requests, want none", n)
		}
		if accept := wire.accept("/api/v1/pods"); !strings.HasPrefix(accept, "application/vnd.kubernetes.protobuf") {
			t.Errorf("pods are watched as %q, want protobuf", accept)
		}
	})

	// The watches have brought none of the three.
	t.Run("looked up", func(t *testing.T) {
		pods, wire := runPods(t, kube.PodsConfig{Patience: time.Millisecond})
		wire.hold()
		w := newWorld(t)
		pod := w.pod(t, "cart-")
		want := want
		want.PodReference = reference(pod)
		want.ServiceAccountUID = string(w.account.UID)
		want.Node = identity.Node{Name: w.node.Name, UID: string(w.node.UID)}
		want.Addresses = []netip.Addr{netip.MustParseAddr(pod.Status.PodIP)}
		got, err := pods.Pod(t.Context(), reference(pod))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, comparePods); diff != "" {
			t.Errorf("Pod() (-want +got):\n%s", diff)
		}
		if n := wire.asked(); n != 3 {
			t.Errorf("Pod() sent %d requests, want one each for the pod, its service account and its node", n)
		}
	})

	// The pod is here, and its service account and node are not: the watches
	// run independently.
	t.Run("incomplete", func(t *testing.T) {
		w := newWorld(t)
		pod := w.pod(t, "cart-")
		deleteNode(t, w.node)
		pods, wire := runPods(t, kube.PodsConfig{Patience: time.Millisecond})
		got, err := pods.Pod(t.Context(), reference(pod))
		if err != nil {
			t.Fatal(err)
		}
		if want := (identity.Node{Name: w.node.Name}); got.Node != want {
			t.Errorf("Pod(on a node that was deleted).Node = %v, want %v", got.Node, want)
		}
		if n := wire.asked(); n != 2 {
			t.Errorf("Pod() sent %d requests, want the pod and the node to be looked up", n)
		}
	})

	t.Run("pending", func(t *testing.T) {
		pods, _ := runPods(t, kube.PodsConfig{})
		pod := cluster.CreatePod(t, apiserver.Pod{Namespace: w.namespace, Name: "cart-", ServiceAccount: "cart"})
		got, err := pods.Pod(t.Context(), reference(pod))
		if err != nil {
			t.Fatal(err)
		}
		if got.Phase != identity.PodPending || got.Node != (identity.Node{}) || got.ServiceAccountUID != string(w.account.UID) {
			t.Errorf("Pod(not scheduled) = %+v, want it pending, on no node and with its service account", got)
		}
	})

	// The server has to tell a wrong name from a pod that is not there.
	t.Run("by UID alone", func(t *testing.T) {
		pods, _ := runPods(t, kube.PodsConfig{})
		got, err := pods.Pod(t.Context(), identity.PodReference{Namespace: "other", Name: "other", UID: string(pod.UID)})
		if err != nil || got.PodReference != reference(pod) {
			t.Errorf("Pod(another name, this UID) = %v, %v, want the pod as it is", got.PodReference, err)
		}
	})
}

// A pod's ports are those that somebody may connect to by TCP for as long as it
// runs.
func TestContainerPorts(t *testing.T) {
	w := newWorld(t)
	pods, _ := runPods(t, kube.PodsConfig{})
	always := corev1.ContainerRestartPolicyAlways
	object := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: w.namespace, Name: "cart"},
		Spec: corev1.PodSpec{
			ServiceAccountName: w.account.Name,
			NodeName:           w.node.Name,
			InitContainers: []corev1.Container{
				{Name: "migrate", Image: "none", Ports: []corev1.ContainerPort{{ContainerPort: 70}}},
				{Name: "sidecar", Image: "none", RestartPolicy: &always, Ports: []corev1.ContainerPort{{ContainerPort: 9000}, {ContainerPort: 80}}},
			},
			Containers: []corev1.Container{
				{Name: "silent", Image: "none"},
				{Name: "main", Image: "none", Ports: []corev1.ContainerPort{
					{ContainerPort: 8080, Protocol: corev1.ProtocolTCP},
					{ContainerPort: 53, Protocol: corev1.ProtocolUDP},
					{ContainerPort: 65535},
					{ContainerPort: 80, Name: "http"},
				}},
			},
		},
	}
	pod, err := cluster.Client().CoreV1().Pods(w.namespace).Create(t.Context(), object, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	later, _ := runPods(t, kube.PodsConfig{})
	for how, pods := range map[string]*kube.Pods{"watched": pods, "listed": later} {
		got := await(t, "the pod", onNode(t, pods, w.node), has(pod))
		if diff := cmp.Diff([]uint16{80, 8080, 9000, 65535}, got[0].Pod.ContainerPorts); diff != "" {
			t.Errorf("ContainerPorts of a pod that was %s (-want +got):\n%s", how, diff)
		}
	}
}

func TestPodIsNotThere(t *testing.T) {
	w := newWorld(t)
	pod := w.pod(t, "cart")
	pods, wire := runPods(t, kube.PodsConfig{Patience: 10 * time.Millisecond})

	gone := w.pod(t, "gone")
	cluster.DeletePod(t, gone, 0)
	replaced := reference(pod)
	cluster.DeletePod(t, pod, 0)
	pod = w.pod(t, "cart")

	for _, test := range []struct {
		name     string
		ref      identity.PodReference
		want     error
		requests int
	}{
		{"never was", identity.PodReference{Namespace: w.namespace, Name: "never", UID: "1"}, identity.ErrPodNotFound, 1},
		{"deleted", reference(gone), identity.ErrPodNotFound, 1},
		{"replaced", replaced, identity.ErrPodReplaced, 1},
		{"no UID", identity.PodReference{Namespace: w.namespace, Name: "cart"}, identity.ErrPodNotFound, 0},
		{"no name", identity.PodReference{Namespace: w.namespace, UID: "1"}, identity.ErrPodNotFound, 0},
		{"no namespace", identity.PodReference{Name: "cart", UID: "1"}, identity.ErrPodNotFound, 0},
		{"a path for a name", identity.PodReference{Namespace: w.namespace, Name: "../../nodes", UID: "1"}, identity.ErrPodNotFound, 0},
		{"a path for a namespace", identity.PodReference{Namespace: "a/b", Name: "cart", UID: "1"}, identity.ErrPodNotFound, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			// Twice: that it is not there is not remembered.
			for range 2 {
				before := wire.asked()
				got, err := pods.Pod(t.Context(), test.ref)
				if !errors.Is(err, test.want) {
					t.Errorf("Pod() = %+v, %v, want %v", got, err, test.want)
				}
				if n := wire.asked() - before; n != test.requests {
					t.Errorf("Pod() sent %d requests, want %d", n, test.requests)
				}
			}
		})
	}
	if _, err := pods.Pod(t.Context(), reference(pod)); err != nil {
		t.Errorf("Pod(the one that replaced it) = %v", err)
	}
}

// A pod that was created just now is found, by the watches or by a look-up.
func TestPodCreatedJustNow(t *testing.T) {
	w := newWorld(t)
	for _, patience := range []time.Duration{time.Nanosecond, 0} {
		pods, _ := runPods(t, kube.PodsConfig{Patience: patience, LookupRate: 1000})
		for range 25 {
			pod := w.pod(t, "cart-")
			if _, err := pods.Pod(t.Context(), reference(pod)); err != nil {
				t.Fatalf("Pod(created just now) with a patience of %s: %v", patience, err)
			}
		}
	}
}

func TestPodBeforeSync(t *testing.T) {
	w := newWorld(t)
	pod := w.pod(t, "cart-")
	client, wire := client(t, cluster.Admin())
	pods, err := kube.NewPods(kube.PodsConfig{Client: client, Dynamic: client.Dynamic, Agents: agents, Patience: 10 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pods.Pod(t.Context(), reference(pod)); !errors.Is(err, kube.ErrUnavailable) {
		t.Errorf("Pod(before Run) = %v, want ErrUnavailable", err)
	}
	if n := wire.asked(); n != 0 {
		t.Errorf("Pod(before Run) sent %d requests, want none", n)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := pods.Pod(ctx, reference(pod)); !errors.Is(err, context.Canceled) || errors.Is(err, kube.ErrUnavailable) {
		t.Errorf("Pod(context ended) = %v, want the context's error", err)
	}
	value, release := pods.OnNode(w.node.Name)
	defer release()
	if got, _ := value.Load(); got != nil {
		t.Errorf("OnNode() before Run = %v, want nil: nobody knows yet", got)
	}
}

// What becomes of a pod, of its service account and of its node is in its record.
func TestPodFollowsTheAPIServer(t *testing.T) {
	w := newWorld(t)
	pods, _ := runPods(t, kube.PodsConfig{})
	onNode, release := pods.OnNode(w.node.Name)
	defer release()
	now := func(t *testing.T, pod *corev1.Pod) identity.Pod {
		t.Helper()
		got, err := pods.Pod(t.Context(), reference(pod))
		if err != nil {
			t.Fatal(err)
		}
		return got
	}

	t.Run("finishes", func(t *testing.T) {
		pod := w.pod(t, "cart-")
		await(t, "a running pod", onNode, has(pod))
		cluster.FinishPod(t, pod)
		await(t, "a finished pod", onNode, has())
		if err := now(t, pod).Live(time.Now()); !errors.Is(err, identity.ErrPodFinished) {
			t.Errorf("Live(finished) = %v, want ErrPodFinished", err)
		}
	})

	t.Run("is deleted with a grace", func(t *testing.T) {
		pod := w.pod(t, "cart-")
		await(t, "a running pod", onNode, has(pod))
		begin := time.Now()
		cluster.DeletePod(t, pod, 2*time.Second)
		await(t, "a pod whose grace runs", onNode, func(pods []policy.Assignment) bool {
			return len(pods) == 1 && !pods[0].Pod.DeletedAt.IsZero()
		})
		got := now(t, pod)
		// The API server has whole seconds.
		if grace := got.DeletedAt.Sub(begin); grace < time.Second || grace > 4*time.Second {
			t.Errorf("a pod with a grace of 2s is deleted after %s", grace)
		}
		if err := got.Live(begin); err != nil {
			t.Errorf("Live(grace runs) = %v, want nil", err)
		}
		// No event says that the grace is over: there is no kubelet.
		await(t, "a pod whose grace is over", onNode, has())
		if err := now(t, pod).Live(time.Now()); !errors.Is(err, identity.ErrPodDeleted) {
			t.Errorf("Live(grace over) = %v, want ErrPodDeleted", err)
		}
		cluster.DeletePod(t, pod, 0)
	})

	t.Run("is recreated", func(t *testing.T) {
		old := w.pod(t, "cart")
		await(t, "a running pod", onNode, has(old))
		cluster.DeletePod(t, old, 0)
		recreated := w.pod(t, "cart")
		await(t, "a pod created again", onNode, has(recreated))
		if _, err := pods.Pod(t.Context(), reference(old)); !errors.Is(err, identity.ErrPodReplaced) {
			t.Errorf("Pod(the old UID) = %v, want ErrPodReplaced", err)
		}
		cluster.DeletePod(t, recreated, 0)
	})

	t.Run("is relabelled", func(t *testing.T) {
		pod := w.pod(t, "cart-")
		await(t, "a running pod", onNode, has(pod))
		pod.Labels["app"] = "till"
		if _, err := cluster.Client().CoreV1().Pods(pod.Namespace).Update(t.Context(), pod, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		await(t, "a relabelled pod", onNode, func(pods []policy.Assignment) bool {
			return len(pods) == 1 && pods[0].Pod.Labels["app"] == "till"
		})
		cluster.DeletePod(t, pod, 0)
	})

	t.Run("is scheduled", func(t *testing.T) {
		pod := cluster.CreatePod(t, apiserver.Pod{Namespace: w.namespace, Name: "cart-", ServiceAccount: "cart"})
		err := cluster.Client().CoreV1().Pods(pod.Namespace).Bind(t.Context(), &corev1.Binding{
			ObjectMeta: metav1.ObjectMeta{Name: pod.Name},
			Target:     corev1.ObjectReference{Kind: "Node", Name: w.node.Name},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		await(t, "a pod that was scheduled", onNode, has(pod))
		if got, want := now(t, pod).Node, (identity.Node{Name: w.node.Name, UID: string(w.node.UID)}); got != want {
			t.Errorf("Pod(scheduled).Node = %v, want %v", got, want)
		}
		cluster.DeletePod(t, pod, 0)
	})

	t.Run("its service account is recreated", func(t *testing.T) {
		pod := w.pod(t, "cart-")
		accounts := cluster.Client().CoreV1().ServiceAccounts(w.namespace)
		if err := accounts.Delete(t.Context(), w.account.Name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		await(t, "no service account", onNode, func(pods []policy.Assignment) bool {
			return len(pods) == 1 && pods[0].Pod.ServiceAccountUID == ""
		})
		if got := now(t, pod).ServiceAccountUID; got != "" {
			t.Errorf("Pod(service account deleted).ServiceAccountUID = %q, want none", got)
		}
		account := cluster.CreateServiceAccount(t, w.namespace, w.account.Name)
		await(t, "another service account", onNode, func(pods []policy.Assignment) bool {
			return len(pods) == 1 && pods[0].Pod.ServiceAccountUID == string(account.UID)
		})
		if got, want := now(t, pod).ServiceAccountUID, string(account.UID); got != want {
			t.Errorf("Pod(service account recreated).ServiceAccountUID = %q, want %q", got, want)
		}
		cluster.DeletePod(t, pod, 0)
	})

	t.Run("its node is recreated", func(t *testing.T) {
		pod := w.pod(t, "cart-")
		deleteNode(t, w.node)
		await(t, "no node", onNode, func(pods []policy.Assignment) bool {
			return len(pods) == 1 && pods[0].Pod.Node == identity.Node{Name: w.node.Name}
		})
		node := cluster.CreateNode(t, w.node.Name)
		await(t, "another node", onNode, func(pods []policy.Assignment) bool {
			return len(pods) == 1 && pods[0].Pod.Node.UID == string(node.UID)
		})
		if got, want := now(t, pod).Node.UID, string(node.UID); got != want {
			t.Errorf("Pod(node recreated).Node.UID = %q, want %q", got, want)
		}
		cluster.DeletePod(t, pod, 0)
	})
}

func TestOnNode(t *testing.T) {
	here, there := newWorld(t), newWorld(t)
	pods, _ := runPods(t, kube.PodsConfig{})
	onNode, release := pods.OnNode(here.node.Name)
	elsewhere, releaseElsewhere := pods.OnNode(there.node.Name)
	defer releaseElsewhere()
	nowhere, releaseNowhere := pods.OnNode("nobody-knows")
	defer releaseNowhere()

	if got, _ := onNode.Load(); got == nil || len(got) != 0 {
		t.Errorf("OnNode(no pods) = %#v, want empty and not nil", got)
	}
	if got, _ := nowhere.Load(); got == nil || len(got) != 0 {
		t.Errorf("OnNode(no such node) = %#v, want empty and not nil", got)
	}
	_, otherChanged := elsewhere.Load()

	one, two, three := here.pod(t, "cart-"), here.pod(t, "cart-"), here.pod(t, "cart-")
	got := await(t, "three pods", onNode, has(one, two, three))
	for i := 1; i < len(got); i++ {
		if got[i-1].Pod.UID >= got[i].Pod.UID {
			t.Errorf("OnNode() has %q before %q, want them sorted", got[i-1].Pod.UID, got[i].Pod.UID)
		}
	}
	if ended(otherChanged) {
		t.Error("a pod of one node woke those who wait for another's")
	}

	// An update that changes nothing of a live pod's identity wakes nobody.
	finished := cluster.FinishPod(t, here.pod(t, "finished-"))
	running := func(pods []policy.Assignment) bool {
		return !slices.ContainsFunc(pods, func(pod policy.Assignment) bool { return pod.Pod.Phase != identity.PodRunning })
	}
	first := there.pod(t, "marker-")
	await(t, "the first marker", elsewhere, has(first))
	await(t, "three running pods", onNode, func(pods []policy.Assignment) bool {
		return has(one, two, three)(pods) && running(pods)
	})
	_, changed := onNode.Load()
	finished.Labels["app"] = "till"
	if _, err := cluster.Client().CoreV1().Pods(finished.Namespace).Update(t.Context(), finished, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	one.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	if _, err := cluster.Client().CoreV1().Pods(one.Namespace).UpdateStatus(t.Context(), one, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	// What comes later in the same watch is here, so the update was too.
	second := there.pod(t, "marker-")
	await(t, "the second marker", elsewhere, has(first, second))
	if ended(changed) {
		t.Error("a pod's readiness, or a finished pod's label, woke those who wait for its node")
	}

	// Held twice, it is one value, and current until the last lets go of it.
	again, releaseAgain := pods.OnNode(here.node.Name)
	if again != onNode {
		t.Error("OnNode() of the same node is another value")
	}
	release()
	release() // counts once
	cluster.DeletePod(t, two, 0)
	await(t, "two pods", again, has(one, three))
	releaseAgain()
	cluster.DeletePod(t, three, 0)
	third := there.pod(t, "marker-")
	await(t, "the third marker", elsewhere, has(first, second, third))
	if got, _ := again.Load(); !has(one, three)(got) {
		t.Errorf("OnNode() changed to %v after it was released", got)
	}
	fresh, releaseFresh := pods.OnNode(here.node.Name)
	defer releaseFresh()
	if got, _ := fresh.Load(); !has(one)(got) {
		t.Errorf("OnNode() after everybody had released it = %v, want the pods there are", got)
	}
}

// All who wait for one pod share one look-up, and who leaves does not end it.
func TestLookupIsShared(t *testing.T) {
	w := newWorld(t)
	pods, wire := runPods(t, kube.PodsConfig{Patience: time.Millisecond})
	wire.hold()
	pod := w.pod(t, "cart-")
	path := "/api/v1/namespaces/" + pod.Namespace + "/pods/" + pod.Name
	answer := make(chan struct{})
	wire.onAnswer(func(_, asked string) {
		if asked == path {
			<-answer
		}
	})

	const callers = 50
	impatient, leave := context.WithCancel(t.Context())
	var left, all sync.WaitGroup
	left.Go(func() {
		if _, err := pods.Pod(impatient, reference(pod)); !errors.Is(err, context.Canceled) {
			t.Errorf("Pod(context ended during the look-up) = %v, want the context's error", err)
		}
	})
	eventually(t, "the first waits", func() bool { return pods.Waiting(reference(pod)) == 1 })
	for range callers {
		all.Go(func() {
			got, err := pods.Pod(t.Context(), reference(pod))
			if err != nil || got.UID != string(pod.UID) {
				t.Errorf("Pod() = %v, %v", got, err)
			}
		})
	}
	eventually(t, "all wait", func() bool { return pods.Waiting(reference(pod)) == 1+callers })
	leave()
	left.Wait()
	close(answer)
	all.Wait()
	if n := wire.count("GET", path); n != 1 {
		t.Errorf("%d callers at the same time sent %d requests, want 1", 1+callers, n)
	}
}

func TestLookupLimit(t *testing.T) {
	w := newWorld(t)
	pods, wire := runPods(t, kube.PodsConfig{Patience: time.Millisecond, LookupLimit: 1})
	wire.hold()
	one, two := w.pod(t, "cart-"), w.pod(t, "cart-")
	answer := make(chan struct{})
	wire.onAnswer(func(_, path string) {
		if strings.HasSuffix(path, "/pods/"+one.Name) {
			<-answer
		}
	})
	var first sync.WaitGroup
	first.Go(func() {
		if _, err := pods.Pod(t.Context(), reference(one)); err != nil {
			t.Errorf("Pod(the first look-up) = %v", err)
		}
	})
	eventually(t, "the first look-up runs", func() bool { return pods.Waiting(reference(one)) == 1 })
	if _, err := pods.Pod(t.Context(), reference(two)); !errors.Is(err, kube.ErrUnavailable) {
		t.Errorf("Pod(one look-up too many) = %v, want ErrUnavailable", err)
	}
	close(answer)
	first.Wait()
	eventually(t, "room again", func() bool {
		_, err := pods.Pod(t.Context(), reference(two))
		return err == nil
	})
}

func TestLookupRate(t *testing.T) {
	pods, wire := runPods(t, kube.PodsConfig{Patience: time.Nanosecond, LookupLimit: 2, LookupRate: 0.001})
	ref := identity.PodReference{Namespace: "none", Name: "none", UID: "none"}
	for i, want := range []error{identity.ErrPodNotFound, identity.ErrPodNotFound, kube.ErrUnavailable, kube.ErrUnavailable} {
		if _, err := pods.Pod(t.Context(), ref); !errors.Is(err, want) {
			t.Errorf("Pod(), call %d = %v, want %v", i+1, err, want)
		}
	}
	if n := wire.asked(); n != 2 {
		t.Errorf("%d requests were sent, want 2", n)
	}
}

// The API server answered that the pod is there, and before the answer was handed
// on, the pod was deleted.
func TestPodDeletedDuringLookup(t *testing.T) {
	w, marker := newWorld(t), newWorld(t)
	pods, wire := runPods(t, kube.PodsConfig{Patience: time.Millisecond})
	onNode, release := pods.OnNode(marker.node.Name)
	defer release()
	wire.hold()
	pod := w.pod(t, "cart-")
	answered, answer := make(chan struct{}), make(chan struct{})
	wire.onAnswer(func(_, path string) {
		if strings.HasSuffix(path, "/pods/"+pod.Name) {
			close(answered)
			<-answer
		}
	})
	var asking sync.WaitGroup
	asking.Go(func() {
		if got, err := pods.Pod(t.Context(), reference(pod)); !errors.Is(err, identity.ErrPodNotFound) {
			t.Errorf("Pod(deleted during the look-up) = %+v, %v, want ErrPodNotFound", got, err)
		}
	})
	<-answered
	cluster.DeletePod(t, pod, 0)
	later := marker.pod(t, "marker-")
	wire.release()
	await(t, "what came after the deletion", onNode, has(later))
	close(answer)
	asking.Wait()
}

// During an outage what is known stays known, what is not is unavailable, and
// afterwards all is as the API server has it: also what was deleted meanwhile.
func TestOutage(t *testing.T) {
	w := newWorld(t)
	stays, goes := w.pod(t, "stays-"), w.pod(t, "goes-")
	pods, wire := runPods(t, kube.PodsConfig{Patience: time.Millisecond})
	onNode, release := pods.OnNode(w.node.Name)
	defer release()
	await(t, "two pods", onNode, has(stays, goes))

	// The wire is cut first, so that the deletion cannot be seen.
	wire.sever()
	cluster.DeletePod(t, goes, 0)
	created := w.pod(t, "new-")
	cluster.StopAPIServer(t)
	wire.mend()

	for _, pod := range []*corev1.Pod{stays, goes} {
		if _, err := pods.Pod(t.Context(), reference(pod)); err != nil {
			t.Errorf("Pod(seen before the outage) = %v", err)
		}
	}
	if _, err := pods.Pod(t.Context(), reference(created)); !errors.Is(err, kube.ErrUnavailable) || errors.Is(err, identity.ErrPodNotFound) {
		t.Errorf("Pod(not seen before the outage) = %v, want ErrUnavailable", err)
	}
	if got, _ := onNode.Load(); !has(stays, goes)(got) {
		t.Errorf("OnNode() during the outage = %v, want what it was", got)
	}

	begin := time.Now()
	cluster.StartAPIServer(t)
	t.Logf("the API server was back after %s", time.Since(begin).Round(time.Millisecond))
	begin = time.Now()
	await(t, "what is there after the outage", onNode, has(stays, created))
	t.Logf("caught up after another %s", time.Since(begin).Round(time.Millisecond))
	if _, err := pods.Pod(t.Context(), reference(goes)); !errors.Is(err, identity.ErrPodNotFound) {
		t.Errorf("Pod(deleted during the outage) = %v, want ErrPodNotFound", err)
	}
	later := w.pod(t, "later-")
	await(t, "a pod created after the outage", onNode, has(stays, created, later))
}

// Run ends in the middle of an outage too.
func TestRunEndsDuringOutage(t *testing.T) {
	t.Cleanup(func() { cluster.StartAPIServer(t) }) // after Run, which the next line begins, has ended
	_, wire := runPods(t, kube.PodsConfig{})
	cluster.StopAPIServer(t)
	seen := wire.count("WATCH", "/api/v1/pods")
	eventually(t, "a watch that fails", func() bool { return wire.count("WATCH", "/api/v1/pods") > seen })
}

func BenchmarkPod(b *testing.B) {
	w := newWorld(b)
	pod := w.pod(b, "cart-")
	pods, _ := runPods(b, kube.PodsConfig{})
	ref := reference(pod)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := pods.Pod(b.Context(), ref); err != nil {
			b.Fatal(err)
		}
	}
}

func deleteNode(t *testing.T, node *corev1.Node) {
	t.Helper()
	if err := cluster.Client().CoreV1().Nodes().Delete(t.Context(), node.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
}
