package e2e_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// tap sees every frame that passes a link, and puts the TCP connections together
// again. It is what somebody on the network sees.
type tap struct {
	link string
	file *os.File // the packet socket
	done chan struct{}

	mu      sync.Mutex
	frames  int                    // guarded by mu
	kept    int                    // guarded by mu; bytes of all streams
	streams map[direction]*stretch // guarded by mu
	seen    map[string]bool        // guarded by mu; the payloads of small datagrams
	err     error                  // guarded by mu; why it does not see everything
}

// direction is one direction of a TCP connection.
type direction struct{ from, to netip.AddrPort }

func (d direction) back() direction { return direction{d.to, d.from} }

// stretch is what went in one direction.
type stretch struct {
	opened  bool   // it began with a SYN alone: from is the caller
	began   bool   // the SYN was seen
	first   uint32 // the sequence number of the first byte
	data    []byte // all bytes from the first one to the first that is missing
	arrived []arrival
	later   map[uint32][]byte // what came before what is missing, by sequence number
	reset   bool
}

// arrival says that all before end had been seen when frame came.
type arrival struct{ end, frame int }

// tapLimit bounds what a tap keeps. A test that moves more does not tap it.
const tapLimit = 256 << 20

// newTap taps a link of the namespace, until the test ends.
func newTap(t *testing.T, in netns, link string) *tap {
	t.Helper()
	tp := &tap{link: link, done: make(chan struct{}), streams: make(map[direction]*stretch), seen: make(map[string]bool)}
	err := in.within(func() error {
		iface, err := net.InterfaceByName(link)
		if err != nil {
			return err
		}
		const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // in network order
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		tp.file = os.NewFile(uintptr(fd), "tap")
		return errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20),
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: iface.Index}),
		)
	})
	if err != nil {
		t.Fatalf("tap %s: %v", link, err)
	}
	go tp.run()
	t.Cleanup(func() {
		tp.file.Close()
		<-tp.done
	})
	return tp
}

func (tp *tap) run() {
	defer close(tp.done)
	for buffer := make([]byte, 256<<10); ; {
		n, err := tp.file.Read(buffer)
		if errors.Is(err, os.ErrClosed) {
			return
		}
		tp.mu.Lock()
		if err != nil {
			tp.err = errors.Join(tp.err, err)
		} else {
			tp.frame(buffer[:n])
		}
		tp.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// frame takes an Ethernet frame. What is neither TCP nor UDP it passes over.
func (tp *tap) frame(f []byte) {
	tp.frames++
	if len(f) < 14+20 {
		return
	}
	kind, packet := binary.BigEndian.Uint16(f[12:]), f[14:]
	var from, to netip.Addr
	var protocol byte
	switch kind {
	case unix.ETH_P_IP:
		length, header := int(binary.BigEndian.Uint16(packet[2:])), int(packet[0]&0xf)*4
		if length < header || length > len(packet) || header < 20 {
			tp.err = errors.Join(tp.err, fmt.Errorf("an IPv4 packet of %d bytes, in a frame of %d", length, len(f)))
			return
		}
		if binary.BigEndian.Uint16(packet[6:])&0x3fff != 0 {
			tp.err = errors.Join(tp.err, errors.New("an IPv4 fragment"))
			return
		}
		protocol = packet[9]
		from, to = netip.AddrFrom4([4]byte(packet[12:16])), netip.AddrFrom4([4]byte(packet[16:20]))
		packet = packet[header:length]
	case unix.ETH_P_IPV6:
		if len(packet) < 40 {
			return
		}
		length := int(binary.BigEndian.Uint16(packet[4:]))
		if length == 0 || 40+length > len(packet) {
			tp.err = errors.Join(tp.err, fmt.Errorf("an IPv6 packet of %d bytes, in a frame of %d", length, len(f)))
			return
		}
		protocol = packet[6]
		from, to = netip.AddrFrom16([16]byte(packet[8:24])), netip.AddrFrom16([16]byte(packet[24:40]))
		packet = packet[40 : 40+length]
	default:
		return
	}
	switch {
	case protocol == unix.IPPROTO_TCP && len(packet) >= 20:
		ports := func(at int) uint16 { return binary.BigEndian.Uint16(packet[at:]) }
		tp.segment(direction{netip.AddrPortFrom(from, ports(0)), netip.AddrPortFrom(to, ports(2))}, packet)
	case protocol == unix.IPPROTO_UDP && len(packet) >= 8 && len(packet) < 100:
		tp.seen[string(packet[8:])] = true
	}
}

// segment takes a TCP segment.
func (tp *tap) segment(d direction, segment []byte) {
	const fin, syn, rst, ack = 1, 2, 4, 16
	sequence, flags := binary.BigEndian.Uint32(segment[4:]), segment[13]
	offset := int(segment[12]>>4) * 4
	if offset > len(segment) {
		return
	}
	data := segment[offset:]
	s := tp.streams[d]
	if s == nil || flags&syn != 0 && s.began && s.first != sequence+1 {
		// The second connection with the same ports takes the place of the first.
		s = &stretch{later: make(map[uint32][]byte)}
		tp.streams[d] = s
	}
	if flags&syn != 0 {
		s.began, s.first, s.opened = true, sequence+1, flags&ack == 0
		sequence++
	}
	s.reset = s.reset || flags&rst != 0
	if len(data) == 0 || !s.began {
		return // of a connection that was there before the tap nothing is known
	}
	if tp.kept += len(data); tp.kept > tapLimit {
		tp.err = errors.Join(tp.err, errors.New("too much has passed"))
		return
	}
	s.later[sequence] = bytes.Clone(data)
	for s.advance() {
		s.arrived = append(s.arrived, arrival{len(s.data), tp.frames})
	}
}

// advance takes a piece that begins in, or right after, what is there.
func (s *stretch) advance() bool {
	for sequence, piece := range s.later {
		have := int32(s.first + uint32(len(s.data)) - sequence) // of the piece
		if have < 0 {
			continue
		}
		delete(s.later, sequence)
		if int(have) < len(piece) {
			s.data = append(s.data, piece[have:]...)
			return true
		}
	}
	return false
}

// await returns once the tap has seen all that has passed until now.
func (tp *tap) await(t *testing.T, from netns, to netip.Addr) {
	t.Helper()
	token := uuid.NewString()
	eventually(t, "the tap to see what has passed", func() bool {
		// A datagram may be lost before the other end is known to the link.
		err := from.within(func() error {
			c, err := new(net.Dialer).DialContext(context.Background(), "udp", netip.AddrPortFrom(to, 9).String())
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write([]byte(token))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		tp.mu.Lock()
		defer tp.mu.Unlock()
		return tp.seen[token]
	})
}

// check fails the test if the tap has not seen everything.
func (tp *tap) check(t *testing.T) {
	t.Helper()
	raw, err := tp.file.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var stats *unix.TpacketStats
	if controlErr := raw.Control(func(fd uintptr) {
		stats, err = unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS)
	}); err == nil {
		err = controlErr
	}
	tp.mu.Lock()
	defer tp.mu.Unlock()
	if err = errors.Join(err, tp.err); err != nil {
		t.Errorf("the tap of %s: %v", tp.link, err)
	} else if stats.Drops > 0 {
		t.Errorf("the tap of %s missed %d frames of %d", tp.link, stats.Drops, stats.Packets)
	}
	if tp.frames == 0 {
		t.Errorf("the tap of %s has seen nothing", tp.link)
	}
}

// carrying returns the directions in which the marker went in the clear.
func (tp *tap) carrying(marker string) []direction {
	tp.mu.Lock()
	defer tp.mu.Unlock()
	var found []direction
	for d, s := range tp.streams {
		in := bytes.Contains(s.data, []byte(marker))
		for _, piece := range s.later {
			in = in || bytes.Contains(piece, []byte(marker))
		}
		if in {
			found = append(found, d)
		}
	}
	return found
}

// record is a record of TLS (RFC 8446 §5.1), as it is on the wire.
type record struct {
	Caller    bool // whether it went from the caller to the callee
	Type      byte // 20 change_cipher_spec, 21 alert, 22 handshake, 23 what is encrypted
	Handshake byte // of a handshake record in the clear: its first message's type
	Length    int
	frame     int // the frame by which it was complete
}

// The types of records and of messages that tests ask for.
const (
	changeCipherSpec = 20
	alertRecord      = 21
	handshakeRecord  = 22
	encryptedRecord  = 23

	clientHello = 1
	serverHello = 2
)

// conversation is a TCP connection that the tap has seen from its start.
type conversation struct {
	caller, callee netip.AddrPort
	records        []record // if it is TLS: in the order of their arrival
	sent, received int      // bytes from and to the caller
}

// to returns the connections to a port.
func (tp *tap) to(port uint16) []conversation {
	tp.mu.Lock()
	defer tp.mu.Unlock()
	var all []conversation
	for d, s := range tp.streams {
		back := tp.streams[d.back()]
		if d.to.Port() != port || !s.opened || back == nil {
			continue
		}
		c := conversation{caller: d.from, callee: d.to, sent: len(s.data), received: len(back.data)}
		c.records = append(s.records(true), back.records(false)...)
		slices.SortStableFunc(c.records, func(a, b record) int { return a.frame - b.frame })
		all = append(all, c)
	}
	return all
}

// records returns the records of TLS in the stretch, as far as it has any.
func (s *stretch) records(caller bool) []record {
	var all []record
	for at := 0; at+5 <= len(s.data); {
		r := record{Caller: caller, Type: s.data[at], Length: int(binary.BigEndian.Uint16(s.data[at+3:]))}
		end := at + 5 + r.Length
		if r.Type < changeCipherSpec || r.Type > encryptedRecord || end > len(s.data) {
			break
		}
		if r.Type == handshakeRecord && r.Length > 0 {
			r.Handshake = s.data[at+5]
		}
		n, _ := slices.BinarySearchFunc(s.arrived, end, func(a arrival, end int) int { return a.end - end })
		r.frame = s.arrived[n].frame
		all = append(all, r)
		at = end
	}
	return all
}
