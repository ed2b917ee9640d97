package e2e_test

import (
	"fmt"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// The whole job: curl in one pod reaches nginx in another, neither of which knows of
// Troth, through the agents of two nodes. Nobody on the network can read a word, nor
// whom it is between.
func TestMesh(t *testing.T) {
	t.Parallel()
	m := newMesh(t, meshConfig{})
	m.policy(t, "all", strict)
	a, b := m.two(t)
	const answer = "for the caller's eyes"
	server := b.nginx(t, answer)
	s := m.service(t, corev1.ServiceSpec{}, b)
	seen := newTap(t, m.hub, "port0")

	for n, source := range a.each() {
		for name, to := range map[string]struct {
			at      addresses
			port    uint16
			service string
		}{
			"pod": {b.addresses, 80, ""},
			"vip": {s.addresses, s.port, m.shop + "/" + s.Name},
		} {
			path := fmt.Sprintf("/%s-%d", name, n)
			got, err := a.ns.curl(t, to.at.at(to.port)[n], path)
			if err != nil || got != answer {
				t.Errorf("%s: %q, %v", path, got, err)
				continue
			}
			eventually(t, "nginx to have logged "+path, func() bool { return len(server.requests(path)) > 0 })
			if from := server.requests(path); from[0] != source.String() {
				t.Errorf("%s: nginx sees %q, want the caller, %s", path, from, source)
			}
			destination := to.at.at(to.port)[n].String()
			out := m.hosts[0].connection(t, a, "outbound", path, func(l connectionLine) bool { return l.Destination == destination })
			if out.Protocol != "troth" || out.Peer != b.id() || out.Service != to.service || out.BytesIn == 0 || out.BytesOut == 0 || out.PeerPod != b.Namespace+"/"+b.Name {
				t.Errorf("%s, at the caller's node: %+v", path, out)
			}
		}
		in := m.hosts[1].connection(t, b, "inbound", "a request", func(l connectionLine) bool { return l.Destination == b.at(80)[n].String() })
		if in.Protocol != "troth" || in.Peer != a.id() || in.Policy != m.shop+"/all" || in.Reason != "MTLS_ACCEPTED" || in.BytesIn == 0 || in.BytesOut == 0 {
			t.Errorf("at the callee's node: %+v", in)
		}
	}

	seen.await(t, m.hosts[0].ns, m.hosts[1].addresses.v4)
	seen.check(t)
	for _, secret := range []string{answer, "/pod-0", "/vip-1", "HTTP/1.1", "curl", "nginx", "spiffe://", m.shop} {
		if found := seen.carrying(secret); len(found) > 0 {
			t.Errorf("%q is in the clear on the wire: %v", secret, found)
		}
	}
	if all := seen.to(80); len(all) > 0 {
		t.Errorf("connections to the application's own port on the wire: %+v", all)
	}
	tunnels := seen.to(15009)
	if len(tunnels) == 0 {
		t.Fatal("no tunnel was seen")
	}
	for _, tunnel := range tunnels {
		checkCallerFirst(t, tunnel)
	}
}

// checkCallerFirst checks in which order the two ends of a tunnel have shown
// themselves, as far as the wire tells: in TLS 1.3 certificates are encrypted, so
// that whoever has not sent an encrypted record has shown nothing.
func checkCallerFirst(t *testing.T, c conversation) {
	t.Helper()
	first := func(caller bool, kind, message byte) int {
		return slices.IndexFunc(c.records, func(r record) bool {
			return r.Caller == caller && r.Type == kind && (message == 0 || r.Handshake == message)
		})
	}
	hello, answer := first(false, handshakeRecord, clientHello), first(true, handshakeRecord, serverHello)
	theirs, ours := first(true, encryptedRecord, 0), first(false, encryptedRecord, 0)
	if hello != 0 || answer < hello || theirs < answer || ours < theirs {
		t.Errorf("from %v to %v: the callee's hello is record %d, the caller's answer %d, the caller's first encrypted record %d, the callee's %d; want them in this order, from 0",
			c.caller, c.callee, hello, answer, theirs, ours)
	}
	// A certificate, its signature and the chain to come: the caller's flight is
	// hundreds of bytes before the callee sends anything encrypted.
	var shown int
	for _, r := range c.records[:max(0, ours)] {
		if r.Caller && r.Type == encryptedRecord {
			shown += r.Length
		}
	}
	if shown < 500 {
		t.Errorf("from %v to %v: the caller had sent %d encrypted bytes before the callee sent any: that is no certificate", c.caller, c.callee, shown)
	}
}
