// Command troth-agent is Troth on one node of a Kubernetes cluster.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"troth.dev/troth/agent"
	"troth.dev/troth/agent/workload"
	"troth.dev/troth/api"
	"troth.dev/troth/internal/health"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "troth-agent:", err)
		stop()
		os.Exit(1)
	}
}

// run is the whole command: it serves until ctx ends.
func run(ctx context.Context, args []string, stderr io.Writer) error {
	f := flag.NewFlagSet("troth-agent", flag.ContinueOnError)
	f.SetOutput(stderr)
	trustDomain := f.String("trust-domain", "", "trust domain; required")
	address := f.String("server", "troth-server.troth-system.svc:8443", "HOST:PORT of the control plane")
	bundleFile := f.String("bundle", "/etc/troth/bundle.pem", "file of the trust bundle by which the control plane is verified at first, PEM")
	tokenFile := f.String("token", "/var/run/secrets/tokens/troth", "file of the agent's projected service-account token")
	socket := f.String("socket", "/run/troth/workload.sock", "Unix socket of the SPIFFE Workload API")
	healthAddress := f.String("health", ":15020", "address of the HTTP port with /livez, /readyz and /metrics")
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	if *trustDomain == "" {
		return errors.New("-trust-domain is required")
	}
	td, err := spiffeid.TrustDomainFromString(*trustDomain)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewJSONHandler(stderr, nil))
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))

	plain, err := net.Listen("tcp", *healthAddress)
	if err != nil {
		return err
	}
	defer plain.Close()
	l, err := workload.Listen(*socket)
	if err != nil {
		return err
	}
	a, err := agent.New(agent.Config{
		Server:      *address,
		TrustDomain: td,
		Anchor:      func() (*x509bundle.Bundle, error) { return x509bundle.Load(td, *bundleFile) },
		Token:       api.TokenFile(*tokenFile),
		Listener:    l,
		Log:         log,
		Metrics:     metrics,
	})
	if err != nil {
		return errors.Join(err, l.Close())
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return a.Run(ctx) })
	group.Go(func() error { return health.Serve(ctx, plain, a.Health(metrics)) })
	return group.Wait()
}
