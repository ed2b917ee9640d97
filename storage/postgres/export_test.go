package postgres

import (
	"context"

	"github.com/jackc/pgx/v5"
)

// Setting returns a setting of the connections that the store uses, which no other
// connection can see.
func (s *Store) Setting(ctx context.Context, name string) (value string, err error) {
	err = s.pool.QueryRow(ctx, "SELECT current_setting($1)", name).Scan(&value)
	return value, err
}

// Using says whether somebody has a connection.
func (s *Store) Using() bool {
	return s.pool.Stat().AcquiredConns() > 0
}

// Schema returns the steps that make the schema.
func Schema() []string { return schema() }

// Migrate takes these steps in the database at url.
func Migrate(ctx context.Context, url string, steps []string) error {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	return migrate(ctx, conn, steps)
}

// Verifies reports whether the server at url has to prove its name.
func Verifies(url string) (bool, error) {
	config, err := configure(url)
	if err != nil {
		return false, err
	}
	conn := config.ConnConfig
	return conn.TLSConfig != nil && !conn.TLSConfig.InsecureSkipVerify && len(conn.Fallbacks) == 0, nil
}
