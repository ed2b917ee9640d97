package e2e_test

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// What a mesh is before anything is captured, so that what the other tests say of
// Troth is about Troth: pods reach each other, by Services too, and somebody on the
// network reads what they say.
func TestMeshWithoutCapture(t *testing.T) {
	t.Parallel()
	m := newMesh(t, meshConfig{plain: true})
	cart, web := m.account(t, "cart"), m.account(t, "web")
	a := m.unplugged(t, m.hosts[0], sandboxConfig{account: cart}).started(t)
	b := m.unplugged(t, m.hosts[1], sandboxConfig{account: web}).started(t)
	near := m.unplugged(t, m.hosts[0], sandboxConfig{account: web}).started(t)
	const answer = "everybody may read this"
	atB, atNear := b.nginx(t, answer), near.nginx(t, answer)
	s := m.service(t, corev1.ServiceSpec{Type: corev1.ServiceTypeNodePort}, b)
	seen := newTap(t, m.hub, "port0")

	for n, source := range a.each() {
		for name, to := range map[string]struct {
			at     addresses
			port   uint16
			server *nginx
		}{
			"pod":  {b.addresses, 80, atB},
			"near": {near.addresses, 80, atNear},
			"vip":  {s.addresses, s.port, atB},
		} {
			path := fmt.Sprintf("/%s-%d", name, n)
			got, err := a.ns.curl(t, to.at.at(to.port)[n], path)
			if err != nil || got != answer {
				t.Errorf("%s: %q, %v", path, got, err)
			}
			eventually(t, "nginx to have logged "+path, func() bool { return len(to.server.requests(path)) > 0 })
			if from := to.server.requests(path); from[0] != source.String() {
				t.Errorf("%s: nginx sees %q, want %s", path, from, source)
			}
		}
		path := fmt.Sprintf("/node-%d", n)
		if got, err := m.hub.curl(t, m.hosts[0].addresses.at(s.nodePort)[n], path); err != nil || got != answer {
			t.Errorf("from outside by the node's port: %q, %v", got, err)
		}
	}
	seen.await(t, m.hosts[0].ns, m.hosts[1].addresses.v4)
	seen.check(t)
	if found := seen.carrying(answer); len(found) != 8 { // 2 pod, 2 vip, 2 node to pod, 2 node's port to outside
		t.Errorf("the answer was seen %d times on the wire: %v", len(found), found)
	}
	if all := seen.to(80); len(all) != 6 {
		t.Errorf("%d connections to port 80 were seen: %+v", len(all), all)
	}

	b.echoing(t, echoPort)
	applications(t, a, b)
}
