package main

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	trothv1 "troth.dev/troth/api/troth/v1"
)

const (
	// pushBar is how often the floor's CPU time a push may cost, and how often its
	// time on the clock it may take, from the new bundle to the last agent's report.
	pushBar = 1.3
	// memoryBar is the resident memory of the server for each connected agent, in
	// KB, and garbageBar how often the floor's it may be after pushes, when it
	// depends on the moment of the last collection.
	memoryBar  = 70
	garbageBar = 1.0
)

// measureFanOut connects a fleet of agents, each over mutual TLS with one stream,
// and gives all of them new bundles, which they acknowledge by a report.
func measureFanOut(ctx context.Context, o options, r *report) (err error) {
	trothServer, floorServer, err := startBoth(ctx, spec{Nodes: o.agents, PodsPerNode: 10}, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, trothServer.stop(), floorServer.stop()) }()

	// The agents stop before the servers do, so that they see no broken stream.
	ctx, hangUp := context.WithCancel(ctx)
	following, ctx := errgroup.WithContext(ctx)
	defer func() {
		hangUp()
		if broken := following.Wait(); !errors.Is(broken, context.Canceled) {
			err = errors.Join(err, broken)
		}
	}()

	fleets := []*fleet{newFleet(trothServer), newFleet(floorServer)}
	var accept, idle, pushed [2][]float64
	agents := float64(o.agents)
	for n, f := range fleets {
		before, err := f.ask(askUsage)
		if err != nil {
			return err
		}
		spent, err := f.cost(func() error { return f.connect(ctx, following) })
		if err != nil {
			return err
		}
		accept[n] = []float64{spent.Seconds() * 1e6 / agents}
		after, err := f.ask(askUsage)
		if err != nil {
			return err
		}
		f.baseline = before.RSS
		idle[n] = []float64{float64(after.RSS-f.baseline) / 1024 / agents}
	}
	var cpu, clock [2][]float64
	for round := -1; round < o.rounds; round++ { // the first one warms up
		for turn := range fleets {
			n := (turn + round + 2) % 2 // who begins takes turns too
			var took time.Duration
			spent, err := fleets[n].cost(func() (err error) {
				took, err = fleets[n].push(ctx)
				return err
			})
			if err != nil {
				return err
			}
			if round >= 0 {
				cpu[n] = append(cpu[n], spent.Seconds()*1e6/agents)
				clock[n] = append(clock[n], took.Seconds()*1e3)
			}
		}
	}
	for n, f := range fleets {
		after, err := f.ask(askUsage)
		if err != nil {
			return err
		}
		pushed[n] = []float64{float64(after.RSS-f.baseline) / 1024 / agents}
	}
	r.add(
		row{what: "fan-out: CPU us per agent and push", troth: cpu[0], floor: cpu[1], maxRatio: pushBar},
		row{what: "fan-out: ms from push to last report", troth: clock[0], floor: clock[1], maxRatio: pushBar},
		row{what: "fan-out: KB resident per agent, connected", troth: idle[0], floor: idle[1], maxValue: memoryBar},
		row{what: "fan-out: KB resident per agent, after the pushes", troth: pushed[0], floor: pushed[1], maxRatio: garbageBar},
		row{what: "fan-out: CPU us to accept an agent", troth: accept[0], floor: accept[1]},
	)
	return nil
}

// fleet is a server with its agents.
type fleet struct {
	*process
	baseline int64         // its resident memory before the first agent
	reported chan struct{} // one for each report, and room for one of each agent
}

func newFleet(p *process) *fleet {
	return &fleet{process: p, reported: make(chan struct{}, len(p.Agents))}
}

// connect returns when every agent has its first bundle and has reported it. The
// agents go on in the group until ctx ends.
func (f *fleet) connect(ctx context.Context, following *errgroup.Group) error {
	// As many handshakes at once as keep two cores busy: more would only measure
	// how long they wait for each other.
	const atOnce = 8
	for n, a := range f.Agents {
		if n >= atOnce {
			if err := f.await(ctx, 1); err != nil {
				return err
			}
		}
		connection, err := f.dial(a)
		if err != nil {
			return err
		}
		following.Go(func() error {
			defer connection.Close()
			return f.follow(ctx, connection)
		})
	}
	return f.await(ctx, min(atOnce, len(f.Agents)))
}

// follow is an agent: it reports each bundle that it is sent.
func (f *fleet) follow(ctx context.Context, connection *grpc.ClientConn) error {
	client := trothv1.NewNodeServiceClient(connection)
	stream, err := client.Watch(ctx, &trothv1.WatchRequest{})
	if err != nil {
		return err
	}
	for {
		message, err := stream.Recv()
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return err
		}
		bundles := message.GetBundles().GetBundles()
		if len(bundles) == 0 {
			continue // the node's workloads
		}
		revision := bundles[0].GetRevision()
		_, err = client.Report(ctx, &trothv1.ReportRequest{Bundles: []*trothv1.BundleReport{
			{TrustDomain: trustDomain.Name(), ReceivedRevision: revision, AppliedRevision: revision},
		}})
		if err != nil {
			return err
		}
		f.reported <- struct{}{}
	}
}

// push returns how long it took until the last agent had reported.
func (f *fleet) push(ctx context.Context) (time.Duration, error) {
	began := time.Now()
	if _, err := f.ask(askPush); err != nil {
		return 0, err
	}
	err := f.await(ctx, len(f.Agents))
	return time.Since(began), err
}

func (f *fleet) await(ctx context.Context, reports int) error {
	for range reports {
		select {
		case <-f.reported:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}
