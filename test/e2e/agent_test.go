package e2e_test

import (
	"testing"
	"time"

	"troth.dev/troth/handshake"
)

// The agent is killed and started again. Its clients come back to the same
// socket by themselves, are given SVIDs with new keys, because the old ones were
// in the agent's memory only, and hold a good one all the while.
func TestAgentRestart(t *testing.T) {
	t.Parallel()
	p := newPlane(t, 30*time.Second)
	n, root := p.newNode(t).start(t), newCgroup(t)
	cart, web := p.account(t, "cart"), p.account(t, "web")
	caller := startWorkload(t).enter(t, root, p.pod(t, n, cart)).watch(t, n)
	callee := startWorkload(t).enter(t, root, p.pod(t, n, web)).watch(t, n)
	callerLeaf, calleeLeaf := caller.svid(t, p, p.id(cart)), callee.svid(t, p, p.id(web))

	for range 3 {
		n.daemon.kill()
		// The socket is still there, and nobody serves it.
		shake(t, handshake.Standard, caller, callee, p.id(cart), p.id(web))
		began := time.Now()
		n.start(t)
		callerLeaf = caller.rotated(t, p, p.id(cart), callerLeaf)
		calleeLeaf = callee.rotated(t, p, p.id(web), calleeLeaf)
		t.Logf("both clients have new SVIDs %v after the agent's start", time.Since(began))
		shake(t, handshake.CallerFirst, caller, callee, p.id(cart), p.id(web))
	}
	caller.checkValid(t)
	callee.checkValid(t)
}
