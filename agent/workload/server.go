// Package workload serves the SPIFFE Workload API on a Unix socket: each process
// that connects is given the X509-SVIDs and trust bundles of the pod that it runs
// in, and is told of every change for as long as it listens.
//
// Start with [Listen], [New] and [Server.Serve]. What a pod is entitled to comes
// from a [Source]; which pod a process runs in comes from the kernel, by
// [CgroupPod].
//
// It guarantees that a caller proves nothing and is asked nothing: the kernel says
// which process connected, holds on to that process while it is looked up, and
// says before every message whether it still lives. A stream carries complete
// states, the newest only, and only if they differ from what was sent before. The
// last message stands when the control plane is away.
//
// It refuses what is not a Unix socket, requests without the header that keeps
// them from being forged through a proxy (SPIFFE Workload Endpoint §3), processes
// that run in no pod, that have ended, or whose pod cannot be told without doubt,
// and pods without an identity. Nothing of a refusal is remembered: the next call
// is decided afresh.
package workload

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"troth.dev/troth/internal/latest"
)

// Config is what a [Server] is made of.
type Config struct {
	// Source says what each pod is entitled to. Required.
	Source Source
	// PodOf returns the UID of the pod that a process runs in. It may be called
	// many times for one process, and from many goroutines. Nil means
	// [CgroupPod]. The server asks Peer.Alive after each call, never before it.
	PodOf func(Peer) (podUID string, err error)
	// Patience is how long a stream waits for its first state before the caller
	// is told to try again. Zero means 10 seconds.
	Patience time.Duration
	// Limits bound what callers can make the server hold.
	Limits Limits
	// Log receives the refusals, with their reasons. Nil means that nothing is
	// logged.
	Log *slog.Logger
}

// Limits bound what callers can make the server hold. One pod cannot use up what
// all share, unless the limit for a pod is set as high as the limit for all.
type Limits struct {
	Connections       int // in all; zero means 4096
	ConnectionsPerPod int // zero means 64
	Streams           int // in all; zero means 8192
	StreamsPerPod     int // zero means 128
}

// Server serves the Workload API.
type Server struct {
	source   Source
	podOf    func(Peer) (string, error)
	patience time.Duration
	log      *slog.Logger

	refusals    *rate.Limiter // of log lines
	connections *quota
	streams     *quota
	deliveries  *deliveries
	handed      *handedOut
}

// New returns a server. It starts nothing. It fails if c has no Source, or a
// negative time or limit.
func New(c Config) (*Server, error) {
	if c.Source == nil {
		return nil, errors.New("workload: no Source")
	}
	if c.Patience < 0 {
		return nil, fmt.Errorf("workload: negative Patience %q", c.Patience)
	}
	if l := c.Limits; min(l.Connections, l.ConnectionsPerPod, l.Streams, l.StreamsPerPod) < 0 {
		return nil, fmt.Errorf("workload: negative limit in %+v", l)
	}
	s := &Server{
		source:   c.Source,
		podOf:    c.PodOf,
		patience: or(c.Patience, 10*time.Second),
		log:      c.Log,
		// A pod that asks in a loop must not fill the node's disk with our answers.
		refusals:    rate.NewLimiter(10, 100),
		connections: newQuota(or(c.Limits.Connections, 4096), or(c.Limits.ConnectionsPerPod, 64)),
		streams:     newQuota(or(c.Limits.Streams, 8192), or(c.Limits.StreamsPerPod, 128)),
		deliveries:  newDeliveries(),
		handed:      newHandedOut(),
	}
	if s.podOf == nil {
		s.podOf = CgroupPod
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	return s, nil
}

func or[T comparable](value, otherwise T) T {
	var zero T
	if value == zero {
		return otherwise
	}
	return value
}

// Serve answers the callers that l accepts, until ctx ends. Then it tells every
// stream Unavailable, so that the clients come back to whoever serves next, closes
// l, and returns nil once the last stream is done, which takes five seconds at
// most. It fails if l is not a listener of Unix sockets, or breaks.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	// SPIFFE Workload Endpoint §3 allows TCP only where the network says who calls.
	if network := l.Addr().Network(); network != "unix" {
		return fmt.Errorf("workload: callers on %q are not known by the kernel: only a Unix socket will do", network)
	}
	g := grpc.NewServer(
		grpc.Creds(kernelCredentials{s}),
		grpc.InTapHandle(demandHeader),
		grpc.WaitForHandlers(true),

		// The longest request is a JWT-SVID to validate, of a few KiB.
		grpc.MaxRecvMsgSize(64<<10),
		grpc.MaxHeaderListSize(16<<10),
		grpc.MaxConcurrentStreams(32),
		grpc.ConnectionTimeout(5*time.Second),
		// A process that ends closes its socket. These are for one that is stopped,
		// or that holds a connection without a stream.
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time:              2 * time.Minute,
			Timeout:           20 * time.Second,
			MaxConnectionIdle: 10 * time.Minute,
		}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{
			MinTime:             10 * time.Second,
			PermitWithoutStream: true,
		}),
		// Messages are small and rare; the default buffers take 64 KiB a connection.
		grpc.ReadBufferSize(4<<10),
		grpc.WriteBufferSize(4<<10),
	)
	workload.RegisterSpiffeWorkloadAPIServer(g, &endpoint{server: s, draining: ctx.Done()})

	broken := make(chan error, 1) // of size 1: the goroutine ends though nobody listens any more
	go func() { broken <- g.Serve(listener{l}) }()
	select {
	case err := <-broken:
		g.Stop()
		return fmt.Errorf("workload: serve: %w", err)
	case <-ctx.Done():
	}

	// Streams see that ctx has ended, and end themselves. One that is stuck in a
	// write to a reader that does not read cannot: it is cut.
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		g.GracefulStop()
	}()
	select {
	case <-drained:
	case <-time.After(2 * time.Second):
		g.Stop()
		<-drained
	}
	<-broken //nolint:errcheck // it ended because it was stopped
	return nil
}

// Delivered returns what the streams have been sent, kept current for as long as
// the server lives.
func (s *Server) Delivered() *latest.Value[Delivered] { return s.deliveries.newest }

// HandedOut returns the SVIDs that have been sent to processes of pods that the
// source does not deny, that have not expired at the time now, and that the process
// has not been sent a newer one for, each once. The channel is closed when there is
// another. An SVID is in it from before it is sent.
func (s *Server) HandedOut(now time.Time) (leaves []Leaf, changed <-chan struct{}) {
	_, changed = s.handed.changed.Load()
	return s.handed.unexpired(now, func(podUID string) bool {
		value, release := s.source.Workload(podUID)
		defer release()
		state, _ := value.Load()
		return state.Status == StatusDenied
	}), changed
}

// demandHeader refuses a request without the header "workload.spiffe.io: true"
// (SPIFFE Workload Endpoint §3). A browser, or a service that can be talked into
// fetching a URL, cannot be made to set it. The check stands where gRPC meets a
// request first, before there is a method or a message to look at, so that no
// service and no unknown method of the socket is without it.
func demandHeader(ctx context.Context, request *tap.Info) (context.Context, error) {
	if values := request.Header.Get("workload.spiffe.io"); len(values) != 1 || values[0] != "true" {
		return ctx, status.Error(codes.InvalidArgument, `the request must carry the header "workload.spiffe.io: true", once`)
	}
	return ctx, nil
}
