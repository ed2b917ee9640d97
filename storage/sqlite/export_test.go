package sqlite

import "context"

// Pragma returns a setting of the connection that writes, which no other
// connection can see.
func (s *Store) Pragma(ctx context.Context, name string) (value string, err error) {
	err = s.writer.QueryRowContext(ctx, "PRAGMA "+name).Scan(&value)
	return value, err
}

// Writing says whether somebody has the connection that writes.
func (s *Store) Writing() bool {
	return s.writer.Stats().InUse > 0
}
