package cluster

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"troth.dev/troth/test/cluster/machine/spec"
)

// machine is one machine of the cluster, made of namespaces by the program machine.
type machine struct {
	spec.Machine
	keeper *exec.Cmd
	life   io.Closer // when this is closed, or this process ends, so does the machine
	pid    int       // of its process 1, as we see it
	rpc    *rpc.Client
	runs   atomic.Uint32
	path   string // PATH of what runs in it
}

// startMachine makes a machine. What connects to listener, unless that is nil, is
// connected to the address m.Forward inside.
func startMachine(program string, m spec.Machine, path string, listener *net.TCPListener) (*machine, error) {
	content, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	file := filepath.Join(m.Folder, m.Name+".json")
	if err := os.WriteFile(file, content, 0o600); err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(m.Folder, m.Name+".log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	keeper := exec.Command(program, "keep", file)
	keeper.Stderr = log
	// An interrupt is for us, who end the keeper.
	keeper.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if listener != nil {
		file, err := listener.File()
		if err != nil {
			return nil, err
		}
		defer file.Close()
		keeper.ExtraFiles = []*os.File{file}
	}
	life, err := keeper.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := keeper.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := keeper.Start(); err != nil {
		return nil, err
	}
	result := &machine{Machine: m, keeper: keeper, life: life, path: path}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err == nil {
		result.pid, err = strconv.Atoi(strings.TrimSpace(line))
	}
	if err == nil {
		result.rpc, err = rpc.Dial("unix", m.Socket)
	}
	if err != nil {
		_ = result.close()
		said, _ := os.ReadFile(log.Name())
		return nil, fmt.Errorf("make machine %s: %w (it needs root)\n%s", m.Name, err, said)
	}
	return result, nil
}

// close ends the machine with all that runs in it, and returns when nothing of it is left.
func (m *machine) close() error {
	if m.rpc != nil {
		m.rpc.Close()
	}
	m.life.Close()
	if err := m.keeper.Wait(); err != nil {
		said, _ := os.ReadFile(filepath.Join(m.Folder, m.Name+".log"))
		return fmt.Errorf("end machine %s: %w\n%s", m.Name, err, said)
	}
	return nil
}

// start starts a program whose output goes to the log of that name. What it returns is
// closed when the program has ended.
func (m *machine) start(name, program string, args ...string) (ended <-chan struct{}, err error) {
	var pid int
	if err := m.rpc.Call(spec.Service+".Start", m.program(m.log(name), program, args), &pid); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		var how string
		_ = m.rpc.Call(spec.Service+".Wait", pid, &how)
	}()
	return done, nil
}

// run runs a program to its end, and returns what it printed.
func (m *machine) run(ctx context.Context, program string, args ...string) (string, error) {
	log := filepath.Join(m.Folder, fmt.Sprintf("%s-run-%d.log", m.Name, m.runs.Add(1)))
	defer os.Remove(log)
	var pid int
	if err := m.rpc.Call(spec.Service+".Start", m.program(log, program, args), &pid); err != nil {
		return "", fmt.Errorf("on %s: %w", m.Name, err)
	}
	var how string
	call := m.rpc.Go(spec.Service+".Wait", pid, &how, nil)
	select {
	case <-call.Done:
	case <-ctx.Done():
		_ = m.rpc.Call(spec.Service+".Signal", spec.Signal{PID: pid, Number: int(syscall.SIGKILL)}, new(bool))
		<-call.Done
		return "", fmt.Errorf("on %s: %s: %w", m.Name, program, ctx.Err())
	}
	output, err := os.ReadFile(log)
	switch {
	case call.Error != nil:
		return "", fmt.Errorf("on %s: %s: %w", m.Name, program, call.Error)
	case err != nil:
		return "", err
	case how != "":
		return string(output), fmt.Errorf("on %s: %s %q %s\n%s", m.Name, program, args, how, output)
	}
	return string(output), nil
}

func (m *machine) program(log, program string, args []string) spec.Program {
	return spec.Program{
		Path: program,
		Args: args,
		Env:  []string{"PATH=" + m.path, "HOME=" + m.Folder, "LANG=C.UTF-8"},
		Log:  log,
	}
}

func (m *machine) log(name string) string {
	return filepath.Join(m.Folder, m.Name+"-"+name+".log")
}

// ip runs ip(8) in the machine's network namespace and this process's others, so that
// it can name the process of another machine.
func (m *machine) ip(ctx context.Context, args ...string) error {
	args = append([]string{"--target", strconv.Itoa(m.pid), "--net", "ip"}, args...)
	output, err := exec.CommandContext(ctx, "nsenter", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("in the network of %s: %q: %w\n%s(it needs iproute2)", m.Name, args, err, output)
	}
	return nil
}

// tail returns the last lines of each log in dir, for people.
func tail(dir string) string {
	const lines = 25
	names, err := filepath.Glob(filepath.Join(dir, "*.log"))
	if err != nil {
		return err.Error()
	}
	var tails strings.Builder
	for _, name := range names {
		content, err := os.ReadFile(name)
		if err != nil || len(content) == 0 || filepath.Base(name) == auditLog {
			continue
		}
		all := bytes.Split(bytes.TrimSpace(content), []byte("\n"))
		last := all[max(0, len(all)-lines):]
		fmt.Fprintf(&tails, "the last %d lines of %s:\n%s\n\n", len(last), name, bytes.Join(last, []byte("\n")))
	}
	return tails.String()
}

// await polls until check returns nil, which nobody tells of, or ctx or patience ends.
func await(ctx context.Context, patience time.Duration, check func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	poll := time.NewTicker(100 * time.Millisecond)
	defer poll.Stop()
	for {
		err := check(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-poll.C:
		case <-ctx.Done():
			return errors.Join(err, context.Cause(ctx))
		}
	}
}

// output runs cmd to its end and returns its standard output.
func output(cmd *exec.Cmd, stdin string) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s %q: %w\n%s", filepath.Base(cmd.Path), cmd.Args[1:], err, stderr.Bytes())
	}
	return stdout.String(), nil
}
