package postgres

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"

	"troth.dev/troth/storage"
)

// Publish implements [storage.FleetStore].
func (s *Store) Publish(ctx context.Context, replica string, data []byte) error {
	if len(data) > storage.MaxDocument {
		return storage.ErrDocumentSize
	}
	return s.writeSummary(ctx, replica,
		"INSERT INTO troth.fleet (replica, data) VALUES ($1, $2) ON CONFLICT (replica) DO UPDATE SET data = excluded.data", append([]byte{}, data...))
}

// Withdraw implements [storage.FleetStore].
func (s *Store) Withdraw(ctx context.Context, replica string) error {
	return s.writeSummary(ctx, replica, "DELETE FROM troth.fleet WHERE replica = $1")
}

// writeSummary runs a statement on a replica's summary, and one transaction: a
// crash before its commit leaves the old summary, a crash after it the new one.
func (s *Store) writeSummary(ctx context.Context, replica, statement string, args ...any) error {
	if err := storage.CheckReplica(replica); err != nil {
		return err
	}
	ctx, leave, err := s.enter(ctx, callTimeout)
	if err != nil {
		return err
	}
	defer leave()
	if _, err := s.pool.Exec(ctx, statement, append([]any{replica}, args...)...); err != nil {
		return s.failure(ctx, fmt.Sprintf("the summary of replica %q", replica), err)
	}
	return nil
}

// Summaries implements [storage.FleetStore].
func (s *Store) Summaries(ctx context.Context) ([]storage.Summary, error) {
	ctx, leave, err := s.enter(ctx, callTimeout)
	if err != nil {
		return nil, err
	}
	defer leave()
	rows, err := s.pool.Query(ctx, "SELECT replica, data FROM troth.fleet ORDER BY replica")
	if err != nil {
		return nil, s.failure(ctx, "read the summaries", err)
	}
	all, err := pgx.CollectRows(rows, pgx.RowToStructByPos[storage.Summary])
	if err != nil {
		return nil, s.failure(ctx, "read the summaries", err)
	}
	return all, nil
}
