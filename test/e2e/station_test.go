package e2e_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"troth.dev/troth/handshake"
)

// manner is how two workloads shake hands.
type manner string

// The manners: ours in both orders, and go-spiffe's TLS.
const (
	callerFirst manner = "caller-first"
	standard    manner = "standard"
	spiffeTLS   manner = "go-spiffe"
)

var manners = []manner{callerFirst, standard, spiffeTLS}

func (m manner) order() handshake.Order {
	if m == callerFirst {
		return handshake.CallerFirst
	}
	return handshake.Standard
}

// credentials are what a workload shows, and by what it verifies others.
type credentials interface {
	x509svid.Source
	x509bundle.Source
}

// target is where a workload accepts handshakes, in each manner.
type target struct {
	Peer      string // its SPIFFE ID
	Addresses map[manner]string
}

// listen accepts connections in each manner, from anybody of the trust domain, and
// sends back what it is sent, until ctx ends.
func listen(ctx context.Context, own credentials) (map[manner]string, error) {
	addresses := make(map[manner]string)
	for _, m := range manners {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		addresses[m] = l.Addr().String()
		context.AfterFunc(ctx, func() { l.Close() })
		go func() {
			for {
				raw, err := l.Accept()
				if err != nil {
					return // ctx has ended
				}
				go echo(ctx, m, raw, own)
			}
		}()
	}
	return addresses, nil
}

// echo is the callee's side of one connection. What goes wrong with it, the caller
// counts.
func echo(ctx context.Context, m manner, raw net.Conn, own credentials) {
	defer raw.Close()
	defer context.AfterFunc(ctx, func() { raw.Close() })()
	var conn net.Conn
	var err error
	if m == spiffeTLS {
		conn = tls.Server(raw, tlsconfig.MTLSServerConfig(own, own, tlsconfig.AuthorizeMemberOf(trustDomain)))
	} else {
		config := &handshake.Config{Order: m.order(), SVID: own, Bundles: own}
		conn, err = handshake.Accept(ctx, raw, config, func(id spiffeid.ID) error {
			if !id.MemberOf(trustDomain) {
				return errors.New("it is of another trust domain")
			}
			return nil
		})
	}
	if err == nil {
		_, _ = io.Copy(conn, conn) // until either end closes
	}
}

// call is the caller's side: it shakes hands and has the peer answer, so that both
// are known to have accepted. The caller closes the connection.
func call(ctx context.Context, m manner, to target, own credentials) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, callPatience)
	defer cancel()
	peer, err := spiffeid.FromString(to.Peer)
	if err != nil {
		return nil, err
	}
	raw, err := new(net.Dialer).DialContext(ctx, "tcp", to.Addresses[m])
	if err != nil {
		return nil, err
	}
	defer context.AfterFunc(ctx, func() { raw.SetDeadline(time.Now()) })()
	var conn net.Conn
	if m == spiffeTLS {
		conn = tls.Client(raw, tlsconfig.MTLSClientConfig(own, own, tlsconfig.AuthorizeID(peer)))
	} else if conn, err = handshake.Initiate(ctx, raw, &handshake.Config{Order: m.order(), SVID: own, Bundles: own}, peer); err != nil {
		raw.Close()
		return nil, err
	}
	if err := greet(conn); err != nil {
		raw.Close()
		return nil, err
	}
	return conn, nil
}

// callPatience is how long a handshake may take on a machine that is busy with
// hundreds of agents.
const callPatience = 15 * time.Second

// greet sends the greeting and wants it back.
func greet(conn net.Conn) error {
	if _, err := io.WriteString(conn, greeting); err != nil {
		return err
	}
	answer := make([]byte, len(greeting))
	if _, err := io.ReadFull(conn, answer); err != nil {
		return err
	}
	if string(answer) != greeting {
		return fmt.Errorf("sent %q and got %q back", greeting, answer)
	}
	return nil
}

// tally is what became of handshakes and of what was said on connections that were
// held open.
type tally struct {
	Handshakes int64
	Held       int64    // greetings over connections that are held
	Failed     int64    // of both
	Failures   []string // the first few
}

// driver opens connections all the time, and holds some of them for a while.
type driver struct {
	own     credentials
	self    string
	targets []target

	handshakes, held, failed atomic.Int64
	mu                       sync.Mutex
	failures                 []string // guarded by mu
}

func (d *driver) tally() tally {
	d.mu.Lock()
	defer d.mu.Unlock()
	return tally{Handshakes: d.handshakes.Load(), Held: d.held.Load(), Failed: d.failed.Load(), Failures: d.failures}
}

func (d *driver) fail(format string, args ...any) {
	d.failed.Add(1)
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.failures) < 10 {
		d.failures = append(d.failures, time.Now().UTC().Format("15:04:05.000")+" "+fmt.Sprintf(format, args...))
	}
}

// drive opens a connection each interval, until ctx ends and the last one is done.
func (d *driver) drive(ctx context.Context, interval time.Duration) {
	const heldOf = 50 // one of so many is held
	var open sync.WaitGroup
	defer open.Wait()
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		to, m := d.targets[rand.N(len(d.targets))], manners[rand.N(len(manners))]
		hold := rand.N(heldOf) == 0
		open.Go(func() {
			conn, err := call(context.WithoutCancel(ctx), m, to, d.own)
			if err != nil {
				d.fail("%s to %s by %s: %v", d.self, to.Peer, m, err)
				return
			}
			d.handshakes.Add(1)
			defer conn.Close()
			if hold {
				d.hold(ctx, conn, m, to)
			}
		})
	}
}

// hold greets once in a second for a while.
func (d *driver) hold(ctx context.Context, conn net.Conn, m manner, to target) {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for range 20 {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		conn.SetDeadline(time.Now().Add(callPatience))
		if err := greet(conn); err != nil {
			d.fail("%s to %s by %s, on a connection that was held: %v", d.self, to.Peer, m, err)
			return
		}
		d.held.Add(1)
	}
}
