package kubernetes

import (
	"context"
	"fmt"
	"hash/maphash"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/apimachinery/pkg/watch"
)

// index knows which batch may have a serial number. It says where to look, and
// whoever looks asks the API server: that it knows too much costs a request, that
// it knows too little is what the package's comment promises a bound for. It keeps
// hashes, so that a serial number costs the same however long it is.
type index struct {
	seed maphash.Seed

	mu      sync.Mutex
	batches map[string]*known // guarded by mu; by name
	serials map[uint64]*known // guarded by mu; by hash
}

// known is a batch as it was at a resource version. It is not changed.
type known struct {
	name, version string
	serials       []uint64
}

func newIndex() *index {
	return &index{seed: maphash.MakeSeed(), batches: make(map[string]*known), serials: make(map[uint64]*known)}
}

// find returns the name of the batch that may have the serial number, or "".
func (x *index) find(serial string) string {
	x.mu.Lock()
	defer x.mu.Unlock()
	if k := x.serials[maphash.String(x.seed, serial)]; k != nil {
		return k.name
	}
	return ""
}

// has reports whether the index knows the batch as it is, or as it was later.
func (x *index) has(o *corev1.ConfigMap) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.knows(o.Name, o.ResourceVersion)
}

func (x *index) knows(name, version string) bool {
	k := x.batches[name]
	return k != nil && !newer(version, k.version)
}

// newer compares resource versions, which are numbers that grow. After a restored
// etcd they do not: then the index keeps what it knew, which is too much.
func newer(version, than string) bool {
	order, err := resourceversion.CompareResourceVersion(version, than)
	return err != nil || order > 0
}

// set makes the index know the batch, unless it knows it as it was later: a watch
// brings our own writes after the next ones are made.
func (x *index) set(o *corev1.ConfigMap, serials []string) {
	k := &known{name: o.Name, version: o.ResourceVersion, serials: make([]uint64, len(serials))}
	for n, serial := range serials {
		k.serials[n] = maphash.String(x.seed, serial)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.knows(k.name, k.version) {
		return
	}
	x.forget(k.name)
	x.batches[k.name] = k
	for _, hash := range k.serials {
		x.serials[hash] = k
	}
}

// remove makes the index forget the batch.
func (x *index) remove(name string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.forget(name)
}

func (x *index) forget(name string) {
	k := x.batches[name]
	if k == nil {
		return
	}
	delete(x.batches, name)
	for _, hash := range k.serials {
		if x.serials[hash] == k {
			delete(x.serials, hash)
		}
	}
}

// keep forgets the batches that a list of that resource version did not have.
func (x *index) keep(listed map[string]bool, version string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for name, k := range x.batches {
		if !listed[name] && !newer(k.version, version) {
			x.forget(name)
		}
	}
}

// learn puts a batch that was read into the index. One that cannot be read is
// named in the log; Query says so too.
func (s *Store) learn(ctx context.Context, o *corev1.ConfigMap) {
	if s.index.has(o) {
		return
	}
	all, err := issuancesOf(o)
	if err != nil {
		s.log.LogAttrs(ctx, slog.LevelError, "part of the ledger cannot be read", slog.Any("err", err))
	}
	serials := make([]string, len(all))
	for n, i := range all {
		serials[n] = i.Serial
	}
	s.index.set(o, serials)
}

// listSerials fills the index from the ledger, and returns the resource version
// that it is at then.
func (s *Store) listSerials(ctx context.Context) (version string, err error) {
	var listed map[string]bool
	version, err = s.list(ctx, storeLabel+"="+ledgerStore, ledgerPage, func() { listed = make(map[string]bool) }, func(o *corev1.ConfigMap) error {
		listed[o.Name] = true
		s.learn(ctx, o)
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("list the ledger: %w", err)
	}
	s.index.keep(listed, version)
	return version, nil
}

// followLedger keeps the index at what all replicas record, from a resource version
// on, with watches of that duration. A watch that ends goes on where it was. The
// ledger is listed anew after one that failed, as when the API server has forgotten
// that moment, and after one that brought nothing: each minute brings at least a
// bookmark, unless the moment lies in the future, as after etcd was restored.
func (s *Store) followLedger(ctx context.Context, version string, duration time.Duration) {
	for {
		var err error
		if version == "" {
			version, err = s.listSerials(ctx)
		}
		if err == nil {
			var reached string
			reached, err = s.learnEvents(ctx, version, duration)
			if reached == version || err != nil {
				reached = ""
			}
			version = reached
		}
		if err != nil && ctx.Err() == nil {
			s.log.LogAttrs(ctx, slog.LevelWarn, "watching the ledger again", slog.Any("err", err))
		}
		if !pause(ctx, watchAgain) {
			return
		}
	}
}

// learnEvents watches until the watch ends, and returns the resource version that
// it came to.
func (s *Store) learnEvents(ctx context.Context, version string, duration time.Duration) (string, error) {
	events, err := s.watchLedger(ctx, version, duration)
	if err != nil {
		return version, err
	}
	defer events.Stop()
	for event := range events.ResultChan() {
		if event.Type == watch.Error {
			return version, fmt.Errorf("watch the ledger: %w", apierrors.FromObject(event.Object))
		}
		o, ok := event.Object.(*corev1.ConfigMap)
		if !ok {
			return version, fmt.Errorf("watching the ledger brought a %T", event.Object)
		}
		version = o.ResourceVersion
		switch event.Type {
		case watch.Added, watch.Modified:
			s.learn(ctx, o)
		case watch.Deleted:
			s.index.remove(o.Name)
		}
	}
	return version, nil
}

func (s *Store) watchLedger(ctx context.Context, version string, duration time.Duration) (watch.Interface, error) {
	events, err := s.core.ConfigMaps(s.namespace).Watch(ctx, metav1.ListOptions{
		LabelSelector:       storeLabel + "=" + ledgerStore,
		ResourceVersion:     version,
		AllowWatchBookmarks: true,
		TimeoutSeconds:      new(int64(duration / time.Second)),
	})
	if err != nil {
		return nil, fmt.Errorf("watch the ledger: %w", err)
	}
	return events, nil
}
