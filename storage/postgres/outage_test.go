package postgres_test

import (
	"context"
	"errors"
	"net"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"troth.dev/troth/storage"
	"troth.dev/troth/storage/postgres"
	postgrestest "troth.dev/troth/test/postgres"
)

// The database is killed under Records, or restarted. No call hangs, what was
// acknowledged is there afterwards, and the store goes on by itself.
func TestOutageUnderLoad(t *testing.T) {
	s := open(t)
	for name, begin := range map[string]func(testing.TB){"killed": server.Kill, "killed again": server.Kill, "stopped": server.Stop} {
		t.Run(name, func(t *testing.T) {
			var mu sync.Mutex
			var acknowledged []string // guarded by mu
			busy := make(chan struct{}, 1)
			var all sync.WaitGroup
			for range 16 {
				all.Go(func() {
					for {
						i := issuance()
						err := s.Record(t.Context(), i)
						if errors.Is(err, storage.ErrDuplicateSerial) {
							t.Errorf("Record during an outage = %v", err)
						}
						if err != nil {
							return
						}
						mu.Lock()
						if acknowledged = append(acknowledged, i.Serial); len(acknowledged) == 500 {
							busy <- struct{}{}
						}
						mu.Unlock()
					}
				})
			}
			watched := make(chan error, 1)
			d, err := s.Load(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			go func() {
				_, err := s.Watch(t.Context(), d.Version)
				watched <- err
			}()
			<-busy
			begin(t)
			all.Wait()
			if err := <-watched; err == nil {
				t.Error("Watch during an outage = nil, want the error of Load")
			}
			server.Start(t)
			eventually(t, func() error { return s.Record(t.Context(), issuance()) })
			eventually(t, func() error { _, err := s.Load(t.Context()); return err })
			checkRecorded(t, s, acknowledged)
			t.Logf("%d acknowledged, none lost", len(acknowledged))
		})
	}
}

// Nobody answers: each call ends with its context, or by a bound of its own.
func TestFrozen(t *testing.T) {
	t.Parallel()
	server := postgrestest.Start(t)
	s := openAt(t, server.Database(t))
	before := issuance()
	if err := s.Record(t.Context(), before); err != nil {
		t.Fatal(err)
	}
	calls := map[string]func(ctx context.Context) error{
		"Load":      func(ctx context.Context) error { _, err := s.Load(ctx); return err },
		"Swap":      func(ctx context.Context) error { _, err := s.Swap(ctx, "", nil); return err },
		"Watch":     func(ctx context.Context) error { _, err := s.Watch(ctx, ""); return err },
		"Record":    func(ctx context.Context) error { return s.Record(ctx, issuance()) },
		"Publish":   func(ctx context.Context) error { return s.Publish(ctx, "a", nil) },
		"Withdraw":  func(ctx context.Context) error { return s.Withdraw(ctx, "a") },
		"Summaries": func(ctx context.Context) error { _, err := s.Summaries(ctx); return err },
		"Query":     func(ctx context.Context) error { _, err := s.Query(ctx, storage.Query{}); return err },
		"Prune":     func(ctx context.Context) error { _, err := s.Prune(ctx, epoch); return err },
	}
	other := server.Database(t)
	server.Freeze(t)
	thaw := sync.OnceFunc(func() { server.Thaw(t) })
	defer thaw()
	var all sync.WaitGroup
	for name, call := range calls {
		all.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			if err := call(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s of a frozen database = %v, want its context's error", name, err)
			}
		})
	}
	if err := openWithin(t, other, 50*time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Open of a frozen database = %v, want its context's error", err)
	}
	all.Wait()

	delete(calls, "Query") // half a minute
	delete(calls, "Prune")
	for name, call := range calls {
		all.Go(func() {
			err := call(context.Background())
			if err == nil || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, storage.ErrConflict) {
				t.Errorf("%s of a frozen database, without a deadline = %v, want an error that is not that of a context", name, err)
			}
		})
	}
	all.Wait()
	thaw()
	eventually(t, func() error { return s.Record(t.Context(), issuance()) })
	checkRecorded(t, s, []string{before.Serial})
}

func openWithin(t *testing.T, at string, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	s, err := postgres.Open(ctx, postgres.Config{URL: at})
	if err == nil {
		s.Close()
	}
	return err
}

// A replica that is cut off is closed without waiting for the network for long.
func TestCloseOfFrozen(t *testing.T) {
	t.Parallel()
	server := postgrestest.Start(t)
	s := openAt(t, server.Database(t))
	if _, err := s.Load(t.Context()); err != nil {
		t.Fatal(err)
	}
	server.Freeze(t)
	defer server.Thaw(t)
	recorded := make(chan error, 1)
	go func() { recorded <- s.Record(t.Context(), issuance()) }()
	eventually(t, func() error {
		if !s.Using() {
			return errors.New("nobody records")
		}
		return nil
	})
	if err := s.Close(); err != nil { // go test's own limit is the deadline
		t.Errorf("Close() = %v", err)
	}
	if err := <-recorded; err == nil {
		t.Error("Record of a frozen database = nil")
	}
}

// The server is there, and somebody keeps it from answering for longer than anybody
// should wait.
func TestCallIsBounded(t *testing.T) {
	t.Parallel()
	at := server.Database(t)
	s := openAt(t, at)
	lock(t, at, "SELECT FROM troth.document FOR UPDATE")
	_, err := s.Swap(context.Background(), "", nil)
	if err == nil || !strings.Contains(err.Error(), "did not answer in time") || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Swap without a deadline = %v, want the store's own bound", err)
	}
}

// The connection is cut while a Swap waits in the database, and it did not swap.
func TestSwapIsTerminated(t *testing.T) {
	at := server.Database(t)
	s := openAt(t, with(at, "application_name", "swapping"))
	first, err := s.Swap(t.Context(), "", []byte("first"))
	if err != nil {
		t.Fatal(err)
	}
	unlock := lock(t, at, "SELECT FROM troth.document FOR UPDATE")
	swapped := make(chan error, 1)
	go func() {
		_, err := s.Swap(t.Context(), first.Version, []byte("second"))
		swapped <- err
	}()
	const waiting = "FROM pg_stat_activity WHERE application_name = 'swapping' AND wait_event_type = 'Lock'"
	await(t, at, "SELECT count(*) = 1 "+waiting)
	server.Execute(t, at, "SELECT pg_terminate_backend(pid) "+waiting)
	if err := <-swapped; err == nil || errors.Is(err, storage.ErrConflict) {
		t.Errorf("Swap whose connection was cut = %v, want an error that is not ErrConflict", err)
	}
	unlock()
	if d, err := s.Load(t.Context()); d.Version != first.Version || err != nil {
		t.Errorf("Load() = version %q, %v, want the one before", d.Version, err)
	}
}

// The connection is cut before the server has the request, or after it has, and
// before the client has the reply. The client cannot tell one from the other: Load
// can, and so does the next Swap.
func TestSwapIsCut(t *testing.T) {
	for _, cut := range []struct {
		name    string
		mode    int32
		swapped bool
	}{{"request", cutRequest, false}, {"reply", cutReply, true}} {
		t.Run(cut.name, func(t *testing.T) {
			p := startProxy(t, server.Database(t))
			s := openAt(t, with(p.url, "pool_max_conns", "1"))
			// A connection that was idle for long would be tried first, and that
			// be what is cut: then another round.
			for range 10 {
				var before storage.Document
				eventually(t, func() (err error) { before, err = s.Load(t.Context()); return err })
				before, err := s.Swap(t.Context(), before.Version, []byte("before"))
				if err != nil {
					t.Fatal(err)
				}
				p.mode.Store(cut.mode)
				_, err = s.Swap(t.Context(), before.Version, []byte("after"))
				p.mode.Store(pass)
				if err == nil || errors.Is(err, storage.ErrConflict) {
					t.Fatalf("Swap whose %s was cut = %v, want an error that is not ErrConflict", cut.name, err)
				}
				var after storage.Document
				eventually(t, func() (err error) { after, err = s.Load(t.Context()); return err })
				if swapped := after.Version != before.Version; swapped != cut.swapped {
					continue
				}
				_, err = s.Swap(t.Context(), before.Version, []byte("again"))
				if conflict := errors.Is(err, storage.ErrConflict); conflict != cut.swapped || !conflict && err != nil {
					t.Errorf("Swap again = %v, want ErrConflict: %t", err, cut.swapped)
				}
				return
			}
			t.Errorf("in no round was the document replaced: %t", cut.swapped)
		})
	}
}

// The network drops everything in both directions: what Watch waits for is found
// when it is back, although no connection was ever cut.
func TestPartition(t *testing.T) {
	t.Parallel()
	at := server.Database(t)
	p := startProxy(t, at)
	s, other := openAt(t, p.url), openAt(t, at)
	if _, err := s.Load(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.mode.Store(drop)
	if err := s.Record(t.Context(), issuance()); err == nil {
		t.Error("Record through a partition = nil")
	}
	swapped, err := other.Swap(t.Context(), "", []byte("meanwhile"))
	if err != nil {
		t.Fatal(err)
	}
	p.mode.Store(pass)
	// What was dropped stays dropped: those connections are found to be dead.
	eventually(t, func() error { _, err := s.Load(t.Context()); return err })
	second, err := other.Swap(t.Context(), swapped.Version, []byte("afterwards"))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		d, err := s.Watch(t.Context(), swapped.Version)
		if err == nil && d.Version != second.Version {
			t.Errorf("Watch = %q, want %q", d.Version, second.Version)
		}
		return err
	})
}

// eventually calls do until it succeeds, for half a minute at most.
func eventually(t *testing.T, do func() error) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	for {
		err := do()
		if err == nil {
			return
		}
		select {
		case <-deadline:
			t.Fatalf("the store did not recover: %v", err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// await waits until a query returns true.
func await(t *testing.T, at, query string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), at)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	eventually(t, func() error {
		var holds bool
		if err := conn.QueryRow(t.Context(), query).Scan(&holds); err != nil {
			return err
		}
		if !holds {
			return errors.New("not true: " + query)
		}
		return nil
	})
}

// lock executes a statement and keeps its locks, as another program would, until
// unlock.
func lock(t *testing.T, at, statement string) (unlock func()) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), at)
	if err != nil {
		t.Fatal(err)
	}
	unlock = sync.OnceFunc(func() { conn.Close(context.WithoutCancel(t.Context())) })
	t.Cleanup(unlock)
	if _, err := conn.Exec(t.Context(), "BEGIN; "+statement); err != nil {
		t.Fatal(err)
	}
	return unlock
}

// with returns the URL with one more parameter.
func with(at, name, value string) string {
	u, err := url.Parse(at)
	if err != nil {
		panic(err)
	}
	query := u.Query()
	query.Set(name, value)
	u.RawQuery = strings.ReplaceAll(query.Encode(), "+", "%20") // as libpq spells a space
	return u.String()
}

// The modes of a proxy.
const (
	pass       int32 = iota
	cutRequest       // cut the connection instead of passing on what the client says
	cutReply         // cut the connection instead of passing on what the server says
	drop             // pass on nothing
)

// proxy stands between a store and its database.
type proxy struct {
	url  string
	mode atomic.Int32
}

func startProxy(t *testing.T, at string) *proxy {
	t.Helper()
	u, err := url.Parse(at)
	if err != nil {
		t.Fatal(err)
	}
	const socket = ".s.PGSQL.5432"
	target := filepath.Join(u.Query().Get("host"), socket)
	dir := t.TempDir()
	listener, err := net.Listen("unix", filepath.Join(dir, socket))
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{url: with(at, "host", dir)}
	var running sync.WaitGroup
	t.Cleanup(func() { listener.Close(); running.Wait() })
	running.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			database, err := net.Dial("unix", target)
			if err != nil {
				client.Close()
				continue
			}
			running.Go(func() { p.pump(client, database, cutRequest) })
			running.Go(func() { p.pump(database, client, cutReply) })
		}
	})
	return p
}

// pump passes on what it reads, until either end is closed or the mode is cut.
func (p *proxy) pump(from, to net.Conn, cut int32) {
	defer from.Close()
	defer to.Close()
	buffer := make([]byte, 64<<10)
	for {
		n, err := from.Read(buffer)
		switch mode := p.mode.Load(); {
		case mode == cut:
			return
		case mode != drop:
			if _, err := to.Write(buffer[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}
