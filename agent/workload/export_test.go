package workload

import (
	"context"

	"troth.dev/troth/internal/proc"
)

// Stream runs a FetchX509SVID stream without a socket, because nobody can wait for
// a socket in a synctest bubble.
func (s *Server) Stream(ctx context.Context, p Peer, draining <-chan struct{}, send func(any) error) error {
	return (&call{server: s, peer: p, render: x509SVIDs, send: send, draining: draining}).serve(ctx)
}

// OpenPeer is what a kernel before 6.5 makes of a peer.
func OpenPeer(pid int32) (Peer, error) {
	process, err := openProcess(pid)
	if err != nil {
		return Peer{}, err
	}
	started, err := proc.Started(pid)
	return Peer{PID: pid, process: process, started: started}, err
}

// MaxLeft is how many processes of a pod are remembered after their streams ended.
const MaxLeft = maxLeft

// As is the peer in another life: a process with the same handle that began later.
func (p Peer) As(started uint64) Peer {
	p.started = started
	return p
}

// Count is how many SVIDs, and how many processes of how many pods that went on with
// one, are remembered, expired or not.
func (s *Server) Count() (leaves, processes, pods int) {
	s.handed.mu.Lock()
	defer s.handed.mu.Unlock()
	for _, in := range s.handed.pods {
		processes += len(in.left)
	}
	return len(s.handed.count), processes, len(s.handed.pods)
}

// Close closes what the connection would.
func (p Peer) Close() error { return p.process.Close() }
