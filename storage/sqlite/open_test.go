package sqlite_test

import (
	"bytes"
	"database/sql"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"troth.dev/troth/storage"
	"troth.dev/troth/storage/sqlite"
)

func TestOpenRefuses(t *testing.T) {
	tests := []struct {
		name string
		path func(t *testing.T) string
		want string
	}{
		{"no path", func(*testing.T) string { return "" }, "Config.Path is empty"},
		{"a folder that is not there", func(t *testing.T) string {
			return filepath.Join(t.TempDir(), "missing", "troth.db")
		}, "no such file or directory"},
		{"a folder", func(t *testing.T) string { return t.TempDir() }, "is a directory"},
		{"below a file", func(t *testing.T) string {
			return filepath.Join(write(t, []byte("x")), "troth.db")
		}, "not a directory"},
		{"no database", func(t *testing.T) string {
			return write(t, bytes.Repeat([]byte("no database\n"), 1000))
		}, "file is not a database"},
		{"another program's database", func(t *testing.T) string {
			return execute(t, filepath.Join(t.TempDir(), "other.db"), "CREATE TABLE t (x)")
		}, "a database of another program"},
		{"another program's version 1", func(t *testing.T) string {
			return execute(t, filepath.Join(t.TempDir(), "other.db"), "PRAGMA user_version = 1")
		}, "a database of another program"},
		{"an older schema", func(t *testing.T) string {
			return execute(t, closed(t), "PRAGMA user_version = 1")
		}, "the database has schema version 1, this program knows versions 2 to 4"},
		{"a newer schema", func(t *testing.T) string {
			return execute(t, closed(t), "PRAGMA user_version = 5")
		}, "the database has schema version 5, this program knows versions 2 to 4: run the version"},
		{"a schema of no version", func(t *testing.T) string {
			return execute(t, closed(t), "PRAGMA user_version = 0")
		}, "the database has schema version 0"},
		{"in use", func(t *testing.T) string {
			path := filepath.Join(t.TempDir(), "troth.db")
			openAt(t, path)
			return path
		}, "only one process may have it open"},
		{"in use under another name", func(t *testing.T) string {
			path := filepath.Join(t.TempDir(), "troth.db")
			openAt(t, path)
			link := filepath.Join(t.TempDir(), "link.db")
			if err := os.Symlink(path, link); err != nil {
				t.Fatal(err)
			}
			return link
		}, "only one process may have it open"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			path := test.path(t)
			before, _ := os.ReadFile(path)
			s, err := sqlite.Open(t.Context(), sqlite.Config{Path: path})
			if err == nil {
				s.Close()
				t.Fatalf("Open(%q) = nil, want an error with %q", path, test.want)
			}
			if !strings.Contains(err.Error(), test.want) {
				t.Errorf("Open(%q) = %v, want an error with %q", path, err, test.want)
			}
			if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
				t.Errorf("Open(%q) refused the file, and changed it", path)
			}
		})
	}
}

// Permissions do not bind root, so one thread becomes nobody for the file system.
// It is not unlocked: it ends with its goroutine.
func TestOpenInFolderThatIsNotOurs(t *testing.T) {
	folder := t.TempDir()
	if err := os.Chmod(folder, 0o555); err != nil {
		t.Fatal(err)
	}
	refused := make(chan error)
	go func() {
		runtime.LockOSThread()
		if os.Getuid() == 0 {
			if err := syscall.Setfsuid(65534); err != nil {
				refused <- err
				return
			}
		}
		s, err := sqlite.Open(t.Context(), sqlite.Config{Path: filepath.Join(folder, "troth.db")})
		if err == nil {
			err = errors.Join(errors.New("it opened"), s.Close())
		}
		refused <- err
	}()
	if err := <-refused; !errors.Is(err, os.ErrPermission) {
		t.Errorf("Open(in a folder that is not writable) = %v, want permission denied", err)
	}
}

// A failed Open holds nothing: the next one can have the file.
func TestOpenAfterRefusal(t *testing.T) {
	path := execute(t, closed(t), "PRAGMA user_version = 5")
	if _, err := sqlite.Open(t.Context(), sqlite.Config{Path: path}); err == nil {
		t.Fatal("Open(a newer schema) = nil")
	}
	execute(t, path, "PRAGMA user_version = 4")
	openAt(t, path)
}

// A file of version 2 had no place for summaries, and one of version 3 none for spent
// tokens. What they have stays.
func TestOpenOfOlderVersions(t *testing.T) {
	const version3 = "DROP TABLE spent; DROP TABLE test_document; PRAGMA user_version = 3;"
	for _, older := range []string{version3 + "DROP TABLE fleet; PRAGMA user_version = 2", version3} {
		testOpenOfOlderVersion(t, older)
	}
}

func testOpenOfOlderVersion(t *testing.T, older string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "troth.db")
	s := openAt(t, path)
	if err := s.Record(t.Context(), issuance()); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	execute(t, path, older)
	s = openAt(t, path)
	if err := s.Publish(t.Context(), "replica", []byte("heard")); err != nil {
		t.Error(err)
	}
	if err := s.Spend(t.Context(), "issuer", "token", time.Now()); err != nil {
		t.Error(err)
	}
	if _, err := s.Tests().Swap(t.Context(), "", []byte("document")); err != nil {
		t.Error(err)
	}
	if all, err := s.Query(t.Context(), storage.Query{}); len(all) != 1 || err != nil {
		t.Errorf("Query() = %d issuances, %v, want the one of before", len(all), err)
	}
}

func TestPathIsTakenLiterally(t *testing.T) {
	for _, name := range []string{"a?mode=memory", "b%41", "c#d", "e f", "g&vfs=none", "ключ"} {
		path := filepath.Join(t.TempDir(), name)
		openAt(t, path)
		if _, err := os.Stat(path + "-wal"); err != nil {
			t.Errorf("Open(%q) put the log elsewhere: %v", name, err)
		}
	}
}

func TestFilesArePrivate(t *testing.T) {
	path := write(t, nil) // readable by all, as somebody's umask made it
	s := openAt(t, path)
	if err := s.Record(t.Context(), issuance()); err != nil {
		t.Fatal(err)
	}
	for _, suffix := range []string{"", "-wal", "-shm", ".lock"} {
		file, err := os.Stat(path + suffix)
		if err != nil {
			t.Fatal(err)
		}
		if got := file.Mode().Perm(); got != 0o600 {
			t.Errorf("%s has the mode %#o, want 0600", file.Name(), got)
		}
	}
}

// A killed process does not show whether the disk was told to keep anything, so
// that the settings which durability hangs on are tested as such.
func TestSettings(t *testing.T) {
	s := open(t)
	for name, want := range map[string]string{"journal_mode": "wal", "synchronous": "2"} {
		if got, err := s.Pragma(t.Context(), name); got != want || err != nil {
			t.Errorf("PRAGMA %s = %q, %v, want %q", name, got, err, want)
		}
	}
}

func TestClosed(t *testing.T) {
	s := open(t)
	watched := make(chan error)
	go func() {
		_, err := s.Watch(t.Context(), "")
		watched <- err
	}()
	for range 2 {
		if err := s.Close(); err != nil {
			t.Fatalf("Close() = %v", err)
		}
	}
	if err := <-watched; !errors.Is(err, storage.ErrClosed) {
		t.Errorf("Watch while Close was called = %v, want ErrClosed", err)
	}
	_, errLoad := s.Load(t.Context())
	_, errSwap := s.Swap(t.Context(), "", nil)
	_, errWatch := s.Watch(t.Context(), "")
	_, errQuery := s.Query(t.Context(), storage.Query{})
	_, errPrune := s.Prune(t.Context(), epoch)
	for name, err := range map[string]error{
		"Load": errLoad, "Swap": errSwap, "Watch": errWatch, "Query": errQuery, "Prune": errPrune,
		"Record": s.Record(t.Context(), issuance()),
	} {
		if !errors.Is(err, storage.ErrClosed) {
			t.Errorf("%s after Close = %v, want ErrClosed", name, err)
		}
	}
}

// write returns the path of a new file with that content.
func write(t *testing.T, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, content, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// closed returns the path of a store that was made and closed.
func closed(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "troth.db")
	if err := openAt(t, path).Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// execute runs SQL on the file as another program would, and returns its path.
func execute(t *testing.T, path, statement string) string {
	t.Helper()
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.ExecContext(t.Context(), statement); err != nil {
		t.Fatal(err)
	}
	return path
}
