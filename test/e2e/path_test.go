package e2e_test

import (
	"crypto/x509"
	"fmt"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	corev1 "k8s.io/api/core/v1"

	"troth.dev/troth/handshake"
)

// The life of identities on two nodes, from a pod's creation to its end.
func TestPath(t *testing.T) {
	t.Parallel()
	p := newPlane(t, 10*time.Second)
	type running struct {
		*workload
		pod  *corev1.Pod
		node *node
		id   string
		leaf *x509.Certificate
	}
	var (
		nodes = []*node{p.newNode(t).start(t), p.newNode(t).start(t)}
		root  = newCgroup(t)
		all   []*running
	)
	cart, web := p.account(t, "cart"), p.account(t, "web")
	for _, n := range nodes {
		for _, account := range []string{cart, web} {
			pod := p.pod(t, n, account)
			w := startWorkload(t).enter(t, root, pod).watch(t, n)
			all = append(all, &running{workload: w, pod: pod, node: n, id: p.id(account)})
		}
	}

	// 1. Each has the SVID of its own service account, made for it.
	serials := make(map[string]bool)
	for _, w := range all {
		w.leaf = w.svid(t, p, w.id)
		serials[w.leaf.SerialNumber.String()] = true
	}
	if len(serials) != len(all) {
		t.Errorf("%d workloads on 2 nodes have %d SVIDs among them, want one for each account on each node", len(all), len(serials))
	}

	// 2. Two of them on different nodes trust each other, in either order.
	caller, callee := all[0], all[3]
	for _, order := range []handshake.Order{handshake.CallerFirst, handshake.Standard} {
		shake(t, order, caller.workload, callee.workload, caller.id, callee.id)
	}

	// 3. All SVIDs are replaced while they are in use, and the new ones serve.
	for _, w := range all {
		w.leaf = w.rotated(t, p, w.id, w.leaf)
	}
	shake(t, handshake.CallerFirst, callee.workload, caller.workload, callee.id, caller.id)

	// 4. A pod that is gone has no identity any more: its stream is ended, and a
	// process of it that comes later is refused.
	gone, neighbour := all[2], all[3]
	cluster.DeletePod(t, gone.pod, 0)
	if e := gone.next(t, "error"); e.Code != codes.PermissionDenied.String() {
		t.Errorf("the stream of a deleted pod ended with %s (%s), want PermissionDenied", e.Code, e.Error)
	}
	before := len(p.issued(gone.id, gone.node.name))
	late := startWorkload(t).enter(t, root, gone.pod).watch(t, gone.node)
	if e := late.next(t, "error"); e.Code != codes.PermissionDenied.String() {
		t.Errorf("a new process of a deleted pod is told %s (%s), want PermissionDenied", e.Code, e.Error)
	}

	// 5. New pods, of accounts that the node has not seen, are served at once.
	var took []time.Duration
	for n := range 5 {
		account := p.account(t, fmt.Sprintf("new-%d", n))
		w := startWorkload(t)
		began := time.Now()
		pod := p.pod(t, gone.node, account)
		created := time.Since(began)
		w.enter(t, root, pod).watch(t, gone.node).svid(t, p, p.id(account))
		took = append(took, time.Since(began))
		t.Logf("new pod: %v after the first of the two requests that created it, which took %v", took[n], created)
	}
	slices.Sort(took)
	t.Logf("from a pod's creation to its SVID in the workload's hands: median %v, longest %v", took[len(took)/2], took[len(took)-1])

	// 6. What was dropped in step 4 is still not there, after all that its agent
	// held then has been renewed: an SVID is renewed within 7.5 seconds here, and
	// twice is 10 or more.
	for range 2 {
		neighbour.leaf = neighbour.rotated(t, p, neighbour.id, neighbour.leaf)
	}
	if after := len(p.issued(gone.id, gone.node.name)); before == 0 || after != before {
		t.Errorf("the identity of a deleted pod was issued %d times before and %d times after its end, want more than 0 and as many", before, after)
	}
	if updates := written(late.process, func(e event) bool { return e.Kind == "update" }); len(updates) > 0 {
		t.Errorf("a new process of a deleted pod was sent SVIDs of %q", updates[0].IDs)
	}

	// 7. All the while the server renewed its own SVID too, at half of its life: about
	// five times so far.
	if renewed := len(p.issued(trustDomain.IDString()+"/troth/server", "")); renewed < 3 || renewed > 20 {
		t.Errorf("the server has issued %d SVIDs to itself, want 3 to 20", renewed)
	}
	for _, w := range all {
		if w != gone {
			w.checkValid(t)
		}
	}
}
