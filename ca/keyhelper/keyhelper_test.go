package keyhelper_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/ca"
	"troth.dev/troth/ca/keyhelper"
	"troth.dev/troth/storage"
)

var digest = sha256.Sum256([]byte("what is signed"))

func sign(key crypto.Signer) error {
	signature, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return err
	}
	if !ecdsa.VerifyASN1(key.Public().(*ecdsa.PublicKey), digest[:], signature) {
		return errors.New("the signature does not verify")
	}
	return nil
}

func code(err error) keyhelper.Code {
	var e *keyhelper.Error
	if !errors.As(err, &e) {
		return ""
	}
	return e.Code
}

func create(t testing.TB, keys *keyhelper.Keys) (crypto.Signer, []byte) {
	t.Helper()
	key, handle, err := keys.Create(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := sign(key); err != nil {
		t.Fatal(err)
	}
	return key, handle
}

func number(t *testing.T, dir, name string) int {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	if name == "starts" {
		return len(text)
	}
	n, err := strconv.Atoi(string(text))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func touch(t *testing.T, dir, name string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, dir, name string) {
	t.Helper()
	if err := os.Remove(filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
}

// eventually waits until a condition holds, for as long as back-off may last.
func eventually(t *testing.T, what string, condition func() error) {
	t.Helper()
	deadline := time.Now().Add(40 * time.Second)
	for {
		err := condition()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		<-time.After(20 * time.Millisecond)
	}
}

func TestNewRefuses(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	for _, test := range []struct {
		name   string
		config keyhelper.Config
		want   string
	}{
		{"nothing", keyhelper.Config{}, "keyhelper: no command"},
		{"empty command", keyhelper.Config{Command: []string{""}, Log: log}, "keyhelper: no command"},
		{"no log", keyhelper.Config{Command: []string{"x"}}, "keyhelper: Log is required"},
		{"negative timeout", keyhelper.Config{Command: []string{"x"}, Log: log, Timeout: -1}, "keyhelper: a timeout of -1ns"},
	} {
		if _, err := keyhelper.New(test.config); err == nil || err.Error() != test.want {
			t.Errorf("%s: New = %v, want %q", test.name, err, test.want)
		}
	}
}

func TestKeys(t *testing.T) {
	var log lockedBuffer
	dir := t.TempDir()
	keys := helperIn(t, "good", 0, dir, slog.New(slog.NewTextHandler(&log, nil)))
	if _, err := os.Stat(filepath.Join(dir, "starts")); err == nil {
		t.Error("the helper runs before the first request")
	}
	key, handle := create(t, keys)
	again, err := keys.Open(t.Context(), "some authority", handle)
	if err != nil {
		t.Fatal(err)
	}
	if err := sign(again); err != nil || !again.Public().(*ecdsa.PublicKey).Equal(key.Public()) {
		t.Errorf("opened again, it is another key, or cannot sign: %v", err)
	}

	for _, test := range []struct {
		name string
		do   func() error
		want string
	}{
		{"unknown handle", func() error { _, err := keys.Open(t.Context(), "a", []byte{1}); return err },
			"keyhelper: open a key: NO_SUCH_KEY: no key 01"},
		{"no handle", func() error { _, err := keys.Open(t.Context(), "a", nil); return err },
			"keyhelper: open a key: INVALID: open without a handle"},
		{"long handle", func() error {
			_, err := keys.Open(t.Context(), "a", make([]byte, keyhelper.MaxHandle+1))
			return err
		}, "keyhelper: open a key: INVALID: a handle of 1025 bytes"},
		{"long ID", func() error { _, err := keys.Open(t.Context(), strings.Repeat("a", 129), handle); return err },
			"keyhelper: open a key: INVALID: the ID of an authority has 129 bytes"},
		{"other hash", func() error { _, err := key.Sign(nil, digest[:], crypto.SHA384); return err },
			"keyhelper: sign: it is no digest of SHA-256"},
		{"no hash", func() error { _, err := key.Sign(nil, digest[:], crypto.Hash(0)); return err },
			"keyhelper: sign: it is no digest of SHA-256"},
		{"nil options", func() error { _, err := key.Sign(nil, digest[:], nil); return err },
			"keyhelper: sign: it is no digest of SHA-256"},
		{"short digest", func() error { _, err := key.Sign(nil, digest[:31], crypto.SHA256); return err },
			"keyhelper: sign: it is no digest of SHA-256"},
	} {
		if err := test.do(); err == nil || err.Error() != test.want {
			t.Errorf("%s: %v, want %q", test.name, err, test.want)
		}
	}
	if n := number(t, dir, "starts"); n != 1 {
		t.Errorf("the helper was started %d times, want once", n)
	}
	if err := keys.Close(); err != nil {
		t.Fatal(err)
	}
	if err := sign(key); code(err) != keyhelper.HelperGone {
		t.Errorf("sign after Close: %v, want %s", err, keyhelper.HelperGone)
	}
	if text := log.String(); !strings.Contains(text, "the helper was started") || !strings.Contains(text, "level=INFO msg=\"the key helper has ended\"") {
		t.Errorf("the log has not what the helper said, and how it ended: %s", text)
	}
}

// lockedBuffer is a buffer for a log that several goroutines write to.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// A helper that is no good is an error that says so, and no worse: each is asked
// several times.
func TestBadHelpers(t *testing.T) {
	const timeout = time.Second
	for _, test := range []struct {
		mode, want string
	}{
		{"exits", "HELPER_GONE: it ended: exit status 1"},
		{"silent", "TIMED_OUT: "},
		{"prints", "HELPER_GONE: read a response: a message of 2003135587 bytes; at most 16384 are read: did something else write to standard output?"},
		{"huge", "HELPER_GONE: read a response: a message of 2147483647 bytes"},
		{"no-JSON", "HELPER_GONE: read a response: a message that is none"},
		{"later", "FAILED: the helper speaks version 2 of the protocol, not 1"},
		{"unasked", "HELPER_GONE: read a response: it answers request 77, which is none"},
		{"twice", "HELPER_GONE: read a response: it answers request 1, which is none"},
		{"cut-off", "HELPER_GONE: "},
		{"closes", "HELPER_GONE: read a response: it closed its standard output"},
		{"deaf", "TIMED_OUT: create was not answered within 1s; the helper was killed"},
		{"P-384", "keyhelper: create a key: the helper's public key is not ECDSA P-256"},
		{"no-key", "keyhelper: create a key: the helper's public key: "},
		{"no-handle", "keyhelper: create a key: the helper answers without a handle"},
		{"long-handle", "FAILED: a handle of 1025 bytes"},
		{"handle-of-its-own", "HELPER_GONE: read a response: a handle of 1200 bytes"},
		{"long-error", "FAILED: ä"},
	} {
		t.Run(test.mode, func(t *testing.T) {
			keys, dir := helperOf(t, test.mode, timeout)
			begun := time.Now()
			_, _, err := keys.Create(t.Context())
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("Create = %v, want %q", err, test.want)
			}
			if err != nil && len(err.Error()) > 1200 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			for range 100 {
				if _, _, err := keys.Create(t.Context()); err == nil {
					t.Error("Create succeeds")
				}
			}
			if took := time.Since(begun); took > 10*timeout {
				t.Errorf("101 requests took %v", took)
			}
			if n := number(t, dir, "starts"); n > 3 {
				t.Errorf("it was started %d times in %v; want back-off", n, time.Since(begun))
			}
		})
	}
	for _, mode := range []string{"no-signature", "false-signature"} {
		t.Run(mode, func(t *testing.T) {
			config := newConfig(t)
			config.Keys, _ = helperOf(t, mode, timeout)
			if _, err := ca.Open(t.Context(), config); err == nil {
				t.Error("an authority was made with it")
			}
		})
	}
	t.Run("no program", func(t *testing.T) {
		keys, err := keyhelper.New(keyhelper.Config{Command: []string{filepath.Join(t.TempDir(), "none")}, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		defer keys.Close()
		for range 3 {
			if _, _, err := keys.Create(t.Context()); code(err) != keyhelper.HelperGone || !strings.Contains(err.Error(), "no such file") {
				t.Errorf("Create = %v", err)
			}
		}
	})
}

// A helper that hangs holds nobody up for longer than the deadline: not those that
// wait with it, not those that come after, and not those whose context ends.
func TestHungHelper(t *testing.T) {
	const timeout = time.Second
	keys, dir := helperOf(t, "good", timeout)
	key, handle := create(t, keys)
	touch(t, dir, "hang")

	begun := time.Now()
	var all sync.WaitGroup
	for range 3 * keyhelper.InFlight {
		all.Go(func() {
			if err := sign(key); code(err) != keyhelper.TimedOut && code(err) != keyhelper.HelperGone {
				t.Errorf("sign = %v", err)
			}
		})
	}
	ctx, cancel := context.WithTimeout(t.Context(), timeout/10)
	defer cancel()
	if _, err := keys.Open(ctx, "a", handle); !errors.Is(err, context.DeadlineExceeded) || time.Since(begun) > timeout {
		t.Errorf("Open = %v after %v, want the end of its context", err, time.Since(begun))
	}
	all.Wait()
	if took := time.Since(begun); took < timeout || took > 3*timeout {
		t.Errorf("it took %v, want about %v", took, timeout)
	}
	begun = time.Now()
	for range 100 {
		if err := sign(key); err == nil {
			t.Error("it signs")
		}
	}
	if took := time.Since(begun); took > timeout/2 {
		t.Errorf("100 requests after that took %v; they are to fail at once", took)
	}

	remove(t, dir, "hang")
	eventually(t, "sign again", func() error { return sign(key) })
}

// issueOn issues from many goroutines until told to stop, and checks that all that
// is released is recorded and verifies. It returns how many there were so far.
type issuing struct {
	stop  func()
	count func() int
}

func newConfig(t testing.TB) ca.Config {
	t.Helper()
	memory := storage.NewMemory()
	return ca.Config{
		TrustDomain: spiffeid.RequireTrustDomainFromString("example.test"),
		Authorities: memory, Ledger: memory, Audit: slog.New(slog.DiscardHandler),
	}
}

func requestFor(t testing.TB) ca.Request {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return ca.Request{ID: spiffeid.RequireFromString("spiffe://example.test/ns/shop/sa/web"), CSR: csr, Caller: "test"}
}

func issueAllTheTime(t *testing.T, config ca.Config, issuer *ca.Issuer) issuing {
	t.Helper()
	var all sync.WaitGroup
	var mu sync.Mutex
	n := 0
	ctx, cancel := context.WithCancel(t.Context())
	request := requestFor(t)
	for range 4 {
		all.Go(func() {
			for ctx.Err() == nil {
				results, err := issuer.Issue(t.Context(), request)
				if err != nil {
					t.Error(err) // a helper that is gone is an error of a result
					return
				}
				if results[0].Err != nil {
					<-time.After(time.Millisecond)
					continue
				}
				leaf, err := x509.ParseCertificate(results[0].SVID.Certificates[0])
				if err != nil {
					t.Error(err)
					return
				}
				listed, err := config.Ledger.Query(t.Context(), storage.Query{Serial: fmt.Sprintf("%x", leaf.SerialNumber)})
				if err != nil || len(listed) != 1 {
					t.Errorf("released, and the ledger lists %d (%v)", len(listed), err)
				}
				mu.Lock()
				n++
				mu.Unlock()
			}
		})
	}
	stop := sync.OnceFunc(func() { cancel(); all.Wait() })
	t.Cleanup(stop)
	return issuing{stop: stop, count: func() int { mu.Lock(); defer mu.Unlock(); return n }}
}

// The helper is killed in the middle of issuing, again and again, and each time it
// goes on.
func TestKilledHelper(t *testing.T) {
	config := newConfig(t)
	keys, dir := helperOf(t, "good", 5*time.Second)
	config.Keys = keys
	issuer, err := ca.Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	i := issueAllTheTime(t, config, issuer)
	more := func() error {
		if i.count() == 0 {
			return errors.New("nothing was issued")
		}
		return nil
	}
	eventually(t, "issue", more)
	for range 3 {
		if err := syscall.Kill(number(t, dir, "pid"), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		starts := number(t, dir, "starts")
		eventually(t, "start again", func() error {
			if number(t, dir, "starts") == starts {
				return errors.New("it was not")
			}
			return nil
		})
		before := i.count()
		eventually(t, "go on", func() error {
			if i.count() < before+10 {
				return fmt.Errorf("issued %d, and %d before", i.count(), before)
			}
			return nil
		})
	}
	i.stop()
}

// The first to die after it served is started again at once.
func TestDeadHelperIsStartedAtOnce(t *testing.T) {
	keys, dir := helperOf(t, "good", 5*time.Second)
	key, _ := create(t, keys)
	touch(t, dir, "die")
	if err := sign(key); err == nil || !strings.Contains(err.Error(), "HELPER_GONE: it ended: exit status 3") {
		t.Errorf("sign = %v, want to be told how it ended", err)
	}
	remove(t, dir, "die")
	if err := sign(key); err != nil {
		t.Errorf("the next sign = %v", err)
	}
}

// What hangs, or will not end, does not keep Close.
func TestClose(t *testing.T) {
	for _, mode := range []string{"good", "stubborn"} {
		t.Run(mode, func(t *testing.T) {
			keys, dir := helperOf(t, mode, time.Minute)
			key, _ := create(t, keys)
			touch(t, dir, "hang")
			failed := make(chan error, 1)
			go func() { failed <- sign(key) }()
			begun := time.Now()
			if err := keys.Close(); err != nil {
				t.Error(err)
			}
			if took := time.Since(begun); took > 10*time.Second {
				t.Errorf("Close took %v", took)
			}
			if err := <-failed; code(err) != keyhelper.HelperGone {
				t.Errorf("sign = %v, want %s", err, keyhelper.HelperGone)
			}
			if err := syscall.Kill(number(t, dir, "pid"), 0); !errors.Is(err, syscall.ESRCH) {
				t.Errorf("the helper is still there: %v", err)
			}
		})
	}
}

// A helper whose parent was killed ends, even while its token hangs.
func TestHelperEndsWithItsInput(t *testing.T) {
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	touch(t, dir, "hang")
	cmd := exec.CommandContext(t.Context(), program, "helper", "good", dir)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for _, message := range []string{`{"id":1,"method":"hello","version":1}`,
		`{"id":2,"method":"sign","handle":"AA==","hash":"SHA-256","digest":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}`} {
		if _, err := in.Write(frame(message)); err != nil {
			t.Fatal(err)
		}
	}
	if err := in.Close(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
}

// Authorities live in a helper as they do anywhere: through a rotation, and through
// a start of everything.
func TestAuthorities(t *testing.T) {
	config := newConfig(t)
	var dir string
	config.Keys, dir = helperOf(t, "good", 0)
	issuer, err := ca.Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	order := ca.Order{Actor: "alice", Reason: "planned", Force: true}
	next, err := issuer.Prepare(t.Context(), order)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := issuer.Activate(t.Context(), next.ID, order); err != nil {
		t.Fatal(err)
	}
	config.Keys = helperIn(t, "good", 0, dir, slog.New(slog.DiscardHandler))
	again, err := ca.Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := again.Reseal(t.Context()); n != 0 || err != nil {
		t.Errorf("Reseal = %d, %v; nothing is sealed", n, err)
	}
	for _, issuer := range []*ca.Issuer{issuer, again} {
		results, err := issuer.Issue(t.Context(), requestFor(t), requestFor(t))
		if err != nil || results[1].Err != nil || results[1].SVID.AuthorityID != next.ID {
			t.Errorf("Issue = %v, %v; want it signed by %s", results, err, next.ID)
		}
	}
}

func BenchmarkSign(b *testing.B) {
	kek := make([]byte, ca.KeySize)
	sealed, err := ca.NewSealedKeys(kek)
	if err != nil {
		b.Fatal(err)
	}
	helper, _ := helperOf(b, "good", 0)
	for _, test := range []struct {
		name string
		keys ca.Keys
	}{{"sealed", sealed}, {"helper", helper}} {
		key, _, err := test.keys.Create(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		b.Run(test.name, func(b *testing.B) {
			for b.Loop() {
				if _, err := key.Sign(rand.Reader, digest[:], crypto.SHA256); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(test.name+"/parallel", func(b *testing.B) {
			b.SetParallelism(4)
			b.RunParallel(func(p *testing.PB) {
				for p.Next() {
					if _, err := key.Sign(rand.Reader, digest[:], crypto.SHA256); err != nil {
						b.Error(err)
					}
				}
			})
		})
	}
}
