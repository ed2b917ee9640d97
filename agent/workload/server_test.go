package workload_test

import (
	"context"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"troth.dev/troth/agent/workload"
)

func TestNewRefuses(t *testing.T) {
	source := &pods{}
	for _, test := range []struct {
		config workload.Config
		want   string
	}{
		{workload.Config{}, "workload: no Source"},
		{workload.Config{Source: source, Patience: -time.Second}, `workload: negative Patience "-1s"`},
		{workload.Config{Source: source, Limits: workload.Limits{Streams: -1}}, "workload: negative limit in {Connections:0 ConnectionsPerPod:0 Streams:-1 StreamsPerPod:0}"},
	} {
		if _, err := workload.New(test.config); err == nil || err.Error() != test.want {
			t.Errorf("New(%+v) = %v, want %q", test.config, err, test.want)
		}
	}
}

// An unmodified X509Source sees a rotation as it happens.
func TestX509SourceSeesRotation(t *testing.T) {
	ca, next := newAuthority(t, "example.org"), newAuthority(t, "example.org")
	source := &pods{}
	state := ready(t, ca, 1)
	source.set(webPod, state)
	_, path := start(t, workload.Config{Source: source})
	x509Source, err := workloadapi.NewX509Source(withHeader(t), workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+path)))
	if err != nil {
		t.Fatal(err)
	}
	defer x509Source.Close()
	check := func(step string, authorities int, signer *authority) {
		t.Helper()
		bundle, err := x509Source.GetX509BundleForTrustDomain(ca.td)
		if err != nil {
			t.Fatal(err)
		}
		if got := len(bundle.X509Authorities()); got != authorities {
			t.Errorf("%s: %d authorities, want %d", step, got, authorities)
		}
		svid, err := x509Source.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := x509svid.Verify(svid.Certificates, signer.bundle(0)); err != nil {
			t.Errorf("%s: the SVID is not signed by the authority in use: %v", step, err)
		}
		if _, _, err := x509svid.Verify(svid.Certificates, bundle); err != nil {
			t.Errorf("%s: the SVID is not trusted by its own bundle: %v", step, err)
		}
	}
	update := func(s workload.State) {
		t.Helper()
		updated := x509Source.Updated()
		for len(updated) > 0 { // the news of the update before this one
			<-updated
		}
		source.set(webPod, s)
		if err := x509Source.WaitUntilUpdated(withHeader(t)); err != nil {
			t.Fatal(err)
		}
	}

	check("at first", 1, ca)
	state.Bundles = []workload.Bundle{ca.bundle(2, next)}
	update(state)
	check("prepared", 2, ca)
	renewed := ready(t, next, 2)
	renewed.Bundles = []workload.Bundle{ca.bundle(2, next)}
	update(renewed)
	check("activated", 2, next)
	renewed.Bundles = []workload.Bundle{next.bundle(3)}
	update(renewed)
	check("revoked", 1, next)
}

// A client comes back by itself to a server that was started again, and has kept
// what it had.
func TestClientSurvivesRestart(t *testing.T) {
	ca := newAuthority(t, "example.org")
	source, path := &pods{}, socketPath(t)
	source.set(webPod, ready(t, ca, 1))
	stop := serve(t, newServer(t, workload.Config{Source: source}), path)
	w := watch(t, path)
	w.next(t)

	stop()
	changed := ready(t, ca, 2)
	source.set(webPod, changed)
	serve(t, newServer(t, workload.Config{Source: source}), path)
	got, want := w.next(t).DefaultSVID(), changed.Identities[0].SVID
	if !got.Certificates[0].Equal(want.Certificates[0]) {
		t.Error("the SVID after the restart is not the new one")
	}
	if code := status.Code(<-w.errs); code != codes.Unavailable {
		t.Errorf("the watch was told %v of the restart, want Unavailable", code)
	}
}

func TestManyClients(t *testing.T) {
	const podCount, each = 25, 4
	ca, next := newAuthority(t, "example.org"), newAuthority(t, "example.org")
	source := &pods{}
	names := make([]string, podCount)
	for i := range names {
		names[i] = strings.Repeat("p", i+1)
		s := ready(t, ca, 1)
		s.Identities[0].SVID = ca.issue(t, "/ns/shop/sa/"+names[i], time.Hour)
		source.set(names[i], s)
	}
	// Every connection is asked about when it is made, and that decides its pod.
	var connections atomic.Int64
	var podOf sync.Map
	server, path := start(t, workload.Config{Source: source, PodOf: func(p workload.Peer) (string, error) {
		name, _ := podOf.LoadOrStore(p, names[int(connections.Add(1))%podCount])
		return name.(string), nil
	}})
	watches := make([]*watcher, podCount*each)
	for i := range watches {
		watches[i] = watch(t, path)
	}
	ids := make(map[string]int)
	for _, w := range watches {
		ids[w.next(t).DefaultSVID().ID.String()]++
	}
	if len(ids) != podCount {
		t.Errorf("%d identities were served, want %d", len(ids), podCount)
	}
	d := await(t, server.Delivered(), func(d workload.Delivered) bool { return d.Streams == podCount*each })
	if d.Revisions[ca.td] != 1 {
		t.Errorf("Delivered() = %+v, want revision 1", d)
	}

	for _, name := range names {
		s, _ := source.state(name).Load()
		s.Bundles = []workload.Bundle{ca.bundle(2, next)}
		source.set(name, s)
	}
	for _, w := range watches {
		bundle, ok := w.next(t).Bundles.Get(ca.td)
		if !ok || len(bundle.X509Authorities()) != 2 {
			t.Error("a client was not sent the new bundle")
		}
	}
	await(t, server.Delivered(), func(d workload.Delivered) bool { return d.Streams == podCount*each && d.Revisions[ca.td] == 2 })
}

func TestLimits(t *testing.T) {
	ca := newAuthority(t, "example.org")
	state := ready(t, ca, 1)
	// begin serves two pods; the test says which one it is.
	begin := func(t *testing.T, limits workload.Limits) (be func(string), server *workload.Server, path string, logged lines) {
		source := &pods{}
		source.set("a", state)
		source.set("b", state)
		var pod atomic.Value
		pod.Store("a")
		var podOf sync.Map // by connection
		log, logged := newLog()
		server, path = start(t, workload.Config{Source: source, Limits: limits, Log: log, PodOf: func(p workload.Peer) (string, error) {
			name, _ := podOf.LoadOrStore(p, pod.Load())
			return name.(string), nil
		}})
		return func(name string) { pod.Store(name) }, server, path, logged
	}
	wantTooMany := func(t *testing.T, conn *grpc.ClientConn) {
		t.Helper()
		_, err := fetchSVID(t, conn).Recv()
		if s := status.Convert(err); s.Code() != codes.Unavailable || s.Message() != "too many streams are open" {
			t.Errorf("Recv() = %v, want Unavailable", err)
		}
	}
	wantLogged := func(t *testing.T, logged lines, want string) {
		t.Helper()
		if line := logged.next(t); !strings.Contains(line, want) {
			t.Errorf("log = %q, want %q", line, want)
		}
	}

	t.Run("streams of a pod", func(t *testing.T) {
		be, server, path, logged := begin(t, workload.Limits{StreamsPerPod: 2})
		one, two := dial(t, path), dial(t, path)
		recv(t, fetchSVID(t, one))
		recv(t, fetchSVID(t, two))
		wantTooMany(t, one)
		wantLogged(t, logged, `pod \"a\" has all of its 2`)
		be("b")
		recv(t, fetchSVID(t, dial(t, path)))
		one.Close()
		await(t, server.Delivered(), func(d workload.Delivered) bool { return d.Streams == 2 })
		// The place is given back before the stream counts as closed.
		recv(t, fetchSVID(t, two))
	})
	t.Run("streams in all", func(t *testing.T) {
		be, _, path, logged := begin(t, workload.Limits{Streams: 2})
		recv(t, fetchSVID(t, dial(t, path)))
		be("b")
		other := dial(t, path)
		recv(t, fetchSVID(t, other))
		wantTooMany(t, other)
		wantLogged(t, logged, "all 2 are taken")
	})
	t.Run("streams of a connection", func(t *testing.T) {
		_, _, path, _ := begin(t, workload.Limits{})
		conn := dial(t, path)
		for range 32 {
			recv(t, fetchSVID(t, conn))
		}
		ctx, cancel := context.WithTimeout(withHeader(t), 50*time.Millisecond)
		defer cancel()
		// The client knows the limit, and waits for a place.
		_, err := workloadpb.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workloadpb.X509SVIDRequest{})
		if status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("the 33rd stream of a connection: %v, want DeadlineExceeded", err)
		}
	})
	for name, limits := range map[string]workload.Limits{
		"connections of a pod": {ConnectionsPerPod: 2},
		"connections in all":   {Connections: 2},
	} {
		t.Run(name, func(t *testing.T) {
			be, _, path, logged := begin(t, limits)
			one, two := dial(t, path), dial(t, path)
			recv(t, fetchSVID(t, one))
			recv(t, fetchSVID(t, two))
			if err := try(t, path); status.Code(err) != codes.Unavailable {
				t.Errorf("FetchX509SVID() on a third connection = %v, want Unavailable", err)
			}
			wantLogged(t, logged, "too many connections: ")
			if limits.ConnectionsPerPod > 0 {
				be("b")
				recv(t, fetchSVID(t, dial(t, path)))
				be("a")
			}
			one.Close()
			// The server hears of it when it hears of it.
			for deadline := time.Now().Add(10 * time.Second); ; {
				err := try(t, path)
				if err == nil {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("FetchX509SVID() after a connection was closed = %v", err)
				}
			}
		})
	}
	t.Run("size of a message", func(t *testing.T) {
		_, _, path, _ := begin(t, workload.Limits{})
		client := workloadpb.NewSpiffeWorkloadAPIClient(dial(t, path))
		for size, want := range map[int]codes.Code{32 << 10: codes.Unimplemented, 64 << 10: codes.ResourceExhausted} {
			_, err := client.ValidateJWTSVID(withHeader(t), &workloadpb.ValidateJWTSVIDRequest{Svid: strings.Repeat("x", size)})
			if status.Code(err) != want {
				t.Errorf("ValidateJWTSVID(%d bytes) = %v, want %v", size, err, want)
			}
		}
	})
	t.Run("lines of the log", func(t *testing.T) {
		log, logged := newLog()
		_, path := start(t, workload.Config{Source: &pods{}, Log: log, PodOf: inPod("")})
		conn := dial(t, path)
		for range 200 {
			wantDenied(t, fetchSVID(t, conn))
		}
		if got := len(logged); got < 100 || got > 150 {
			t.Errorf("%d lines for 200 refusals, want the first 100 and few more", got)
		}
	})
}

// try fetches one message on a connection of its own.
func try(tb testing.TB, path string) error {
	tb.Helper()
	conn := dial(tb, path)
	defer conn.Close()
	stream, err := workloadpb.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(withHeader(tb), &workloadpb.X509SVIDRequest{})
	if err != nil {
		return err
	}
	_, err = stream.Recv()
	return err
}

// Neither a client that does not read, nor one that does not write, keeps Serve from
// returning or other clients from being served.
func TestStalledClients(t *testing.T) {
	t.Parallel() // it waits for seconds
	ca := newAuthority(t, "example.org")
	siblings := make([]*authority, 200) // about 80 KB, more than gRPC has room for
	for i := range siblings {
		siblings[i] = newAuthority(t, "example.org")
	}
	source := &pods{}
	state := ready(t, ca, 1)
	state.Bundles[0] = ca.bundle(1, siblings...)
	source.set(webPod, state)
	server, path := newServer(t, workload.Config{Source: source}), socketPath(t)
	stop := serve(t, server, path)
	silent, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	fetchSVID(t, dial(t, path)) // and never Recv
	await(t, server.Delivered(), func(d workload.Delivered) bool { return d.Streams == 1 })
	reading := fetchSVID(t, dial(t, path))
	recv(t, reading)
	for revision := range uint64(10) {
		state.Bundles = []workload.Bundle{ca.bundle(revision+2, siblings[revision+1:]...)}
		source.set(webPod, state)
		recv(t, reading)
	}
	if d, _ := server.Delivered().Load(); d.Streams != 2 || d.Revisions[ca.td] >= 10 {
		t.Errorf("Delivered() = %+v, want 2 streams, one of them behind", d)
	}
	begun := time.Now()
	stop()
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("Serve returned %v after the end of its context, want 5 seconds at most", took)
	}
}

func TestServeFailsWithItsListener(t *testing.T) {
	source := &pods{}
	source.set(webPod, ready(t, newAuthority(t, "example.org"), 1))
	server, path := newServer(t, workload.Config{Source: source}), socketPath(t)
	l, err := workload.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(t.Context(), l) }()
	stream := fetchSVID(t, dial(t, path))
	recv(t, stream)
	l.Close()
	if err := <-done; err == nil || !strings.Contains(err.Error(), net.ErrClosed.Error()) {
		t.Errorf("Serve() = %v, want %v", err, net.ErrClosed)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("Recv() = %v, want Unavailable", err)
	}
	if d, _ := server.Delivered().Load(); d.Streams != 0 {
		t.Errorf("Delivered() = %+v after Serve has returned, want no stream", d)
	}
}

// watcher is a go-spiffe client that watches on a connection of its own.
type watcher struct {
	updates chan *workloadapi.X509Context
	errs    chan error
}

func watch(tb testing.TB, path string) *watcher {
	tb.Helper()
	// Of size 100: the tests read what they cause, which is less.
	w := &watcher{make(chan *workloadapi.X509Context, 100), make(chan error, 100)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- workloadapi.WatchX509Context(ctx, w, workloadapi.WithAddr("unix://"+path), workloadapi.WithBackoffStrategy(atOnce{}))
	}()
	tb.Cleanup(func() {
		cancel()
		<-done
	})
	return w
}

func (w *watcher) OnX509ContextUpdate(c *workloadapi.X509Context) { w.updates <- c }

func (w *watcher) OnX509ContextWatchError(err error) {
	select {
	case w.errs <- err:
	default:
	}
}

func (w *watcher) next(tb testing.TB) *workloadapi.X509Context {
	tb.Helper()
	select {
	case c := <-w.updates:
		return c
	case <-time.After(20 * time.Second):
		tb.Fatal("no update")
		return nil
	}
}

// atOnce has clients come back sooner than by their own default, a second.
type atOnce struct{}

func (atOnce) NewBackoff() workloadapi.Backoff { return atOnce{} }
func (atOnce) Next() time.Duration             { return 10 * time.Millisecond }
func (atOnce) Reset()                          {}

func BenchmarkParseCgroup(b *testing.B) {
	file := []byte("0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-" + sliceA + "/cri-containerd-" + containerA + ".scope\n")
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := workload.ParseCgroup(file); err != nil {
			b.Fatal(err)
		}
	}
}

// A new connection, a new stream on it, and its first message.
func BenchmarkFirstMessage(b *testing.B) {
	source := &pods{}
	source.set(webPod, ready(b, newAuthority(b, "example.org"), 1))
	_, path := start(b, workload.Config{Source: source, Limits: workload.Limits{ConnectionsPerPod: 4096}})
	for b.Loop() {
		conn := dial(b, path)
		recv(b, fetchSVID(b, conn))
		conn.Close()
	}
}

// One change of the bundle, to the last of a hundred streams.
func BenchmarkPush(b *testing.B) {
	const streams = 100
	ca, next := newAuthority(b, "example.org"), newAuthority(b, "example.org")
	source := &pods{}
	state := ready(b, ca, 1)
	source.set(webPod, state)
	server, path := start(b, workload.Config{Source: source, Limits: workload.Limits{ConnectionsPerPod: streams}})
	for range streams {
		w := watch(b, path)
		w.next(b)
		go func() {
			for {
				select {
				case <-w.updates:
				case <-b.Context().Done():
					return
				}
			}
		}()
	}
	bundles := [2]workload.Bundle{ca.bundle(0), ca.bundle(0, next)}
	revision := uint64(1)
	for b.Loop() {
		revision++
		bundle := bundles[revision%2]
		bundle.Revision = revision
		state.Bundles = []workload.Bundle{bundle}
		source.set(webPod, state)
		await(b, server.Delivered(), func(d workload.Delivered) bool { return d.Revisions[ca.td] == revision })
	}
}
