package keyhelper

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"sync"
	"time"
)

// child is one run of the helper's program.
type child struct {
	config        Config
	stdin, stdout *os.File
	kill          context.CancelFunc
	started       time.Time
	gone          chan struct{}  // closed by fail
	exited        chan struct{}  // closed when the process has ended
	ended         sync.WaitGroup // what start has started

	writing sync.Mutex // held while a frame is written

	mu      sync.Mutex
	last    uint64              // guarded by mu
	pending map[uint64]*pending // guarded by mu; nil once gone
	served  bool                // guarded by mu
	err     error               // guarded by mu
	died    time.Time           // guarded by mu
}

// pending is a request that is not answered yet.
type pending struct {
	method string
	late   *time.Timer
	done   func()
	answer chan outcome // one
}

type outcome struct {
	response response
	err      error
}

// grace is how long a helper may take to end by itself.
const grace = 2 * time.Second

// start starts the program.
func start(config Config) (_ *child, err error) {
	var files []*os.File
	pipe := func() (r, w *os.File) {
		if err == nil {
			r, w, err = os.Pipe()
			files = append(files, r, w)
		}
		return r, w
	}
	childIn, stdin := pipe()
	stdout, childOut := pipe()
	stderr, childErr := pipe()
	ctx, kill := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, config.Command[0], config.Command[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = childIn, childOut, childErr
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		kill()
		for _, f := range files {
			f.Close()
		}
		return nil, err
	}
	for _, f := range []*os.File{childIn, childOut, childErr} {
		f.Close()
	}
	c := &child{
		config: config, stdin: stdin, stdout: stdout, kill: kill, started: time.Now(),
		gone: make(chan struct{}), exited: make(chan struct{}), pending: make(map[uint64]*pending),
	}
	c.ended.Go(c.read)
	c.ended.Go(func() { c.logLines(stderr) })
	c.ended.Go(func() {
		level := slog.LevelInfo
		if cmd.Wait() != nil {
			level = slog.LevelWarn
		}
		c.fail(&Error{HelperGone, "it ended: " + cmd.ProcessState.String()})
		close(c.exited)
		// What it said last is there already. A process that it left behind may hold
		// the other end for ever.
		if stderr.SetReadDeadline(time.Now().Add(grace/4)) != nil {
			stderr.Close()
		}
		config.Log.LogAttrs(context.Background(), level, "the key helper has ended",
			slog.Int("pid", cmd.Process.Pid), slog.String("state", cmd.ProcessState.String()))
	})
	return c, nil
}

// call sends a request and waits for its response, or until ctx ends or the helper
// is gone. done is called once when the helper is done with it, which may be later.
func (c *child) call(ctx context.Context, r request, done func()) (response, error) {
	p := &pending{method: r.Method, done: done, answer: make(chan outcome, 1)}
	c.mu.Lock()
	if c.pending == nil {
		defer c.mu.Unlock()
		done()
		return response{}, c.err
	}
	c.last++
	r.ID = c.last
	p.late = time.AfterFunc(c.config.Timeout, func() {
		c.fail(&Error{TimedOut, fmt.Sprintf("%s was not answered within %v; the helper was killed", r.Method, c.config.Timeout)})
	})
	c.pending[r.ID] = p
	c.mu.Unlock()

	frame, err := encode(r)
	if err == nil {
		c.writing.Lock()
		_, err = c.stdin.Write(frame)
		c.writing.Unlock()
	}
	if err != nil {
		c.ending()
		c.fail(&Error{HelperGone, fmt.Sprintf("send a request: %v", err)})
	}
	select {
	case o := <-p.answer:
		return o.response, o.err
	case <-ctx.Done():
		return response{}, ctx.Err()
	}
}

// read takes responses to those who wait for them.
func (c *child) read() {
	in := bufio.NewReader(c.stdout)
	for {
		message, err := readFrame(in)
		if errors.Is(err, io.EOF) {
			c.ending()
			err = errors.New("it closed its standard output")
		}
		var r response
		if err == nil {
			r, err = parseResponse(message)
		}
		if err != nil {
			c.fail(&Error{HelperGone, fmt.Sprintf("read a response: %v", err)})
			return
		}
		c.mu.Lock()
		p := c.pending[r.ID]
		delete(c.pending, r.ID)
		if p != nil && p.method != methodHello {
			c.served = true
		}
		c.mu.Unlock()
		if p == nil {
			c.fail(&Error{HelperGone, fmt.Sprintf("read a response: it answers request %d, which is none", r.ID)})
			return
		}
		o := outcome{response: r}
		if r.Error != nil {
			o.err = r.Error
		}
		p.finish(o)
	}
}

// ending waits a moment for a process whose pipes are closed, because how it ended
// tells more.
func (c *child) ending() {
	select {
	case <-c.gone:
	case <-time.After(grace / 20):
	}
}

func (p *pending) finish(o outcome) {
	p.late.Stop()
	p.answer <- o
	p.done()
}

// fail kills the helper, if it still lives, and fails all that waits for it. The
// first reason is kept.
func (c *child) fail(err error) {
	c.mu.Lock()
	waiting := c.pending
	if waiting == nil {
		c.mu.Unlock()
		return
	}
	c.pending, c.err, c.died = nil, err, time.Now()
	c.mu.Unlock()
	close(c.gone)
	c.kill()
	c.stdin.Close()
	c.stdout.Close()
	for _, p := range waiting {
		p.finish(outcome{err: err})
	}
}

// stop has the helper end by itself, and kills it if it does not.
func (c *child) stop() {
	c.stdin.Close()
	select {
	case <-c.exited:
	case <-c.gone:
	case <-time.After(grace):
	}
	c.fail(&Error{HelperGone, "it was closed"})
	c.ended.Wait()
}

func (c *child) isGone() bool {
	select {
	case <-c.gone:
		return true
	default:
		return false
	}
}

// life says how long a helper that is gone has lived, whether it answered anything,
// and why it is gone.
func (c *child) life() (lived time.Duration, served bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.died.Sub(c.started), c.served, c.err
}

// logLines logs what the helper has to say, in lines of at most 4 KiB.
func (c *child) logLines(stderr *os.File) {
	defer stderr.Close()
	in := bufio.NewReaderSize(stderr, 4<<10)
	for {
		line, err := in.ReadSlice('\n')
		if line = bytes.TrimSpace(line); len(line) > 0 {
			c.config.Log.LogAttrs(context.Background(), slog.LevelInfo, "the key helper says", slog.String("line", string(line)))
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
	}
}
