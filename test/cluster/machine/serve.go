package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/rpc"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"troth.dev/troth/test/cluster/machine/spec"
)

// serve is process 1 of a machine that is complete. It never returns but by an error.
func serve(m spec.Machine) error {
	ready := os.NewFile(3, "ready")
	ends := &programs{running: map[int]chan struct{}{}, ended: map[int]string{}}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGCHLD)
	go ends.reap(signals)

	if m.Forward != "" {
		listener, err := net.FileListener(os.NewFile(4, "listener"))
		if err != nil {
			return err
		}
		go forward(listener, m.Forward)
	}
	// Programs have none of this process's files.
	unix.CloseOnExec(3)
	unix.CloseOnExec(4)

	server := rpc.NewServer()
	if err := server.RegisterName(spec.Service, ends); err != nil {
		return err
	}
	listener, err := net.Listen("unix", m.Socket)
	if err != nil {
		return err
	}
	if _, err := ready.Write([]byte{1}); err != nil {
		return err
	}
	server.Accept(listener)
	return errors.New("the socket is closed")
}

// programs are those that the machine was told to start. Its methods are its service's.
type programs struct {
	mu      sync.Mutex
	running map[int]chan struct{}
	ended   map[int]string
}

// Start starts a program.
func (p *programs) Start(program spec.Program, pid *int) error {
	log, err := os.OpenFile(program.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()

	// Until it is written down, whose end it was cannot be told.
	p.mu.Lock()
	defer p.mu.Unlock()
	*pid, err = syscall.ForkExec(program.Path, append([]string{program.Path}, program.Args...), &syscall.ProcAttr{
		Env:   program.Env,
		Files: []uintptr{null.Fd(), log.Fd(), log.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fmt.Errorf("start %s: %w", program.Path, err)
	}
	p.running[*pid] = make(chan struct{})
	return nil
}

// Wait waits for the end of a program, and says how it ended if not well. A program is
// waited for once.
func (p *programs) Wait(pid int, how *string) error {
	p.mu.Lock()
	done := p.running[pid]
	p.mu.Unlock()
	if done == nil {
		return fmt.Errorf("no program was started as process %d", pid)
	}
	<-done
	p.mu.Lock()
	defer p.mu.Unlock()
	*how = p.ended[pid]
	delete(p.ended, pid)
	delete(p.running, pid)
	return nil
}

// Signal signals a program.
func (p *programs) Signal(s spec.Signal, _ *bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ended := p.ended[s.PID]; ended || p.running[s.PID] == nil {
		return fmt.Errorf("no program runs as process %d", s.PID)
	}
	return syscall.Kill(s.PID, syscall.Signal(s.Number))
}

// reap takes note of every process that ends: of those that were started here, and of
// the orphans of a machine, which are all its process 1's.
func (p *programs) reap(signals <-chan os.Signal) {
	for range signals {
		for {
			var status syscall.WaitStatus
			pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
			if errors.Is(err, syscall.EINTR) {
				continue
			}
			if err != nil || pid == 0 {
				break
			}
			p.note(pid, status)
		}
	}
}

func (p *programs) note(pid int, status syscall.WaitStatus) {
	p.mu.Lock()
	defer p.mu.Unlock()
	done := p.running[pid]
	if done == nil {
		return
	}
	switch {
	case status.Signaled():
		p.ended[pid] = "ended by " + status.Signal().String()
	case status.ExitStatus() != 0:
		p.ended[pid] = fmt.Sprintf("ended with status %d", status.ExitStatus())
	default:
		p.ended[pid] = ""
	}
	close(done)
}

// forward takes connections from outside of the machine to an address inside.
func forward(listener net.Listener, address string) {
	for {
		outside, err := listener.Accept()
		if err != nil {
			return
		}
		go func() {
			defer outside.Close()
			inside, err := net.Dial("tcp", address)
			if err != nil {
				return
			}
			defer inside.Close()
			go func() {
				_, _ = io.Copy(inside, outside)
				_ = inside.(*net.TCPConn).CloseWrite()
			}()
			_, _ = io.Copy(outside, inside)
		}()
	}
}
