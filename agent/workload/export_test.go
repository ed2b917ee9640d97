package workload

import "context"

// Stream runs a FetchX509SVID stream without a socket, because nobody can wait for
// a socket in a synctest bubble.
func (s *Server) Stream(ctx context.Context, p Peer, draining <-chan struct{}, send func(any) error) error {
	return (&call{server: s, peer: p, render: x509SVIDs, send: send, draining: draining}).serve(ctx)
}

// OpenPeer is what a kernel before 6.5 makes of a peer.
func OpenPeer(pid int32) (Peer, error) {
	process, err := openProcess(pid)
	return Peer{PID: pid, process: process}, err
}

// Close closes what the connection would.
func (p Peer) Close() error { return p.process.Close() }
