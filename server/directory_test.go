package server_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/identity"
	"troth.dev/troth/internal/dev"
	"troth.dev/troth/kube/directory"
	"troth.dev/troth/policy"
	"troth.dev/troth/server"
)

type resolving = grpc.BidiStreamingClient[trothv1.ResolveRequest, trothv1.ResolveResponse]

// town is a cluster in memory that has Services too.
type town struct {
	*dev.Cluster
	index *directory.Index
}

func (c *town) Directory(node string) *directory.Reader { return c.index.Reader(node) }

// startTown starts a plane on a town with one agent pod on each node that there is.
func startTown(t testing.TB, change func(*server.Config)) (*plane, *town, identity.Pod) {
	t.Helper()
	cluster, err := dev.NewCluster(identity.ServiceAccount{})
	if err != nil {
		t.Fatal(err)
	}
	c := &town{cluster, directory.New(directory.Config{Agents: agents})}
	p := startPlane(t, c, cluster.Keys, dev.Issuer, change)
	agent := cluster.AddPod(agents, "agent")
	c.index.SetPod(time.Now(), agent, nil)
	return p, c, agent
}

// resolve opens a stream as the agent.
func (p *plane) resolve(t testing.TB, c *dev.Cluster, agent identity.Pod) resolving {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	stream, err := trothv1.NewDirectoryServiceClient(p.dial(t, p.attest(t, tokenFor(t, c, agent)), "")).Resolve(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

// ask sends a request, and next returns the next answer.
func ask(t testing.TB, stream resolving, addresses ...string) {
	t.Helper()
	if err := stream.Send(&trothv1.ResolveRequest{Resolve: addresses}); err != nil {
		t.Fatal(err)
	}
}

func next(t testing.TB, stream resolving) *trothv1.ResolveResponse {
	t.Helper()
	out, err := stream.Recv()
	if err != nil {
		t.Fatalf("Recv: %s", refusal(err))
	}
	return out
}

func expect(t testing.TB, stream resolving, want *trothv1.ResolveResponse) {
	t.Helper()
	if diff := cmp.Diff(want, next(t, stream), protocmp.Transform()); diff != "" {
		t.Fatalf("answer (-want +got):\n%s", diff)
	}
}

func addresses(all ...string) []netip.Addr {
	parsed := make([]netip.Addr, len(all))
	for n, a := range all {
		parsed[n] = netip.MustParseAddr(a)
	}
	return parsed
}

// What an agent gets, field by field.
func TestResolve(t *testing.T) {
	p, c, agent := startTown(t, nil)
	pod := c.AddPod(web, "web-1")
	pod.Addresses = addresses("10.0.0.1", "fd00::1")
	mixed := &policy.Effective{Mode: policy.Strict, Ports: []policy.PortMode{{Port: 9090, Mode: policy.Disable}}}
	c.index.SetPod(time.Now(), pod, mixed)
	c.index.SetService(directory.ServiceObject{
		Name: directory.Name{Namespace: "shop", Name: "web"}, Addresses: addresses("10.96.0.1"), Affinity: time.Hour,
		Ports: []directory.NamedPort{{Name: "http", Port: 80}, {Name: "admin", Port: 81}, {Name: "none", Port: 82}},
	})
	c.index.SetSlice(directory.Slice{
		Name: directory.Name{Namespace: "shop", Name: "web-1"}, Service: directory.Name{Namespace: "shop", Name: "web"},
		Ports: []directory.NamedPort{{Name: "http", Port: 8080}, {Name: "admin", Port: 9090}},
		Endpoints: []directory.SliceEndpoint{
			{Address: pod.Addresses[0], IsPod: true, PodUID: pod.UID, Ready: true},
			{Address: netip.MustParseAddr("192.0.2.9"), Ready: true},
		},
	})
	stream := p.resolve(t, c.Cluster, agent)
	const plaintext, troth = trothv1.Protocol_PROTOCOL_PLAINTEXT, trothv1.Protocol_PROTOCOL_TROTH
	endpoint := func(address string, port uint32, protocol trothv1.Protocol) *trothv1.Endpoint {
		return &trothv1.Endpoint{
			Address: address, Port: port, PodUid: pod.UID, Namespace: "shop", Name: "web-1",
			SpiffeId: "spiffe://example.org/ns/shop/sa/web", Protocol: protocol,
		}
	}

	ask(t, stream, "10.0.0.1")
	v4 := endpoint("10.0.0.1", 0, troth)
	v4.PortProtocols = map[uint32]trothv1.Protocol{9090: plaintext}
	expect(t, stream, &trothv1.ResolveResponse{Address: "10.0.0.1", Behind: &trothv1.ResolveResponse_Pod{Pod: v4}})

	// As the agent spelled it.
	ask(t, stream, "FD00:0::1")
	v6 := endpoint("fd00::1", 0, troth)
	v6.PortProtocols = v4.PortProtocols
	expect(t, stream, &trothv1.ResolveResponse{Address: "FD00:0::1", Behind: &trothv1.ResolveResponse_Pod{Pod: v6}})

	ask(t, stream, "192.0.2.1")
	expect(t, stream, &trothv1.ResolveResponse{Address: "192.0.2.1"})

	ask(t, stream, "10.96.0.1")
	service := &trothv1.Service{
		Namespace: "shop", Name: "web", Affinity: durationpb.New(time.Hour),
		Ports: []*trothv1.ServicePort{
			{Port: 80, Endpoints: []*trothv1.Endpoint{endpoint("10.0.0.1", 8080, troth), {Address: "192.0.2.9", Port: 8080, Protocol: plaintext}}},
			{Port: 81, Endpoints: []*trothv1.Endpoint{endpoint("10.0.0.1", 9090, plaintext), {Address: "192.0.2.9", Port: 9090, Protocol: plaintext}}},
			{Port: 82},
		},
	}
	expect(t, stream, &trothv1.ResolveResponse{Address: "10.96.0.1", Behind: &trothv1.ResolveResponse_Service{Service: service}})

	// One that is held is answered again, and one that is named in one message with
	// that it is to be forgotten is held.
	if err := stream.Send(&trothv1.ResolveRequest{Forget: []string{"192.0.2.1"}, Resolve: []string{"192.0.2.1"}}); err != nil {
		t.Fatal(err)
	}
	expect(t, stream, &trothv1.ResolveResponse{Address: "192.0.2.1"})

	// What is forgotten is not told of; what comes next is another address's.
	if err := stream.Send(&trothv1.ResolveRequest{Forget: []string{"10.96.0.1", "fd00::1"}, Resolve: []string{"192.0.2.2"}}); err != nil {
		t.Fatal(err)
	}
	expect(t, stream, &trothv1.ResolveResponse{Address: "192.0.2.2"})
	// An agent that has named all stays current.
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	c.index.SetPod(time.Now(), pod, &policy.Effective{Mode: policy.Permissive})
	v4.PortProtocols = nil
	expect(t, stream, &trothv1.ResolveResponse{Address: "10.0.0.1", Behind: &trothv1.ResolveResponse_Pod{Pod: v4}})
	c.index.RemovePod(time.Now(), pod.UID)
	expect(t, stream, &trothv1.ResolveResponse{Address: "10.0.0.1"})
}

// The cluster in memory has pods by address, and follows their policies.
func TestResolveInDevelopment(t *testing.T) {
	p, c, agent := startDev(t, nil)
	stream := p.resolve(t, c, agent)
	ask(t, stream, "127.0.0.9")
	expect(t, stream, &trothv1.ResolveResponse{Address: "127.0.0.9"})
	pod := c.AddPod(web, "web-1")
	c.SetAddresses(pod.UID, addresses("127.0.0.9")...)
	if got := next(t, stream).GetPod(); got.GetPodUid() != pod.UID || got.GetProtocol() != trothv1.Protocol_PROTOCOL_TROTH {
		t.Errorf("the pod that got the address is %v", got)
	}
	c.SetPolicies([]policy.PeerAuthentication{{Ref: policy.Ref{Namespace: web.Namespace, Name: "all"}, Mode: policy.Disable}})
	if got := next(t, stream).GetPod(); got.GetProtocol() != trothv1.Protocol_PROTOCOL_PLAINTEXT {
		t.Errorf("the pod whose policy is DISABLE is %v", got)
	}
	c.RemovePod(pod.UID)
	expect(t, stream, &trothv1.ResolveResponse{Address: "127.0.0.9"})
}

// What an agent must not ask, and when its stream ends.
func TestResolveRefuses(t *testing.T) {
	many := make([]string, 1025)
	for n := range many {
		many[n] = netip.AddrFrom4([4]byte{10, 1, byte(n >> 8), byte(n)}).String()
	}
	p, c, agent := startDev(t, nil)
	for _, test := range []struct {
		name string
		in   *trothv1.ResolveRequest
		want string
	}{
		{"no address", &trothv1.ResolveRequest{Resolve: []string{"web.shop"}}, "InvalidArgument ADDRESS_INVALID"},
		{"empty", &trothv1.ResolveRequest{Resolve: []string{""}}, "InvalidArgument ADDRESS_INVALID"},
		{"with a port", &trothv1.ResolveRequest{Resolve: []string{"10.0.0.1:80"}}, "InvalidArgument ADDRESS_INVALID"},
		{"IPv4 in IPv6", &trothv1.ResolveRequest{Resolve: []string{"::ffff:10.0.0.1"}}, "InvalidArgument ADDRESS_INVALID"},
		{"with a zone", &trothv1.ResolveRequest{Resolve: []string{"fe80::1%eth0"}}, "InvalidArgument ADDRESS_INVALID"},
		{"forget no address", &trothv1.ResolveRequest{Forget: []string{"web.shop"}}, "InvalidArgument ADDRESS_INVALID"},
		{"too many at once", &trothv1.ResolveRequest{Resolve: many}, "InvalidArgument TOO_MANY_ADDRESSES"},
		{"too many to forget at once", &trothv1.ResolveRequest{Forget: many}, "InvalidArgument TOO_MANY_ADDRESSES"},
	} {
		t.Run(test.name, func(t *testing.T) {
			stream := p.resolve(t, c, agent)
			if err := stream.Send(test.in); err != nil {
				t.Fatal(err)
			}
			if got := refusal(last(stream)); got != test.want {
				t.Errorf("Resolve(%s) = %s, want %s", test.name, got, test.want)
			}
		})
	}
	t.Run("too many held", func(t *testing.T) {
		stream := p.resolve(t, c, agent)
		for n := 0; n <= 1<<16; n += 1024 {
			in := &trothv1.ResolveRequest{}
			for m := n; m < n+1024 && m <= 1<<16; m++ {
				in.Resolve = append(in.Resolve, netip.AddrFrom4([4]byte{10, byte(m >> 16), byte(m >> 8), byte(m)}).String())
			}
			if err := stream.Send(in); err != nil && !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
		}
		if got, want := refusal(last(stream)), "ResourceExhausted TOO_MANY_ADDRESSES"; got != want {
			t.Errorf("a stream that holds one too many ended with %s, want %s", got, want)
		}
	})
	t.Run("the agent's pod goes", func(t *testing.T) {
		stream := p.resolve(t, c, agent)
		ask(t, stream, "192.0.2.1")
		next(t, stream)
		c.RemovePod(agent.UID)
		if got, want := refusal(last(stream)), "Unauthenticated POD_NOT_FOUND"; got != want {
			t.Errorf("the stream ended with %s, want %s", got, want)
		}
	})
	t.Run("the server drains", func(t *testing.T) {
		p, c, agent := startDev(t, nil)
		stream := p.resolve(t, c, agent)
		ask(t, stream, "192.0.2.1")
		next(t, stream)
		if err := p.stop(); err != nil {
			t.Errorf("Serve() = %v", err)
		}
		if got, want := refusal(last(stream)), "Unavailable SHUTTING_DOWN retry"; got != want {
			t.Errorf("the stream ended with %s, want %s", got, want)
		}
	})
}

// last reads a stream to its end.
func last(stream resolving) error {
	for {
		if _, err := stream.Recv(); err != nil {
			return err
		}
	}
}

func TestResolveEndsWithTheSVID(t *testing.T) {
	t.Parallel()
	p, c, agent := startDev(t, nil)
	stream := p.resolve(t, c, agent)
	ask(t, stream, "192.0.2.1")
	next(t, stream)
	if got, want := refusal(last(stream)), "Unauthenticated SVID_EXPIRED"; got != want {
		t.Errorf("the stream of an agent whose SVID expired ended with %s, want %s", got, want)
	}
}

// An agent that does not read for a while gets the newest and not all that was in
// between, whatever that costs others: nothing.
func TestASlowAgentGetsTheNewest(t *testing.T) {
	p, c, agent := startTown(t, nil)
	slow, quick := p.resolve(t, c.Cluster, agent), p.resolve(t, c.Cluster, agent)
	name := directory.Name{Namespace: "shop", Name: "web"}
	c.index.SetService(directory.ServiceObject{Name: name, Addresses: addresses("10.96.0.1"), Ports: []directory.NamedPort{{Port: 80}}})
	for _, stream := range []resolving{slow, quick} {
		ask(t, stream, "10.96.0.1")
		next(t, stream)
	}
	const changes = 20_000
	for n := range changes {
		// Of some size, so that what lies in buffers is little beside the changes.
		s := directory.Slice{Name: name, Service: name, Ports: []directory.NamedPort{{Port: uint16(n + 1)}}}
		for e := range 20 {
			s.Endpoints = append(s.Endpoints, directory.SliceEndpoint{Address: netip.AddrFrom4([4]byte{192, 0, 2, byte(e)}), Ready: true})
		}
		c.index.SetSlice(s)
	}
	until := func(stream resolving) (read int) {
		for {
			read++
			if next(t, stream).GetService().GetPorts()[0].GetEndpoints()[0].GetPort() == changes {
				return read
			}
		}
	}
	until(quick)
	if read := until(slow); read > changes/10 {
		t.Errorf("an agent that did not read got %d of %d changes, want the newest alone and what lay in buffers", read, changes)
	}
}

// A change reaches those who hold what it changes, through the whole of a real
// cluster, and nobody else.
func TestResolveInACluster(t *testing.T) {
	p := startKube(t)
	agent := p.pod(t, agents, "agent-1", "node-1")
	p.pod(t, agents, "agent-2", "node-2")
	pod := p.pod(t, web, "web-1", "node-2")
	other := p.pod(t, web, "web-2", "node-1")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	client := trothv1.NewDirectoryServiceClient(p.dial(t, p.attest(t, p.Token(t, agent, audience, 10*time.Minute)), ""))
	stream, err := client.Resolve(ctx)
	if err != nil {
		t.Fatal(err)
	}
	ask(t, stream, pod.Status.PodIP, other.Status.PodIP)
	known := map[string]*trothv1.ResolveResponse{}
	for known[pod.Status.PodIP].GetPod().GetProtocol() != trothv1.Protocol_PROTOCOL_TROTH ||
		known[other.Status.PodIP].GetPod().GetProtocol() != trothv1.Protocol_PROTOCOL_TROTH {
		out := next(t, stream)
		known[out.GetAddress()] = out
	}
	want := &trothv1.Endpoint{
		Address: pod.Status.PodIP, PodUid: string(pod.UID), Namespace: pod.Namespace, Name: pod.Name,
		SpiffeId: "spiffe://example.org/ns/shop/sa/web", Protocol: trothv1.Protocol_PROTOCOL_TROTH,
	}
	if diff := cmp.Diff(want, known[pod.Status.PodIP].GetPod(), protocmp.Transform()); diff != "" {
		t.Errorf("the pod (-want +got):\n%s", diff)
	}
	p.DeletePod(t, pod, 0)
	expect(t, stream, &trothv1.ResolveResponse{Address: pod.Status.PodIP})
}

// One Service's endpoints change, which every one of 1,000 streams holds among 100
// addresses: what that costs for each of them, client and server together, until the
// last has the news. And what an address costs that is held.
func BenchmarkResolve(b *testing.B) {
	const streams, held, endpoints = 1000, 100, 10
	p, c, agent := startTown(b, func(c *server.Config) { c.Limits.AgentStreams = streams; c.Limits.PerCaller = 1e6 })
	name := directory.Name{Namespace: "shop", Name: "web"}
	set := func(n int) {
		s := directory.Slice{Name: name, Service: name, Ports: []directory.NamedPort{{Port: uint16(1 + n%60_000)}}}
		for e := range endpoints {
			pod := identity.Pod{PodReference: identity.PodReference{Namespace: "shop", Name: fmt.Sprint("web-", e), UID: fmt.Sprintf("7f9d3c52-4f2b-4b8e-9a55-%012d", e)}}
			s.Endpoints = append(s.Endpoints, directory.SliceEndpoint{Address: netip.AddrFrom4([4]byte{10, 0, 0, byte(e)}), Ready: true, IsPod: true, PodUID: pod.UID})
		}
		c.index.SetSlice(s)
	}
	for e := range endpoints {
		c.index.SetPod(time.Now(), identity.Pod{
			PodReference:   identity.PodReference{Namespace: "shop", Name: fmt.Sprint("web-", e), UID: fmt.Sprintf("7f9d3c52-4f2b-4b8e-9a55-%012d", e)},
			ServiceAccount: "web", Node: agent.Node, Phase: identity.PodRunning, Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(e)})},
		}, &policy.Effective{Mode: policy.Permissive})
	}
	c.index.SetService(directory.ServiceObject{Name: name, Addresses: addresses("10.96.0.1"), Ports: []directory.NamedPort{{Port: 80}}})
	set(0)

	svid := p.attest(b, tokenFor(b, c.Cluster, agent))
	var all []resolving
	for len(all) < streams {
		client := trothv1.NewDirectoryServiceClient(p.dial(b, svid, ""))
		for range min(50, streams-len(all)) {
			stream, err := client.Resolve(b.Context())
			if err != nil {
				b.Fatal(err)
			}
			ask(b, stream, "10.96.0.1")
			next(b, stream)
			all = append(all, stream)
		}
	}
	before := live()
	for n, stream := range all {
		var names []string
		for m := range held - 1 {
			names = append(names, netip.AddrFrom4([4]byte{10, byte(1 + n%2), byte(m), byte(n % 7)}).String())
		}
		ask(b, stream, names...)
		for range names {
			next(b, stream)
		}
	}
	perAddress := float64(live()-before) / (streams * (held - 1))

	n, busy := 0, cpu(b)
	for b.Loop() {
		n++
		set(n)
		for _, stream := range all {
			if got := next(b, stream); got.GetService() == nil {
				b.Fatalf("got %v", got)
			}
		}
	}
	b.ReportMetric(float64((cpu(b)-busy).Microseconds())/float64(b.N*streams), "cpu-us/stream")
	b.ReportMetric(perAddress, "B/held")
}

// cpu is the time for which the process has used a processor: the machine has others
// to serve.
func cpu(b *testing.B) time.Duration {
	b.Helper()
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// live is the heap in use.
func live() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
