package kubernetes

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"troth.dev/troth/storage"
	"troth.dev/troth/storage/kubernetes/internal/batch"
)

// Functions stand in the order in which an issuance meets them: Record encodes
// and queues it, commitGroups takes it with whatever else waits, commit writes the
// group, Query finds it, Prune removes it.

// call is one Record on its way to the API server. It is not changed once queued:
// Record may be gone by then.
type call struct {
	rows []row
	done chan error // of size 1: nobody may be waiting any more
}

// row is an issuance, encoded.
type row struct {
	serial string
	line   []byte
	span   span
}

const (
	// maxQueue is how many Records wait in line before further ones block until
	// there is room, or their ctx ends.
	maxQueue = 1024
	// maxGroup is how many rows, a last call's surplus apart, one commit takes.
	maxGroup = 1024
	// commitPatience is how long the API server has to answer a commit. All other
	// Records wait meanwhile.
	commitPatience = 10 * time.Second

	// ledgerPage is how many batches are read at a time: less than 1 MiB, and 16 MiB
	// where all are as large as they may be.
	ledgerPage = 64
	// maxScans is how many may read the ledger at a time; others wait.
	maxScans = 4

	ledgerPrefix = "troth-ledger-"
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
		encoded, err := batch.Encode(i)
		if err != nil {
			return err
		}
		c.rows[n] = row{serial: i.Serial, line: encoded, span: spanOf(i)}
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

// commitGroups is the only one of this process who writes issuances. It never
// waits for a group to grow: the first call to arrive is committed at once, and
// what arrives while the API server writes is the next group.
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
	runtime.Gosched() // those whom the last commit released are about to come back
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

// commit writes the group and answers each call. A crash before the API server has
// written leaves nothing of the group, and one in between that part of it which
// is in batches already; nobody was answered. After it, all of it is there.
func (s *Store) commit(ctx context.Context, group []*call) {
	ctx, cancel := context.WithTimeout(ctx, commitPatience)
	defer cancel()
	claimed := make(map[string]bool)
	refused := make(map[*call]error)
	var rows []row
	for _, c := range group {
		if err := s.claim(ctx, c, claimed); err != nil {
			refused[c] = err
			continue
		}
		rows = append(rows, c.rows...)
	}
	err := s.write(ctx, rows)
	for _, c := range group {
		why, ok := refused[c]
		if !ok || errors.Is(why, errContested) && err != nil {
			why = err
		}
		c.done <- why
	}
}

// errContested is ErrDuplicateSerial for a serial number of the same group, which
// is recorded already only if the group will be.
var errContested = fmt.Errorf("%w, a moment ago", storage.ErrDuplicateSerial)

// claim adds the serial numbers of a call to those of the group, unless one of
// them cannot be recorded.
func (s *Store) claim(ctx context.Context, c *call, claimed map[string]bool) error {
	own := make(map[string]bool, len(c.rows))
	for _, r := range c.rows {
		switch {
		case own[r.serial]:
			return storage.ErrDuplicateSerial
		case claimed[r.serial]:
			return errContested
		}
		own[r.serial] = true
		if err := s.unused(ctx, r.serial); err != nil {
			return err
		}
	}
	for serial := range own {
		claimed[serial] = true
	}
	return nil
}

// unused returns ErrDuplicateSerial if the ledger has the serial number.
func (s *Store) unused(ctx context.Context, serial string) error {
	name := s.index.find(serial)
	if name == "" {
		return nil
	}
	o, err := s.core.ConfigMaps(s.namespace).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil // pruned
	}
	if err != nil {
		return fmt.Errorf("kubernetes: whether serial number %s is in the ledger: %w", serial, err)
	}
	all, err := issuancesOf(o)
	if err != nil {
		return fmt.Errorf("kubernetes: whether serial number %s is in the ledger: %w", serial, err)
	}
	if slices.ContainsFunc(all, func(i storage.Issuance) bool { return i.Serial == serial }) {
		return storage.ErrDuplicateSerial
	}
	return nil
}

// openBatch is the batch that the next rows are added to. It is this process's
// own, and others only remove from it what has expired.
type openBatch struct {
	object  *corev1.ConfigMap // as the API server last returned it
	lines   []byte
	span    span
	serials []string
}

// write makes rows durable, in the open batch and in new ones.
//
// Adding to a batch is one write that compares its resource version. So a batch is
// never half there and no row is in two of them, whenever the process dies, and
// there is nothing to clean up.
func (s *Store) write(ctx context.Context, rows []row) error {
	for len(rows) > 0 {
		next := openBatch{}
		if s.open != nil && len(s.open.lines) < maxOpen {
			next = *s.open
		}
		n := 0
		for ; n < len(rows) && len(next.lines)+len(rows[n].line) <= maxBatch; n++ {
			if len(next.lines) == 0 {
				next.span = rows[n].span
			}
			next.span = next.span.join(rows[n].span)
			next.lines = append(next.lines, rows[n].line...)
			next.serials = append(next.serials, rows[n].serial)
		}
		// Whatever becomes of this write, the batch may only be added to again by
		// one who knows: it may be done after we gave it up.
		s.open = nil
		err := s.put(ctx, &next)
		if next.object != nil && (apierrors.IsConflict(err) || apierrors.IsNotFound(err)) {
			continue // somebody pruned it; the rows go into a new one
		}
		if err != nil {
			return fmt.Errorf("kubernetes: record issuances: %w", err)
		}
		s.index.set(next.object, next.serials)
		s.open = &next
		rows = rows[n:]
	}
	return nil
}

// put creates the batch, or replaces what it was.
func (s *Store) put(ctx context.Context, b *openBatch) error {
	name := ledgerPrefix + strings.ToLower(rand.Text())
	if b.object != nil {
		name = b.object.Name
	}
	object, err := s.batchOf(name, b.lines, b.span)
	if err != nil {
		return err
	}
	written := new(corev1.ConfigMap)
	if b.object == nil {
		err = s.configMaps.create(ctx, object, written)
	} else {
		object.UID, object.ResourceVersion = b.object.UID, b.object.ResourceVersion
		err = s.configMaps.update(ctx, name, object, written)
	}
	if err == nil {
		written.BinaryData = nil // it is in lines
		b.object = written
	}
	return err
}

// Query implements [storage.Ledger]. It reads the batches that lie between the
// times it asks for, page by page and all of one moment: some 10 us an issuance.
func (s *Store) Query(ctx context.Context, q storage.Query) ([]storage.Issuance, error) {
	ctx, leave, err := s.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer leave()
	if err := s.beginScan(ctx); err != nil {
		return nil, err
	}
	defer s.endScan()
	limit := q.Max()
	var found []storage.Issuance
	newest := func() {
		slices.SortFunc(found, newestFirst)
		// What was given up and recorded again is there twice.
		found = slices.Compact(found)
		found = slices.Delete(found, min(len(found), limit), len(found))
	}
	_, err = s.list(ctx, selector(q), ledgerPage, func() { found = nil }, func(o *corev1.ConfigMap) error {
		all, err := issuancesOf(o)
		for _, i := range all {
			if matches(q, i) {
				found = append(found, i)
			}
		}
		if len(found) >= 2*limit {
			newest()
		}
		return err
	})
	if err != nil {
		return nil, ended(ctx, fmt.Errorf("kubernetes: query issuances: %w", err))
	}
	newest()
	return found, nil
}

func (s *Store) beginScan(ctx context.Context) error {
	if ctx.Err() != nil {
		return ended(ctx, ctx.Err())
	}
	select {
	case s.scans <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ended(ctx, ctx.Err())
	}
}

func (s *Store) endScan() { <-s.scans }

// list calls each with every ConfigMap of the namespace that the selector
// selects, all as they were at one moment after the call, and returns the resource
// version of that moment. It calls begin first, and again if the API server has
// forgotten that moment before the end was reached.
func (s *Store) list(ctx context.Context, selector string, page int64, begin func(), each func(*corev1.ConfigMap) error) (version string, err error) {
	const attempts = 3
	for attempt := 1; ; attempt++ {
		begin()
		version, err = s.listOnce(ctx, selector, page, each)
		if attempt == attempts || !apierrors.IsResourceExpired(err) {
			return version, err
		}
	}
}

func (s *Store) listOnce(ctx context.Context, selector string, page int64, each func(*corev1.ConfigMap) error) (version string, err error) {
	options := metav1.ListOptions{LabelSelector: selector, Limit: page}
	for {
		found, err := s.core.ConfigMaps(s.namespace).List(ctx, options)
		if err != nil {
			return "", err
		}
		for n := range found.Items {
			if err := each(&found.Items[n]); err != nil {
				return "", err
			}
			found.Items[n] = corev1.ConfigMap{}
		}
		if found.Continue == "" {
			return found.ResourceVersion, nil
		}
		options.Continue = found.Continue
	}
}

// selector returns the labels of all batches that may have what q asks for.
func selector(q storage.Query) string {
	terms := []string{storeLabel + "=" + ledgerStore}
	if !q.ValidAt.IsZero() {
		terms = append(terms, atLeast(expiresLast, q.ValidAt.Unix())...)
	}
	if !q.IssuedFrom.IsZero() {
		terms = append(terms, atLeast(issuedLast, q.IssuedFrom.UnixMilli())...)
	}
	if !q.IssuedUntil.IsZero() {
		terms = append(terms, atMost(issuedFirst, q.IssuedUntil.UnixMilli()))
	}
	return strings.Join(terms, ",")
}

// atLeast and atMost make labels comparable with times that are as they are in
// labels: the selectors' own operators leave equality out.
func atLeast(label string, n int64) []string {
	if n <= 0 {
		return nil
	}
	return []string{label + ">" + number(n-1)}
}

func atMost(label string, n int64) string { return label + "<" + number(max(n, 0)+1) }

func matches(q storage.Query, i storage.Issuance) bool {
	return (q.Serial == "" || i.Serial == q.Serial) &&
		(q.ID.IsZero() || i.ID == q.ID) &&
		(q.AuthorityID == "" || i.AuthorityID == q.AuthorityID) &&
		(q.ValidAt.IsZero() || !q.ValidAt.Before(i.NotBefore) && !q.ValidAt.After(i.NotAfter)) &&
		(q.IssuedFrom.IsZero() || !i.IssuedAt.Before(q.IssuedFrom)) &&
		(q.IssuedUntil.IsZero() || i.IssuedAt.Before(q.IssuedUntil))
}

// newestFirst compares serial numbers as numbers, which have no leading zeros.
func newestFirst(a, b storage.Issuance) int {
	return cmp.Or(
		b.IssuedAt.Compare(a.IssuedAt),
		cmp.Compare(len(a.Serial), len(b.Serial)),
		cmp.Compare(a.Serial, b.Serial),
	)
}

// Prune implements [storage.Ledger]. It deletes the batches in which all has
// expired and rewrites those in which some has, each in one write that compares.
// It passes over a batch that it cannot read, and says so at the end.
func (s *Store) Prune(ctx context.Context, expiredBefore time.Time) (int, error) {
	ctx, leave, err := s.enter(ctx)
	if err != nil {
		return 0, err
	}
	defer leave()
	if err := s.beginScan(ctx); err != nil {
		return 0, err
	}
	defer s.endScan()
	pruned := 0
	var unreadable error
	only := storeLabel + "=" + ledgerStore + "," + atMost(expiresFirst, expiredBefore.Unix())
	_, err = s.list(ctx, only, ledgerPage, func() {}, func(o *corev1.ConfigMap) error {
		n, err := s.pruneBatch(ctx, o, expiredBefore)
		pruned += n
		if errors.Is(err, errUnreadable) {
			unreadable, err = err, nil
		}
		return err
	})
	if err = cmp.Or(err, unreadable); err != nil {
		return pruned, ended(ctx, fmt.Errorf("kubernetes: prune issuances: %w", err))
	}
	return pruned, nil
}

// pruneBatch removes from a batch what expired before the given time, and returns
// how many that were. What another replica removes at the same time, one of both
// counts.
func (s *Store) pruneBatch(ctx context.Context, o *corev1.ConfigMap, before time.Time) (int, error) {
	for {
		all, err := issuancesOf(o)
		if err != nil {
			return 0, err
		}
		kept := slices.DeleteFunc(slices.Clone(all), func(i storage.Issuance) bool { return i.NotAfter.Before(before) })
		switch len(kept) {
		case len(all):
			return 0, nil
		case 0:
			err = s.configMaps.delete(ctx, o.ObjectMeta)
			if err == nil {
				s.index.remove(o.Name)
			}
		default:
			err = s.rewrite(ctx, o, kept)
		}
		switch {
		case err == nil:
			return len(all) - len(kept), nil
		case apierrors.IsNotFound(err):
			return 0, nil
		case !apierrors.IsConflict(err):
			return 0, err
		}
		o, err = s.core.ConfigMaps(s.namespace).Get(ctx, o.Name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return 0, nil
		}
		if err != nil {
			return 0, err
		}
	}
}

// rewrite replaces what a batch holds by kept, which is some of it.
func (s *Store) rewrite(ctx context.Context, o *corev1.ConfigMap, kept []storage.Issuance) error {
	next := openBatch{object: o, span: spanOf(kept[0])}
	for _, i := range kept {
		encoded, err := batch.Encode(i)
		if err != nil {
			return err
		}
		next.span = next.span.join(spanOf(i))
		next.lines = append(next.lines, encoded...)
		next.serials = append(next.serials, i.Serial)
	}
	if err := s.put(ctx, &next); err != nil {
		return err
	}
	s.index.set(next.object, next.serials)
	return nil
}
