package handshake_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"troth.dev/troth/handshake"
)

var orders = []handshake.Order{handshake.CallerFirst, handshake.Standard}

// Both sides play an application: who has a Conn sends its line at once, and
// reads the other's.
const (
	lineA = "from A: nobody else may read this\n"
	lineB = "from B: nobody else may read this\n"
)

// outcome is what became of one side: of its handshake and of its application.
type outcome struct {
	conn     *handshake.Conn // closed
	err      error           // of the handshake
	events   []handshake.Event
	returned int    // how many of the events there were when the handshake returned
	wrote    []byte // to the wire
	received []byte // by the application
	readErr  error  // of the application, nil at its end
}

// perform runs a handshake and, if it succeeds, the application.
type perform func(net.Conn) outcome

func initiate(t *testing.T, cfg handshake.Config, peer spiffeid.ID) perform {
	return func(conn net.Conn) outcome {
		return play(&cfg, conn, lineA, func(conn net.Conn) (*handshake.Conn, error) {
			return handshake.Initiate(t.Context(), conn, &cfg, peer)
		})
	}
}

func accept(t *testing.T, cfg handshake.Config, authorize func(spiffeid.ID) error) perform {
	return func(conn net.Conn) outcome {
		return play(&cfg, conn, lineB, func(conn net.Conn) (*handshake.Conn, error) {
			return handshake.Accept(t.Context(), conn, &cfg, authorize)
		})
	}
}

func play(cfg *handshake.Config, conn net.Conn, line string, shake func(net.Conn) (*handshake.Conn, error)) outcome {
	var o outcome
	cfg.Trace = func(e handshake.Event) { o.events = append(o.events, e) }
	wire := &tap{Conn: conn}
	o.conn, o.err = shake(wire)
	o.returned = len(o.events)
	if o.err == nil {
		o.conn.SetDeadline(time.Now().Add(time.Minute)) // for a peer that is cut off
		io.WriteString(o.conn, line)
		o.conn.CloseWrite()
		o.received, o.readErr = io.ReadAll(o.conn)
		o.conn.Close()
	}
	o.wrote = wire.written()
	return o
}

// tap remembers what is written to a connection.
type tap struct {
	net.Conn
	mu  sync.Mutex
	buf bytes.Buffer
}

func (c *tap) Write(b []byte) (int, error) {
	c.mu.Lock()
	c.buf.Write(b)
	c.mu.Unlock()
	return c.Conn.Write(b)
}

func (c *tap) written() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return bytes.Clone(c.buf.Bytes())
}

// connect runs both sides, each in its own goroutine, over one loopback
// connection.
func connect(t *testing.T, a, b perform) (outcome, outcome) {
	t.Helper()
	return over(a, b)(tcpPair(t))
}

func over(a, b perform) func(net.Conn, net.Conn) (outcome, outcome) {
	return func(connA, connB net.Conn) (outcome, outcome) {
		var outA outcome
		done := make(chan struct{})
		go func() {
			defer close(done)
			outA = a(connA)
		}()
		outB := b(connB)
		<-done
		return outA, outB
	}
}

// tcpPair returns the two ends of a loopback connection, closed by the end of
// the test at the latest.
func tcpPair(t testing.TB) (a, b net.Conn) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	a, err = net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err = listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.Close()
		b.Close()
	})
	return a, b
}

func only(ids ...spiffeid.ID) func(spiffeid.ID) error {
	return func(id spiffeid.ID) error {
		for _, want := range ids {
			if id == want {
				return nil
			}
		}
		return errors.New("not on the list")
	}
}

// trace is what a test expects of events, one line each.
func trace(events []handshake.Event) []string {
	var lines []string
	for _, e := range events {
		line := fmt.Sprintf("%d %v", int(e.Step), e.Side)
		if !e.Peer.IsZero() {
			line += " " + e.Peer.Path()
		}
		if e.Err != nil {
			line += " " + string(e.Err.Code)
		}
		lines = append(lines, line)
	}
	return lines
}

func TestBothVerified(t *testing.T) {
	ca := newAuthority(t)
	middle := ca.intermediate(t, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(time.Minute) })
	svidA, svidB := ca.svid(t, idA, nil), middle.svid(t, idB, nil)
	svidB.Certificates = append(svidB.Certificates, middle.cert)
	for order, want := range map[handshake.Order][2][]string{
		handshake.CallerFirst: {{
			"1 caller",
			"2 caller",
			"3 caller",
			"4 caller /ns/shop/sa/stock",
			"5 caller /ns/shop/sa/stock",
			"6 caller /ns/shop/sa/stock",
		}, {
			"1 callee",
			"2 callee /ns/shop/sa/cart",
			"3 callee /ns/shop/sa/cart",
			"4 callee /ns/shop/sa/cart",
			"5 callee /ns/shop/sa/cart",
			"6 callee /ns/shop/sa/cart",
		}},
		handshake.Standard: {{
			"3 caller",
			"4 caller /ns/shop/sa/stock",
			"1 caller /ns/shop/sa/stock",
			"2 caller /ns/shop/sa/stock",
			"5 caller /ns/shop/sa/stock",
			"6 caller /ns/shop/sa/stock",
		}, {
			"3 callee",
			"4 callee",
			"1 callee",
			"2 callee /ns/shop/sa/cart",
			"5 callee /ns/shop/sa/cart",
			"6 callee /ns/shop/sa/cart",
		}},
	} {
		t.Run(order.String(), func(t *testing.T) {
			a, b := connect(t,
				initiate(t, handshake.Config{Order: order, SVID: svidA, Bundles: ca.bundle()}, idB),
				accept(t, handshake.Config{Order: order, SVID: svidB, Bundles: ca.bundle()}, only(idA)))
			if a.err != nil || b.err != nil {
				t.Fatalf("Initiate() = %v, Accept() = %v", a.err, b.err)
			}
			if diff := cmp.Diff(want, [2][]string{trace(a.events), trace(b.events)}); diff != "" {
				t.Errorf("events (-want +got):\n%s", diff)
			}
			want := [2]int{5, 5}
			if order == handshake.Standard {
				want[0] = 3 // nobody has told the caller that it was verified
			}
			if got := [2]int{a.returned, b.returned}; got != want {
				t.Errorf("events on return: %v, want %v", got, want)
			}
			if string(a.received) != lineB || string(b.received) != lineA || a.readErr != nil || b.readErr != nil {
				t.Errorf("A received %q, %v; B received %q, %v", a.received, a.readErr, b.received, b.readErr)
			}
			if a.conn.PeerID() != idB || b.conn.PeerID() != idA || a.conn.Order() != order || b.conn.Order() != order {
				t.Errorf("A has %v %v, B has %v %v", a.conn.Order(), a.conn.PeerID(), b.conn.Order(), b.conn.PeerID())
			}
			if got, want := a.conn.PeerExpiry(), svidB.Certificates[1].NotAfter; !got.Equal(want) {
				t.Errorf("PeerExpiry() = %v, want the intermediate's %v", got, want)
			}
			if got := b.conn.PeerAuthority(); !got.Equal(ca.cert) {
				t.Errorf("PeerAuthority() = %v", got.Subject)
			}
			state := a.conn.ConnectionState()
			if state.Version != tls.VersionTLS13 || state.CurveID != tls.X25519MLKEM768 || state.DidResume {
				t.Errorf("TLS version %x, curve %v, resumed %v", state.Version, state.CurveID, state.DidResume)
			}
			for _, e := range append(a.events, b.events...) {
				if e.Order != order || e.At.IsZero() {
					t.Errorf("event %+v lacks order or time", e)
				}
			}
			for _, out := range []outcome{a, b} {
				if bytes.Contains(out.wrote, []byte("nobody else")) {
					t.Error("an application line crossed in the clear")
				}
			}
		})
	}
}

// refusal is what one side has to show for a handshake that stopped.
type refusal struct {
	step handshake.Step
	code handshake.Code
}

func (want refusal) check(t *testing.T, side handshake.Side, got outcome) {
	t.Helper()
	e, ok := errors.AsType[*handshake.Error](got.err)
	if !ok {
		t.Errorf("%v: error %v (%T), want step %d, %v", side, got.err, got.err, int(want.step), want.code)
		return
	}
	if e.Step != want.step || e.Code != want.code || e.Side != side {
		t.Errorf("%v: %v (side %v), want step %d, %v", side, e, e.Side, int(want.step), want.code)
	}
	checkStopped(t, side, got, e)
}

// checkStopped checks the trace of a handshake that stopped with want: exactly one
// failing event, the last one.
func checkStopped(t *testing.T, side handshake.Side, got outcome, want *handshake.Error) {
	t.Helper()
	failures := 0
	for _, event := range got.events {
		if event.Err != nil {
			failures++
		}
	}
	if n := len(got.events); failures != 1 || got.events[n-1].Err != want || got.events[n-1].Step != want.Step {
		t.Errorf("%v: events %q, want one failure, the last", side, trace(got.events))
	}
}

// A peer with a bad certificate is refused by whoever it shows it to, at the
// step in which that side verifies, with the exact reason, and learns none.
func TestBadCertificateIsRefused(t *testing.T) {
	ca := newAuthority(t)
	good := ca.svid(t, idB, nil)
	for _, tt := range spoiledCertificates() {
		if tt.want == handshake.CertificateExpired && tt.name == "expired" || tt.name == "not yet valid" {
			continue // a good peer never sends these: see TestOwnSVID; the bare peers below do
		}
		for _, order := range orders {
			bad := tt.svid(t, ca)
			t.Run(fmt.Sprintf("%v/%v/caller", tt.name, order), func(t *testing.T) {
				a, b := connect(t,
					initiate(t, handshake.Config{Order: order, SVID: bad, Bundles: ca.bundle()}, idB),
					accept(t, handshake.Config{Order: order, SVID: good, Bundles: ca.bundle()}, only(idA)))
				refusal{handshake.StepCalleeVerifies, tt.want}.check(t, handshake.Callee, b)
				checkRefusedByPeer(t, order, handshake.Caller, a)
				checkNothingDelivered(t, a, b)
				if order == handshake.CallerFirst {
					checkRevealedNothing(t, b)
				}
			})
			t.Run(fmt.Sprintf("%v/%v/callee", tt.name, order), func(t *testing.T) {
				a, b := connect(t,
					initiate(t, handshake.Config{Order: order, SVID: good, Bundles: ca.bundle()}, idA),
					accept(t, handshake.Config{Order: order, SVID: bad, Bundles: ca.bundle()}, only(idB)))
				refusal{handshake.StepCallerVerifies, tt.want}.check(t, handshake.Caller, a)
				checkRefusedByPeer(t, order, handshake.Callee, b)
				checkNothingDelivered(t, a, b)
			})
		}
	}
}

// Whoever's certificate is good is still refused if it is the wrong peer.
func TestWrongPeerIsRefused(t *testing.T) {
	ca := newAuthority(t)
	svidA, svidB := ca.svid(t, idA, nil), ca.svid(t, idB, nil)
	for _, order := range orders {
		for _, tt := range []struct {
			name      string
			authorize func(spiffeid.ID) error
		}{
			{"not authorized", only(stranger)},
			{"nil authorize", nil},
		} {
			t.Run(fmt.Sprintf("%v/%v", order, tt.name), func(t *testing.T) {
				a, b := connect(t,
					initiate(t, handshake.Config{Order: order, SVID: svidA, Bundles: ca.bundle()}, idB),
					accept(t, handshake.Config{Order: order, SVID: svidB, Bundles: ca.bundle()}, tt.authorize))
				refusal{handshake.StepCalleeVerifies, handshake.NotAuthorized}.check(t, handshake.Callee, b)
				if e, _ := errors.AsType[*handshake.Error](b.err); e.Peer != idA {
					t.Errorf("the error names %v, want %v", e.Peer, idA)
				}
				checkRefusedByPeer(t, order, handshake.Caller, a)
				checkNothingDelivered(t, a, b)
				if order == handshake.CallerFirst {
					checkRevealedNothing(t, b)
				}
			})
		}
		for name, expected := range map[string]spiffeid.ID{"somebody else": stranger, "nobody": {}} {
			t.Run(fmt.Sprintf("%v/%v expected", order, name), func(t *testing.T) {
				a, b := connect(t,
					initiate(t, handshake.Config{Order: order, SVID: svidA, Bundles: ca.bundle()}, expected),
					accept(t, handshake.Config{Order: order, SVID: svidB, Bundles: ca.bundle()}, only(idA)))
				refusal{handshake.StepCallerVerifies, handshake.PeerUnexpected}.check(t, handshake.Caller, a)
				checkRefusedByPeer(t, order, handshake.Callee, b)
				checkNothingDelivered(t, a, b)
			})
		}
	}
}

// checkRefusedByPeer checks the side whose certificate the other refused: the
// other's step of verifying did not come to pass, and no reason arrived. The
// caller of a standard handshake hears of it only with its first Read.
func checkRefusedByPeer(t *testing.T, order handshake.Order, side handshake.Side, got outcome) {
	t.Helper()
	want := refusal{handshake.StepCallerVerifies, handshake.PeerRefused}
	if side == handshake.Caller {
		want.step = handshake.StepCalleeVerifies
	}
	if order == handshake.Standard && side == handshake.Caller {
		if got.err != nil {
			t.Errorf("Initiate() = %v, though a standard caller is done before it is verified", got.err)
		}
		got.err = got.readErr
	}
	want.check(t, side, got)
}

func checkNothingDelivered(t *testing.T, outcomes ...outcome) {
	t.Helper()
	for _, o := range outcomes {
		if len(o.received) > 0 {
			t.Errorf("an application received %q", o.received)
		}
	}
}

// checkRevealedNothing checks, on the wire, that a caller-first callee sent a
// ClientHello and no more than an alert. What it sends after the ClientHello is
// encrypted, but a record tells its length: 2 bytes of alert, 1 byte of type and
// 16 of authentication are 19. A Certificate message cannot be that short.
func checkRevealedNothing(t *testing.T, callee outcome) {
	t.Helper()
	const (
		changeCipherSpec = 20
		alert            = 21
		handshakeRecord  = 22
		applicationData  = 23
	)
	records := split(t, callee.wrote)
	if len(records) == 0 || records[0][0] != handshakeRecord {
		t.Fatalf("the callee did not begin with a ClientHello: %x", callee.wrote)
	}
	for i, r := range records[1:] {
		payload := len(r) - 5
		switch r[0] {
		case changeCipherSpec, alert:
		case applicationData:
			if payload > 19 {
				t.Errorf("record %d of the callee has %d encrypted bytes, more than an alert", i+1, payload)
			}
		default:
			t.Errorf("record %d of the callee is of type %d", i+1, r[0])
		}
	}
}

// split returns the TLS records in b, headers included.
func split(t *testing.T, b []byte) [][]byte {
	t.Helper()
	var records [][]byte
	for len(b) > 0 {
		if len(b) < 5 || len(b) < 5+recordLength(b) {
			t.Fatalf("half a TLS record: %x", b)
		}
		n := 5 + recordLength(b)
		records, b = append(records, b[:n]), b[n:]
	}
	return records
}

func recordLength(header []byte) int { return int(header[3])<<8 | int(header[4]) }

// checkRevealedNothing itself has to be able to fail: a callee that completes
// does reveal its certificate.
func TestCompletedCalleeRevealsItself(t *testing.T) {
	ca := newAuthority(t)
	_, b := connect(t,
		initiate(t, handshake.Config{Order: handshake.CallerFirst, SVID: ca.svid(t, idA, nil), Bundles: ca.bundle()}, idB),
		accept(t, handshake.Config{Order: handshake.CallerFirst, SVID: ca.svid(t, idB, nil), Bundles: ca.bundle()}, only(idA)))
	longest := 0
	for _, r := range split(t, b.wrote)[1:] {
		longest = max(longest, len(r))
	}
	if leaf := len(b.conn.ConnectionState().PeerCertificates[0].Raw); longest < leaf {
		t.Errorf("the longest record of a completed callee has %d bytes, shorter than a certificate of %d", longest, leaf)
	}
}

// An SVID of our own that is no good stops the handshake before anything is
// sent.
func TestOwnSVID(t *testing.T) {
	ca := newAuthority(t)
	empty := &rotating{}
	for _, tt := range []struct {
		name string
		svid x509svid.Source
		want handshake.Code
	}{
		{"missing", empty, handshake.OwnSVIDMissing},
		{"nil", (*x509svid.SVID)(nil), handshake.OwnSVIDMissing},
		{"without certificate", &x509svid.SVID{ID: idA, PrivateKey: newKey(t)}, handshake.OwnSVIDMissing},
		{"without key", &x509svid.SVID{ID: idA, Certificates: ca.svid(t, idA, nil).Certificates}, handshake.OwnSVIDMissing},
		{"expired", ca.svid(t, idA, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-2 * time.Second) }), handshake.OwnSVIDExpired},
		{"not yet valid", ca.svid(t, idA, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }), handshake.OwnSVIDNotYetValid},
	} {
		for order, step := range map[handshake.Order]handshake.Step{
			handshake.CallerFirst: handshake.StepCallerPresents,
			handshake.Standard:    handshake.StepCalleePresents,
		} {
			t.Run(fmt.Sprintf("%v/%v", tt.name, order), func(t *testing.T) {
				cfg := handshake.Config{Order: order, SVID: tt.svid, Bundles: ca.bundle()}
				a, b := connect(t, initiate(t, cfg, idB), accept(t, cfg, only(idA)))
				refusal{step, tt.want}.check(t, handshake.Caller, a)
				refusal{step, tt.want}.check(t, handshake.Callee, b)
				if len(a.wrote)+len(b.wrote) > 0 {
					t.Errorf("A wrote %x, B wrote %x, want nothing", a.wrote, b.wrote)
				}
			})
		}
	}
}

func TestConfigIsChecked(t *testing.T) {
	ca := newAuthority(t)
	svid := ca.svid(t, idA, nil)
	for name, cfg := range map[string]handshake.Config{
		"zero":             {},
		"no order":         {SVID: svid, Bundles: ca.bundle()},
		"unknown order":    {Order: 3, SVID: svid, Bundles: ca.bundle()},
		"no SVID":          {Order: handshake.Standard, Bundles: ca.bundle()},
		"no bundles":       {Order: handshake.Standard, SVID: svid},
		"negative timeout": {Order: handshake.Standard, SVID: svid, Bundles: ca.bundle(), Timeout: -1},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := connect(t, initiate(t, cfg, idB), accept(t, cfg, only(idA)))
			if a.err == nil || b.err == nil || len(a.wrote)+len(b.wrote) > 0 {
				t.Errorf("Initiate() = %v after %x, Accept() = %v after %x", a.err, a.wrote, b.err, b.wrote)
			}
		})
	}
}

// Each handshake is decided anew: no session is resumed, and SVID, bundle and
// authorization are those of the moment.
func TestEachHandshakeIsDecidedAnew(t *testing.T) {
	for _, order := range orders {
		t.Run(order.String(), func(t *testing.T) {
			ca, next := newAuthority(t), newAuthority(t)
			bundle := ca.bundle()
			var svidA rotating
			svidA.set(ca.svid(t, idA, nil))
			allowed := idA
			asked := 0
			connectAgain := func() (outcome, outcome) {
				return connect(t,
					initiate(t, handshake.Config{Order: order, SVID: &svidA, Bundles: ca.bundle()}, idB),
					accept(t, handshake.Config{Order: order, SVID: ca.svid(t, idB, nil), Bundles: bundle}, func(id spiffeid.ID) error {
						asked++
						return only(allowed)(id)
					}))
			}
			succeeds := func(what string, id spiffeid.ID) {
				t.Helper()
				a, b := connectAgain()
				if a.err != nil || b.err != nil || b.conn.PeerID() != id || string(b.received) != lineA {
					t.Fatalf("%s: Initiate() = %v, Accept() = %v", what, a.err, b.err)
				}
				if a.conn.ConnectionState().DidResume || b.conn.ConnectionState().DidResume {
					t.Errorf("%s: the session was resumed", what)
				}
			}
			refused := func(what string, code handshake.Code) {
				t.Helper()
				a, b := connectAgain()
				refusal{handshake.StepCalleeVerifies, code}.check(t, handshake.Callee, b)
				checkNothingDelivered(t, a, b)
			}

			succeeds("at first", idA)
			succeeds("again", idA)
			if asked != 2 {
				t.Errorf("authorize was asked %d times for 2 connections", asked)
			}
			allowed = stranger
			refused("policy turned", handshake.NotAuthorized)
			svidA.set(ca.svid(t, stranger, nil))
			succeeds("SVID rotated", stranger)
			bundle.SetX509Authorities([]*x509.Certificate{next.cert})
			refused("bundle replaced", handshake.CertificateUntrusted)
			svidA.set(next.svid(t, stranger, nil))
			succeeds("SVID of the next authority", stranger)
		})
	}
}

// Half-close and bulk work in both directions at once.
func TestTransfer(t *testing.T) {
	const size = 8 << 20
	ca := newAuthority(t)
	for _, order := range orders {
		t.Run(order.String(), func(t *testing.T) {
			cfg := handshake.Config{Order: order, Bundles: ca.bundle()}
			cfgA, cfgB := cfg, cfg
			cfgA.SVID, cfgB.SVID = ca.svid(t, idA, nil), ca.svid(t, idB, nil)
			run := func(conn *handshake.Conn, fill byte) error {
				defer conn.Close()
				sent := make(chan error, 1) // one result
				go func() {
					_, err := conn.Write(bytes.Repeat([]byte{fill}, size))
					sent <- errors.Join(err, conn.CloseWrite())
				}()
				got, err := io.ReadAll(conn)
				if err == nil && !bytes.Equal(got, bytes.Repeat([]byte{'a' + 'b' - fill}, size)) {
					err = fmt.Errorf("%d bytes are not what was sent", len(got))
				}
				return errors.Join(err, <-sent)
			}
			connA, connB := tcpPair(t)
			result := make(chan error, 1) // one result
			go func() {
				conn, err := handshake.Initiate(t.Context(), connA, &cfgA, idB)
				if err == nil {
					err = run(conn, 'a')
				}
				result <- err
			}()
			conn, err := handshake.Accept(t.Context(), connB, &cfgB, only(idA))
			if err == nil {
				err = run(conn, 'b')
			}
			if err := errors.Join(err, <-result); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestContextEndsTheHandshake(t *testing.T) {
	ca := newAuthority(t)
	cfg := handshake.Config{Order: handshake.CallerFirst, SVID: ca.svid(t, idA, nil), Bundles: ca.bundle()}
	a, _ := tcpPair(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := handshake.Initiate(ctx, a, &cfg, idB); codeOf(err) != handshake.Canceled || !errors.Is(err, context.Canceled) {
		t.Errorf("Initiate(canceled) = %v", err)
	}
	if _, err := a.Write([]byte{0}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the connection is not closed: Write() = %v", err)
	}
}
