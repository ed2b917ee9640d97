package cni

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"troth.dev/troth/internal/proc"
)

// Client is the plugin's end. Its methods dial the agent, ask, and wait until the
// agent has answered or ctx ends, and at most for two minutes. They return a *[Error]
// if the agent refused, and any other error if there is none, it hung up, or it did
// not answer in time: then nothing is known of what it did.
type Client struct {
	Socket string // path of the agent's socket
}

// maxRequestTime is longer than a container runtime waits for a plugin.
const maxRequestTime = 2 * time.Minute

// Add asks for the capture of a pod and returns nil when it stands, or when the pod
// is not to be captured. netns stays the caller's.
func (c Client) Add(ctx context.Context, pod Pod, netns *os.File) error {
	return c.ask(ctx, request{Verb: verbAdd, Pod: &pod}, netns)
}

// Check asks whether what Add did still stands. netns stays the caller's.
func (c Client) Check(ctx context.Context, pod Pod, netns *os.File) error {
	return c.ask(ctx, request{Verb: verbCheck, Pod: &pod}, netns)
}

// Delete tells the agent that a sandbox goes.
func (c Client) Delete(ctx context.Context, pod Pod) error {
	return c.ask(ctx, request{Verb: verbDelete, Pod: &pod}, nil)
}

// Collect tells the agent which attachments are still there.
func (c Client) Collect(ctx context.Context, keep []Attachment) error {
	return c.ask(ctx, request{Verb: verbCollect, Keep: keep}, nil)
}

// Status asks whether the agent would serve an Add now.
func (c Client) Status(ctx context.Context) error {
	return c.ask(ctx, request{Verb: verbStatus}, nil)
}

func (c Client) ask(ctx context.Context, r request, netns *os.File) error {
	r.Version = wireVersion
	ctx, cancel := context.WithTimeout(ctx, maxRequestTime)
	defer cancel()
	dialed, err := new(net.Dialer).DialContext(ctx, "unix", c.Socket)
	if err != nil {
		return fmt.Errorf("cni: reach the agent: %w", err)
	}
	defer dialed.Close()
	conn := dialed.(*net.UnixConn)
	// Whoever could put a socket of their own there would otherwise let pods start
	// uncaptured.
	if server, err := proc.Peer(conn); err != nil {
		return fmt.Errorf("cni: who serves %q: %w", c.Socket, err)
	} else if server.UID != 0 {
		return fmt.Errorf("cni: %q is served by user %d, not by root", c.Socket, server.UID)
	}
	// Closed and not given a deadline, so that ctx ends it by either of its ways.
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if err := converse(conn, r, netns); err != nil {
		var refused *Error
		switch {
		case errors.As(err, &refused):
			return refused
		case ctx.Err() != nil:
			return fmt.Errorf("cni: the agent has not answered: %w", ctx.Err())
		}
		return fmt.Errorf("cni: ask the agent: %w", err)
	}
	return nil
}

func converse(conn *net.UnixConn, r request, netns *os.File) error {
	// An agent that refuses a request by its first bytes hangs up before it has read
	// the rest: its answer says why, the failure to write does not.
	sendErr := send(conn, r, maxRequest, netns)
	body, files, err := receive(conn, maxAnswer)
	closeAll(files)
	if err != nil {
		return errors.Join(sendErr, err)
	}
	var a answer
	if err := decode(body, &a, false); err != nil {
		return fmt.Errorf("answer: %w", err)
	}
	switch {
	case a.OK && a.Reason == "" && sendErr == nil:
		return nil
	case a.Reason != "" && !a.OK:
		return &Error{Reason: a.Reason, Message: a.Message, Retry: a.Retry}
	}
	return errors.Join(sendErr, fmt.Errorf("answer %.200q is neither yes nor no", body))
}
