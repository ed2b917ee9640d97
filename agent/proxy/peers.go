package proxy

import (
	"cmp"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// Peer is somebody who speaks plaintext to a pod, whom STRICT would turn away.
type Peer struct {
	Pod    string     // the UID of the pod that is spoken to
	Port   uint16     // of its container
	Source netip.Addr // where the connection comes from
	Last   time.Time  // when there was one; at most a minute ago if there is one now
}

// Peers remembers who speaks plaintext, one Peer for each pod, port and source. It
// is safe for concurrent use.
type Peers struct {
	mu    sync.Mutex
	known *simplelru.LRU[peerKey, time.Time] // guarded by mu
}

type peerKey struct {
	pod    string
	port   uint16
	source netip.Addr
}

// NewPeers returns a Peers that remembers the size peers that were seen last. A
// size below 1 counts as 1.
func NewPeers(size int) *Peers {
	known, err := simplelru.NewLRU[peerKey, time.Time](max(size, 1), nil)
	if err != nil {
		panic("proxy: " + err.Error()) // only for a size below 1
	}
	return &Peers{known: known}
}

// Seen remembers p. An IPv4 address is the same one when it is mapped into IPv6.
func (p *Peers) Seen(peer Peer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	key := peerKey{peer.Pod, peer.Port, peer.Source.Unmap()}
	if last, ok := p.known.Peek(key); ok && last.After(peer.Last) {
		peer.Last = last
	}
	p.known.Add(key, peer.Last)
}

// Recent returns the peers that were seen at since or later, newest first.
func (p *Peers) Recent(since time.Time) []Peer {
	p.mu.Lock()
	var recent []Peer
	for _, key := range p.known.Keys() {
		if last, _ := p.known.Peek(key); !last.Before(since) {
			recent = append(recent, Peer{key.pod, key.port, key.source, last})
		}
	}
	p.mu.Unlock()
	slices.SortFunc(recent, func(a, b Peer) int {
		return cmp.Or(b.Last.Compare(a.Last), cmp.Compare(a.Pod, b.Pod),
			cmp.Compare(a.Port, b.Port), a.Source.Compare(b.Source))
	})
	return recent
}
