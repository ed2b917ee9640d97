package directory_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"troth.dev/troth/agent/directory"
	"troth.dev/troth/agent/proxy"
	trothv1 "troth.dev/troth/api/troth/v1"
)

const (
	plaintext = trothv1.Protocol_PROTOCOL_PLAINTEXT
	hbone     = trothv1.Protocol_PROTOCOL_HBONE
	troth     = trothv1.Protocol_PROTOCOL_TROTH
)

var values = cmp.Options{
	cmpopts.EquateComparable(netip.AddrPort{}, spiffeid.ID{}), cmpopts.EquateEmpty(),
}

// at is an endpoint as the data path knows it.
func at(address, pod string, protocol proxy.Protocol) proxy.Endpoint {
	e := proxy.Endpoint{Address: netip.MustParseAddrPort(address), Protocol: protocol, Pod: pod}
	if protocol == proxy.HBONE || protocol == proxy.Troth {
		e.ID = spiffeid.RequireFromString(cart)
	}
	return e
}

func TestResolve(t *testing.T) {
	ported := podAt("10.0.0.2", "ported", troth)
	ported.GetPod().PortProtocols = map[uint32]trothv1.Protocol{8080: plaintext, 9090: hbone, 7070: 9}
	bare := &trothv1.Endpoint{Address: "10.0.0.9", Port: 9000, Protocol: plaintext}
	offered := endpoint("10.0.0.3", 8080, "a", plaintext)
	offered.PortProtocols = map[uint32]trothv1.Protocol{8080: troth}
	newer := endpoint("10.0.0.4", 8080, "b", 17)
	newer.SpiffeId = ""
	p := newPlane()
	p.answers = map[string]*trothv1.ResolveResponse{
		"10.0.0.1": podAt("10.0.0.1", "cart", troth),
		"10.0.0.2": ported,
		"10.0.0.5": podAt("10.0.0.5", "plain", plaintext),
		"10.0.0.6": podAt("10.0.0.6", "unspecified", 0),
		"10.1.0.1": serviceOf(&trothv1.Service{
			Namespace: "shop", Name: "cart", Affinity: durationpb.New(3 * time.Hour),
			Ports: []*trothv1.ServicePort{
				{Port: 80, Endpoints: []*trothv1.Endpoint{offered, newer, bare}},
				{Port: 443},
			},
		}),
		"10.1.0.2": serviceOf(&trothv1.Service{
			Namespace: "shop", Name: "long", Affinity: durationpb.New(1000 * time.Hour), Ports: []*trothv1.ServicePort{{Port: 80}},
		}),
		"fd00::1": podAt("fd00::1", "six", hbone),
	}
	d := newAgent(t, 0)
	d.run(t, p.serve(t))
	for _, tt := range []struct {
		name, destination string
		want              proxy.Destination
	}{
		{"a pod", "10.0.0.1:80", proxy.Destination{Endpoints: []proxy.Endpoint{at("10.0.0.1:80", "shop/cart", proxy.Troth)}}},
		{"a pod, mapped", "[::ffff:10.0.0.1]:80", proxy.Destination{Endpoints: []proxy.Endpoint{at("10.0.0.1:80", "shop/cart", proxy.Troth)}}},
		{"a pod's port that is called otherwise", "10.0.0.2:9090", proxy.Destination{Endpoints: []proxy.Endpoint{at("10.0.0.2:9090", "shop/ported", proxy.HBONE)}}},
		{"a pod's port in plaintext", "10.0.0.2:8080", proxy.Destination{Endpoints: []proxy.Endpoint{at("10.0.0.2:8080", "shop/ported", proxy.Plaintext)}}},
		{"a pod's port by what nobody knows", "10.0.0.2:7070", proxy.Destination{Endpoints: []proxy.Endpoint{at("10.0.0.2:7070", "shop/ported", 0)}}},
		{"a pod in plaintext", "10.0.0.5:80", proxy.Destination{Endpoints: []proxy.Endpoint{at("10.0.0.5:80", "shop/plain", proxy.Plaintext)}}},
		{"a pod by the unspecified protocol", "10.0.0.6:80", proxy.Destination{Endpoints: []proxy.Endpoint{at("10.0.0.6:80", "shop/unspecified", 0)}}},
		{"a pod by IPv6", "[fd00::1]:80", proxy.Destination{Endpoints: []proxy.Endpoint{at("[fd00::1]:80", "shop/six", proxy.HBONE)}}},
		{"a Service", "10.1.0.1:80", proxy.Destination{Service: "shop/cart", Affinity: 3 * time.Hour, Endpoints: []proxy.Endpoint{
			at("10.0.0.3:8080", "shop/a", proxy.Troth), at("10.0.0.4:8080", "shop/b", 0), at("10.0.0.9:9000", "", proxy.Plaintext),
		}}},
		{"a Service without endpoints", "10.1.0.1:443", proxy.Destination{Service: "shop/cart", Affinity: 3 * time.Hour}},
		{"a port that a Service has not", "10.1.0.1:8080", proxy.Destination{Service: "shop/cart", Affinity: 3 * time.Hour}},
		{"an affinity beyond a day", "10.1.0.2:80", proxy.Destination{Service: "shop/long", Affinity: 24 * time.Hour}},
		{"nobody", "192.0.2.1:443", proxy.Destination{Endpoints: []proxy.Endpoint{at("192.0.2.1:443", "", proxy.Plaintext)}}},
		{"nobody, on a link", "[fe80::1%eth0]:443", proxy.Destination{Endpoints: []proxy.Endpoint{at("[fe80::1%eth0]:443", "", proxy.Plaintext)}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(&tt.want, d.resolve(t, tt.destination), values); diff != "" {
				t.Error(diff)
			}
		})
	}
	for _, destination := range []netip.AddrPort{{}, netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), 0), netip.AddrPortFrom(netip.Addr{}, 80)} {
		if got, err := d.Resolve(t.Context(), destination); err == nil {
			t.Errorf("Resolve(%v) = %+v, want an error", destination, got)
		}
	}
}

// What makes no sense is refused, and ends neither the session nor what else it says.
func TestAnswersThatMakeNoSense(t *testing.T) {
	const address = "10.0.0.1"
	pod := func(edit func(*trothv1.Endpoint)) *trothv1.ResolveResponse {
		r := podAt(address, "cart", troth)
		edit(r.GetPod())
		return r
	}
	service := func(edit func(*trothv1.Service)) *trothv1.ResolveResponse {
		s := &trothv1.Service{Namespace: "shop", Name: "cart", Ports: []*trothv1.ServicePort{
			{Port: 80, Endpoints: []*trothv1.Endpoint{endpoint("10.0.0.3", 8080, "a", troth)}},
		}}
		edit(s)
		return serviceOf(s)
	}
	unknown := new(trothv1.ResolveResponse)
	unknown.ProtoReflect().SetUnknown([]byte{15 << 3, 1})
	p := newPlane()
	d := newAgent(t, 0)
	_, done := d.run(t, p.serve(t))
	d.resolve(t, address+":80")
	for _, tt := range []struct {
		name   string
		answer *trothv1.ResolveResponse
		err    string
	}{
		{"a kind that nobody knows", unknown, "somebody of an unknown kind"},
		{"an empty pod", &trothv1.ResolveResponse{Behind: &trothv1.ResolveResponse_Pod{}}, `a pod: "" is no address`},
		{"an empty Service", &trothv1.ResolveResponse{Behind: &trothv1.ResolveResponse_Service{}}, "a Service: a name of 0 bytes"},
		{"another address", pod(func(e *trothv1.Endpoint) { e.Address = "10.0.0.2" }), "the pod of another address, 10.0.0.2"},
		{"no address", pod(func(e *trothv1.Endpoint) { e.Address = "cart" }), `"cart" is no address`},
		{"a mapped address", pod(func(e *trothv1.Endpoint) { e.Address = "::ffff:10.0.0.1" }), "is not how an address is spelled"},
		{"an address on a link", pod(func(e *trothv1.Endpoint) { e.Address = "fe80::1%eth0" }), "is not how an address is spelled"},
		{"a long address", pod(func(e *trothv1.Endpoint) { e.Address = strings.Repeat("0", 40) }), "an address of 40 bytes"},
		{"no UID", pod(func(e *trothv1.Endpoint) { e.PodUid = "" }), "a pod without a UID"},
		{"no namespace", pod(func(e *trothv1.Endpoint) { e.Namespace = "" }), "a name of 0 bytes"},
		{"a long name", pod(func(e *trothv1.Endpoint) { e.Name = strings.Repeat("a", 254) }), "a name of 254 bytes"},
		{"no SPIFFE ID", pod(func(e *trothv1.Endpoint) { e.SpiffeId = "" }), `SPIFFE ID "": `},
		{"no SPIFFE ID for HBONE at a port", pod(func(e *trothv1.Endpoint) {
			e.SpiffeId, e.Protocol, e.PortProtocols = "", plaintext, map[uint32]trothv1.Protocol{80: hbone}
		}), `SPIFFE ID "": `},
		{"a trust domain", pod(func(e *trothv1.Endpoint) { e.SpiffeId = "spiffe://example.org" }), "is a trust domain and no workload"},
		{"a long SPIFFE ID", pod(func(e *trothv1.Endpoint) { e.SpiffeId = "spiffe://example.org/" + strings.Repeat("a", 2048) }), "a SPIFFE ID of 2069 bytes"},
		{"port 0", pod(func(e *trothv1.Endpoint) { e.PortProtocols = map[uint32]trothv1.Protocol{0: troth} }), "there is no port 0"},
		{"a port beyond all", pod(func(e *trothv1.Endpoint) { e.PortProtocols = map[uint32]trothv1.Protocol{65_536: troth} }), "there is no port 65536"},
		{"a Service's port 0", service(func(s *trothv1.Service) { s.Ports[0].Port = 0 }), "there is no port 0"},
		{"a Service's port twice", service(func(s *trothv1.Service) { s.Ports = append(s.Ports, s.Ports[0]) }), "port 80 twice"},
		{"an endpoint's port 0", service(func(s *trothv1.Service) { s.Ports[0].Endpoints[0].Port = 0 }), "port 80: an endpoint: there is no port 0"},
		{"an endpoint at no address", service(func(s *trothv1.Service) { s.Ports[0].Endpoints[0].Address = "0.0.0.0" }), "nobody can have 0.0.0.0"},
		{"an endpoint at many", service(func(s *trothv1.Service) { s.Ports[0].Endpoints[0].Address = "ff02::1" }), "nobody can have ff02::1"},
		{"an affinity into the past", service(func(s *trothv1.Service) { s.Affinity = durationpb.New(-1) }), "affinity of -1ns"},
		{"an affinity that is none", service(func(s *trothv1.Service) { s.Affinity = &durationpb.Duration{Seconds: math.MaxInt64} }), "affinity: "},
		{"too many endpoints", service(func(s *trothv1.Service) {
			s.Ports[0].Endpoints = make([]*trothv1.Endpoint, 65_537)
			for n := range s.Ports[0].Endpoints {
				s.Ports[0].Endpoints[n] = &trothv1.Endpoint{}
			}
		}), "more than 65536 endpoints"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := d.metric(t, "refused_answers_total", "")
			p.set(address, tt.answer)
			err := eventually(t, d, address+":80", func(got *proxy.Destination, err error) bool { return err != nil })
			if !strings.Contains(err.Error(), tt.err) || !strings.HasPrefix(err.Error(), "directory: who has 10.0.0.1: ") {
				t.Errorf("the error is %q, want one of %q", err, tt.err)
			}
			if got := d.metric(t, "refused_answers_total", ""); got != before+1 {
				t.Errorf("%v answers are refused, want %v", got, before+1)
			}
			p.set(address, podAt(address, "cart", troth))
			eventually(t, d, address+":80", func(got *proxy.Destination, err error) bool { return err == nil })
		})
	}
	select {
	case err := <-done:
		t.Errorf("the session ended: %v", err)
	default:
	}
}

// eventually resolves until it is as wanted.
func eventually(tb testing.TB, d *agent, destination string, is func(*proxy.Destination, error) bool) error {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), patience)
	defer cancel()
	for {
		got, err := d.Resolve(ctx, netip.MustParseAddrPort(destination))
		if is(got, err) {
			return err
		}
		if ctx.Err() != nil {
			tb.Fatalf("Resolve(%s) stays %+v, %v", destination, got, err)
		}
		runtime.Gosched()
	}
}

// An answer for what is no address ends the session: nobody knows what it is about.
func TestAnswerForNoAddress(t *testing.T) {
	p := newPlane()
	d := newAgent(t, 0)
	_, done := d.run(t, p.serve(t))
	d.resolve(t, "10.0.0.1:80")
	p.send(&trothv1.ResolveResponse{Address: "nowhere"})
	if err := <-done; err == nil || !strings.Contains(err.Error(), `an answer for no address: "nowhere"`) {
		t.Errorf("Run() = %v", err)
	}
}

func TestChangesAreSeen(t *testing.T) {
	p := newPlane()
	p.answers["10.0.0.1"] = podAt("10.0.0.1", "first", troth)
	d := newAgent(t, 0)
	d.run(t, p.serve(t))
	d.resolve(t, "10.0.0.1:80")
	p.set("10.0.0.1", podAt("10.0.0.1", "second", plaintext))
	eventually(t, d, "10.0.0.1:80", func(got *proxy.Destination, _ error) bool {
		return got.Endpoints[0].Pod == "shop/second" && got.Endpoints[0].Protocol == proxy.Plaintext
	})
	p.edit(func() {
		if p.named["10.0.0.1"] != 1 {
			t.Errorf("the address was named %d times, want once", p.named["10.0.0.1"])
		}
	})
}

func TestOneQuestionForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane()
		p.silent = true
		d := newAgent(t, 0)
		d.run(t, p.serveInBubble(t))
		var callers sync.WaitGroup
		for n := range 100 {
			callers.Go(func() {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if n%2 == 0 { // those who give up take nothing from the others
					time.AfterFunc(time.Second, cancel)
				}
				_, err := d.Resolve(ctx, netip.MustParseAddrPort(fmt.Sprintf("10.0.0.1:%d", 1+n)))
				if (n%2 == 0) != errors.Is(err, context.Canceled) || (n%2 == 1) != (err == nil) {
					t.Errorf("caller %d: %v", n, err)
				}
			})
		}
		time.Sleep(2 * time.Second)
		p.edit(func() { p.silent = false })
		p.set("10.0.0.1", podAt("10.0.0.1", "cart", troth))
		callers.Wait()
		p.edit(func() {
			if p.named["10.0.0.1"] != 1 {
				t.Errorf("the address was named %d times, want once", p.named["10.0.0.1"])
			}
		})
		if got := d.metric(t, "resolves_total", "asked"); got != 50 {
			t.Errorf("%v were asked for, want 50", got)
		}
	})
}

func TestWhatIsForgotten(t *testing.T) {
	p := newPlane()
	d := newAgent(t, 2)
	d.run(t, p.serve(t))
	d.resolve(t, "10.0.0.1:80")
	d.resolve(t, "10.0.0.2:80")
	d.resolve(t, "10.0.0.1:81") // newer than that of 10.0.0.2
	d.resolve(t, "10.0.0.3:80")
	p.await(t, "10.0.0.2 is forgotten", func() bool { return len(p.held) == 2 && p.held["10.0.0.1"] && p.held["10.0.0.3"] })
	d.resolve(t, "10.0.0.2:80")
	p.edit(func() {
		if p.named["10.0.0.2"] != 2 || p.named["10.0.0.1"] != 1 {
			t.Errorf("named are %v", p.named)
		}
	})
	if got := d.metric(t, "addresses", ""); got != 2 {
		t.Errorf("%v addresses are remembered, want 2", got)
	}
}

// What is named and given up is forgotten, and an answer that comes too late is
// nobody's.
func TestGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane()
		p.silent = true
		d := newAgent(t, 0)
		d.run(t, p.serveInBubble(t))
		synctest.Wait()
		began := time.Now()
		_, err := d.Resolve(t.Context(), netip.MustParseAddrPort("10.0.0.1:80"))
		if err == nil || err.Error() != "directory: who has 10.0.0.1: the control plane has not answered in 5s" || time.Since(began) != 5*time.Second {
			t.Errorf("Resolve() = %v after %v", err, time.Since(began))
		}
		synctest.Wait()
		p.edit(func() {
			if p.named["10.0.0.1"] != 1 || len(p.held) != 0 {
				t.Errorf("named are %v and held %v, want one and none", p.named, p.held)
			}
		})
		p.send(podAt("10.0.0.1", "cart", troth))
		p.send(podAt("10.0.0.7", "never asked for", troth))
		synctest.Wait()
		if got := d.metric(t, "addresses", ""); got != 0 {
			t.Errorf("%v addresses are remembered, want none", got)
		}
	})
}

func TestWithoutASession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane()
		p.answers["10.0.0.1"] = podAt("10.0.0.1", "cart", troth)
		d := newAgent(t, 0)
		began := time.Now()
		_, err := d.Resolve(t.Context(), netip.MustParseAddrPort("10.0.0.1:80"))
		if err == nil || !strings.Contains(err.Error(), "there is no session with the control plane, and was none in 5s") || time.Since(began) != 5*time.Second {
			t.Errorf("Resolve() = %v after %v", err, time.Since(began))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := d.Resolve(ctx, netip.MustParseAddrPort("10.0.0.1:80")); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Resolve() = %v, want that its context ended", err)
		}
		// Who waits when a session begins is answered.
		conn := p.serveInBubble(t)
		time.AfterFunc(4*time.Second, func() { d.run(t, conn) })
		if got := d.resolve(t, "10.0.0.1:80"); got.Endpoints[0].Pod != "shop/cart" {
			t.Errorf("Resolve() = %+v", got)
		}
	})
}

// The last good state keeps serving, and is asked for again.
func TestSessionsCome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane()
		p.answers["10.0.0.1"] = podAt("10.0.0.1", "cart", troth)
		d := newAgent(t, 0)
		conn := p.serveInBubble(t)
		_, done := d.run(t, conn)
		d.resolve(t, "10.0.0.1:80")
		d.resolve(t, "192.0.2.1:80")
		if err := d.Run(t.Context(), conn); err == nil || err.Error() != "directory: another session runs" {
			t.Errorf("a second Run() = %v", err)
		}
		p.edit(func() { p.silent = true })
		p.send(nil)
		if err := <-done; err == nil || !strings.Contains(err.Error(), "the script ends the stream") {
			t.Errorf("Run() = %v", err)
		}
		if got := d.metric(t, "connected", ""); got != 0 {
			t.Errorf("connected is %v", got)
		}

		time.Sleep(5*time.Minute - time.Second)
		d.resolve(t, "10.0.0.1:80")
		d.resolve(t, "192.0.2.1:80")
		stop, _ := d.run(t, conn) // which hears nothing
		time.Sleep(2 * time.Second)
		d.resolve(t, "10.0.0.1:80")
		if _, err := d.Resolve(t.Context(), netip.MustParseAddrPort("192.0.2.1:80")); err == nil {
			t.Error("that nobody has an address counts 5 minutes after the session")
		}
		stop()
		time.Sleep(1000 * time.Hour)
		if got := d.resolve(t, "10.0.0.1:80"); got.Endpoints[0].Pod != "shop/cart" {
			t.Errorf("Resolve() = %+v", got)
		}
		if got := d.metric(t, "resolves_total", "stale"); got != 4 {
			t.Errorf("%v are stale, want 4", got)
		}

		p.edit(func() { p.silent = false; p.answers["10.0.0.1"] = podAt("10.0.0.1", "next", plaintext) })
		d.run(t, conn)
		synctest.Wait()
		if got := d.resolve(t, "10.0.0.1:80"); got.Endpoints[0].Pod != "shop/next" {
			t.Errorf("Resolve() = %+v", got)
		}
		if got := d.resolve(t, "192.0.2.1:80"); got.Endpoints[0].Pod != "" {
			t.Errorf("Resolve() = %+v", got)
		}
	})
}

// A session begins with all that is remembered, in messages of a bounded size, and
// the server never holds more than is remembered and waited for.
func TestMany(t *testing.T) {
	const size = 3000
	p := newPlane()
	d := newAgent(t, size)
	conn := p.serve(t)
	stop, _ := d.run(t, conn)
	all := func(from int) {
		var callers sync.WaitGroup
		for part := range 10 {
			callers.Go(func() {
				for n := from + part; n < from+size; n += 10 {
					d.resolve(t, fmt.Sprintf("10.0.%d.%d:80", n/256, n%256))
				}
			})
		}
		callers.Wait()
	}
	all(0)
	all(size)
	stop()
	d.run(t, conn)
	p.await(t, "all are held again", func() bool { return p.streams == 2 && len(p.held) == size })
	p.edit(func() {
		if p.most > size+20 {
			t.Errorf("%d were held at a time", p.most)
		}
	})
}

func TestTooManyQuestions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newAgent(t, 0)
		for n := range directory.MaxAsked {
			go d.Resolve(t.Context(), netip.MustParseAddrPort(fmt.Sprintf("10.0.%d.%d:80", n/256, n%256)))
		}
		synctest.Wait()
		if _, err := d.Resolve(t.Context(), netip.MustParseAddrPort("10.1.0.0:80")); err == nil || !strings.Contains(err.Error(), "4096 others are waited for already") {
			t.Errorf("Resolve() = %v", err)
		}
		time.Sleep(5 * time.Second)
		synctest.Wait()
		go d.Resolve(t.Context(), netip.MustParseAddrPort("10.1.0.0:80"))
		synctest.Wait()
		time.Sleep(5 * time.Second)
	})
}

func TestConfig(t *testing.T) {
	for _, c := range []directory.Config{{}, {Size: -1}, {Size: 65_536}} {
		if d, err := directory.New(c); err == nil {
			t.Errorf("New(%+v) = %v, want an error", c, d)
		}
	}
}

// Whatever the control plane says, what comes of it can be called or is refused.
func FuzzAnswer(f *testing.F) {
	for _, seed := range []*trothv1.ResolveResponse{
		{Address: "10.0.0.1"},
		podAt("10.0.0.1", "cart", troth),
		{Address: "10.1.0.1", Behind: &trothv1.ResolveResponse_Service{Service: &trothv1.Service{
			Namespace: "shop", Name: "cart", Affinity: durationpb.New(time.Hour),
			Ports: []*trothv1.ServicePort{{Port: 80, Endpoints: []*trothv1.Endpoint{endpoint("fd00::1", 8080, "a", hbone)}}},
		}}},
	} {
		b, err := proto.Marshal(seed)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, uint16(80))
	}
	f.Fuzz(func(t *testing.T, b []byte, port uint16) {
		in := new(trothv1.ResolveResponse)
		if proto.Unmarshal(b, in) != nil || port == 0 {
			return
		}
		address, err := netip.ParseAddr(in.GetAddress())
		if err != nil {
			return
		}
		got, err := directory.At(in, netip.AddrPortFrom(address, port))
		if err != nil {
			return
		}
		if got.Service == "" && (len(got.Endpoints) != 1 || got.Endpoints[0].Address != netip.AddrPortFrom(address, port)) {
			t.Errorf("what is no Service has the endpoints %+v", got.Endpoints)
		}
		if got.Affinity < 0 || got.Affinity > 24*time.Hour {
			t.Errorf("the affinity is %v", got.Affinity)
		}
		for _, e := range got.Endpoints {
			proves := e.Protocol == proxy.HBONE || e.Protocol == proxy.Troth
			if !e.Address.IsValid() || e.Address.Port() == 0 || e.Address.Addr().Is4In6() || proves == e.ID.IsZero() {
				t.Errorf("an endpoint is %+v", e)
			}
		}
	})
}
