package bounded_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"troth.dev/troth/internal/bounded"
)

func TestReadAll(t *testing.T) {
	for content, want := range map[string]string{"": "", "1234": "", "12345": "more than 4 bytes"} {
		got, err := bounded.ReadAll(strings.NewReader(content), 4)
		switch {
		case want == "" && (err != nil || string(got) != content):
			t.Errorf("ReadAll(%q) = %q, %v", content, got, err)
		case want != "" && (err == nil || err.Error() != want || got != nil):
			t.Errorf("ReadAll(%q) = %q, %v, want %q", content, got, err, want)
		}
	}
	broken := errors.New("broken")
	if _, err := bounded.ReadAll(iotest.ErrReader(broken), 4); !errors.Is(err, broken) {
		t.Errorf("ReadAll() = %v, want %v", err, broken)
	}
}

func TestReadFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if _, err := bounded.ReadFile(path, 4); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a file: %v", err)
	}
	if err := os.WriteFile(path, []byte("12345"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := bounded.ReadFile(path, 5); err != nil || string(got) != "12345" {
		t.Errorf("ReadFile() = %q, %v", got, err)
	}
	if _, err := bounded.ReadFile(path, 4); err == nil || err.Error() != path+": more than 4 bytes" {
		t.Errorf("ReadFile() = %v, want what is too large", err)
	}
}
