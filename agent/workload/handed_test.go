package workload_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"troth.dev/troth/agent/workload"
)

// handing is a server in a bubble, with one pod whose SVIDs the test sets.
type handing struct {
	*testing.T

	ca     *authority
	source *pods
	server *workload.Server
	self   workload.Peer
	svids  []*x509svid.SVID // all that were set, in order
}

func newHanding(t *testing.T) *handing {
	h := &handing{T: t, ca: newAuthority(t, "example.org"), source: &pods{}, self: self(t)}
	h.server = newServer(t, workload.Config{Source: h.source, Limits: workload.Limits{StreamsPerPod: 1000, ConnectionsPerPod: 1000}})
	return h
}

// issue gives the pod its next SVID.
func (h *handing) issue(life time.Duration) {
	h.Helper()
	s := ready(h.T, h.ca, uint64(len(h.svids)+1))
	s.Identities[0].SVID = h.ca.issue(h.T, "/ns/shop/sa/web", life)
	h.svids = append(h.svids, s.Identities[0].SVID)
	h.source.set(webPod, s)
	synctest.Wait()
}

// reader is a stream whose client reads when the test says so.
type reader struct {
	read chan error // nil lets one message through, and an error breaks the stream
	done chan error
	stop chan struct{}
}

// open opens a stream of a process, and reads its first message unless stalled.
func (h *handing) open(started uint64) *reader {
	r := h.stalled(started)
	r.next()
	return r
}

func (h *handing) stalled(started uint64) *reader {
	r := &reader{read: make(chan error), done: make(chan error, 1), stop: make(chan struct{})}
	go func() {
		r.done <- h.server.Stream(h.Context(), h.self.As(started), r.stop, func(any) error { return <-r.read })
	}()
	synctest.Wait()
	return r
}

func (r *reader) next() {
	r.read <- nil
	synctest.Wait()
}

func (r *reader) end() {
	close(r.stop)
	<-r.done
}

// want checks which of the SVIDs are out, by their place in the order.
func (h *handing) want(when string, want ...int) {
	h.Helper()
	out, _ := h.server.HandedOut(time.Now())
	var got []int
	for n, svid := range h.svids {
		if slices.Contains(out, workload.LeafOf(svid)) {
			got = append(got, n)
		}
	}
	if len(got) != len(out) || !slices.Equal(got, want) {
		h.Errorf("%s: SVIDs %v of %d are out, want %v", when, got, len(out), want)
	}
}

// nothing checks that nothing is remembered of what is no more.
func (h *handing) nothing() {
	h.Helper()
	if leaves, processes, pods := h.server.Count(); leaves+processes+pods != 0 {
		h.Errorf("%d SVIDs, %d processes and %d pods are remembered of nothing", leaves, processes, pods)
	}
}

// Which SVIDs count as handed out and not replaced, rule by rule.
func TestHandedOut(t *testing.T) {
	for name, rule := range map[string]func(*handing){
		"nothing before the first, and an open stream holds what it was sent last": func(h *handing) {
			h.issue(time.Hour)
			h.want("before a stream")
			r := h.open(1)
			h.want("sent", 0)
			h.issue(time.Hour)
			h.want("while the next is being sent", 0, 1)
			r.next()
			h.want("when it is sent", 1)
			r.end()
		},
		"it counts before it is sent": func(h *handing) {
			h.issue(time.Hour)
			r := h.stalled(1)
			h.want("being sent", 0)
			r.next()
			r.end()
		},
		"two streams, one of them behind": func(h *handing) {
			h.issue(time.Hour)
			a, b := h.open(1), h.open(2)
			h.issue(time.Hour)
			a.next()
			h.want("one has read", 0, 1)
			b.next()
			h.want("both have", 1)
			a.end()
			b.end()
		},
		"who fetched once goes on with it until it expires": func(h *handing) {
			h.issue(time.Hour)
			h.open(1).end()
			h.issue(2 * time.Hour)
			h.open(2).end()
			h.want("two processes", 0, 1)
			time.Sleep(time.Hour)
			h.want("after an hour", 1)
			time.Sleep(time.Hour)
			h.want("after two")
			h.nothing()
		},
		"a newer stream of the same process replaces it, an older one does not": func(h *handing) {
			h.issue(time.Hour)
			late := h.stalled(1) // with the first SVID
			h.open(1).end()
			h.issue(time.Hour)
			h.open(1).end()
			h.want("a second stream had the second", 0, 1)
			h.issue(time.Hour)
			late.next()
			h.want("the first stream has the first and is being sent the third", 0, 1, 2)
			late.next()
			h.want("and has the third", 2)
			late.end()
			h.want("and is closed", 2)
		},
		"another life of the process does not replace it": func(h *handing) {
			h.issue(time.Hour)
			h.open(1).end()
			h.issue(time.Hour)
			h.open(2).end()
			h.want("both", 0, 1)
		},
		"a stream that ends beside a newer one of its process leaves nothing": func(h *handing) {
			h.issue(time.Hour)
			old := h.open(1)
			h.issue(time.Hour) // stuck in old
			r := h.open(1)
			h.want("both", 0, 1)
			old.next()
			old.end()
			h.want("the older one ended", 1)
			r.end()
			h.want("both ended", 1)
		},
		"a stream that breaks while it is sent to may hold either": func(h *handing) {
			h.issue(time.Hour)
			r := h.open(1)
			h.issue(time.Hour)
			r.read <- errors.New("broken")
			<-r.done
			h.want("broken", 0, 1)
			h.issue(time.Hour)
			h.open(1).end()
			h.want("its process has come back", 2)
		},
		"one that breaks does not hide what its process had before": func(h *handing) {
			h.issue(time.Hour)
			r := h.stalled(1)
			h.open(1).end() // the same SVID, on another stream
			h.issue(time.Hour)
			r.read <- errors.New("broken")
			<-r.done
			h.want("broken", 0)
		},
		"the pod is gone": func(h *handing) {
			h.issue(time.Hour)
			h.open(1).end()
			r := h.open(2)
			h.source.set(webPod, workload.State{Status: workload.StatusDenied})
			synctest.Wait()
			<-r.done
			h.want("gone")
			h.nothing()
		},
		"nothing is left with by a stream that ends because the pod is gone": func(h *handing) {
			h.issue(time.Hour)
			r := h.open(1)
			h.source.set(webPod, workload.State{Status: workload.StatusDenied})
			<-r.done
			h.nothing() // though nobody has asked since
		},
		"an agent out of sync forgets nothing": func(h *handing) {
			h.issue(time.Hour)
			h.open(1).end()
			h.source.set(webPod, workload.State{})
			h.want("out of sync", 0)
		},
		"more processes than are remembered": func(h *handing) {
			h.issue(2 * time.Hour)
			for n := range workload.MaxLeft + 5 {
				h.open(uint64(n + 1)).end()
			}
			h.issue(time.Hour)
			for n := range 2 * workload.MaxLeft {
				h.open(uint64(n + 1)).end()
			}
			h.want("all come back but five, and others", 0, 1)
			time.Sleep(time.Hour)
			// The second one is no longer known to be held by anybody: it has expired.
			h.want("the second has expired", 0)
			time.Sleep(time.Hour)
			h.want("the first has too")
		},
		"news": func(h *handing) {
			h.issue(time.Hour)
			told := func(when string, want bool, do func()) {
				_, changed := h.server.HandedOut(time.Now())
				do()
				select {
				case <-changed:
					if !want {
						h.Errorf("%s: told of nothing", when)
					}
				default:
					if want {
						h.Errorf("%s: not told", when)
					}
				}
			}
			var a, b *reader
			told("the first stream", true, func() { a = h.open(1) })
			told("a second with the same", false, func() { b = h.open(2) })
			told("a new SVID is on its way", true, func() { h.issue(time.Hour) })
			told("one stream has it", false, func() { a.next() })
			told("the last stream has it", true, func() { b.next() })
			told("a stream ends", false, func() { a.end() })
			b.end()
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { rule(newHanding(t)) })
		})
	}
}

// Between the moment at which a stream loads a state and that at which it is on
// record with it, the next may come. Whoever published that and read the record has
// not seen the stream: it must not send the older one any more.
func TestReplacedBeforeItIsOnRecord(t *testing.T) {
	// The process is asked for its pod when the stream opens, and again before each
	// message, after the state was loaded.
	for name, at := range map[string]int{"the first message": 2, "a later one": 3} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ca, source := newAuthority(t, "example.org"), &pods{}
				overtaken, next := ready(t, ca, 8), ready(t, ca, 9)
				asked := 0
				server := newServer(t, workload.Config{Source: source, PodOf: func(workload.Peer) (string, error) {
					if asked++; asked == at {
						source.set(webPod, next)
					}
					return webPod, nil
				}})
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				var sent [][]byte
				open := func() {
					go server.Stream(ctx, self(t), nil, func(m any) error {
						sent = append(sent, m.(*workloadpb.X509SVIDResponse).GetSvids()[0].GetX509Svid())
						return nil
					})
					synctest.Wait()
				}
				if at == 2 {
					source.set(webPod, overtaken)
					open()
				} else {
					source.set(webPod, ready(t, ca, 7))
					open()
					source.set(webPod, overtaken)
					synctest.Wait()
				}
				svid := overtaken.Identities[0].SVID
				for _, chain := range sent {
					if bytes.HasPrefix(chain, svid.Certificates[0].Raw) {
						t.Error("a state was sent after the next had taken its place")
					}
				}
				out, _ := server.HandedOut(time.Now())
				if d, _ := server.Delivered().Load(); len(sent) != at-1 || len(out) != 1 || slices.Contains(out, workload.LeafOf(svid)) || d.Revisions[ca.td] != 9 {
					t.Errorf("%d messages sent, %d SVIDs out, delivered %+v; want %d, the newest, and revision 9", len(sent), len(out), d, at-1)
				}
			})
		})
	}
}

// However many processes come, fetch once and go, what is remembered of them has a
// bound.
func TestHandedOutIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHanding(t)
		for range 50 {
			h.issue(time.Hour)
			for n := range 10 {
				h.open(uint64(len(h.svids)*100 + n)).end()
			}
		}
		if leaves, processes, pods := h.server.Count(); leaves > workload.MaxLeft+1 || processes > workload.MaxLeft || pods != 1 {
			t.Errorf("%d SVIDs, %d processes and %d pods are remembered, want at most %d, %d and 1",
				leaves, processes, pods, workload.MaxLeft+1, workload.MaxLeft)
		}
	})
}

// The process of a connection is known by its number and its start: a process that
// fetches again replaces what it had, another one does not.
func TestProcessesAreToldApart(t *testing.T) {
	ca := newAuthority(t, "example.org")
	source := &pods{}
	server, path := start(t, workload.Config{Source: source})
	out := func(when string, want int) {
		t.Helper()
		deadline := time.After(20 * time.Second)
		for {
			leaves, changed := server.HandedOut(time.Now())
			delivered, ended := server.Delivered().Load()
			if len(leaves) == want && delivered.Streams == 0 {
				return
			}
			select {
			case <-changed:
			case <-ended:
			case <-deadline:
				t.Fatalf("%s: %d SVIDs are out on %d streams, want %d on none", when, len(leaves), delivered.Streams, want)
			}
		}
	}
	for n := range 3 {
		source.set(webPod, ready(t, ca, uint64(n+1)))
		conn := dial(t, path)
		recv(t, fetchSVID(t, conn))
		conn.Close()
		out(fmt.Sprintf("the test has fetched %d times", n+1), 1)
	}
	source.set(webPod, ready(t, ca, 4))
	run(t, "fetch", nil, path, "65534", "65533").line(t)
	out("a child has fetched", 2)
}
