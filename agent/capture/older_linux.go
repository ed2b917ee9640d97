package capture

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables/binaryutil"
	diag "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ResetOlder resets the connections into the pod that did not come through the agent,
// which are those that were open when the pod was captured, and returns how many
// those were. A pod that was captured before its containers started has none.
//
// The caller decides when: under a policy that lets plaintext pass there is no need,
// and when it changes to STRICT, they have to go. Connections that the pod opened to
// others are left to those. It needs a kernel that can end a socket
// (CONFIG_INET_DIAG_DESTROY), and fails if this one cannot.
func (n *Network) ResetOlder() (int, error) {
	var reset int
	err := inside(n.ns, func() error {
		older, err := olderSockets()
		if err != nil {
			return err
		}
		if len(older) == 0 {
			return nil
		}
		conn, err := diag.Dial(unix.NETLINK_INET_DIAG, nil)
		if err != nil {
			return err
		}
		defer conn.Close()
		for _, s := range older {
			_, err := conn.Execute(diag.Message{
				Header: diag.Header{Type: unix.SOCK_DESTROY, Flags: diag.Request | diag.Acknowledge},
				Data:   diagRequest(s),
			})
			if errors.Is(err, unix.ENOENT) {
				continue // it has ended
			}
			if err != nil {
				return fmt.Errorf("reset the connection from %s to %s: %w", remoteOf(s), localOf(s), err)
			}
			reset++
		}
		return nil
	})
	if err != nil {
		err = fmt.Errorf("capture: %w", err)
	}
	return reset, err
}

// The states of TCP sockets that matter here (net/tcp_states.h).
const (
	tcpTimeWait = 6
	tcpClose    = 7
	tcpListen   = 10
)

// olderSockets returns the application's ends of connections from outside. It runs
// inside the namespace.
//
// It looks twice: of a connection that the agent makes while the sockets are listed, the
// application's end may be seen without the agent's, but not at the next look.
func olderSockets() ([]*netlink.Socket, error) {
	first, err := lonelySockets()
	if err != nil || len(first) == 0 {
		return nil, err
	}
	second, err := lonelySockets()
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(second, func(s *netlink.Socket) bool {
		return !slices.ContainsFunc(first, func(f *netlink.Socket) bool { return f.ID.Cookie == s.ID.Cookie })
	}), nil
}

// lonelySockets returns what seem to be such ends at one look.
//
// They have the port of a socket that listens, which is none of ours, and their
// other end is not in this namespace, as it is when the pod calls itself and when
// the agent does, whatever address it wears.
func lonelySockets() ([]*netlink.Socket, error) {
	handle, err := netlink.NewHandle(unix.NETLINK_INET_DIAG)
	if err != nil {
		return nil, err
	}
	defer handle.Close()
	families := []uint8{unix.AF_INET}
	if hasIPv6() {
		families = append(families, unix.AF_INET6)
	}
	var all []*netlink.Socket
	for _, family := range families {
		sockets, err := whole(func() ([]*netlink.Socket, error) { return handle.SocketDiagTCP(family) })
		if err != nil {
			return nil, fmt.Errorf("list sockets: %w", err)
		}
		all = append(all, sockets...)
	}
	type ends struct{ local, remote netip.AddrPort }
	listening := make(map[uint16]bool)
	here := make(map[ends]bool)
	for _, s := range all {
		if s.State == tcpListen {
			listening[s.ID.SourcePort] = true
		} else {
			here[ends{localOf(s), remoteOf(s)}] = true
		}
	}
	for _, port := range ports() {
		delete(listening, port)
	}
	var older []*netlink.Socket
	for _, s := range all {
		switch s.State {
		case tcpListen, tcpClose, tcpTimeWait:
			continue
		}
		if listening[s.ID.SourcePort] && !here[ends{remoteOf(s), localOf(s)}] {
			older = append(older, s)
		}
	}
	return older, nil
}

func localOf(s *netlink.Socket) netip.AddrPort {
	address, _ := netip.AddrFromSlice(s.ID.Source)
	return netip.AddrPortFrom(address.Unmap(), s.ID.SourcePort)
}

func remoteOf(s *netlink.Socket) netip.AddrPort {
	address, _ := netip.AddrFromSlice(s.ID.Destination)
	return netip.AddrPortFrom(address.Unmap(), s.ID.DestinationPort)
}

// diagRequest names a socket to the kernel, by its ends and by the cookie that no
// other has (struct inet_diag_req_v2).
func diagRequest(s *netlink.Socket) []byte {
	var source, destination [16]byte
	if s.Family == unix.AF_INET {
		copy(source[:], s.ID.Source.To4())
		copy(destination[:], s.ID.Destination.To4())
	} else {
		copy(source[:], s.ID.Source.To16())
		copy(destination[:], s.ID.Destination.To16())
	}
	b := []byte{s.Family, unix.IPPROTO_TCP, 0, 0}
	b = append(b, binaryutil.NativeEndian.PutUint32(0xffffffff)...) // in whatever state
	b = binary.BigEndian.AppendUint16(b, s.ID.SourcePort)
	b = binary.BigEndian.AppendUint16(b, s.ID.DestinationPort)
	b = append(b, source[:]...)
	b = append(b, destination[:]...)
	b = append(b, binaryutil.NativeEndian.PutUint32(s.ID.Interface)...)
	b = append(b, binaryutil.NativeEndian.PutUint32(s.ID.Cookie[0])...)
	return append(b, binaryutil.NativeEndian.PutUint32(s.ID.Cookie[1])...)
}
