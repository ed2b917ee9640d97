package directory

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"troth.dev/troth/identity"
	"troth.dev/troth/policy"
)

var (
	agents     = identity.ServiceAccount{Namespace: "troth-system", Name: "troth-agent"}
	uncaptured = map[string]bool{"kube-system": true}
	compare    = cmp.Options{cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{})}
)

// agentReturn is for how long the index of the tests waits for an agent.
const agentReturn = time.Minute

// model is what an index was told, from which every answer is worked out from the
// start each time.
type model struct {
	now      time.Time
	pods     map[string]policy.Assignment
	lastSeen map[string]time.Time // when an agent that captures was last on a node
	services map[Name]ServiceObject
	slices   map[Name]Slice
	zones    map[string]string
}

func (m *model) live(p identity.Pod) bool { return p.Live(m.now) == nil }

// covers says whether the node has an agent that captures, or had one a moment ago.
func (m *model) covers(node string) bool {
	seen, ok := m.lastSeen[node]
	return ok && m.now.Before(seen.Add(agentReturn))
}

// look notes where agents are, before and after each change.
func (m *model) look() {
	for _, captures := range []bool{false, true} {
		for _, p := range m.pods {
			if p.Pod.Account() != agents || p.Pod.Node.Name == "" || !m.live(p.Pod) || p.Pod.Captures() != captures {
				continue
			}
			if captures {
				m.lastSeen[p.Pod.Node.Name] = m.now
			} else {
				delete(m.lastSeen, p.Pod.Node.Name)
			}
		}
	}
}

// capturing are the labels of an agent that captures.
var capturing = map[string]string{identity.CaptureLabel: "enabled"}

func (m *model) protocol(p identity.Pod) Protocol {
	switch {
	case p.Capture(uncaptured) == identity.Captured && p.Node.Name != "" && m.covers(p.Node.Name):
		return Troth
	case p.HBONE && !p.HostNetwork:
		return HBONE
	default:
		return Plaintext
	}
}

func (m *model) protocolAt(p policy.Assignment, port uint16) Protocol {
	if mode, _ := p.Policy.At(port); mode == policy.Disable {
		return Plaintext
	}
	return m.protocol(p.Pod)
}

// owner is the pod that answers at an address.
func (m *model) owner(a netip.Addr) (policy.Assignment, bool) {
	var claims []policy.Assignment
	for _, p := range m.pods {
		if m.live(p.Pod) && !p.Pod.HostNetwork && slices.Contains(p.Pod.Addresses, a) {
			claims = append(claims, p)
		}
	}
	if len(claims) == 0 {
		return policy.Assignment{}, false
	}
	slices.SortFunc(claims, func(a, b policy.Assignment) int {
		if kept := a.Pod.DeletedAt.IsZero(); kept != b.Pod.DeletedAt.IsZero() {
			if kept {
				return -1
			}
			return 1
		}
		if d := int(m.protocol(b.Pod)) - int(m.protocol(a.Pod)); d != 0 {
			return d
		}
		return strings.Compare(a.Pod.UID, b.Pod.UID)
	})
	return claims[0], true
}

func (m *model) endpoint(p policy.Assignment, at netip.AddrPort) Endpoint {
	return Endpoint{Address: at, Pod: p.Pod.PodReference, Account: p.Pod.Account(), Protocol: m.protocolAt(p, at.Port())}
}

func (m *model) behind(a netip.Addr, node string) *Behind {
	for _, name := range slices.SortedFunc(maps.Keys(m.services), compareNames) {
		if s := m.services[name]; slices.Contains(s.Addresses, a) {
			return &Behind{Service: m.service(s, a.Is6(), node)}
		}
	}
	p, ok := m.owner(a)
	if !ok {
		return nil
	}
	e := m.endpoint(p, netip.AddrPortFrom(a, 0))
	e.Protocol = m.protocolAt(p, 1) // no policy of the test has port 1
	for port := uint16(1); port < 10; port++ {
		if other := m.protocolAt(p, port); other != e.Protocol {
			e.Ports = append(e.Ports, PortProtocol{port, other})
		}
	}
	return &Behind{Pod: &e}
}

func (m *model) service(s ServiceObject, ipv6 bool, node string) *Service {
	want := &Service{Name: s.Name, Affinity: s.Affinity}
	for _, port := range s.Ports {
		want.Ports = append(want.Ports, ServicePort{Port: port.Port, Endpoints: m.endpoints(s, port.Name, ipv6, node)})
	}
	return want
}

// endpoints spells kube-proxy's rules out, one after the other.
func (m *model) endpoints(s ServiceObject, port string, ipv6 bool, node string) []Endpoint {
	type candidate struct {
		SliceEndpoint
		at netip.AddrPort
	}
	var all []candidate
	for _, slice := range m.slices {
		for _, p := range slice.Ports {
			for _, e := range slice.Endpoints {
				if slice.Service == s.Name && p.Name == port && e.Address.Is6() == ipv6 {
					all = append(all, candidate{e, netip.AddrPortFrom(e.Address, p.Port)})
				}
			}
		}
	}
	byNode := s.Local
	for _, slice := range m.slices {
		for _, e := range slice.Endpoints {
			byNode = byNode || slice.Service == s.Name && e.Hints != nil && len(e.Hints.Nodes) > 0
		}
	}
	caller := ""
	if byNode {
		caller = node
	}
	slices.SortFunc(all, func(a, b candidate) int {
		if d := a.at.Compare(b.at); d != 0 {
			return d
		}
		return b.compare(&a.SliceEndpoint, caller) // the better first
	})
	all = slices.CompactFunc(all, func(a, b candidate) bool { return a.at == b.at })

	var ready, ending []candidate
	for _, c := range all {
		if s.Local && c.Node != node {
			continue
		}
		if c.Ready {
			ready = append(ready, c)
		} else if c.Serving && c.Terminating {
			ending = append(ending, c)
		}
	}
	hinted := func(of func(*Hints) []string, mine string) bool {
		var kept []candidate
		for _, c := range ready {
			if len(of(c.Hints)) == 0 {
				return false
			}
			if slices.Contains(of(c.Hints), mine) {
				kept = append(kept, c)
			}
		}
		if len(kept) == 0 {
			return false
		}
		ready = kept
		return true
	}
	if !s.Local && !hinted((*Hints).nodes, node) {
		hinted((*Hints).zones, m.zones[node])
	}
	if len(ready) == 0 {
		ready = ending
	}
	var endpoints []Endpoint
	for _, c := range ready {
		p, known := m.owner(c.Address)
		if c.IsPod && c.PodUID != "" {
			p, known = m.pods[c.PodUID]
			known = known && m.live(p.Pod) && slices.Contains(p.Pod.Addresses, c.Address)
		}
		if c.IsPod && !known {
			continue
		}
		if !known || p.Pod.HostNetwork {
			endpoints = append(endpoints, Endpoint{Address: c.at, Protocol: Plaintext})
			continue
		}
		endpoints = append(endpoints, m.endpoint(p, c.at))
	}
	return endpoints
}

// holder is a reader, and what it was told.
type holder struct {
	*Reader
	node  string
	told  map[netip.Addr]*Behind
	asked map[netip.Addr]bool // those that have to be answered, whatever they are
}

// read takes all that there is. Nothing is told twice.
func (h *holder) read(t *rapid.T) {
	for {
		answer, ok := h.Next()
		if !ok {
			break
		}
		a := netip.MustParseAddr(answer.Address)
		before, known := h.told[a]
		if known && !h.asked[a] && cmp.Equal(before, answer.Behind, compare) {
			t.Fatalf("%v is told again of %v what it knows: %+v", h.node, a, before)
		}
		h.told[a] = answer.Behind
		delete(h.asked, a)
	}
	for a := range h.asked {
		t.Fatalf("%v is not answered for %v", h.node, a)
	}
}

// Whatever happens in whatever order, everybody who holds an address ends up with
// what the objects say, nobody is told what they know, and nothing is kept that
// nobody needs.
func TestIndex(t *testing.T) {
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
		holders := make(map[string]*holder)

		pick := func(t *rapid.T, of ...string) string { return rapid.SampledFrom(of).Draw(t, of[0]) }
		node := func(t *rapid.T) string { return pick(t, "node1", "node2") }
		address := func(t *rapid.T) netip.Addr {
			return netip.MustParseAddr(pick(t, "10.0.0.1", "10.0.0.2", "10.0.0.3", "fd00::1", "fd00::2"))
		}
		serviceName := func(t *rapid.T) Name { return Name{"shop", pick(t, "service1", "service1", "service1", "service2")} }
		sliceName := func(t *rapid.T) Name { return Name{"shop", pick(t, "slice1", "slice2", "slice3")} }
		uid := func(t *rapid.T) string { return pick(t, "uid1", "uid2", "uid3", "uid4") }
		ports := func(t *rapid.T) []NamedPort {
			return rapid.SampledFrom([][]NamedPort{{{"http", 2}}, {{"http", 2}}, {{"http", 3}}, {{"http", 3}, {"admin", 4}}, {{"", 2}}, nil}).Draw(t, "ports")
		}
		effective := func(t *rapid.T) *policy.Effective {
			return &policy.Effective{
				Mode:  rapid.SampledFrom([]policy.Mode{policy.Permissive, policy.Strict, policy.Disable}).Draw(t, "mode"),
				Ports: rapid.SampledFrom([][]policy.PortMode{nil, {{Port: 2, Mode: policy.Disable}}, {{Port: 2, Mode: policy.Strict}, {Port: 3, Mode: policy.Disable}}}).Draw(t, "port modes"),
			}
		}
		set := func(p policy.Assignment) {
			m.look()
			m.pods[p.Pod.UID] = p
			m.look()
			i.SetPod(m.now, p.Pod, p.Policy)
		}

		hold := func(n, a string) {
			h := holders[n]
			if h == nil {
				h = &holder{Reader: i.Reader(n), node: n, told: make(map[netip.Addr]*Behind), asked: make(map[netip.Addr]bool)}
				holders[n] = h
			}
			h.Hold(netip.MustParseAddr(a), a)
			h.asked[netip.MustParseAddr(a)] = true
		}

		// A small cluster to begin with: what matters takes many parts that fit.
		for n, uid := range []string{"uid1", "uid2"} {
			set(policy.Assignment{Pod: identity.Pod{
				PodReference: identity.PodReference{Namespace: "shop", UID: uid}, ServiceAccount: "cart", Phase: identity.PodRunning,
				Node: identity.Node{Name: fmt.Sprint("node", n+1)}, Addresses: []netip.Addr{netip.MustParseAddr(fmt.Sprint("10.0.0.", n+1))},
			}, Policy: &policy.Effective{Mode: policy.Permissive}})
			set(policy.Assignment{Pod: identity.Pod{
				PodReference: identity.PodReference{Namespace: agents.Namespace, UID: fmt.Sprint("agent", n+1)}, ServiceAccount: agents.Name,
				Phase: identity.PodRunning, Node: identity.Node{Name: fmt.Sprint("node", n+1)}, HostNetwork: true, Labels: capturing,
			}, Policy: &policy.Effective{Mode: policy.Permissive}})
			hold(fmt.Sprint("node", n+1), "10.0.0.9")
		}
		first := Name{"shop", "service1"}
		m.services[first] = ServiceObject{Name: first, Ports: []NamedPort{{"http", 80}}, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.9")}}
		i.SetService(m.services[first])
		slice := Slice{Name: Name{"shop", "slice1"}, Service: first, Ports: []NamedPort{{"http", 2}}, Endpoints: []SliceEndpoint{
			{Address: netip.MustParseAddr("10.0.0.1"), IsPod: true, PodUID: "uid1", Node: "node1", Ready: true},
			{Address: netip.MustParseAddr("10.0.0.2"), IsPod: true, PodUID: "uid2", Node: "node2", Ready: true},
		}}
		m.slices[slice.Name] = slice
		i.SetSlice(slice)

		t.Repeat(map[string]func(*rapid.T){
			"set pod": func(t *rapid.T) {
				p := identity.Pod{
					PodReference:   identity.PodReference{Namespace: pick(t, "shop", "shop", "kube-system"), UID: uid(t)},
					ServiceAccount: pick(t, "cart", "till"),
					Phase:          rapid.SampledFrom([]identity.PodPhase{identity.PodRunning, identity.PodRunning, identity.PodPending, identity.PodFinished}).Draw(t, "phase"),
					Addresses:      rapid.SliceOfNDistinct(rapid.Custom(address), 0, 2, rapid.ID).Draw(t, "addresses"),
					HostNetwork:    rapid.IntRange(0, 4).Draw(t, "host network") == 0,
					HBONE:          rapid.IntRange(0, 2).Draw(t, "HBONE") == 0,
				}
				if rapid.IntRange(0, 4).Draw(t, "scheduled") > 0 {
					p.Node.Name = node(t)
				}
				if rapid.IntRange(0, 3).Draw(t, "deleted") == 0 {
					p.DeletedAt = m.now.Add(time.Duration(rapid.IntRange(-1, 3).Draw(t, "grace")) * time.Minute)
				}
				if rapid.IntRange(0, 4).Draw(t, "opted out") == 0 {
					p.Labels = map[string]string{identity.CaptureLabel: "disabled"}
				}
				set(policy.Assignment{Pod: p, Policy: effective(t)})
			},
			"set agent": func(t *rapid.T) {
				p := identity.Pod{
					PodReference:   identity.PodReference{Namespace: agents.Namespace, Name: "agent", UID: pick(t, "agent1", "agent2")},
					ServiceAccount: agents.Name, Phase: identity.PodRunning, Node: identity.Node{Name: node(t)}, HostNetwork: true,
				}
				if rapid.IntRange(0, 2).Draw(t, "captures") > 0 {
					p.Labels = capturing
				}
				set(policy.Assignment{Pod: p, Policy: effective(t)})
			},
			"set policy": func(t *rapid.T) {
				p, ok := m.pods[uid(t)]
				if !ok {
					t.Skip()
				}
				p.Policy = effective(t)
				set(p)
			},
			"remove pod": func(t *rapid.T) {
				uid := pick(t, "uid1", "uid2", "uid3", "uid4", "agent1", "agent2")
				m.look()
				delete(m.pods, uid)
				m.look()
				i.RemovePod(m.now, uid)
			},
			"time passes": func(t *rapid.T) {
				// In steps that no agent's return, and no grace, falls between.
				for range rapid.IntRange(1, 4).Draw(t, "steps") {
					m.look()
					m.now = m.now.Add(time.Minute / 2)
					// An agent whose grace ended in between was there until it did.
					for _, p := range m.pods {
						if p.Pod.Account() == agents && p.Pod.DeletedAt.Equal(m.now) {
							m.lastSeen[p.Pod.Node.Name] = m.now
						}
					}
					m.look()
					i.Expire(m.now)
				}
			},
			"set service": func(t *rapid.T) {
				s := ServiceObject{Name: serviceName(t), Ports: ports(t), Local: rapid.Bool().Draw(t, "local")}
				s.Addresses = rapid.SampledFrom([][]netip.Addr{
					nil, {netip.MustParseAddr("10.0.0.9")}, {netip.MustParseAddr("10.0.0.9")}, {netip.MustParseAddr("10.0.0.8"), netip.MustParseAddr("fd00::9")},
				}).Draw(t, "cluster IPs")
				if rapid.Bool().Draw(t, "sticky") {
					s.Affinity = time.Hour
				}
				m.services[s.Name] = s
				i.SetService(s)
			},
			"remove service": func(t *rapid.T) {
				name := serviceName(t)
				delete(m.services, name)
				i.RemoveService(name)
			},
			"set slice": func(t *rapid.T) {
				s := Slice{Name: sliceName(t), Service: serviceName(t), Ports: ports(t)}
				for range rapid.IntRange(0, 3).Draw(t, "endpoints") {
					e := SliceEndpoint{
						Address: address(t), Node: rapid.SampledFrom([]string{"node1", "node2", ""}).Draw(t, "at node"),
						Ready: rapid.Bool().Draw(t, "ready"), Serving: rapid.Bool().Draw(t, "serving"), Terminating: rapid.Bool().Draw(t, "terminating"),
						IsPod: rapid.Bool().Draw(t, "is pod"),
					}
					if e.IsPod && rapid.Bool().Draw(t, "by UID") {
						e.PodUID = uid(t)
						if p := m.pods[e.PodUID].Pod; len(p.Addresses) > 0 && rapid.IntRange(0, 4).Draw(t, "another address") > 0 {
							e.Address = p.Addresses[0]
						}
					}
					switch rapid.IntRange(0, 5).Draw(t, "hints") {
					case 0:
						e.Hints = &Hints{Zones: []string{pick(t, "zone1", "zone2")}}
					case 1:
						e.Hints = &Hints{Nodes: []string{node(t)}}
					}
					s.Endpoints = append(s.Endpoints, e)
				}
				m.slices[s.Name] = s
				i.SetSlice(s)
			},
			"remove slice": func(t *rapid.T) {
				name := sliceName(t)
				delete(m.slices, name)
				i.RemoveSlice(name)
			},
			"set zone": func(t *rapid.T) {
				n, zone := node(t), rapid.SampledFrom([]string{"zone1", "zone2", ""}).Draw(t, "zone")
				m.zones[n] = zone
				i.SetZone(n, zone)
			},
			"list anew": func(t *rapid.T) {
				n, s, l := node(t), serviceName(t), sliceName(t)
				if rapid.IntRange(0, 3).Draw(t, "really") > 0 {
					t.Skip()
				}
				maps.DeleteFunc(m.zones, func(name, _ string) bool { return name != n })
				maps.DeleteFunc(m.services, func(name Name, _ ServiceObject) bool { return name != s })
				maps.DeleteFunc(m.slices, func(name Name, _ Slice) bool { return name != l })
				i.KeepZones(func(name string) bool { return name == n })
				i.KeepServices(func(name Name) bool { return name == s })
				i.KeepSlices(func(name Name) bool { return name == l })
			},
			"hold": func(t *rapid.T) {
				n := node(t)
				a := rapid.SampledFrom([]string{"10.0.0.1", "10.0.0.2", "10.0.0.8", "10.0.0.9", "fd00::1", "fd00::9", "192.0.2.1"}).Draw(t, "held")
				hold(n, a)
			},
			"forget": func(t *rapid.T) {
				if h := holders[node(t)]; h != nil {
					a := address(t)
					h.Forget(a)
					delete(h.told, a)
					delete(h.asked, a)
				}
			},
			"close": func(t *rapid.T) {
				n := node(t)
				if h := holders[n]; h != nil && rapid.IntRange(0, 3).Draw(t, "really") == 0 {
					h.Close()
					if _, ok := h.Next(); ok {
						t.Fatal("a reader that was closed has news")
					}
					delete(holders, n)
				}
			},
			"": func(t *rapid.T) {
				for _, h := range holders {
					if len(h.marked) > 0 && len(h.news) == 0 {
						t.Fatalf("%v has something to read, and nobody tells it", h.node)
					}
					if rapid.IntRange(0, 3).Draw(t, "slow") == 0 {
						continue
					}
					select {
					case <-h.News():
					default:
					}
					h.read(t)
					for a, told := range h.told {
						if diff := cmp.Diff(m.behind(a, h.node), told, compare); diff != "" {
							t.Fatalf("%v at %v (-want +got):\n%s", h.node, a, diff)
						}
					}
					if h.Held() != len(h.told) {
						t.Fatalf("%v holds %d addresses, want %d", h.node, h.Held(), len(h.told))
					}
				}
				checkLeftovers(t, i, m, holders)
			},
		})
	})
}

// checkLeftovers checks that the index has what somebody needs, and no more.
func checkLeftovers(t *rapid.T, i *Index, m *model, holders map[string]*holder) {
	addresses, services, nodes := make(map[netip.Addr]bool), make(map[Name]bool), make(map[string]bool)
	for _, p := range m.pods {
		if m.live(p.Pod) && !p.Pod.HostNetwork {
			for _, a := range p.Pod.Addresses {
				addresses[a] = true
			}
		}
		if p.Pod.Node.Name != "" {
			nodes[p.Pod.Node.Name] = true
		}
	}
	for name, s := range m.services {
		services[name] = true
		for _, a := range s.Addresses {
			addresses[a] = true
		}
	}
	for _, s := range m.slices {
		services[s.Service] = true
		for _, e := range s.Endpoints {
			addresses[e.Address] = true
		}
	}
	for n, zone := range m.zones {
		if zone != "" {
			nodes[n] = true
		}
	}
	for n := range m.lastSeen {
		if m.covers(n) {
			nodes[n] = true
		}
	}
	held := make(map[netip.Addr]bool)
	for n, h := range holders {
		nodes[n] = true
		for a := range h.held {
			addresses[a], held[a] = true, true
		}
	}
	if len(i.addresses) != len(addresses) || len(i.services) != len(services) || len(i.nodes) != len(nodes) || len(i.pods) != len(m.pods) {
		t.Fatalf("there are %d addresses, %d services, %d nodes and %d pods, want %d, %d, %d and %d",
			len(i.addresses), len(i.services), len(i.nodes), len(i.pods), len(addresses), len(services), len(nodes), len(m.pods))
	}
	for _, s := range i.services {
		if len(s.views) > 0 && (s.object == nil || !slices.ContainsFunc(s.object.Addresses, func(a netip.Addr) bool { return held[a] })) {
			t.Fatalf("%v has %d views that nobody holds", s.name, len(s.views))
		}
	}
}

// Whoever holds and forgets without end, and never reads, costs no memory.
func TestForgettingCostsNothing(t *testing.T) {
	i := New(Config{Agents: agents})
	r := i.Reader("node1")
	defer r.Close()
	for n := range 10_000 {
		a := netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)})
		r.Hold(a, fmt.Sprint(a))
		r.Forget(a)
	}
	if len(r.marked) > 2 || len(i.addresses) != 0 {
		t.Errorf("%d marks and %d addresses are left, want none", len(r.marked), len(i.addresses))
	}
}

// A node that moves to another zone is told what is meant for it there.
func TestAZoneChanges(t *testing.T) {
	i := New(Config{Agents: agents})
	name, ip := Name{"shop", "service"}, netip.MustParseAddr("10.96.0.1")
	i.SetService(ServiceObject{Name: name, Addresses: []netip.Addr{ip}, Ports: []NamedPort{{"", 80}}})
	near, far := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	i.SetSlice(Slice{Name: name, Service: name, Ports: []NamedPort{{"", 80}}, Endpoints: []SliceEndpoint{
		{Address: near, Ready: true, Hints: &Hints{Zones: []string{"zone1"}}},
		{Address: far, Ready: true, Hints: &Hints{Zones: []string{"zone2"}}},
	}})
	r := i.Reader("node1")
	defer r.Close()
	r.Hold(ip, ip.String())
	for _, test := range []struct {
		zone string
		want []netip.Addr
	}{{"zone1", []netip.Addr{near}}, {"zone2", []netip.Addr{far}}, {"", []netip.Addr{near, far}}} {
		i.SetZone("node1", test.zone)
		answer, ok := r.Next()
		if !ok {
			t.Fatalf("in zone %q nothing is told", test.zone)
		}
		var got []netip.Addr
		for _, e := range answer.Behind.Service.Ports[0].Endpoints {
			got = append(got, e.Address.Addr())
		}
		if !slices.Equal(got, test.want) {
			t.Errorf("in zone %q: %v, want %v", test.zone, got, test.want)
		}
	}
}
