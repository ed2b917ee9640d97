package main

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
	"path/filepath"
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

func newConfig(keys ca.Keys) ca.Config {
	memory := storage.NewMemory()
	return ca.Config{
		TrustDomain: spiffeid.RequireTrustDomainFromString("example.test"), Keys: keys,
		Authorities: memory, Ledger: memory, Audit: slog.New(slog.DiscardHandler),
	}
}

func open(t testing.TB, config ca.Config) *ca.Issuer {
	t.Helper()
	issuer, err := ca.Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	return issuer
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

// issue issues once, and returns by which authority.
func issue(ctx context.Context, config ca.Config, issuer *ca.Issuer, request ca.Request) (string, error) {
	results, err := issuer.Issue(ctx, request)
	if err != nil {
		return "", err
	}
	if results[0].Err != nil {
		return "", results[0].Err
	}
	leaf, err := x509.ParseCertificate(results[0].SVID.Certificates[0])
	if err != nil {
		return "", err
	}
	listed, err := config.Ledger.Query(ctx, storage.Query{Serial: fmt.Sprintf("%x", leaf.SerialNumber)})
	if err != nil || len(listed) != 1 {
		return "", fmt.Errorf("released, and the ledger lists %d: %w", len(listed), err)
	}
	return results[0].SVID.AuthorityID, nil
}

func code(err error) keyhelper.Code {
	var e *keyhelper.Error
	if !errors.As(err, &e) {
		return ""
	}
	return e.Code
}

// check fails unless an error has the code and the words.
func check(t *testing.T, err error, want keyhelper.Code, words ...string) {
	t.Helper()
	if code(err) != want {
		t.Errorf("%v, want %s", err, want)
	}
	for _, w := range words {
		if err != nil && !strings.Contains(err.Error(), w) {
			t.Errorf("%v, want it to say %q", err, w)
		}
	}
}

var byAlice = ca.Order{Actor: "alice", Reason: "planned", Force: true}

func rotate(t *testing.T, issuer *ca.Issuer) string {
	t.Helper()
	next, err := issuer.Prepare(t.Context(), byAlice)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := issuer.Activate(t.Context(), next.ID, byAlice); err != nil {
		t.Fatal(err)
	}
	return next.ID
}

// The life of authorities in a token: made, used, rotated, found again by a process
// that knows nothing but the store, and listed for who removes them.
func TestAuthorities(t *testing.T) {
	c, _ := softHSM(t)
	keys := helperFor(t, c, 0)
	config := newConfig(keys)
	issuer := open(t, config)
	set, _ := issuer.Authorities().Load()
	first, _ := set.Active()
	if id, err := issue(t.Context(), config, issuer, requestFor(t)); err != nil || id != first.ID {
		t.Fatalf("issued by %q, %v; want %s", id, err, first.ID)
	}
	second := rotate(t, issuer)
	if id, err := issue(t.Context(), config, issuer, requestFor(t)); err != nil || id != second {
		t.Fatalf("issued by %q, %v; want %s", id, err, second)
	}
	if err := keys.Close(); err != nil {
		t.Fatal(err)
	}

	config.Keys = helperFor(t, c, 0)
	again := open(t, config)
	if id, err := issue(t.Context(), config, again, requestFor(t)); err != nil || id != second {
		t.Errorf("issued by %q, %v after a start; want %s", id, err, second)
	}

	var list bytes.Buffer
	if err := printKeys(&list, inProcess(t, c)); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{first.ID, second} {
		a, _ := set.Authority(id)
		if strings.Count(list.String(), id+"  ") != 1 {
			t.Errorf("authority %s is not in the list once:\n%s", id, &list)
		}
		if h, err := parseHandle(a.Key); a.Key != nil && (err != nil || !strings.Contains(list.String(), fmt.Sprintf("%x", h.id))) {
			t.Errorf("the CKA_ID of %s is not in the list: %v\n%s", id, err, &list)
		}
	}
}

// The helper is killed while all that is issued needs it.
func TestKilledHelper(t *testing.T) {
	c, _ := softHSM(t)
	config := newConfig(helperFor(t, c, 5*time.Second))
	issuer := open(t, config)
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	var mu sync.Mutex
	issued := 0
	count := func() int { mu.Lock(); defer mu.Unlock(); return issued }
	request := requestFor(t)
	for range 4 {
		all.Go(func() {
			for ctx.Err() == nil {
				_, err := issue(t.Context(), config, issuer, request)
				if err == nil {
					mu.Lock()
					issued++
					mu.Unlock()
				} else if code(err) != keyhelper.HelperGone {
					t.Error(err)
				}
			}
		})
	}
	defer all.Wait()
	defer cancel()
	killed := 0
	for range 3 {
		before := count()
		eventually(t, "issue", func() error {
			if n := count(); n < before+10 {
				return fmt.Errorf("issued %d, and %d before", n, before)
			}
			return nil
		})
		pid, err := 0, error(nil)
		eventually(t, "find the helper", func() error {
			if pid, err = helperPID(t); pid == killed {
				return errors.Join(errors.New("not started again"), err)
			}
			return err
		})
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		killed = pid
	}
	before := count()
	eventually(t, "go on", func() error {
		if count() < before+10 {
			return errors.New("nothing is issued")
		}
		return nil
	})
}

// What is meant for the server leaves the helper as it is.
func TestSignals(t *testing.T) {
	c, _ := softHSM(t)
	config := newConfig(helperFor(t, c, 0))
	issuer := open(t, config)
	pid, err := helperPID(t)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		if err := syscall.Kill(pid, s); err != nil {
			t.Fatal(err)
		}
		if _, err := issue(t.Context(), config, issuer, requestFor(t)); err != nil {
			t.Errorf("issue after %v: %v", s, err)
		}
	}
	if now, err := helperPID(t); now != pid {
		t.Errorf("the helper is process %d (%v), and was %d", now, err, pid)
	}
}

// A helper that is stopped answers nothing; a driver that hangs looks the same.
func TestHungHelper(t *testing.T) {
	const timeout = time.Second
	c, _ := softHSM(t)
	config := newConfig(helperFor(t, c, timeout))
	issuer := open(t, config)
	pid, err := helperPID(t)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	requests := make([]ca.Request, 50)
	for n := range requests {
		requests[n] = requestFor(t)
	}
	results, err := issuer.Issue(t.Context(), requests...)
	if err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begun); took > 5*timeout {
		t.Errorf("a batch of %d took %v", len(requests), took)
	}
	check(t, results[0].Err, keyhelper.TimedOut)
	check(t, results[1].Err, keyhelper.HelperGone)
	eventually(t, "issue again", func() error {
		_, err := issue(t.Context(), config, issuer, requests[0])
		return err
	})
}

func TestPIN(t *testing.T) {
	c, _ := softHSM(t)
	write(t, c.pinFile, "1234\n")
	config := newConfig(helperFor(t, c, 0))
	_, err := ca.Open(t.Context(), config)
	check(t, err, keyhelper.PINRefused, "CKR_PIN_INCORRECT")
	_, err = ca.Open(t.Context(), config)
	check(t, err, keyhelper.PINRefused, `the token "troth" did not take the PIN in the file, and it is still the same: it is not tried again`)

	for _, test := range []struct{ name, text, want string }{
		{"empty", "\n", "has no PIN of up to 256 bytes in one line"},
		{"two lines", pin + "\n" + pin + "\n", "has no PIN of up to 256 bytes in one line"},
		{"long", strings.Repeat("1", 257), "has no PIN of up to 256 bytes in one line"},
	} {
		write(t, c.pinFile, test.text)
		_, err := ca.Open(t.Context(), config)
		check(t, err, keyhelper.PINRefused, test.want)
	}
	if err := os.Remove(c.pinFile); err != nil {
		t.Fatal(err)
	}
	_, err = ca.Open(t.Context(), config)
	check(t, err, keyhelper.PINRefused, "no such file")

	// Mended, it is taken without a restart.
	write(t, c.pinFile, pin)
	if _, err := issue(t.Context(), config, open(t, config), requestFor(t)); err != nil {
		t.Error(err)
	}
}

func TestTokenGone(t *testing.T) {
	c, dir := softHSM(t)
	config := newConfig(helperFor(t, c, 0))
	issuer := open(t, config)
	tokens, away := filepath.Join(dir, "tokens"), filepath.Join(dir, "away")
	if err := os.Rename(tokens, away); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(tokens, 0o700); err != nil {
		t.Fatal(err)
	}
	other := config
	other.Keys = helperFor(t, c, 0)
	_, err := ca.Open(t.Context(), other)
	check(t, err, keyhelper.TokenGone, "ca: open the key of authority ", `there is no token labelled "troth"; there are []`)
	_, _, err = config.Keys.Create(t.Context())
	if err == nil {
		t.Error("a key is made in a token that is gone")
	}

	// Another of the same name is no replacement.
	initToken(t, dir, c.label)
	other.Keys = helperFor(t, c, 0)
	_, err = ca.Open(t.Context(), other)
	check(t, err, keyhelper.NoSuchKey, "the key is in the token with the serial number")
	initToken(t, dir, c.label)
	other.Keys = helperFor(t, c, 0)
	_, err = ca.Open(t.Context(), other)
	check(t, err, keyhelper.TokenGone, `2 tokens are labelled "troth"`)

	// It comes back, for who runs and for who starts.
	if err := os.RemoveAll(tokens); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(away, tokens); err != nil {
		t.Fatal(err)
	}
	other.Keys = helperFor(t, c, 0)
	for _, i := range []*ca.Issuer{issuer, open(t, other)} {
		eventually(t, "issue again", func() error {
			_, err := issue(t.Context(), config, i, requestFor(t))
			return err
		})
	}
}

// A key that somebody deletes is missed at the next signature, and named.
func TestKeyDeleted(t *testing.T) {
	c, _ := softHSM(t)
	config := newConfig(helperFor(t, c, 0))
	issuer := open(t, config)
	hsm := inProcess(t, c)
	keys, err := hsm.list(t.Context())
	if err != nil || len(keys) != 1 {
		t.Fatalf("%d keys, %v", len(keys), err)
	}
	destroy(t, hsm, keys[0].id)
	_, err = issue(t.Context(), config, issuer, requestFor(t))
	check(t, err, keyhelper.NoSuchKey, fmt.Sprintf("CKA_ID %x: was it deleted?", keys[0].id))
	_, err = ca.Open(t.Context(), config)
	check(t, err, keyhelper.NoSuchKey, "ca: open the key of authority "+keys[0].authorityID+", which is active: ", "was it deleted?")
}

func BenchmarkSign(b *testing.B) {
	sealed, err := ca.NewSealedKeys(make([]byte, ca.KeySize))
	if err != nil {
		b.Fatal(err)
	}
	c, _ := softHSM(b)
	digest := sha256.Sum256(nil)
	for _, test := range []struct {
		name string
		keys ca.Keys
	}{{"sealed", sealed}, {"softhsm", helperFor(b, c, 0)}} {
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
