package cni

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"troth.dev/troth/internal/proc"
)

const (
	// maxConnections is how many requests are worked on at once; more wait in the
	// socket's backlog. A node that starts has a few hundred pods to add.
	maxConnections = 256
	// maxTransfer is the time that a request takes to arrive, and an answer to leave.
	// Both are written at once, on the same machine.
	maxTransfer = 5 * time.Second
)

// Serve answers the plugin's requests on l, a Unix socket, by h until ctx ends, and
// closes l. It returns nil when ctx has ended, and only after all that it started has;
// before that it fails only if l does.
//
// Any process may find the socket, by its mode or not; only root's are heard
// (SO_PEERCRED).
func Serve(ctx context.Context, l net.Listener, h Handler, log *slog.Logger) error {
	defer l.Close()
	s := &server{handler: h, log: log}
	defer s.running.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { l.Close() })()

	places := make(chan struct{}, maxConnections)
	for {
		select {
		case places <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		c, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				c.Close()
			}
			return nil
		}
		if err != nil {
			// Out of descriptors, perhaps: they come back.
			if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() || isTemporary(err) {
				<-places
				log.Error("plugin's connection not accepted", "err", err)
				select {
				case <-time.After(100 * time.Millisecond):
				case <-ctx.Done():
				}
				continue
			}
			return fmt.Errorf("cni: accept: %w", err)
		}
		conn, err := admit(c)
		if err != nil {
			c.Close()
			<-places
			s.logRefusal(err)
			continue
		}
		s.running.Go(func() {
			defer func() { <-places }()
			defer conn.Close()
			s.serve(ctx, conn)
		})
	}
}

type server struct {
	handler Handler
	log     *slog.Logger
	running sync.WaitGroup
	refused time.Time // when one was logged last; only the accepting loop has it
}

// admit refuses whoever is not root.
func admit(c net.Conn) (*net.UnixConn, error) {
	conn, ok := c.(*net.UnixConn)
	if !ok {
		return nil, fmt.Errorf("a connection of type %T has no peer that the kernel knows", c)
	}
	caller, err := proc.Peer(conn)
	if err != nil {
		return nil, err
	}
	if caller.UID != 0 {
		return nil, fmt.Errorf("the caller is user %d, not root", caller.UID)
	}
	return conn, nil
}

// logRefusal writes at most a line a second: anybody can make it write.
func (s *server) logRefusal(err error) {
	if time.Since(s.refused) < time.Second {
		return
	}
	s.refused = time.Now()
	s.log.Warn("plugin's connection refused", "err", err)
}

// serve reads one request, has it handled and answers it.
func (s *server) serve(ctx context.Context, conn *net.UnixConn) {
	// A deadline is not set only on a connection that is closed, where reading and
	// writing fail by themselves.
	_ = conn.SetReadDeadline(time.Now().Add(maxTransfer))
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Now()) })
	body, files, err := receive(conn, maxRequest)
	stop()
	defer closeAll(files)

	verb := ""
	if err != nil {
		err = invalid("request: %v", err)
	} else {
		var r *request
		if r, err = parseRequest(body); err == nil {
			verb = r.Verb
			err = s.attend(ctx, conn, r, files)
		}
	}
	if errors.Is(err, errHungUp) {
		s.log.Warn("plugin hung up before its answer", "verb", verb)
		return
	}
	a := answerOf(ctx, err)
	if err != nil {
		s.log.Warn("plugin's request refused", "verb", verb, "reason", a.Reason, "err", err)
	}
	_ = conn.SetWriteDeadline(time.Now().Add(maxTransfer))
	if err := send(conn, a, maxAnswer, nil); err != nil {
		s.log.Warn("plugin not answered", "verb", verb, "err", err)
	}
}

var errHungUp = errors.New("the plugin has hung up")

// attend has a request handled for as long as the plugin waits for it.
func (s *server) attend(ctx context.Context, conn *net.UnixConn, r *request, files []*os.File) error {
	netns, err := namespaceFor(r.Verb, files)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, maxRequestTime, errors.New("the agent's time for one request is over"))
	defer cancel()
	ctx, hangUp := context.WithCancelCause(ctx)
	watched := make(chan struct{})
	_ = conn.SetReadDeadline(time.Time{})
	go func() {
		defer close(watched)
		// Nothing more is to come. What comes is the end, the deadline set below, or
		// something that is no request; descriptors that came with it are closed by
		// the kernel, because this read does not ask for them.
		var one [1]byte
		_, err := conn.Read(one[:])
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			hangUp(errHungUp)
		}
	}()
	err = s.handle(ctx, r, netns)
	_ = conn.SetReadDeadline(time.Now())
	<-watched
	if errors.Is(context.Cause(ctx), errHungUp) {
		return errHungUp
	}
	hangUp(nil)
	return err
}

// namespaceFor returns the namespace that came with a request, or nil if none
// belongs to it.
func namespaceFor(verb string, files []*os.File) (*os.File, error) {
	switch want := wantsNamespace(verb); {
	case !want && len(files) > 0:
		return nil, invalid("%q has no descriptor", verb)
	case !want:
		return nil, nil
	case len(files) != 1:
		return nil, invalid("%q has one descriptor, the network namespace", verb)
	}
	if err := CheckNamespace(files[0]); err != nil {
		return nil, &Error{Reason: ReasonNamespace, Message: err.Error()}
	}
	return files[0], nil
}

func (s *server) handle(ctx context.Context, r *request, netns *os.File) error {
	switch r.Verb {
	case verbAdd:
		return s.handler.Add(ctx, *r.Pod, netns)
	case verbCheck:
		return s.handler.Check(ctx, *r.Pod, netns)
	case verbDelete:
		return s.handler.Delete(ctx, *r.Pod)
	case verbCollect:
		return s.handler.Collect(ctx, r.Keep)
	case verbStatus:
		return s.handler.Status(ctx)
	}
	return invalid("verb %q is not known", r.Verb)
}

func answerOf(ctx context.Context, err error) answer {
	var e *Error
	switch {
	case err == nil:
		return answer{OK: true}
	case errors.As(err, &e) && e.Reason != "":
	case ctx.Err() != nil:
		e = &Error{Reason: ReasonEnding, Message: "the agent is shutting down", Retry: true}
	default:
		e = &Error{Reason: ReasonInternal, Message: err.Error(), Retry: true}
	}
	return answer{Reason: e.Reason, Message: e.Message[:min(len(e.Message), maxMessage)], Retry: e.Retry}
}
