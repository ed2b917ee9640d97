package postgres_test

import "context"

const crashURL = "TROTH_TEST_CRASH_URL"

func writeUntilKilled(ctx context.Context, url string) error { return nil }
