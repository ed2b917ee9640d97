//go:build linux

package capture_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"troth.dev/troth/agent/capture"
)

// keeper serves a keeper until the test ends.
func keeper(tb testing.TB) capture.Keeper {
	tb.Helper()
	dir, err := os.MkdirTemp("", "troth")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "keeper.sock")
	l, err := capture.ListenKeeper(path)
	if err != nil {
		tb.Fatalf("ListenKeeper() = %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- capture.ServeKeeper(ctx, l) }()
	tb.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			tb.Errorf("ServeKeeper() = %v, want nil after the end of its context", err)
		}
	})
	return capture.Keeper{Path: path}
}

// agentHelper is an agent that takes what the keeper at its first argument has kept,
// captures the namespace, and answers each connection on the plaintext port with a
// word.
func agentHelper() {
	err := func() error {
		k := capture.Keeper{Path: os.Args[1]}
		taken, err := k.Take()
		if err != nil {
			return err
		}
		n, err := capture.Open(os.NewFile(3, "namespace"), taken["pod"])
		if err != nil {
			return err
		}
		files, err := n.Files()
		if err != nil {
			return err
		}
		if err := k.Keep("pod", files); err != nil {
			return err
		}
		fmt.Println("captured")
		for {
			conn, err := n.Listener(capture.PlaintextPort).Accept()
			if err != nil {
				return err
			}
			to, err := capture.Destination(conn)
			if err != nil {
				return err
			}
			fmt.Fprintf(conn, "%s by %s", to, os.Args[2])
			conn.Close()
		}
	}()
	fmt.Println(err)
}

// An agent is killed, and until the next has started, connections arrive.
func TestAgentIsKilled(t *testing.T) {
	for _, family := range []string{"IPv4", "IPv6"} {
		t.Run(family, func(t *testing.T) {
			inner, outer := wired(t)
			k := keeper(t)
			to := netip.AddrPortFrom(pod.of(family), 80)
			answer := func(conn net.Conn) string {
				t.Helper()
				answer, err := io.ReadAll(conn)
				if err != nil {
					t.Fatalf("read the answer: %v", err)
				}
				return string(answer)
			}
			first := start(t, "agent", inner, k.Path, "the first")
			if line := first.line(t); line != "captured" {
				t.Fatalf("agent: %s", line)
			}
			if got, want := answer(mustDial(t, outer, to)), to.String()+" by the first"; got != want {
				t.Errorf("the answer is %q, want %q", got, want)
			}
			first.kill()

			var waiting []net.Conn
			for i := range 50 {
				conn, err := dial(t, outer, to)
				if err != nil {
					t.Fatalf("connection %d, while there is no agent: %v", i, err)
				}
				waiting = append(waiting, conn)
			}
			second := start(t, "agent", inner, k.Path, "the second")
			if line := second.line(t); line != "captured" {
				t.Fatalf("agent: %s", line)
			}
			for _, conn := range waiting {
				if got, want := answer(conn), to.String()+" by the second"; got != want {
					t.Errorf("the answer is %q, want %q", got, want)
				}
			}
		})
	}
}

func TestKeeper(t *testing.T) {
	k := keeper(t)
	files := func(n int) []*os.File {
		t.Helper()
		var all []*os.File
		for range n {
			all = append(all, temporary(t))
		}
		return all
	}
	keep := func(key string, files ...*os.File) {
		t.Helper()
		if err := k.Keep(key, files); err != nil {
			t.Fatalf("Keep(%q) = %v", key, err)
		}
	}
	want := func(want map[string][]*os.File) {
		t.Helper()
		got, err := k.Take()
		if err != nil {
			t.Fatalf("Take() = %v", err)
		}
		if g, w := slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)); !slices.Equal(g, w) {
			t.Errorf("Take() has %q, want %q", g, w)
		}
		for key, all := range got {
			if len(all) != len(want[key]) {
				t.Errorf("Take() has %d files of %q, want %d", len(all), key, len(want[key]))
				continue
			}
			for i, file := range all {
				if !same(t, file, want[key][i]) {
					t.Errorf("file %d of %q is another", i, key)
				}
				file.Close()
			}
		}
	}
	want(nil)
	a, b := files(5), files(8)
	keep("a", a...)
	keep("b", b...)
	want(map[string][]*os.File{"a": a, "b": b})
	keep("a", b[:2]...)
	want(map[string][]*os.File{"a": b[:2], "b": b})
	for range 2 {
		if err := k.Drop("b"); err != nil {
			t.Fatalf("Drop() = %v", err)
		}
		want(map[string][]*os.File{"a": b[:2]})
	}
}

func TestKeeperRefuses(t *testing.T) {
	k := keeper(t)
	file := temporary(t)
	if err := k.Keep("kept", []*os.File{file}); err != nil {
		t.Fatal(err)
	}
	before := openFiles(t)
	for _, test := range []struct {
		name, packet string
		files        int
		want         string
	}{
		{"nothing", "", 1, "a message of 1 bytes"}, // files do not come without
		{"another version", "\x02Kkey", 1, "version 2 of the protocol, where 1 is spoken"},
		{"another message", "\x01Xkey", 1, `unknown message 'X'`},
		{"an answer", "\x01O", 0, `'O' is no request`},
		{"no key", "\x01K", 1, "a key of 0 bytes, want 1 to 128"},
		{"a long key", "\x01K" + strings.Repeat("k", 129), 1, "a key of 129 bytes, want 1 to 128"},
		{"a long message", "\x01K" + strings.Repeat("k", 5000), 1, "a message of too many bytes, or of more than 8 files"},
		{"a key in two lines", "\x01Ka\nb", 1, "a key that is not printable"},
		{"many files", "\x01Kkey", 9, "a message of too many bytes, or of more than 8 files"},
		{"more files than the kernel takes at once", "\x01Kkey", 253, "a message of too many bytes, or of more than 8 files"},
		{"files to drop", "\x01Dkept", 1, "files that nobody asked for"},
		{"take one", "\x01Tkept", 0, "4 bytes too many"},
	} {
		t.Run(test.name, func(t *testing.T) {
			conn := packet(t, k, test.packet, file, test.files)
			defer conn.Close()
			answer := make([]byte, 1000)
			n, err := conn.Read(answer)
			if err != nil || string(answer[:n]) != "\x01E"+test.want {
				t.Errorf("the answer is %q, %v, want %q", answer[:n], err, "\x01E"+test.want)
			}
			if n, err := conn.Read(answer); !errors.Is(err, io.EOF) {
				t.Errorf("Read() = %d, %v, want the end", n, err)
			}
		})
	}
	t.Run("a client that goes away", func(t *testing.T) {
		packet(t, k, "\x01T", file, 0).Close()
		conn, err := net.Dial("unixpacket", k.Path)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
	})
	t.Run("more keys than it keeps", func(t *testing.T) {
		for i := range 1023 {
			if err := k.Keep(fmt.Sprint(i), nil); err != nil {
				t.Fatalf("Keep(%d) = %v", i, err)
			}
		}
		if err := k.Keep("one-more", []*os.File{file}); err == nil || !strings.HasSuffix(err.Error(), "1024 are kept already") {
			t.Errorf("Keep() = %v, want a refusal", err)
		}
		if err := k.Keep("kept", []*os.File{file}); err != nil {
			t.Errorf("Keep() = %v, for a key that is there", err)
		}
	})
	got, err := k.Take()
	if err != nil || len(got) != 1024 || len(got["kept"]) != 1 || !same(t, got["kept"][0], file) {
		t.Errorf("Take() = %d keys, %v, want 1024, and what was kept before", len(got), err)
	}
	got["kept"][0].Close()
	waitFor(t, func() error {
		if after := openFiles(t); after > before {
			return fmt.Errorf("%d descriptors are open, %d were before", after, before)
		}
		return nil
	})
}

func TestKeeperOfAnotherUser(t *testing.T) {
	k := keeper(t)
	if info, err := os.Stat(k.Path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket's mode is %v, %v, want 600", info.Mode(), err)
	}
	// Root may connect to everybody's.
	if err := os.Chmod(k.Path, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Dir(k.Path), 0o755); err != nil {
		t.Fatal(err)
	}
	var takeErr error
	asUser(t, 65534, func() { _, takeErr = k.Take() })
	if want := "user 65534 is not the keeper's, 0"; takeErr == nil || !strings.HasSuffix(takeErr.Error(), want) {
		t.Errorf("Take() = %v, want %q", takeErr, want)
	}
}

func TestListenKeeper(t *testing.T) {
	k := keeper(t)
	if _, err := capture.ListenKeeper(k.Path); err == nil || !strings.Contains(err.Error(), "another keeper serves") {
		t.Errorf("ListenKeeper() = %v, want a refusal", err)
	}
	path := filepath.Join(filepath.Dir(k.Path), "left")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	again, err := capture.ListenKeeper(path)
	if err != nil {
		t.Fatalf("ListenKeeper() = %v, where a keeper was killed", err)
	}
	again.Close()
	stream, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if err := capture.ServeKeeper(t.Context(), stream); err == nil {
		t.Error("ServeKeeper() = nil, for a socket of streams")
	}
}

func FuzzParseMessage(f *testing.F) {
	for _, seed := range []string{"", "\x01", "\x01Kkey", "\x01T", "\x01Dkey", "\x01O", "\x01Ewhy", "\x02K", "\x01Fkey", "\x01K\x00"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := capture.ParseMessage(b)
		if err != nil {
			return
		}
		if got := m.Bytes(); string(got) != string(b) {
			t.Errorf("%q is read and written as %q", b, got)
		}
		if len(b) > 2+512 {
			t.Errorf("a message of %d bytes is accepted", len(b))
		}
	})
}

// packet sends what a client would not.
func packet(tb testing.TB, k capture.Keeper, text string, file *os.File, files int) *net.UnixConn {
	tb.Helper()
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: k.Path, Net: "unixpacket"})
	if err != nil {
		tb.Fatal(err)
	}
	var rights []byte
	if files > 0 {
		rights = unix.UnixRights(slices.Repeat([]int{int(file.Fd())}, files)...)
	}
	if _, _, err := conn.WriteMsgUnix([]byte(text), rights, nil); err != nil {
		tb.Fatal(err)
	}
	return conn
}

func temporary(tb testing.TB) *os.File {
	tb.Helper()
	file, err := os.CreateTemp(tb.TempDir(), "")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { file.Close() })
	return file
}

func same(tb testing.TB, a, b *os.File) bool {
	tb.Helper()
	aInfo, aErr := a.Stat()
	bInfo, bErr := b.Stat()
	if aErr != nil || bErr != nil {
		tb.Fatal(aErr, bErr)
	}
	return os.SameFile(aInfo, bInfo)
}
