package workload

import (
	"encoding/hex"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"troth.dev/troth/internal/latest"
)

// Leaf names one X509-SVID, without its key.
type Leaf struct {
	// Authority is the id of the authority that signed the SVID: the lower-case
	// hexadecimal key identifier that its certificate gives for its issuer. What is
	// above an authority, under an upstream root, is not what agents know it by.
	Authority string
	Serial    string    // of the first certificate
	NotAfter  time.Time // of the first certificate, in UTC
}

// LeafOf returns the Leaf of an SVID that has at least one certificate.
func LeafOf(svid *x509svid.SVID) Leaf {
	first := svid.Certificates[0]
	return Leaf{
		Authority: hex.EncodeToString(first.AuthorityKeyId),
		Serial:    string(first.SerialNumber.Bytes()),
		NotAfter:  first.NotAfter.UTC(),
	}
}

func (s State) leaves() []Leaf {
	leaves := make([]Leaf, len(s.Identities))
	for n, identity := range s.Identities {
		leaves[n] = LeafOf(identity.SVID)
	}
	return leaves
}

// maxLeft is for how many processes of one pod it is remembered what they left
// with: as many as a pod may have open streams at the default limits.
const maxLeft = 128

// handedOut keeps what has been handed out and not been seen replaced.
//
// A stream holds what it was last sent, and while something is being sent, that
// too: it cannot be known how much of it has arrived. When a stream ends, its
// process goes on with what it had, until it is sent something newer on another
// stream. That it ends changes nothing: it may have written the key down for
// others of its pod.
//
// The memory is bounded by the limits of streams, by maxLeft processes for each
// pod, and beyond these by one SVID for each authority and pod: the one that lives
// longest, which no process is then thought to have given up before it expires.
type handedOut struct {
	changed latest.Value[struct{}] // set when an SVID joins or leaves count

	mu    sync.Mutex
	clock uint64                 // counts loads of states; guarded by mu, as is all below
	count map[Leaf]int           // how many streams, processes and pods hold it
	pods  map[string]*recipients // by UID, those that were sent something
	news  bool                   // whether count has another SVID than before, or one less
}

// recipients is who holds something in one pod.
type recipients struct {
	open map[*receipt]struct{}
	left map[process]*receipt
	rest map[string]Leaf // by authority
}

// process is one life of a process: a number alone comes again.
type process struct {
	pid     int32
	started uint64
}

// receipt is what one stream has been sent.
type receipt struct {
	of      *handedOut
	pod     string
	process process
	// loaded orders what the streams of a process are sent: it is the clock before
	// the state was loaded, and a state that was loaded later is no older.
	loaded, sentAt uint64
	sent, sending  []Leaf
	gone           bool // whether the pod is, and all that it was sent with it
}

func newHandedOut() *handedOut {
	return &handedOut{count: make(map[Leaf]int), pods: make(map[string]*recipients)}
}

// open returns the receipt of a new stream. The caller closes it.
func (h *handedOut) open(podUID string, p Peer) *receipt {
	return &receipt{of: h, pod: podUID, process: process{p.PID, p.started}}
}

// loading says that the state which may be sent next is about to be loaded.
func (r *receipt) loading() {
	r.of.mu.Lock()
	defer r.of.mu.Unlock()
	r.of.clock++
	r.loaded = r.of.clock
}

// begin records that leaves are about to be sent, and takes back what was recorded
// before and was not sent after all.
func (r *receipt) begin(leaves []Leaf) {
	r.of.change(func() {
		if len(leaves) > 0 {
			in := r.of.pods[r.pod]
			if in == nil {
				in = &recipients{
					open: make(map[*receipt]struct{}), left: make(map[process]*receipt), rest: make(map[string]Leaf),
				}
				r.of.pods[r.pod] = in
			}
			in.open[r] = struct{}{}
		}
		r.of.hold(leaves)
		r.of.release(r.sending)
		r.sending = leaves
	})
}

// done records that they were sent: they replace what the stream was sent before,
// and what streams of the same process were sent before they ended.
func (r *receipt) done() {
	if len(r.sending) == 0 {
		return
	}
	r.of.change(func() {
		r.of.release(r.sent)
		r.sent, r.sending, r.sentAt = r.sending, nil, r.loaded
		in := r.of.pods[r.pod]
		if left := in.left[r.process]; left != nil && left.sentAt < r.sentAt {
			r.of.release(left.sent)
			delete(in.left, r.process)
		}
	})
}

// podGone says that the stream ends because its pod has.
func (r *receipt) podGone() { r.gone = true }

// close records that the stream has ended.
func (r *receipt) close() {
	r.of.change(func() {
		if in := r.of.pods[r.pod]; in != nil {
			delete(in.open, r)
			r.of.leave(in, r)
			r.of.tidy(r.pod)
		}
	})
}

// leave records what a process goes on with after one of its streams has ended. The
// caller holds mu.
func (h *handedOut) leave(in *recipients, r *receipt) {
	left := in.left[r.process]
	unsure := len(r.sending) > 0
	if unsure {
		// It may have arrived or not: the process has the one or the other.
		r.sent, r.sending, r.sentAt = append(r.sent, r.sending...), nil, r.loaded
	}
	superseded := r.gone || len(r.sent) == 0 || left != nil && left.sentAt > r.sentAt
	for other := range in.open {
		superseded = superseded || other.process == r.process && other.sentAt > r.sentAt
	}
	if superseded {
		h.release(r.sent)
		return
	}
	if left == nil && len(in.left) >= maxLeft {
		h.expire(in, false, time.Now())
		if len(in.left) >= maxLeft {
			h.leaveAny(in, r.sent)
			return
		}
	}
	switch {
	case left != nil && unsure:
		r.sent = append(r.sent, left.sent...)
	case left != nil:
		h.release(left.sent)
	}
	in.left[r.process] = r
}

// leaveAny records what some process of a pod goes on with, whichever it is. The
// caller holds mu.
func (h *handedOut) leaveAny(in *recipients, leaves []Leaf) {
	for _, leaf := range leaves {
		known, ok := in.rest[leaf.Authority]
		if ok && !known.NotAfter.Before(leaf.NotAfter) {
			h.release([]Leaf{leaf})
			continue
		}
		if ok {
			h.release([]Leaf{known})
		}
		in.rest[leaf.Authority] = leaf // which goes on to be held
	}
}

// unexpired returns what is held at the time now, each SVID once. gone says which
// pods are no longer there: what their processes left with is forgotten.
func (h *handedOut) unexpired(now time.Time, gone func(podUID string) bool) []Leaf {
	h.mu.Lock()
	uids := make([]string, 0, len(h.pods))
	for uid := range h.pods {
		uids = append(uids, uid)
	}
	h.mu.Unlock()
	dead := make(map[string]bool)
	for _, uid := range uids { // not under mu: it asks others
		dead[uid] = gone(uid)
	}

	h.mu.Lock()
	defer h.mu.Unlock()
	for uid, in := range h.pods {
		h.expire(in, dead[uid], now)
		h.tidy(uid)
	}
	leaves := make([]Leaf, 0, len(h.count))
	for leaf := range h.count {
		if now.Before(leaf.NotAfter) {
			leaves = append(leaves, leaf)
		}
	}
	return leaves
}

// expire forgets what processes went on with and has expired, or all of it if their
// pod is gone. The caller holds mu.
func (h *handedOut) expire(in *recipients, gone bool, now time.Time) {
	expired := func(leaves []Leaf) bool {
		alive := func(leaf Leaf) bool { return now.Before(leaf.NotAfter) }
		return gone || !slices.ContainsFunc(leaves, alive)
	}
	for p, left := range in.left {
		if expired(left.sent) {
			h.release(left.sent)
			delete(in.left, p)
		}
	}
	for authority, leaf := range in.rest {
		if expired([]Leaf{leaf}) {
			h.release([]Leaf{leaf})
			delete(in.rest, authority)
		}
	}
}

// tidy forgets a pod of which nothing is left. The caller holds mu.
func (h *handedOut) tidy(podUID string) {
	if in := h.pods[podUID]; len(in.open)+len(in.left)+len(in.rest) == 0 {
		delete(h.pods, podUID)
	}
}

func (h *handedOut) hold(leaves []Leaf) {
	for _, leaf := range leaves {
		h.count[leaf]++
		h.news = h.news || h.count[leaf] == 1
	}
}

func (h *handedOut) release(leaves []Leaf) {
	for _, leaf := range leaves {
		if h.count[leaf]--; h.count[leaf] == 0 {
			delete(h.count, leaf)
			h.news = true
		}
	}
}

// change runs edit under mu, and tells whoever waits if it changed what is held.
func (h *handedOut) change(edit func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.news = false
	edit()
	if h.news {
		h.changed.Set(struct{}{})
	}
}
