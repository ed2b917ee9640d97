package e2e_test

import (
	"crypto/x509"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
)

// The API server is away for longer than any SVID lives. What it said last is
// worked by: workloads and agents renew. Once it is back, so is the rest. Other
// tests need the API server: this one is not parallel to them.
func TestOutage(t *testing.T) {
	p := newPlane(t, 10*time.Second)
	n, root := p.newNode(t).start(t), newCgroup(t)
	cart, web, late := p.account(t, "cart"), p.account(t, "web"), p.account(t, "late")
	accounts := []string{cart, web}
	var workloads []*workload
	var leaves []*x509.Certificate
	for _, account := range accounts {
		w := startWorkload(t).enter(t, root, p.pod(t, n, account)).watch(t, n)
		workloads, leaves = append(workloads, w), append(leaves, w.svid(t, p, p.id(account)))
	}
	gone := p.pod(t, n, late)
	leaver := startWorkload(t).enter(t, root, gone).watch(t, n)
	leaver.svid(t, p, p.id(late))

	cluster.StopAPIServer(t)
	t.Cleanup(func() {
		if t.Failed() { // the other tests need it
			cluster.StartAPIServer(t)
		}
	})
	began := time.Now()
	for i, w := range workloads {
		// All that was issued before it began has expired by then, the agent's own
		// SVID too.
		for leaves[i].NotAfter.Before(began.Add(20 * time.Second)) {
			leaves[i] = w.rotated(t, p, p.id(accounts[i]), leaves[i])
		}
	}
	t.Logf("renewed for %v without the API server", time.Since(began))

	cluster.StartAPIServer(t)
	began = time.Now()
	cluster.DeletePod(t, gone, 0)
	w := startWorkload(t)
	pod := p.pod(t, n, late)
	w.enter(t, root, pod).watch(t, n).svid(t, p, p.id(late))
	t.Logf("a new pod is served %v after the API server's return", time.Since(began))
	if e := leaver.next(t, "error"); e.Code != codes.PermissionDenied.String() {
		t.Errorf("the stream of a deleted pod ended with %s (%s), want PermissionDenied", e.Code, e.Error)
	}
	for _, w := range workloads {
		w.checkValid(t)
	}

	// A server that starts while the API server is away serves once it is back.
	cluster.StopAPIServer(t)
	p.server.kill()
	p.server = startProgram(t, "troth-server", append(p.args, "-listen="+p.address)...)
	await(t, p.server, "the server to wait", func(l logLine) bool { return l.Message == "not serving yet" })
	cluster.StartAPIServer(t)
	await(t, p.server, "the server to serve", func(l logLine) bool { return l.Message == "serving" })
	for i, w := range workloads {
		w.rotated(t, p, p.id(accounts[i]), leaves[i])
		w.checkValid(t)
	}
}
