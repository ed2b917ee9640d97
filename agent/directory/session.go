package directory

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"

	trothv1 "troth.dev/troth/api/troth/v1"
)

// session is one stream of the control plane's DirectoryService.
type session struct {
	wake  chan struct{} // there is something to send
	ended time.Time     // guarded by Directory.mu; zero while the session lasts

	resolve map[netip.Addr]struct{} // guarded by Directory.mu; to be asked about
	forget  map[netip.Addr]struct{} // guarded by Directory.mu; to be forgotten
	held    map[netip.Addr]struct{} // guarded by Directory.mu; what the server keeps, once it has read all that was sent
}

// nudge has the session look at what there is to send.
func (s *session) nudge() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Run holds one session over conn: it asks about every address that is remembered
// or waited for, and takes in what changes. It returns nil when ctx ends, and the
// error that the session ended by otherwise; whoever called it tries again, later.
// What was learnt stays. It fails if another session runs.
func (d *Directory) Run(ctx context.Context, conn grpc.ClientConnInterface) error {
	ctx, cancel := context.WithCancel(ctx)
	stream, err := trothv1.NewDirectoryServiceClient(conn).Resolve(ctx, grpc.MaxCallRecvMsgSize(maxMessage))
	if err != nil {
		defer cancel()
		return ended(ctx, err)
	}
	s, err := d.begin()
	if err != nil {
		cancel()
		return err
	}
	var sending sync.WaitGroup
	sending.Go(func() { d.send(ctx, s, stream) })
	defer func() {
		cancel()
		sending.Wait()
		d.end(s)
	}()
	for {
		response, err := stream.Recv()
		if err == nil {
			err = d.receive(ctx, s, response)
		}
		if err != nil {
			return ended(ctx, err)
		}
	}
}

// ended is what a session ended by, unless it was to end.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil //nolint:nilerr // the end that was asked for is no error
	}
	return fmt.Errorf("directory: %w", err)
}

// begin makes a session the one that there is, with all there is to ask about.
func (d *Directory) begin() (*session, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.session != nil {
		return nil, errors.New("directory: another session runs")
	}
	s := &session{
		wake:    make(chan struct{}, 1),
		resolve: make(map[netip.Addr]struct{}),
		forget:  make(map[netip.Addr]struct{}),
		held:    make(map[netip.Addr]struct{}),
	}
	d.session = s
	for address := range d.asked {
		s.resolve[address] = struct{}{}
	}
	for _, address := range d.known.Keys() {
		s.resolve[address] = struct{}{}
	}
	s.nudge()
	d.config.Metrics.connected.Set(1)
	return s, nil
}

func (d *Directory) end(s *session) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s.ended = time.Now()
	d.session = nil
	d.config.Metrics.connected.Set(0)
}

// maxNamed is how many addresses a message may name.
const maxNamed = 1024

// send sends what there is to ask and to forget, until ctx ends or the stream does:
// Recv says why.
func (d *Directory) send(ctx context.Context, s *session, stream grpc.BidiStreamingClient[trothv1.ResolveRequest, trothv1.ResolveResponse]) {
	for {
		select {
		case <-s.wake:
		case <-ctx.Done():
			return
		}
		forget, resolve := d.pending(s)
		// What is to be forgotten goes first, so that the server never holds more than
		// is remembered here.
		for part := range slices.Chunk(forget, maxNamed) {
			if stream.Send(&trothv1.ResolveRequest{Forget: part}) != nil {
				return
			}
		}
		for part := range slices.Chunk(resolve, maxNamed) {
			if stream.Send(&trothv1.ResolveRequest{Resolve: part}) != nil {
				return
			}
		}
	}
}

// pending takes all that is to be sent.
func (d *Directory) pending(s *session) (forget, resolve []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for address := range s.forget {
		forget = append(forget, address.String())
		delete(s.held, address)
	}
	for address := range s.resolve {
		resolve = append(resolve, address.String())
	}
	maps.Copy(s.held, s.resolve)
	clear(s.forget)
	clear(s.resolve)
	return forget, resolve
}

// receive learns one answer.
func (d *Directory) receive(ctx context.Context, s *session, in *trothv1.ResolveResponse) error {
	address, err := parseAddress(in.GetAddress())
	if err != nil {
		return fmt.Errorf("an answer for no address: %w", err)
	}
	a, refused := parseAnswer(address, in)
	if refused != nil {
		// The others may be well. This one counts too: what it was before is not true
		// any more.
		a = &answer{refused: refused}
	}
	// Nobody may want it any more: the server has not read yet that it is forgotten.
	if d.take(s, address, a) && refused != nil {
		d.config.Metrics.refused.Inc()
		d.config.Log.LogAttrs(ctx, slog.LevelWarn, "an answer of the directory makes no sense; nothing is sent there",
			slog.String("address", address.String()), slog.Any("err", refused))
	}
	return nil
}
