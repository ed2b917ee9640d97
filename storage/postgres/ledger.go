package postgres

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"runtime"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/storage"
)

// Functions stand in the order in which an issuance meets them: Record encodes
// and queues it, commitGroups takes it with whatever else waits, commit makes
// the group durable, Query finds it, Prune removes it.

// call is one Record on its way to the database.
type call struct {
	rows []row           // not changed once queued: Record may be gone by then
	gone <-chan struct{} // closed when nobody waits any more
	done chan error      // of size 1: nobody may be waiting any more
}

// row is an issuance as the database has it.
type row struct {
	serial                        []byte
	id, authority                 string
	notBefore, notAfter, issuedMs int64
	caller, node, podUID          string
}

const columns = "serial, id, authority, not_before, not_after, issued_at_ms, caller, node, pod_uid"

// insertIssuances takes one array for each column, so that a group of any size is
// the same statement, planned once for each connection.
const insertIssuances = "INSERT INTO troth.issuance (" + columns + ") SELECT * FROM unnest(" +
	"$1::bytea[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::bigint[], $7::text[], $8::text[], $9::text[])"

const (
	// maxQueue is how many Records wait in line before further ones block until
	// there is room, or their ctx ends.
	maxQueue = 1024
	// maxGroup is how many rows, a last call's surplus apart, one commit takes.
	maxGroup = 1024
	// committers is how many groups may be on their way at the same time: two, so
	// that a connection that has died unnoticed does not hold up everybody. They
	// cost a quarter more of the server's CPU than one, whose groups are larger, and
	// record a tenth more.
	committers = 2
	// pruneStep is how many rows one transaction of Prune removes, which is text
	// for the planner to know.
	pruneStep = "200"
)

// Record implements [storage.Ledger].
func (s *Store) Record(ctx context.Context, issuances ...storage.Issuance) error {
	ctx, leave, err := s.enter(ctx, callTimeout)
	if err != nil {
		return err
	}
	defer leave()
	if len(issuances) == 0 {
		return nil
	}
	c := &call{rows: make([]row, len(issuances)), gone: ctx.Done(), done: make(chan error, 1)}
	for n, i := range issuances {
		if err := i.Check(); err != nil {
			return err
		}
		c.rows[n] = encode(i)
	}

	select {
	case s.calls <- c:
	case <-ctx.Done():
		return s.failure(ctx, "record issuances", ctx.Err())
	case <-s.closing:
		return storage.ErrClosed
	}
	select {
	case err := <-c.done:
		return err
	case <-ctx.Done():
		return s.failure(ctx, "record issuances", ctx.Err())
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

// commitGroups commits one group after the other. It never waits for a group to
// grow: the first call to arrive is committed at once, and what arrives while all
// committers are busy is the next group.
func (s *Store) commitGroups(ctx context.Context) {
	for {
		select {
		case c := <-s.calls:
			s.commit(ctx, s.gather(c))
		case <-s.closing:
			return
		}
	}
}

// gather returns first and all who wait already, but those who gave up: after an
// outage, they would be most of the queue.
func (s *Store) gather(first *call) []*call {
	// Those whom the last commit released are about to come back with their next
	// call: let them run first.
	runtime.Gosched()
	var group []*call
	rows := 0
	for c := first; ; {
		select {
		case <-c.gone:
		default:
			group = append(group, c)
			rows += len(c.rows)
		}
		if rows >= maxGroup {
			return group
		}
		select {
		case c = <-s.calls:
		default:
			return group
		}
	}
}

// commit makes the group durable in one transaction and answers each call. If this
// process, the connection or the server dies before the server has answered, the
// whole group is lost or kept, and nobody was told that it is there; after it, all
// of it is on disk.
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
	if len(group) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, callTimeout, errUnanswered)
	defer cancel()
	_, err := s.pool.Exec(ctx, insertIssuances, arrays(group)...)
	if unique(err) {
		return storage.ErrDuplicateSerial
	}
	if err != nil {
		return fmt.Errorf("postgres: record issuances: %w", ended(ctx, err))
	}
	return nil
}

// arrays returns the arguments of insertIssuances. Rows are in the order of their
// serial numbers: two groups, of two replicas, that have several of them in common
// would deadlock if each inserted first what the other waits for.
func arrays(group []*call) []any {
	var rows []row
	for _, c := range group {
		rows = append(rows, c.rows...)
	}
	slices.SortFunc(rows, func(a, b row) int { return bytes.Compare(a.serial, b.serial) })
	serials := make([][]byte, len(rows))
	var texts [5][]string
	var times [3][]int64
	for n := range texts {
		texts[n] = make([]string, len(rows))
	}
	for n := range times {
		times[n] = make([]int64, len(rows))
	}
	for n, r := range rows {
		serials[n] = r.serial
		texts[0][n], texts[1][n], texts[2][n], texts[3][n], texts[4][n] = r.id, r.authority, r.caller, r.node, r.podUID
		times[0][n], times[1][n], times[2][n] = r.notBefore, r.notAfter, r.issuedMs
	}
	return []any{serials, texts[0], texts[1], times[0], times[1], times[2], texts[2], texts[3], texts[4]}
}

// Query implements [storage.Ledger]. It reads a snapshot, and neither waits for
// Record nor makes it wait. A query by serial number or time looks an index up;
// any other reads the ledger until it has found enough, at 0.3 us a row, or for
// half a minute.
func (s *Store) Query(ctx context.Context, q storage.Query) ([]storage.Issuance, error) {
	ctx, leave, err := s.enterScan(ctx)
	if err != nil {
		return nil, err
	}
	defer leave()
	where, args := conditions(q)
	rows, err := s.pool.Query(ctx, fmt.Sprintf(
		"SELECT "+columns+" FROM troth.issuance WHERE %s ORDER BY issued_at_ms DESC, serial LIMIT %d", where, q.Max()), args...)
	if err != nil {
		return nil, s.failure(ctx, "query issuances", err)
	}
	found, err := pgx.CollectRows(rows, decode)
	if err != nil {
		return nil, s.failure(ctx, "query issuances", err)
	}
	return found, nil
}

// conditions returns q as a WHERE clause. Where a stored time is compared with a
// finer one, the finer one is rounded up: for whole numbers, n >= 1.5 is n >= 2,
// and n < 1.5 is n < 2.
func conditions(q storage.Query) (where string, args []any) {
	terms := []string{"true"}
	add := func(term string, arg any) {
		args = append(args, arg)
		terms = append(terms, fmt.Sprintf("%s $%d", term, len(args)))
	}
	if q.Serial != "" {
		add("serial =", serialBytes(q.Serial))
	}
	if !q.ID.IsZero() {
		add("id =", q.ID.String())
	}
	if q.AuthorityID != "" {
		if !utf8.ValidString(q.AuthorityID) || strings.ContainsRune(q.AuthorityID, 0) {
			return "false", nil // the server takes no such text, and has none
		}
		add("authority =", q.AuthorityID)
	}
	if !q.ValidAt.IsZero() {
		add("not_before <=", q.ValidAt.Unix())
		add("not_after >=", ceil(q.ValidAt, time.Second).Unix())
	}
	if !q.IssuedFrom.IsZero() {
		add("issued_at_ms >=", ceil(q.IssuedFrom, time.Millisecond).UnixMilli())
	}
	if !q.IssuedUntil.IsZero() {
		add("issued_at_ms <", ceil(q.IssuedUntil, time.Millisecond).UnixMilli())
	}
	return strings.Join(terms, " AND "), args
}

// Prune implements [storage.Ledger]. Each step is one transaction, which removes
// some of the oldest that have expired, and which no Record waits for. A crash
// leaves the steps that were done. The table does not shrink: what is freed is used
// again, after the server's own vacuum.
func (s *Store) Prune(ctx context.Context, expiredBefore time.Time) (int, error) {
	pruned := 0
	for after := (key{issuedMs: math.MinInt64, serial: []byte{}}); ; {
		removed, err := s.prune(ctx, expiredBefore, after)
		if err != nil {
			return pruned, err
		}
		if len(removed) == 0 {
			return pruned, nil
		}
		pruned += len(removed)
		after = slices.MaxFunc(removed, key.compare)
	}
}

// key is a row's primary key.
type key struct {
	issuedMs int64
	serial   []byte
}

func (k key) compare(other key) int {
	return cmp.Or(cmp.Compare(k.issuedMs, other.issuedMs), bytes.Compare(k.serial, other.serial))
}

// prune removes the oldest rows behind after that have expired, a step's worth, and
// returns their keys. What was issued later than it asks about cannot have. It locks
// them in their order, so that two Prunes do not deadlock, and whoever has to wait
// passes over what the other has removed. After the lock nobody can move them, so
// that their addresses (ctid) lead to them, whatever the planner thinks.
func (s *Store) prune(ctx context.Context, before time.Time, after key) ([]key, error) {
	ctx, leave, err := s.enterScan(ctx)
	if err != nil {
		return nil, err
	}
	defer leave()
	rows, err := s.pool.Query(ctx, `
		DELETE FROM troth.issuance WHERE ctid = ANY (ARRAY(
			SELECT ctid FROM troth.issuance
			WHERE (issued_at_ms, serial) > ($1, $2) AND issued_at_ms < $3 AND not_after < $4
			ORDER BY issued_at_ms, serial LIMIT `+pruneStep+` FOR UPDATE))
		RETURNING issued_at_ms, serial`,
		after.issuedMs, after.serial, ceil(before, time.Millisecond).UnixMilli(), ceil(before, time.Second).Unix())
	if err != nil {
		return nil, s.failure(ctx, "prune issuances", err)
	}
	removed, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (k key, err error) {
		err = row.Scan(&k.issuedMs, &k.serial)
		return k, err
	})
	if err != nil {
		return nil, s.failure(ctx, "prune issuances", err)
	}
	return removed, nil
}

func encode(i storage.Issuance) row {
	return row{
		serial: serialBytes(i.Serial), id: i.ID.String(), authority: i.AuthorityID,
		notBefore: i.NotBefore.Unix(), notAfter: i.NotAfter.Unix(), issuedMs: i.IssuedAt.UnixMilli(),
		caller: i.Caller, node: i.Node, podUID: i.PodUID,
	}
}

func decode(columns pgx.CollectableRow) (i storage.Issuance, err error) {
	var r row
	err = columns.Scan(&r.serial, &r.id, &r.authority, &r.notBefore, &r.notAfter, &r.issuedMs, &r.caller, &r.node, &r.podUID)
	if err != nil {
		return storage.Issuance{}, err
	}
	id, err := spiffeid.FromString(r.id)
	if err != nil {
		return storage.Issuance{}, err
	}
	return storage.Issuance{
		Serial:      strings.TrimLeft(hex.EncodeToString(r.serial), "0"),
		ID:          id,
		AuthorityID: r.authority,
		NotBefore:   time.Unix(r.notBefore, 0).UTC(),
		NotAfter:    time.Unix(r.notAfter, 0).UTC(),
		IssuedAt:    time.UnixMilli(r.issuedMs).UTC(),
		Caller:      r.caller,
		Node:        r.node,
		PodUID:      r.podUID,
	}, nil
}

// serialBytes returns the number as 20 octets, and nil, which equals nothing in
// SQL, for what is no serial number.
func serialBytes(serial string) []byte {
	const digits = 40
	if len(serial) > digits || strings.HasPrefix(serial, "0") || strings.ToLower(serial) != serial {
		return nil
	}
	octets, err := hex.DecodeString(strings.Repeat("0", digits-len(serial)) + serial)
	if err != nil {
		return nil
	}
	return octets
}

// ceil rounds t up to a whole unit since 1970.
func ceil(t time.Time, unit time.Duration) time.Time {
	if floor := t.Truncate(unit); floor.Before(t) {
		return floor.Add(unit)
	}
	return t
}
