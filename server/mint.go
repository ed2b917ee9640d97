package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/ca"
	"troth.dev/troth/identity"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/mint"
	"troth.dev/troth/storage"
)

// Mint is what a server needs to issue identities to CI jobs.
type Mint struct {
	Rules *mint.Rules
	// Verifier knows the issuers of Rules. Whoever made it closes it.
	Verifier *mint.Verifier
	// Issuer is of the trust domain of Rules, which is for tests, and issues SVIDs that
	// live at least as long as the rules give. The server runs and rotates it.
	Issuer *ca.Issuer
	// Tokens is shared by all replicas.
	Tokens storage.TokenStore
}

const (
	// maxMintItems is how many SVIDs a job may ask for with one token.
	maxMintItems = 500
	// mintChunk is how many SVIDs are issued at a time. Each chunk waits for its share
	// of MintSVIDs: what a job gets in one call takes from the agents no more than that.
	mintChunk = 5
	// mintSlots is how many calls issue at the same time. Others wait for mintPatience.
	mintSlots    = 2
	mintPatience = 5 * time.Second
	// maxSubjects is how many subjects the server counts for. One who is forgotten
	// begins anew.
	maxSubjects = 10_000
	// pruneSpentEvery is how often spent tokens are pruned that have expired.
	pruneSpentEvery = 10 * time.Minute
)

// minter is a Mint at work.
type minter struct {
	Mint
	calls    *rate.Limiter // of those who have proved nothing
	svids    *rate.Limiter
	slots    chan struct{}
	mu       sync.Mutex
	byRule   map[*mint.Rule]*rate.Limiter // guarded by mu
	subjects *lru.Cache[subject, *rate.Limiter]
	// propagation stands for the evidence that agents give elsewhere.
	propagation latest.Value[ca.Propagation]
}

// subject is one who has a share of a rule's rate.
type subject struct {
	rule *mint.Rule
	name string
}

func newMinter(c Config) (*minter, error) {
	m := c.Mint
	if m.Rules == nil || m.Verifier == nil || m.Issuer == nil || m.Tokens == nil {
		return nil, errors.New("server: Mint: Rules, Verifier, Issuer and Tokens are required")
	}
	set, _ := m.Issuer.Authorities().Load()
	switch {
	case set.TrustDomain == c.TrustDomain:
		return nil, fmt.Errorf("server: Mint: trust domain %q is not for tests: it is the agents'", set.TrustDomain)
	case set.TrustDomain != m.Rules.TrustDomain():
		return nil, fmt.Errorf("server: Mint: the rules give SPIFFE IDs of trust domain %q, and the authorities are of %q", m.Rules.TrustDomain(), set.TrustDomain)
	case m.Rules.MaxTTL() > m.Issuer.SVIDLife():
		return nil, fmt.Errorf("server: Mint: the rules give lives of %v, and the issuer %v at most", m.Rules.MaxTTL(), m.Issuer.SVIDLife())
	}
	for _, a := range set.Bundle().Authorities {
		if !identity.IsTest(a.Certificate) {
			return nil, fmt.Errorf("server: Mint: authority %s is not for tests", a.ID)
		}
	}
	subjects, err := lru.New[subject, *rate.Limiter](maxSubjects)
	if err != nil {
		return nil, err
	}
	return &minter{
		Mint:     *m,
		calls:    rate.NewLimiter(c.Limits.MintCalls, 2*int(c.Limits.MintCalls)),
		svids:    rate.NewLimiter(c.Limits.MintSVIDs, 2*mintChunk),
		slots:    make(chan struct{}, mintSlots),
		byRule:   make(map[*mint.Rule]*rate.Limiter),
		subjects: subjects,
	}, nil
}

type mintService struct {
	trothv1.UnimplementedMintServiceServer
	server *Server
}

// MintX509SVIDs is specified in mint.proto. Its steps, cheapest first:
//
//  1. how much is asked for, and how much was asked for lately (admit has settled the
//     latter for the connection and for all who have proved nothing);
//  2. the token: what it says of itself, then its signature;
//  3. the rules: conditions once, then each item;
//  4. how much the rule and the subject have been given lately;
//  5. whether anything could be issued now;
//  6. the token is spent;
//  7. ca.Issue, in chunks: record, sign, verify;
//  8. answer.
//
// The token is spent before anything is recorded. If the process dies between the two,
// the job got nothing, and needs a new token. The other way round two replicas could
// serve one token, and a token that was stolen would be worth as much as the one who
// has it can get out of us before we notice.
func (m *mintService) MintX509SVIDs(ctx context.Context, in *trothv1.MintX509SVIDsRequest) (*trothv1.MintX509SVIDsResponse, error) {
	s, minting := m.server, m.server.minter
	switch {
	case minting == nil:
		return nil, refusals.mintDisabled
	case len(in.GetItems()) == 0:
		return nil, refusals.noItems
	case len(in.GetItems()) > maxMintItems:
		return nil, refusals.tooManyMintItems
	case !minting.calls.Allow():
		return nil, refusals.rateLimited
	}
	conn, raw, err := presented(ctx)
	switch {
	case err != nil:
		return nil, err
	case conn.presented:
		return nil, refusals.methodNotPermitted
	case raw == "":
		return nil, refusals.noCredentials
	}
	job, err := minting.Verifier.Verify(ctx, raw)
	s.metrics.verified(err)
	if err != nil {
		return nil, err
	}
	match := minting.Rules.Match(job.Claims)
	if match == nil {
		return nil, refusals.noRuleMatches
	}

	batch := newMintBatch(in.GetItems())
	batch.decide(match, job)
	if len(batch.requests) > 0 {
		if err := minting.serve(ctx, batch, job); err != nil {
			return nil, err
		}
	}
	for _, result := range batch.results {
		if refused := result.GetRefusal(); refused != nil {
			s.metrics.items.WithLabelValues(refused.GetReason()).Inc()
		} else {
			s.metrics.minted.Inc()
		}
	}
	bundle, _ := minting.Issuer.Bundle().Load()
	return &trothv1.MintX509SVIDsResponse{Results: batch.results, Bundle: bundleProto(bundle)}, nil
}

// mintBatch is the items of a call and what became of them.
type mintBatch struct {
	items    []*trothv1.MintX509SVIDRequest
	results  []*trothv1.X509SVIDResult // by item
	requests []ca.Request              // of the items that are permitted
	places   []int                     // whose they are
	given    map[*mint.Rule]map[string]int
}

func newMintBatch(items []*trothv1.MintX509SVIDRequest) *mintBatch {
	return &mintBatch{
		items: items, results: make([]*trothv1.X509SVIDResult, len(items)), given: make(map[*mint.Rule]map[string]int),
	}
}

func (b *mintBatch) refuse(n int, r *refusal) {
	b.results[n] = &trothv1.X509SVIDResult{Result: &trothv1.X509SVIDResult_Refusal{Refusal: r.proto()}}
}

// decide asks the rules about each item.
func (b *mintBatch) decide(match *mint.Match, job mint.Token) {
	for n, item := range b.items {
		ttl, err := askedTTL(item.GetTtl())
		if err != nil {
			b.refuse(n, refusals.ttlInvalid)
			continue
		}
		grant, err := match.Decide(item.GetSpiffeId(), ttl)
		if err != nil {
			b.refuse(n, refusalOf(err))
			continue
		}
		b.places = append(b.places, n)
		b.requests = append(b.requests, ca.Request{ID: grant.ID, CSR: item.GetCsr(), Life: grant.TTL, Caller: jobText(job, grant.Rule)})
		if b.given[grant.Rule] == nil {
			b.given[grant.Rule] = make(map[string]int)
		}
		b.given[grant.Rule][grant.Subject]++
	}
}

func askedTTL(asked *durationpb.Duration) (time.Duration, error) {
	if asked == nil {
		return 0, nil
	}
	if err := asked.CheckValid(); err != nil {
		return 0, err
	}
	ttl := asked.AsDuration()
	if ttl < mint.MinTTL { // 0 would mean that nothing was asked for
		return 0, errors.New("too short")
	}
	return ttl, nil
}

// jobText is how the ledger names a job: whatever its subject is, in letters that every
// store takes.
func jobText(job mint.Token, rule *mint.Rule) string {
	const longest = 1024
	text := fmt.Sprintf("ci issuer=%s rule=%s sub=%+q", job.IssuerName, rule.Name, job.Subject)
	return text[:min(len(text), longest)]
}

// serve issues what is permitted, or returns why nothing of it is issued.
func (m *minter) serve(ctx context.Context, b *mintBatch, job mint.Token) error {
	giveBack, err := m.take(b.given, time.Now())
	if err != nil {
		return err
	}
	// Before the token is spent for nothing.
	if err := m.Issuer.Ready(); err != nil {
		giveBack()
		return err
	}
	release, err := m.slot(ctx)
	if err != nil {
		giveBack()
		return err
	}
	defer release()

	// A crash before this leaves the token as it was; one after it leaves it spent.
	if err := m.Tokens.Spend(ctx, job.Issuer, job.SpendID, job.Until); err != nil {
		// Whoever finds a spent token must not use up its subject's rate with it.
		giveBack()
		return &spendError{err}
	}
	issued := 0
	for begin := 0; begin < len(b.requests); begin += mintChunk {
		end := min(begin+mintChunk, len(b.requests))
		results, err := m.issue(ctx, b.requests[begin:end])
		if err != nil && issued == 0 {
			return err
		}
		for n, place := range b.places[begin:end] {
			failed := err
			if failed == nil {
				failed = results[n].Err
			}
			if failed == nil {
				issued++
				b.results[place] = &trothv1.X509SVIDResult{Result: &trothv1.X509SVIDResult_Svid{Svid: mintedProto(results[n].SVID)}}
				continue
			}
			refused := refusalOf(failed)
			if refused == nil {
				return failed
			}
			b.refuse(place, refused)
		}
	}
	return nil
}

// issue issues one chunk when its turn comes.
func (m *minter) issue(ctx context.Context, requests []ca.Request) ([]ca.Result, error) {
	if err := m.svids.WaitN(ctx, len(requests)); err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, refusals.rateLimited // its turn would come after its deadline
	}
	return m.Issuer.Issue(ctx, requests...)
}

// slot waits for a place among those who issue. The agents' calls need none.
func (m *minter) slot(ctx context.Context) (release func(), err error) {
	patience := time.NewTimer(mintPatience)
	defer patience.Stop()
	select {
	case m.slots <- struct{}{}:
		return func() { <-m.slots }, nil
	case <-patience.C:
		return nil, refusals.rateLimited
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// take counts what is about to be given, or takes nothing and refuses, if it is more
// than a rule or a subject of it may have now. giveBack undoes it.
func (m *minter) take(given map[*mint.Rule]map[string]int, now time.Time) (giveBack func(), err error) {
	var taken []*rate.Reservation
	var wait time.Duration
	never := false
	reserve := func(l *rate.Limiter, n int) {
		r := l.ReserveN(now, n)
		never = never || !r.OK()
		if r.OK() {
			taken = append(taken, r)
			wait = max(wait, r.DelayFrom(now))
		}
	}
	for rule, bySubject := range given {
		all := 0
		for name, n := range bySubject {
			reserve(m.ofSubject(subject{rule, name}), n)
			all += n
		}
		reserve(m.ofRule(rule), all)
	}
	giveBack = func() {
		for _, r := range taken {
			r.CancelAt(now)
		}
	}
	if !never && wait == 0 {
		return giveBack, nil
	}
	giveBack()
	if never {
		return nil, refusals.moreThanRate
	}
	limited := *refusals.rateLimited
	limited.retry = max(wait, time.Second)
	return nil, &limited
}

func perMinute(n int) *rate.Limiter { return rate.NewLimiter(rate.Limit(n)/60, n) }

func (m *minter) ofRule(rule *mint.Rule) *rate.Limiter {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.byRule[rule] == nil {
		m.byRule[rule] = perMinute(rule.PerMinute)
	}
	return m.byRule[rule]
}

func (m *minter) ofSubject(who subject) *rate.Limiter {
	fresh := perMinute(who.rule.PerSubject)
	if known, ok, _ := m.subjects.PeekOrAdd(who, fresh); ok {
		m.subjects.Get(who) // it was used now
		return known
	}
	return fresh
}

// mintedProto is an SVID without a place among those that are replaced together: a job
// is over by then.
func mintedProto(svid ca.SVID) *trothv1.X509SVID {
	return &trothv1.X509SVID{
		SpiffeId: svid.ID.String(), Certificates: svid.Certificates, ExpiresAt: timestamppb.New(svid.NotAfter), AuthorityId: svid.AuthorityID,
	}
}

// spendError is why a token was not spent.
type spendError struct{ err error }

func (e *spendError) Error() string { return "spend the token: " + e.err.Error() }
func (e *spendError) Unwrap() error { return e.err }

// mintRefusal is what the caller is told of a rule's refusal.
func mintRefusal(r *mint.Refusal) *refusal {
	code := codes.PermissionDenied
	if r.Reason == mint.IDMalformed || r.Reason == mint.TTLInvalid {
		code = codes.InvalidArgument
	}
	return &refusal{code, string(r.Reason), r.Message, 0}
}

// ExplainMint is specified in mint.proto.
func (m *mintService) ExplainMint(_ context.Context, in *trothv1.ExplainMintRequest) (*trothv1.ExplainMintResponse, error) {
	minting := m.server.minter
	if minting == nil {
		return nil, refusals.mintDisabled
	}
	claims, err := mint.ParseClaims(in.GetClaims())
	if err != nil {
		return nil, &refusal{codes.InvalidArgument, "CLAIMS_MALFORMED", err.Error(), 0}
	}
	ttl, err := askedTTL(in.GetTtl())
	if err != nil {
		return nil, refusals.ttlInvalid
	}
	out := &trothv1.ExplainMintResponse{}
	for _, v := range minting.Rules.Explain(claims, in.GetSpiffeId(), ttl) {
		out.Verdicts = append(out.Verdicts, &trothv1.MintRuleVerdict{
			Rule: v.Rule, Matched: v.Reason == mint.Matched, Reason: string(v.Reason), Message: v.Message,
		})
	}
	return out, nil
}

// keepEvidence keeps what takes the place of agents' proofs in the trust domain for
// tests, where there are no agents, until ctx ends.
//
// A job verifies by the bundle that came with its SVIDs, and has no reason to do so for
// longer than those live. So a prepared authority may sign when it has been in the
// bundle for as long as the longest SVID lives: then every bundle in use has it.
func (m *minter) keepEvidence(ctx context.Context) {
	const every = 20 * time.Second // evidence counts for a minute
	for {
		set, changed := m.Issuer.Authorities().Load()
		m.propagation.Set(evidenceOf(set, m.Issuer.SVIDLife(), time.Now()))
		timer := time.NewTimer(every)
		select {
		case <-ctx.Done():
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

// evidenceOf is the evidence of one verifier that stands for all jobs.
func evidenceOf(set ca.Set, svidLife time.Duration, now time.Time) ca.Propagation {
	p := ca.Propagation{At: now, Expected: 1, Revision: set.Revision}
	next, ok := set.Successor()
	if !ok {
		return p
	}
	p.Authority = next.ID
	if known := next.Changed.At.Add(svidLife); now.Before(known) {
		p.Waiting = []ca.Waiting{{Node: "jobs", Lacks: "have bundles without it until " + known.UTC().Format(time.RFC3339), Since: next.Changed.At}}
		return p
	}
	p.Received, p.Applied, p.Proved = 1, 1, 1
	return p
}

// pruneSpent forgets tokens that have expired, until ctx ends.
func (m *minter) pruneSpent(ctx context.Context, log *slog.Logger) {
	ticker := time.NewTicker(pruneSpentEvery)
	defer ticker.Stop()
	for {
		// Until has room for the clocks of replicas; a store's rounding has it here.
		if _, err := m.Tokens.PruneSpent(ctx, time.Now().Add(-time.Minute)); err != nil && ctx.Err() == nil {
			log.LogAttrs(ctx, slog.LevelError, "spent tokens were not pruned", slog.Any("err", err))
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}
