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
	proved := slices.ContainsFunc(tried, func(e Endpoint) bool { return e.Protocol != Plaintext })
	c := candidates{d.Endpoints, func(e *Endpoint) bool {
		return e.callable() && !(proved && e.Protocol == Plaintext) &&
			!slices.ContainsFunc(tried, func(other Endpoint) bool { return other.Address == e.Address })
	}}
	b.mu.Lock()
	defer b.mu.Unlock()
	var chosen *Endpoint
	if d.Affinity > 0 && d.Service != "" {
		chosen = b.stay(clientKey{pod, d.Service, port}, c, d.Affinity)
	} else {
		chosen = b.ofTwo(c)
	}
	if chosen == nil {
		return Endpoint{}, nil, false
	}
	e = *chosen
	b.open[e.Address]++
	return e, sync.OnceFunc(func() { b.release(e.Address) }), true
}

// candidates are endpoints, of which those may be chosen that are good.
type candidates struct {
	all  []Endpoint
	good func(*Endpoint) bool
}

// stay returns the endpoint that the client has, which it keeps for longer now, or
// else gets, and nil if there is none. The caller holds mu.
func (b *Balancer) stay(client clientKey, c candidates, affinity time.Duration) *Endpoint {
	now := time.Now()
	var chosen *Endpoint
	if had, ok := b.stuck.Get(client); ok && now.Before(had.until) {
		for n := range c.all {
			if e := &c.all[n]; e.Address == had.endpoint && c.good(e) {
				chosen = e
			}
		}
	}
	if chosen == nil {
		chosen = b.ofTwo(c)
	}
	if chosen != nil {
		b.stuck.Add(client, stay{chosen.Address, now.Add(affinity)})
	}
	return chosen
}

// ofTwo returns the less busy of two endpoints, and nil if there is none. The caller
// holds mu.
func (b *Balancer) ofTwo(c candidates) *Endpoint {
	// Most likely all are good, and none but two have to be looked at.
	if one, two := pair(c.all); one != nil && c.good(one) && c.good(two) {
		return b.lessBusy(one, two)
	}
	var good []Endpoint
	for n := range c.all {
		if c.good(&c.all[n]) {
			good = append(good, c.all[n])
		}
	}
	return b.lessBusy(pair(good))
}

// pair returns two different endpoints at random, the same one twice if there is but
// one, and nil if there is none.
func pair(of []Endpoint) (one, two *Endpoint) {
	switch len(of) {
	case 0:
		return nil, nil
	case 1:
		return &of[0], &of[0]
	}
	n := rand.IntN(len(of))
	return &of[n], &of[(n+1+rand.IntN(len(of)-1))%len(of)]
}

func (b *Balancer) lessBusy(one, two *Endpoint) *Endpoint {
	if one != nil && b.open[two.Address] < b.open[one.Address] {
		return two
	}
	return one
}

func (b *Balancer) release(endpoint netip.AddrPort) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.open[endpoint]--; b.open[endpoint] == 0 {
		delete(b.open, endpoint)
	}
}

// callable reports whether this agent knows how to call e.
func (e *Endpoint) callable() bool {
	switch e.Protocol {
	case Plaintext:
		return true
	case HBONE, Troth:
		return !e.ID.IsZero()
	default:
		return false
	}
}
