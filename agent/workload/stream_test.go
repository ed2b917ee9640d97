package workload_test

import (
	"context"
	"errors"
	"maps"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"troth.dev/troth/agent/workload"
)

// How long a stream waits for its first state, to the second.
func TestPatience(t *testing.T) {
	type change struct {
		after time.Duration
		to    workload.State
	}
	var (
		denied  = workload.State{Status: workload.StatusDenied}
		unknown = workload.State{}
		pending = workload.State{Status: workload.StatusPending}
	)
	for _, test := range []struct {
		name     string
		patience time.Duration
		first    workload.State
		changes  []change
		code     codes.Code // OK means that a state is sent
		after    time.Duration
	}{
		{name: "ready", first: workload.State{Status: workload.StatusReady}, code: codes.OK},
		{name: "denied", first: denied, code: codes.PermissionDenied, after: time.Second},
		{name: "unknown", first: unknown, code: codes.Unavailable, after: 10 * time.Second},
		{name: "pending", first: pending, code: codes.Unavailable, after: 10 * time.Second},
		{name: "more patience", patience: time.Minute, first: pending, code: codes.Unavailable, after: time.Minute},
		{name: "more patience does not help who is denied", patience: time.Minute, first: denied, code: codes.PermissionDenied, after: time.Second},
		{name: "less patience than for news", patience: time.Millisecond, first: denied, code: codes.PermissionDenied, after: time.Millisecond},
		{name: "the pod was placed just now", first: denied,
			changes: []change{{900 * time.Millisecond, pending}, {5 * time.Second, workload.State{Status: workload.StatusReady}}},
			code:    codes.OK, after: 5900 * time.Millisecond},
		{name: "the agent comes into sync and knows no such pod", first: unknown,
			changes: []change{{5 * time.Second, denied}},
			code:    codes.PermissionDenied, after: 5 * time.Second},
		{name: "waiting does not start again", first: unknown,
			changes: []change{{9 * time.Second, pending}},
			code:    codes.Unavailable, after: 10 * time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ca := newAuthority(t, "example.org")
				source := &pods{}
				set := func(s workload.State) {
					if s.Status == workload.StatusReady {
						s = ready(t, ca, 1)
					}
					source.set(webPod, s)
				}
				set(test.first)
				sent := errors.New("sent")
				begun := time.Now()
				done := stream(t, source, workload.Config{Patience: test.patience}, func(any) error { return sent })
				for _, c := range test.changes {
					time.Sleep(c.after) // the bubble's time
					set(c.to)
				}
				err := <-done
				if errors.Is(err, sent) != (test.code == codes.OK) || test.code != codes.OK && status.Code(err) != test.code {
					t.Errorf("the stream ended with %v, want %v", err, test.code)
				}
				if after := time.Since(begun); after != test.after {
					t.Errorf("the stream ended after %v, want %v", after, test.after)
				}
			})
		})
	}
}

// What was sent stands until there is something better, or a "no".
func TestLastGoodStateStands(t *testing.T) {
	for name, worse := range map[string]func(workload.State) workload.State{
		"the agent lost its sync": func(workload.State) workload.State { return workload.State{} },
		"pending":                 func(workload.State) workload.State { return workload.State{Status: workload.StatusPending} },
		"expired": func(s workload.State) workload.State {
			time.Sleep(2 * time.Hour)
			return s
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ca := newAuthority(t, "example.org")
				source := &pods{}
				first := ready(t, ca, 1)
				source.set(webPod, first)
				sent := make(chan any, 10)
				done := stream(t, source, workload.Config{}, func(m any) error { sent <- m; return nil })
				<-sent

				source.set(webPod, worse(first))
				time.Sleep(24 * time.Hour)
				select {
				case m := <-sent:
					t.Fatalf("sent %v", m)
				case err := <-done:
					t.Fatalf("the stream ended with %v", err)
				default:
				}

				ca = newAuthority(t, "example.org")
				source.set(webPod, ready(t, ca, 2))
				<-sent
				source.set(webPod, workload.State{Status: workload.StatusDenied})
				if err := <-done; status.Code(err) != codes.PermissionDenied {
					t.Errorf("the stream ended with %v, want PermissionDenied", err)
				}
			})
		})
	}
}

// A refusal is not remembered: the next stream is decided afresh.
func TestRefusalIsNotRemembered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := &pods{}
		server := newServer(t, workload.Config{Source: source})
		self := self(t)
		sent := errors.New("sent")
		open := func() error {
			return server.Stream(t.Context(), self, nil, func(any) error { return sent })
		}
		if err := open(); status.Code(err) != codes.PermissionDenied {
			t.Fatalf("the stream ended with %v, want PermissionDenied", err)
		}
		source.set(webPod, ready(t, newAuthority(t, "example.org"), 1))
		begun := time.Now()
		if err := open(); !errors.Is(err, sent) || time.Since(begun) != 0 {
			t.Errorf("the stream ended with %v after %v, want a state at once", err, time.Since(begun))
		}
	})
}

// A client that does not read holds its own stream, and nothing else: not the pod's
// other streams, not the source, and of what it misses it gets the newest only.
func TestStalledReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newAuthority(t, "example.org")
		source := &pods{}
		source.set(webPod, ready(t, ca, 1))
		server := newServer(t, workload.Config{Source: source})
		stalled, reading := make(chan any), make(chan any)
		open := func(c chan any) <-chan error {
			done := make(chan error, 1)
			go func() {
				done <- server.Stream(t.Context(), self(t), nil, func(m any) error { c <- m; return nil })
			}()
			return done
		}
		doneStalled, doneReading := open(stalled), open(reading)
		synctest.Wait() // both have loaded the first
		for revision := range uint64(10) {
			<-reading
			source.set(webPod, ready(t, ca, revision+2))
		}
		<-reading
		synctest.Wait()
		if d, _ := server.Delivered().Load(); d.Streams != 2 || d.Revisions[ca.td] != 1 {
			t.Errorf("Delivered() = %+v, want both streams, and the stalled one at 1", d)
		}
		<-stalled // the oldest, which it was stuck with
		<-stalled // the newest
		synctest.Wait()
		if d, _ := server.Delivered().Load(); d.Streams != 2 || d.Revisions[ca.td] != 11 {
			t.Errorf("Delivered() = %+v, want both at 11", d)
		}
		source.set(webPod, workload.State{Status: workload.StatusDenied})
		if a, b := <-doneStalled, <-doneReading; status.Code(a) != codes.PermissionDenied || status.Code(b) != codes.PermissionDenied {
			t.Errorf("the streams ended with %v and %v, want PermissionDenied", a, b)
		}
		if d, _ := server.Delivered().Load(); d.Streams != 0 || len(d.Revisions) != 0 {
			t.Errorf("Delivered() = %+v, want nothing", d)
		}
		if source.open != 0 {
			t.Errorf("%d states were not released", source.open)
		}
	})
}

// Delivered is the lowest of all streams, and has no trust domain that a stream
// lacks.
func TestDelivered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, partner := newAuthority(t, "example.org"), newAuthority(t, "partner.example")
		next := newAuthority(t, "example.org")
		source := &pods{}
		server := newServer(t, workload.Config{Source: source, PodOf: func(p workload.Peer) (string, error) {
			return map[uint32]string{0: "a", 1: "b"}[p.UID], nil
		}})
		state := func(bundles ...workload.Bundle) workload.State {
			s := ready(t, ca, 0)
			s.Bundles = bundles
			return s
		}
		open := func(uid uint32) {
			p := self(t)
			p.UID = uid
			go server.Stream(t.Context(), p, nil, func(any) error { return nil })
			synctest.Wait()
		}
		want := func(step string, streams int, revisions map[string]uint64) {
			t.Helper()
			synctest.Wait()
			d, _ := server.Delivered().Load()
			got := make(map[string]uint64)
			for td, revision := range d.Revisions {
				got[td.Name()] = revision
			}
			if d.Streams != streams || !maps.Equal(got, revisions) {
				t.Errorf("%s: Delivered() = %d streams, %v, want %d, %v", step, d.Streams, got, streams, revisions)
			}
		}

		want("nothing is open", 0, nil)
		source.set("a", state(ca.bundle(5)))
		open(0)
		want("one stream", 1, map[string]uint64{"example.org": 5})
		open(1)
		want("a stream that waits is not counted", 1, map[string]uint64{"example.org": 5})
		source.set("b", state(ca.bundle(4), partner.bundle(1)))
		want("a stream that is behind, and that alone has the partner", 2, map[string]uint64{"example.org": 4})
		source.set("a", state(ca.bundle(6, next), partner.bundle(2)))
		want("both have the partner", 2, map[string]uint64{"example.org": 4, "partner.example": 1})
		source.set("b", state(ca.bundle(6, next), partner.bundle(2)))
		want("both have caught up", 2, map[string]uint64{"example.org": 6, "partner.example": 2})
		source.set("b", workload.State{Status: workload.StatusDenied})
		want("one has ended", 1, map[string]uint64{"example.org": 6, "partner.example": 2})
		source.set("a", state(ca.bundle(7, next)))
		want("the partner is gone", 1, map[string]uint64{"example.org": 7})
	})
}

func TestStreamEndsWithItsClientAndWithTheServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := &pods{}
		source.set(webPod, workload.State{Status: workload.StatusPending})
		server := newServer(t, workload.Config{Source: source})
		ctx, cancel := context.WithCancel(t.Context())
		draining := make(chan struct{})
		ends := make(chan error)
		go func() { ends <- server.Stream(ctx, self(t), draining, nil) }()
		synctest.Wait()
		cancel()
		if err := <-ends; status.Code(err) != codes.Canceled {
			t.Errorf("the stream ended with %v, want Canceled", err)
		}
		go func() { ends <- server.Stream(t.Context(), self(t), draining, nil) }()
		synctest.Wait()
		close(draining)
		if err := <-ends; status.Code(err) != codes.Unavailable {
			t.Errorf("the stream ended with %v, want Unavailable", err)
		}
	})
}

// stream runs a stream of this process, and tells how it ends.
func stream(t *testing.T, source workload.Source, c workload.Config, send func(any) error) <-chan error {
	t.Helper()
	c.Source = source
	server, self := newServer(t, c), self(t)
	done := make(chan error, 1)
	go func() { done <- server.Stream(t.Context(), self, nil, send) }()
	return done
}

// self is this process as a peer.
func self(t *testing.T) workload.Peer {
	t.Helper()
	p, err := workload.OpenPeer(int32(os.Getpid()))
	if err != nil {
		t.Error(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}
