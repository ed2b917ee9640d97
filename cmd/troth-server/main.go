// Command troth-server is the control plane of Troth in a Kubernetes cluster.
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
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"troth.dev/troth/ca"
	"troth.dev/troth/ca/keyhelper"
	"troth.dev/troth/identity"
	"troth.dev/troth/internal/health"
	"troth.dev/troth/internal/heap"
	"troth.dev/troth/internal/version"
	"troth.dev/troth/kube"
	"troth.dev/troth/kube/podcert"
	"troth.dev/troth/kube/trustbundle"
	"troth.dev/troth/server"
	"troth.dev/troth/storage"
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
	database, bundleFile          string
	keyFile                       string
	previousKeyFiles              []string
	keyHelper                     []string
	kubeconfig                    string
	rootNamespace, replica        string
	uncaptured                    []string // nil for the default
	postgresFile, storeNamespace  string
	svidLife, keepIssuances       time.Duration
	agentReturn                   time.Duration
	authorityLife                 time.Duration
	upstream                      ca.Upstream
	mintRules, mintTrustDomain    string
	tokenReview, policyStatus     bool
	signer                        string              // empty for none
	bundlePlaces                  []trustbundle.Place // none if it is not published
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
	f.StringVar(&o.database, "database", "/var/lib/troth/troth.db", "SQLite file, for one replica")
	f.StringVar(&o.postgresFile, "postgres", "", "file with the URL of a PostgreSQL database, for several replicas; takes the place of -database")
	f.StringVar(&o.storeNamespace, "kubernetes-store", "", "namespace to keep everything in, for several replicas without a database; takes the place of -database")
	f.StringVar(&o.keyFile, "key-encryption-key", "/etc/troth/key-encryption-key", "file of 32 random bytes under which authority keys are sealed")
	f.Func("previous-key-encryption-key", "file of a key under which authority keys may still be sealed; they are sealed anew at start. May be given several times", func(path string) error {
		o.previousKeyFiles = append(o.previousKeyFiles, path)
		return nil
	})
	f.Func("key-helper", "`command`, and arguments without spaces, of a program that keeps the authority keys in the place of -key-encryption-key, in a token for instance", func(command string) error {
		o.keyHelper = strings.Fields(command)
		return nil
	})
	f.StringVar(&o.bundleFile, "bundle", "", "file to keep the current trust bundle in, as PEM; none if empty")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "how to reach the API server (default: as the pod's service account)")
	f.StringVar(&o.rootNamespace, "root-namespace", "istio-system", "namespace whose PeerAuthentications are for the whole mesh")
	f.Func("uncaptured-namespaces", "`namespaces`, with commas between them, whose pods are not captured; may be empty (default kube-system and the server's own)", func(list string) error {
		o.uncaptured = []string{}
		for name := range strings.SplitSeq(list, ",") {
			if name == "" {
				continue
			}
			if _, err := identity.ParseServiceAccountName(name + "/default"); err != nil {
				return err
			}
			o.uncaptured = append(o.uncaptured, name)
		}
		return nil
	})
	f.StringVar(&o.replica, "replica", "", "name of this replica among those of the trust domain (default: the host's name)")
	f.BoolVar(&o.policyStatus, "policy-status", true, "tell in the status of each PeerAuthentication whether it is in force, and why not")
	f.DurationVar(&o.svidLife, "svid-life", time.Hour, "how long SVIDs live, 10s to 24h")
	f.DurationVar(&o.authorityLife, "authority-life", 30*24*time.Hour, "how long an authority lives that the server makes, at least three times as long as SVIDs")
	f.StringVar(&o.upstream.Certificate, "upstream-cert", "", "PEM file of an intermediate that an upstream root issued, and of those above it; it is the authority then. None if empty")
	f.StringVar(&o.upstream.Key, "upstream-key", "", "PEM file of the intermediate's private key, ECDSA P-256; required with -upstream-cert")
	f.StringVar(&o.upstream.Root, "upstream-root", "", "PEM file of the upstream root; required unless -upstream-cert ends with it")
	f.DurationVar(&o.agentReturn, "agent-return", 40*time.Second, "how long workloads may take to come back to an agent that was restarted, before its proofs count; go-spiffe takes 30s")
	f.DurationVar(&o.keepIssuances, "keep-issuances", 30*24*time.Hour, "how long the ledger keeps a certificate that has expired")
	f.StringVar(&o.signer, "signer", "", "name of the signer whose PodCertificateRequests are signed, as troth.dev/svid is; none if empty")
	f.Func("trust-bundle", "`places`, with commas between them, to publish the trust bundle at: clustertrustbundle, and configmap=NAMESPACE/NAME as often as wanted; required with -signer", func(list string) (err error) {
		o.bundlePlaces, err = trustbundle.ParsePlaces(list)
		return err
	})
	f.StringVar(&o.mintRules, "mint-rules", "", "YAML file of the issuers and rules by which CI jobs get identities of -mint-trust-domain; none do if empty")
	f.StringVar(&o.mintTrustDomain, "mint-trust-domain", "", "trust domain for tests, another than -trust-domain; required with -mint-rules")
	f.BoolVar(&o.tokenReview, "token-review", false, "ask the API server about each token too")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if f.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	sealing := false
	f.Visit(func(one *flag.Flag) {
		sealing = sealing || one.Name == "key-encryption-key" || one.Name == "previous-key-encryption-key"
	})
	if sealing && o.keyHelper != nil {
		return o, errors.New("-key-helper keeps the keys by itself: leave out -key-encryption-key and -previous-key-encryption-key")
	}
	if o.trustDomain == "" {
		return o, errors.New("-trust-domain is required")
	}
	if o.postgresFile != "" && o.storeNamespace != "" {
		return o, errors.New("-postgres and -kubernetes-store are two stores: choose one")
	}
	if o.replica == "" {
		host, err := os.Hostname()
		if err != nil {
			return o, fmt.Errorf("-replica: %w", err)
		}
		o.replica = strings.ToLower(host)
	}
	if (o.upstream.Certificate == "") != (o.upstream.Key == "") || o.upstream.Root != "" && o.upstream.Certificate == "" {
		return o, errors.New("-upstream-cert and -upstream-key go together, and -upstream-root with them")
	}
	if o.signer != "" {
		if err := podcert.CheckSignerName(o.signer); err != nil {
			return o, fmt.Errorf("-signer: %w", err)
		}
		if len(o.bundlePlaces) == 0 {
			return o, errors.New("-signer: pods with its certificates have to get the bundle from somewhere: say where it is published with -trust-bundle")
		}
	}
	if (o.mintRules == "") != (o.mintTrustDomain == "") {
		return o, errors.New("-mint-rules and -mint-trust-domain go together")
	}
	if o.authorityLife <= 0 {
		return o, fmt.Errorf("-authority-life %s: it has to be more than nothing", o.authorityLife)
	}
	if o.agentReturn <= 0 {
		return o, fmt.Errorf("-agent-return %s: it has to be more than nothing", o.agentReturn)
	}
	if o.keepIssuances < 0 {
		return o, fmt.Errorf("-keep-issuances %s: it cannot be less than nothing", o.keepIssuances)
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

	keys, closeKeys, err := authorityKeys(o, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeKeys()) }()
	connect := sync.OnceValues(func() (*kube.Client, error) { return kube.Connect(o.kubeconfig) })
	store, err := openStore(ctx, o, connect, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	profile, err := ca.NewProfile(ca.ProfileConfig{Life: o.svidLife})
	if err != nil {
		return err
	}
	authorities := ca.Config{
		TrustDomain: td, Keys: keys, Authorities: store, Ledger: store, Profile: profile,
		Audit: log.With("log", "audit"), AuthorityLife: o.authorityLife,
	}
	if o.signer != "" {
		authorities.LongestLife = o.podCertificateLife()
	}
	if len(o.bundlePlaces) > 0 {
		authorities.Publication = trustbundle.Lag
	}
	if o.upstream.Certificate != "" {
		authorities.Upstream = &o.upstream
	}
	issuer, err := ca.Open(ctx, authorities)
	if err != nil {
		return err
	}
	if _, err := issuer.Reseal(ctx); err != nil {
		return err
	}

	minting, err := openMint(ctx, o, authorities, store, connect)
	if err != nil {
		return err
	}

	client, err := connect()
	if err != nil {
		return err
	}
	uncaptured, err := o.uncapturedNamespaces(agents)
	if err != nil {
		return err
	}
	pods, err := kube.NewPods(kube.PodsConfig{
		Client: client, Dynamic: client.Dynamic, Agents: agents, Uncaptured: uncaptured,
		RootNamespace: o.rootNamespace, PolicyStatus: o.policyStatus, Log: log,
	})
	if err != nil {
		return err
	}
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), version.Metric())
	config := server.Config{
		TrustDomain: td, Issuer: issuer, Pods: pods, Agents: agents, Uncaptured: uncaptured, Fleet: store, Replica: o.replica, AgentReturn: o.agentReturn,
		Operator: func(ctx context.Context, raw string, right server.Right) (string, error) {
			return kube.Authorize(ctx, client, raw, o.audience, right.Verb, right.Resource)
		},
		Mint: minting, Log: log, Metrics: metrics,
	}
	if minting != nil {
		defer minting.Verifier.Close()
	}
	if o.tokenReview {
		r, err := kube.NewTokenReviewer(kube.TokenReviewerConfig{Client: client})
		if err != nil {
			return err
		}
		config.ReviewToken = func(ctx context.Context, raw string) error {
			_, err := r.Review(ctx, raw, o.audience)
			return err
		}
	}

	native, err := o.native(nativeParts{client: client, trustDomain: td, issuer: issuer, pods: pods, agents: agents, log: log, metrics: metrics})
	if err != nil {
		return err
	}

	plain, err := net.Listen("tcp", o.health)
	if err != nil {
		return err
	}
	var serving atomic.Pointer[server.Server]
	ready := func() error {
		if s := serving.Load(); s != nil {
			return s.Ready()
		}
		return errors.New("the API server has not been reached yet")
	}

	// The pods outlive the server's calls, so that what is in flight can finish.
	watching, stopWatching := context.WithCancel(context.WithoutCancel(ctx))
	defer stopWatching()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { heap.KeepRoom(ctx); return nil })
	group.Go(func() error { return health.Serve(ctx, plain, health.Handler(ready, metrics)) })
	group.Go(func() error { return pods.Run(watching) })
	group.Go(func() error {
		defer stopWatching()
		iss, err := tokenIssuer(ctx, client, log)
		if err != nil {
			return err
		}
		config.Tokens, err = token.New(token.Config{Issuers: []string{iss}, Audience: o.audience, Keys: kube.Keys(client)})
		if err != nil {
			return err
		}
		defer config.Tokens.Close()
		s, err := server.New(config)
		if err != nil {
			return err
		}
		calls, err := net.Listen("tcp", o.listen)
		if err != nil {
			return err
		}
		log.LogAttrs(ctx, slog.LevelInfo, "serving", slog.String("trust_domain", td.Name()), slog.String("version", version.String()),
			slog.String("address", calls.Addr().String()), slog.String("health", plain.Addr().String()))
		serving.Store(s)
		return s.Serve(ctx, calls)
	})
	for _, run := range native {
		group.Go(func() error { return run(ctx) })
	}
	group.Go(func() error { return prune(ctx, store, o.keepIssuances, log) })
	if o.bundleFile != "" {
		group.Go(func() error { return publish(ctx, issuer, o.bundleFile, log) })
	}
	if err := group.Wait(); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil // it was ended before it began
}

// ownNamespaceFile is where a pod finds the name of its namespace.
const ownNamespaceFile = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"

// ownNamespace returns the server's namespace. Outside a cluster it has none, and the
// agents' takes its place.
func (o options) ownNamespace(agents identity.ServiceAccount) (string, error) {
	if o.kubeconfig != "" {
		return agents.Namespace, nil
	}
	content, err := os.ReadFile(ownNamespaceFile)
	if err != nil {
		return "", fmt.Errorf("the server's own namespace: %w", err)
	}
	return strings.TrimSpace(string(content)), nil
}

// uncapturedNamespaces returns the namespaces whose pods are left alone.
func (o options) uncapturedNamespaces(agents identity.ServiceAccount) (map[string]bool, error) {
	names := o.uncaptured
	if names == nil {
		own, err := o.ownNamespace(agents)
		if err != nil {
			return nil, err
		}
		names = []string{"kube-system", own}
	}
	uncaptured := make(map[string]bool, len(names))
	for _, name := range names {
		uncaptured[name] = true
	}
	return uncaptured, nil
}

// authorityKeys returns the keys of authorities, and what ends a helper that has
// them.
func authorityKeys(o options, log *slog.Logger) (ca.Keys, func() error, error) {
	if o.keyHelper != nil {
		keys, err := keyhelper.New(keyhelper.Config{Command: o.keyHelper, Log: log})
		if err != nil {
			return nil, nil, err
		}
		return keys, keys.Close, nil
	}
	keys, err := sealedKeys(o)
	return keys, func() error { return nil }, err
}

// sealedKeys returns the Keys under the key-encryption keys in the files.
func sealedKeys(o options) (*ca.SealedKeys, error) {
	current, err := readKey(o.keyFile)
	if err != nil {
		return nil, fmt.Errorf("%w (make one with: head -c 32 /dev/urandom > %s)", err, o.keyFile)
	}
	var previous [][]byte
	for _, path := range o.previousKeyFiles {
		key, err := readKey(path)
		if err != nil {
			return nil, err
		}
		previous = append(previous, key)
	}
	return ca.NewSealedKeys(current, previous...)
}

// readKey reads no more than tells that a file is no key.
func readKey(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("key-encryption key: %w", err)
	}
	defer f.Close()
	key, err := io.ReadAll(io.LimitReader(f, ca.KeySize+1))
	if err != nil {
		return nil, fmt.Errorf("key-encryption key: %w", err)
	}
	if len(key) != ca.KeySize {
		return nil, fmt.Errorf("key-encryption key: %s does not have %d bytes", path, ca.KeySize)
	}
	return key, nil
}

// tokenIssuer asks the API server for the issuer of its tokens until it answers, or
// ctx ends. Whoever starts while it is away starts when it is back.
func tokenIssuer(ctx context.Context, client *kube.Client, log *slog.Logger) (string, error) {
	const retry = 2 * time.Second
	for {
		iss, err := kube.Issuer(ctx, client)
		if err == nil {
			return iss, nil
		}
		log.LogAttrs(ctx, slog.LevelWarn, "not serving yet", slog.Any("err", err))
		select {
		case <-ctx.Done():
			return "", ctx.Err()
		case <-time.After(retry):
		}
	}
}

// prune drops from the ledger, once an hour, what expired longer than keep ago.
func prune(ctx context.Context, ledger storage.Ledger, keep time.Duration, log *slog.Logger) error {
	ticker := time.NewTicker(time.Hour)
	defer ticker.Stop()
	for {
		n, err := ledger.Prune(ctx, time.Now().Add(-keep))
		if err != nil && ctx.Err() == nil {
			log.LogAttrs(ctx, slog.LevelError, "the ledger was not pruned", slog.Any("err", err))
		} else if n > 0 {
			log.LogAttrs(ctx, slog.LevelInfo, "the ledger was pruned", slog.Int("issuances", n))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// publish keeps the bundle in a file. The file is replaced whole: a reader sees
// the old bundle or the new one, also after a crash at any line.
func publish(ctx context.Context, issuer *ca.Issuer, path string, log *slog.Logger) error {
	const retry = 5 * time.Second
	for {
		bundle, changed := issuer.Bundle().Load()
		content, err := bundle.X509Bundle().Marshal()
		if err != nil {
			return err
		}
		again := (<-chan time.Time)(nil)
		if err := replace(path, content); err != nil {
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
