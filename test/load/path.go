package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// What a round of each kind takes.
const (
	bulkSize    = 192 << 20 // bytes, over all its streams
	requestRate = 1000      // each second, for requestTime
	requestTime = time.Second
	requestSize = 100
	connections = 150
	firstTime   = 40  // connections with a handshake each
	idle        = 400 // connections of which memory is measured, idle
	busy        = 100 // and moving bytes
	busySize    = 1 << 20
)

// pair is two proxies, one behind the other, between us and an application, which is
// us too. There is none in the pair "none".
type pair struct {
	name      string
	front     string // where callers connect to
	processes []*exec.Cmd
	stops     []func() error
	// To and from the relay that was started last.
	orders  *json.Encoder
	answers *json.Decoder
}

// path measures pairs.
type path struct {
	app   *net.TCPListener
	pairs map[string]*pair
	// By what was measured, and then by pair: a value for each round.
	values map[string]map[string][]float64
	order  []string
}

// measurePath measures pairs of proxies side by side.
func measurePath(ctx context.Context, o options, r *report) (err error) {
	app, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return err
	}
	defer app.Close()
	p := &path{app: app, pairs: make(map[string]*pair), values: make(map[string]map[string][]float64)}
	defer func() {
		for _, each := range p.pairs {
			err = errors.Join(err, each.stop())
		}
	}()
	if err := p.start(ctx); err != nil {
		return err
	}
	names := []string{"none", "plain", "tls", "nginx", "troth"}
	for round := range o.rounds + 1 {
		if round == 1 { // the first one warms up
			p.values, p.order = make(map[string]map[string][]float64), nil
		}
		for _, name := range names {
			if err := p.measure(ctx, p.pairs[name]); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		for _, name := range []string{"tls", "nginx", "first"} {
			if err := p.handshakes(ctx, p.pairs[name]); err != nil {
				return fmt.Errorf("handshakes, %s: %w", name, err)
			}
		}
	}
	for _, name := range []string{"tls", "nginx", "troth"} {
		if err := p.memory(ctx, p.pairs[name]); err != nil {
			return fmt.Errorf("memory, %s: %w", name, err)
		}
	}
	p.report(r)
	return nil
}

// report adds a row for each measure and each pair that ours is beside.
func (p *path) report(r *report) {
	for _, what := range p.order {
		ours := p.values[what]["troth"]
		for _, name := range []string{"none", "plain", "tls", "nginx"} {
			floor := p.values[what][name]
			if floor == nil || slices.Max(floor) == 0 {
				continue
			}
			each := row{what: fmt.Sprintf("path: %s (floor: %s)", what, name), troth: ours, floor: floor}
			each.maxRatio = pathBars[name+": "+what]
			if name == "tls" {
				each.maxValue = memoryBars[what]
			}
			r.add(each)
		}
	}
}

func (p *path) add(what, pair string, value float64) {
	if p.values[what] == nil {
		p.values[what] = make(map[string][]float64)
		p.order = append(p.order, what)
	}
	p.values[what][pair] = append(p.values[what][pair], value)
}

// What is measured.
const (
	whatCPU        = "s of CPU for a GB" // in bulk
	whatTime       = "s for a GB"
	whatRequest    = "us of CPU for a small request"
	whatLatency    = "us of a small request, median"
	whatConnection = "us of CPU for a new connection"
	whatFirst      = "us of CPU for a connection with its handshake"
	whatIdle       = "KB for an idle connection, each proxy"
	whatBusy       = "KB for a busy connection, each proxy"
)

// pathBars are the most that ours may take, in floors: by the pair that is the floor,
// and what is measured.
var pathBars = map[string]float64{
	"tls: bulk up, 1 at a time, " + whatCPU: 1.1, "tls: bulk down, 1 at a time, " + whatCPU: 1.1,
	"tls: bulk up, 8 at a time, " + whatCPU: 1.1, "tls: bulk down, 8 at a time, " + whatCPU: 1.1,
	"nginx: bulk up, 1 at a time, " + whatCPU: 1, "nginx: bulk down, 1 at a time, " + whatCPU: 1,
	"nginx: bulk up, 8 at a time, " + whatCPU: 1, "nginx: bulk down, 8 at a time, " + whatCPU: 1,
	"nginx: bulk up, 1 at a time, " + whatTime: 1, "nginx: bulk down, 1 at a time, " + whatTime: 1,
	"nginx: bulk up, 8 at a time, " + whatTime: 1, "nginx: bulk down, 8 at a time, " + whatTime: 1,
	"tls: " + whatRequest: 1.1, "tls: " + whatLatency: 1.1,
	"plain: " + whatConnection: 1, "nginx: " + whatConnection: 0.2, "tls: " + whatFirst: 1.1,
}

// memoryBars are the most KB that ours may take.
var memoryBars = map[string]float64{whatIdle: 16, whatBusy: 40}

// start starts every pair.
func (p *path) start(ctx context.Context) error {
	spec, err := newRelaySpec()
	if err != nil {
		return err
	}
	app := p.app.Addr().String()
	p.pairs["none"] = &pair{name: "none", front: app}
	for _, kind := range []string{"plain", "tls", "troth", "first"} {
		s := spec
		s.Kind, s.Callee, s.To = kind, true, app
		new := &pair{name: kind}
		p.pairs[kind] = new
		back, err := new.relay(ctx, s)
		if err != nil {
			return err
		}
		s.Callee, s.Proxy = false, back.Front
		if kind == "plain" || kind == "tls" {
			s.To = back.Front
		}
		front, err := new.relay(ctx, s)
		if err != nil {
			return err
		}
		new.front = front.Front
	}
	p.pairs["nginx"] = &pair{name: "nginx"}
	return p.pairs["nginx"].nginx(ctx, app, spec)
}

// relay starts a proxy of ours, and returns where it listens.
func (p *pair) relay(ctx context.Context, s relaySpec) (addresses relayAddresses, err error) {
	self, err := os.Executable()
	if err != nil {
		return addresses, err
	}
	command := exec.CommandContext(ctx, self, relayCommand)
	command.Stderr = os.Stderr
	stdin, err := command.StdinPipe()
	if err != nil {
		return addresses, err
	}
	stdout, err := command.StdoutPipe()
	if err != nil {
		return addresses, err
	}
	if err := command.Start(); err != nil {
		return addresses, err
	}
	p.processes = append(p.processes, command)
	p.stops = append(p.stops, func() error { return errors.Join(stdin.Close(), command.Wait()) })
	p.orders, p.answers = json.NewEncoder(stdin), json.NewDecoder(stdout)
	err = errors.Join(p.orders.Encode(s), p.answers.Decode(&addresses))
	return addresses, err
}

// nginxConfig makes nginx a proxy with mutual TLS, caller's end and callee's.
const nginxConfig = `
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
daemon off; master_process off; worker_processes 1; pid %[1]s/pid; error_log %[1]s/log error;
events { worker_connections 8192; }
stream {
	server {
		listen 127.0.0.1:%[2]d %[3]s;
		proxy_pass %[4]s;
		proxy_buffer_size 256k;
		ssl_protocols TLSv1.3; ssl_session_tickets off;
		ssl_certificate ../svid.pem; ssl_certificate_key ../key.pem;
		ssl_client_certificate ../authority.pem; ssl_verify_client %[5]s;
		proxy_ssl %[6]s; proxy_ssl_protocols TLSv1.3; proxy_ssl_session_reuse off;
		proxy_ssl_certificate ../svid.pem; proxy_ssl_certificate_key ../key.pem;
		proxy_ssl_trusted_certificate ../authority.pem; proxy_ssl_verify off;
	}
}
`

// nginx starts a pair of nginx.
func (p *pair) nginx(ctx context.Context, app string, s relaySpec) error {
	binary, err := exec.LookPath("nginx")
	if err != nil {
		return errors.New("nginx is missing: make deps installs it")
	}
	dir, err := os.MkdirTemp("", "troth-load-")
	if err != nil {
		return err
	}
	p.stops = append(p.stops, func() error { return os.RemoveAll(dir) })
	for name, content := range map[string]*pem.Block{
		"authority.pem": {Type: "CERTIFICATE", Bytes: s.Authority},
		"svid.pem":      {Type: "CERTIFICATE", Bytes: s.SVID},
		"key.pem":       {Type: "PRIVATE KEY", Bytes: s.Key},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(content), 0o600); err != nil {
			return err
		}
	}
	back, err := p.startNginx(ctx, binary, filepath.Join(dir, "callee"), app, true)
	if err != nil {
		return err
	}
	p.front, err = p.startNginx(ctx, binary, filepath.Join(dir, "caller"), back, false)
	return err
}

// startNginx starts one, and returns where it listens. nginx takes no port of the
// kernel's choice, so that one that was free a moment ago is tried, and another.
func (p *pair) startNginx(ctx context.Context, binary, dir, to string, callee bool) (string, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	for range 10 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return "", err
		}
		address := l.Addr().(*net.TCPAddr)
		l.Close()
		ssl, verify, proxySSL := "", "off", "on"
		if callee {
			ssl, verify, proxySSL = "ssl", "on", "off"
		}
		config := fmt.Sprintf(nginxConfig, dir, address.Port, ssl, to, verify, proxySSL)
		file := filepath.Join(dir, "nginx.conf")
		if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
			return "", err
		}
		command := exec.CommandContext(ctx, binary, "-p", dir, "-e", filepath.Join(dir, "log"), "-c", file)
		if err := command.Start(); err != nil {
			return "", err
		}
		ended := make(chan error, 1)
		go func() { ended <- command.Wait() }()
		if up(ctx, address.String(), ended) {
			p.processes = append(p.processes, command)
			p.stops = append(p.stops, func() error {
				_ = command.Process.Signal(syscall.SIGTERM) // it may have ended
				return <-ended
			})
			return address.String(), nil
		}
	}
	log, _ := os.ReadFile(filepath.Join(dir, "log"))
	return "", fmt.Errorf("nginx does not start: %s", log)
}

// up waits until somebody listens at address.
func up(ctx context.Context, address string, ended chan error) bool {
	for ctx.Err() == nil {
		c, err := net.Dial("tcp", address)
		if err == nil {
			c.Close()
			return true
		}
		select {
		case err := <-ended:
			ended <- err
			return false
		case <-time.After(5 * time.Millisecond):
		}
	}
	return false
}

func (p *pair) stop() error {
	var err error
	for _, stop := range slices.Backward(p.stops) {
		err = errors.Join(err, stop())
	}
	return err
}

// cpu returns what both proxies have used, user and system.
func (p *pair) cpu() (time.Duration, error) {
	var sum time.Duration
	for _, each := range p.processes {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", each.Process.Pid))
		if err != nil {
			return 0, err
		}
		for _, thread := range threads {
			fields, err := procFields(thread)
			if err != nil {
				return 0, err
			}
			sum += time.Duration(fields[0])
		}
	}
	return sum, nil
}

// rss returns the resident memory of both proxies, in bytes.
func (p *pair) rss() (int64, error) {
	var sum int64
	for _, each := range p.processes {
		fields, err := procFields(fmt.Sprintf("/proc/%d/statm", each.Process.Pid))
		if err != nil {
			return 0, err
		}
		sum += fields[1] * int64(os.Getpagesize())
	}
	return sum, nil
}

func procFields(file string) ([]int64, error) {
	content, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var numbers []int64
	for _, field := range bytes.Fields(content) {
		n, err := strconv.ParseInt(string(field), 10, 64)
		if err != nil {
			return nil, fmt.Errorf("%s reads %q", file, content)
		}
		numbers = append(numbers, n)
	}
	if len(numbers) < 2 {
		return nil, fmt.Errorf("%s reads %q", file, content)
	}
	return numbers, nil
}

// cost returns what do costs both proxies.
func (p *pair) cost(do func() error) (time.Duration, error) {
	before, err := p.cpu()
	if err != nil {
		return 0, err
	}
	if err := do(); err != nil {
		return 0, err
	}
	after, err := p.cpu()
	return after - before, err
}

// through returns both ends of a new connection.
func (p *path) through(ctx context.Context, pair *pair) (caller, callee *net.TCPConn, err error) {
	if caller, err = dial(ctx, pair.front); err != nil {
		return nil, nil, err
	}
	// What arrives may be of somebody who only asked whether a proxy is up.
	var name, got [8]byte
	rand.Read(name[:])
	_, err = caller.Write(name[:])
	for err == nil {
		if err = p.app.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			break
		}
		if callee, err = p.app.AcceptTCP(); err != nil {
			break
		}
		if _, err := io.ReadFull(callee, got[:]); err == nil && got == name {
			return caller, callee, nil
		}
		callee.Close()
	}
	caller.Close()
	return nil, nil, fmt.Errorf("a connection never arrived: %w", err)
}

// measure is one round of what every pair does.
func (p *path) measure(ctx context.Context, pair *pair) error {
	for _, streams := range []int{1, 8} {
		for _, down := range []bool{false, true} {
			if err := p.bulk(ctx, pair, streams, down); err != nil {
				return err
			}
		}
	}
	if err := p.requests(ctx, pair); err != nil {
		return err
	}
	return p.connect(ctx, pair, whatConnection, pair.name, connections)
}

func (p *path) bulk(ctx context.Context, pair *pair, streams int, down bool) error {
	var from, to []*net.TCPConn
	defer func() {
		for _, c := range slices.Concat(from, to) {
			c.Close()
		}
	}()
	for range streams {
		caller, callee, err := p.through(ctx, pair)
		if err != nil {
			return err
		}
		if down {
			caller, callee = callee, caller
		}
		from, to = append(from, caller), append(to, callee)
	}
	began := time.Now()
	cost, err := pair.cost(func() error {
		var all sync.WaitGroup
		failed := make(chan error, 2*streams)
		for n := range streams {
			all.Go(func() {
				chunk := make([]byte, 1<<20)
				var err error
				for sent := 0; sent < bulkSize/streams && err == nil; sent += len(chunk) {
					_, err = from[n].Write(chunk)
				}
				failed <- errors.Join(err, from[n].CloseWrite())
			})
			all.Go(func() {
				chunk := make([]byte, 1<<20)
				for {
					if _, err := to[n].Read(chunk); err != nil {
						if errors.Is(err, io.EOF) {
							err = nil
						}
						failed <- err
						return
					}
				}
			})
		}
		all.Wait()
		close(failed)
		var err error
		for each := range failed {
			err = errors.Join(err, each)
		}
		return err
	})
	if err != nil {
		return err
	}
	direction := "up"
	if down {
		direction = "down"
	}
	what := fmt.Sprintf("bulk %s, %d at a time, ", direction, streams)
	p.add(what+whatCPU, pair.name, cost.Seconds()/(bulkSize/1e9))
	p.add(what+whatTime, pair.name, time.Since(began).Seconds()/(bulkSize/1e9))
	return nil
}

// requests sends requestRate of them a second, whatever becomes of the ones before.
func (p *path) requests(ctx context.Context, pair *pair) error {
	caller, callee, err := p.through(ctx, pair)
	if err != nil {
		return err
	}
	defer caller.Close()
	defer callee.Close()
	var serving sync.WaitGroup
	serving.Go(func() {
		io.Copy(struct{ io.Writer }{callee}, struct{ io.Reader }{callee}) // spliced it would hold back what is short
		callee.CloseWrite()
	})
	defer serving.Wait()
	defer caller.CloseWrite()
	n := int(requestTime.Seconds() * requestRate)
	took := make([]float64, 0, n)
	message := make([]byte, requestSize)
	cost, err := pair.cost(func() error {
		began := time.Now()
		for at := range n {
			due := began.Add(time.Duration(at) * time.Second / requestRate)
			time.Sleep(time.Until(due))
			sent := time.Now()
			if _, err := caller.Write(message); err != nil {
				return err
			}
			if _, err := io.ReadFull(caller, message); err != nil {
				return err
			}
			took = append(took, float64(time.Since(sent).Nanoseconds())/1e3)
		}
		return nil
	})
	if err != nil {
		return err
	}
	p.add(whatRequest, pair.name, float64(cost.Nanoseconds())/1e3/float64(n))
	p.add(whatLatency, pair.name, median(took))
	return nil
}

// connect makes n connections, one after the other, with a few bytes there and one back.
func (p *path) connect(ctx context.Context, pair *pair, what, name string, n int) error {
	cost, err := pair.cost(func() error {
		for range n {
			if err := p.once(ctx, pair); err != nil {
				return err
			}
		}
		return nil
	})
	p.add(what, name, float64(cost.Nanoseconds())/1e3/float64(n))
	return err
}

func (p *path) once(ctx context.Context, pair *pair) error {
	caller, callee, err := p.through(ctx, pair)
	if err != nil {
		return err
	}
	defer caller.Close()
	_, err = callee.Write([]byte{1})
	if err := errors.Join(err, callee.Close()); err != nil {
		return err
	}
	_, err = io.ReadAll(caller)
	return err
}

// handshakes measures connections each of which has one.
func (p *path) handshakes(ctx context.Context, pair *pair) error {
	name := pair.name
	if name == "first" {
		name = "troth"
	}
	return p.connect(ctx, pair, whatFirst, name, firstTime)
}

// memory measures what connections add to the resident memory of each proxy: the
// idle ones have carried a request, the busy ones carry bulk meanwhile.
func (p *path) memory(ctx context.Context, pair *pair) error {
	for _, kind := range []struct {
		what string
		n    int
		size int
	}{{whatIdle, idle, requestSize}, {whatBusy, busy, busySize}} {
		before, err := pair.rss()
		if err != nil {
			return err
		}
		var all sync.WaitGroup
		var open []*net.TCPConn
		finish := func() {
			for _, c := range open {
				c.Close()
			}
			all.Wait()
		}
		for range kind.n {
			caller, callee, err := p.through(ctx, pair)
			if err != nil {
				finish()
				return err
			}
			open = append(open, caller, callee)
			all.Go(func() { io.Copy(struct{ io.Writer }{callee}, struct{ io.Reader }{callee}) })
		}
		most := before
		for round := range 3 {
			var moving sync.WaitGroup
			for n := 0; n < len(open); n += 2 {
				c := open[n]
				moving.Go(func() {
					moving.Go(func() { c.Write(make([]byte, kind.size)) })
					io.CopyN(io.Discard, c, int64(kind.size))
				})
			}
			if round == 2 && kind.what == whatBusy {
				now, err := pair.rss()
				if err != nil {
					return err
				}
				most = max(most, now)
			}
			moving.Wait()
		}
		now, err := pair.rss()
		finish()
		if err != nil {
			return err
		}
		p.add(kind.what, pair.name, float64(max(most, now)-before)/float64(kind.n)/float64(len(pair.processes))/1024)
	}
	return nil
}
