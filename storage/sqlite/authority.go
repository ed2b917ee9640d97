package sqlite

import (
	"context"
	"crypto/rand"
	"fmt"

	"troth.dev/troth/internal/latest"
	"troth.dev/troth/storage"
)

// document is one of the two documents in the file.
type document struct {
	store   *Store
	table   string
	swapped latest.Value[struct{}] // set after every Swap, to wake Watch
}

// Tests returns the document of the trust domain for tests, which is open for as long
// as the Store.
func (s *Store) Tests() storage.AuthorityStore { return &s.tests }

// Load implements [storage.AuthorityStore].
func (d *document) Load(ctx context.Context) (storage.Document, error) {
	s := d.store
	if err := s.enter(); err != nil {
		return storage.Document{}, err
	}
	defer s.use.RUnlock()
	var current storage.Document
	err := s.reader.QueryRowContext(ctx, "SELECT version, data FROM "+d.table).Scan(&current.Version, &current.Data)
	if err != nil {
		return storage.Document{}, fmt.Errorf("sqlite: load the document: %w", err)
	}
	return current, nil
}

// Swap implements [storage.AuthorityStore].
func (d *document) Swap(ctx context.Context, old string, data []byte) (storage.Document, error) {
	if len(data) > storage.MaxDocument {
		return storage.Document{}, storage.ErrDocumentSize
	}
	s := d.store
	if err := s.enter(); err != nil {
		return storage.Document{}, err
	}
	defer s.use.RUnlock()
	// A random version, not a number: after somebody restored an older file, a
	// number would come to stand for two documents.
	next := storage.Document{Version: rand.Text(), Data: append([]byte{}, data...)}

	// One statement compares and swaps, and is one transaction. A crash before
	// its commit leaves the old document, a crash after it the next one.
	result, err := s.writer.ExecContext(ctx, "UPDATE "+d.table+" SET version = ?, data = ? WHERE version = ?", next.Version, next.Data, old)
	// On an error too: the document may have been replaced, and Watch looks.
	d.swapped.Set(struct{}{})
	if err != nil {
		return storage.Document{}, fmt.Errorf("sqlite: swap the document: %w", err)
	}
	swapped, err := result.RowsAffected()
	if err != nil {
		return storage.Document{}, fmt.Errorf("sqlite: swap the document: %w", err)
	}
	if swapped == 0 {
		return storage.Document{}, storage.ErrConflict
	}
	return next, nil
}

// Watch implements [storage.AuthorityStore]. It needs no polling: all Swaps are
// this process's.
func (d *document) Watch(ctx context.Context, seen string) (storage.Document, error) {
	for {
		_, swapped := d.swapped.Load() // before Load, or a Swap in between is lost
		current, err := d.Load(ctx)
		if err != nil || current.Version != seen {
			return current, err
		}
		select {
		case <-swapped:
		case <-ctx.Done():
			return storage.Document{}, ctx.Err()
		case <-d.store.closing:
			return storage.Document{}, storage.ErrClosed
		}
	}
}
