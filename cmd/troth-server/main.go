// Command troth-server is the control plane of Troth in a Kubernetes cluster.
package main

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"troth.dev/troth/ca"
	"troth.dev/troth/identity"
	"troth.dev/troth/internal/health"
	"troth.dev/troth/internal/heap"
	"troth.dev/troth/kube"
	"troth.dev/troth/server"
	"troth.dev/troth/storage/sqlite"
	"troth.dev/troth/token"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "troth-server:", err)
		stop()
		os.Exit(1)
	}
}

// options are the command's flags.
type options struct {
	trustDomain, agents, audience string
	listen, health                string
	database, keyFile, bundleFile string
	kubeconfig                    string
	svidLife                      time.Duration
	tokenReview                   bool
}

func parse(args []string, stderr io.Writer) (options, error) {
	var o options
	f := flag.NewFlagSet("troth-server", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&o.trustDomain, "trust-domain", "", "trust domain; required")
	f.StringVar(&o.agents, "agents", "troth-system/troth-agent", "NAMESPACE/NAME of the service account of node agents")
	f.StringVar(&o.audience, "audience", "", "audience of tokens (default: the trust domain's SPIFFE ID)")
	f.StringVar(&o.listen, "listen", ":8443", "address of the gRPC port")
	f.StringVar(&o.health, "health", ":8080", "address of the HTTP port with /livez, /readyz and /metrics")
	f.StringVar(&o.database, "database", "/var/lib/troth/troth.db", "SQLite file")
	f.StringVar(&o.keyFile, "key-encryption-key", "/etc/troth/key-encryption-key", "file of 32 random bytes under which authority keys are sealed")
	f.StringVar(&o.bundleFile, "bundle", "", "file to keep the current trust bundle in, as PEM; none if empty")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "how to reach the API server (default: as the pod's service account)")
	f.DurationVar(&o.svidLife, "svid-life", time.Hour, "how long SVIDs live, 10s to 24h")
	f.BoolVar(&o.tokenReview, "token-review", false, "ask the API server about each token too")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if f.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	if o.trustDomain == "" {
		return o, errors.New("-trust-domain is required")
	}
	return o, nil
}

// run is the whole command: it builds from the leaves to the root and serves
// until ctx ends.
func run(ctx context.Context, args []string, stderr io.Writer) (err error) {
	o, err := parse(args, stderr)
	if err != nil {
		return err
	}
	td, err := spiffeid.TrustDomainFromString(o.trustDomain)
	if err != nil {
		return err
	}
	agents, err := identity.ParseServiceAccountName(o.agents)
	if err != nil {
		return err
	}
	if o.audience == "" {
		o.audience = td.IDString()
	}
	log := slog.New(slog.NewJSONHandler(stderr, nil))

	kek, err := os.ReadFile(o.keyFile)
	if err != nil {
		return fmt.Errorf("key-encryption key: %w (make one with: head -c 32 /dev/urandom > %s)", err, o.keyFile)
	}
	keys, err := ca.NewSealedKeys(kek)
	if err != nil {
		return err
	}
	store, err := sqlite.Open(ctx, sqlite.Config{Path: o.database})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	profile, err := ca.NewProfile(ca.ProfileConfig{Life: o.svidLife})
	if err != nil {
		return err
	}
	issuer, err := ca.Open(ctx, ca.Config{
		TrustDomain: td, Keys: keys, Authorities: store, Ledger: store, Profile: profile,
		Audit: log.With("log", "audit"),
	})
	if err != nil {
		return err
	}

	client, err := kube.Connect(o.kubeconfig)
	if err != nil {
		return err
	}
	pods, err := kube.NewPods(kube.PodsConfig{Client: client, Log: log})
	if err != nil {
		return err
	}
	iss, err := kube.Issuer(ctx, client)
	if err != nil {
		return err
	}
	verifier, err := token.New(token.Config{Issuers: []string{iss}, Audience: o.audience, Keys: kube.Keys(client)})
	if err != nil {
		return err
	}
	defer verifier.Close()
	var review func(context.Context, string) error
	if o.tokenReview {
		r, err := kube.NewTokenReviewer(kube.TokenReviewerConfig{Client: client})
		if err != nil {
			return err
		}
		review = reviewer(r, o.audience)
	}

	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	s, err := server.New(server.Config{
		TrustDomain: td, Issuer: issuer, Tokens: verifier, Pods: pods, Agents: agents, ReviewToken: review,
		Log: log, Metrics: metrics,
	})
	if err != nil {
		return err
	}
	calls, err := net.Listen("tcp", o.listen)
	if err != nil {
		return err
	}
	plain, err := net.Listen("tcp", o.health)
	if err != nil {
		return errors.Join(err, calls.Close())
	}
	log.LogAttrs(ctx, slog.LevelInfo, "serving", slog.String("trust_domain", td.Name()),
		slog.String("address", calls.Addr().String()), slog.String("health", plain.Addr().String()))

	// The pods outlive the server's calls, so that what is in flight can finish.
	watching, stopWatching := context.WithCancel(context.WithoutCancel(ctx))
	defer stopWatching()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { heap.KeepRoom(ctx); return nil })
	group.Go(func() error { return pods.Run(watching) })
	group.Go(func() error {
		defer stopWatching()
		return s.Serve(ctx, calls)
	})
	group.Go(func() error { return health.Serve(ctx, plain, s.Health(metrics)) })
	if o.bundleFile != "" {
		group.Go(func() error { return publish(ctx, issuer, o.bundleFile, log) })
	}
	return group.Wait()
}

// reviewer asks the API server, and translates its "no".
func reviewer(r *kube.TokenReviewer, audience string) func(context.Context, string) error {
	return func(ctx context.Context, raw string) error {
		_, err := r.Review(ctx, raw, audience)
		if errors.Is(err, kube.ErrTokenRefused) {
			return fmt.Errorf("%w: %w", server.ErrTokenRefused, err)
		}
		return err
	}
}

// publish keeps the bundle in a file. The file is replaced whole: a reader sees
// the old bundle or the new one, also after a crash at any line.
func publish(ctx context.Context, issuer *ca.Issuer, path string, log *slog.Logger) error {
	const retry = 5 * time.Second
	for {
		bundle, changed := issuer.Bundle().Load()
		var content bytes.Buffer
		for _, a := range bundle.Authorities {
			if err := pem.Encode(&content, &pem.Block{Type: "CERTIFICATE", Bytes: a.Certificate.Raw}); err != nil {
				return err
			}
		}
		again := (<-chan time.Time)(nil)
		if err := replace(path, content.Bytes()); err != nil {
			log.LogAttrs(ctx, slog.LevelError, "trust bundle not published", slog.Any("err", err))
			again = time.After(retry)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-again:
		}
	}
}

func replace(path string, content []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".bundle-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	_, err = f.Write(content)
	err = errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close())
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
