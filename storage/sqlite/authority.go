package sqlite

import (
	"context"
	"crypto/rand"
	"fmt"

	"troth.dev/troth/storage"
)

// Load implements [storage.AuthorityStore].
func (s *Store) Load(ctx context.Context) (storage.Document, error) {
	if err := s.enter(); err != nil {
		return storage.Document{}, err
	}
	defer s.use.RUnlock()
	var d storage.Document
	err := s.reader.QueryRowContext(ctx, "SELECT version, data FROM document").Scan(&d.Version, &d.Data)
	if err != nil {
		return storage.Document{}, fmt.Errorf("sqlite: load the document: %w", err)
	}
	return d, nil
}

// Swap implements [storage.AuthorityStore].
func (s *Store) Swap(ctx context.Context, old string, data []byte) (storage.Document, error) {
	if len(data) > storage.MaxDocument {
		return storage.Document{}, storage.ErrDocumentSize
	}
	if err := s.enter(); err != nil {
		return storage.Document{}, err
	}
	defer s.use.RUnlock()
	// A random version, not a number: after somebody restored an older file, a
	// number would come to stand for two documents.
	next := storage.Document{Version: rand.Text(), Data: append([]byte{}, data...)}

	// One statement compares and swaps, and is one transaction. A crash before
	// its commit leaves the old document, a crash after it the next one.
	result, err := s.writer.ExecContext(ctx, "UPDATE document SET version = ?, data = ? WHERE version = ?", next.Version, next.Data, old)
	// On an error too: the document may have been replaced, and Watch looks.
	s.swapped.Set(struct{}{})
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
func (s *Store) Watch(ctx context.Context, seen string) (storage.Document, error) {
	for {
		_, swapped := s.swapped.Load() // before Load, or a Swap in between is lost
		d, err := s.Load(ctx)
		if err != nil || d.Version != seen {
			return d, err
		}
		select {
		case <-swapped:
		case <-ctx.Done():
			return storage.Document{}, ctx.Err()
		case <-s.closing:
			return storage.Document{}, storage.ErrClosed
		}
	}
}
