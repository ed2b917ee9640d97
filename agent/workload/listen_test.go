package workload_test

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"troth.dev/troth/agent/workload"
)

func TestListen(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o077)) // must make no difference
	dir := filepath.Join(t.TempDir(), "run", "troth")
	path := filepath.Join(dir, "workload.sock")
	wantMode := func(path string, want fs.FileMode) {
		t.Helper()
		info, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != want {
			t.Errorf("mode of %s = %v, want %v", path, info.Mode(), want)
		}
	}

	first, err := workload.Listen(path)
	if err != nil {
		t.Fatalf("Listen(new directory) = %v", err)
	}
	defer first.Close()
	wantMode(dir, fs.ModeDir|0o755)
	wantMode(path, fs.ModeSocket|0o777)
	if got := first.Addr().String(); got != path {
		t.Errorf("Addr() = %q, want %q", got, path)
	}
	wantReaches(t, path, first)

	want := fmt.Sprintf("workload: %q is taken: somebody else serves it: address already in use", path)
	if _, err := workload.Listen(path); err == nil || err.Error() != want {
		t.Errorf("Listen(served) = %v, want %q", err, want)
	}
	wantReaches(t, path, first)

	first.Close()
	second, err := workload.Listen(path)
	if err != nil {
		t.Fatalf("Listen(stale) = %v", err)
	}
	defer second.Close()
	wantMode(path, fs.ModeSocket|0o777)
	wantReaches(t, path, second)
	wantOnly(t, dir, "workload.sock")
}

func TestListenRefuses(t *testing.T) {
	for _, test := range []struct {
		name    string
		prepare func(dir, path string) error
		want    string // with the directory as %[1]q and the path as %[2]q; empty for none
	}{
		{"a file", func(_, path string) error { return os.WriteFile(path, []byte("precious"), 0o600) }, "workload: %[2]q is taken: it is not a socket"},
		{"a directory", func(_, path string) error { return os.Mkdir(path, 0o700) }, "workload: %[2]q is taken: it is not a socket"},
		{"a dangling link", func(_, path string) error { return os.Symlink("nowhere", path) }, "workload: %[2]q is taken: it is not a socket"},
		{"a directory that all may write to", func(dir, _ string) error { return os.Chmod(dir, 0o777) }, "workload: others may write to %[1]q and replace the socket: take that right away (chmod go-w)"},
		{"a directory that a group may write to", func(dir, _ string) error { return os.Chmod(dir, 0o775) }, "workload: others may write to %[1]q and replace the socket: take that right away (chmod go-w)"},
		{"not a sticky one", func(dir, _ string) error { return os.Chmod(dir, 0o777|fs.ModeSticky) }, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "workload.sock")
			if err := test.prepare(dir, path); err != nil {
				t.Fatal(err)
			}
			before, _ := os.Lstat(path)
			l, err := workload.Listen(path)
			if err == nil {
				l.Close()
			}
			if test.want == "" {
				if err != nil {
					t.Errorf("Listen() = %v", err)
				}
				return
			}
			if want := fmt.Sprintf(test.want, dir, path); err == nil || err.Error() != want {
				t.Errorf("Listen() = %v, want %q", err, want)
			}
			after, _ := os.Lstat(path)
			if before != nil && !os.SameFile(before, after) {
				t.Error("what was there is no longer there")
			}
			if before == nil {
				wantOnly(t, dir)
			} else {
				wantOnly(t, dir, "workload.sock")
			}
		})
	}
}

// Two agents start at once and find the socket of a third, which has died.
func TestListenAtOnce(t *testing.T) {
	path := socketPath(t)
	for range 50 {
		var listeners [2]net.Listener
		var errs [2]error
		var both sync.WaitGroup
		for i := range listeners {
			both.Go(func() { listeners[i], errs[i] = workload.Listen(path) })
		}
		both.Wait()
		if (errs[0] == nil) == (errs[1] == nil) {
			t.Fatalf("Listen() = %v and %v, want one to win", errs[0], errs[1])
		}
		for _, l := range listeners {
			if l != nil {
				wantReaches(t, path, l)
				l.Close()
			}
		}
		wantOnly(t, filepath.Dir(path), "workload.sock")
	}
}

// wantReaches checks that who dials path is accepted by l.
func wantReaches(t *testing.T, path string, l net.Listener) {
	t.Helper()
	dialled, err := net.Dial("unix", path)
	if err != nil {
		t.Errorf("Dial(%s) = %v", path, err)
		return
	}
	defer dialled.Close()
	// Those who asked whether anybody is there are in the queue too.
	for {
		accepted, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		_, writeErr := accepted.Write([]byte{1})
		accepted.Close()
		if writeErr == nil {
			break
		} else if !errors.Is(writeErr, syscall.EPIPE) {
			t.Fatal(writeErr)
		}
	}
	if n, err := dialled.Read(make([]byte, 1)); n != 1 {
		t.Errorf("Read() = %d, %v, want what the listener wrote", n, err)
	}
}

func wantOnly(t *testing.T, dir string, names ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, entry := range entries {
		got = append(got, entry.Name())
	}
	if fmt.Sprint(got) != fmt.Sprint(names) {
		t.Errorf("%s has %v, want %v", dir, got, names)
	}
}
