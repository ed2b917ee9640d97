package proxy

import "net/netip"

// Choose is how an Outbound chooses an endpoint.
func (b *Balancer) Choose(pod string, d *Destination, port uint16, tried ...Endpoint) (e Endpoint, release func(), ok bool) {
	return b.choose(pod, d, port, tried)
}

// Busy returns the endpoints that have connections.
func (b *Balancer) Busy() map[netip.AddrPort]int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.open
}
