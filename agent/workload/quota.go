package workload

import (
	"fmt"
	"sync"
)

// quota hands out places, so many to each pod and so many in all. What is in no pod
// shares the places of the pod "".
type quota struct {
	all, each int

	mu    sync.Mutex
	taken int            // guarded by mu
	byPod map[string]int // guarded by mu
}

func newQuota(all, each int) *quota {
	return &quota{all: all, each: each, byPod: make(map[string]int)}
}

// take takes one place for a pod. The caller calls leave once.
func (q *quota) take(podUID string) (leave func(), err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.byPod[podUID] >= q.each {
		return nil, fmt.Errorf("pod %q has all of its %d", podUID, q.each)
	}
	if q.taken >= q.all {
		return nil, fmt.Errorf("all %d are taken", q.all)
	}
	q.taken++
	q.byPod[podUID]++
	return func() { q.leave(podUID) }, nil
}

func (q *quota) leave(podUID string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.taken--
	q.byPod[podUID]--
	if q.byPod[podUID] == 0 {
		delete(q.byPod, podUID)
	}
}
