package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"slices"
	"sync"
	"time"

	"troth.dev/troth/agent/hbone"
	"troth.dev/troth/handshake"
)

const (
	tunnelled = 9000 // connections that stay
	perTunnel = 100
	plaintext = 1000 // connections that a change to STRICT ends
	changes   = 100
	cutBar    = 250.0 // ms
)

// cut measures how soon a change of policy ends what it no longer lets through.
type cut struct {
	app       *net.TCPListener
	tunnels   []*hbone.Tunnel
	held      []io.Closer
	agent     *pair
	plaintext string // where the agent takes it
}

// measureCut has an agent's way into a pod hold 10,000 connections, and changes the
// pod's policy again and again.
func measureCut(ctx context.Context, _ options, r *report) (err error) {
	app, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return err
	}
	defer app.Close()
	c := &cut{app: app, agent: &pair{name: "troth"}}
	defer func() {
		for _, each := range c.held {
			each.Close()
		}
	}()
	defer func() { err = errors.Join(err, c.agent.stop()) }()
	if err := c.start(ctx); err != nil {
		return err
	}
	took := make([]float64, 0, changes)
	for range changes {
		one, err := c.change(ctx)
		if err != nil {
			return err
		}
		took = append(took, one)
	}
	streams := 0
	for _, t := range c.tunnels {
		streams += t.Streams()
	}
	if streams != tunnelled {
		return fmt.Errorf("%d connections are left in tunnels, of %d", streams, tunnelled)
	}
	slices.Sort(took)
	what := fmt.Sprintf("cut: ms from a change of policy to the end of the last of %d connections, of %d open, ", plaintext, tunnelled+plaintext)
	r.add(row{what: what + "median", troth: []float64{median(took)}},
		row{what: what + "p99", troth: []float64{took[int(math.Ceil(0.99*changes))-1]}, maxValue: cutBar})
	return nil
}

// start starts the agent's part and opens what stays.
func (c *cut) start(ctx context.Context) error {
	spec, err := newRelaySpec()
	if err != nil {
		return err
	}
	caller, err := newRelayed(spec)
	if err != nil {
		return err
	}
	spec.Kind, spec.Callee, spec.To = "troth", true, c.app.Addr().String()
	addresses, err := c.agent.relay(ctx, spec)
	if err != nil {
		return err
	}
	c.plaintext = addresses.Plaintext
	for range tunnelled / perTunnel {
		conn, err := dial(ctx, addresses.Front)
		if err != nil {
			return err
		}
		secured, err := handshake.Initiate(ctx, hbone.Buffer(conn), caller.handshake, caller.svid.ID)
		if err != nil {
			return err
		}
		t, err := hbone.Open(secured, hbone.Config{MaxStreams: perTunnel})
		if err != nil {
			return err
		}
		c.held = append(c.held, t)
		c.tunnels = append(c.tunnels, t)
		for range perTunnel {
			if _, _, err := t.Connect(ctx, c.app.Addr().String(), nil); err != nil {
				return err
			}
			callee, err := c.app.AcceptTCP()
			if err != nil {
				return err
			}
			c.held = append(c.held, callee)
		}
	}
	return nil
}

// change opens connections in plaintext, ends them by policy, and returns how many
// milliseconds that took.
func (c *cut) change(ctx context.Context) (ms float64, err error) {
	var mode string
	if err := errors.Join(c.agent.orders.Encode("PERMISSIVE"), c.agent.answers.Decode(&mode)); err != nil {
		return 0, err
	}
	var open []*net.TCPConn
	defer func() {
		for _, each := range open {
			each.Close()
		}
	}()
	for len(open) < 2*plaintext {
		caller, err := dial(ctx, c.plaintext)
		if err != nil {
			return 0, err
		}
		open = append(open, caller)
		if err := c.app.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
			return 0, err
		}
		callee, err := c.app.AcceptTCP()
		if err != nil {
			return 0, fmt.Errorf("the agent lets nothing through: %w", err)
		}
		open = append(open, callee)
	}
	var waiting sync.WaitGroup
	for n := 0; n < len(open); n += 2 {
		waiting.Go(func() { open[n].Read(make([]byte, 1)) })
	}
	began := time.Now()
	if err := c.agent.orders.Encode("STRICT"); err != nil {
		return 0, err
	}
	waiting.Wait()
	ms = float64(time.Since(began).Microseconds()) / 1e3
	return ms, c.agent.answers.Decode(&mode)
}
