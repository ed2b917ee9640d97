package trustbundle

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/tools/cache"

	"troth.dev/troth/ca"
	"troth.dev/troth/internal/latest"
)

// keeper looks at one place, and keeps the bundle there.
type keeper struct {
	place     Place
	object    object
	publisher *Publisher
	seen      latest.Value[seen]
}

// seen is what was last seen at a place. The zero seen is nothing yet.
type seen struct {
	known    bool // the API server has said what is there
	unserved bool // it does not serve this kind of object
	exists   bool
	version  string // resource version
	revision uint64 // of the bundle, by its annotation; 0 if that says nothing
	text     string
	anchors  map[string]bool // of text, by DER
}

const (
	// requestTimeout bounds each request to the API server, and to the store.
	requestTimeout = 10 * time.Second
	// calm is how long lies between two writes at one place: somebody else who keeps
	// changing it must not keep us busy.
	calm = time.Second
	// retryLast is the longest interval between tries.
	retryLast = time.Minute
)

// has says whether a trust anchor is published here. Where there can be nothing nobody
// looks for it.
func (k *keeper) has(anchor *x509.Certificate) bool {
	now, _ := k.seen.Load()
	return now.known && (now.unserved || now.anchors[string(anchor.Raw)])
}

// watch follows what is at the place until ctx ends.
func (k *keeper) watch(ctx context.Context) {
	if !k.awaitAPI(ctx) {
		return
	}
	source, example := k.object.source()
	cache.NewReflectorWithOptions(source, example, (*mirror)(k), cache.ReflectorOptions{
		Name:    k.place.String(),
		Backoff: &wait.Backoff{Duration: 200 * time.Millisecond, Factor: 2, Steps: 4, Cap: 3 * time.Second, Jitter: 0.5},
	}).RunWithContext(ctx)
}

// awaitAPI waits until the API server serves this kind of object, and returns false if
// ctx ends first.
func (k *keeper) awaitAPI(ctx context.Context) bool {
	const retry, lookAgain = 2 * time.Second, time.Minute
	group, resource := k.object.resource()
	for log, told := k.publisher.config.Log, false; ; {
		pause := retry
		var list metav1.APIResourceList
		path := []string{"/apis", group}
		if group == "v1" {
			path = []string{"/api", group}
		}
		err := k.publisher.config.Client.Discovery().RESTClient().Get().AbsPath(path...).Do(ctx).Into(&list)
		for i := range list.APIResources {
			if err == nil && list.APIResources[i].Name == resource {
				return true
			}
		}
		switch {
		case err == nil, apierrors.IsNotFound(err):
			if pause = lookAgain; !told {
				told = true
				k.see(seen{known: true, unserved: true})
				log.LogAttrs(ctx, slog.LevelError, "the trust bundle is not published here: the API server does not serve this kind of object, as Kubernetes does since 1.37",
					slog.String("place", k.place.String()), slog.String("resource", resource), slog.String("group", group))
			}
		case ctx.Err() == nil:
			log.LogAttrs(ctx, slog.LevelWarn, "the trust bundle is not looked at yet", slog.String("place", k.place.String()), slog.Any("err", err))
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return false
		}
	}
}

func (k *keeper) see(now seen) {
	k.seen.Set(now)
	k.publisher.news.Set(struct{}{})
}

// keep writes what is missing, older or other than the bundle, until ctx ends.
func (k *keeper) keep(ctx context.Context) {
	retry := calm
	for {
		bundle, bundleChanged := k.publisher.config.Bundle.Load()
		now, seenChanged := k.seen.Load()
		var again <-chan time.Time
		if now.known && !now.unserved && (!now.exists || now.revision != bundle.Revision || now.text != render(bundle)) {
			err := k.write(ctx, now)
			switch {
			case ctx.Err() != nil:
				return
			case err == nil, apierrors.IsConflict(err), apierrors.IsAlreadyExists(err):
				// The watch is about to bring it, or that somebody was faster.
				retry = calm
			default:
				retry = min(2*retry, retryLast)
				k.publisher.config.Log.LogAttrs(ctx, slog.LevelError, "the trust bundle is not published; what was there stays",
					slog.String("place", k.place.String()), slog.Duration("again_in", retry), slog.Any("err", err))
			}
			k.publisher.metrics.written(k.place, err)
			// Neither change wakes us before that: the one that we have caused would.
			bundleChanged, seenChanged, again = nil, nil, time.After(retry)
		}
		select {
		case <-bundleChanged:
		case <-seenChanged:
		case <-again:
		case <-ctx.Done():
			return
		}
	}
}

// write puts the bundle of this moment in the place of what was seen.
//
// A crash before it leaves what was there, and one after it the bundle: an object is
// replaced whole. Whoever holds the Lease next finds out which by looking.
func (k *keeper) write(ctx context.Context, before seen) error {
	asking, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	// Asked after we looked. What was published then is not newer than what the store
	// has now, unless a store was restored or somebody else wrote it.
	bundle, err := k.publisher.config.Current(asking)
	if err != nil {
		return fmt.Errorf("ask for the current bundle: %w", err)
	}
	text := render(bundle)
	if before.exists && before.revision == bundle.Revision && before.text == text {
		return nil
	}
	if before.revision > bundle.Revision {
		k.publisher.config.Log.LogAttrs(ctx, slog.LevelError,
			"what is published calls itself newer than what the store has, and is replaced: somebody wrote it, or the store was restored",
			slog.String("place", k.place.String()), slog.Uint64("published", before.revision), slog.Uint64("revision", bundle.Revision))
	}
	if err := k.object.write(asking, before, bundle, text); err != nil {
		return err
	}
	k.publisher.config.Log.LogAttrs(ctx, slog.LevelInfo, "trust bundle published", slog.String("place", k.place.String()),
		slog.Uint64("revision", bundle.Revision), slog.String("sha256", bundle.SHA256()))
	return nil
}

// mirror takes what a reflector brings: of one object, at most.
type mirror keeper

// Add implements [cache.ReflectorStore], as the methods below do.
func (m *mirror) Add(o any) error { return m.Replace([]any{o}, "") }

func (m *mirror) Update(o any) error { return m.Replace([]any{o}, "") }

func (m *mirror) Delete(any) error { return m.Replace(nil, "") }

func (m *mirror) Replace(list []any, _ string) error {
	now := seen{known: true}
	for _, o := range list {
		text, meta, err := m.object.read(o)
		if err != nil {
			return err
		}
		now = seen{
			known: true, exists: true, version: meta.GetResourceVersion(), revision: revisionOf(meta),
			text: text, anchors: anchorsIn(text),
		}
	}
	(*keeper)(m).see(now)
	return nil
}

func (m *mirror) Resync() error { return nil }

// object is how a kind of object has a bundle.
type object interface {
	// resource returns the API's group with its version, and the resource.
	resource() (group, resource string)
	// source lists and watches the one object.
	source() (cache.ListerWatcher, example)
	// read returns what an object has in the place of a bundle.
	read(o any) (text string, meta metav1.Object, err error)
	// write creates the object if there was none, and otherwise replaces what was seen.
	write(ctx context.Context, before seen, bundle ca.Bundle, text string) error
}
