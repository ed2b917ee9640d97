package podcert

import (
	"fmt"
	"sync"

	certificatesv1 "k8s.io/api/certificates/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
)

// requests is the requests that nobody has decided on, as the watch brings them. It is
// a [cache.ReflectorStore].
type requests struct {
	signer string

	mu    sync.Mutex
	queue workqueue.TypedRateLimitingInterface[types.UID] // guarded by mu; nil while this replica does not sign
	all   map[types.UID]*request                          // guarded by mu

	// taking is held by the worker that fills a batch. A queue gives one item at a
	// time, and blocks when it has none: with two that take from it, the second would
	// wait with half a batch for what the first has taken.
	taking sync.Mutex
}

// request is one of them. It belongs to the worker that has its UID from the queue; the
// object is never changed.
type request struct {
	object *certificatesv1.PodCertificateRequest
	told   Reason // why it waits, as last logged
}

func newRequests(signer string) *requests {
	return &requests{signer: signer, all: make(map[types.UID]*request)}
}

// begin puts what comes into the queue, and end stops that.
func (r *requests) begin(queue workqueue.TypedRateLimitingInterface[types.UID]) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.queue = queue
}

func (r *requests) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.queue = nil
	clear(r.all)
}

// count returns how many are pending.
func (r *requests) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.all)
}

// take returns the next batch, or none when the queue is shut down.
func (r *requests) take(queue workqueue.TypedRateLimitingInterface[types.UID]) []types.UID {
	r.taking.Lock()
	defer r.taking.Unlock()
	var batch []types.UID
	for len(batch) == 0 || len(batch) < maxBatch && queue.Len() > 0 {
		uid, over := queue.Get()
		if over {
			break
		}
		batch = append(batch, uid)
	}
	return batch
}

// find returns the request with that UID, or nil if it needs no decision any more.
func (r *requests) find(uid types.UID) *request {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.all[uid]
}

// settle forgets a request that was decided on.
func (r *requests) settle(uid types.UID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.all, uid)
}

// set takes note of a request. Its caller holds mu.
func (r *requests) set(o *certificatesv1.PodCertificateRequest) {
	switch known := r.all[o.UID]; {
	case o.Spec.SignerName != r.signer: // the API server selects; that it does is not for us to believe
	case decided(o), o.DeletionTimestamp != nil:
		delete(r.all, o.UID)
	case known != nil:
		// All that matters in it cannot change.
	case r.queue != nil:
		r.all[o.UID] = &request{object: o}
		r.queue.Add(o.UID)
	}
}

// decided says whether a request has its final status, as every condition of its kind
// makes it.
func decided(o *certificatesv1.PodCertificateRequest) bool {
	for _, c := range o.Status.Conditions {
		switch c.Type {
		case certificatesv1.PodCertificateRequestConditionTypeIssued, certificatesv1.PodCertificateRequestConditionTypeDenied,
			certificatesv1.PodCertificateRequestConditionTypeFailed:
			return true
		}
	}
	return o.Status.CertificateChain != ""
}

// Add implements [cache.ReflectorStore], as the methods below do.
func (r *requests) Add(o any) error { return r.each(o, r.set) }

func (r *requests) Update(o any) error { return r.each(o, r.set) }

func (r *requests) Delete(o any) error {
	return r.each(o, func(o *certificatesv1.PodCertificateRequest) { delete(r.all, o.UID) })
}

func (r *requests) each(o any, f func(*certificatesv1.PodCertificateRequest)) error {
	object, ok := o.(*certificatesv1.PodCertificateRequest)
	if !ok {
		return fmt.Errorf("podcert: a watch brought a %T", o)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	f(object)
	return nil
}

// Replace takes a complete list. What was decided or deleted while nobody watched is
// not in it, or is there with its status.
func (r *requests) Replace(list []any, _ string) error {
	listed := make(map[types.UID]bool, len(list))
	for _, o := range list {
		if object, ok := o.(*certificatesv1.PodCertificateRequest); ok {
			listed[object.UID] = true
		}
	}
	r.mu.Lock()
	for uid := range r.all {
		if !listed[uid] {
			delete(r.all, uid)
		}
	}
	r.mu.Unlock()
	for _, o := range list {
		if err := r.Add(o); err != nil {
			return err
		}
	}
	return nil
}

func (r *requests) Resync() error { return nil }
