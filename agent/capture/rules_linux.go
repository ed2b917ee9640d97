package capture

import (
	"errors"
	"fmt"
)

// The marks are ours alone: marksMask cuts what they have in common out of a mark.
const (
	marks      = 0x74070000
	marksMask  = 0xfffffff0
	socketMark = marks | 1 // on every packet of the agent's own connections
	replyMark  = marks | 2 // on what an application answers to one of them
	// connectionMark is on the agent's own connections in the kernel's table.
	connectionMark = marks | 3
	// zone is where that table has what the agent's own connections send. In the
	// zone of everybody else there may be the very same two ends: of the caller
	// whose address the agent wears, who may have taken the same port.
	zone = 29703
)

// natPriority is before whoever else does NAT in the pod (-100): what is captured
// must not depend on what the pod's own rules say.
const natPriority = -110

// rules is one way to tell the kernel what to capture. Its methods run inside the
// namespace.
//
// Both ways say the same, in chains of the same purpose:
//
//   - wire: what comes from outside has no mark of ours;
//   - zone: the agent's own connections have a zone of their own;
//   - mark: those are marked in the table of connections, and the answers to them
//     by that;
//   - outbound: what opens a connection to elsewhere, and is not ours, goes to
//     [OutboundPort];
//   - inbound: what opens a connection from elsewhere, and not to a port of ours,
//     goes to [PlaintextPort];
//   - guard_out and guard_in: what opens a connection and was not sent there is
//     reset.
//
// What opens a connection is SYN without ACK and RST. To look at that alone, and not
// at the first packet that the table of connections sees, leaves connections alone
// which are older than the table. It would also let somebody through who first
// sends an ACK, for which the table notes a connection without NAT, and then a SYN,
// which it takes for a part of that. That is what the guards are for.
type rules interface {
	// set replaces what was set before.
	set() error
	// remove removes all that was set, and nothing else.
	remove() error
	// dump returns what is set, in a form that is equal if the rules are. It fails
	// if something is missing as a whole.
	dump() (string, error)
}

// removeAll removes what either way has set, and the routes.
func removeAll(r *routes) error {
	nftErr := nft{}.remove()
	used, err := r.iptables()
	if used {
		nftErr = nil // where iptables was used, nftables could not be
		err = removeIptables(r)
	}
	if nftErr != nil {
		nftErr = fmt.Errorf("remove the rules of nftables: %w", nftErr)
	}
	return errors.Join(nftErr, err, r.remove())
}

// setRules sets the rules by nftables or, if that fails, by iptables, and removes
// what the other may have set before.
func setRules(r *routes, only string) (rules, error) {
	var nftErr, iptablesErr error
	used, err := r.iptables()
	if err != nil {
		return nil, err
	}
	if only != "iptables" {
		if nftErr = (nft{}).set(); nftErr == nil {
			if used {
				if err := removeIptables(r); err != nil {
					return nil, err
				}
			}
			return nft{}, nil
		}
		nftErr = fmt.Errorf("set rules by nftables: %w", nftErr)
	}
	if only != "nft" {
		var i iptables
		if i, iptablesErr = setIptables(r); iptablesErr == nil {
			// A kernel that refuses to set rules has none to remove.
			_ = nft{}.remove()
			return i, nil
		}
		iptablesErr = fmt.Errorf("set rules by iptables: %w", iptablesErr)
	}
	return nil, errors.Join(nftErr, iptablesErr)
}

// setIptables notes that there are rules of iptables, and sets them.
func setIptables(r *routes) (iptables, error) {
	i := iptables{v6: len(r.families) > 1}
	if _, err := iptablesSave("iptables"); err != nil {
		return i, err // it cannot be run: nothing is to be noted
	}
	if err := r.setIptables(true); err != nil {
		return i, err
	}
	return i, i.set()
}

// removeIptables removes the rules of iptables, and then the note that there are any.
func removeIptables(r *routes) error {
	if err := (iptables{v6: len(r.families) > 1}).remove(); err != nil {
		return fmt.Errorf("remove the rules of iptables: %w", err)
	}
	return r.setIptables(false)
}
