package trothtest_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"troth.dev/troth/ca"
	"troth.dev/troth/handshake"
	"troth.dev/troth/identity"
	"troth.dev/troth/trothtest"
)

// An unmodified client behind the socket goes through a rotation and keeps talking
// mutual TLS at each step.
func TestSocketThroughARotation(t *testing.T) {
	a := trothtest.New(t)
	web, db := a.Identity("/ns/shop/sa/web"), a.Identity("/ns/shop/sa/db")
	client, server := newSource(t, web.Socket()), newSource(t, db.Socket())
	talk := func(when string) {
		t.Helper()
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		near, err := net.Dial("tcp", listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		far, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		clientErr, serverErr := call(near, far,
			tlsconfig.MTLSClientConfig(client, client, tlsconfig.AuthorizeID(db.ID())),
			tlsconfig.MTLSServerConfig(server, server, tlsconfig.AuthorizeID(web.ID())))
		if clientErr != nil || serverErr != nil {
			t.Fatalf("%s: client: %v, server: %v", when, clientErr, serverErr)
		}
	}
	authorities := func(source *workloadapi.X509Source) int {
		bundle, err := source.GetX509BundleForTrustDomain(domain)
		if err != nil {
			t.Fatal(err)
		}
		return len(bundle.X509Authorities())
	}
	talk("at first")
	first := string(leafOf(t, client).AuthorityKeyId)

	a.Prepare()
	for _, source := range []*workloadapi.X509Source{client, server} {
		eventually(t, "two authorities", func() bool { return authorities(source) == 2 })
	}
	if string(leafOf(t, client).AuthorityKeyId) != first {
		t.Error("the prepared authority signs")
	}
	talk("prepared")

	a.Activate()
	for _, source := range []*workloadapi.X509Source{client, server} {
		eventually(t, "the second authority", func() bool { return string(leafOf(t, source).AuthorityKeyId) != first })
	}
	talk("activated")

	a.Revoke()
	for _, source := range []*workloadapi.X509Source{client, server} {
		eventually(t, "one authority", func() bool { return authorities(source) == 1 })
	}
	talk("revoked")
	if n := len(a.Bundle().X509Authorities()); n != 1 {
		t.Errorf("%d authorities, want 1", n)
	}
}

// A process is its socket's workload, knowing nothing but the environment.
func TestChildProcess(t *testing.T) {
	a := trothtest.New(t)
	for _, path := range []string{"/ns/shop/sa/web", "/ns/shop/sa/db"} {
		i := a.Identity(path)
		if got, want := child(t, i.Socket()), "spiffe://troth.test"+path; got != want || i.ID().String() != want {
			t.Errorf("the child of %q is %q", want, got)
		}
	}
}

// All that can happen to identities happens in a bubble: hours pass at once.
func TestInABubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := trothtest.New(t)
		web, db := a.Identity("/ns/shop/sa/web"), a.Identity("/ns/shop/sa/db")
		mustCall(t, web, db)

		first := serialOf(t, web)
		time.Sleep(29 * time.Minute)
		synctest.Wait()
		if serialOf(t, web) != first {
			t.Error("renewed before half of its life")
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if serialOf(t, web) == first {
			t.Error("not renewed after half of its life")
		}
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		mustCall(t, web, db)

		before := time.Now()
		db.Expire()
		if passed := time.Since(before); passed > 3*time.Second {
			t.Errorf("Expire took %v", passed)
		}
		mustRefuse(t, web, db, "expired")
		time.Sleep(24 * time.Hour)
		mustRefuse(t, web, db, "expired")
		a.Rotate()
		mustRefuse(t, web, db, "expired")
		db.Renew()
		mustCall(t, web, db)
		last := serialOf(t, db)
		time.Sleep(time.Hour)
		synctest.Wait()
		if serialOf(t, db) == last {
			t.Error("not renewed in time after Renew")
		}

		old := serialOf(t, web)
		a.Taint()
		if serialOf(t, web) == old {
			t.Error("not replaced after Taint")
		}
		if n := len(a.Bundle().X509Authorities()); n != 2 {
			t.Errorf("%d authorities after Taint, want 2", n)
		}
		mustCall(t, web, db)
		a.Revoke()
		mustCall(t, web, db)
		if n := len(a.Bundle().X509Authorities()); n != 1 {
			t.Errorf("%d authorities after Revoke, want 1", n)
		}
	})
}

// An identity that hears nothing of a rotation is left behind by it.
func TestPartitionOfASource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := trothtest.New(t)
		web, db := a.Identity("/ns/shop/sa/web"), a.Identity("/ns/shop/sa/db")
		db.Partition(trothtest.Silent)
		a.Prepare()
		a.Activate()
		mustRefuse(t, web, db, "unknown authority") // db does not know the new one
		db.Heal()
		mustCall(t, web, db)

		db.Partition(trothtest.Gone)
		time.Sleep(time.Hour + time.Minute)
		mustRefuse(t, web, db, "expired")
		db.Heal()
		mustCall(t, web, db)
	})
}

// A Workload API that is away: what a client has stays, a new client does not begin,
// and both go on when it is back.
func TestPartitionOfASocket(t *testing.T) {
	for _, how := range []trothtest.Outage{trothtest.Gone, trothtest.Silent} {
		t.Run(how.String(), func(t *testing.T) {
			a := trothtest.New(t)
			web := a.Identity("/ns/shop/sa/web")
			source := newSource(t, web.Socket())
			first := serialOf(t, source)

			web.Partition(how)
			web.Renew()
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			if svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(web.Socket())); err == nil {
				t.Errorf("a new client gets %v", svid.ID)
			} else if code := status.Code(err); how == trothtest.Gone && code != codes.Unavailable && code != codes.DeadlineExceeded {
				t.Errorf("a new client: %v", err)
			}
			if serialOf(t, source) != first {
				t.Error("news in a partition")
			}

			web.Heal()
			newSource(t, web.Socket())
			eventually(t, "the news after it", func() bool { return serialOf(t, source) != first })
		})
	}
}

// Behind the socket, what has expired is handed to nobody.
func TestExpireBehindASocket(t *testing.T) {
	a := trothtest.New(t)
	web := a.Identity("/ns/shop/sa/web")
	source := newSource(t, web.Socket())
	web.Expire()
	eventually(t, "an expired SVID at the client", func() bool { return time.Now().After(leafOf(t, source).NotAfter) })
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(web.Socket())); err == nil {
		t.Error("a new client is handed what has expired")
	}
	web.Renew()
	eventually(t, "a valid SVID at the client", func() bool { return time.Now().Before(leafOf(t, source).NotAfter) })
}

// Troth's own handshake, in both orders, and what it makes of tests in production.
func TestHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := trothtest.New(t)
		web, db := a.Identity("/ns/shop/sa/web"), a.Identity("/ns/shop/sa/db")
		for _, order := range []handshake.Order{handshake.CallerFirst, handshake.Standard} {
			for _, production := range []bool{false, true} {
				near, far := pipe()
				accepted := make(chan error, 1)
				callee := db.Handshake(order)
				callee.AcceptTests = !production
				go func() {
					c, err := handshake.Accept(t.Context(), far, callee, func(spiffeid.ID) error { return nil })
					if err == nil {
						_, err = c.Write([]byte{1})
					}
					accepted <- err
				}()
				c, err := handshake.Initiate(t.Context(), near, web.Handshake(order), db.ID())
				if err == nil {
					_, err = c.Read(make([]byte, 1))
				}
				near.Close()
				calleeErr := <-accepted
				far.Close()
				if !production && (err != nil || calleeErr != nil) {
					t.Errorf("%v: caller: %v, callee: %v", order, err, calleeErr)
				}
				if e, ok := errors.AsType[*handshake.Error](calleeErr); production && (!ok || e.Code != handshake.TestIdentity || err == nil) {
					t.Errorf("%v, in production: caller: %v, callee: %v; want %v", order, err, calleeErr, handshake.TestIdentity)
				}
			}
		}
		if !identity.IsTest(leafOf(t, web)) {
			t.Error("an SVID without the policy of tests")
		}
	})
}

// A control returns when the open streams have been sent what it did.
func TestControlsWaitForStreams(t *testing.T) {
	a := trothtest.New(t)
	web := a.Identity("/ns/shop/sa/web")
	if web.Socket(); web.Delivered() {
		t.Error("delivered to nobody")
	}
	newSource(t, web.Socket())
	for name, control := range map[string]func(){"Renew": web.Renew, "all": a.Renew, "Rotate": a.Rotate, "Taint": a.Taint} {
		if control(); !web.Delivered() {
			t.Errorf("%s returned before the stream was sent the new SVID", name)
		}
	}
}

// Controls and connections from many goroutines at once.
func TestManyAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := trothtest.New(t)
		var all sync.WaitGroup
		for n := range 4 {
			all.Go(func() {
				i, peer := a.Identity(fmt.Sprintf("/ns/shop/sa/web-%d", n)), a.Identity("/ns/shop/sa/db")
				for range 5 {
					a.Rotate()
					a.Taint()
					i.Partition(trothtest.Silent)
					i.Renew()
					i.Heal()
					i.Expire()
					i.Renew()
					a.Revoke()
					if _, err := peer.GetX509SVID(); err != nil {
						t.Error(err)
					}
					time.Sleep(time.Hour)
				}
			})
		}
		all.Wait()
		mustCall(t, a.Identity("/ns/shop/sa/web-0"), a.Identity("/ns/shop/sa/db"))
	})
}

// Nothing is left of an Authority: no goroutine, file, socket or descriptor.
func TestNothingIsLeft(t *testing.T) {
	descriptors := func() int {
		all, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(all)
	}
	temporary := t.TempDir()
	t.Setenv("TMPDIR", temporary)
	use := func() {
		a, err := trothtest.Open(t.Context(), trothtest.Config{})
		if err != nil {
			t.Fatal(err)
		}
		web := a.Identity("/ns/shop/sa/web")
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(web.Socket())))
		if err != nil {
			t.Fatal(err)
		}
		a.Rotate()
		web.Partition(trothtest.Silent)
		web.Heal()
		web.Partition(trothtest.Gone)
		web.Heal()
		web.Partition(trothtest.Silent)
		source.Close()
		if err := errors.Join(a.Err(), a.Close(), a.Close()); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(strings.TrimPrefix(web.Socket(), "unix://")); err == nil {
			t.Error("the socket is still there")
		}
	}
	use() // what Go itself opens once is open now
	goroutines, open := runtime.NumGoroutine(), descriptors()
	for range 3 {
		use()
	}
	eventually(t, fmt.Sprintf("no more than %d goroutines and %d descriptors", goroutines, open), func() bool {
		return runtime.NumGoroutine() <= goroutines && descriptors() <= open
	})
	if left, err := filepath.Glob(filepath.Join(temporary, "*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v (%v)", left, err)
	}
}

// A program is told what failed, and nothing happens after it.
func TestOpenTellsWhatFailed(t *testing.T) {
	a, err := trothtest.Open(t.Context(), trothtest.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("example.test")})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if a.Activate(); a.Err() == nil || !strings.Contains(a.Err().Error(), "activate: no authority is prepared") {
		t.Fatalf("Err() = %v", a.Err())
	}
	a.Prepare()
	if n := len(a.Bundle().X509Authorities()); n != 1 {
		t.Errorf("%d authorities after a failure, want 1", n)
	}
	if _, err := trothtest.Open(t.Context(), trothtest.Config{SVIDLife: time.Second}); err == nil {
		t.Error("Open with SVIDs of a second succeeds")
	}
}

// A bubble that waits for ever is not kept alive by renewals: they end with the
// authority, and fail the test once.
func TestRenewalEndsWithTheAuthority(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tb := &recording{}
		defer tb.cleanUp()
		trothtest.New(tb, trothtest.Config{SVIDLife: 24 * time.Hour}).Identity("/ns/shop/sa/web")
		time.Sleep(98 * 24 * time.Hour)
		if synctest.Wait(); len(tb.failed()) > 0 {
			t.Errorf("after 98 days: %q", tb.failed())
		}
		time.Sleep(10 * 24 * time.Hour)
		if synctest.Wait(); len(tb.failed()) != 1 || !strings.Contains(tb.failed()[0], ca.ErrAuthorityExpiring.Error()) {
			t.Errorf("after 108 days: %q, want one failure that says %q", tb.failed(), ca.ErrAuthorityExpiring)
		}
	})
}

// A test is ended by what fails, at the line that asked for it.
func TestNewEndsTheTest(t *testing.T) {
	for name, misuse := range map[string]func(*trothtest.Authority){
		"malformed path":       func(a *trothtest.Authority) { a.Identity("ns/shop") },
		"no path":              func(a *trothtest.Authority) { a.Identity("") },
		"nothing prepared":     func(a *trothtest.Authority) { a.Activate() },
		"no such outage":       func(a *trothtest.Authority) { a.Identity("/web").Partition(0) },
		"after it was closed":  func(a *trothtest.Authority) { a.Close(); a.Rotate() },
		"identity after close": func(a *trothtest.Authority) { a.Close(); a.Identity("/web") },
	} {
		t.Run(name, func(t *testing.T) {
			tb := &recording{}
			ended := make(chan struct{})
			returned := false
			go func() {
				defer close(ended)
				defer tb.cleanUp()
				misuse(trothtest.New(tb))
				returned = true
			}()
			<-ended
			if returned || len(tb.failed()) != 1 || !strings.HasPrefix(tb.failed()[0], "trothtest: ") {
				t.Errorf("returned: %v, said %q", returned, tb.failed())
			}
		})
	}
}

// recording is a test that may fail.
type recording struct {
	cleanups []func()

	mu   sync.Mutex
	said []string // guarded by mu
}

// failed returns what it failed with so far.
func (r *recording) failed() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.said)
}

func (r *recording) Helper()          {}
func (r *recording) Cleanup(f func()) { r.cleanups = append(r.cleanups, f) }
func (r *recording) Errorf(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.said = append(r.said, fmt.Sprintf(format, args...))
}
func (r *recording) Fatalf(format string, args ...any) {
	r.Errorf(format, args...)
	runtime.Goexit()
}

func (r *recording) cleanUp() {
	for _, f := range r.cleanups {
		f()
	}
}

// From nothing to the first SVID of an unmodified client, through the socket.
func BenchmarkNewToFirstSVID(b *testing.B) {
	for b.Loop() {
		a, err := trothtest.Open(b.Context(), trothtest.Config{})
		if err != nil {
			b.Fatal(err)
		}
		socket := a.Identity("/ns/shop/sa/web").Socket()
		if _, err := workloadapi.FetchX509SVID(b.Context(), workloadapi.WithAddr(socket)); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		a.Close()
		b.StartTimer()
	}
}

// From nothing to the first SVID of a source in memory.
func BenchmarkNewToFirstSVIDInMemory(b *testing.B) {
	for b.Loop() {
		a, err := trothtest.Open(b.Context(), trothtest.Config{})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := a.Identity("/ns/shop/sa/web").GetX509SVID(); err != nil {
			b.Fatal(err)
		}
		a.Close()
	}
}
