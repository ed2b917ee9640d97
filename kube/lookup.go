package kube

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/time/rate"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"troth.dev/troth/identity"
)

// requestTimeout bounds every request that somebody waits for, whatever their
// own patience is.
const requestTimeout = 3 * time.Second

// lookups asks the API server for pods that the watches have not brought. Who
// makes up UIDs can cause look-ups, and no more than the two limits let through.
type lookups struct {
	client  kubernetes.Interface
	records *records
	slots   chan struct{} // as many as look-ups may run
	rate    *rate.Limiter
	shared  shared[identity.PodReference, identity.Pod]
}

func newLookups(config PodsConfig, records *records) *lookups {
	return &lookups{
		client:  config.Client,
		records: records,
		slots:   make(chan struct{}, config.LookupLimit),
		rate:    rate.NewLimiter(rate.Limit(config.LookupRate), config.LookupLimit),
	}
}

// pod returns the API server's record of the pod at this moment.
func (l *lookups) pod(ctx context.Context, ref identity.PodReference) (identity.Pod, error) {
	pod, err := l.shared.do(ctx, ref, func(ctx context.Context) (identity.Pod, error) { return l.ask(ctx, ref) })
	if err != nil {
		return identity.Pod{}, fmt.Errorf("look up pod %q: %w", ref.Namespace+"/"+ref.Name, err)
	}
	return pod, nil
}

func (l *lookups) ask(ctx context.Context, ref identity.PodReference) (identity.Pod, error) {
	select {
	case l.slots <- struct{}{}:
		defer func() { <-l.slots }()
	default:
		return identity.Pod{}, fmt.Errorf("%d look-ups are running: %w", cap(l.slots), ErrUnavailable)
	}
	if !l.rate.Allow() {
		return identity.Pod{}, fmt.Errorf("more than %v look-ups in a second: %w", l.rate.Limit(), ErrUnavailable)
	}

	// Without a resource version, the API server answers with what was last
	// committed: its cache would be as late as the watches.
	object, err := l.client.CoreV1().Pods(ref.Namespace).Get(ctx, ref.Name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return identity.Pod{}, identity.ErrPodNotFound
	case err != nil:
		return identity.Pod{}, unavailable(err)
	case string(object.UID) != ref.UID:
		return identity.Pod{}, identity.ErrPodReplaced
	}

	pod := podOf(object)
	pod.ServiceAccountUID, pod.Node.UID = l.records.uids(pod.Account(), pod.Node.Name)
	if pod.ServiceAccountUID == "" {
		pod.ServiceAccountUID, err = uidOf(l.client.CoreV1().ServiceAccounts(pod.Namespace).Get(ctx, pod.ServiceAccount, metav1.GetOptions{}))
		if err != nil {
			return identity.Pod{}, err
		}
	}
	if pod.Node.UID == "" && pod.Node.Name != "" {
		pod.Node.UID, err = uidOf(l.client.CoreV1().Nodes().Get(ctx, pod.Node.Name, metav1.GetOptions{}))
		if err != nil {
			return identity.Pod{}, err
		}
	}
	return pod, nil
}

// uidOf returns the UID of what a request brought, and none if there is no such
// object.
func uidOf(o metav1.Object, err error) (string, error) {
	switch {
	case apierrors.IsNotFound(err):
		return "", nil
	case err != nil:
		return "", unavailable(err)
	}
	return string(o.GetUID()), nil
}

// unavailable says that a request had no answer, and why. It hides that the
// request's own deadline passed: the caller's did not.
func unavailable(err error) error {
	return fmt.Errorf("%w: %v", ErrUnavailable, err) //nolint:errorlint // what went wrong is for people; callers act on ErrUnavailable
}
