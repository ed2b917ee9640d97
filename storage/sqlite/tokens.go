package sqlite

import (
	"context"
	"fmt"
	"time"

	"troth.dev/troth/storage"
)

// Spend implements [storage.TokenStore]. One statement looks and writes, and is one
// transaction: a crash before its commit leaves the token unspent, a crash after it
// spent.
func (s *Store) Spend(ctx context.Context, issuer, id string, until time.Time) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := s.enter(); err != nil {
		return err
	}
	defer s.use.RUnlock()
	key := storage.TokenKey(issuer, id)
	result, err := s.writer.ExecContext(ctx, "INSERT INTO spent (token, until_ms) VALUES (?, ?) ON CONFLICT DO NOTHING", key[:], until.UnixMilli())
	if err != nil {
		return fmt.Errorf("sqlite: spend a token: %w", err)
	}
	spent, err := result.RowsAffected()
	if err != nil {
		return fmt.Errorf("sqlite: spend a token: %w", err)
	}
	if spent == 0 {
		return storage.ErrSpent
	}
	return nil
}

// PruneSpent implements [storage.TokenStore]. Each step is one transaction.
func (s *Store) PruneSpent(ctx context.Context, before time.Time) (int, error) {
	for pruned := 0; ; {
		n, err := s.pruneSpent(ctx, before)
		pruned += n
		if err != nil || n == 0 {
			return pruned, err
		}
	}
}

func (s *Store) pruneSpent(ctx context.Context, before time.Time) (int, error) {
	if err := s.enter(); err != nil {
		return 0, err
	}
	defer s.use.RUnlock()
	result, err := s.writer.ExecContext(ctx, `
		DELETE FROM spent WHERE token IN (
			SELECT token FROM spent WHERE until_ms < ? ORDER BY until_ms LIMIT ?)`, before.UnixMilli(), pruneStep)
	if err != nil {
		return 0, fmt.Errorf("sqlite: prune spent tokens: %w", err)
	}
	n, err := result.RowsAffected()
	if err != nil {
		return 0, fmt.Errorf("sqlite: prune spent tokens: %w", err)
	}
	return int(n), nil
}
