package storage

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"maps"
	"slices"
	"sync"
	"time"

	"troth.dev/troth/internal/latest"
)

// Memory keeps all contracts in the memory of one process: for tests, for
// development, and as the reference of what the contracts mean. It is durable
// for as long as the process lives. Its methods do not block, Watch apart, and
// nothing has to be closed.
type Memory struct {
	memoryDocument
	tests memoryDocument

	mu        sync.Mutex
	issued    map[string]Issuance             // guarded by mu; by serial
	summaries map[string][]byte               // guarded by mu; by replica
	spent     map[[sha256.Size]byte]time.Time // guarded by mu; until when, by TokenKey
}

// memoryDocument is an [AuthorityStore].
type memoryDocument struct {
	document latest.Value[Document] // set under swapping, read without
	swapping sync.Mutex
}

// NewMemory returns an empty Memory.
func NewMemory() *Memory {
	return &Memory{
		issued: make(map[string]Issuance), summaries: make(map[string][]byte), spent: make(map[[sha256.Size]byte]time.Time),
	}
}

// Tests returns the document of the trust domain for tests.
func (m *Memory) Tests() AuthorityStore { return &m.tests }

// Load implements [AuthorityStore].
func (m *memoryDocument) Load(ctx context.Context) (Document, error) {
	if err := ctx.Err(); err != nil {
		return Document{}, err
	}
	current, _ := m.document.Load()
	return current.clone(), nil
}

// Swap implements [AuthorityStore].
func (m *memoryDocument) Swap(ctx context.Context, old string, data []byte) (Document, error) {
	if len(data) > MaxDocument {
		return Document{}, ErrDocumentSize
	}
	if err := ctx.Err(); err != nil {
		return Document{}, err
	}
	m.swapping.Lock()
	defer m.swapping.Unlock()
	current, _ := m.document.Load()
	if current.Version != old {
		return Document{}, ErrConflict
	}
	next := Document{Version: rand.Text(), Data: data}
	m.document.Set(next.clone())
	return next.clone(), nil
}

// Watch implements [AuthorityStore].
func (m *memoryDocument) Watch(ctx context.Context, seen string) (Document, error) {
	for {
		current, changed := m.document.Load()
		if current.Version != seen {
			return current.clone(), nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return Document{}, ctx.Err()
		}
	}
}

func (d Document) clone() Document {
	return Document{Version: d.Version, Data: bytes.Clone(d.Data)}
}

// Record implements [Ledger].
func (m *Memory) Record(ctx context.Context, issuances ...Issuance) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	added := make(map[string]Issuance, len(issuances))
	for _, i := range issuances {
		if err := i.Check(); err != nil {
			return err
		}
		_, before := m.issued[i.Serial]
		_, twice := added[i.Serial]
		if before || twice {
			return ErrDuplicateSerial
		}
		i.NotBefore = i.NotBefore.UTC().Truncate(time.Second)
		i.NotAfter = i.NotAfter.UTC().Truncate(time.Second)
		i.IssuedAt = i.IssuedAt.UTC().Truncate(time.Millisecond)
		added[i.Serial] = i
	}
	maps.Copy(m.issued, added)
	return nil
}

// Query implements [Ledger].
func (m *Memory) Query(ctx context.Context, q Query) ([]Issuance, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var found []Issuance
	for _, i := range m.issued {
		if q.matches(i) {
			found = append(found, i)
		}
	}
	slices.SortFunc(found, newestFirst)
	return found[:min(len(found), q.Max())], nil
}

func (q Query) matches(i Issuance) bool {
	return (q.Serial == "" || i.Serial == q.Serial) &&
		(q.ID.IsZero() || i.ID == q.ID) &&
		(q.AuthorityID == "" || i.AuthorityID == q.AuthorityID) &&
		(q.ValidAt.IsZero() || !q.ValidAt.Before(i.NotBefore) && !q.ValidAt.After(i.NotAfter)) &&
		(q.IssuedFrom.IsZero() || !i.IssuedAt.Before(q.IssuedFrom)) &&
		(q.IssuedUntil.IsZero() || i.IssuedAt.Before(q.IssuedUntil))
}

// newestFirst compares serial numbers as numbers: without leading zeros, the
// shorter one is the smaller one.
func newestFirst(a, b Issuance) int {
	return cmp.Or(
		b.IssuedAt.Compare(a.IssuedAt),
		cmp.Compare(len(a.Serial), len(b.Serial)),
		cmp.Compare(a.Serial, b.Serial),
	)
}

// Prune implements [Ledger].
func (m *Memory) Prune(ctx context.Context, expiredBefore time.Time) (int, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	before := len(m.issued)
	maps.DeleteFunc(m.issued, func(_ string, i Issuance) bool {
		return i.NotAfter.Before(expiredBefore)
	})
	return before - len(m.issued), nil
}

// Publish implements [FleetStore].
func (m *Memory) Publish(ctx context.Context, replica string, data []byte) error {
	if err := cmp.Or(CheckReplica(replica), ctx.Err()); err != nil {
		return err
	}
	if len(data) > MaxDocument {
		return ErrDocumentSize
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.summaries[replica] = bytes.Clone(data)
	return nil
}

// Summaries implements [FleetStore].
func (m *Memory) Summaries(ctx context.Context) ([]Summary, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []Summary
	for _, replica := range slices.Sorted(maps.Keys(m.summaries)) {
		all = append(all, Summary{Replica: replica, Data: bytes.Clone(m.summaries[replica])})
	}
	return all, nil
}

// Withdraw implements [FleetStore].
func (m *Memory) Withdraw(ctx context.Context, replica string) error {
	if err := cmp.Or(CheckReplica(replica), ctx.Err()); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.summaries, replica)
	return nil
}

// Spend implements [TokenStore].
func (m *Memory) Spend(ctx context.Context, issuer, id string, until time.Time) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	key := TokenKey(issuer, id)
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, spent := m.spent[key]; spent {
		return ErrSpent
	}
	m.spent[key] = until
	return nil
}

// PruneSpent implements [TokenStore].
func (m *Memory) PruneSpent(ctx context.Context, before time.Time) (int, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	had := len(m.spent)
	maps.DeleteFunc(m.spent, func(_ [sha256.Size]byte, until time.Time) bool { return until.Before(before) })
	return had - len(m.spent), nil
}
