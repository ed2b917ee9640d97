package postgrestest_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	postgrestest "troth.dev/troth/test/postgres"
)

// What was committed outlives every outage, and each outage is one.
func TestOutages(t *testing.T) {
	s := postgrestest.Start(t)
	url := s.Database(t)
	for _, each := range []string{s.Database(t), url} { // to each its own
		s.Execute(t, each, "CREATE TABLE kept (n int); INSERT INTO kept VALUES (1)")
	}

	for _, outage := range []struct {
		name       string
		begin, end func(testing.TB)
	}{
		{"stopped", s.Stop, s.Start},
		{"killed", s.Kill, s.Start},
		{"frozen", s.Freeze, s.Thaw},
	} {
		t.Run(outage.name, func(t *testing.T) {
			conn, err := pgx.Connect(t.Context(), url)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close(context.WithoutCancel(t.Context()))
			outage.begin(t)
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			if err := count(ctx, conn); err == nil {
				t.Error("a connection is answered during the outage")
			}
			if _, err := pgx.Connect(ctx, url); err == nil {
				t.Error("a new connection is answered during the outage")
			}
			outage.end(t)
			conn, err = pgx.Connect(t.Context(), url)
			if err != nil {
				t.Fatalf("connect after the outage: %v", err)
			}
			defer conn.Close(t.Context())
			if err := count(t.Context(), conn); err != nil {
				t.Error(err)
			}
		})
	}
}

// count returns nil if what TestOutages has committed is there.
func count(ctx context.Context, conn *pgx.Conn) error {
	var n int
	if err := conn.QueryRow(ctx, "SELECT count(*) FROM kept").Scan(&n); err != nil {
		return err
	}
	if n != 1 {
		return errors.New("what was committed is lost")
	}
	return nil
}
