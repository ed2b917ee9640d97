package directory

import (
	"cmp"
	"net/netip"
	"slices"
	"sync"
	"time"

	"troth.dev/troth/identity"
	"troth.dev/troth/policy"
)

// Config is what [New] needs.
type Config struct {
	// Agents is the service account that node agents run as. On a node without one
	// of them that says so by its label nobody captures anything.
	Agents identity.ServiceAccount
	// Uncaptured is the namespaces whose pods are not captured; optional.
	Uncaptured map[string]bool
	// AgentReturn is for how long a node whose last agent is gone counts as one with
	// such an agent; 0 means 5 minutes. An agent's upgrade leaves its node without one for
	// seconds, and whoever then called in plaintext would have nobody to answer, or
	// worse, somebody.
	AgentReturn time.Duration
}

// Index is pods, Services and EndpointSlices by address. [New] makes it. All methods
// may be called from many goroutines; none blocks for longer than another one works.
type Index struct {
	config Config

	mu        sync.Mutex
	pods      map[string]*pod         // by UID; guarded by mu, as is all below
	dying     map[*pod]bool           // those that live, and whose deletion was asked for
	nodes     map[string]*node        // by name
	lingering map[*node]bool          // those whose last agent is gone
	addresses map[netip.Addr]*address // that somebody has, or holds
	services  map[Name]*service
	slices    map[Name]*slice
}

// New returns an Index that knows of nothing.
func New(c Config) *Index {
	if c.AgentReturn == 0 {
		c.AgentReturn = 5 * time.Minute
	}
	return &Index{
		config:    c,
		pods:      make(map[string]*pod),
		dying:     make(map[*pod]bool),
		nodes:     make(map[string]*node),
		lingering: make(map[*node]bool),
		addresses: make(map[netip.Addr]*address),
		services:  make(map[Name]*service),
		slices:    make(map[Name]*slice),
	}
}

// pod is what the index keeps of a pod. It is replaced, never changed, but for live.
type pod struct {
	ref       identity.PodReference
	account   string
	node      *node // nil before it is scheduled
	addresses []netip.Addr
	deletedAt time.Time
	policy    *policy.Effective
	capture   identity.Capture
	hbone     bool
	agent     bool // whether it is a node's agent
	captures  bool // whether it is one that captures
	live      bool
}

// node is a node that has pods, a zone or readers, or had an agent a moment ago.
type node struct {
	name    string
	zone    string
	pods    map[*pod]bool
	agents  int       // among the pods, that live
	capture int       // those of them that capture
	until   time.Time // when its pods no longer count as captured, while it lingers
	covered bool      // whether they do: it has an agent that captures, or had one a moment ago and none since
	readers map[*Reader]bool
}

// address is who has an address, and who holds it.
type address struct {
	address  netip.Addr
	pods     []*pod     // that live, have it and share it with no node
	services []*service // whose cluster IP it is, by name
	slices   []*slice   // once for each endpoint that has it
	held     []*held
	behind   *Behind // the pod that answers, if it is not outdated
	outdated bool
}

// service is a Service, or what EndpointSlices say of one that is not there.
type service struct {
	name    Name
	object  *ServiceObject // nil if it is not there
	slices  map[*slice]bool
	views   map[viewer]*view // what was chosen for those who hold its addresses
	version uint64           // of what views are made of
}

type slice struct {
	Slice
	service *service
}

// viewer is what the choice among a Service's endpoints depends on.
type viewer struct {
	ipv6       bool
	node, zone string // empty if it does not depend on it
}

type view struct {
	behind  *Behind
	version uint64
}

// SetPod adds a pod, or says anew what it is, and which policy is in force for it.
// The index keeps the pod's addresses and the policy, which nobody changes from then
// on.
func (i *Index) SetPod(now time.Time, p identity.Pod, effective *policy.Effective) {
	i.mu.Lock()
	defer i.mu.Unlock()
	next := &pod{
		ref:       p.PodReference,
		account:   p.ServiceAccount,
		addresses: p.Addresses,
		deletedAt: p.DeletedAt,
		policy:    effective,
		capture:   p.Capture(i.config.Uncaptured),
		hbone:     p.HBONE && !p.HostNetwork,
		agent:     p.Account() == i.config.Agents && p.Node.Name != "",
		captures:  p.Captures(),
		live:      p.Live(now) == nil,
	}
	known := i.pods[p.UID]
	if known != nil && known.same(next) && known.nodeName() == p.Node.Name {
		return
	}
	if p.Node.Name != "" {
		next.node = i.nodeOf(p.Node.Name)
		next.node.pods[next] = true
	}
	// The new one comes before the old one goes: a node with an agent keeps it.
	i.pods[p.UID] = next
	if next.live {
		i.enter(next)
	}
	if known != nil {
		i.remove(now, known)
	}
	i.touchPod(next)
}

// RemovePod forgets a pod, if it is there.
func (i *Index) RemovePod(now time.Time, uid string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if p := i.pods[uid]; p != nil {
		delete(i.pods, uid)
		i.remove(now, p)
	}
}

// Expire takes note of what no event says: pods whose grace has ended, and nodes to
// which no agent has returned.
func (i *Index) Expire(now time.Time) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for p := range i.dying {
		if !now.Before(p.deletedAt) {
			i.leave(now, p)
		}
	}
	for n := range i.lingering {
		if !now.Before(n.until) {
			delete(i.lingering, n)
			n.covered = false
			i.touchNode(n)
			i.dropNode(n)
		}
	}
}

// enter puts a pod that lives where others find it.
func (i *Index) enter(p *pod) {
	if !p.deletedAt.IsZero() {
		i.dying[p] = true
	}
	if p.agent {
		p.node.agents++
		if p.captures {
			p.node.capture++
		}
		i.cover(p.node, time.Time{})
	}
	if p.capture == identity.UncapturedHost {
		return // its addresses are the node's
	}
	for _, a := range p.addresses {
		at := i.addressOf(a)
		at.pods = append(at.pods, p)
	}
}

// leave takes a pod away from there, and leaves it among the pods.
func (i *Index) leave(now time.Time, p *pod) {
	p.live = false
	delete(i.dying, p)
	if p.agent {
		p.node.agents--
		if p.captures {
			p.node.capture--
		}
		i.cover(p.node, now)
	}
	i.touchPod(p)
	if p.capture == identity.UncapturedHost {
		return
	}
	for _, a := range p.addresses {
		if at := i.addresses[a]; at != nil {
			at.pods = without(at.pods, p)
			i.dropAddress(at)
		}
	}
}

// cover settles whether the pods of a node count as captured after an agent came, or
// went at the time now.
func (i *Index) cover(n *node, now time.Time) {
	covered := n.covered
	switch {
	case n.capture > 0:
		covered = true
		delete(i.lingering, n)
	case n.agents > 0: // it does not capture, and there is no other to be waited for
		covered = false
		delete(i.lingering, n)
	case covered && !i.lingering[n]:
		n.until = now.Add(i.config.AgentReturn)
		i.lingering[n] = true
	}
	if covered != n.covered {
		n.covered = covered
		i.touchNode(n)
	}
}

// remove takes a pod out of the index, but for pods.
func (i *Index) remove(now time.Time, p *pod) {
	if p.live {
		i.leave(now, p)
	} else {
		i.touchPod(p)
	}
	if p.node != nil {
		delete(p.node.pods, p)
		i.dropNode(p.node)
	}
}

// touchPod tells of a change of a pod: at its own addresses, and in Services that
// have them.
func (i *Index) touchPod(p *pod) {
	for _, a := range p.addresses {
		at := i.addresses[a]
		if at == nil {
			continue
		}
		at.touch()
		for _, s := range at.slices {
			s.service.touch(i)
		}
	}
}

func (i *Index) touchNode(n *node) {
	for p := range n.pods {
		i.touchPod(p)
	}
}

// touch tells those who hold the address.
func (at *address) touch() {
	at.outdated = true
	for _, h := range at.held {
		h.mark()
	}
}

// touch tells those who hold an address of the Service.
func (s *service) touch(i *Index) {
	if s.object == nil {
		return
	}
	s.version++
	for _, a := range s.object.Addresses {
		for _, h := range i.addresses[a].held {
			h.mark()
		}
	}
}

// behind returns what the address stands for, for a pod of the node.
func (i *Index) behind(at *address, n *node) *Behind {
	if len(at.services) > 0 {
		return at.services[0].seen(i, at.address.Is6(), n)
	}
	if at.outdated {
		at.outdated = false
		var found *Behind
		if p := at.owner(); p != nil {
			e := p.endpoint(at.address)
			found = &Behind{Pod: &e}
		}
		if !at.behind.equal(found) {
			at.behind = found
		}
	}
	return at.behind
}

// owner returns the pod that answers at the address, or nil. More than one claims it
// when it was given to another pod before the end of the last was heard of, or when
// somebody lies: a kubelet writes what it wants into its own pods' status.
func (at *address) owner() *pod {
	var best *pod
	for _, p := range at.pods {
		if best == nil || p.before(best) {
			best = p
		}
	}
	return best
}

func (p *pod) before(other *pod) bool {
	if kept, otherKept := p.deletedAt.IsZero(), other.deletedAt.IsZero(); kept != otherKept {
		return kept
	}
	if a, b := p.protocol(), other.protocol(); a != b {
		return a > b
	}
	return p.ref.UID < other.ref.UID
}

// protocol is how the pod is called where its policy allows mutual TLS.
func (p *pod) protocol() Protocol {
	switch {
	case p.capture == identity.Captured && p.node != nil && p.node.covered:
		return Troth
	case p.hbone:
		return HBONE
	default:
		return Plaintext
	}
}

// at is how the pod is called at a port.
func (p *pod) at(port uint16) Protocol {
	return allowed(p.protocol(), p.mode(port))
}

func (p *pod) mode(port uint16) policy.Mode {
	mode, _ := p.policy.At(port)
	return mode
}

// allowed is what is left of a protocol under a mode. To whoever is DISABLE nobody
// offers mutual TLS.
func allowed(protocol Protocol, mode policy.Mode) Protocol {
	if mode == policy.Disable {
		return Plaintext
	}
	return protocol
}

// endpoint is the pod at one of its addresses, at every port.
func (p *pod) endpoint(a netip.Addr) Endpoint {
	e := p.named(netip.AddrPortFrom(a, 0))
	protocol := p.protocol()
	e.Protocol = protocol
	if p.policy == nil {
		return e // no policy opens nothing
	}
	e.Protocol = allowed(protocol, p.policy.Mode)
	for _, port := range p.policy.Ports {
		if other := allowed(protocol, port.Mode); other != e.Protocol {
			e.Ports = append(e.Ports, PortProtocol{port.Port, other})
		}
	}
	return e
}

func (p *pod) named(at netip.AddrPort) Endpoint {
	return Endpoint{
		Address: at, Pod: p.ref,
		Account: identity.ServiceAccount{Namespace: p.ref.Namespace, Name: p.account},
	}
}

// same says whether two states of a pod are the same, wherever they are.
func (p *pod) same(other *pod) bool {
	return p.ref == other.ref && p.account == other.account && slices.Equal(p.addresses, other.addresses) &&
		p.deletedAt.Equal(other.deletedAt) && p.policy.Equal(other.policy) && p.capture == other.capture &&
		p.hbone == other.hbone && p.agent == other.agent && p.captures == other.captures && p.live == other.live
}

func (p *pod) nodeName() string {
	if p.node == nil {
		return ""
	}
	return p.node.name
}

func (i *Index) nodeOf(name string) *node {
	n := i.nodes[name]
	if n == nil {
		n = &node{name: name, pods: make(map[*pod]bool), readers: make(map[*Reader]bool)}
		i.nodes[name] = n
	}
	return n
}

func (i *Index) dropNode(n *node) {
	if n.zone == "" && len(n.pods) == 0 && len(n.readers) == 0 && !n.covered {
		delete(i.nodes, n.name)
	}
}

func (i *Index) addressOf(a netip.Addr) *address {
	at := i.addresses[a]
	if at == nil {
		at = &address{address: a}
		i.addresses[a] = at
	}
	return at
}

func (i *Index) dropAddress(at *address) {
	if len(at.pods) == 0 && len(at.services) == 0 && len(at.slices) == 0 && len(at.held) == 0 {
		delete(i.addresses, at.address)
	}
}

func (i *Index) serviceOf(name Name) *service {
	s := i.services[name]
	if s == nil {
		s = &service{name: name, slices: make(map[*slice]bool)}
		i.services[name] = s
	}
	return s
}

func (i *Index) dropService(s *service) {
	if s.object == nil && len(s.slices) == 0 {
		delete(i.services, s.name)
	}
}

func compareNames(a, b Name) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}

// without returns the list without the first element that is gone. It changes the
// list.
func without[T comparable](list []T, gone T) []T {
	if n := slices.Index(list, gone); n >= 0 {
		return slices.Delete(list, n, n+1)
	}
	return list
}
