package proxy

import (
	"context"
	"net/netip"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Directory says who is behind the addresses that pods call.
type Directory interface {
	// Resolve returns what is behind the destination for a pod of this node. It
	// blocks until that is known or ctx ends, and fails if it cannot be known: then
	// nothing may be sent. What it returns is shared and never changed; whoever wants
	// the newest asks again.
	Resolve(ctx context.Context, destination netip.AddrPort) (*Destination, error)
}

// Destination is what an address and a port stand for.
type Destination struct {
	// Service is NAMESPACE/NAME of the Service whose address it is, and empty if it is
	// none's.
	Service string
	// Endpoints are where it may be reached. A Service without any cannot be. What is
	// no Service has one: itself.
	Endpoints []Endpoint
	// Affinity is for how long a client stays with its endpoint; zero for not at all.
	Affinity time.Duration
}

// Endpoint is where a connection may go.
type Endpoint struct {
	Address  netip.AddrPort
	Protocol Protocol
	// ID is whom the caller has to find there; zero if Protocol is Plaintext.
	ID spiffeid.ID
	// Pod is NAMESPACE/NAME, for logs; empty if there is no pod that is known.
	Pod string
}

// Protocol is how an endpoint is called. The zero Protocol is refused.
type Protocol int

const (
	// Plaintext is as the caller sends it.
	Plaintext Protocol = iota + 1
	// HBONE is a tunnel in the standard order, at port 15008 of the pod.
	HBONE
	// Troth is a tunnel in the caller-first order, at port 15009 of the pod.
	Troth
)

// String returns the protocol as logs and metrics spell it.
func (p Protocol) String() string {
	switch p {
	case Plaintext:
		return "plaintext"
	case HBONE:
		return "hbone"
	case Troth:
		return "troth"
	default:
		return "unknown"
	}
}
