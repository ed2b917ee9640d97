package directory

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"troth.dev/troth/identity"
	"troth.dev/troth/policy"
)

// Services that have endpoints, and readers that hold all their addresses from the
// start: in the histories of TestIndex, most Services that somebody holds have none.
func TestEndpointsChange(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		i := New(Config{Agents: agents, Uncaptured: uncaptured, AgentReturn: agentReturn})
		m := &model{
			now:      time.Unix(1_000_000, 0),
			pods:     make(map[string]policy.Assignment),
			lastSeen: make(map[string]time.Time),
			services: make(map[Name]ServiceObject),
			slices:   make(map[Name]Slice),
			zones:    make(map[string]string),
		}
		one := func(t *rapid.T, of ...string) string { return rapid.SampledFrom(of).Draw(t, of[0]) }
		seldom := func(t *rapid.T, what string) bool { return rapid.IntRange(0, 4).Draw(t, what) == 0 }
		places := map[string]netip.Addr{
			"uid1": netip.MustParseAddr("10.0.0.1"), "uid2": netip.MustParseAddr("10.0.0.2"),
			"uid3": netip.MustParseAddr("10.0.0.3"), "uid4": netip.MustParseAddr("fd00::1"),
		}
		held := []string{"10.0.0.8", "10.0.0.9", "fd00::9", "10.0.0.1", "fd00::1"}

		setPod := func(t *rapid.T, uid string) {
			p := identity.Pod{
				PodReference:   identity.PodReference{Namespace: "shop", Name: uid, UID: uid},
				ServiceAccount: "cart", Phase: identity.PodRunning, Addresses: []netip.Addr{places[uid]},
				Node:        identity.Node{Name: one(t, "node1", "node2")},
				HostNetwork: seldom(t, "host network"), HBONE: seldom(t, "HBONE"),
			}
			if seldom(t, "finished") {
				p.Phase = identity.PodFinished
			}
			if seldom(t, "another's address") {
				p.Addresses = []netip.Addr{places[one(t, "uid1", "uid2", "uid3", "uid4")]}
			}
			if seldom(t, "opted out") {
				p.Labels = map[string]string{identity.CaptureLabel: "disabled"}
			}
			e := &policy.Effective{Mode: rapid.SampledFrom([]policy.Mode{policy.Strict, policy.Strict, policy.Disable}).Draw(t, "mode")}
			if seldom(t, "port mode") {
				e.Ports = []policy.PortMode{{Port: 2, Mode: policy.Disable}}
			}
			m.pods[uid] = policy.Assignment{Pod: p, Policy: e}
			i.SetPod(m.now, p, e)
		}
		setAgent := func(node string) {
			p := identity.Pod{
				PodReference:   identity.PodReference{Namespace: agents.Namespace, Name: "agent", UID: "agent-" + node},
				ServiceAccount: agents.Name, Phase: identity.PodRunning, Node: identity.Node{Name: node}, HostNetwork: true, Labels: capturing,
			}
			m.pods[p.UID] = policy.Assignment{Pod: p}
			m.look()
			i.SetPod(m.now, p, nil)
		}
		setService := func(t *rapid.T, name string) {
			s := ServiceObject{Name: Name{"shop", name}, Ports: []NamedPort{{"http", 80}}, Local: seldom(t, "local")}
			s.Addresses = []netip.Addr{netip.MustParseAddr("10.0.0.8")}
			if name == "two" {
				s.Addresses = []netip.Addr{netip.MustParseAddr("10.0.0.9"), netip.MustParseAddr("fd00::9")}
				s.Ports = append(s.Ports, NamedPort{"admin", 81})
			}
			m.services[s.Name] = s
			i.SetService(s)
		}
		setSlice := func(t *rapid.T, name string) {
			s := Slice{Name: Name{"shop", name}, Service: Name{"shop", one(t, "one", "two", "two")}, Ports: []NamedPort{{"http", 2}}}
			if rapid.Bool().Draw(t, "two ports") {
				s.Ports = []NamedPort{{"http", 3}, {"admin", 4}}
			}
			hinted := seldom(t, "hinted") // all of them, or their hints would hardly ever count
			for range rapid.IntRange(1, 4).Draw(t, "endpoints") {
				uid := one(t, "uid1", "uid2", "uid3", "uid4")
				e := SliceEndpoint{
					Address: places[uid], Node: one(t, "node1", "node2", ""), IsPod: !seldom(t, "by hand"),
					Ready: rapid.Bool().Draw(t, "ready"), Serving: !seldom(t, "stopped"), Terminating: rapid.Bool().Draw(t, "terminating"),
				}
				if e.IsPod && !seldom(t, "without a UID") {
					e.PodUID = uid
				}
				switch {
				case hinted:
					e.Hints = &Hints{Zones: []string{one(t, "zone1", "zone2")}}
				case seldom(t, "node hint"):
					e.Hints = &Hints{Nodes: []string{one(t, "node1", "node2")}}
				}
				s.Endpoints = append(s.Endpoints, e)
			}
			m.slices[s.Name] = s
			i.SetSlice(s)
		}

		setAgent("node1")
		setAgent("node2")
		for uid := range 4 {
			setPod(t, "uid"+string(rune('1'+uid)))
		}
		for _, name := range []string{"one", "two"} {
			setService(t, name)
			setSlice(t, name)
		}
		for n, zone := range map[string]string{"node1": "zone1", "node2": "zone2"} {
			m.zones[n] = zone
			i.SetZone(n, zone)
		}
		var holders []*holder
		for _, node := range []string{"node1", "node2"} {
			h := &holder{Reader: i.Reader(node), node: node, told: make(map[netip.Addr]*Behind), asked: make(map[netip.Addr]bool)}
			for _, a := range held {
				h.Hold(netip.MustParseAddr(a), a)
			}
			holders = append(holders, h)
		}

		t.Repeat(map[string]func(*rapid.T){
			"set pod":     func(t *rapid.T) { setPod(t, one(t, "uid1", "uid2", "uid3", "uid4")) },
			"set service": func(t *rapid.T) { setService(t, one(t, "one", "two")) },
			"set slice":   func(t *rapid.T) { setSlice(t, one(t, "one", "two", "three")) },
			"set zone": func(t *rapid.T) {
				n, zone := one(t, "node1", "node2"), rapid.SampledFrom([]string{"zone1", "zone2", ""}).Draw(t, "zone")
				m.zones[n] = zone
				i.SetZone(n, zone)
			},
			"remove slice": func(t *rapid.T) {
				name := Name{"shop", one(t, "one", "two", "three")}
				delete(m.slices, name)
				i.RemoveSlice(name)
			},
			"remove pod": func(t *rapid.T) {
				uid := one(t, "uid1", "uid2", "uid3", "uid4")
				delete(m.pods, uid)
				i.RemovePod(m.now, uid)
			},
			"an agent goes, or comes back": func(t *rapid.T) {
				node := one(t, "node1", "node2")
				if _, there := m.pods["agent-"+node]; !there {
					setAgent(node)
					return
				}
				delete(m.pods, "agent-"+node)
				i.RemovePod(m.now, "agent-"+node)
				m.now = m.now.Add(2 * agentReturn)
				m.look() // the other is still there
				i.Expire(m.now)
			},
			"": func(t *rapid.T) {
				for _, h := range holders {
					h.read(t)
					for _, a := range held {
						address := netip.MustParseAddr(a)
						if want, got := m.behind(address, h.node), h.told[address]; !want.equal(got) {
							t.Fatalf("%v at %v (-want +got):\n%s", h.node, a, cmp.Diff(want, got, compare))
						}
					}
				}
			},
		})
	})
}
