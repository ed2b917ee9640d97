package agent

import (
	"context"
	"net"
	"net/netip"

	"troth.dev/troth/agent/proxy"
)

// Captured is what arrives for a pod in plaintext.
type Captured struct {
	// Listener accepts it. ServePlaintext closes it.
	Listener net.Listener
	// Destination says which address and container port the caller of a
	// connection meant.
	Destination func(net.Conn) (netip.AddrPort, error)
	// Dial connects to the pod's application.
	Dial func(ctx context.Context, destination netip.AddrPort) (net.Conn, error)
}

// ServePlaintext passes on what the pod's mTLS policy lets through, and cuts what a
// new policy no longer lets through, until ctx ends. Then it cuts all, and returns.
// Of the pod's policy the agent learns from the control plane; before it has, and
// after the pod is gone, nothing passes.
func (a *Agent) ServePlaintext(ctx context.Context, podUID string, c Captured) error {
	policy, release := a.identities.policyOf(podUID)
	defer release()
	inbound, err := proxy.NewInbound(proxy.InboundConfig{
		Policy:      policy,
		Kubelet:     a.config.Kubelet,
		Destination: c.Destination,
		Dial:        c.Dial,
		Peers:       a.peers,
		Pod:         podUID,
		Log:         a.config.Log,
		Metrics:     a.proxied,
	})
	if err != nil {
		return err
	}
	return inbound.ServePlaintext(ctx, c.Listener)
}
