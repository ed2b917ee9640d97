package e2e_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// talker opens connections all the time, and says something on each.
type talker struct {
	from netns
	to   netip.AddrPort

	stopping chan struct{}
	running  sync.WaitGroup
	mu       sync.Mutex
	talks    []talk // guarded by mu
}

// talk is one connection of a talker.
type talk struct {
	began, ended time.Time
	err          error
}

// newTalker starts n goroutines that talk until stop is called.
func newTalker(t *testing.T, n int, from netns, to netip.AddrPort) *talker {
	t.Helper()
	tk := &talker{from: from, to: to, stopping: make(chan struct{})}
	for range n {
		tk.running.Go(func() {
			pause := time.NewTicker(20 * time.Millisecond)
			defer pause.Stop()
			for {
				select {
				case <-tk.stopping:
					return
				case <-pause.C:
				}
				one := talk{began: time.Now()}
				one.err = tk.talk(t)
				one.ended = time.Now()
				tk.mu.Lock()
				tk.talks = append(tk.talks, one)
				tk.mu.Unlock()
			}
		})
	}
	t.Cleanup(tk.stop)
	return tk
}

func (tk *talker) talk(t *testing.T) error {
	conn, err := tk.from.dial(bounded(t), tk.to)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer conn.Close()
	return greetWithin(conn, 20*time.Second)
}

func (tk *talker) stop() {
	select {
	case <-tk.stopping:
	default:
		close(tk.stopping)
	}
	tk.running.Wait()
}

// since returns the talks that began at a time or later.
func (tk *talker) since(began time.Time) []talk {
	tk.mu.Lock()
	defer tk.mu.Unlock()
	var all []talk
	for _, one := range tk.talks {
		if !one.began.Before(began) {
			all = append(all, one)
		}
	}
	return all
}

// await waits for so many good talks that began at a time or later, and returns when
// the first ended.
func (tk *talker) await(t *testing.T, n int, began time.Time) (first time.Time) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d connections", n), func() bool {
		first = time.Time{}
		good := 0
		for _, one := range tk.since(began) {
			if one.err != nil {
				continue
			}
			good++
			if first.IsZero() || one.ended.Before(first) {
				first = one.ended
			}
		}
		return good >= n
	})
	return first
}

// checkGood fails the test if any talk that began at a time or later has failed.
func (tk *talker) checkGood(t *testing.T, when string, began time.Time) {
	t.Helper()
	all := tk.since(began)
	var bad int
	for _, one := range all {
		if one.err == nil {
			continue
		}
		if bad++; bad <= 5 {
			t.Errorf("%s: a connection that began %v after it, and ended after %v: %v", when, one.began.Sub(began), one.ended.Sub(one.began), one.err)
		}
	}
	if bad > 0 {
		t.Errorf("%s: %d of %d connections failed", when, bad, len(all))
	}
}

// An agent is killed amid connections, and started again: what begins meanwhile
// waits, because the keeper holds the sockets, and is served once it is back. Nothing
// passes in plaintext under STRICT.
func TestMeshAgentDies(t *testing.T) {
	t.Parallel()
	m := newMesh(t, meshConfig{agent: []string{"-drain=8s"}})
	m.policy(t, "all", strict)
	a, b := m.two(t)
	to := b.at(echoPort)[0]
	legacy := m.uncaptured(t, m.hosts[0], m.account(t, "legacy"))
	must(t)(a.ns.greeted(t, to))
	eventually(t, "STRICT", func() bool {
		_, err := legacy.ns.greeted(t, to)
		return err != nil
	})
	seen := newTap(t, m.hub, "port0")
	talks := newTalker(t, 8, a.ns, to)
	talks.await(t, 20, time.Now())

	// A thousand connections at its end of the mesh are in the middle of their lives.
	var crowd sync.WaitGroup
	for range 10 {
		crowd.Go(func() {
			for range 100 {
				if _, err := a.ns.greeted(t, to); err != nil {
					t.Errorf("one of the thousand: %v", err)
					return
				}
			}
		})
	}
	crowd.Wait()

	for _, test := range []struct {
		name string
		host *host
	}{
		{"the callee's agent is killed", m.hosts[1]},
		{"the caller's agent is killed", m.hosts[0]},
	} {
		held := must(t)(a.ns.greeted(t, to))
		test.host.daemon.kill()
		dead := time.Now()
		// It is not the application that takes this connection, and not nobody.
		plain, err := legacy.ns.dial(t.Context(), to)
		if err != nil && test.host == m.hosts[1] {
			t.Errorf("%s: a plaintext connection was refused while the keeper has the sockets: %v", test.name, err)
		}
		if err := greetWithin(held, 5*time.Second); err == nil {
			t.Errorf("%s: a connection that it carried goes on", test.name)
		}
		began := time.Now()
		test.host.startAgent(t)
		first := talks.await(t, 20, began)
		t.Logf("%s: the first connection %v after its start, which was %v after its death", test.name, first.Sub(began), began.Sub(dead))
		// As with the policy, one second is for an idle machine.
		if first.Sub(began) > 5*time.Second {
			t.Errorf("%s: the first connection %v after its start, want 1 s on an idle machine", test.name, first.Sub(began))
		}
		if plain != nil {
			if err := greetWithin(plain, 10*time.Second); err == nil {
				t.Errorf("%s: plaintext passed under STRICT", test.name)
			}
			plain.Close()
		}
		talks.checkGood(t, test.name, dead)
	}

	for n, h := range []*host{m.hosts[1], m.hosts[0]} {
		name := fmt.Sprintf("the agent of host %d is replaced", 1-n)
		held := must(t)(a.ns.greeted(t, to))
		before := time.Now()
		if err := h.daemon.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if err := greetWithin(held, time.Second); err != nil {
			t.Errorf("%s: a connection that it carries, while it drains: %v", name, err)
		}
		if _, err := a.ns.greeted(t, to); err != nil {
			t.Errorf("%s: a new connection, while it drains: %v", name, err)
		} else if waited := time.Since(before); waited > time.Second {
			t.Errorf("%s: a new connection waited for %v while it drains", name, waited)
		}
		h.daemon.stop(t)
		t.Logf("%s: it drained for %v", name, time.Since(before).Round(time.Millisecond))
		if err := greetWithin(held, 5*time.Second); err == nil {
			t.Errorf("%s: a connection that it carried goes on without it", name)
		}
		h.startAgent(t)
		talks.await(t, 20, time.Now())
		talks.checkGood(t, name, before)
	}

	talks.stop()
	seen.await(t, m.hosts[0].ns, m.hosts[1].addresses.v4)
	seen.check(t)
	for _, d := range seen.carrying(greeting) {
		if d.from.Addr() != legacy.v4 {
			t.Errorf("a greeting is in the clear on the wire: %v", d)
		}
	}
}

// The control plane goes away, and the mesh goes on by what it knows.
func TestMeshWithoutServer(t *testing.T) {
	t.Parallel()
	m := newMesh(t, meshConfig{})
	m.policy(t, "all", strict)
	a, b := m.two(t)
	near := m.sandbox(t, m.hosts[0], sandboxConfig{account: m.account(t, "near")})
	near.echoing(t, echoPort)
	to := b.at(echoPort)[0]
	held := must(t)(a.ns.greeted(t, to))
	must(t)(a.ns.greeted(t, near.at(echoPort)[0]))

	// On one node it is as between two: nobody is trusted for being near.
	line := func(h *host, s *sandbox, direction string, to netip.AddrPort) connectionLine {
		return h.connection(t, s, direction, "a call", func(l connectionLine) bool { return l.Destination == to.String() })
	}
	closed := must(t)(a.ns.greeted(t, near.at(echoPort)[0]))
	closed.Close()
	if out := line(m.hosts[0], a, "outbound", near.at(echoPort)[0]); out.Protocol != "troth" || out.Peer != near.id() {
		t.Errorf("on one node: %+v", out)
	}
	if in := line(m.hosts[0], near, "inbound", near.at(echoPort)[0]); in.Protocol != "troth" || in.Peer != a.id() {
		t.Errorf("on one node: %+v", in)
	}

	m.server.kill()
	for range 20 {
		conn := must(t)(a.ns.greeted(t, to))
		conn.Close()
	}
	if err := greetWithin(held, 10*time.Second); err != nil {
		t.Errorf("a connection that was open when the server was killed: %v", err)
	}
	// A server that comes back changes nothing either.
	m.serve(t)
	if err := greetWithin(held, 10*time.Second); err != nil {
		t.Errorf("a connection that was open when the server came back: %v", err)
	}
	must(t)(a.ns.greeted(t, to))
}

// Identities are renewed and the authority is replaced under connections that live
// longer than any SVID: they go on.
func TestMeshRotation(t *testing.T) {
	t.Parallel()
	const life = 10 * time.Second
	m := newMesh(t, meshConfig{life: life, server: []string{"-agent-return=5s"}})
	m.policy(t, "all", strict)
	a, b := m.two(t)
	operator := m.newOperator(t)
	var held []*net.TCPConn
	for _, to := range b.at(echoPort) {
		held = append(held, must(t)(a.ns.greeted(t, to)))
	}
	began := time.Now()
	alive := func(when string) {
		t.Helper()
		for _, conn := range held {
			if err := greetWithin(conn, 10*time.Second); err != nil {
				t.Fatalf("a connection that has lived for %v, %s: %v", time.Since(began).Round(time.Millisecond), when, err)
			}
		}
	}

	before := m.trusted(t)
	if output, code := m.troth(t, operator, "authority", "rotate", "--reason", "a new year"); code != 0 {
		t.Fatalf("rotate: exit code %d and\n%s", code, output)
	}
	alive("after a rotation")
	eventually(t, "the old authority to be gone", func() bool {
		after := m.trusted(t).X509Authorities()
		return len(after) == 1 && !before.HasX509Authority(after[0])
	})
	alive("after the old authority was revoked")
	eventually(t, "two lives of an SVID", func() bool { return time.Since(began) > 2*life+life/2 })
	alive("after two lives of an SVID")
	must(t)(a.ns.greeted(t, b.at(echoPort)[0]))
}

// An authority is taken away from under connections. Those whose ends can renew go on.
// One whose node is cut off from the server ends, however long its SVID would live.
func TestMeshRevocation(t *testing.T) {
	t.Parallel()
	m := newMesh(t, meshConfig{life: time.Minute, nodes: 3, server: []string{"-agent-return=5s"}})
	m.policy(t, "all", strict)
	a, b := m.two(t)
	c := m.sandbox(t, m.hosts[2], sandboxConfig{account: m.account(t, "other")})
	operator := m.newOperator(t)
	var held []*net.TCPConn
	for _, to := range b.at(echoPort) {
		held = append(held, must(t)(a.ns.greeted(t, to)))
	}
	renewed := must(t)(c.ns.greeted(t, b.at(echoPort)[0]))

	old := authorityOf(t, m.plane)
	m.hosts[0].pull(t)
	var revoked time.Time
	for _, step := range [][]string{
		{"prepare", "--reason", "stolen"},
		{"activate", "PREPARED", "--force", "--reason", "stolen"},
		{"taint", old, "--reason", "stolen"},
		{"revoke", old, "--force", "--reason", "stolen"},
	} {
		switch step[0] {
		case "activate":
			step[1] = preparedOf(t, m.plane, old)
		case "revoke":
			eventually(t, "the connection that can to be renewed", func() bool {
				tunnels, err := m.hosts[2].ns.run(t, "", filepath.Join(programs, "troth"), "connections", "--tunnels", "--output=json")
				if err != nil {
					t.Fatal(err)
				}
				return strings.Contains(tunnels, "authorities") && !strings.Contains(tunnels, old)
			})
			revoked = time.Now()
		}
		if output, code := m.troth(t, operator, append([]string{"authority"}, step...)...); code != 0 {
			t.Fatalf("%v: exit code %d and\n%s", step, code, output)
		}
	}
	for _, conn := range held {
		conn.SetDeadline(time.Now().Add(patience / 2))
		if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a connection whose authority was revoked: %v", err)
		}
	}
	t.Logf("what cannot renew was cut %v after an operator began to revoke its authority", time.Since(revoked).Round(time.Millisecond))
	m.hosts[1].connection(t, b, "inbound", "a connection that was cut", func(l connectionLine) bool { return l.Reason == "PEER_UNTRUSTED" })
	if err := greetWithin(renewed, 10*time.Second); err != nil {
		t.Errorf("a connection whose ends have renewed: %v", err)
	}
	m.hosts[0].plug(t)
	eventually(t, "the node to be back", func() bool {
		_, err := a.ns.greeted(t, b.at(echoPort)[0])
		return err == nil
	})
}

// preparedOf is the ID of the one authority that is trusted beside another.
func preparedOf(t *testing.T, p *plane, beside string) string {
	t.Helper()
	var id string
	eventually(t, "the prepared authority in the bundle", func() bool {
		for _, authority := range p.trusted(t).X509Authorities() {
			if got := fmt.Sprintf("%x", authority.SubjectKeyId); got != beside {
				id = got
			}
		}
		return id != ""
	})
	return id
}

// A pod that is deleted has no connections any more, and once its network is taken
// away nothing of ours is left in it.
func TestMeshPodEnds(t *testing.T) {
	t.Parallel()
	m := newMesh(t, meshConfig{})
	a, b := m.two(t)
	to := b.at(echoPort)[0]
	if output, err := b.cni(t, "CHECK"); err != nil {
		t.Errorf("CNI CHECK: %v\n%s", err, output)
	}
	if output, err := b.cni(t, "STATUS"); err != nil {
		t.Errorf("CNI STATUS: %v\n%s", err, output)
	}
	out, in := must(t)(a.ns.greeted(t, to)), must(t)(b.ns.dial(t.Context(), m.listening(t, a)))
	t.Cleanup(func() { in.Close() })

	cluster.DeletePod(t, b.Pod, 0)
	for name, conn := range map[string]*net.TCPConn{"to a pod that is gone": out, "from a pod that is gone": in} {
		conn.SetDeadline(time.Now().Add(patience / 3))
		if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a connection %s: %v", name, err)
		}
	}
	eventually(t, "a pod that is gone to be called no more", func() bool {
		_, err := a.ns.greeted(t, to)
		return err != nil
	})
	for range 2 { // a runtime may ask twice
		if output, err := b.cni(t, "DEL"); err != nil {
			t.Errorf("CNI DEL: %v\n%s", err, output)
		}
	}
	// The rules go with the namespace, in which until then nothing is let through. But
	// nobody listens there, and nobody of ours keeps it.
	for _, port := range agentPorts {
		if conn, err := b.ns.dial(t.Context(), netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)); err == nil {
			conn.Close()
			t.Errorf("somebody listens at port %d of a pod that is gone", port)
		}
	}
	if conn, err := b.ns.dial(t.Context(), a.at(echoPort)[0]); err == nil {
		conn.Close()
		t.Error("a pod that is gone connects to another")
	}
	for name, p := range map[string]*process{"the agent": m.hosts[1].daemon, "its keeper": m.hosts[1].keeper} {
		eventually(t, name+" to let go of the namespace", func() bool { return !holds(t, p, b.ns) })
	}

	// Its successor, of another name and address, is reached as it was.
	again := m.sandbox(t, m.hosts[1], sandboxConfig{account: b.Spec.ServiceAccountName})
	again.echoing(t, echoPort)
	must(t)(a.ns.greeted(t, again.at(echoPort)[0]))
}

// holds reports whether a process has a descriptor of the namespace.
func holds(t *testing.T, p *process, n netns) bool {
	t.Helper()
	var want string
	if err := n.within(func() (err error) {
		want, err = os.Readlink("/proc/thread-self/ns/net")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	dir := fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if link, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil && link == want {
			return true
		}
	}
	return false
}

// listening listens in a pod for connections that say nothing.
func (m *mesh) listening(t *testing.T, s *sandbox) netip.AddrPort {
	t.Helper()
	l := s.ns.listen(t, netip.AddrPortFrom(netip.IPv6Unspecified(), 0))
	go func() {
		for {
			conn, err := l.AcceptTCP()
			if err != nil {
				return
			}
			t.Cleanup(func() { conn.Close() })
		}
	}()
	return netip.AddrPortFrom(s.v4, l.Addr().(*net.TCPAddr).AddrPort().Port())
}

// Services without an address of their own, and ports of nodes, are as they are
// without Troth.
func TestMeshServices(t *testing.T) {
	t.Parallel()
	m := newMesh(t, meshConfig{})
	a, b := m.two(t)
	near := m.sandbox(t, m.hosts[0], sandboxConfig{account: b.Spec.ServiceAccountName})
	atB, atNear := b.nginx(t, "b"), near.nginx(t, "near")
	legacy := m.uncaptured(t, m.hosts[0], m.account(t, "legacy"))

	// Who uses a headless one has a pod's address, from DNS.
	headless := m.service(t, corev1.ServiceSpec{ClusterIP: corev1.ClusterIPNone}, b)
	if got, err := a.ns.curl(t, b.at(80)[0], "/headless"); err != nil || got != "b" {
		t.Errorf("a pod of headless Service %s: %q, %v", headless.Name, got, err)
	}
	port := m.service(t, corev1.ServiceSpec{Type: corev1.ServiceTypeNodePort}, b, near)
	for n := range 2 {
		// From outside, as ever: by the node's rules, in plaintext.
		if got, err := m.hub.curl(t, m.hosts[0].addresses.at(port.nodePort)[n], "/node-port"); err != nil || got != "b" {
			t.Errorf("by the port of a node: %q, %v", got, err)
		}
		// From a pod that is not captured, by the node's rules too.
		if got, err := legacy.ns.curl(t, port.at(port.port)[n], "/legacy"); err != nil || got != "b" {
			t.Errorf("by a Service, from a pod that is not captured: %q, %v", got, err)
		}
		// From one that is, to each of the endpoints.
		for range 40 {
			if _, err := a.ns.curl(t, port.at(port.port)[n], "/spread"); err != nil {
				t.Errorf("by a Service: %v", err)
				break
			}
		}
		// A port that the Service has not.
		if got, err := a.ns.curl(t, port.at(81)[n], "/"); err == nil {
			t.Errorf("at a port that the Service has not: %q", got)
		}
		// From a pod to a Service that it is itself behind.
		if _, err := b.ns.curl(t, port.at(port.port)[n], "/self"); err != nil {
			t.Errorf("by a Service from one of its own pods: %v", err)
		}
	}
	eventually(t, "nginx to have logged all", func() bool {
		return len(atB.requests("/spread"))+len(atNear.requests("/spread")) == 80
	})
	if one, other := len(atB.requests("/spread")), len(atNear.requests("/spread")); one < 10 || other < 10 {
		t.Errorf("of 80 connections to a Service with two endpoints one got %d, the other %d", one, other)
	}
	nobody := m.service(t, corev1.ServiceSpec{})
	if got, err := a.ns.curl(t, nobody.at(nobody.port)[0], "/"); err == nil {
		t.Errorf("a Service that nobody is behind: %q", got)
	}
}
