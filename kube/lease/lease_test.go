package lease_test

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"troth.dev/troth/kube/lease"
	"troth.dev/troth/test/apiserver"
)

const patience = time.Minute

// holder is one replica, whose work is to wait.
type holder struct {
	name   string
	began  chan struct{} // one element for each time that it has the lease
	ended  chan struct{}
	cancel context.CancelFunc
	done   chan error
}

func hold(t *testing.T, cluster *apiserver.Cluster, name string, working *atomic.Int32) *holder {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	h := &holder{name: name, began: make(chan struct{}, 10), ended: make(chan struct{}, 10), cancel: cancel, done: make(chan error, 1)}
	go func() {
		h.done <- lease.Hold(ctx, lease.Config{
			Client: cluster.Client(), Namespace: "default", Name: "some", Holder: name, Duration: 3 * time.Second,
		}, func(ctx context.Context) {
			if n := working.Add(1); n != 1 {
				t.Errorf("%d at work", n)
			}
			h.began <- struct{}{}
			<-ctx.Done()
			working.Add(-1)
			h.ended <- struct{}{}
		})
	}()
	t.Cleanup(cancel)
	return h
}

func receive[T any](t *testing.T, what string, from <-chan T) T {
	t.Helper()
	select {
	case v := <-from:
		return v
	case <-time.After(patience):
		t.Fatalf("%s: never", what)
		panic("not reached")
	}
}

// One at a time has the lease, the next one soon after the first has ended, and whoever
// has lost it in an outage gets it back.
func TestHold(t *testing.T) {
	cluster := apiserver.Start(t)
	var working atomic.Int32
	one := hold(t, cluster, "one", &working)
	receive(t, "the first begins", one.began)
	two := hold(t, cluster, "two", &working)
	one.cancel()
	if err := receive(t, "the first returns", one.done); err != nil {
		t.Errorf("Hold = %v, want nil", err)
	}
	if len(one.ended) != 1 {
		t.Error("Hold has returned before its work")
	}
	released, err := cluster.Client().CoordinationV1().Leases("default").Get(t.Context(), "some", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if holder := released.Spec.HolderIdentity; holder != nil && *holder == "one" {
		t.Error("the lease was not released")
	}
	receive(t, "the second begins", two.began)

	cluster.StopAPIServer(t)
	receive(t, "the second loses it", two.ended)
	cluster.StartAPIServer(t)
	receive(t, "the second has it again", two.began)

	// One that waits for it returns at once.
	three := hold(t, cluster, "three", &working)
	three.cancel()
	if err := receive(t, "the third returns", three.done); err != nil || len(three.began) > 0 {
		t.Errorf("Hold = %v after working %d times, want nil and none", err, len(three.began))
	}
	two.cancel()
	if err := receive(t, "the second returns", two.done); err != nil {
		t.Errorf("Hold = %v, want nil", err)
	}
}

func TestHoldRefuses(t *testing.T) {
	if err := lease.Hold(t.Context(), lease.Config{}, func(context.Context) { t.Error("works") }); err == nil {
		t.Error("Hold takes an empty config")
	}
}
