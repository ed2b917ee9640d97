package capture

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// Network is a captured pod's network namespace.
type Network struct {
	ns        *os.File
	listeners []*listener // as ports() has them
	rules     rules
	dump      string // of the rules, right after they were set
	closeOnce sync.Once
}

// Open captures the connections of the pod whose network namespace ns is: it opens
// the sockets and then sets the rules, so that from the first connection on there is
// somebody to accept it. To open a namespace that is captured already, by this
// process or by one before it, replaces the rules with equal ones, and changes
// nothing for connections that are open.
//
// kept is what [Network.Files] returned to an agent before this one: its listening
// sockets are used again, with what waits in them. What is not a listening socket of
// this namespace and of one of our ports is left out. Open duplicates ns and kept,
// which stay the caller's to close.
//
// It fails if another process, or the pod, listens on one of the ports, if the
// kernel takes neither rules of nftables nor of iptables, or if this process may not
// set them, which takes root. A pod that was captured stays so then, and one that
// was not is left as it was.
//
// The caller ends the capture by [Network.Release], or its own part in it by
// [Network.Close].
func Open(ns *os.File, kept []*os.File) (*Network, error) { return open(ns, kept, "") }

// open is Open, by one kind of rules only if that is not empty.
func open(ns *os.File, kept []*os.File, only string) (_ *Network, err error) {
	n := &Network{}
	defer func() {
		if err != nil {
			n.Close()
			err = fmt.Errorf("capture: %w", err)
		}
	}()
	if n.ns, err = duplicate(ns); err != nil {
		return nil, fmt.Errorf("the network namespace: %w", err)
	}
	if err := n.listen(kept); err != nil {
		return nil, err
	}
	err = inside(n.ns, func() error {
		r, err := openRoutes()
		if err != nil {
			return err
		}
		defer r.close()
		captured := r.check() == nil
		if err := r.set(); err != nil {
			return err
		}
		if n.rules, err = setRules(r, only); err != nil {
			if !captured {
				// Half of the rules would cut the pod off, for which nobody is there.
				err = errors.Join(err, removeAll(r))
			}
			return err
		}
		n.dump, err = n.rules.dump()
		return err
	})
	if err != nil {
		return nil, err
	}
	return n, nil
}

// listen takes the listening sockets that were kept, and opens those that were not.
func (n *Network) listen(kept []*os.File) error {
	old := make(map[uint16]*os.File)
	for _, file := range kept {
		if port, err := portOf(file, n.ns); err == nil {
			old[port] = file
		}
	}
	for _, port := range ports() {
		file := old[port]
		if file == nil {
			err := inside(n.ns, func() error {
				var err error
				file, err = listen(port)
				return err
			})
			if err != nil {
				return err
			}
			defer file.Close() // the listener has its own
		}
		l, err := net.FileListener(file)
		if err != nil {
			return fmt.Errorf("listen on port %d: %w", port, err)
		}
		n.listeners = append(n.listeners, &listener{TCPListener: l.(*net.TCPListener)}) // what portOf and listen let through
	}
	return nil
}

// Listener returns the listener of one of the ports. It accepts [*net.TCPConn]. It
// returns nil for any other port. To close it ends Accept, but leaves the socket,
// where connections wait, to [Network.Close] or [Network.Release].
func (n *Network) Listener(port uint16) net.Listener {
	for i, own := range ports() {
		if port == own {
			return n.listeners[i]
		}
	}
	return nil
}

// Files returns the network namespace and, after it, the listening sockets, for a
// [Keeper]. They are duplicates, and the caller's to close. It fails if the process
// is out of file descriptors, or n is closed.
func (n *Network) Files() ([]*os.File, error) {
	ns, err := duplicate(n.ns)
	if err != nil {
		return nil, fmt.Errorf("capture: %w", err)
	}
	files := []*os.File{ns}
	for _, l := range n.listeners {
		file, err := l.File()
		if err != nil {
			for _, file := range files {
				file.Close()
			}
			return nil, fmt.Errorf("capture: %w", err)
		}
		files = append(files, file)
	}
	return files, nil
}

// Check returns nil if all that Open set up still stands, and otherwise an error that
// says what does not. To open the namespace again, with the [Network.Files] of this
// one, mends it.
func (n *Network) Check() error {
	for i, l := range n.listeners {
		if port, err := portOf(l.TCPListener, n.ns); err != nil || port != ports()[i] {
			return fmt.Errorf("capture: the socket of port %d: %w", ports()[i], err)
		}
	}
	err := inside(n.ns, func() error {
		r, err := openRoutes()
		if err != nil {
			return err
		}
		defer r.close()
		if err := r.check(); err != nil {
			return err
		}
		dump, err := n.rules.dump()
		if err != nil {
			return err
		}
		if dump != n.dump {
			return errors.New("somebody changed the rules")
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	return nil
}

// Dial connects from inside the namespace. The connection is not captured on its way
// out. It blocks until there is a connection, an error, or the end of ctx.
func (n *Network) Dial(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
	conn, err := dial(ctx, n.ns, netip.Addr{}, unmap(to))
	if err != nil {
		return nil, fmt.Errorf("capture: %w", err)
	}
	return conn, nil
}

// DialFrom connects to an application of the pod, which sees from as the address of
// its caller, whoever that is; the port is the kernel's to choose. It refuses the
// ports of the agent's own. It blocks as [Network.Dial] does.
func (n *Network) DialFrom(ctx context.Context, from netip.Addr, to netip.AddrPort) (*net.TCPConn, error) {
	from, to = from.Unmap(), unmap(to)
	if err := checkFrom(from, to); err != nil {
		return nil, fmt.Errorf("capture: %w", err)
	}
	conn, err := dial(ctx, n.ns, from, to)
	if err != nil {
		return nil, fmt.Errorf("capture: %w", err)
	}
	return conn, nil
}

// Release ends the capture: it removes the rules and closes the sockets, also those
// that others, like a [Keeper], have duplicates of. Connections that are open go on,
// but nobody can be called by [Network.DialFrom] any more, nor answers. If it fails,
// some of it still stands, and it may be called again.
func (n *Network) Release() error {
	err := inside(n.ns, func() error {
		r, err := openRoutes()
		if err != nil {
			return err
		}
		defer r.close()
		return removeAll(r)
	})
	if err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	for _, l := range n.listeners {
		stopListening(l.TCPListener)
	}
	return n.Close()
}

// Close closes the sockets and leaves the rules, by which the pod's connections are
// refused until somebody opens the namespace again, or wait in a socket that was
// kept. A second call does nothing.
func (n *Network) Close() error {
	var errs []error
	n.closeOnce.Do(func() {
		for _, l := range n.listeners {
			l.closed.Store(true)
			errs = append(errs, l.TCPListener.Close())
		}
		if n.ns != nil {
			errs = append(errs, n.ns.Close())
		}
	})
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	return nil
}

// listener is a listening socket that is closed apart from the right to accept.
type listener struct {
	*net.TCPListener

	closed atomic.Bool
}

func (l *listener) Accept() (net.Conn, error) {
	conn, err := l.AcceptTCP()
	if err != nil {
		if l.closed.Load() {
			err = &net.OpError{Op: "accept", Net: "tcp", Addr: l.Addr(), Err: net.ErrClosed}
		}
		return nil, err
	}
	return conn, nil
}

// Close makes Accept fail, by a deadline that has passed.
func (l *listener) Close() error {
	if l.closed.Swap(true) {
		return &net.OpError{Op: "close", Net: "tcp", Addr: l.Addr(), Err: net.ErrClosed}
	}
	return l.SetDeadline(time.Unix(1, 0))
}
