package pods

import (
	"context"
	"errors"
	"fmt"
	"time"

	"troth.dev/troth/agent/capture"
)

// Release ends the capture of all pods of a node that Troth leaves, and returns when
// none is captured: they go on in plaintext. Of c it takes Records, HostRoot and Log.
// No agent may run on the node, which would capture them again.
//
// It goes by the records of the agent that is gone. A record is removed after the pod's
// rules are, so that whoever dies in between may call it again. It fails when ctx ends
// before it is done.
func Release(ctx context.Context, c Config) error {
	p, err := New(Config{
		Records: c.Records, HostRoot: c.HostRoot, Log: c.Log, Interval: c.Interval,
		Wanted: func(context.Context, string) (bool, string, error) { return false, "Troth leaves the node", nil },
		Serve:  func(ctx context.Context, _ string, _ *capture.Network) error { <-ctx.Done(); return nil },
	})
	if err != nil {
		return err
	}
	running, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- p.Run(running) }()
	err = p.awaitNone(ctx)
	stop()
	return errors.Join(err, <-ended)
}

// awaitNone waits until no pod has a record any more.
func (p *Pods) awaitNone(ctx context.Context) error {
	poll := time.NewTicker(50 * time.Millisecond)
	defer poll.Stop()
	for {
		// What cannot be read is removed by whoever reads it first: it is no record.
		left, err := p.records.read()
		if err == nil && len(left) == 0 {
			return nil
		}
		select {
		case <-poll.C:
		case <-ctx.Done():
			return fmt.Errorf("pods: %d are captured still: %w", len(left), errors.Join(ctx.Err(), err))
		}
	}
}
