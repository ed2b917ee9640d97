// Package postgres keeps the certificate authority's memory in a PostgreSQL
// database: the store for a control plane of several replicas. Start with [Open].
//
// It guarantees what the contracts of package storage demand. What was acknowledged
// survives a crash of the database's processes and machine, because every commit
// waits for its place in the write-ahead log to be flushed: the store sets
// synchronous_commit itself, whatever the role or the database say. Whether it also
// survives the loss of the machine is the database's to promise: unless
// synchronous_standby_names makes a commit wait for a standby, a failover loses the
// last ones, and Load goes back to an earlier document. fsync must be on there.
//
// It refuses to talk to a standby or through a read-only session, for a Load there
// would be late. It refuses a database whose encoding is not UTF-8, a schema of
// another program, and one of a newer version of this program. Over TCP it verifies
// the server's certificate and name, unless the URL says otherwise.
//
// Everything it has is in the schema "troth", so that it can share a database. It
// needs sessions of its own: PgBouncer in transaction mode will not do.
//
// Nothing waits without end. Every call ends with its ctx, or when the server has
// not answered for a while, 10 seconds for most. When the server is back the store
// goes on by itself.
package postgres

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"troth.dev/troth/internal/latest"
	"troth.dev/troth/storage"
)

// Config says where the store is.
type Config struct {
	// URL names the database, as libpq spells it:
	//
	//	postgres://user:password@host:5432/database?sslrootcert=ca.pem
	//
	// Required. It must name the primary, or several hosts of which one is. What
	// it leaves out comes from libpq's environment variables, but for some that
	// have a default here: sslmode=verify-full, connect_timeout=5 (seconds), and
	// pool_max_conns=8, to which one more for notifications is added.
	URL string
	// Log is told when notifications are cut and when they are back. Nil discards.
	Log *slog.Logger
}

const (
	// callTimeout is how long one exchange with the server may take, and how long
	// a Record may wait for its turn and have it.
	callTimeout = 10 * time.Second
	// scanTimeout is the same for what may have to read the whole ledger: at
	// 0.3 us a row, a hundred million of them.
	scanTimeout = 30 * time.Second
	// openTimeout is how long Open may take, with all its migrations.
	openTimeout = 5 * time.Minute
	// dialTimeout, in seconds, is how long it may take to connect to one host.
	dialTimeout = "5"
	// maxConns is how many connections there are, that for notifications apart.
	maxConns = "8"
)

var errUnanswered = errors.New("the database did not answer in time")

// Store is an open database. It implements [storage.AuthorityStore],
// [storage.Ledger], [storage.FleetStore] and [storage.TokenStore]. Any number of
// them, in any number of processes, share a database. Whoever opened it closes it.
type Store struct {
	document // of the trust domain
	tests    document

	// Immutable after Open.
	pool *pgxpool.Pool
	log  *slog.Logger
	// scans has a place for each slow reader, so that together they leave
	// connections for those who are in a hurry.
	scans chan struct{}

	changed latest.Value[struct{}] // set when a document may be another, to wake Watch

	calls   chan *call         // what Records wait for
	closing chan struct{}      // closed by Close
	hangUp  context.CancelFunc // ends listen
	running sync.WaitGroup     // commitGroups and listen
	stopped chan struct{}      // closed when they have returned
	close   func()             // once
}

var (
	_ storage.AuthorityStore = (*Store)(nil)
	_ storage.Ledger         = (*Store)(nil)
	_ storage.FleetStore     = (*Store)(nil)
	_ storage.TokenStore     = (*Store)(nil)
)

// Open connects to the database and brings its schema up to date, or makes it:
// then its role needs the right to create a schema there, or to own an empty one
// of the name "troth". Several replicas may open a new database at once. ctx bounds
// the opening only, which takes five minutes at most; the Store has to be closed.
// A database that is down is an error.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	config, err := configure(cfg.URL)
	if err != nil {
		return nil, fmt.Errorf("postgres: %w", err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, openTimeout, errUnanswered)
	defer cancel()
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, fmt.Errorf("postgres: %w", err)
	}
	err = pool.AcquireFunc(ctx, func(conn *pgxpool.Conn) error {
		// Others lack characters that a SPIFFE ID's neighbours in a row may have.
		if encoding := conn.Conn().PgConn().ParameterStatus("server_encoding"); encoding != "UTF8" {
			return fmt.Errorf("the database has the encoding %s: create one with ENCODING 'UTF8'", encoding)
		}
		return migrate(ctx, conn.Conn(), schema())
	})
	if err != nil {
		pool.Close()
		return nil, fmt.Errorf("postgres: open database %q: %w", config.ConnConfig.Database, ended(ctx, err))
	}
	return start(context.WithoutCancel(ctx), pool, cfg.Log), nil
}

func start(ctx context.Context, pool *pgxpool.Pool, log *slog.Logger) *Store {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	listening, hangUp := context.WithCancel(ctx)
	s := &Store{
		pool:    pool,
		log:     log,
		scans:   make(chan struct{}, max(1, pool.Config().MaxConns/2)),
		calls:   make(chan *call, maxQueue),
		closing: make(chan struct{}),
		hangUp:  hangUp,
		stopped: make(chan struct{}),
	}
	s.document, s.tests = document{s, "troth.document"}, document{s, "troth.test_document"}
	s.close = sync.OnceFunc(func() {
		close(s.closing)
		s.hangUp()
		s.running.Wait()
		close(s.stopped)
		s.pool.Close() // waits for those in use
	})
	for range committers {
		s.running.Go(func() { s.commitGroups(ctx) })
	}
	s.running.Go(func() { s.listen(listening) })
	return s
}

// Close waits until what is being read or written has ended, and closes all
// connections: for three quarters of a minute at most, if the database does not
// answer. Every method that is called later returns [storage.ErrClosed], and so do
// a Watch, a Record that still waits in the queue, and a Prune that is not done. To
// close twice is harmless. It returns nil.
func (s *Store) Close() error {
	s.close()
	return nil
}

func (s *Store) isClosed() bool {
	select {
	case <-s.closing:
		return true
	default:
		return false
	}
}

// enter begins a call, which ends with the ctx that it returns: with the given one,
// or after limit. Unless it returns an error, leave has to be called.
func (s *Store) enter(ctx context.Context, limit time.Duration) (_ context.Context, leave func(), err error) {
	if s.isClosed() {
		return nil, nil, storage.ErrClosed
	}
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, errUnanswered)
	return ctx, cancel, nil
}

// enterScan is enter for a slow reader, which waits for its place.
func (s *Store) enterScan(ctx context.Context) (_ context.Context, leave func(), err error) {
	ctx, cancel, err := s.enter(ctx, scanTimeout)
	if err != nil {
		return nil, nil, err
	}
	select {
	case s.scans <- struct{}{}:
		return ctx, func() { <-s.scans; cancel() }, nil
	case <-ctx.Done():
		err = ended(ctx, ctx.Err())
	case <-s.closing:
		err = storage.ErrClosed
	}
	cancel()
	return nil, nil, err
}

// failure returns the error of a call that was doing something under the ctx that
// enter had returned.
func (s *Store) failure(ctx context.Context, doing string, err error) error {
	if _, ok := errors.AsType[*pgconn.PgError](err); !ok && ctx.Err() == nil && s.isClosed() {
		return storage.ErrClosed
	}
	return fmt.Errorf("postgres: %s: %w", doing, ended(ctx, err))
}

// ended returns why ctx ended, if that is what err comes from, or else err. Who
// asks for context.DeadlineExceeded means a deadline of their own, not one of ours.
func ended(ctx context.Context, err error) error {
	_, answered := errors.AsType[*pgconn.PgError](err)
	switch {
	case answered:
		return err
	case ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded): // that for a dial
		return fmt.Errorf("%w: %s", errUnanswered, err.Error())
	case ctx.Err() == nil:
		return err
	case errors.Is(context.Cause(ctx), errUnanswered):
		return errUnanswered
	default:
		return ctx.Err()
	}
}

// configure reads a URL, and says on what terms we talk to its server.
func configure(given string) (*pgxpool.Config, error) {
	if given == "" {
		return nil, errors.New("Config.URL is empty")
	}
	// An error of url.Parse has the URL in it, and that the password.
	u, err := url.Parse(given)
	if err != nil || u.Scheme != "postgres" && u.Scheme != "postgresql" {
		return nil, errors.New("Config.URL is not of the form postgres://user:password@host:port/database")
	}
	// Appended, for libpq reads the rest as it stands: a + there is no space.
	for _, parameter := range []string{"sslmode=verify-full", "connect_timeout=" + dialTimeout, "pool_max_conns=" + maxConns} {
		if name, _, _ := strings.Cut(parameter, "="); !u.Query().Has(name) {
			u.RawQuery = strings.TrimPrefix(u.RawQuery+"&"+parameter, "&")
		}
	}
	config, err := pgxpool.ParseConfig(u.String())
	if err != nil {
		return nil, fmt.Errorf("Config.URL: %w", err) // without the password
	}

	// How long a connection may lie there before its use finds out that it is dead.
	config.PingTimeout = 2 * time.Second
	conn := config.ConnConfig
	conn.ValidateConnect = validate
	// Finds a host that has vanished within half a minute, also on connections
	// that nobody uses.
	dialer := net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3}}
	conn.DialFunc = dialer.DialContext
	// These go with the first packet, and so come before what the role, the
	// database and the server's configuration say.
	for name, value := range map[string]string{
		"synchronous_commit":            "on",             // flush on every commit: what "durable" means
		"default_transaction_isolation": "read committed", // for an UPDATE to see what it waited for
		"search_path":                   "pg_catalog",     // nobody can put their functions before the built-in ones
		// What a client gave up on, or left behind when it vanished, ends too.
		"statement_timeout":                   milliseconds(scanTimeout),
		"idle_in_transaction_session_timeout": milliseconds(scanTimeout),
	} {
		conn.RuntimeParams[name] = value
	}
	if conn.RuntimeParams["application_name"] == "" {
		conn.RuntimeParams["application_name"] = "troth"
	}
	return config, nil
}

func milliseconds(d time.Duration) string {
	return strconv.FormatInt(d.Milliseconds(), 10)
}

// validate refuses a server that cannot be written to, whatever
// target_session_attrs says. If the URL names several hosts, the next one is tried.
func validate(ctx context.Context, conn *pgconn.PgConn) error {
	err := pgconn.ValidateConnectTargetSessionAttrsReadWrite(ctx, conn)
	if errors.Is(err, pgconn.ErrReadOnlyConnection) {
		return errors.New("the server is a standby, or the session is read-only: Config.URL must name the primary")
	}
	return err
}

// unique reports whether err says that a unique index has the key already.
func unique(err error) bool {
	e, ok := errors.AsType[*pgconn.PgError](err)
	return ok && e.Code == "23505" // unique_violation
}
