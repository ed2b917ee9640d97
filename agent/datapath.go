package agent

import (
	"context"
	"net"
	"net/netip"
	"slices"

	"golang.org/x/sync/errgroup"

	"troth.dev/troth/agent/proxy"
	"troth.dev/troth/handshake"
)

// The ports that the data path has in each captured pod.
const (
	OutboundPort    = 15001 // what the pod sends
	PlaintextPort   = 15006 // what reaches it outside of a tunnel
	HBONEPort       = 15008 // tunnels in the standard order
	CallerFirstPort = 15009 // tunnels in the caller-first order
)

// Captured is a pod's traffic. Each listener is optional, and is closed by ServePod.
type Captured struct {
	// Outbound accepts what the pod sends.
	Outbound net.Listener
	// Plaintext accepts what reaches the pod outside of a tunnel.
	Plaintext net.Listener
	// HBONE and CallerFirst accept tunnels, in the order of their names.
	HBONE, CallerFirst net.Listener
	// Destination says which address and port the caller of a captured connection
	// meant.
	Destination func(net.Conn) (netip.AddrPort, error)
	// Dial connects from the pod to anywhere, uncaptured. Only Outbound needs it.
	Dial func(ctx context.Context, destination netip.AddrPort) (net.Conn, error)
	// DialFrom connects to the pod's application, which sees source as its caller.
	DialFrom func(ctx context.Context, source netip.Addr, destination netip.AddrPort) (net.Conn, error)
}

// ServePod carries the pod's traffic, as its identity and its policy let it, and cuts
// what they no longer let through, until ctx ends. Then connections may go on for as
// long as Config.Drain, and it returns. Of both the agent learns from the control
// plane; before it has, and after the pod is gone, nothing passes.
func (a *Agent) ServePod(ctx context.Context, podUID string, c Captured) error {
	f, release := a.identities.follow(podUID)
	defer release()
	inbound, err := proxy.NewInbound(proxy.InboundConfig{
		Identity:    &f.identity,
		Policy:      &f.policy,
		Kubelet:     a.config.Kubelet,
		Destination: c.Destination,
		Dial:        c.DialFrom,
		Own:         []uint16{OutboundPort, PlaintextPort, HBONEPort, CallerFirstPort},
		Drain:       a.config.Drain,
		Peers:       a.peers,
		Pod:         podUID,
		Log:         a.config.Log,
		Metrics:     a.proxied,
	})
	if err != nil {
		return err
	}
	defer a.serving(inbound)()
	group, ctx := errgroup.WithContext(ctx)
	if c.Plaintext != nil {
		group.Go(func() error { return inbound.ServePlaintext(ctx, c.Plaintext) })
	}
	if c.HBONE != nil {
		group.Go(func() error { return inbound.ServeTunnels(ctx, c.HBONE, handshake.Standard) })
	}
	if c.CallerFirst != nil {
		group.Go(func() error { return inbound.ServeTunnels(ctx, c.CallerFirst, handshake.CallerFirst) })
	}
	return group.Wait()
}

// serving has the agent know of what is served, until done is called.
func (a *Agent) serving(i *proxy.Inbound) (done func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.inbound = append(a.inbound, i)
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.inbound = slices.DeleteFunc(a.inbound, func(other *proxy.Inbound) bool { return other == i })
	}
}
