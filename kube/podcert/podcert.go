// Package podcert signs PodCertificateRequests: it gives X509-SVIDs to pods that have
// Kubernetes mount them as a volume, without an agent. Start with [New] and
// [Signer.Run].
//
// A request proves nothing: whoever may create one writes into it what they like. So
// the identity comes from the API server's record of the pod that the request names by
// UID, and the request has to agree with that record in all that it says. The pod has
// to project a certificate of this signer, as its author alone can have it do. From the
// certificate request inside come the public key and the proof of possession; what it
// carries beside them is refused, and nobody's wish is ever read out of it. The
// certificate is [ca.Issuer.Issue]'s, like every other, and is in the ledger first.
//
// To the kubelet a denial is final: the pod never gets another certificate, not even at
// the next renewal. So only what can never come right for the pod is denied: see
// [Reason]. All else stays pending and is tried again, at longer and longer intervals
// up to half a minute, for as long as the request is there: no store, no authority, a
// pod that the watches have not brought. Nothing is ever marked as failed.
//
// If the process dies after the issuance was recorded and before the status was
// written, the ledger lists a certificate that nobody got, and the next one issues
// another. Of two replicas that sign the same request, the API server takes the first
// one's status and refuses the second's. A lease keeps that from being ordinary.
package podcert

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	certificatesv1 "k8s.io/api/certificates/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/klog/v2"

	"troth.dev/troth/ca"
	"troth.dev/troth/identity"
	"troth.dev/troth/internal/place"
	"troth.dev/troth/kube/lease"
)

// MinLife is how long a certificate has to live for the API server to take it.
const MinLife = time.Hour

// LeaseName is the name of the Lease under which one replica signs.
const LeaseName = "troth-signer"

// Pods is what a Signer has to know about pods.
type Pods interface {
	// Pod returns the API server's record of the pod with the UID in ref, or
	// identity.ErrPodNotFound or identity.ErrPodReplaced if it was told so by the API
	// server itself, and any other error if nobody could tell.
	Pod(ctx context.Context, ref identity.PodReference) (identity.Pod, error)
	// Synced is closed once all pods are known.
	Synced() <-chan struct{}
}

// Config is what a Signer needs. Every field is required unless it says otherwise.
type Config struct {
	Client      kubernetes.Interface
	TrustDomain spiffeid.TrustDomain
	// SignerName is the name by which pods ask for certificates: DOMAIN/PATH.
	SignerName string
	Issuer     *ca.Issuer
	// Life is how long a certificate lives at most, from MinLife to what the Issuer
	// permits; a pod may ask for less. From two fifths to half of it the kubelet asks
	// for the next.
	Life time.Duration
	Pods Pods
	// Namespace is where the Lease is, and Replica this replica's name in it.
	Namespace, Replica string
	// LeaseDuration is that of [lease.Config]; 0 means its default.
	LeaseDuration time.Duration
	Log           *slog.Logger
	Metrics       prometheus.Registerer
}

// Signer signs the requests of one signer name.
type Signer struct {
	config  Config // immutable after New
	places  *place.Sequence
	metrics *metrics
	pending *requests
}

// New checks the config. It starts nothing.
func New(c Config) (*Signer, error) {
	switch {
	case c.Client == nil, c.Issuer == nil, c.Pods == nil, c.Log == nil, c.Metrics == nil:
		return nil, errors.New("podcert: Client, Issuer, Pods, Log and Metrics are required")
	case c.TrustDomain.IsZero():
		return nil, errors.New("podcert: no trust domain")
	case c.Namespace == "", c.Replica == "":
		return nil, errors.New("podcert: Namespace and Replica are required")
	case c.Life < MinLife:
		return nil, fmt.Errorf("podcert: certificates that live %v: the API server takes none of less than %v", c.Life, MinLife)
	}
	if err := CheckSignerName(c.SignerName); err != nil {
		return nil, err
	}
	s := &Signer{config: c, places: place.New(), pending: newRequests(c.SignerName)}
	var err error
	if s.metrics, err = newMetrics(c.Metrics, s); err != nil {
		return nil, fmt.Errorf("podcert: %w", err)
	}
	return s, nil
}

// CheckSignerName returns an error unless name is one that a signer of ours can have:
// DOMAIN/PATH, where the domain has a dot and is not Kubernetes' own.
func CheckSignerName(name string) error {
	domain, path, ok := strings.Cut(name, "/")
	switch {
	case !ok, !strings.Contains(domain, "."), len(validation.IsDNS1123Subdomain(domain)) > 0, len(validation.IsDNS1123Subdomain(path)) > 0:
		return fmt.Errorf("signer name %q is not of the form DOMAIN/PATH, as troth.dev/svid is", name)
	case domain == "kubernetes.io", strings.HasSuffix(domain, ".kubernetes.io"):
		return fmt.Errorf("signer name %q: kubernetes.io belongs to Kubernetes", name)
	}
	return nil
}

// Run signs, whenever this replica holds the lease, until ctx ends, and then returns
// nil. It rides out outages of the API server, and waits for one that does not know
// PodCertificateRequests to learn of them.
func (s *Signer) Run(ctx context.Context) error {
	ctx = klog.NewContext(ctx, logr.FromSlogHandler(s.config.Log.Handler()))
	return lease.Hold(ctx, lease.Config{
		Client: s.config.Client, Namespace: s.config.Namespace, Name: LeaseName,
		Holder: s.config.Replica, Duration: s.config.LeaseDuration,
	}, s.lead)
}

const (
	// workers is how many batches are under way at the same time: one that waits for
	// pods that nobody knows must not hold up the others.
	workers = 4
	// maxBatch is how many requests one batch has. A kubelet that restarts asks for all
	// pods of its node again, which are 110 by default, and a batch is recorded at the
	// price of one.
	maxBatch = 100
	// retryFirst and retryLast are the shortest and the longest interval between tries.
	retryFirst, retryLast = 200 * time.Millisecond, 30 * time.Second
)

// lead signs until ctx ends.
func (s *Signer) lead(ctx context.Context) {
	select {
	case <-s.config.Pods.Synced(): // before that, each pod would be asked for one by one
	case <-ctx.Done():
		return
	}
	if !s.awaitAPI(ctx) {
		return
	}
	s.config.Log.LogAttrs(ctx, slog.LevelInfo, "signing pod certificates", slog.String("signer", s.config.SignerName))
	queue := workqueue.NewTypedRateLimitingQueue(
		workqueue.NewTypedItemExponentialFailureRateLimiter[types.UID](retryFirst, retryLast))
	s.pending.begin(queue)
	defer s.pending.end()
	var group errgroup.Group
	group.Go(func() error {
		s.reflector().RunWithContext(ctx)
		return nil
	})
	for range workers {
		group.Go(func() error {
			s.work(ctx, queue)
			return nil
		})
	}
	<-ctx.Done()
	queue.ShutDown()
	_ = group.Wait() // none of them fails
	s.config.Log.LogAttrs(ctx, slog.LevelInfo, "signing no more pod certificates", slog.String("signer", s.config.SignerName))
}

// awaitAPI waits until the API server serves PodCertificateRequests, and returns false
// if ctx ends first.
func (s *Signer) awaitAPI(ctx context.Context) bool {
	const retry, lookAgain = 2 * time.Second, time.Minute
	told := false
	for {
		wait := retry
		served, err := s.serves(ctx)
		switch {
		case served:
			return true
		case err == nil:
			if wait = lookAgain; !told {
				told = true
				s.config.Log.LogAttrs(ctx, slog.LevelError,
					"no pod certificates are signed: the API server does not serve podcertificaterequests of certificates.k8s.io/v1, as Kubernetes does since 1.37")
			}
		case ctx.Err() == nil:
			s.config.Log.LogAttrs(ctx, slog.LevelWarn, "no pod certificates are signed yet", slog.Any("err", err))
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return false
		}
	}
}

const resource = "podcertificaterequests"

func (s *Signer) serves(ctx context.Context) (bool, error) {
	var list metav1.APIResourceList
	err := s.config.Client.Discovery().RESTClient().Get().
		AbsPath("/apis", certificatesv1.SchemeGroupVersion.Group, certificatesv1.SchemeGroupVersion.Version).Do(ctx).Into(&list)
	switch {
	case apierrors.IsNotFound(err):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("ask the API server what it serves: %w", err)
	}
	for i := range list.APIResources {
		if list.APIResources[i].Name == resource {
			return true, nil
		}
	}
	return false, nil
}

// reflector lists and watches the requests of this signer. As in package kube, there is
// no informer around it, which would keep each object a second time.
func (s *Signer) reflector() *cache.Reflector {
	source := cache.NewFilteredListWatchFromClient(s.config.Client.CertificatesV1().RESTClient(), resource, metav1.NamespaceAll,
		func(options *metav1.ListOptions) { options.FieldSelector = "spec.signerName=" + s.config.SignerName })
	return cache.NewReflectorWithOptions(source, &certificatesv1.PodCertificateRequest{}, s.pending, cache.ReflectorOptions{
		Name:    resource,
		Backoff: &wait.Backoff{Duration: 200 * time.Millisecond, Factor: 2, Steps: 4, Cap: 3 * time.Second, Jitter: 0.5},
	})
}
