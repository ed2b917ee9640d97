package postgres

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// migrationLock is the advisory lock of this database under which migrations run.
const migrationLock = 0x54726f74 // "Trot"

// migrate brings the schema to version len(steps). Each step leads from one version
// to the next, in a transaction of its own and under a lock, so that one replica
// takes it and the others find it taken. A crash before a step's commit leaves the
// version before it, whole, and the server gives the lock back as soon as it sees
// that the connection is gone; a crash after it leaves the next version, also whole.
// The next Open goes on from there.
func migrate(ctx context.Context, conn *pgx.Conn, steps []string) error {
	for {
		version, err := schemaVersion(ctx, conn)
		switch {
		case err != nil:
			return fmt.Errorf("read the schema's version: %w", err)
		case version > len(steps):
			return fmt.Errorf("the schema has version %d, this program knows versions up to %d: run the version of the program that wrote it, or a newer one",
				version, len(steps))
		case version == len(steps):
			return nil
		}
		if err := takeStep(ctx, conn, steps); err != nil {
			return fmt.Errorf("bring the schema from version %d to %d: %w", version, len(steps), err)
		}
	}
}

// takeStep takes the next step, if there still is one when it has the lock.
func takeStep(ctx context.Context, conn *pgx.Conn, steps []string) error {
	tx, err := conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer tx.Rollback(context.WithoutCancel(ctx)) // ends with the connection if ctx has
	// A step, and with it those who wait for it, may take longer than other
	// statements. Under read committed, what follows the lock sees what its last
	// holder did.
	if _, err := tx.Exec(ctx, "SET LOCAL statement_timeout = 0"); err != nil {
		return err
	}
	if _, err := tx.Exec(ctx, "SELECT pg_advisory_xact_lock($1)", migrationLock); err != nil {
		return err
	}
	version, err := schemaVersion(ctx, conn)
	if err != nil || version >= len(steps) {
		return err
	}
	if version == 0 {
		if err := makeSchema(ctx, conn); err != nil {
			return err
		}
	}
	if _, err := conn.PgConn().Exec(ctx, steps[version]).ReadAll(); err != nil {
		return err
	}
	if _, err := tx.Exec(ctx, "INSERT INTO troth.migration (version) VALUES ($1)", version+1); err != nil {
		return err
	}
	return tx.Commit(ctx)
}

// schemaVersion returns 0 if there is no schema of ours.
func schemaVersion(ctx context.Context, conn *pgx.Conn) (version int, err error) {
	// Not to_regclass: it may remember that there was no such table when it was
	// asked before another replica made it.
	var ours bool
	err = conn.QueryRow(ctx, `
		SELECT count(*) > 0 FROM pg_class c JOIN pg_namespace n ON c.relnamespace = n.oid
		WHERE n.nspname = 'troth' AND c.relname = 'migration'`,
	).Scan(&ours)
	if err != nil || !ours {
		return 0, err
	}
	err = conn.QueryRow(ctx, "SELECT coalesce(max(version), 0) FROM troth.migration").Scan(&version)
	return version, err
}

// makeSchema makes the schema, and in it the table of its versions. The schema may
// be there if it is empty: so an operator makes it for a role that may not.
func makeSchema(ctx context.Context, conn *pgx.Conn) error {
	var exists, used bool
	err := conn.QueryRow(ctx, `
		SELECT count(DISTINCT n.oid) > 0, count(c.oid) > 0
		FROM pg_namespace n LEFT JOIN pg_class c ON c.relnamespace = n.oid
		WHERE n.nspname = 'troth'`,
	).Scan(&exists, &used)
	if err != nil {
		return err
	}
	if used {
		return errors.New(`the schema "troth" is another program's: use another database`)
	}
	statements := `
		CREATE TABLE troth.migration (
			version    integer PRIMARY KEY,
			applied_at timestamptz NOT NULL DEFAULT now()
		);`
	if !exists {
		// Its owner's alone, like every schema whose rights nobody changes.
		statements = "CREATE SCHEMA troth;" + statements
	}
	_, err = conn.PgConn().Exec(ctx, statements).ReadAll()
	return err
}

// schema returns the steps that made the schema what it is, each for good: once
// released, a step is never changed. While replicas of two versions run beside each
// other the older ones meet the newer schema, so a step may only add what they can
// do without.
//
// Times are seconds, or milliseconds where named so, since 1970.
//
// A serial number is 20 octets, the most that RFC 5280 §4.1.2.2 allows, so that the
// order of bytea is the order of numbers.
//
// The ledger has two indexes: the order in which it is read and pruned, which grows
// at its end, and the serial numbers, which must be unique whenever they were
// issued. What one by SPIFFE ID would save is a query that an operator makes now and
// then, at 0.3 us a row; what it would cost, every Record pays.
func schema() []string {
	return []string{`
		CREATE TABLE troth.document (
			only_one boolean PRIMARY KEY DEFAULT true CHECK (only_one),
			version  text  NOT NULL, -- empty until the first Swap
			data     bytea NOT NULL
		);
		ALTER TABLE troth.document ALTER COLUMN data SET STORAGE EXTERNAL; -- sealed keys do not compress
		INSERT INTO troth.document (version, data) VALUES ('', '');

		CREATE TABLE troth.issuance (
			issued_at_ms bigint NOT NULL,
			not_before   bigint NOT NULL,
			not_after    bigint NOT NULL,
			serial       bytea  NOT NULL CHECK (length(serial) = 20),
			id           text   NOT NULL,
			authority    text   NOT NULL,
			caller       text   NOT NULL,
			node         text   NOT NULL,
			pod_uid      text   NOT NULL,
			PRIMARY KEY (issued_at_ms, serial)
		);
		CREATE UNIQUE INDEX issuance_by_serial ON troth.issuance (serial);

		CREATE TABLE troth.fleet (
			replica text COLLATE "C" PRIMARY KEY, -- in the order of bytes
			data    bytea NOT NULL
		);`, `
		CREATE TABLE troth.test_document (
			only_one boolean PRIMARY KEY DEFAULT true CHECK (only_one),
			version  text  NOT NULL, -- empty until the first Swap
			data     bytea NOT NULL
		);
		ALTER TABLE troth.test_document ALTER COLUMN data SET STORAGE EXTERNAL;
		INSERT INTO troth.test_document (version, data) VALUES ('', '');

		CREATE TABLE troth.spent (
			token    bytea PRIMARY KEY CHECK (length(token) = 32),
			until_ms bigint NOT NULL
		);
		CREATE INDEX spent_until ON troth.spent (until_ms);`,
	}
}
