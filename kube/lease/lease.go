// Package lease lets one of several replicas do what all of them could. Start with
// [Hold].
//
// It guarantees that somebody does it, and that ordinarily only one does. That it is
// never two is more than a lease can promise: a replica that was stopped for longer
// than its lease wakes up as the second. Whatever is done under one has to come out
// right then too.
package lease

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
)

// Config says which lease, and who wants it. Every field is required unless it says
// otherwise.
type Config struct {
	Client kubernetes.Interface
	// Namespace and Name are those of the Lease object.
	Namespace, Name string
	// Holder is this replica's name among those that want it.
	Holder string
	// Duration is after how long another replica takes over from one that died; 0
	// means 15 seconds. One that ends in good order is followed within a sixth of it.
	Duration time.Duration
}

// Hold has work done for as long as this replica holds the lease, again and again
// until ctx ends. It returns nil then, once work has returned and the lease is
// released. The context of work ends when ctx does, and when the lease is lost; work
// returns soon after that. It rides out every outage of the API server.
//
// It fails at once if the config is of no use.
func Hold(ctx context.Context, c Config, work func(ctx context.Context)) error {
	if c.Client == nil || c.Namespace == "" || c.Name == "" || c.Holder == "" || c.Duration < 0 {
		return errors.New("lease: Client, Namespace, Name and Holder are required")
	}
	if c.Duration == 0 {
		c.Duration = 15 * time.Second
	}
	for ctx.Err() == nil {
		if err := c.hold(ctx, work); err != nil {
			return err
		}
	}
	return nil
}

// hold competes for the lease until it was held and lost, or ctx ends.
func (c Config) hold(ctx context.Context, work func(context.Context)) error {
	// The lease is released when this context ends: not before the work has ended.
	electing, release := context.WithCancel(context.WithoutCancel(ctx))
	defer release()
	lock := &lock{LeaseLock: resourcelock.LeaseLock{
		LeaseMeta:  metav1.ObjectMeta{Namespace: c.Namespace, Name: c.Name},
		Client:     c.Client.CoordinationV1(),
		LockConfig: resourcelock.ResourceLockConfig{Identity: c.Holder},
	}}
	ended := make(chan struct{})
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Name: c.Name, Lock: lock,
		LeaseDuration: c.Duration, RenewDeadline: c.Duration * 2 / 3, RetryPeriod: c.Duration / 8,
		ReleaseOnCancel: true,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(held context.Context) { // which ends when the lease is lost
				defer close(ended)
				defer release()
				held, cancel := context.WithCancel(held)
				defer cancel()
				defer context.AfterFunc(ctx, cancel)()
				if ctx.Err() == nil {
					work(held)
				}
			},
			OnStoppedLeading: func() {},
		},
	})
	if err != nil {
		return fmt.Errorf("lease: %w", err)
	}
	// Once it is acquired, the end of the work releases it.
	defer context.AfterFunc(ctx, func() {
		if !lock.acquired.Load() {
			release()
		}
	})()
	elector.Run(electing) // starts the work and does not wait for it
	if lock.acquired.Load() {
		<-ended
	}
	return nil
}

// lock is a LeaseLock that knows whether it was acquired. The elector tells that by an
// event, before it starts the work, and in no other way that is in time.
type lock struct {
	resourcelock.LeaseLock
	acquired atomic.Bool
}

// RecordEvent implements [resourcelock.Interface].
func (l *lock) RecordEvent(string) { l.acquired.Store(true) }
