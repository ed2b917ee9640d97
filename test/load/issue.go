package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	trothv1 "troth.dev/troth/api/troth/v1"
)

// issueBar is how often the floor's CPU time a certificate may cost, recorded
// durably, linted and verified, for a caller who was checked.
const issueBar = 1.1

// shape is a way in which certificates are asked for.
type shape struct {
	name                  string
	callers, calls, items int
}

// measureIssue measures what a certificate costs the server's process.
func measureIssue(ctx context.Context, o options, r *report) (err error) {
	const podsPerNode = 100
	trothServer, floorServer, err := startBoth(ctx, spec{Nodes: 1, PodsPerNode: podsPerNode, Ledger: o.ledger}, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, trothServer.stop(), floorServer.stop()) }()
	csrs, err := newCSRs(256)
	if err != nil {
		return err
	}
	servers := []*issuing{{process: trothServer, csrs: csrs}, {process: floorServer, csrs: csrs}}
	for _, s := range servers {
		if err := s.connect(); err != nil {
			return err
		}
		defer s.disconnect()
	}
	shapes := []shape{
		{"one per call, 64 callers", 64, 4000, 1},
		{"100 per call, 4 callers", 4, 60, podsPerNode},
	}
	for _, shape := range shapes {
		cpu, rate := make([][]float64, 2), make([][]float64, 2)
		for round := -1; round < o.rounds; round++ { // the first one warms up
			for turn := range servers {
				n := (turn + round + 2) % 2 // who begins takes turns too
				began := time.Now()
				spent, err := servers[n].cost(func() error { return servers[n].load(ctx, shape) })
				if err != nil {
					return err
				}
				certificates := float64(shape.calls * shape.items)
				if round >= 0 {
					cpu[n] = append(cpu[n], spent.Seconds()*1e6/certificates)
					rate[n] = append(rate[n], certificates/time.Since(began).Seconds())
				}
			}
		}
		r.add(
			row{what: "issue, " + shape.name + ": CPU us per certificate", troth: cpu[0], floor: cpu[1], maxRatio: issueBar},
			row{what: "issue, " + shape.name + ": certificates per second", troth: rate[0], floor: rate[1]},
		)
	}
	return nil
}

// newCSRs makes requests ahead of time: they cost their maker more than a
// certificate costs its issuer.
func newCSRs(n int) ([][]byte, error) {
	csrs := make([][]byte, n)
	for i := range csrs {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		if csrs[i], err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key); err != nil {
			return nil, err
		}
	}
	return csrs, nil
}

// issuing is a server that is asked for certificates, over a few connections of
// one agent.
type issuing struct {
	*process
	csrs        [][]byte
	connections []*grpc.ClientConn
}

func (s *issuing) connect() error {
	for range 4 {
		connection, err := s.dial(s.Agents[0])
		if err != nil {
			return err
		}
		s.connections = append(s.connections, connection)
	}
	return nil
}

func (s *issuing) disconnect() {
	for _, connection := range s.connections {
		connection.Close() // nothing is left to be lost
	}
}

// load makes the shape's calls. A certificate that is refused fails it.
func (s *issuing) load(ctx context.Context, shape shape) error {
	var next atomic.Int64
	group, ctx := errgroup.WithContext(ctx)
	for caller := range shape.callers {
		client := trothv1.NewSVIDServiceClient(s.connections[caller%len(s.connections)])
		group.Go(func() error {
			for {
				call := int(next.Add(1)) - 1
				if call >= shape.calls {
					return nil
				}
				if err := s.ask(ctx, client, call*shape.items, shape.items); err != nil {
					return err
				}
			}
		})
	}
	return group.Wait()
}

func (s *issuing) ask(ctx context.Context, client trothv1.SVIDServiceClient, first, items int) error {
	in := &trothv1.IssueX509SVIDsRequest{}
	pods := s.Agents[0].Pods
	for n := first; n < first+items; n++ {
		pod := pods[n%len(pods)]
		in.Items = append(in.Items, &trothv1.X509SVIDRequest{
			Pod: &trothv1.PodReference{Uid: pod.UID, Namespace: pod.Namespace, Name: pod.Name, ServiceAccount: pod.ServiceAccount},
			Csr: s.csrs[n%len(s.csrs)],
		})
	}
	out, err := client.IssueX509SVIDs(ctx, in)
	if err != nil {
		return err
	}
	if len(out.GetResults()) != items {
		return fmt.Errorf("%d results for %d items", len(out.GetResults()), items)
	}
	for _, result := range out.GetResults() {
		if len(result.GetSvid().GetCertificates()) == 0 {
			return fmt.Errorf("no certificate: %v", result.GetRefusal())
		}
	}
	return nil
}
