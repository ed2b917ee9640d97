package sqlite

import (
	"cmp"
	"context"
	"fmt"

	"troth.dev/troth/storage"
)

// Publish implements [storage.FleetStore]. There is one replica, and its summary
// is what it knows after a restart.
func (s *Store) Publish(ctx context.Context, replica string, data []byte) error {
	if len(data) > storage.MaxDocument {
		return storage.ErrDocumentSize
	}
	return s.writeSummary(ctx, replica, "INSERT INTO fleet VALUES (?1, ?2) ON CONFLICT DO UPDATE SET data = ?2", replica, append([]byte{}, data...))
}

// Withdraw implements [storage.FleetStore].
func (s *Store) Withdraw(ctx context.Context, replica string) error {
	return s.writeSummary(ctx, replica, "DELETE FROM fleet WHERE replica = ?", replica)
}

func (s *Store) writeSummary(ctx context.Context, replica, statement string, args ...any) error {
	if err := cmp.Or(storage.CheckReplica(replica), ctx.Err()); err != nil {
		return err
	}
	if err := s.enter(); err != nil {
		return err
	}
	defer s.use.RUnlock()
	if _, err := s.writer.ExecContext(ctx, statement, args...); err != nil {
		return fmt.Errorf("sqlite: the summary of replica %q: %w", replica, err)
	}
	return nil
}

// Summaries implements [storage.FleetStore].
func (s *Store) Summaries(ctx context.Context) ([]storage.Summary, error) {
	if err := s.enter(); err != nil {
		return nil, err
	}
	defer s.use.RUnlock()
	rows, err := s.reader.QueryContext(ctx, "SELECT replica, data FROM fleet ORDER BY replica")
	if err != nil {
		return nil, fmt.Errorf("sqlite: read the summaries: %w", err)
	}
	defer rows.Close()
	var all []storage.Summary
	for rows.Next() {
		var one storage.Summary
		if err := rows.Scan(&one.Replica, &one.Data); err != nil {
			return nil, fmt.Errorf("sqlite: read the summaries: %w", err)
		}
		all = append(all, one)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("sqlite: read the summaries: %w", err)
	}
	return all, nil
}
