package directory_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"troth.dev/troth/agent/directory"
	"troth.dev/troth/agent/proxy"
	trothv1 "troth.dev/troth/api/troth/v1"
)

// patience is how long a test waits for what must happen.
const patience = 20 * time.Second

// plane is a control plane that speaks DirectoryService: it answers for what it was
// told, holds what agents name, and finds agents that break the rules.
type plane struct {
	trothv1.UnimplementedDirectoryServiceServer

	mu      sync.Mutex
	answers map[string]*trothv1.ResolveResponse // guarded by mu; without Behind for whoever is missing
	silent  bool                                // guarded by mu; it answers nothing
	named   map[string]int                      // guarded by mu; how often each address was named
	held    map[string]bool                     // guarded by mu; of the newest stream
	most    int                                 // guarded by mu; the most that were held at a time
	broken  error                               // guarded by mu; the first rule that was broken
	streams int                                 // guarded by mu; that were opened
	push    chan *trothv1.ResolveResponse       // guarded by mu; to the newest stream
	changed chan struct{}                       // guarded by mu; closed at every change
}

func newPlane() *plane {
	return &plane{
		answers: make(map[string]*trothv1.ResolveResponse), named: make(map[string]int), changed: make(chan struct{}),
	}
}

func (p *plane) Resolve(stream grpc.BidiStreamingServer[trothv1.ResolveRequest, trothv1.ResolveResponse]) error {
	out := make(chan *trothv1.ResolveResponse, 100_000)
	p.edit(func() { p.streams++; p.push = out; p.held = make(map[string]bool) })
	requests := make(chan error, 1)
	go func() {
		for {
			in, err := stream.Recv()
			if err != nil {
				requests <- err
				return
			}
			p.edit(func() {
				if p.push == out { // what an older stream has still to say is of no more interest
					p.take(in, out)
				}
			})
		}
	}()
	for {
		select {
		case response := <-out:
			if response == nil {
				return errors.New("the script ends the stream")
			}
			if err := stream.Send(response); err != nil {
				return err
			}
		case err := <-requests:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
	}
}

// take reads a request. The caller holds mu.
func (p *plane) take(in *trothv1.ResolveRequest, out chan<- *trothv1.ResolveResponse) {
	if len(in.GetResolve()) > 1024 || len(in.GetForget()) > 1024 {
		p.broken = fmt.Errorf("%d and %d addresses in one message", len(in.GetResolve()), len(in.GetForget()))
	}
	for _, address := range in.GetResolve() {
		if a, err := netip.ParseAddr(address); err != nil || a.Is4In6() || a.String() != address {
			p.broken = fmt.Errorf("%q is named", address)
		}
		p.named[address]++
		p.held[address] = true
		if !p.silent {
			out <- p.answer(address)
		}
	}
	for _, address := range in.GetForget() {
		if !p.held[address] {
			p.broken = fmt.Errorf("%q is to be forgotten, and was not held", address)
		}
		delete(p.held, address)
	}
	p.most = max(p.most, len(p.held))
}

// answer returns the answer for an address. The caller holds mu.
func (p *plane) answer(address string) *trothv1.ResolveResponse {
	response := &trothv1.ResolveResponse{}
	if known, ok := p.answers[address]; ok {
		response = proto.CloneOf(known)
	}
	response.Address = address
	return response
}

// set changes what is behind an address, and tells whoever holds it.
func (p *plane) set(address string, response *trothv1.ResolveResponse) {
	p.edit(func() {
		p.answers[address] = response
		if p.held[address] && !p.silent {
			p.push <- p.answer(address)
		}
	})
}

// send sends a response that nobody may have asked for.
func (p *plane) send(response *trothv1.ResolveResponse) { p.edit(func() { p.push <- response }) }

// edit changes the script.
func (p *plane) edit(change func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change()
	close(p.changed)
	p.changed = make(chan struct{})
}

// await waits until the script is as wanted.
func (p *plane) await(tb testing.TB, what string, is func() bool) {
	tb.Helper()
	late := time.After(patience)
	for {
		p.mu.Lock()
		ok, changed := is(), p.changed
		p.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-late:
			tb.Fatalf("it does not come to pass that %s", what)
		}
	}
}

// assertUnbroken fails the test if an agent broke a rule of the protocol.
func (p *plane) assertUnbroken(tb testing.TB) {
	tb.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.broken != nil {
		tb.Errorf("a rule of the protocol is broken: %v", p.broken)
	}
}

// serve serves p until the test ends.
func (p *plane) serve(tb testing.TB) *grpc.ClientConn {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	return p.serveOn(tb, l, func(ctx context.Context, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String())
	})
}

// serveInBubble serves p where there are no sockets.
func (p *plane) serveInBubble(tb testing.TB) *grpc.ClientConn {
	tb.Helper()
	l := bufconn.Listen(1 << 20)
	return p.serveOn(tb, l, func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) })
}

func (p *plane) serveOn(tb testing.TB, l net.Listener, dial func(context.Context, string) (net.Conn, error)) *grpc.ClientConn {
	tb.Helper()
	server := grpc.NewServer()
	trothv1.RegisterDirectoryServiceServer(server, p)
	var serving sync.WaitGroup
	serving.Go(func() { server.Serve(l) })
	conn, err := grpc.NewClient("passthrough:///plane",
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(dial))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		conn.Close()
		server.Stop()
		serving.Wait()
		p.assertUnbroken(tb)
	})
	return conn
}

// agent is a Directory with what it counts.
type agent struct {
	*directory.Directory

	registry *prometheus.Registry
}

func newAgent(tb testing.TB, size int) *agent {
	tb.Helper()
	registry := prometheus.NewRegistry()
	metrics, err := directory.NewMetrics(registry)
	if err != nil {
		tb.Fatal(err)
	}
	d, err := directory.New(directory.Config{Size: size, Log: slog.New(slog.DiscardHandler), Metrics: metrics})
	if err != nil {
		tb.Fatal(err)
	}
	return &agent{d, registry}
}

// run runs a session until stop is called or the test ends. What it ended by comes
// out of done.
func (a *agent) run(tb testing.TB, conn *grpc.ClientConn) (stop func(), done <-chan error) {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		result <- a.Run(ctx, conn)
	}()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case <-ended:
		case <-time.After(patience):
			tb.Fatal("Run does not return")
		}
	})
	tb.Cleanup(stop)
	return stop, result
}

// resolve returns what is at a destination, or fails the test.
func (a *agent) resolve(tb testing.TB, destination string) *proxy.Destination {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	got, err := a.Resolve(ctx, netip.MustParseAddrPort(destination))
	if err != nil {
		tb.Fatal(err)
	}
	return got
}

// metric returns the value of a metric, whose label, if any, has the value given.
func (a *agent) metric(tb testing.TB, name, label string) float64 {
	tb.Helper()
	families, err := a.registry.Gather()
	if err != nil {
		tb.Fatal(err)
	}
	for _, family := range families {
		for _, m := range family.GetMetric() {
			if family.GetName() == "troth_agent_directory_"+name && (label == "" || m.GetLabel()[0].GetValue() == label) {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	tb.Fatalf("there is no metric %s %s", name, label)
	return 0
}

const (
	cart  = "spiffe://example.org/ns/shop/sa/cart"
	stock = "spiffe://example.org/ns/shop/sa/stock"
)

// endpoint is a pod that is called by a protocol.
func endpoint(address string, port uint32, name string, protocol trothv1.Protocol) *trothv1.Endpoint {
	return &trothv1.Endpoint{
		Address: address, Port: port, PodUid: "uid-" + name, Namespace: "shop", Name: name, SpiffeId: cart, Protocol: protocol,
	}
}

func podAt(address, name string, protocol trothv1.Protocol) *trothv1.ResolveResponse {
	return &trothv1.ResolveResponse{
		Address: address, Behind: &trothv1.ResolveResponse_Pod{Pod: endpoint(address, 0, name, protocol)},
	}
}

func serviceOf(s *trothv1.Service) *trothv1.ResolveResponse {
	return &trothv1.ResolveResponse{Behind: &trothv1.ResolveResponse_Service{Service: s}}
}
