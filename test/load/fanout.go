package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/handshake"
	"troth.dev/troth/internal/latest"
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
	// proofBar is how often the floor's time on the clock it may take, from the
	// order to prepare an authority to the proof of the last agent, and proofCPUBar
	// the server's CPU time for each agent by then, in microseconds.
	proofBar    = 3
	proofCPUBar = 300
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
	// Agents wait for 30 ms for what else there is to report. A bare
	// acknowledgement, which a rotation is held against below, waits for nothing.
	for _, f := range fleets {
		f.pause.Store(int64(30 * time.Millisecond))
	}
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
	fleets[1].pause.Store(0)
	var proofCPU, proofClock [2][]float64
	for round := -1; round < o.rounds; round++ {
		for turn := range fleets {
			n := (turn + round + 2) % 2
			var took time.Duration
			spent, err := fleets[n].cost(func() (err error) {
				took, err = fleets[n].prove(ctx)
				return err
			})
			if err != nil {
				return err
			}
			if round >= 0 {
				proofCPU[n] = append(proofCPU[n], spent.Seconds()*1e6/agents)
				proofClock[n] = append(proofClock[n], took.Seconds()*1e3)
			}
			if _, err := fleets[n].ask(askAbort); err != nil {
				return err
			}
			if err := fleets[n].await(ctx, len(fleets[n].Agents)); err != nil {
				return err
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
		row{what: "rotation: ms from prepare to the last proof", troth: proofClock[0], floor: proofClock[1], maxRatio: proofBar},
		row{what: "rotation: CPU us per agent, prepare to the last proof", troth: proofCPU[0], floor: proofCPU[1], maxValue: proofCPUBar},
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
	pause    atomic.Int64  // how long an agent waits for more to report, a time.Duration
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

// prove returns how long it took until the server knew that every agent had proved
// what was prepared.
func (f *fleet) prove(ctx context.Context) (time.Duration, error) {
	began := time.Now()
	if _, err := f.ask(askPrepare); err != nil {
		return 0, err
	}
	if err := f.await(ctx, len(f.Agents)); err != nil { // each has the bundle
		return 0, err
	}
	_, err := f.ask(askProof)
	return time.Since(began), err
}

// follow is an agent: it reports each bundle that it is sent, and proves each probe, a
// moment after the news, so that bundle and probe make one report.
func (f *fleet) follow(ctx context.Context, connection *grpc.ClientConn) error {
	client := trothv1.NewNodeServiceClient(connection)
	stream, err := client.Watch(ctx, &trothv1.WatchRequest{})
	if err != nil {
		return err
	}
	var held latest.Value[[2]proto.Message] // the bundle, and the probe that came after it
	_, news := held.Load()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		for {
			message, err := stream.Recv()
			if err != nil {
				return cmp.Or(context.Cause(ctx), err)
			}
			now, _ := held.Load()
			switch {
			case message.GetBundles() != nil:
				held.Set([2]proto.Message{message.GetBundles().GetBundles()[0]})
			case message.GetProbe().GetAuthorityId() != "":
				held.Set([2]proto.Message{now[0], message.GetProbe()})
			}
		}
	})
	group.Go(func() error {
		reported := uint64(0)
		for {
			select {
			case <-news:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			time.Sleep(time.Duration(f.pause.Load()))
			var now [2]proto.Message
			now, news = held.Load()
			bundle := now[0].(*trothv1.Bundle)
			known := &trothv1.BundleReport{
				TrustDomain: trustDomain.Name(), ReceivedRevision: bundle.GetRevision(), AppliedRevision: bundle.GetRevision(),
			}
			if probe, ok := now[1].(*trothv1.Probe); ok {
				if err := verify(probe, bundle); err != nil {
					return err
				}
				known.ProvedRevision, known.ProvedAuthorityId = bundle.GetRevision(), probe.GetAuthorityId()
			}
			// As of an agent that has run for long: it counts at once.
			_, err := client.Report(ctx, &trothv1.ReportRequest{
				Bundles: []*trothv1.BundleReport{known}, RunningFor: durationpb.New(24 * time.Hour),
			})
			if err != nil {
				return cmp.Or(context.Cause(ctx), err)
			}
			// The floor's bundles have no revision: each is another.
			if revision := bundle.GetRevision(); revision == 0 || revision != reported {
				reported = revision
				select {
				case f.reported <- struct{}{}:
				case <-ctx.Done():
					return context.Cause(ctx)
				}
			}
		}
	})
	return group.Wait()
}

// verify does what an agent does with a probe.
func verify(probe *trothv1.Probe, by *trothv1.Bundle) error {
	bundle := x509bundle.New(trustDomain)
	for _, a := range by.GetX509Authorities() {
		certificate, err := x509.ParseCertificate(a.GetCertificate())
		if err != nil {
			return err
		}
		bundle.AddX509Authority(certificate)
	}
	verdict := func(chain [][]byte) error {
		certificates, err := x509.ParseCertificates(bytes.Join(chain, nil))
		if err != nil {
			return err
		}
		_, err = handshake.Verify(certificates, bundle, time.Now())
		return err
	}
	if err := verdict(probe.GetTrusted()); err != nil {
		return err
	}
	if verdict(probe.GetUntrusted()) == nil {
		return errors.New("a leaf that nobody trusts was accepted")
	}
	return nil
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
