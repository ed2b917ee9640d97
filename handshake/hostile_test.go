package handshake_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"troth.dev/troth/handshake"
)

// position is where our side of a handshake stands.
type position struct {
	order handshake.Order
	side  handshake.Side
}

func (p position) String() string { return fmt.Sprintf("%v %v", p.order, p.side) }

// The four positions, by our role in TLS.
var (
	tlsServers = []position{{handshake.CallerFirst, handshake.Caller}, {handshake.Standard, handshake.Callee}}
	tlsClients = []position{{handshake.CallerFirst, handshake.Callee}, {handshake.Standard, handshake.Caller}}
	positions  = slices.Concat(tlsServers, tlsClients)
)

// The steps of a position.
func (p position) first() handshake.Step {
	if p.order == handshake.CallerFirst {
		return handshake.StepCallerPresents
	}
	return handshake.StepCalleePresents
}

func (p position) weVerify() handshake.Step {
	if p.side == handshake.Caller {
		return handshake.StepCallerVerifies
	}
	return handshake.StepCalleeVerifies
}

func (p position) peerVerifies() handshake.Step { return position{side: 3 - p.side}.weVerify() }

func (p position) wePresent() handshake.Step {
	if p.side == handshake.Caller {
		return handshake.StepCallerPresents
	}
	return handshake.StepCalleePresents
}

func (p position) peerPresents() handshake.Step { return position{side: 3 - p.side}.wePresent() }

// hostile is a peer that is not our code.
type hostile struct {
	name string
	at   []position
	peer func(t *testing.T, at position, ca *authority) perform
	code handshake.Code
	step func(position) handshake.Step
}

func TestHostilePeerIsRefused(t *testing.T) {
	second := 2 * time.Second
	table := []hostile{
		{"expired certificate", positions, presenting(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-second) }),
			handshake.CertificateExpired, position.weVerify},
		{"certificate not yet valid", positions, presenting(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }),
			handshake.CertificateNotYetValid, position.weVerify},
		{"no certificate", tlsServers, bareTLS(func(c *tls.Config) { c.Certificates = nil }),
			handshake.CertificateMissing, position.peerPresents},
		{"does not ask for ours", tlsClients, bareTLS(func(c *tls.Config) { c.ClientAuth = tls.NoClientCert }),
			handshake.CertificateNotRequested, position.wePresent},
		{"certificate without its key", positions, func(t *testing.T, at position, ca *authority) perform {
			return bareTLS(func(c *tls.Config) { c.Certificates[0].PrivateKey = newKey(t) })(t, at, ca)
		}, handshake.KeyNotProved, position.weVerify},
		{"hundreds of certificates", positions, padded(200),
			handshake.ChainTooLong, position.weVerify},
		{"certificates beyond the message limit, from a TLS client", tlsServers, padded(2000),
			handshake.ProtocolError, position.peerVerifies},
		{"certificates beyond the message limit, from a TLS server", tlsClients, padded(2000),
			handshake.ProtocolError, position.first},
		{"no ALPN", positions, bareTLS(func(c *tls.Config) { c.NextProtos = nil }),
			handshake.ALPNMismatch, position.first},
		{"other ALPN", positions, bareTLS(func(c *tls.Config) { c.NextProtos = []string{"other"} }),
			handshake.ALPNMismatch, position.first},
		// crypto/tls lets http/1.1 clients in where the server has h2.
		{"http/1.1", positions, bareTLS(func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} }),
			handshake.ALPNMismatch, position.first},
		{"the other order's ALPN", positions, func(t *testing.T, at position, ca *authority) perform {
			return bareTLS(func(c *tls.Config) { c.NextProtos = []string{alpn(3 - at.order)} })(t, at, ca)
		}, handshake.ALPNMismatch, position.first},
		{"TLS 1.2", positions, bareTLS(func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }),
			handshake.TLSVersion, position.first},
		{"HTTP request", positions, raw("GET / HTTP/1.1\r\nHost: stock\r\n\r\n"),
			handshake.NotTLS, position.first},
		{"SSH banner", positions, raw("SSH-2.0-OpenSSH_9.2\r\n"),
			handshake.NotTLS, position.first},
		{"oversized record", positions, raw("\x16\x03\x01\xff\xff"),
			handshake.ProtocolError, position.first},
		{"oversized handshake message", positions, raw("\x16\x03\x01\x00\x04\x01\x01\x00\x01"),
			handshake.ProtocolError, position.first},
		{"nonsense in a handshake record", positions, raw("\x16\x03\x01\x00\x08\x01\x00\x00\x04aaaa"),
			handshake.ProtocolError, position.first},
		{"alert at once", positions, raw("\x15\x03\x01\x00\x02\x02\x28"),
			handshake.PeerRefused, position.first},
		{"close at once", positions, raw(""),
			handshake.PeerClosed, position.first},
		{"half a record", positions, raw("\x16\x03\x01\x00\x40\x01"),
			handshake.PeerClosed, position.first},
		{"no confirmation", callerFirstCallee, first(""),
			handshake.PeerClosed, position.peerVerifies},
		{"wrong confirmation", callerFirstCallee, first("\x02"),
			handshake.ProtocolError, position.peerVerifies},
		{"data instead of the confirmation", callerFirstCallee, first(lineA),
			handshake.ProtocolError, position.peerVerifies},
	}
	for _, tt := range table {
		for _, at := range tt.at {
			t.Run(fmt.Sprintf("%v/%v", tt.name, at), func(t *testing.T) {
				ca := newAuthority(t)
				cfg := handshake.Config{Order: at.order, SVID: ca.svid(t, idB, nil), Bundles: ca.bundle()}
				var ours, theirs outcome
				if at.side == handshake.Caller {
					ours, theirs = connect(t, initiate(t, cfg, idA), tt.peer(t, at, ca))
				} else {
					theirs, ours = connect(t, tt.peer(t, at, ca), accept(t, cfg, only(idA)))
				}
				refusal{tt.step(at), tt.code}.check(t, at.side, ours)
				checkNothingDelivered(t, ours, theirs)
				if at == callerFirstCallee[0] && tt.step(at) <= handshake.StepCalleeVerifies {
					checkRevealedNothing(t, ours)
				}
			})
		}
	}
}

var callerFirstCallee = []position{{handshake.CallerFirst, handshake.Callee}}

func alpn(order handshake.Order) string {
	if order == handshake.CallerFirst {
		return "troth/1"
	}
	return "h2"
}

// A peer that would resume its session gets no ticket for it.
func TestNoSessionTicket(t *testing.T) {
	for _, at := range tlsServers {
		t.Run(at.String(), func(t *testing.T) {
			ca := newAuthority(t)
			cache := tls.NewLRUClientSessionCache(1)
			peer := bareTLS(func(c *tls.Config) { c.ServerName, c.ClientSessionCache = "peer", cache })(t, at, ca)
			cfg := handshake.Config{Order: at.order, SVID: ca.svid(t, idB, nil), Bundles: ca.bundle()}
			ours := initiate(t, cfg, idA)
			if at.side == handshake.Callee {
				ours = accept(t, cfg, only(idA))
			}
			got, theirs := connect(t, ours, peer)
			if got.err != nil || len(theirs.received) == 0 {
				t.Fatalf("handshake = %v, the peer received %q", got.err, theirs.received)
			}
			if _, has := cache.Get("peer"); has {
				t.Error("the peer has a session ticket")
			}
		})
	}
}

// bareTLS is a peer made of crypto/tls alone, in the role opposite to ours: as
// idA, with a good certificate and no doubts, unless edit has it otherwise.
func bareTLS(edit func(*tls.Config)) func(*testing.T, position, *authority) perform {
	return func(t *testing.T, at position, ca *authority) perform {
		return barePeer(at, ca.svid(t, idA, nil), edit, "\x01"+lineA)
	}
}

// presenting is a bare peer whose certificate is spoiled by edit.
func presenting(edit func(*x509.Certificate)) func(*testing.T, position, *authority) perform {
	return func(t *testing.T, at position, ca *authority) perform {
		return barePeer(at, ca.svid(t, idA, edit), nil, "\x01"+lineA)
	}
}

// padded is a bare peer that presents n certificates too many.
func padded(n int) func(*testing.T, position, *authority) perform {
	return func(t *testing.T, at position, ca *authority) perform {
		svid := ca.svid(t, idA, nil)
		for range n {
			svid.Certificates = append(svid.Certificates, ca.cert)
		}
		return barePeer(at, svid, nil, "\x01"+lineA)
	}
}

// first is a bare peer that says exactly this inside TLS, and closes.
func first(says string) func(*testing.T, position, *authority) perform {
	return func(t *testing.T, at position, ca *authority) perform {
		return barePeer(at, ca.svid(t, idA, nil), nil, says)
	}
}

func barePeer(at position, svid *x509svid.SVID, edit func(*tls.Config), says string) perform {
	cfg := &tls.Config{
		Certificates:       []tls.Certificate{tlsCertificate(svid)},
		NextProtos:         []string{alpn(at.order)},
		InsecureSkipVerify: true,
		ClientAuth:         tls.RequireAnyClientCert,
	}
	if edit != nil {
		edit(cfg)
	}
	return func(conn net.Conn) outcome {
		c := tls.Server(conn, cfg)
		if slices.Contains(tlsServers, at) {
			c = tls.Client(conn, cfg)
		}
		defer c.Close()
		o := outcome{err: c.Handshake()}
		if o.err == nil {
			io.WriteString(c, says)
			c.CloseWrite()
			o.received, o.readErr = io.ReadAll(c)
		}
		return o
	}
}

// raw is a peer that sends these bytes, and then no more.
func raw(says string) func(*testing.T, position, *authority) perform {
	return func(*testing.T, position, *authority) perform {
		return func(conn net.Conn) outcome {
			io.WriteString(conn, says)
			conn.(*net.TCPConn).CloseWrite()
			io.Copy(io.Discard, conn)
			return outcome{}
		}
	}
}

// A network may fall silent, or cut the connection, between any two flights of
// the handshake. Both sides end, at the step they were in.
func TestInterruptedBetweenFlights(t *testing.T) {
	const done = handshake.Step(0)
	for _, tt := range []struct {
		order  handshake.Order
		flight int // the first that does not arrive
		a, b   handshake.Step
	}{
		{handshake.CallerFirst, 0, handshake.StepCallerPresents, handshake.StepCallerPresents},
		{handshake.CallerFirst, 1, handshake.StepCalleeVerifies, handshake.StepCallerPresents},
		{handshake.CallerFirst, 2, handshake.StepCalleeVerifies, handshake.StepCallerVerifies},
		{handshake.CallerFirst, 3, done, handshake.StepCallerVerifies},
		{handshake.Standard, 0, handshake.StepCalleePresents, handshake.StepCalleePresents},
		{handshake.Standard, 1, handshake.StepCalleePresents, handshake.StepCallerVerifies},
		{handshake.Standard, 2, done, handshake.StepCallerVerifies},
	} {
		for _, silent := range []bool{true, false} {
			t.Run(fmt.Sprintf("%v/flight %d/silent %v", tt.order, tt.flight, silent), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					code := handshake.PeerClosed
					if silent {
						code = handshake.Timeout
					}
					a, b, took := interrupted(t, tt.order, &network{silent: silent, flights: tt.flight, records: -1})
					for side, got := range map[handshake.Side]outcome{handshake.Caller: a, handshake.Callee: b} {
						want := tt.a
						if side == handshake.Callee {
							want = tt.b
						}
						if side == handshake.Caller && want == done && tt.order == handshake.Standard && !silent {
							want = handshake.StepCalleeVerifies // a pipe has no buffer for the rest of the last flight
						}
						if want != done {
							refusal{want, code}.check(t, side, got)
						} else if got.err != nil {
							t.Errorf("%v: %v, want success", side, got.err)
						}
					}
					checkNothingDelivered(t, a, b)
					if want := 20 * time.Second; silent && took[handshake.Callee] != want {
						t.Errorf("Accept() took %v, want its timeout of %v", took[handshake.Callee], want)
					}
					if want := 10 * time.Second; silent && tt.a != done && took[handshake.Caller] != want {
						t.Errorf("Initiate() took %v, want the default of %v", took[handshake.Caller], want)
					}
				})
			})
		}
	}
}

// The same after any single TLS record: whatever happens, an application
// receives something only from a peer that completed its handshake.
func TestInterruptedAfterAnyRecord(t *testing.T) {
	for _, order := range orders {
		for records := range 16 {
			for _, silent := range []bool{true, false} {
				t.Run(fmt.Sprintf("%v/record %d/silent %v", order, records, silent), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						a, b, _ := interrupted(t, order, &network{silent: silent, flights: -1, records: records})
						for side, got := range map[handshake.Side]outcome{handshake.Caller: a, handshake.Callee: b} {
							e, failed := errors.AsType[*handshake.Error](got.err)
							if !failed && got.err != nil {
								t.Errorf("%v: %v is no *Error", side, got.err)
							}
							if failed {
								checkStopped(t, side, got, e)
							}
						}
						if len(a.received) > 0 && b.err != nil || len(b.received) > 0 && a.err != nil {
							t.Errorf("A: %v, received %q; B: %v, received %q", a.err, a.received, b.err, b.received)
						}
						if order == handshake.CallerFirst && b.err == nil && a.err != nil {
							t.Errorf("the callee completed (%v) and the caller did not: %v", trace(b.events), a.err)
						}
					})
				})
			}
		}
	}
}

// interrupted runs a handshake over the network n in a synctest bubble, and
// says how long each side took in the bubble's time.
func interrupted(t *testing.T, order handshake.Order, n *network) (a, b outcome, took map[handshake.Side]time.Duration) {
	t.Helper()
	ca := newAuthority(t)
	start := time.Now()
	timed := func(side handshake.Side, p perform) perform {
		return func(conn net.Conn) outcome {
			o := p(conn)
			if len(o.events) > 0 {
				n.mu.Lock()
				defer n.mu.Unlock()
				took[side] = o.events[len(o.events)-1].At.Sub(start)
			}
			return o
		}
	}
	took = map[handshake.Side]time.Duration{}
	connA, connB, stop := n.connect()
	defer stop()
	a, b = over(
		timed(handshake.Caller, initiate(t, handshake.Config{Order: order, SVID: ca.svid(t, idA, nil), Bundles: ca.bundle()}, idB)),
		timed(handshake.Callee, accept(t, handshake.Config{Order: order, SVID: ca.svid(t, idB, nil), Bundles: ca.bundle(), Timeout: 20 * time.Second}, only(idA))),
	)(connA, connB)
	return a, b, took
}

// A refused peer that does not read our alert holds us up until the timeout, and
// no longer; the reason stays what it was.
func TestRefusedPeerThatDoesNotRead(t *testing.T) {
	for _, at := range tlsServers {
		t.Run(at.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ca := newAuthority(t)
				peer := barePeer(at, newAuthority(t).svid(t, idA, nil), nil, lineA)
				cfg := handshake.Config{Order: at.order, SVID: ca.svid(t, idB, nil), Bundles: ca.bundle()}
				start := time.Now()
				// A pipe has no buffer: the peer is stuck writing its line,
				// which we never read, and so does not read either.
				connA, connB := net.Pipe()
				ours := initiate(t, cfg, idA)
				if at.side == handshake.Callee {
					ours = accept(t, cfg, only(idA))
				}
				got, _ := over(ours, peer)(connA, connB)
				refusal{at.weVerify(), handshake.CertificateUntrusted}.check(t, at.side, got)
				if took, want := time.Since(start), 10*time.Second; took != want {
					t.Errorf("took %v, want the default of %v", took, want)
				}
			})
		})
	}
}

// network carries TLS records between two ends until it has carried so many
// flights or records; -1 is no limit. A flight is all that goes one way until
// something goes the other way. After that it is silent, or closes both ends.
type network struct {
	silent           bool
	flights, records int

	mu       sync.Mutex
	from     int // guarded by mu: the end that sent the last record, 1 or 2, or 0
	cut      bool
	nflights int
	nrecords int
}

func (n *network) connect() (a, b net.Conn, stop func()) {
	a, innerA := net.Pipe()
	b, innerB := net.Pipe()
	var both sync.WaitGroup
	both.Go(func() { n.carry(1, innerA, innerB) })
	both.Go(func() { n.carry(2, innerB, innerA) })
	return a, b, func() {
		innerA.Close()
		innerB.Close()
		both.Wait()
	}
}

// carry carries records from one end to the other, and reads on, for the sender's
// sake, when they no longer arrive.
func (n *network) carry(from int, src, dst net.Conn) {
	for {
		record := make([]byte, 5)
		_, err := io.ReadFull(src, record)
		if err == nil {
			body := make([]byte, recordLength(record))
			_, err = io.ReadFull(src, body)
			record = append(record, body...)
		}
		switch carries := n.carries(from, err == nil); {
		case err != nil && carries:
			dst.Close()
			return
		case err != nil:
			return
		case carries:
			dst.Write(record)
		case !n.silent:
			src.Close()
			dst.Close()
		}
	}
}

func (n *network) carries(from int, record bool) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cut || !record {
		return !n.cut
	}
	if from != n.from {
		n.cut = n.nflights == n.flights
		n.from, n.nflights = from, n.nflights+1
	}
	n.cut = n.cut || n.nrecords == n.records
	n.nrecords++
	return !n.cut
}

// Somebody without credentials stands between two services that both wait to
// be called, or that both call, in different orders: one of each pair is a TLS
// client and the other a TLS server, so that their handshakes fit. Only the
// ALPN protocol tells them apart.
func TestSplice(t *testing.T) {
	ca := newAuthority(t)
	cfg := func(at position) handshake.Config {
		svid := ca.svid(t, idA, nil)
		if at.side == handshake.Callee {
			svid = ca.svid(t, idB, nil)
		}
		return handshake.Config{Order: at.order, SVID: svid, Bundles: ca.bundle()}
	}
	for _, tt := range []struct {
		name             string
		inverted, normal perform
		side             handshake.Side
	}{
		{"acceptor to acceptor",
			accept(t, cfg(position{handshake.CallerFirst, handshake.Callee}), only(idA, idB)),
			accept(t, cfg(position{handshake.Standard, handshake.Callee}), only(idA, idB)),
			handshake.Callee},
		{"initiator to initiator",
			initiate(t, cfg(position{handshake.CallerFirst, handshake.Caller}), idA),
			initiate(t, cfg(position{handshake.Standard, handshake.Caller}), idA),
			handshake.Caller},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inverted, normal := spliced(t, tt.inverted, tt.normal)
			refusal{handshake.StepCallerPresents, handshake.ALPNMismatch}.check(t, tt.side, inverted)
			refusal{handshake.StepCalleePresents, handshake.ALPNMismatch}.check(t, tt.side, normal)
			checkNothingDelivered(t, inverted, normal)
		})
	}
	// The control: with the same certificates and the same verification, and
	// without ALPN, the attack succeeds. It is the ALPN that stops it.
	t.Run("would succeed without ALPN", func(t *testing.T) {
		unguarded := func(c *tls.Config) {
			c.NextProtos = nil
			c.MinVersion = tls.VersionTLS13
			c.VerifyConnection = func(state tls.ConnectionState) error {
				_, err := handshake.Verify(state.PeerCertificates, ca.bundle(), time.Now())
				return err
			}
		}
		client := barePeer(tlsServers[0], ca.svid(t, idA, nil), unguarded, lineA)
		server := barePeer(tlsClients[0], ca.svid(t, idB, nil), unguarded, lineB)
		inverted, normal := spliced(t, client, server)
		if inverted.err != nil || normal.err != nil || string(inverted.received) != lineB || string(normal.received) != lineA {
			t.Errorf("the attack failed on the unguarded: %v, %v", inverted.err, normal.err)
		}
	})
	// Within one order both are TLS clients, or both servers.
	t.Run("within one order", func(t *testing.T) {
		for _, order := range orders {
			one, two := spliced(t,
				accept(t, cfg(position{order, handshake.Callee}), only(idA, idB)),
				accept(t, withTimeout(cfg(position{order, handshake.Callee})), only(idA, idB)))
			if one.err == nil || two.err == nil {
				t.Errorf("%v: Accept() = %v and %v", order, one.err, two.err)
			}
			checkNothingDelivered(t, one, two)
		}
	})
}

// withTimeout is for two TLS servers, which would wait for each other.
func withTimeout(cfg handshake.Config) handshake.Config {
	cfg.Timeout = 50 * time.Millisecond
	return cfg
}

// spliced runs two services, each on a connection of its own with somebody who
// copies everything from the one to the other.
func spliced(t *testing.T, one, two perform) (outcome, outcome) {
	t.Helper()
	endOne, middleOne := tcpPair(t)
	middleTwo, endTwo := tcpPair(t)
	var copies sync.WaitGroup
	splice := func(dst, src net.Conn) {
		io.Copy(dst, src)
		dst.(*net.TCPConn).CloseWrite()
	}
	copies.Go(func() { splice(middleOne, middleTwo) })
	copies.Go(func() { splice(middleTwo, middleOne) })
	defer copies.Wait()
	return over(one, two)(endOne, endTwo)
}
