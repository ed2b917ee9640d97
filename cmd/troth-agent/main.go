// Command troth-agent is Troth on one node of a Kubernetes cluster. "troth-agent keep"
// is the process beside it that keeps the sockets of captured pods while the agent is
// restarted, and "troth-agent release" lets all of them go when Troth leaves the node.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"troth.dev/troth/agent"
	"troth.dev/troth/agent/capture"
	"troth.dev/troth/agent/cni"
	"troth.dev/troth/agent/pods"
	"troth.dev/troth/agent/workload"
	"troth.dev/troth/api"
	"troth.dev/troth/internal/health"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/internal/version"
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

const (
	keeperSocket  = "/run/troth/keeper.sock"
	recordsFolder = "/run/troth/pods"
)

// run is the whole command: it serves until ctx ends.
func run(ctx context.Context, args []string, stderr io.Writer) error {
	if len(args) > 0 && args[0] == "keep" {
		return keep(ctx, args[1:], stderr)
	}
	if len(args) > 0 && args[0] == "release" {
		return release(ctx, args[1:], stderr)
	}
	f := flag.NewFlagSet("troth-agent", flag.ContinueOnError)
	f.SetOutput(stderr)
	trustDomain := f.String("trust-domain", "", "trust domain; required")
	address := f.String("server", "troth-server.troth-system.svc:8443", "HOST:PORT of the control plane")
	bundleFile := f.String("bundle", "/etc/troth/bundle.pem", "file of the trust bundle by which the control plane is verified at first, PEM")
	tokenFile := f.String("token", "/var/run/secrets/tokens/troth", "file of the agent's projected service-account token")
	socket := f.String("socket", "/run/troth/workload.sock", "Unix socket of the SPIFFE Workload API")
	healthAddress := f.String("health", ":15020", "address of the HTTP port with /livez, /readyz and /metrics")
	captured := f.Bool("capture", false, "capture the traffic of the node's pods; takes root")
	cniSocket := f.String("cni-socket", cni.Socket, "Unix socket on which troth-cni asks for pods to be captured")
	keeperPath := f.String("keeper-socket", keeperSocket, "Unix socket of \"troth-agent keep\"; empty for none")
	records := f.String("records", recordsFolder, "folder in which captured pods are recorded")
	hostRoot := f.String("host-root", "", "where the host's files are; empty means by the host's first process")
	egress := f.String("egress", "allow", "what becomes of connections to addresses that the cluster does not know: allow or refuse")
	drain := f.Duration("drain", 20*time.Second, "how long connections may go on when the agent ends")
	adminAddress := f.String("admin", "127.0.0.1:15000", "loopback address of the page that \"troth connections\" reads; empty for none")
	var kubelet []netip.Addr
	kubeletIsNode := false
	f.Func("kubelet-address", "addresses that the node's probes come from, exempt from STRICT, or \"node\" for all of the network that the agent is in; may be repeated", func(s string) error {
		for each := range strings.SplitSeq(s, ",") {
			if each == "node" {
				kubeletIsNode = true
				continue
			}
			address, err := netip.ParseAddr(each)
			if err != nil {
				return err
			}
			kubelet = append(kubelet, address.Unmap())
		}
		return nil
	})
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
	if *egress != "allow" && *egress != "refuse" {
		return fmt.Errorf("-egress is %q, want allow or refuse", *egress)
	}
	if kubeletIsNode && len(kubelet) > 0 {
		return errors.New("-kubelet-address is node, or addresses, and not both")
	}
	log := slog.New(slog.NewJSONHandler(stderr, nil))
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), version.Metric())

	plain, err := whenFree(ctx, log, func() (net.Listener, error) { return net.Listen("tcp", *healthAddress) })
	if err != nil {
		return err
	}
	defer plain.Close()
	config := agent.Config{
		Server:      *address,
		TrustDomain: td,
		Anchor:      func() (*x509bundle.Bundle, error) { return x509bundle.Load(td, *bundleFile) },
		Token:       api.TokenFile(*tokenFile),
		Kubelet:     latest.New(kubelet),
		Drain:       *drain,
		Log:         log,
		Metrics:     metrics,
	}
	if kubeletIsNode {
		err := capture.FollowAddresses(ctx, config.Kubelet, func(err error) {
			log.LogAttrs(ctx, slog.LevelWarn, "the node's addresses may have changed", slog.Any("err", err))
		})
		if err != nil {
			return err
		}
	}
	if *captured {
		l, err := whenFree(ctx, log, func() (net.Listener, error) { return workload.Listen(*cniSocket) })
		if err != nil {
			return err
		}
		defer l.Close()
		config.DataPath = &agent.DataPath{
			CNI: l, Records: *records, HostRoot: *hostRoot, RefuseUnknown: *egress == "refuse",
		}
		if *keeperPath != "" {
			config.DataPath.Keeper = &capture.Keeper{Path: *keeperPath}
		}
	}
	if config.Listener, err = whenFree(ctx, log, func() (net.Listener, error) { return workload.Listen(*socket) }); err != nil {
		return err
	}
	a, err := agent.New(config)
	if err != nil {
		return errors.Join(err, config.Listener.Close())
	}
	group, ctx := errgroup.WithContext(ctx)
	if *adminAddress != "" {
		admin, err := whenFree(ctx, log, func() (net.Listener, error) { return listenLoopback(*adminAddress) })
		if err != nil {
			return errors.Join(err, config.Listener.Close())
		}
		group.Go(func() error { return health.Serve(ctx, admin, a.Admin()) })
	}
	group.Go(func() error { return a.Run(ctx) })
	group.Go(func() error { return health.Serve(ctx, plain, a.Health(metrics)) })
	return group.Wait()
}

// whenFree listens, and waits for up to a minute while somebody else does there: the
// agent before this one, which has not ended yet. To end and be started again would take
// longer.
func whenFree(ctx context.Context, log *slog.Logger, listen func() (net.Listener, error)) (net.Listener, error) {
	const look, patience = 200 * time.Millisecond, time.Minute
	end := time.Now().Add(patience)
	for told := false; ; told = true {
		l, err := listen()
		if !errors.Is(err, syscall.EADDRINUSE) || time.Now().After(end) {
			return l, err
		}
		if !told {
			log.LogAttrs(ctx, slog.LevelInfo, "waiting for the agent before this one to end", slog.Any("err", err))
		}
		select {
		case <-time.After(look):
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), err)
		}
	}
}

// listenLoopback listens where nobody but the node's own processes gets to.
func listenLoopback(address string) (net.Listener, error) {
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, fmt.Errorf("-admin: %w", err)
	}
	if !at.Addr().IsLoopback() {
		return nil, fmt.Errorf("-admin: %s is not on the loopback: it tells everybody who talks to whom", address)
	}
	return net.Listen("tcp", address)
}

// keep keeps the sockets of captured pods, until ctx ends.
func keep(ctx context.Context, args []string, stderr io.Writer) error {
	f := flag.NewFlagSet("troth-agent keep", flag.ContinueOnError)
	f.SetOutput(stderr)
	socket := f.String("socket", keeperSocket, "Unix socket on which the agent gives and takes")
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	l, err := capture.ListenKeeper(*socket)
	if err != nil {
		return err
	}
	return capture.ServeKeeper(ctx, l)
}

// release ends the capture of the node's pods, and returns when none is captured.
func release(ctx context.Context, args []string, stderr io.Writer) error {
	f := flag.NewFlagSet("troth-agent release", flag.ContinueOnError)
	f.SetOutput(stderr)
	records := f.String("records", recordsFolder, "folder in which captured pods are recorded")
	hostRoot := f.String("host-root", "", "where the host's files are; empty means by the host's first process")
	timeout := f.Duration("timeout", 2*time.Minute, "how long to try")
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	ctx, cancel := context.WithTimeout(ctx, *timeout)
	defer cancel()
	return pods.Release(ctx, pods.Config{
		Records: *records, HostRoot: *hostRoot, Log: slog.New(slog.NewJSONHandler(stderr, nil)),
	})
}
