package postgres

import (
	"context"
	"crypto/rand"
	"fmt"
	mathrand "math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"

	"troth.dev/troth/storage"
)

// document is one of the two documents in the database.
type document struct {
	store *Store
	table string
}

// Tests returns the document of the trust domain for tests, which is open for as long
// as the Store.
func (s *Store) Tests() storage.AuthorityStore { return s.tests }

// Load implements [storage.AuthorityStore]. It asks the primary, each time.
func (d document) Load(ctx context.Context) (storage.Document, error) {
	s := d.store
	ctx, leave, err := s.enter(ctx, callTimeout)
	if err != nil {
		return storage.Document{}, err
	}
	defer leave()
	var current storage.Document
	if err := s.pool.QueryRow(ctx, "SELECT version, data FROM "+d.table).Scan(&current.Version, &current.Data); err != nil {
		return storage.Document{}, s.failure(ctx, "load the document", err)
	}
	return current, nil
}

// Swap implements [storage.AuthorityStore]. If the connection breaks, or ctx ends,
// before the server has answered, nobody knows whether it had swapped: the error
// is then never [storage.ErrConflict].
func (d document) Swap(ctx context.Context, old string, data []byte) (storage.Document, error) {
	if len(data) > storage.MaxDocument {
		return storage.Document{}, storage.ErrDocumentSize
	}
	s := d.store
	ctx, leave, err := s.enter(ctx, callTimeout)
	if err != nil {
		return storage.Document{}, err
	}
	defer leave()
	// A random version, not a number: after somebody restored an older database, a
	// number would come to stand for two documents.
	next := storage.Document{Version: rand.Text(), Data: append([]byte{}, data...)}

	// One statement compares and swaps, and is one transaction. Of two at once the
	// second waits for the first, and compares again. A crash before its commit
	// leaves the old document, a crash after it the next one. The notification
	// goes out with the commit, or not at all.
	swapped, err := s.pool.Exec(ctx, `
		WITH swapped AS (UPDATE `+d.table+` SET version = $1, data = $2 WHERE version = $3 RETURNING 1)
		SELECT pg_notify('`+channel+`', '') FROM swapped`, next.Version, next.Data, old)
	if err != nil {
		return storage.Document{}, s.failure(ctx, "swap the document", err)
	}
	if swapped.RowsAffected() == 0 {
		return storage.Document{}, storage.ErrConflict
	}
	return next, nil
}

// Watch implements [storage.AuthorityStore]. It learns of a Swap by a notification.
// While those are cut it looks for itself every few seconds. It returns the error
// of a Load that fails.
func (d document) Watch(ctx context.Context, seen string) (storage.Document, error) {
	for {
		_, changed := d.store.changed.Load() // before Load, or a Swap in between is lost
		current, err := d.Load(ctx)
		if err != nil || current.Version != seen {
			return current, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return storage.Document{}, ctx.Err()
		case <-d.store.closing:
			return storage.Document{}, storage.ErrClosed
		}
	}
}

const (
	// channel is where Swap notifies.
	channel = "troth_document"
	// heartbeat is how long listen believes in a connection that is silent.
	heartbeat = 5 * time.Second
	// minRetry and maxRetry are how long listen waits before it connects again,
	// and so how often Watch looks for itself when it cannot.
	minRetry = 100 * time.Millisecond
	maxRetry = 3 * time.Second
)

// listen wakes everybody in Watch on each notification, on one connection for all
// of them, until ctx ends. A notification that is sent while there is no connection
// is lost: so everybody looks again when there is one, and after every attempt that
// fails.
func (s *Store) listen(ctx context.Context) {
	retry, cut := minRetry, false
	for {
		err := s.follow(ctx, func() {
			if cut {
				s.log.InfoContext(ctx, "the database's notifications are back")
			}
			retry, cut = minRetry, false
		})
		if ctx.Err() != nil {
			return
		}
		if !cut {
			s.log.WarnContext(ctx, "the database's notifications are cut: changes of the authorities are found by looking for them, some seconds later", "err", err)
			cut = true
		}
		s.changed.Set(struct{}{})
		select {
		case <-time.After(retry/2 + mathrand.N(retry/2)): // so that replicas do not come all at once
		case <-ctx.Done():
			return
		}
		retry = min(2*retry, maxRetry)
	}
}

// follow listens on a connection of its own until that breaks, or ctx ends.
func (s *Store) follow(ctx context.Context, connected func()) error {
	conn, err := pgx.ConnectConfig(ctx, s.pool.Config().ConnConfig)
	if err != nil {
		return err
	}
	defer func() {
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
		defer cancel()
		conn.Close(closing)
	}()
	if err := within(ctx, callTimeout, func(ctx context.Context) error {
		_, err := conn.Exec(ctx, "LISTEN "+channel)
		return err
	}); err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	connected()
	s.changed.Set(struct{}{})

	seen := ""
	for {
		err := within(ctx, heartbeat, func(ctx context.Context) error {
			_, err := conn.WaitForNotification(ctx)
			return err
		})
		switch {
		case err == nil:
			s.changed.Set(struct{}{})
			continue
		case ctx.Err() != nil, conn.IsClosed():
			return err
		}
		// Silence: either nothing happens, or packets are dropped, or somebody in
		// between swallows notifications, as a pooler may. To read the version
		// tells.
		var version string
		if err := within(ctx, heartbeat, func(ctx context.Context) error {
			return conn.QueryRow(ctx, "SELECT d.version || t.version FROM troth.document d, troth.test_document t").Scan(&version)
		}); err != nil {
			return err
		}
		if version != seen {
			seen = version
			s.changed.Set(struct{}{})
		}
	}
}

// within runs do, which must end with its ctx, with that much time.
func within(ctx context.Context, limit time.Duration, do func(context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, errUnanswered)
	defer cancel()
	if err := do(ctx); err != nil {
		return ended(ctx, err)
	}
	return nil
}
