package proxy

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// Balancer chooses the endpoints of the connections that the pods of a node open. Of
// two endpoints at random it takes the one with fewer connections of this node, unless
// the Service wants a client to stay with its endpoint. It is safe for concurrent use.
type Balancer struct {
	mu    sync.Mutex
	open  map[netip.AddrPort]int          // guarded by mu; connections, where there are any
	stuck *simplelru.LRU[clientKey, stay] // guarded by mu
}

// clientKey is a client of a Service's port.
type clientKey struct {
	pod     string // the client's UID
	service string
	port    uint16
}

// stay is the endpoint that a client stays with.
type stay struct {
	endpoint netip.AddrPort
	until    time.Time
}

// NewBalancer returns a Balancer that remembers the endpoints of the size clients that
// opened the newest connections to Services which want it. A size below 1 counts as 1.
func NewBalancer(size int) *Balancer {
	stuck, err := simplelru.NewLRU[clientKey, stay](max(size, 1), nil)
	if err != nil {
		panic("proxy: " + err.Error()) // only for a size below 1
	}
	return &Balancer{open: make(map[netip.AddrPort]int), stuck: stuck}
}

// choose chooses an endpoint for a connection of a pod to a destination and the port
// that the pod called, and reports whether there is one. It takes none of those that
// were tried, none that nobody here knows how to call, and none in plaintext once
// another was tried that is not: whoever can make mutual TLS fail must not choose what
// is done without it. release is to be called when the connection has ended.
func (b *Balancer) choose(pod string, d *Destination, port uint16, tried []Endpoint) (e Endpoint, release func(), ok bool) {
	callable := d.Endpoints
	proved := slices.ContainsFunc(tried, func(e Endpoint) bool { return e.Protocol != Plaintext })
	bad := func(e Endpoint) bool {
		return !e.callable() || proved && e.Protocol == Plaintext ||
			slices.ContainsFunc(tried, func(other Endpoint) bool { return other.Address == e.Address })
	}
	if slices.ContainsFunc(callable, bad) {
		callable = slices.DeleteFunc(slices.Clone(callable), bad)
	}
	if len(callable) == 0 {
		return Endpoint{}, nil, false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if d.Affinity > 0 && d.Service != "" {
		e = b.stay(clientKey{pod, d.Service, port}, callable, d.Affinity)
	} else {
		e = b.ofTwo(callable)
	}
	b.open[e.Address]++
	return e, sync.OnceFunc(func() { b.release(e.Address) }), true
}

// stay returns the endpoint that the client has, which it keeps for longer now, or
// else gets. The caller holds mu.
func (b *Balancer) stay(client clientKey, callable []Endpoint, affinity time.Duration) Endpoint {
	now := time.Now()
	var chosen Endpoint
	n := -1
	if had, ok := b.stuck.Get(client); ok && now.Before(had.until) {
		n = slices.IndexFunc(callable, func(e Endpoint) bool { return e.Address == had.endpoint })
	}
	if n >= 0 {
		chosen = callable[n]
	} else {
		chosen = b.ofTwo(callable)
	}
	b.stuck.Add(client, stay{chosen.Address, now.Add(affinity)})
	return chosen
}

// ofTwo returns the less busy of two endpoints. The caller holds mu.
func (b *Balancer) ofTwo(callable []Endpoint) Endpoint {
	n := rand.IntN(len(callable))
	if len(callable) == 1 {
		return callable[0]
	}
	other := (n + 1 + rand.IntN(len(callable)-1)) % len(callable)
	if b.open[callable[other].Address] < b.open[callable[n].Address] {
		n = other
	}
	return callable[n]
}

func (b *Balancer) release(endpoint netip.AddrPort) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.open[endpoint]--; b.open[endpoint] == 0 {
		delete(b.open, endpoint)
	}
}

// callable reports whether this agent knows how to call e.
func (e Endpoint) callable() bool {
	switch e.Protocol {
	case Plaintext:
		return true
	case HBONE, Troth:
		return !e.ID.IsZero()
	default:
		return false
	}
}
