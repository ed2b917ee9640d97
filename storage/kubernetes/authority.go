package kubernetes

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/watch"

	"troth.dev/troth/internal/latest"
	"troth.dev/troth/storage"
)

const (
	secretName     = "troth-authorities"
	testSecretName = "troth-test-authorities"
	// secretType tells our Secret from another program's of that name.
	secretType  = corev1.SecretType("troth.dev/authorities")
	documentKey = "document"
	versionKey  = "version"
)

// pollEvery is how often a Watch looks by itself, in case nobody told it.
const pollEvery = 5 * time.Second

// document is one of the two documents of the namespace.
type document struct {
	store *Store
	name  string // of its Secret
	// lasting says that it is missed if it is gone: that the ledger lists a
	// certificate shows that there was one.
	lasting bool
	stored  atomic.Bool            // whether it was ever seen
	changed latest.Value[struct{}] // set when the Secret may have changed
}

// Tests returns the document of the trust domain for tests, which is open for as long
// as the Store. It is not watched: its Watch looks every 5 seconds.
func (s *Store) Tests() storage.AuthorityStore { return &s.tests }

// Load implements [storage.AuthorityStore]. It returns an error while the Secret
// is missing although there was one.
func (d *document) Load(ctx context.Context) (storage.Document, error) {
	ctx, leave, err := d.store.enter(ctx)
	if err != nil {
		return storage.Document{}, err
	}
	defer leave()
	current, _, err := d.load(ctx)
	return current, ended(ctx, err)
}

// load returns the document and the Secret that it is in, or no Secret if nothing
// was ever stored.
func (d *document) load(ctx context.Context) (storage.Document, *corev1.Secret, error) {
	s := d.store
	secret, err := d.getSecret(ctx)
	if apierrors.IsNotFound(err) {
		known := d.stored.Load()
		if !known && d.lasting {
			issued, err := s.core.ConfigMaps(s.namespace).List(ctx, metav1.ListOptions{LabelSelector: storeLabel + "=" + ledgerStore, Limit: 1})
			if err != nil {
				return storage.Document{}, nil, fmt.Errorf("kubernetes: whether there ever was a Secret %q: %w", d.name, err)
			}
			known = len(issued.Items) > 0
		}
		if !known {
			return storage.Document{}, nil, nil
		}
		// Another caller, or another replica that recorded too, may have stored the
		// first document since we looked.
		secret, err = d.getSecret(ctx)
		switch {
		case apierrors.IsNotFound(err) && d.lasting:
			return storage.Document{}, nil, fmt.Errorf("kubernetes: Secret %q of namespace %q is missing, although certificates were issued by the authorities in it:"+
				" restore it; to begin anew with authorities that no workload trusts yet, delete the ConfigMaps labelled %s=%s, and restart",
				d.name, s.namespace, storeLabel, ledgerStore)
		case apierrors.IsNotFound(err):
			return storage.Document{}, nil, fmt.Errorf("kubernetes: Secret %q of namespace %q is missing: restore it,"+
				" or restart to begin anew with authorities that no test trusts yet", d.name, s.namespace)
		case err != nil:
			return storage.Document{}, nil, err
		}
	} else if err != nil {
		return storage.Document{}, nil, err
	}
	current, err := documentIn(secret)
	if err != nil {
		return storage.Document{}, nil, err
	}
	d.stored.Store(true)
	return current, secret, nil
}

func (d *document) getSecret(ctx context.Context) (*corev1.Secret, error) {
	secret, err := d.store.core.Secrets(d.store.namespace).Get(ctx, d.name, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("kubernetes: read Secret %q: %w", d.name, err)
	}
	return secret, nil
}

// documentIn returns what the Secret holds. Its version is the random one that was
// stored with it, and not the resource version, which can come again when etcd is
// restored. A hash of the data is part of it: data that somebody changed by hand is
// another document.
func documentIn(secret *corev1.Secret) (storage.Document, error) {
	data, ok := secret.Data[documentKey]
	switch {
	case secret.Type != secretType:
		return storage.Document{}, fmt.Errorf("kubernetes: Secret %q has type %.64q, want %q: it is another program's", secret.Name, secret.Type, secretType)
	case !ok:
		return storage.Document{}, fmt.Errorf("kubernetes: Secret %q has no %q: restore it", secret.Name, documentKey)
	case len(data) > storage.MaxDocument:
		return storage.Document{}, fmt.Errorf("kubernetes: Secret %q: %w", secret.Name, storage.ErrDocumentSize)
	}
	hash := sha256.Sum256(data)
	return storage.Document{
		Version: fmt.Sprintf("%s.%s", secret.Data[versionKey], hex.EncodeToString(hash[:16])),
		Data:    append([]byte{}, data...),
	}, nil
}

// Swap implements [storage.AuthorityStore]. The API server compares the resource
// version of what was read before: a crash before its write leaves the old
// document, a crash after it the next one.
func (d *document) Swap(ctx context.Context, old string, data []byte) (storage.Document, error) {
	if len(data) > storage.MaxDocument {
		return storage.Document{}, storage.ErrDocumentSize
	}
	ctx, leave, err := d.store.enter(ctx)
	if err != nil {
		return storage.Document{}, err
	}
	defer leave()
	next, err := d.swap(ctx, old, data)
	return next, ended(ctx, err)
}

func (d *document) swap(ctx context.Context, old string, data []byte) (storage.Document, error) {
	s := d.store
	current, secret, err := d.load(ctx)
	if err != nil {
		return storage.Document{}, err
	}
	if current.Version != old {
		return storage.Document{}, storage.ErrConflict
	}
	// On an error too: the document may have been replaced, and Watch looks.
	defer d.changed.Set(struct{}{})
	content := map[string][]byte{documentKey: append([]byte{}, data...), versionKey: []byte(rand.Text())}
	var next corev1.Secret
	if secret == nil {
		secret = &corev1.Secret{ObjectMeta: s.objectMeta(d.name, nil), Type: secretType, Data: content}
		err = s.secrets.create(ctx, secret, &next)
	} else {
		secret.Data = content
		err = s.secrets.update(ctx, d.name, secret, &next)
	}
	switch {
	case apierrors.IsAlreadyExists(err), apierrors.IsConflict(err),
		apierrors.IsNotFound(err) && secret.UID != "": // deleted meanwhile; of a new one the namespace is missing
		return storage.Document{}, storage.ErrConflict
	case err != nil:
		return storage.Document{}, fmt.Errorf("kubernetes: write Secret %q: %w", d.name, err)
	}
	d.stored.Store(true)
	return documentIn(&next)
}

// Watch implements [storage.AuthorityStore]. It waits while the API server cannot
// be asked, and while the Secret is missing although there was one.
func (d *document) Watch(ctx context.Context, seen string) (storage.Document, error) {
	ctx, leave, err := d.store.enter(ctx)
	if err != nil {
		return storage.Document{}, err
	}
	defer leave()
	for {
		_, changed := d.changed.Load() // before load, or a change in between is lost
		current, _, err := d.load(ctx)
		if err == nil && current.Version != seen {
			return current, nil
		}
		poll := time.NewTimer(pollEvery)
		select {
		case <-changed:
		case <-poll.C:
		case <-ctx.Done():
			poll.Stop()
			return storage.Document{}, ended(ctx, ctx.Err())
		}
		poll.Stop()
	}
}

// followSecret wakes those who Watch on every change of the Secret. A watch that
// begins says what there is at that moment, so that nothing is missed between two
// of them, and none ever has to go on where another ended. What changed is asked
// of etcd by whoever is woken: a watch may bring what was true a while ago.
func (s *Store) followSecret(ctx context.Context) {
	for {
		events, err := s.watchSecret(ctx)
		if err == nil {
			for event := range events.ResultChan() {
				if err = apierrors.FromObject(event.Object); event.Type == watch.Error {
					break
				}
				err = nil
				s.changed.Set(struct{}{})
			}
			events.Stop()
		}
		if err != nil && ctx.Err() == nil {
			s.log.LogAttrs(ctx, slog.LevelWarn, "watching the authorities again", slog.Any("err", err))
		}
		if !pause(ctx, watchAgain) {
			return
		}
	}
}

func (s *Store) watchSecret(ctx context.Context) (watch.Interface, error) {
	events, err := s.core.Secrets(s.namespace).Watch(ctx, metav1.ListOptions{
		FieldSelector:  fields.OneTermEqualSelector(metav1.ObjectNameField, secretName).String(),
		TimeoutSeconds: new(int64(watchFor / time.Second)),
	})
	if err != nil {
		return nil, fmt.Errorf("watch Secret %q: %w", secretName, err)
	}
	return events, nil
}

const (
	// watchFor is how long a watch lasts at most: until then, one whose
	// connection is dead without a sign is not noticed.
	watchFor = 5 * time.Minute
	// watchAgain is when the next begins.
	watchAgain = time.Second
)
