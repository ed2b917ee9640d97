package workload

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// endpoint is the service that clients see, for one call of Serve. Methods that it
// does not have answer Unimplemented, the JWT and WIT profiles among them.
type endpoint struct {
	workload.UnimplementedSpiffeWorkloadAPIServer

	server   *Server
	draining <-chan struct{} // closed when Serve is to return
}

func (e *endpoint) FetchX509SVID(_ *workload.X509SVIDRequest, s grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return e.serve(s, x509SVIDs)
}

func (e *endpoint) FetchX509Bundles(_ *workload.X509BundlesRequest, s grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return e.serve(s, x509Bundles)
}

func (e *endpoint) serve(s grpc.ServerStream, render renderFunc) error {
	caller, ok := peer.FromContext(s.Context())
	if !ok {
		return errNoIdentity
	}
	known, ok := caller.AuthInfo.(authInfo)
	if !ok {
		return errNoIdentity
	}
	return (&call{
		server:   e.server,
		peer:     known.peer,
		render:   render,
		send:     s.SendMsg,
		draining: e.draining,
	}).serve(s.Context())
}

// renderFunc returns what a state amounts to on one kind of stream at the time
// now: a complete message, or the status that the stream ends with if it must end
// in this state.
type renderFunc func(State, time.Time) (proto.Message, error)

// call is one open stream.
type call struct {
	server   *Server
	peer     Peer
	render   renderFunc
	send     func(any) error
	draining <-chan struct{}
}

// serve sends what the caller is entitled to, and again whenever that changes,
// until there is an end to it. It returns the status that the caller sees.
func (c *call) serve(ctx context.Context) error {
	// 1. Who calls, by the kernel's word.
	podUID, err := c.server.pod(c.peer)
	if err != nil {
		return c.refuse(podUID, err, errNoIdentity)
	}
	// 2. No more streams than its share. Unavailable is the standard's word for
	// shedding load (SPIFFE Workload Endpoint §6).
	leave, err := c.server.streams.take(podUID)
	if err != nil {
		return c.refuse(podUID, err, notYet("too many streams are open"))
	}
	defer leave()
	// 3. What that pod is entitled to, from here on.
	state, release := c.server.source.Workload(podUID)
	defer release()
	// 4. Every state that differs from what was sent before, the newest only.
	var (
		begun     = time.Now()
		sent      proto.Message                   // nil before the first
		delivered map[spiffeid.TrustDomain]uint64 // nil before the first
		receipt   = c.server.handed.open(podUID, c.peer)
	)
	defer receipt.close()
	defer func() { c.server.deliveries.replace(delivered, nil) }()
	deliver := func(revisions map[spiffeid.TrustDomain]uint64) {
		c.server.deliveries.replace(delivered, revisions)
		delivered = revisions
	}
	for {
		receipt.loading()
		newest, changed := state.Load()
		message, why := c.render(newest, time.Now())
		var timeout <-chan time.Time
		switch {
		case why == nil && proto.Equal(message, sent):
			deliver(newest.revisions())
		case why == nil:
			// The pod's entitlement was loaded just now; that this is still that pod's
			// process is asked again, as it may be hours since it last was (SPIFFE
			// Workload API, appendix A, state 6).
			if err := c.recheck(podUID); err != nil {
				return c.refuse(podUID, err, errNoIdentity)
			}
			// It is on record before it is sent. Whoever publishes something newer and
			// then reads the record must not miss a stream that sends the older: either
			// the record was made before, or this stream sees the newer one now.
			if _, ok := message.(*workload.X509SVIDResponse); ok {
				receipt.begin(newest.leaves())
			}
			if sent == nil {
				deliver(newest.revisions())
			}
			select {
			case <-changed:
				receipt.begin(nil)
				if sent == nil {
					deliver(nil)
				}
				continue
			default:
			}
			if err := c.send(message); err != nil {
				return err
			}
			receipt.done()
			sent = message
			deliver(newest.revisions())
		case sent == nil:
			left := c.server.patienceWith(why) - time.Since(begun)
			if left <= 0 {
				return c.refuse(podUID, why, why)
			}
			timeout = time.After(left)
		case status.Code(why) == codes.PermissionDenied:
			receipt.podGone()
			return c.refuse(podUID, errors.New("the pod is gone or has lost its identity"), why)
		default:
			// What was sent stands until there is something better.
		}

		select {
		case <-changed:
		case <-timeout:
		case <-c.draining:
			return notYet("the agent is shutting down")
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// newsDelay is how long the agent may take to hear of a pod that has just been
// placed on its node. A pod's first process can be up before that.
const newsDelay = time.Second

// patienceWith returns how long a stream may wait, from its beginning, for the
// answer to become better than why.
func (s *Server) patienceWith(why error) time.Duration {
	if status.Code(why) == codes.PermissionDenied {
		return min(newsDelay, s.patience)
	}
	return s.patience
}

// pod returns the UID of the pod that the process p runs in.
func (s *Server) pod(p Peer) (string, error) {
	podUID, err := s.podOf(p)
	if err != nil {
		return "", err
	}
	if podUID == "" {
		return "", errors.New("the process runs in no pod")
	}
	// The order matters. PodOf looks the process up by its number, and a number is
	// given again once its process has ended. If the process that connected lives
	// now, it has had that number all the while, and it is the one PodOf saw.
	if err := p.Alive(); err != nil {
		return "", err
	}
	return podUID, nil
}

func (c *call) recheck(podUID string) error {
	now, err := c.server.pod(c.peer)
	if err != nil {
		return err
	}
	if now != podUID {
		return fmt.Errorf("the process was in pod %q and is now in pod %q", podUID, now)
	}
	return nil
}

// refuse puts the reason into the log, and returns the answer to the caller.
func (c *call) refuse(podUID string, why, answer error) error {
	c.server.logRefusal("workload stream refused", c.peer, podUID, why)
	return answer
}

func (s *Server) logRefusal(what string, p Peer, podUID string, why error) {
	if s.refusals.Allow() {
		s.log.Warn(what, "pid", p.PID, "uid", p.UID, "pod", podUID, "err", why)
	}
}
