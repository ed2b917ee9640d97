package capture

import (
	"fmt"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// inside runs f on a thread that is in the network namespace ns, and returns when f
// has. What f opens, sockets and processes, is of that namespace; what f waits for
// it holds a thread for.
//
// f has a goroutine of its own, because a thread that does not find its way back
// must end with its goroutine, and the caller's goes on.
func inside(ns *os.File, f func() error) error {
	done := make(chan error, 1)
	go func() {
		v := visit{ns: ns}
		err := v.enter()
		if err == nil {
			err = f()
			if backErr := v.leave(); err == nil {
				err = backErr
			}
		}
		done <- err
	}()
	return <-done
}

// visit is a thread's stay in a network namespace.
type visit struct {
	ns   *os.File
	home int
	away bool
}

// enter locks the goroutine to its thread and takes that to the namespace.
func (v *visit) enter() error {
	runtime.LockOSThread()
	var err error
	if v.home, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open the thread's own network namespace: %w", err)
	}
	err = control(v.ns, func(fd int) error { return unix.Setns(fd, unix.CLONE_NEWNET) })
	if err != nil {
		unix.Close(v.home)
		runtime.UnlockOSThread()
		return fmt.Errorf("enter the network namespace: %w", err)
	}
	v.away = true
	return nil
}

// leave takes the thread home. If that fails the thread stays locked, and ends with
// its goroutine. A second call does nothing.
func (v *visit) leave() error {
	if !v.away {
		return nil
	}
	v.away = false
	err := unix.Setns(v.home, unix.CLONE_NEWNET)
	unix.Close(v.home)
	if err != nil {
		return fmt.Errorf("leave the network namespace: %w", err)
	}
	runtime.UnlockOSThread()
	return nil
}

// control calls f with the file's descriptor, which stays open meanwhile.
func control(file syscall.Conn, f func(fd int) error) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil {
		return err
	}
	return inner
}

// duplicate returns another descriptor of the same file, to be closed by the caller.
func duplicate(file *os.File) (*os.File, error) {
	var dup int
	err := control(file, func(fd int) error {
		var err error
		dup, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(dup), file.Name()), nil
}
