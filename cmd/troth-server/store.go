package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"

	"troth.dev/troth/kube"
	"troth.dev/troth/storage"
	"troth.dev/troth/storage/kubernetes"
	"troth.dev/troth/storage/postgres"
	"troth.dev/troth/storage/sqlite"
)

// store is all that the server has to remember.
type store interface {
	storage.AuthorityStore
	storage.Ledger
	storage.FleetStore
	storage.TokenStore
	Tests() storage.AuthorityStore
	Close() error
}

// openStore opens the store that the flags name, and connects to the API server only
// if that is where it is.
func openStore(ctx context.Context, o options, connect func() (*kube.Client, error), log *slog.Logger) (store, error) {
	switch {
	case o.storeNamespace != "":
		client, err := connect()
		if err != nil {
			return nil, err
		}
		return kubernetes.Open(ctx, kubernetes.Config{Client: client, Namespace: o.storeNamespace, Log: log})
	case o.postgresFile == "":
		return sqlite.Open(ctx, sqlite.Config{Path: o.database})
	}
	// In a file, because it has a password and a command line is for all to read.
	url, err := os.ReadFile(o.postgresFile)
	if err != nil {
		return nil, fmt.Errorf("-postgres: %w", err)
	}
	if len(strings.TrimSpace(string(url))) == 0 {
		return nil, errors.New("-postgres: the file is empty")
	}
	return postgres.Open(ctx, postgres.Config{URL: strings.TrimSpace(string(url)), Log: log})
}
