package trothtest

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"troth.dev/troth/agent/workload"
	"troth.dev/troth/internal/latest"
)

type deliveredValue = latest.Value[workload.Delivered]

// Outage is a way in which a Workload API can be away. The zero Outage is none.
type Outage int

// The outages.
const (
	// Gone is an agent that is not running: open streams end, and who connects is
	// refused.
	Gone Outage = iota + 1
	// Silent is an agent that hangs: open streams stay and bring nothing, and who
	// connects is not answered.
	Silent
)

// String returns the outage as logs spell it.
func (o Outage) String() string {
	switch o {
	case 0:
		return "none"
	case Gone:
		return "gone"
	case Silent:
		return "silent"
	default:
		return fmt.Sprintf("Outage(%d)", int(o))
	}
}

// socket is the Workload API of one identity. Who connects to it is that identity's
// workload, whichever process it is.
type socket struct {
	path   string
	server *workload.Server
	gate   *gate         // of the listener that is served; nil while nobody listens
	stop   func()        // ends Serve
	ended  chan struct{} // closed when Serve has returned
}

// Socket returns the address of the identity's Workload API, "unix:///...", as
// libraries take it and as the environment variable SPIFFE_ENDPOINT_SOCKET has it. It
// is the identity's alone: every process that may connect is this workload, a child
// process too. The socket is there from the first call on, in a folder that only this
// user may open, until the Authority is closed.
//
// It needs Linux, whose kernel says who connects.
func (i *Identity) Socket() string {
	a := i.of
	if a.t != nil {
		a.t.Helper()
	}
	a.act("socket", func() error {
		a.mu.Lock()
		defer a.mu.Unlock()
		if i.socket != nil {
			return nil
		}
		s, err := a.newSocket(i)
		if err != nil {
			return err
		}
		if i.outage == Gone {
			i.socket = s
			return nil
		}
		if err := a.serve(i, s); err != nil {
			return err
		}
		i.socket = s
		return nil
	})
	a.mu.Lock()
	defer a.mu.Unlock()
	if i.socket == nil {
		return ""
	}
	return "unix://" + i.socket.path
}

// Delivered says whether a process has been sent the identity's newest SVID through
// the socket, and not yet a newer one.
func (i *Identity) Delivered() bool {
	i.of.mu.Lock()
	s, svid := i.socket, i.svid
	i.of.mu.Unlock()
	if s == nil || svid == nil {
		return false
	}
	leaves, _ := s.server.HandedOut(time.Now())
	return slices.Contains(leaves, workload.LeafOf(svid))
}

// newSocket makes what serves the identity, and a name for the socket. The caller
// holds mu.
func (a *Authority) newSocket(i *Identity) (*socket, error) {
	if a.dir == "" {
		// Not the test's own folder: the path of a socket has 108 bytes at most, and
		// the name of a test may have more.
		dir, err := os.MkdirTemp("", "troth")
		if err != nil {
			return nil, err
		}
		a.dir = dir
	}
	server, err := workload.New(workload.Config{
		Source: entitlement{i},
		PodOf:  func(workload.Peer) (string, error) { return i.id.String(), nil },
		Limits: workload.Limits{ConnectionsPerPod: 4096, StreamsPerPod: 8192},
		Log:    a.config.Log,
	})
	if err != nil {
		return nil, err
	}
	a.sockets++
	return &socket{path: filepath.Join(a.dir, fmt.Sprintf("%d.sock", a.sockets)), server: server}, nil
}

// serve listens and serves until the socket is stopped or the Authority closed. The
// caller holds mu.
func (a *Authority) serve(i *Identity, s *socket) error {
	l, err := workload.Listen(s.path)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(a.ctx)
	g := newGate(l, i.outage == Silent)
	s.gate, s.stop, s.ended = g, stop, make(chan struct{})
	ended := s.ended
	a.work.Go(func() {
		defer close(ended)
		defer stop()
		if err := s.server.Serve(ctx, g); err != nil && ctx.Err() == nil && a.t != nil {
			a.t.Errorf("trothtest: %v", err)
		}
	})
	return nil
}

// entitlement is what the one workload behind a socket is entitled to.
type entitlement struct{ *Identity }

// Workload implements [workload.Source].
func (e entitlement) Workload(string) (state *latest.Value[workload.State], release func()) {
	return &e.state, func() {}
}

// Partition takes the identity's Workload API away until Heal. Its sources, and the
// streams that an outage leaves open, keep what they have and hear of nothing new.
func (i *Identity) Partition(how Outage) {
	a := i.of
	if a.t != nil {
		a.t.Helper()
	}
	a.act("partition", func() error {
		if how != Gone && how != Silent {
			return fmt.Errorf("no such outage: %v", how)
		}
		return a.setOutage(i, how)
	})
}

// Heal brings the Workload API back, with what was published meanwhile.
func (i *Identity) Heal() {
	a := i.of
	if a.t != nil {
		a.t.Helper()
	}
	a.act("heal", func() error {
		if err := a.setOutage(i, 0); err != nil {
			return err
		}
		return a.delivered(i)
	})
}

func (a *Authority) setOutage(i *Identity, now Outage) error {
	a.mu.Lock()
	before := i.outage
	i.outage = now
	s := i.socket
	a.mu.Unlock()
	if s != nil {
		if now == Gone && before != Gone {
			s.stop()
			<-s.ended
		} else if now != Gone && before == Gone {
			a.mu.Lock()
			err := a.serve(i, s)
			a.mu.Unlock()
			if err != nil {
				return err
			}
		} else if now != Gone {
			s.gate.shut(now == Silent)
		}
	}
	if now == 0 {
		a.mu.Lock()
		a.publish(i)
		a.mu.Unlock()
	}
	return nil
}

// gate is a listener that can leave waiting who has connected.
type gate struct {
	net.Listener

	closed chan struct{}
	once   sync.Once

	mu   sync.Mutex
	open chan struct{} // guarded by mu; closed while the gate is open
}

func newGate(l net.Listener, shut bool) *gate {
	g := &gate{Listener: l, closed: make(chan struct{}), open: make(chan struct{})}
	if !shut {
		close(g.open)
	}
	return g
}

func (g *gate) shut(shut bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-g.open:
		if shut {
			g.open = make(chan struct{})
		}
	default:
		if !shut {
			close(g.open)
		}
	}
}

// Accept returns who has connected, once the gate is open.
func (g *gate) Accept() (net.Conn, error) {
	c, err := g.Listener.Accept()
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	open := g.open
	g.mu.Unlock()
	select {
	case <-open:
		return c, nil
	case <-g.closed:
		c.Close()
		return nil, net.ErrClosed
	}
}

func (g *gate) Close() error {
	g.once.Do(func() { close(g.closed) })
	return g.Listener.Close()
}
