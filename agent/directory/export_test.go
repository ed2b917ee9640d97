package directory

import (
	"net/netip"

	"troth.dev/troth/agent/proxy"
	trothv1 "troth.dev/troth/api/troth/v1"
)

// MaxAsked is how many addresses are waited for at a time.
const MaxAsked = maxAsked

// At is what an answer of the control plane says of an address and a port.
func At(in *trothv1.ResolveResponse, destination netip.AddrPort) (*proxy.Destination, error) {
	address, err := parseAddress(in.GetAddress())
	if err != nil {
		return nil, err
	}
	a, err := parseAnswer(address, in)
	if err != nil {
		return nil, err
	}
	return a.at(destination), nil
}
