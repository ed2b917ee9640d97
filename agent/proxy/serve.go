package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"
)

// serve hands over what l accepts until ctx ends. Then it closes l, has retire called,
// and waits for as long as drain until all that handle has put into running is done.
// What is left is cut, and serve returns when that has ended too. It fails only if l is
// closed by somebody else; then it does not wait before it cuts.
func serve(ctx context.Context, l net.Listener, log *slog.Logger, drain time.Duration,
	handle func(caller stream, running *sync.WaitGroup), retire, cut func(),
) error {
	var running sync.WaitGroup
	closed := make(chan struct{})
	spare := context.AfterFunc(ctx, func() { l.Close(); close(closed) })
	err := acceptAll(ctx, l, log, func(caller stream) { handle(caller, &running) })
	if spare() {
		l.Close() // it was closed by others, or is of no more use
	} else {
		<-closed
	}
	ended := make(chan struct{})
	go func() {
		running.Wait()
		close(ended)
	}()
	if err == nil && drain > 0 {
		retire()
		late := time.NewTimer(drain)
		select {
		case <-ended:
		case <-late.C:
		}
		late.Stop()
	}
	cut()
	<-ended
	return err
}

// acceptAll hands over what l accepts until ctx ends or l is closed.
func acceptAll(ctx context.Context, l net.Listener, log *slog.Logger, handle func(stream)) error {
	var pause time.Duration
	for {
		caller, err := acceptStream(l)
		switch {
		case err == nil:
			pause = 0
			handle(caller)
			continue
		case ctx.Err() != nil:
			return nil //nolint:nilerr // l was closed because ctx ended
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("proxy: accept: %w", err)
		}
		// Most likely the process or the node is out of file descriptors. To try
		// again at once would only burn what the open connections need to end.
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		log.Warn("cannot accept connections", "err", err, "pause", pause)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
	}
}

func acceptStream(l net.Listener) (stream, error) {
	c, err := l.Accept()
	if err != nil {
		return nil, err
	}
	return asStream(c)
}
