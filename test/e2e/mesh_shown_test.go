package e2e_test

import (
	"path/filepath"
	"strings"
	"testing"
)

// What a node carries is shown to whoever is on the node, while it carries it.
func TestMeshIsShown(t *testing.T) {
	t.Parallel()
	m := newMesh(t, meshConfig{})
	m.policy(t, "all", strict)
	a, b := m.two(t)
	apart := m.uncaptured(t, m.hosts[0], m.account(t, "apart"))
	if _, err := a.ns.greeted(t, b.at(echoPort)[0]); err != nil {
		t.Fatal(err)
	}
	for n, h := range m.hosts {
		own, peer, direction := a, b, "outbound"
		if n == 1 {
			own, peer, direction = b, a, "inbound"
		}
		for _, tt := range []struct {
			args []string
			want [][]string // in one line each
		}{
			{nil, [][]string{{direction, "troth", a.v4.String() + ":", b.at(echoPort)[0].String(), peer.id()}}},
			{[]string{"--tunnels"}, [][]string{{direction, "caller-first", own.id(), peer.id(), " 1 "}}},
			{[]string{"--workloads"}, [][]string{{m.shop + "/" + own.Name, "enabled", "STRICT", own.id()}}},
		} {
			page, err := h.ns.run(t, "", filepath.Join(programs, "troth"), append([]string{"connections"}, tt.args...)...)
			if err != nil {
				t.Fatalf("troth connections %v: %v", tt.args, err)
			}
			t.Logf("troth connections %s\n%s", strings.Join(tt.args, " "), page)
			for _, parts := range tt.want {
				if !hasLine(page, parts) {
					t.Errorf("troth connections %v has no line with all of %q:\n%s", tt.args, parts, page)
				}
			}
			if n == 0 && len(tt.args) == 1 && tt.args[0] == "--workloads" && !hasLine(page, []string{apart.Name, "opted_out"}) {
				t.Errorf("the pod that has opted out is not shown as such:\n%s", page)
			}
		}
	}
}

func hasLine(page string, parts []string) bool {
	for line := range strings.Lines(page) {
		all := true
		for _, part := range parts {
			all = all && strings.Contains(line, part)
		}
		if all {
			return true
		}
	}
	return false
}
