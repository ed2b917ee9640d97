package e2e_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var soakFor = flag.Duration("soak", 15*time.Second, "how long TestMeshSoak keeps two agents busy")

// usage is what an agent has taken of its machine.
type usage struct {
	memory, goroutines, files float64
}

// usage asks the agent itself.
func (h *host) usage(t *testing.T) usage {
	t.Helper()
	page, err := h.ns.run(t, "", "curl", "-sS", "--max-time", "10", "http://127.0.0.1:15020/metrics")
	if err != nil {
		t.Fatal(err)
	}
	var u usage
	for line := range strings.Lines(page) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		to := map[string]*float64{
			"process_resident_memory_bytes": &u.memory, "go_goroutines": &u.goroutines, "process_open_fds": &u.files,
		}[name]
		if to == nil {
			continue
		}
		if *to, err = strconv.ParseFloat(value, 64); err != nil {
			t.Fatal(err)
		}
	}
	if u.memory == 0 || u.goroutines == 0 || u.files == 0 {
		t.Fatalf("the agent does not tell what it takes: %+v", u)
	}
	return u
}

// Two agents at full load, for as long as -soak: nothing that they take grows without
// end, and what the load took is given back. SVIDs are short, so that every tunnel is
// renewed again and again.
func TestMeshSoak(t *testing.T) {
	t.Parallel()
	m := newMesh(t, meshConfig{life: 20 * time.Second, agent: []string{"-health=127.0.0.1:15020"}})
	m.policy(t, "all", strict)
	a, b := m.two(t)
	to := b.at(echoPort)
	if _, err := a.ns.greeted(t, to[0]); err != nil {
		t.Fatal(err)
	}
	idle := []usage{m.hosts[0].usage(t), m.hosts[1].usage(t)}

	ctx, stop := context.WithTimeout(t.Context(), *soakFor)
	defer stop()
	var connections, moved atomic.Int64
	var load sync.WaitGroup
	for n := range 24 {
		load.Go(func() {
			for ctx.Err() == nil {
				rounds, size := 1+rand.N(4), 1+rand.N(64<<10)
				if n%8 == 0 { // a few stay, and outlive SVIDs
					rounds = 1 << 30
				}
				if err := m.soak(ctx, a, to[n%2], rounds, size, &moved); err != nil && ctx.Err() == nil {
					t.Errorf("connection %d: %v", connections.Load(), err)
					return
				}
				connections.Add(1)
			}
		})
	}
	var samples [2][]usage
	tick := time.NewTicker(max(*soakFor/60, time.Second))
	defer tick.Stop()
	for ctx.Err() == nil {
		select {
		case <-tick.C:
			for n, h := range m.hosts {
				samples[n] = append(samples[n], h.usage(t))
			}
		case <-ctx.Done():
		}
	}
	load.Wait()

	for n, h := range m.hosts {
		third := len(samples[n]) / 3
		middle := highest(samples[n][third : 2*third])
		last := highest(samples[n][2*third:])
		// A heap may be larger by what was allocated since it was last collected.
		if last.memory > 1.3*middle.memory || last.goroutines > 1.3*middle.goroutines+50 || last.files > 1.3*middle.files+50 {
			t.Errorf("node %d takes %+v at most in the last third of the time, and %+v in the second", n, last, middle)
		}
		eventually(t, fmt.Sprintf("node %d gives back what the load took, of %+v", n, last), func() bool {
			now := h.usage(t)
			// Tunnels stay for a while, with their goroutines.
			return now.goroutines < idle[n].goroutines+40 && now.files < idle[n].files+40
		})
		figure(t, "soak, %v, node %d: %.0f MB, %.0f goroutines, %.0f descriptors at most; idle after it %+v",
			*soakFor, n, last.memory/1e6, last.goroutines, last.files, h.usage(t))
	}
	figure(t, "soak: %d connections, %d MB each way, SVIDs of 20 s", connections.Load(), moved.Load()>>20)
}

// soak holds one connection and has it echo.
func (m *mesh) soak(ctx context.Context, from *sandbox, to netip.AddrPort, rounds, size int, moved *atomic.Int64) error {
	// Not by ctx: its deadline is one thing, and that nobody answers another.
	dialling, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	conn, err := from.ns.dial(dialling, to)
	if err != nil {
		return err
	}
	defer conn.Close()
	sent, got := bytes.Repeat([]byte{byte(size)}, size), make([]byte, size)
	for range rounds {
		if ctx.Err() != nil {
			return nil
		}
		conn.SetDeadline(time.Now().Add(patience))
		written := make(chan error, 1)
		go func() {
			_, err := conn.Write(sent)
			written <- err
		}()
		_, err := io.ReadFull(conn, got)
		if err = errors.Join(err, <-written); err != nil {
			return err
		}
		if !bytes.Equal(sent, got) {
			return errors.New("what comes back is something else")
		}
		moved.Add(int64(size))
	}
	return conn.CloseWrite()
}

// highest is the most of each.
func highest(all []usage) usage {
	var most usage
	for _, u := range all {
		most.memory, most.goroutines, most.files = max(most.memory, u.memory), max(most.goroutines, u.goroutines), max(most.files, u.files)
	}
	return most
}
