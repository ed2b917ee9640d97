package dev_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/identity"
	"troth.dev/troth/internal/dev"
)

var (
	td       = spiffeid.RequireTrustDomainFromString("example.org")
	fallback = identity.ServiceAccount{Namespace: "default", Name: "default"}
	web      = identity.ServiceAccount{Namespace: "shop", Name: "web"}
)

// start runs a plane until stop is called, or the test ends.
func start(t *testing.T, c dev.Config) (p *dev.Plane, stop func()) {
	t.Helper()
	discard := slog.New(slog.DiscardHandler)
	c.TrustDomain, c.Audit = td, discard
	if c.Log == nil {
		c.Log = discard
	}
	p, err := dev.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1) // Run ends though the test has failed
	go func() { ended <- p.Run(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run() = %v", err)
		}
	}
	t.Cleanup(stop)
	return p, stop
}

// shortDir is a folder whose path leaves room for the name of a Unix socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "dev")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func source(t *testing.T, p *dev.Plane) *workloadapi.X509Source {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	s, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+p.Socket())))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func identityOf(t *testing.T, s *workloadapi.X509Source) string {
	t.Helper()
	svid, err := s.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	return svid.ID.String()
}

func TestAProcessGetsItsIdentity(t *testing.T) {
	dir := shortDir(t)
	p, _ := start(t, dev.Config{Dir: dir, Fallback: fallback})
	if got, want := identityOf(t, source(t, p)), "spiffe://example.org/ns/default/sa/default"; got != want {
		t.Errorf("a process that nobody named is %q, want %q", got, want)
	}
	assigned, err := dev.Assign(t.Context(), dir, web, int32(os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	want := "spiffe://example.org/ns/shop/sa/web"
	if assigned.SPIFFEID != want || assigned.Socket != p.Socket() {
		t.Errorf("Assign() = %+v, want %q at %q", assigned, want, p.Socket())
	}
	if got := identityOf(t, source(t, p)); got != want {
		t.Errorf("the process is %q, want %q", got, want)
	}
}

func TestAssignRefuses(t *testing.T) {
	dir := shortDir(t)
	start(t, dev.Config{Dir: dir})
	if _, err := dev.Assign(t.Context(), dir, web, 1<<30); err == nil {
		t.Error("a process that is not there gets an identity")
	}
	if _, err := dev.Assign(t.Context(), dir, identity.ServiceAccount{Namespace: "..", Name: "x"}, 0); err == nil {
		t.Error("an account with a bad name gets an identity")
	}
}

// Whoever may connect to the operators' socket is an operator, by the name that the
// kernel gives: nobody but the user who runs the plane may.
func TestOperators(t *testing.T) {
	dir := shortDir(t)
	if _, err := dev.DialOperator(t.Context(), dir); err == nil {
		t.Error("where no plane runs, an operator is connected")
	}
	start(t, dev.Config{Dir: dir})
	conn, err := dev.DialOperator(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	prepared, err := trothv1.NewAuthorityServiceClient(conn).PrepareAuthority(t.Context(), &trothv1.PrepareAuthorityRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := prepared.GetAuthority().GetLastChange().GetActor(), fmt.Sprintf("uid:%d", os.Getuid()); got != want {
		t.Errorf("the operator is %q, want %q", got, want)
	}
	socket, err := os.Stat(filepath.Join(dir, "operator.sock"))
	if err != nil {
		t.Fatal(err)
	}
	if got := socket.Mode().Perm(); got != 0o600 {
		t.Errorf("the mode of the operators' socket is %v", got)
	}
}

// The folder keeps the authority, so that what was trusted before a restart still
// is, and an SVID is replaced while its owner watches.
func TestRestart(t *testing.T) {
	dir := shortDir(t)
	p, stop := start(t, dev.Config{Dir: dir, Fallback: fallback, SVIDLife: 10 * time.Second})
	s := source(t, p)
	svid, err := s.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	before, err := s.GetX509BundleForTrustDomain(td)
	if err != nil {
		t.Fatal(err)
	}
	stop()
	start(t, dev.Config{Dir: dir, Fallback: fallback, SVIDLife: 10 * time.Second})
	deadline := time.After(30 * time.Second)
	for {
		updated := s.Updated()
		again, err := s.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		if again.Certificates[0].SerialNumber.Cmp(svid.Certificates[0].SerialNumber) != 0 {
			break
		}
		select {
		case <-updated:
		case <-deadline:
			t.Fatal("no new SVID came after the restart")
		}
	}
	var after *x509bundle.Bundle
	if after, err = s.GetX509BundleForTrustDomain(td); err != nil {
		t.Fatal(err)
	}
	if !after.Equal(before) {
		t.Error("the restart changed whom to trust")
	}
}
