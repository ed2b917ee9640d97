package workload

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"troth.dev/troth/internal/proc"
)

// peerOf asks the kernel which process connected c. The answer is the process that
// called connect, not whoever else has come to hold the socket.
func peerOf(c *net.UnixConn) (Peer, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return Peer{}, err
	}
	var p Peer
	var peerErr error
	if err := raw.Control(func(fd uintptr) { p, peerErr = peerOfSocket(int(fd)) }); err != nil {
		return Peer{}, err
	}
	return p, peerErr
}

func peerOfSocket(fd int) (Peer, error) {
	cred, err := proc.PeerOf(fd)
	if err != nil {
		return Peer{}, err
	}
	p := Peer{PID: cred.PID, UID: cred.UID, GID: cred.GID}
	if p.PID <= 0 {
		return p, errors.New("the peer is in a PID namespace that this process cannot see: the agent's pod needs hostPID: true")
	}
	pidfd, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	switch {
	case err == nil:
		p.process = os.NewFile(uintptr(pidfd), "pidfd")
	case !errors.Is(err, unix.ENOPROTOOPT):
		return p, fmt.Errorf("handle on process %d: %w", p.PID, err)
	default:
		if p.process, err = openProcess(p.PID); err != nil {
			return p, err
		}
	}
	// A process that lives after it was read was the one that was read.
	if started, err := proc.Started(p.PID); err == nil && p.Alive() == nil {
		p.started = started
	}
	return p, nil
}

// openProcess opens a handle on the process that has the number pid, for kernels
// before 6.5, which do not keep one with the socket.
//
// That leaves a gap which only the newer kernel closes: a process that connects,
// ends, and has its number given again before the connection is accepted is taken
// for the one that came after. It is as wide as the agent is slow to accept.
func openProcess(pid int32) (*os.File, error) {
	before, err := proc.Started(pid)
	if err != nil {
		return nil, err
	}
	pidfd, err := unix.PidfdOpen(int(pid), 0)
	if err != nil {
		return nil, fmt.Errorf("handle on process %d: %w", pid, err)
	}
	process := os.NewFile(uintptr(pidfd), "pidfd")
	after, err := proc.Started(pid)
	if err == nil && after != before {
		err = fmt.Errorf("the number %d went to another process", pid)
	}
	if err != nil {
		process.Close()
		return nil, err
	}
	return process, nil
}

// Alive returns nil if the process that connected still runs, and an error if it
// has ended, even if nobody has reaped it yet, or if its connection was closed.
func (p Peer) Alive() error {
	if p.process == nil {
		return errors.New("there is no handle on the process")
	}
	raw, err := p.process.SyscallConn()
	if err != nil {
		return err
	}
	// A pidfd is readable once its process has ended. Signal 0 would still reach a
	// zombie, and would need the right to signal.
	var ended int
	var pollErr error
	err = raw.Control(func(fd uintptr) {
		for {
			ended, pollErr = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
			if !errors.Is(pollErr, unix.EINTR) {
				return
			}
		}
	})
	switch {
	case err != nil:
		return fmt.Errorf("process %d: %w", p.PID, err)
	case pollErr != nil:
		return fmt.Errorf("process %d: %w", p.PID, pollErr)
	case ended > 0:
		return fmt.Errorf("process %d has ended", p.PID)
	}
	return nil
}

// CgroupPod returns the UID of the pod that p runs in, by the cgroup that the
// kernel has it in. The cgroup is the kubelet's to choose, and the workload's only
// from its own container downwards, which [ParseCgroup] takes into account. The
// mount table, where others have looked too, is the workload's own, and is not
// read.
//
// The answer is good only if [Peer.Alive] returns nil afterwards.
func CgroupPod(p Peer) (podUID string, err error) {
	file, err := proc.Read(p.PID, "cgroup", maxCgroupFile+1)
	if err != nil {
		return "", err
	}
	podUID, _, err = ParseCgroup(file)
	if err != nil {
		return "", fmt.Errorf("/proc/%d/cgroup: %w", p.PID, err)
	}
	return podUID, nil
}
