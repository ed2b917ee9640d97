package e2e_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"troth.dev/troth/internal/latest"
)

// process is one program under way. It ends with its test at the latest, and with
// the test binary however that ends. All but kill is for the test's goroutine.
type process struct {
	cmd   *exec.Cmd
	lines *latest.Value[[]string] // all that it has written so far
	ended chan struct{}           // closed once it has ended and all it wrote is in lines
	read  int                     // of lines, how many await has passed
}

// startProgram starts troth-server or troth-agent, which write their logs to
// standard error. If the test fails, the log's end is in the test's. At the end of
// the test the program is asked to end and has to do so properly.
func startProgram(t *testing.T, name string, args ...string) *process {
	t.Helper()
	return startCommand(t, name, exec.Command(filepath.Join(programs, name), args...))
}

// startCommand does the same with a command that becomes the program.
func startCommand(t *testing.T, name string, cmd *exec.Cmd) *process {
	t.Helper()
	log, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	p := start(t, cmd, log)
	t.Cleanup(func() {
		p.stop(t)
		if t.Failed() {
			const last = 40
			lines, _ := p.lines.Load()
			lines = slices.DeleteFunc(slices.Clone(lines), func(line string) bool { return strings.Contains(line, `"msg":"issued"`) })
			t.Logf("the last lines of %s, without what was issued:\n%s", name, strings.Join(lines[max(0, len(lines)-last):], ""))
		}
	})
	return p
}

// start starts cmd, and reads what it writes to output, one of its pipes.
func start(t *testing.T, cmd *exec.Cmd, output io.Reader) *process {
	t.Helper()
	p := &process{cmd: cmd, lines: latest.New[[]string](nil), ended: make(chan struct{})}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go p.run(output, started)
	if err := <-started; err != nil {
		t.Fatalf("start %q: %v", cmd.Path, err)
	}
	t.Cleanup(p.kill)
	return p
}

// run owns the process from its start to its end. It keeps its thread for as
// long, because the kernel sends Pdeathsig when the thread that started the
// process ends.
func (p *process) run(output io.Reader, started chan<- error) {
	defer close(p.ended)
	runtime.LockOSThread()
	err := p.cmd.Start()
	started <- err
	if err != nil {
		return
	}
	var lines []string
	for read := bufio.NewReader(output); ; {
		line, err := read.ReadString('\n')
		if err != nil {
			break
		}
		lines = append(lines, line)
		p.lines.Set(lines)
	}
	// How it ended is in its ProcessState, for who asks.
	_ = p.cmd.Wait()
}

// kill ends the process as a crash would, and returns when it has ended.
func (p *process) kill() {
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		panic("e2e: kill a process of our own: " + err.Error())
	}
	<-p.ended
}

// stop asks the process to end, and fails the test if it does not, or not well.
// One that has ended before is left alone.
func (p *process) stop(t *testing.T) {
	t.Helper()
	select {
	case <-p.ended:
		return
	default:
	}
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Errorf("signal %q: %v", p.cmd.Path, err)
	}
	select {
	case <-p.ended:
	case <-time.After(patience):
		t.Errorf("%q does not end though it was told to", p.cmd.Path)
		p.kill()
	}
	if !p.cmd.ProcessState.Success() {
		t.Errorf("%q ended with %v, want success", p.cmd.Path, p.cmd.ProcessState)
	}
}

// await returns the next line of JSON that fits. What comes before it is passed
// and not seen again.
func await[L any](t *testing.T, p *process, what string, fits func(L) bool) L {
	t.Helper()
	late := time.After(patience)
	for over := false; ; {
		lines, more := p.lines.Load()
		for ; p.read < len(lines); p.read++ {
			if line, ok := decode[L](lines[p.read]); ok && fits(line) {
				p.read++
				return line
			}
		}
		if over {
			t.Fatalf("wait for %s: the process has ended (%v)", what, p.cmd.ProcessState)
		}
		select {
		case <-more:
		case <-p.ended:
			over = true // with what it wrote last still to be read
		case <-late:
			t.Fatalf("wait for %s: not within %s; of what came, the last is:\n%s", what, patience, strings.Join(lines[max(0, len(lines)-5):], ""))
		}
	}
}

// written returns all lines of JSON so far that fit, whether passed or not.
func written[L any](p *process, fits func(L) bool) []L {
	lines, _ := p.lines.Load()
	var all []L
	for _, text := range lines {
		if line, ok := decode[L](text); ok && fits(line) {
			all = append(all, line)
		}
	}
	return all
}

// decode reads a line of JSON. Lines of anything else, such as a panic's, are for
// people.
func decode[L any](text string) (line L, ok bool) {
	err := json.Unmarshal([]byte(text), &line)
	return line, err == nil
}

// eventually polls what nobody is told of.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	late := time.After(patience)
	poll := time.NewTicker(10 * time.Millisecond)
	defer poll.Stop()
	for !holds() {
		select {
		case <-poll.C:
		case <-late:
			t.Fatalf("wait for %s: not within %s", what, patience)
		}
	}
}
