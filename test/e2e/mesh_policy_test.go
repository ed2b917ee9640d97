package e2e_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"troth.dev/troth/test/apiserver"
)

// What the mTLS policy of a pod says holds for the connections that there are: the
// plaintext ones end, within 250 ms of the policy, and no other. The node's own
// probes are let through.
func TestMeshPolicy(t *testing.T) {
	t.Parallel()
	m := newMesh(t, meshConfig{})
	a, b := m.two(t)
	b.nginx(t, "well")
	legacy := m.uncaptured(t, m.hosts[0], m.account(t, "legacy"))
	to, web := b.at(echoPort), b.at(80)

	// 1. Without a policy both may.
	var mutual, plain []*net.TCPConn
	for n := range to {
		mutual = append(mutual, must(t)(a.ns.greeted(t, to[n])))
		plain = append(plain, must(t)(legacy.ns.greeted(t, to[n])))
	}

	// 2. STRICT ends what is open and not mutual.
	began := time.Now()
	m.policy(t, "all", strict)
	applied := time.Since(began)
	for _, conn := range plain {
		conn.SetDeadline(time.Now().Add(patience / 3))
		if n, err := conn.Read(make([]byte, 1)); n > 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a plaintext connection under STRICT: %d bytes, %v", n, err)
		}
	}
	took := time.Since(began)
	t.Logf("the plaintext connections were cut %v after the policy was sent to the API server, which took %v itself", took, applied)
	// Not 250 ms: the machine has other tests to run. What it takes on an idle one is
	// in the log.
	if took-applied > 2*time.Second {
		t.Errorf("the plaintext connections were cut %v after the policy, want less than 250 ms on an idle machine", took-applied)
	}
	for _, conn := range mutual {
		if err := greetWithin(conn, 10*time.Second); err != nil {
			t.Errorf("a mutual connection under STRICT: %v", err)
		}
	}
	m.hosts[1].connection(t, b, "inbound", "a connection that was cut", func(l connectionLine) bool {
		return l.Protocol == "plaintext" && l.Reason == "POLICY_CHANGED" && l.Policy == m.shop+"/all"
	})

	// 3. New ones: neither another pod nor another node gets a byte, the kubelet its
	// answer.
	for n := range to {
		refused(t, "another pod under STRICT", legacy.ns, web[n])
		refused(t, "another node under STRICT", m.hosts[0].ns, web[n])
		refused(t, "somebody outside under STRICT", m.hub, web[n])
		if got, err := m.hosts[1].ns.curl(t, web[n], "/healthz"); err != nil || got != "well" {
			t.Errorf("the kubelet's probe under STRICT: %q, %v", got, err)
		}
	}
	m.hosts[1].connection(t, b, "inbound", "a probe", func(l connectionLine) bool { return l.Reason == "PROBE_EXEMPT" })
	m.hosts[1].connection(t, b, "inbound", "a refusal", func(l connectionLine) bool { return l.Reason == "PLAINTEXT_REFUSED" })

	// 4. One port is open, by the pod's own policy, and the others are not.
	m.policy(t, "web", fmt.Sprintf("selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}, portLevelMtls: {%d: {mode: PERMISSIVE}}", echoPort))
	admitted(t, "PERMISSIVE for a port", legacy.ns, to[0])
	refused(t, "STRICT for all other ports", legacy.ns, web[0])
	m.policy(t, "web", fmt.Sprintf("selector: {matchLabels: {app: web}}, mtls: {mode: PERMISSIVE}, portLevelMtls: {%d: {mode: STRICT}}", echoPort))
	eventually(t, "the other port to be open", func() bool {
		_, err := legacy.ns.curl(t, web[0], "/")
		return err == nil
	})
	refused(t, "STRICT for a port", legacy.ns, to[0])
	cluster.DeletePolicy(t, m.shop, "web")

	// 5. And back.
	m.policy(t, "all", "mtls: {mode: PERMISSIVE}")
	for n := range to {
		admitted(t, "PERMISSIVE again", legacy.ns, to[n])
	}

	// 6. DISABLE: nobody offers mutual TLS, and the network reads it. What is mutual
	// and open goes on.
	m.policy(t, "all", "mtls: {mode: DISABLE}")
	eventually(t, "the caller's agent to call in plaintext", func() bool {
		conn, err := a.ns.greeted(t, to[0])
		if err != nil {
			return false
		}
		conn.Close()
		return len(m.hosts[0].connections(a, "outbound", func(l connectionLine) bool { return l.Protocol == "plaintext" && l.Reason != "" })) > 0
	})
	for _, conn := range mutual {
		if err := greetWithin(conn, 10*time.Second); err != nil {
			t.Errorf("a mutual connection under DISABLE: %v", err)
		}
	}

	// 7. And mutual again, by the same addresses.
	m.policy(t, "all", strict)
	eventually(t, "a mutual connection again", func() bool {
		_, err := a.ns.greeted(t, to[0])
		return err == nil
	})
}

// must returns a connection, or ends the test.
func must(t *testing.T) func(*net.TCPConn, error) *net.TCPConn {
	return func(conn *net.TCPConn, err error) *net.TCPConn {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return conn
	}
}

// refused checks that somebody who speaks first is not heard: not a byte comes back,
// and the connection is reset.
func refused(t *testing.T, what string, from netns, to netip.AddrPort) {
	t.Helper()
	conn, err := from.dial(t.Context(), to)
	if err != nil {
		return // reset before it was ours
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience / 3))
	if _, err := io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		return // reset already: it is told once, and a read would find the end
	}
	got, err := bufio.NewReader(conn).ReadString('\n')
	if got != "" || err == nil || errors.Is(err, io.EOF) || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s, to %v: got %q, %v; want a reset", what, to, got, err)
	}
}

// admitted waits until somebody may greet.
func admitted(t *testing.T, what string, from netns, to netip.AddrPort) {
	t.Helper()
	eventually(t, what+" to be in force", func() bool {
		conn, err := from.greeted(t, to)
		if err != nil {
			return false
		}
		conn.Close()
		return true
	})
}

// A pod that shares its node's network, and one that has opted out, are left alone:
// nothing is captured, and others call them as they are.
func TestMeshLeavesAlone(t *testing.T) {
	t.Parallel()
	m := newMesh(t, meshConfig{})
	cart, web := m.account(t, "cart"), m.account(t, "web")
	a := m.sandbox(t, m.hosts[0], sandboxConfig{account: cart})
	a.echoing(t, echoPort)

	out := m.uncaptured(t, m.hosts[1], web)
	out.echoing(t, echoPort)
	untouched(t, out.ns)

	h := m.hosts[1]
	shared := &sandbox{
		Pod: cluster.CreatePod(t, apiserver.Pod{
			Namespace: m.shop, Name: "host-", ServiceAccount: web, Node: h.name, HostNetwork: true, Pending: true,
		}),
		addresses: h.addresses, ns: h.ns, host: h, m: m,
	}
	shared.started(t).echoing(t, echoPort)

	for n := range 2 {
		for name, pod := range map[string]*sandbox{"opted out": out, "host network": shared} {
			to := pod.at(echoPort)[n]
			conn := must(t)(a.ns.greeted(t, to))
			conn.Close()
			line := m.hosts[0].connection(t, a, "outbound", "a call of "+name, func(l connectionLine) bool { return l.Destination == to.String() })
			if line.Protocol != "plaintext" || line.Peer != "" {
				t.Errorf("%s: %+v", name, line)
			}
			// And the other way, which they begin themselves.
			if _, err := pod.ns.greeted(t, a.at(echoPort)[n]); err != nil {
				t.Errorf("from a pod that is %s: %v", name, err)
			}
		}
	}
	// Under STRICT they are turned away, whoever they say that they are.
	m.policy(t, "all", strict)
	for n := range 2 {
		for name, pod := range map[string]*sandbox{"opted out": out, "host network": shared} {
			to := a.at(echoPort)[n]
			eventually(t, "a pod that is "+name+" to be turned away", func() bool {
				_, err := pod.ns.greeted(t, to)
				return err != nil
			})
		}
	}
}

// untouched checks that nothing of ours is in the namespace.
func untouched(t *testing.T, n netns) {
	t.Helper()
	rules, err := n.run(t, "", "nft", "list", "ruleset")
	if err != nil || rules != "" {
		t.Errorf("rules in %s: %v\n%s", n, err, rules)
	}
	for _, port := range []uint16{15001, 15006, 15008, 15009} {
		conn, err := n.dial(t.Context(), netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port))
		if err == nil {
			conn.Close()
			t.Errorf("somebody listens at port %d in %s", port, n)
		}
	}
	for _, family := range []string{"-4", "-6"} {
		out, err := n.run(t, "", "ip", family, "rule", "list")
		if err != nil {
			t.Error(err)
		}
		var lines int
		for _, r := range out {
			if r == '\n' {
				lines++
			}
		}
		if want := map[string]int{"-4": 3, "-6": 2}[family]; lines != want {
			t.Errorf("ip %s rule in %s: want the kernel's own %d rules:\n%s", family, n, want, out)
		}
	}
}
