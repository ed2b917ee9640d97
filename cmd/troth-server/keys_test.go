package main

import (
	"bytes"
	"crypto/rand"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"troth.dev/troth/storage/sqlite"
)

// serverIn starts a server that gets as far as its kubeconfig, which is not there:
// its authorities are in the store by then. It returns what it logs, and how it
// ends.
func serverIn(t *testing.T, dir string, args ...string) (string, error) {
	t.Helper()
	var log bytes.Buffer
	err := run(t.Context(), append([]string{"-trust-domain", "example.test", "-database", filepath.Join(dir, "troth.db"),
		"-kubeconfig", filepath.Join(dir, "kubeconfig")}, args...), &log)
	return log.String(), err
}

// reached says whether the server used its keys without complaint.
func reached(t *testing.T, err error) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), "kubeconfig") {
		t.Errorf("the server ends with %v; want it to have got to its kubeconfig", err)
	}
}

func document(t *testing.T, dir string) string {
	t.Helper()
	store, err := sqlite.Open(t.Context(), sqlite.Config{Path: filepath.Join(dir, "troth.db")})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	doc, err := store.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return string(doc.Data)
}

// A key-encryption key is changed at a start, and the one before can go at the next.
func TestKeyEncryptionKeyChanges(t *testing.T) {
	dir := t.TempDir()
	first, second := filepath.Join(dir, "first"), filepath.Join(dir, "second")
	for _, path := range []string{first, second} {
		key := make([]byte, 32)
		rand.Read(key)
		if err := os.WriteFile(path, key, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	_, err := serverIn(t, dir, "-key-encryption-key", first)
	reached(t, err)
	before := document(t, dir)

	if _, err := serverIn(t, dir, "-key-encryption-key", second); err == nil || !strings.Contains(err.Error(), "give that one too, as a previous one") {
		t.Errorf("with the second key alone the server ends with %v", err)
	}
	if document(t, dir) != before {
		t.Error("it changed the document")
	}
	log, err := serverIn(t, dir, "-key-encryption-key", second, "-previous-key-encryption-key", first)
	reached(t, err)
	if !strings.Contains(log, `"operation":"reseal"`) || document(t, dir) == before {
		t.Errorf("with both the key is not sealed anew: %s", log)
	}
	log, err = serverIn(t, dir, "-key-encryption-key", second)
	reached(t, err)
	if strings.Contains(log, `"operation":"reseal"`) {
		t.Errorf("it is sealed anew twice: %s", log)
	}
}

func TestKeyFlags(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, size int) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, bytes.Repeat([]byte{byte(size)}, size), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good, short, long, none := write("good", 32), write("short", 31), write("long", 33), filepath.Join(dir, "none")
	for _, test := range []struct {
		name string
		args []string
		want string
	}{
		{"no file", []string{"-key-encryption-key", none}, "no such file or directory (make one with: head -c 32 /dev/urandom > " + none + ")"},
		{"short", []string{"-key-encryption-key", short}, "key-encryption key: " + short + " does not have 32 bytes"},
		{"long", []string{"-key-encryption-key", long}, "key-encryption key: " + long + " does not have 32 bytes"},
		{"short previous", []string{"-key-encryption-key", good, "-previous-key-encryption-key", short}, short + " does not have 32 bytes"},
		{"twice", []string{"-key-encryption-key", good, "-previous-key-encryption-key", good}, "is given twice"},
		{"helper and key", []string{"-key-encryption-key", good, "-key-helper", "x"}, "-key-helper keeps the keys by itself"},
		{"helper and previous key", []string{"-previous-key-encryption-key", good, "-key-helper", "x"}, "-key-helper keeps the keys by itself"},
		{"helper that is none", []string{"-key-helper", none + " -a b"}, "HELPER_GONE: "},
		{"helper of no words", []string{"-key-helper", "  "}, "keyhelper: no command"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if _, err := serverIn(t, t.TempDir(), test.args...); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("the server ends with %v, want %q", err, test.want)
			}
		})
	}
	o, err := parse([]string{"-trust-domain", "example.test", "-key-helper", " troth-pkcs11  -token troth "}, io.Discard)
	if got := strings.Join(o.keyHelper, "|"); err != nil || got != "troth-pkcs11|-token|troth" {
		t.Errorf("-key-helper is read as %s, %v", got, err)
	}
}
