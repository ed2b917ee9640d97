package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	jose "github.com/go-jose/go-jose/v4"
	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"troth.dev/troth/api"
	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/ca"
	"troth.dev/troth/mint"
	"troth.dev/troth/server"
)

const (
	// mintBar is how much longer an agent may wait for a certificate, in the worst
	// hundredth of cases, when CI asks for all that it may have.
	mintBar = 1.2
	// mintPace is how many certificates agents ask for in a second, one a call. A mesh
	// of 10,000 SVIDs that live for an hour asks for 5.
	mintPace = 200
	mintTurn = 3 * time.Second
	// Jobs that ask as often as they are answered, each for a batch.
	mintJobs, mintBatch = 4, 100
)

const mintRules = `
issuers:
- {name: ci, issuer: ci, audience: load, jwksFile: %q}
rules:
- {name: all, issuer: ci, condition: 'claims.repository == "example/shop" && claims.ref == "refs/heads/main"',
   ids: ["spiffe://tests.example/ci/*"], maxTTL: 10m, rate: {perMinute: 1000000, perSubjectPerMinute: 1000000}}
`

// openMint returns what issues to CI, nil if nobody is to ask.
func (t *troth) openMint(ctx context.Context, s spec, keys ca.Keys, log *slog.Logger) (*server.Mint, error) {
	if s.MintKeys == "" {
		return nil, nil
	}
	rules, err := mint.Parse(fmt.Appendf(nil, mintRules, s.MintKeys))
	if err != nil {
		return nil, err
	}
	issuer, err := ca.Open(ctx, ca.Config{
		TrustDomain: rules.TrustDomain(), Keys: keys, Authorities: t.store.Tests(), Ledger: t.store, Audit: log, Test: true,
	})
	if err != nil {
		return nil, err
	}
	if t.jobs, err = mint.NewVerifier(mint.VerifierConfig{Rules: rules}); err != nil {
		return nil, err
	}
	return &server.Mint{Rules: rules, Verifier: t.jobs, Issuer: issuer, Tokens: t.store}, nil
}

// measureMint measures how long agents wait for a certificate with and without CI, in
// turns. They ask at a pace of their own, whatever they wait, so that a server which
// falls behind is seen to.
func measureMint(ctx context.Context, o options, r *report) (err error) {
	dir, err := os.MkdirTemp("", "troth-load-ci-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	ci, err := newCI(filepath.Join(dir, "jwks.json"))
	if err != nil {
		return err
	}
	p, err := start(ctx, spec{Nodes: 1, PodsPerNode: 100, Ledger: o.ledger, MintKeys: filepath.Join(dir, "jwks.json")})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.stop()) }()
	agents := &issuing{process: p}
	if agents.csrs, err = newCSRs(256); err != nil {
		return err
	}
	if err := agents.connect(); err != nil {
		return err
	}
	defer agents.disconnect()
	var with, without, median, medianWithout, cpu, cpuWithout, minted []float64
	for round := -1; round < o.rounds; round++ { // the first one warms up
		for turn := range 2 {
			busy := (turn+round+2)%2 == 0
			jobs, stop := context.WithCancel(ctx)
			var asked atomic.Int64
			group, jobs := errgroup.WithContext(jobs)
			for n := 0; busy && n < mintJobs; n++ {
				group.Go(func() error { return ci.ask(jobs, p, agents.csrs, &asked) })
			}
			var waits []float64
			spent, err := p.cost(func() error {
				var err error
				waits, err = agents.paced(ctx)
				stop()
				return errors.Join(err, group.Wait())
			})
			if err != nil {
				return err
			}
			used := spent.Seconds() * 1000 / mintTurn.Seconds()
			if round < 0 {
				continue
			}
			p50, p99 := waits[len(waits)/2], waits[len(waits)*99/100]
			if busy {
				with, median, cpu = append(with, p99), append(median, p50), append(cpu, used)
				minted = append(minted, float64(asked.Load())/mintTurn.Seconds())
			} else {
				without, medianWithout, cpuWithout = append(without, p99), append(medianWithout, p50), append(cpuWithout, used)
			}
		}
	}
	r.add(
		row{what: "mint: p99 us of an agent's call, CI at its limit and none", troth: with, floor: without, maxRatio: mintBar},
		row{what: "mint: median us of the same", troth: median, floor: medianWithout},
		row{what: "mint: the server's CPU ms in a second", troth: cpu, floor: cpuWithout},
		row{what: "mint: certificates per second to CI meanwhile", troth: minted},
	)
	return nil
}

// paced asks for certificates for a turn and returns how long each took, in us from
// when it was due, the shortest first.
func (s *issuing) paced(ctx context.Context) ([]float64, error) {
	const calls = int(mintPace * mintTurn / time.Second)
	waits := make([]float64, calls)
	group, ctx := errgroup.WithContext(ctx)
	began := time.Now()
	ticker := time.NewTicker(time.Second / mintPace)
	defer ticker.Stop()
	for n := range calls {
		due := began.Add(time.Duration(n) * time.Second / mintPace)
		for time.Now().Before(due) {
			select {
			case <-ticker.C:
			case <-ctx.Done():
				return nil, errors.Join(ctx.Err(), group.Wait())
			}
		}
		client := trothv1.NewSVIDServiceClient(s.connections[n%len(s.connections)])
		group.Go(func() error {
			err := s.ask(ctx, client, n, 1)
			waits[n] = float64(time.Since(due).Microseconds())
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	slices.Sort(waits)
	return waits, nil
}

// ci makes tokens.
type ci struct {
	mu     sync.Mutex
	signer jose.Signer // guarded by mu
}

// newCI writes the keys to a file.
func newCI(path string) (*ci, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	own := jose.JSONWebKey{Key: key, KeyID: "load", Algorithm: string(jose.ES256), Use: "sig"}
	set, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{own.Public()}})
	if err != nil {
		return nil, err
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: own.KeyID}}, nil)
	if err != nil {
		return nil, err
	}
	return &ci{signer: signer}, os.WriteFile(path, set, 0o600)
}

func (c *ci) token() (string, error) {
	now := time.Now().Unix()
	payload, err := json.Marshal(map[string]any{
		"iss": "ci", "aud": "load", "sub": "repo:example/shop", "jti": uuid.NewString(), "iat": now, "exp": now + 300,
		"repository": "example/shop", "ref": "refs/heads/main",
	})
	if err != nil {
		return "", err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	signed, err := c.signer.Sign(payload)
	if err != nil {
		return "", err
	}
	return signed.CompactSerialize()
}

// ask asks for batches until ctx ends, and counts what it gets.
func (c *ci) ask(ctx context.Context, p *process, csrs [][]byte, got *atomic.Int64) error {
	conn, err := p.dialJob(c.token)
	if err != nil {
		return err
	}
	defer conn.Close()
	in := &trothv1.MintX509SVIDsRequest{}
	for n := range mintBatch {
		in.Items = append(in.Items, &trothv1.MintX509SVIDRequest{SpiffeId: "spiffe://tests.example/ci/job", Csr: csrs[n%len(csrs)]})
	}
	for {
		out, err := trothv1.NewMintServiceClient(conn).MintX509SVIDs(ctx, in)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			select { // it waits for its turn, and is told to come back
			case <-time.After(100 * time.Millisecond):
				continue
			case <-ctx.Done():
				return nil
			}
		}
		for _, result := range out.GetResults() {
			if result.GetSvid() == nil {
				return fmt.Errorf("no certificate for CI: %v", result.GetRefusal())
			}
			got.Add(1)
		}
	}
}

// dialJob connects as a CI job.
func (p *process) dialJob(token func() (string, error)) (*grpc.ClientConn, error) {
	bundle, err := p.bundle()
	if err != nil {
		return nil, err
	}
	return api.Dial(api.Config{Address: p.Address, TrustDomain: trustDomain, Bundles: bundle, Token: token})
}
