package sqlite

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"runtime"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"troth.dev/troth/storage"
)

// Functions stand in the order in which an issuance meets them: Record encodes
// and queues it, commitGroups takes it with whatever else waits, commit makes
// the group durable, Query finds it, Prune removes it.

// call is one Record on its way to the disk.
type call struct {
	rows []row      // not changed once queued: Record may be gone by then
	done chan error // of size 1: nobody may be waiting any more
}

// row is an issuance as the arguments of insertIssuance.
type row [9]any

const insertIssuance = "INSERT INTO issuance (" + columns + ") VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"

const columns = "serial, id, authority, not_before, not_after, issued_at_ms, caller, node, pod_uid"

const (
	// maxQueue is how many Records wait in line before further ones block until
	// there is room, or their ctx ends.
	maxQueue = 1024
	// maxGroup is how many rows, a last call's surplus apart, one commit takes:
	// about 25 ms of work, in which one fsync no longer counts.
	maxGroup = 1024
	// pruneStep is how many rows one transaction of Prune removes: a few
	// milliseconds of work, for which a Record may have to wait.
	pruneStep = 200
)

// Record implements [storage.Ledger].
func (s *Store) Record(ctx context.Context, issuances ...storage.Issuance) error {
	switch {
	case s.isClosed():
		return storage.ErrClosed
	case ctx.Err() != nil:
		return ctx.Err()
	case len(issuances) == 0:
		return nil
	}
	c := &call{rows: make([]row, len(issuances)), done: make(chan error, 1)}
	for n, i := range issuances {
		if err := i.Check(); err != nil {
			return err
		}
		c.rows[n] = encode(i)
	}

	select {
	case s.calls <- c:
	case <-ctx.Done():
		return ctx.Err()
	case <-s.closing:
		return storage.ErrClosed
	}
	select {
	case err := <-c.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	case <-s.stopped:
	}
	// The last group's answers were sent before stopped was closed.
	select {
	case err := <-c.done:
		return err
	default:
		return storage.ErrClosed
	}
}

// commitGroups is the only one who writes issuances. It never waits for a group
// to grow: the first call to arrive is committed at once, and what arrives
// during its fsync is the next group.
func (s *Store) commitGroups(ctx context.Context) {
	defer close(s.stopped)
	for {
		select {
		case c := <-s.calls:
			s.commit(ctx, s.gather(c))
		case <-s.closing:
			return
		}
	}
}

// gather returns first and all who wait already.
func (s *Store) gather(first *call) []*call {
	// Those whom the last commit released are about to come back with their next
	// call. To let them run first saves one commit in eight when 64 goroutines
	// record without pause, and costs nothing when nobody else is there.
	runtime.Gosched()
	group := []*call{first}
	for rows := len(first.rows); rows < maxGroup; {
		select {
		case c := <-s.calls:
			group = append(group, c)
			rows += len(c.rows)
		default:
			return group
		}
	}
	return group
}

// commit makes the group durable in one transaction and answers each call. A
// crash before the commit's fsync has returned loses or keeps the whole group,
// and nobody was answered; after it, all of it is on disk.
func (s *Store) commit(ctx context.Context, group []*call) {
	err := s.insertAll(ctx, group)
	if errors.Is(err, storage.ErrDuplicateSerial) && len(group) > 1 {
		// Somebody's serial is a duplicate, which must be nobody else's loss. This
		// is the sign of a broken random source, so it may be slow.
		for _, c := range group {
			c.done <- s.insertAll(ctx, []*call{c})
		}
		return
	}
	for _, c := range group {
		c.done <- err
	}
}

func (s *Store) insertAll(ctx context.Context, group []*call) error {
	tx, err := s.writer.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("sqlite: record issuances: %w", err)
	}
	defer tx.Rollback()
	insert := tx.StmtContext(ctx, s.insert)
	for _, c := range group {
		for n := range c.rows {
			_, err := insert.ExecContext(ctx, c.rows[n][:]...)
			if e, ok := errors.AsType[*sqlite.Error](err); ok && e.Code() == sqlite3.SQLITE_CONSTRAINT_UNIQUE {
				return storage.ErrDuplicateSerial
			}
			if err != nil {
				return fmt.Errorf("sqlite: record issuances: %w", err)
			}
		}
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("sqlite: record issuances: %w", err)
	}
	return nil
}

// Query implements [storage.Ledger]. It reads a snapshot, and neither waits for
// Record nor makes it wait. A query by serial number or time looks an index up;
// any other reads the ledger from its newest end until it has found enough, at
// 0.4 us a row.
func (s *Store) Query(ctx context.Context, q storage.Query) ([]storage.Issuance, error) {
	if err := s.enter(); err != nil {
		return nil, err
	}
	defer s.use.RUnlock()
	where, args := conditions(q)
	rows, err := s.reader.QueryContext(ctx,
		"SELECT "+columns+" FROM issuance WHERE "+where+" ORDER BY issued_at_ms DESC, serial LIMIT ?", append(args, q.Max())...)
	if err != nil {
		return nil, fmt.Errorf("sqlite: query issuances: %w", err)
	}
	defer rows.Close()
	var found []storage.Issuance
	for rows.Next() {
		i, err := decode(rows.Scan)
		if err != nil {
			return nil, fmt.Errorf("sqlite: query issuances: %w", err)
		}
		found = append(found, i)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("sqlite: query issuances: %w", err)
	}
	return found, nil
}

// conditions returns q as a WHERE clause. Where a stored time is compared with a
// finer one, the finer one is rounded up: for whole numbers, n >= 1.5 is n >= 2,
// and n < 1.5 is n < 2.
func conditions(q storage.Query) (where string, args []any) {
	terms := []string{"true"}
	add := func(term string, arg any) {
		terms = append(terms, term)
		args = append(args, arg)
	}
	if q.Serial != "" {
		add("serial = ?", serialBlob(q.Serial))
	}
	if !q.ID.IsZero() {
		add("id = ?", q.ID.String())
	}
	if q.AuthorityID != "" {
		add("authority = ?", q.AuthorityID)
	}
	if !q.ValidAt.IsZero() {
		add("not_before <= ?", q.ValidAt.Unix())
		add("not_after >= ?", ceil(q.ValidAt, time.Second).Unix())
	}
	if !q.IssuedFrom.IsZero() {
		add("issued_at_ms >= ?", ceil(q.IssuedFrom, time.Millisecond).UnixMilli())
	}
	if !q.IssuedUntil.IsZero() {
		add("issued_at_ms < ?", ceil(q.IssuedUntil, time.Millisecond).UnixMilli())
	}
	return strings.Join(terms, " AND "), args
}

// Prune implements [storage.Ledger]. It looks for what has expired beside Record,
// oldest first, and makes it wait only while it removes some. The file does not
// shrink: what is freed is used again.
func (s *Store) Prune(ctx context.Context, expiredBefore time.Time) (int, error) {
	if err := s.enter(); err != nil {
		return 0, err
	}
	defer s.use.RUnlock()
	pruned := 0
	for after := (key{issuedMs: math.MinInt64}); ; {
		if s.isClosed() {
			return pruned, storage.ErrClosed
		}
		expired, err := s.expired(ctx, expiredBefore, after)
		if err == nil && len(expired) == 0 {
			return pruned, nil
		}
		var n int64
		if err == nil {
			n, err = s.remove(ctx, expired)
		}
		if err != nil {
			return pruned, fmt.Errorf("sqlite: prune issuances: %w", err)
		}
		pruned += int(n)
		after = expired[len(expired)-1]
	}
}

// key is a row's primary key.
type key struct {
	issuedMs int64
	serial   []byte
}

// expired returns the keys of the oldest rows behind after that have expired, a
// step's worth. What was issued later than it asks about cannot have.
func (s *Store) expired(ctx context.Context, before time.Time, after key) ([]key, error) {
	rows, err := s.reader.QueryContext(ctx, `
		SELECT issued_at_ms, serial FROM issuance
		WHERE (issued_at_ms, serial) > (?, ?) AND issued_at_ms < ? AND not_after < ?
		ORDER BY issued_at_ms, serial LIMIT ?`,
		after.issuedMs, after.serial, ceil(before, time.Millisecond).UnixMilli(), ceil(before, time.Second).Unix(), pruneStep)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var keys []key
	for rows.Next() {
		var k key
		if err := rows.Scan(&k.issuedMs, &k.serial); err != nil {
			return nil, err
		}
		keys = append(keys, k)
	}
	return keys, rows.Err()
}

// remove removes rows, and returns how many of them were still there.
func (s *Store) remove(ctx context.Context, keys []key) (int64, error) {
	args := make([]any, 0, 2*len(keys))
	for _, k := range keys {
		args = append(args, k.issuedMs, k.serial)
	}
	result, err := s.writer.ExecContext(ctx,
		"DELETE FROM issuance WHERE (issued_at_ms, serial) IN (VALUES (?, ?)"+strings.Repeat(", (?, ?)", len(keys)-1)+")", args...)
	if err != nil {
		return 0, err
	}
	return result.RowsAffected()
}

func encode(i storage.Issuance) row {
	return row{
		serialBlob(i.Serial), i.ID.String(), i.AuthorityID,
		i.NotBefore.Unix(), i.NotAfter.Unix(), i.IssuedAt.UnixMilli(),
		i.Caller, i.Node, i.PodUID,
	}
}

func decode(scan func(...any) error) (storage.Issuance, error) {
	var (
		i                            storage.Issuance
		serial                       []byte
		id                           string
		notBefore, notAfter, issueMs int64
	)
	err := scan(&serial, &id, &i.AuthorityID, &notBefore, &notAfter, &issueMs, &i.Caller, &i.Node, &i.PodUID)
	if err != nil {
		return storage.Issuance{}, err
	}
	if i.ID, err = spiffeid.FromString(id); err != nil {
		return storage.Issuance{}, err
	}
	i.Serial = strings.TrimLeft(hex.EncodeToString(serial), "0")
	i.NotBefore = time.Unix(notBefore, 0).UTC()
	i.NotAfter = time.Unix(notAfter, 0).UTC()
	i.IssuedAt = time.UnixMilli(issueMs).UTC()
	return i, nil
}

// serialBlob returns the number as 20 octets, and nil, which equals nothing in
// SQL, for what is no serial number.
func serialBlob(serial string) []byte {
	const digits = 40
	if len(serial) > digits || strings.HasPrefix(serial, "0") || strings.ToLower(serial) != serial {
		return nil
	}
	blob, err := hex.DecodeString(strings.Repeat("0", digits-len(serial)) + serial)
	if err != nil {
		return nil
	}
	return blob
}

// ceil rounds t up to a whole unit since 1970.
func ceil(t time.Time, unit time.Duration) time.Time {
	if floor := t.Truncate(unit); floor.Before(t) {
		return floor.Add(unit)
	}
	return t
}
