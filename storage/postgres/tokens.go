package postgres

import (
	"context"
	"time"

	"troth.dev/troth/storage"
)

// Spend implements [storage.TokenStore]. One statement looks and writes, and is one
// transaction. Of two at once the second waits until the first has committed, and
// finds the token spent; a crash before the commit leaves it unspent, one after it
// spent.
func (s *Store) Spend(ctx context.Context, issuer, id string, until time.Time) error {
	ctx, leave, err := s.enter(ctx, callTimeout)
	if err != nil {
		return err
	}
	defer leave()
	key := storage.TokenKey(issuer, id)
	spent, err := s.pool.Exec(ctx, "INSERT INTO troth.spent (token, until_ms) VALUES ($1, $2) ON CONFLICT DO NOTHING", key[:], until.UnixMilli())
	if err != nil {
		return s.failure(ctx, "spend a token", err)
	}
	if spent.RowsAffected() == 0 {
		return storage.ErrSpent
	}
	return nil
}

// PruneSpent implements [storage.TokenStore]. Each step is one transaction, and two
// at once pass over what the other is removing.
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
	ctx, leave, err := s.enterScan(ctx)
	if err != nil {
		return 0, err
	}
	defer leave()
	removed, err := s.pool.Exec(ctx, `
		DELETE FROM troth.spent WHERE ctid = ANY (ARRAY(
			SELECT ctid FROM troth.spent WHERE until_ms < $1
			ORDER BY until_ms LIMIT `+pruneStep+` FOR UPDATE SKIP LOCKED))`, before.UnixMilli())
	if err != nil {
		return 0, s.failure(ctx, "prune spent tokens", err)
	}
	return int(removed.RowsAffected()), nil
}
