// Package kubernetes keeps the certificate authority's memory in the Kubernetes
// API: for a control plane of several replicas, in a cluster that has no database
// for it. Start with [Open]. All it writes lies in one namespace, best one that
// nobody else writes in:
//
//   - the document of authorities in the Secret "troth-authorities", and that of the
//     trust domain for tests in "troth-test-authorities";
//   - the ledger in ConfigMaps named "troth-ledger-" and something random, each
//     with a batch of issuances as gzip'ed lines of JSON;
//   - the summary of each replica in the ConfigMap "troth-fleet-" and its name;
//   - each token that was spent in a ConfigMap of its own, "troth-spent-" and a hash of
//     it, with nothing in it: to create it is to spend the token.
//
// It guarantees what the contracts of package storage demand. Durable means that
// the API server acknowledged the write, which it does when a majority of etcd
// has it on disk. What is read is asked of etcd, never of a cache: no request
// names a resource version to be content with.
//
// # What it promises between replicas about serial numbers
//
// Each replica remembers the serial numbers that the ledger has, those of other
// replicas from a watch, and asks the API server before it refuses one. A serial
// number that was recorded through this Store, or before it was opened, is always
// found. One that another replica recorded is found as soon as the watch has
// brought it: milliseconds, or seconds after a watch had to begin again. Two replicas that record
// the same serial number within that time both succeed, and Query shows both rows.
// To exclude that, each Record would have to read all that was written since the
// last one. Serial numbers have 128 random bits: two that are equal show a broken
// source of randomness, and those come in numbers, not once within milliseconds.
//
// # When the Secret is deleted
//
// Whoever finds no document makes a first authority, which is active at once. So
// there is no document only while nothing was ever stored: if this Store has seen
// one, or the ledger of the namespace lists a certificate, Load and Swap return an
// error for as long as the Secret is missing. To go on, restore it. To begin anew
// with authorities that no workload trusts yet, delete the ledger too. Of the Secret
// for tests that is not so: a Store that has not seen it makes another, and tests that
// run then fail.
//
// # Sizes
//
// An issuance takes 75 bytes in etcd, and 36 bytes of each replica's memory. A mesh
// of 10,000 SVIDs that live for an hour issues 4.4 each second, 380,000 a day: 29 MB
// and 2,600 ConfigMaps for each day that the ledger keeps. Keep days, not months:
// etcd has 2 GiB unless told otherwise, and the API server has every ConfigMap in
// memory.
//
// A spent token takes some 400 bytes until it has expired and is pruned: a hundred CI
// jobs a minute with tokens that live for 10 minutes are 1,000 objects, and 3 writes
// in a second.
//
// # Rights
//
// The service account needs, in the namespace: on Secrets get, watch and update of
// the name troth-authorities, get and update of the name troth-test-authorities if it
// issues to tests, and create, which cannot be restricted to a name; on
// ConfigMaps get, list, watch, create, update and delete. It can read no other
// Secret. Whoever may write these objects can make authorities and forget
// certificates: that is not defended.
package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	clientset "k8s.io/client-go/kubernetes"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"

	"troth.dev/troth/storage"
	"troth.dev/troth/storage/kubernetes/internal/batch"
)

// Config says where the store is.
type Config struct {
	// Client is required. It has to be one of a real API server, and should not
	// limit itself: client-go's default of 5 requests in a second is less than a
	// mesh of 10,000 SVIDs needs. What kube.NewClient makes is right, and speaks
	// protobuf, which spares a third of each batch on the wire.
	Client clientset.Interface
	// Namespace is where all objects of the store are. Required. It has to exist.
	Namespace string
	// Log is told when a watch fails, and of objects that cannot be read. Nil
	// discards.
	Log *slog.Logger
}

// Store is a namespace in use. It implements [storage.AuthorityStore],
// [storage.Ledger], [storage.FleetStore] and [storage.TokenStore]. Whoever opened it
// closes it.
type Store struct {
	document // of the trust domain
	tests    document

	// Immutable after Open.
	namespace  string
	core       corev1client.CoreV1Interface // for what only reads
	secrets    resource                     // for what writes
	configMaps resource
	log        *slog.Logger

	index *index        // what the ledger has
	scans chan struct{} // held by each who reads the whole ledger: bounds their memory

	compressor batch.Compressor

	calls   chan *call    // what Records wait for
	open    *openBatch    // of commitGroups alone
	stopped chan struct{} // closed when commitGroups has returned
	use     sync.RWMutex
	onClose func(func()) (stop func() bool)
	closing <-chan struct{}
	running sync.WaitGroup // the goroutines that Open started
	close   func()         // once
}

var (
	_ storage.AuthorityStore = (*Store)(nil)
	_ storage.Ledger         = (*Store)(nil)
	_ storage.FleetStore     = (*Store)(nil)
	_ storage.TokenStore     = (*Store)(nil)
)

// The label by which this store knows its ConfigMaps.
const (
	storeLabel  = "troth.dev/store"
	ledgerStore = "ledger"
	fleetStore  = "fleet"
	tokenStore  = "spent"
)

// Open reads which serial numbers the ledger has and begins to watch, and returns
// an error if it lacks the rights to. It writes nothing. ctx bounds the opening
// only; the Store has to be closed.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	switch {
	case cfg.Client == nil:
		return nil, errors.New("kubernetes: Config.Client is required")
	case cfg.Namespace == "":
		return nil, errors.New("kubernetes: Config.Namespace is empty")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	core := cfg.Client.CoreV1()
	s := &Store{
		namespace:  cfg.Namespace,
		core:       core,
		secrets:    resource{core.RESTClient(), cfg.Namespace, "secrets"},
		configMaps: resource{core.RESTClient(), cfg.Namespace, "configmaps"},
		log:        cfg.Log,
		index:      newIndex(),
		scans:      make(chan struct{}, maxScans),
		calls:      make(chan *call, maxQueue),
		stopped:    make(chan struct{}),
	}
	s.document.store, s.document.name, s.document.lasting = s, secretName, true
	s.tests.store, s.tests.name = s, testSecretName
	version, err := s.listSerials(ctx)
	if err == nil {
		err = s.mayWatch(ctx, version)
	}
	if err != nil {
		return nil, fmt.Errorf("kubernetes: open the store in namespace %q: %w", cfg.Namespace, err)
	}

	life, end := context.WithCancel(context.WithoutCancel(ctx))
	s.closing = life.Done()
	s.onClose = func(f func()) func() bool { return context.AfterFunc(life, f) }
	s.close = sync.OnceFunc(func() {
		end()
		s.running.Wait()
		s.use.Lock() // waits for those who are inside
		defer s.use.Unlock()
	})
	s.running.Go(func() { s.commitGroups(context.WithoutCancel(ctx)) })
	s.running.Go(func() { s.followSecret(life) })
	s.running.Go(func() { s.followLedger(life, version, watchFor) })
	return s, nil
}

// mayWatch returns an error if one of the watches cannot be had. Without them
// nothing would fail, only be noticed late.
func (s *Store) mayWatch(ctx context.Context, version string) error {
	secret, err := s.watchSecret(ctx)
	if err != nil {
		return err
	}
	secret.Stop()
	ledger, err := s.watchLedger(ctx, version, watchFor)
	if err != nil {
		return err
	}
	ledger.Stop()
	return nil
}

// Close ends the watches and waits for the batch that is being written, 10 s if
// the API server does not answer. Every method that runs or is called later
// returns [storage.ErrClosed]. It returns nil. To close twice is harmless.
func (s *Store) Close() error {
	s.close()
	return nil
}

// enter begins a use of the store, which Close ends and waits for. Unless it
// returns an error, the caller calls leave.
func (s *Store) enter(ctx context.Context) (inside context.Context, leave func(), err error) {
	s.use.RLock()
	if s.isClosed() {
		s.use.RUnlock()
		return nil, nil, storage.ErrClosed
	}
	inside, cancel := context.WithCancelCause(ctx)
	stop := s.onClose(func() { cancel(storage.ErrClosed) })
	return inside, func() {
		stop()
		cancel(nil)
		s.use.RUnlock()
	}, nil
}

func (s *Store) isClosed() bool {
	select {
	case <-s.closing:
		return true
	default:
		return false
	}
}

// ended returns why ctx, one of enter, ended, or err if it did not: what client-go
// makes of an ended context is not always the context's error.
func ended(ctx context.Context, err error) error {
	switch {
	case err == nil || ctx.Err() == nil:
		return err
	case errors.Is(context.Cause(ctx), storage.ErrClosed):
		return storage.ErrClosed
	default:
		return ctx.Err()
	}
}

// pause waits for d, and reports whether ctx is still alive then.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// objectMeta returns the metadata of an object of ours.
func (s *Store) objectMeta(name string, set labels.Set) metav1.ObjectMeta {
	all := labels.Set{"app.kubernetes.io/managed-by": "troth"}
	for key, value := range set {
		all[key] = value
	}
	return metav1.ObjectMeta{Namespace: s.namespace, Name: name, Labels: all}
}
