package apiserver

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"
)

// process is one running program. It cannot outlive the test that started it.
type process struct {
	cmd  *exec.Cmd
	log  string        // the file that has its output
	done chan struct{} // closed once it has ended
}

// startProcess starts program and appends its output to the file log.
func startProcess(log, program string, args ...string) (*process, error) {
	output, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer output.Close()
	p := &process{cmd: exec.Command(program, args...), log: log, done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = output, output
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go p.run(started)
	return p, <-started
}

// run owns the process from its start to its end. It keeps its thread for as
// long: the kernel sends Pdeathsig when the thread that started the process
// ends, and the Go runtime may end an idle one at any time.
func (p *process) run(started chan<- error) {
	defer close(p.done)
	runtime.LockOSThread()
	if err := p.cmd.Start(); err != nil {
		started <- err
		return
	}
	started <- nil
	// How it ended is in its log.
	_ = p.cmd.Wait()
}

// stop ends the process, asks for it first if patience is not zero, and returns
// when it has ended.
func (p *process) stop(patience time.Duration) {
	if patience > 0 {
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-p.done:
		case <-time.After(patience):
		}
	}
	_ = p.cmd.Process.Kill()
	<-p.done
}

// tail returns the last lines of the process's log, for people.
func (p *process) tail() string {
	const lines = 40
	content, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	all := bytes.Split(bytes.TrimSpace(content), []byte("\n"))
	last := all[max(0, len(all)-lines):]
	return fmt.Sprintf("the last %d lines of %s:\n%s", len(last), p.log, bytes.Join(last, []byte("\n")))
}

// reservePort returns a free port of the loopback interface that stays ours
// until release is called, also while nobody listens on it: a socket that is
// bound and never listens holds it. The kernel lets a process of the same user
// listen on it as well if both ask for SO_REUSEPORT, and gives the port to
// nobody else. That leaves no race between finding a port and using it, nor
// during an outage.
func reservePort() (port int, release func(), err error) {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, nil, fmt.Errorf("reserve a port: %w", err)
	}
	fail := func(err error) (int, func(), error) {
		syscall.Close(fd)
		return 0, nil, fmt.Errorf("reserve a port: %w", err)
	}
	const soReusePort = 0xf // SO_REUSEPORT, which package syscall lacks
	if err := syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, soReusePort, 1); err != nil {
		return fail(err)
	}
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return fail(err)
	}
	address, err := syscall.Getsockname(fd)
	if err != nil {
		return fail(err)
	}
	return address.(*syscall.SockaddrInet4).Port, func() { syscall.Close(fd) }, nil
}
