package capture

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// backlog is how many connections wait for an agent that is busy, or away. The
// kernel cuts it to net.core.somaxconn, which is 4096 unless somebody changed it.
const backlog = 1 << 16

// listen opens the listening socket of a port, in the namespace that the thread is
// in, for both families, or for IPv4 if that is all the kernel has.
func listen(port uint16) (_ *os.File, err error) {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	var any unix.Sockaddr = &unix.SockaddrInet6{Port: int(port)}
	dual := true
	if errors.Is(err, unix.EAFNOSUPPORT) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		any, dual = &unix.SockaddrInet4{Port: int(port)}, false
	}
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	file := os.NewFile(uintptr(fd), "listener "+strconv.Itoa(int(port)))
	defer func() {
		if err != nil {
			file.Close()
		}
	}()
	if dual {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0); err != nil {
			return nil, fmt.Errorf("listen for both families: %w", err)
		}
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return nil, err
	}
	if err := unix.Bind(fd, any); err != nil {
		return nil, fmt.Errorf("port %d is taken, by another agent or by the pod: %w", port, err)
	}
	if err := unix.Listen(fd, backlog); err != nil {
		return nil, fmt.Errorf("listen on port %d: %w", port, err)
	}
	return file, nil
}

// portOf returns which port a file listens on. It fails if the file is no
// listening TCP socket of the network namespace ns.
func portOf(file, ns syscall.Conn) (port uint16, err error) {
	err = control(file, func(fd int) error {
		listening, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
		if err != nil {
			return err
		}
		if listening == 0 {
			return errors.New("it does not listen")
		}
		address, err := unix.Getsockname(fd)
		if err != nil {
			return err
		}
		switch address := address.(type) {
		case *unix.SockaddrInet4:
			port = uint16(address.Port)
		case *unix.SockaddrInet6:
			port = uint16(address.Port)
		default:
			return errors.New("it is not of TCP")
		}
		theirs, err := unix.IoctlRetInt(fd, unix.SIOCGSKNS)
		if err != nil {
			return err
		}
		defer unix.Close(theirs)
		var a, b unix.Stat_t
		if err := unix.Fstat(theirs, &a); err != nil {
			return err
		}
		if err := control(ns, func(fd int) error { return unix.Fstat(fd, &b) }); err != nil {
			return err
		}
		if a.Dev != b.Dev || a.Ino != b.Ino {
			return errors.New("it is of another network namespace")
		}
		return nil
	})
	return port, err
}

// dial connects from inside the namespace ns. The socket carries our mark and, if
// from is valid, wears that address.
//
// A socket is of the namespace that its thread is in when socket(2) is called, and
// stays so. The dialer calls that on the goroutine that called it, and Control right
// after it: there the thread goes home, and whatever the connection then waits for,
// it waits like any other.
func dial(ctx context.Context, ns *os.File, from netip.Addr, to netip.AddrPort) (*net.TCPConn, error) {
	network, level, transparent := "tcp4", unix.SOL_IP, unix.IP_TRANSPARENT
	if to.Addr().Is6() {
		network, level, transparent = "tcp6", unix.SOL_IPV6, unix.IPV6_TRANSPARENT
	}
	type result struct {
		conn *net.TCPConn
		err  error
	}
	done := make(chan result, 1)
	go func() {
		v := visit{ns: ns}
		if err := v.enter(); err != nil {
			done <- result{err: err}
			return
		}
		d := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
			if !v.away {
				// The dialer tries again if it reached itself, with a socket of
				// the agent's own namespace.
				return fmt.Errorf("nobody listens on %s", to)
			}
			if err := v.leave(); err != nil {
				return err
			}
			var err error
			controlErr := raw.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, socketMark)
				if err != nil || !from.IsValid() {
					return
				}
				if err = unix.SetsockoptInt(int(fd), level, transparent, 1); err != nil {
					return
				}
				// The port is chosen when both ends are known, so that one
				// address may have as many connections as each other end has ports.
				err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
			})
			return errors.Join(controlErr, err)
		}}
		d.SetMultipathTCP(false)
		if from.IsValid() {
			d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
			d.KeepAlive = -1 // the other end is in the same kernel
		}
		conn, err := d.DialContext(ctx, network, to.String())
		// If there was no socket to begin with, Control was not called.
		if backErr := v.leave(); err == nil && backErr != nil {
			conn.Close()
			err = backErr
		}
		if err != nil {
			done <- result{err: err}
			return
		}
		done <- result{conn: conn.(*net.TCPConn)} // the network is of TCP
	}()
	r := <-done
	return r.conn, r.err
}

// Destination returns where a connection wanted to go that [Network.Listener]
// accepted on [OutboundPort] or [PlaintextPort]. It returns an error that wraps
// [ErrNotCaptured] if it wanted to go to that very port, which nobody may.
func Destination(c net.Conn) (netip.AddrPort, error) {
	socket, ok := c.(syscall.Conn)
	if !ok {
		return netip.AddrPort{}, fmt.Errorf("capture: %T is no socket", c)
	}
	local, ok := c.LocalAddr().(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}, fmt.Errorf("capture: %T is not of TCP", c)
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("capture: %w", err)
	}
	own := unmap(local.AddrPort())
	var to netip.AddrPort
	var optionErr error
	err = raw.Control(func(fd uintptr) {
		to, optionErr = originalDestination(int(fd), own.Addr().Is4())
	})
	switch {
	case err != nil:
		return netip.AddrPort{}, fmt.Errorf("capture: %w", err)
	case errors.Is(optionErr, unix.ENOENT):
		return netip.AddrPort{}, fmt.Errorf("capture: %w", ErrNotCaptured)
	case optionErr != nil:
		return netip.AddrPort{}, fmt.Errorf("capture: where a connection wanted to go: %w", optionErr)
	case to.Port() == own.Port() && to.Addr().WithZone("") == own.Addr().WithZone(""):
		return netip.AddrPort{}, fmt.Errorf("capture: %w", ErrNotCaptured)
	}
	return to, nil
}

// originalDestination asks the kernel's table of connections. The constant has the
// same value for both families (IP6T_SO_ORIGINAL_DST).
func originalDestination(fd int, is4 bool) (netip.AddrPort, error) {
	if is4 {
		var address unix.RawSockaddrInet4
		if err := getsockopt(fd, unix.SOL_IP, unix.SO_ORIGINAL_DST, unsafe.Pointer(&address), unsafe.Sizeof(address)); err != nil {
			return netip.AddrPort{}, err
		}
		return netip.AddrPortFrom(netip.AddrFrom4(address.Addr), bigEndian(address.Port)), nil
	}
	var address unix.RawSockaddrInet6
	if err := getsockopt(fd, unix.SOL_IPV6, unix.SO_ORIGINAL_DST, unsafe.Pointer(&address), unsafe.Sizeof(address)); err != nil {
		return netip.AddrPort{}, err
	}
	to := netip.AddrFrom16(address.Addr)
	if address.Scope_id != 0 {
		to = to.WithZone(strconv.FormatUint(uint64(address.Scope_id), 10))
	}
	return netip.AddrPortFrom(to, bigEndian(address.Port)), nil
}

func getsockopt(fd, level, option int, value unsafe.Pointer, size uintptr) error {
	length := uint32(size)
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(value), uintptr(unsafe.Pointer(&length)), 0)
	if errno != 0 {
		return errno
	}
	if uintptr(length) != size {
		return fmt.Errorf("the kernel returned %d bytes, not %d", length, size)
	}
	return nil
}

// bigEndian reads a port as the network writes it.
func bigEndian(port uint16) uint16 {
	b := (*[2]byte)(unsafe.Pointer(&port))
	return uint16(b[0])<<8 | uint16(b[1])
}

func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// stopListening ends a listening socket, whoever else has it.
func stopListening(file syscall.Conn) {
	// What is not listening any more is what was wanted.
	_ = control(file, func(fd int) error { return unix.Shutdown(fd, unix.SHUT_RDWR) })
}
