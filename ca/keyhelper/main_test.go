package keyhelper_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"troth.dev/troth/ca/keyhelper"
)

// The test program is the helpers, too: "helper MODE FOLDER".
func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == "helper" {
		if err := help(os.Args[2], folder(os.Args[3])); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	// Under the race detector a program sleeps for a second before it exits, which
	// looks as if the helpers took their time.
	os.Setenv("GORACE", "atexit_sleep_ms=0")
	os.Exit(m.Run())
}

// folder is a KeyStore of files. While there is a file "hang" in it, it does not
// answer; while there is one "die", a signature is the end of the process.
type folder string

func (f folder) has(name string) bool {
	_, err := os.Stat(filepath.Join(string(f), name))
	return err == nil
}

func (f folder) Create(context.Context) (*ecdsa.PublicKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	handle := make([]byte, 8)
	rand.Read(handle)
	return &key.PublicKey, handle, os.WriteFile(filepath.Join(string(f), hex.EncodeToString(handle)), der, 0o600)
}

func (f folder) load(handle []byte) (*ecdsa.PrivateKey, error) {
	der, err := os.ReadFile(filepath.Join(string(f), hex.EncodeToString(handle)))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, &keyhelper.Error{Code: keyhelper.NoSuchKey, Message: fmt.Sprintf("no key %x", handle)}
	} else if err != nil {
		return nil, err
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, err
	}
	return key.(*ecdsa.PrivateKey), nil
}

func (f folder) Open(_ context.Context, _ string, handle []byte) (*ecdsa.PublicKey, error) {
	if f.has("hang") {
		select {}
	}
	key, err := f.load(handle)
	if err != nil {
		return nil, err
	}
	return &key.PublicKey, nil
}

func (f folder) Sign(_ context.Context, handle, digest []byte) ([]byte, error) {
	if f.has("hang") {
		select {} // as in a driver
	}
	if f.has("die") {
		os.Exit(3)
	}
	key, err := f.load(handle)
	if err != nil {
		return nil, err
	}
	return ecdsa.SignASN1(rand.Reader, key, digest)
}

// wrong are KeyStores that answer with what they should not.
type wrong struct {
	folder
	mode string
}

func (w wrong) Create(ctx context.Context) (*ecdsa.PublicKey, []byte, error) {
	public, handle, err := w.folder.Create(ctx)
	switch w.mode {
	case "P-384":
		key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
		return &key.PublicKey, handle, err
	case "no-key":
		return nil, handle, err
	case "no-handle":
		return public, nil, err
	case "long-handle":
		return public, make([]byte, keyhelper.MaxHandle+1), err
	case "long-error":
		return nil, nil, errors.New(strings.Repeat("ä", 10_000))
	}
	return public, handle, err
}

func (w wrong) Sign(ctx context.Context, handle, digest []byte) ([]byte, error) {
	switch w.mode {
	case "no-signature":
		return nil, nil
	case "false-signature":
		digest = make([]byte, 32)
	}
	return w.folder.Sign(ctx, handle, digest)
}

// help is a helper: a good one that keeps its keys in the folder, or a bad one.
func help(mode string, f folder) error {
	if err := os.WriteFile(filepath.Join(string(f), "pid"), []byte(strconv.Itoa(os.Getpid())), 0o600); err != nil {
		return err
	}
	starts, err := os.OpenFile(filepath.Join(string(f), "starts"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if _, err := starts.Write([]byte{1}); err != nil {
		return err
	}
	send := func(text string) {
		os.Stdout.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...))
	}
	const hello = `{"id":1,"version":1}`
	wait := func() { io.Copy(io.Discard, os.Stdin) }
	switch mode {
	case "good":
		fmt.Fprintln(os.Stderr, "the helper was started")
		return keyhelper.Serve(context.Background(), os.Stdin, os.Stdout, f)
	case "exits":
		return errors.New("no such module")
	case "silent":
		wait()
	case "prints":
		fmt.Println("welcome to the token")
		wait()
	case "huge":
		os.Stdout.Write([]byte{0x7f, 0xff, 0xff, 0xff})
		wait()
	case "no-JSON":
		send("PK")
		wait()
	case "later":
		send(`{"id":1,"version":2}`)
		wait()
	case "handle-of-its-own":
		send(hello)
		send(`{"id":2,"handle":"` + strings.Repeat("AAAA", 400) + `"}`)
		wait()
	case "unasked":
		send(hello)
		send(`{"id":77}`)
		wait()
	case "twice":
		send(hello)
		send(hello)
		wait()
	case "cut-off":
		os.Stdout.Write([]byte{0, 0, 0, 9, '{'})
	case "closes":
		send(hello)
		os.Stdout.Close()
		wait()
	case "deaf":
		send(hello)
		select {}
	case "stubborn": // goes on when it should end
		err := keyhelper.Serve(context.Background(), os.Stdin, os.Stdout, f)
		fmt.Fprintln(os.Stderr, "not ending:", err)
		select {}
	default:
		return keyhelper.Serve(context.Background(), os.Stdin, os.Stdout, wrong{f, mode})
	}
	return nil
}

// helperOf returns Keys of a helper of its own folder, and the folder.
func helperOf(t testing.TB, mode string, timeout time.Duration) (*keyhelper.Keys, string) {
	t.Helper()
	dir := t.TempDir()
	return helperIn(t, mode, timeout, dir, slog.New(slog.DiscardHandler)), dir
}

func helperIn(t testing.TB, mode string, timeout time.Duration, dir string, log *slog.Logger) *keyhelper.Keys {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	keys, err := keyhelper.New(keyhelper.Config{Command: []string{program, "helper", mode, dir}, Timeout: timeout, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := keys.Close(); err != nil {
			t.Error(err)
		}
	})
	return keys
}
