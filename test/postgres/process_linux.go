package postgrestest

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"time"
)

// process is one running server: its first process, the postmaster, and one more
// for each connection and each task, all of them the postmaster's children. They
// cannot outlive the test that started it.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed once the postmaster has ended
}

// startProcess starts program in the folder dir and appends its output to the file
// log.
func startProcess(log, dir string, owner *syscall.Credential, program string, args ...string) (*process, error) {
	output, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer output.Close()
	p := &process{cmd: exec.Command(program, args...), done: make(chan struct{})}
	p.cmd.Dir, p.cmd.Stdout, p.cmd.Stderr = dir, output, output
	// When the postmaster dies its children see that, and end.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Credential: owner}
	started := make(chan error)
	go p.run(started)
	return p, <-started
}

// run owns the postmaster from its start to its end. It keeps its thread for as
// long: the kernel sends Pdeathsig when the thread that started the process ends,
// and the Go runtime may end an idle one at any time.
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

// stop asks the server to end without waiting for its clients, and reports whether
// it did. If not, it is killed.
func (p *process) stop() bool {
	_ = p.cmd.Process.Signal(syscall.SIGINT)
	select {
	case <-p.done:
		return true
	case <-time.After(patience):
		p.kill()
		return false
	}
}

// kill ends all processes of the server at once, and returns when none is left: as
// long as one is, no other server can have their folder.
func (p *process) kill() {
	children := p.freeze()
	for _, pid := range children {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	_ = p.cmd.Process.Kill()
	<-p.done
	for _, pid := range children { // which are not ours to wait for
		for deadline := time.Now().Add(patience); alive(pid) && time.Now().Before(deadline); {
			time.Sleep(time.Millisecond)
		}
	}
}

// freeze stops the postmaster, and then its children, of which there can be no
// more by then, nor can another process come by the number of one. It returns
// them.
func (p *process) freeze() (children []int) {
	postmaster := p.cmd.Process.Pid
	_ = p.cmd.Process.Signal(syscall.SIGSTOP)
	for state := byte('R'); state != 'T' && state != 'Z' && state != 0; state, _ = status(postmaster) {
		runtime.Gosched()
	}
	entries, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		panic(fmt.Sprintf("list processes: %v", err)) // the pattern is malformed
	}
	for _, entry := range entries {
		pid, err := strconv.Atoi(filepath.Base(entry))
		if err != nil {
			continue
		}
		if _, parent := status(pid); parent == postmaster {
			_ = syscall.Kill(pid, syscall.SIGSTOP)
			children = append(children, pid)
		}
	}
	return children
}

// thaw undoes freeze.
func (p *process) thaw() {
	for _, pid := range p.freeze() {
		_ = syscall.Kill(pid, syscall.SIGCONT)
	}
	_ = p.cmd.Process.Signal(syscall.SIGCONT)
}

func alive(pid int) bool {
	state, _ := status(pid)
	return state != 0 && state != 'Z' && state != 'X'
}

// status returns the state of a process, as a letter, and its parent (proc(5)). It
// returns zeros if there is none.
func status(pid int) (state byte, parent int) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0
	}
	// The name of the program, in parentheses, may have any characters in it.
	_, rest, _ := bytes.Cut(content[bytes.LastIndexByte(content, ')')+1:], []byte(" "))
	fields := bytes.Fields(rest)
	if len(fields) < 2 || len(fields[0]) != 1 {
		return 0, 0
	}
	parent, _ = strconv.Atoi(string(fields[1]))
	return fields[0][0], parent
}
