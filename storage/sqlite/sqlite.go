// Package sqlite keeps the certificate authority's memory in one SQLite file:
// the embedded default, for a control plane of one replica. Start with [Open].
//
// It guarantees what the contracts of package storage demand: what was
// acknowledged survives a crash of process and machine, because every commit is
// followed by an fsync of the write-ahead log. Concurrent Records share one
// commit, so that a burst pays for one fsync and a lone Record waits for nobody.
//
// It refuses to share: one process owns the file, and a second one, or a second
// Open, gets an error. It refuses files of other programs and of newer versions
// of this one. The file and its companions are readable by their owner only.
//
// Beside the file lie its write-ahead log (-wal), the log's index (-shm) and the
// lock file (.lock), which stays behind, empty. All of them belong on a local
// file system: SQLite's log does not work over NFS.
package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
	_ "modernc.org/sqlite" // the driver

	"troth.dev/troth/storage"
)

// Config says where the store is.
type Config struct {
	// Path is the database file, made if it is not there. Required. Its folder
	// has to exist and to be writable, for SQLite keeps files beside it.
	Path string
}

// Store is an open database file. It implements [storage.AuthorityStore],
// [storage.Ledger], [storage.FleetStore] and [storage.TokenStore]. Whoever opened it
// closes it.
type Store struct {
	document // of the trust domain
	tests    document

	// Immutable after Open.
	lock   *os.File  // holds the flock that makes this process the owner
	writer *sql.DB   // of one connection: to have it is to be the only writer
	reader *sql.DB   // snapshots beside the writer, which never wait for it
	insert *sql.Stmt // on writer

	calls   chan *call    // what Records wait for
	use     sync.RWMutex  // read-held by Load, Swap, Query and Prune; held by Close
	closing chan struct{} // closed by Close
	stopped chan struct{} // closed when commitGroups has returned
	close   func() error  // once; later calls return the same
}

var (
	_ storage.AuthorityStore = (*Store)(nil)
	_ storage.Ledger         = (*Store)(nil)
	_ storage.FleetStore     = (*Store)(nil)
	_ storage.TokenStore     = (*Store)(nil)
)

// Open opens the database file, and makes it if it is not there. It checks that
// nobody else has it open, that it is ours, and that its schema is known. A file
// that others could read is made private. ctx bounds the opening only; the Store
// has to be closed.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	if cfg.Path == "" {
		return nil, errors.New("sqlite: Config.Path is empty")
	}
	s := &Store{
		calls:   make(chan *call, maxQueue),
		closing: make(chan struct{}),
		stopped: make(chan struct{}),
	}
	s.document.store, s.document.table = s, "document"
	s.tests.store, s.tests.table = s, "test_document"
	if err := s.open(ctx, cfg.Path); err != nil {
		return nil, fmt.Errorf("sqlite: open %q: %w", cfg.Path, errors.Join(err, s.release()))
	}
	s.close = sync.OnceValue(func() error {
		close(s.closing)
		<-s.stopped
		s.use.Lock() // the connections' Close would not wait for those in use
		defer s.use.Unlock()
		return s.release()
	})
	go s.commitGroups(context.WithoutCancel(ctx))
	return s, nil
}

func (s *Store) open(ctx context.Context, path string) error {
	path, err := private(path)
	if err != nil {
		return err
	}
	if s.lock, err = own(path); err != nil {
		return err
	}
	version, err := inspect(ctx, path)
	if err != nil {
		return err
	}

	s.writer, err = connect(path, url.Values{
		"_txlock": {"immediate"},
		"_pragma": {
			"journal_mode(wal)",
			"synchronous(full)", // fsync the log on every commit: what "durable" means
			// Most of by_serial stays in a cache of 16 MB, and a log of 16 MB (4,000
			// pages) collects several changes of a page before it is written back:
			// 12 to 17% more Records per second than with the defaults.
			"cache_size(-16000)",
			"wal_autocheckpoint(4000)",
		},
	})
	if err != nil {
		return err
	}
	s.writer.SetMaxOpenConns(1)
	if err := s.migrate(ctx, version); err != nil {
		return err
	}
	if s.insert, err = s.writer.PrepareContext(ctx, insertIssuance); err != nil {
		return err
	}

	s.reader, err = connect(path, url.Values{"_query_only": {"true"}})
	if err != nil {
		return err
	}
	s.reader.SetMaxOpenConns(4) // bounds the memory of concurrent queries; others wait
	return s.reader.PingContext(ctx)
}

// Close waits until what is being read or written has ended, and releases the
// file. What was acknowledged is on disk. Every method that is called later
// returns [storage.ErrClosed], and so do a Watch, a Record that still waits in the
// queue, and a Prune that is not done. To close twice is harmless.
func (s *Store) Close() error {
	return s.close()
}

// release frees whatever open got hold of. Readers go first: the last connection
// to close writes the log back, which a reader may not. The lock goes last.
func (s *Store) release() error {
	var errs []error
	if s.reader != nil {
		errs = append(errs, s.reader.Close())
	}
	if s.insert != nil {
		errs = append(errs, s.insert.Close())
	}
	if s.writer != nil {
		errs = append(errs, s.writer.Close())
	}
	if s.lock != nil {
		errs = append(errs, s.lock.Close())
	}
	return errors.Join(errs...)
}

// enter begins a use of the connections, which Close waits for. Unless it
// returns an error, s.use.RUnlock ends the use.
func (s *Store) enter() error {
	s.use.RLock()
	if s.isClosed() {
		s.use.RUnlock()
		return storage.ErrClosed
	}
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

// private makes the file if it is not there, takes it and its companions away
// from everybody but the owner, and returns its path without symbolic links, so
// that two names of one file have one lock. SQLite gives the -wal and -shm that
// it makes the mode of the file itself.
func private(path string) (string, error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return "", err
	}
	if err := file.Close(); err != nil {
		return "", err
	}
	if path, err = filepath.Abs(path); err != nil {
		return "", err
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return "", err
	}
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if err := os.Chmod(path+suffix, 0o600); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	return path, nil
}

// own makes this process the owner of the database, until the file it returns is
// closed or the process dies. The lock is on a file of its own because SQLite's
// POSIX locks on the database vanish when any descriptor of it is closed.
func own(path string) (*os.File, error) {
	lock, err := os.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.New("the database is in use, and only one process may have it open: stop the other one, or use a store for many replicas")
		}
		return nil, fmt.Errorf("lock %q: %w", lock.Name(), err)
	}
	return lock, nil
}

// inspect returns the version of the schema in the file, 0 for an empty file. It
// looks through a connection that cannot write, so that a file that is not ours
// stays as it is.
func inspect(ctx context.Context, path string) (version int, err error) {
	db, err := connect(path, url.Values{"mode": {"ro"}})
	if err != nil {
		return 0, err
	}
	defer db.Close()
	var application, objects int
	err = db.QueryRowContext(ctx, `
		SELECT a.application_id, v.user_version, (SELECT count(*) FROM sqlite_schema)
		FROM pragma_application_id AS a, pragma_user_version AS v`,
	).Scan(&application, &version, &objects)
	switch {
	case err != nil:
		return 0, err
	case objects == 0 && application == 0 && version == 0:
		return 0, nil
	case application != applicationID:
		return 0, errors.New("the file is a database of another program")
	case version < oldestSchema || version > schemaVersion:
		return 0, fmt.Errorf("the database has schema version %d, this program knows versions %d to %d: run the version of the program that wrote it, or a newer one",
			version, oldestSchema, schemaVersion)
	}
	return version, nil
}

// connect returns the connections to the file at path, none of which is made yet.
func connect(path string, parameters url.Values) (*sql.DB, error) {
	// Only somebody's tool on our file can make us wait for a lock.
	parameters.Set("_busy_timeout", "5000")
	parameters.Set("_error_rc", "true") // no stale texts in errors
	dsn := url.URL{Scheme: "file", Path: path, RawQuery: parameters.Encode()}
	return sql.Open("sqlite", dsn.String())
}

// migrate brings the schema up to date, in one transaction: a crash before its
// commit leaves the file as it was, empty or of that version.
func (s *Store) migrate(ctx context.Context, version int) error {
	if version == schemaVersion {
		return nil
	}
	tx, err := s.writer.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	steps := fmt.Sprintf("PRAGMA application_id = %d; PRAGMA user_version = %d;", applicationID, schemaVersion)
	for since, part := range []string{2: schema, 3: schemaFleet, 4: schemaMint} {
		if version < since {
			steps += part
		}
	}
	if _, err := tx.ExecContext(ctx, steps); err != nil {
		return fmt.Errorf("bring the schema from version %d to %d: %w", version, schemaVersion, err)
	}
	return tx.Commit()
}

const (
	applicationID = 0x54726f74 // "Trot", in the file's header: the file is ours
	schemaVersion = 4
	oldestSchema  = 2 // that can be brought up to date
)

// The schema. Times are seconds, or milliseconds where named so, since 1970.
//
// A serial number is a blob of 20 octets, the most that RFC 5280 §4.1.2.2 allows,
// so that the order of blobs is the order of numbers.
//
// The ledger is one tree, which grows at its end, and one index by serial number,
// which does too when serial numbers begin with the time. Every further index
// costs each Record 1 to 2 us, one by SPIFFE ID 12 to 20 us, and what they would
// save is a query that an operator makes now and then: it reads the tree from its
// end, at 0.4 us a row.
const schema = `
CREATE TABLE document (
	only    INTEGER PRIMARY KEY CHECK (only = 1),
	version TEXT NOT NULL, -- empty until the first Swap
	data    BLOB NOT NULL
) STRICT;
INSERT INTO document VALUES (1, '', x'');

CREATE TABLE issuance (
	issued_at_ms INTEGER NOT NULL,
	serial       BLOB    NOT NULL,
	id           TEXT    NOT NULL,
	authority    TEXT    NOT NULL,
	not_before   INTEGER NOT NULL,
	not_after    INTEGER NOT NULL,
	caller       TEXT    NOT NULL,
	node         TEXT    NOT NULL,
	pod_uid      TEXT    NOT NULL,
	PRIMARY KEY (issued_at_ms, serial)
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX by_serial ON issuance (serial);
`

// schemaFleet came with version 3.
const schemaFleet = `
CREATE TABLE fleet (
	replica TEXT PRIMARY KEY,
	data    BLOB NOT NULL
) STRICT, WITHOUT ROWID;
`

// schemaMint came with version 4: the document of the trust domain for tests, and the
// tokens that were spent, by storage.TokenKey.
const schemaMint = `
CREATE TABLE test_document (
	only    INTEGER PRIMARY KEY CHECK (only = 1),
	version TEXT NOT NULL, -- empty until the first Swap
	data    BLOB NOT NULL
) STRICT;
INSERT INTO test_document VALUES (1, '', x'');

CREATE TABLE spent (
	token    BLOB PRIMARY KEY,
	until_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX spent_until ON spent (until_ms);
`
