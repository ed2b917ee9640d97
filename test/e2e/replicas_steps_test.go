package e2e_test

import (
	"context"
	"encoding/hex"
	"fmt"
	mathrand "math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/storage"
)

// TestReplicas takes control planes of two and of three replicas, on each store that
// can be shared, through every step of an authority's life. All replicas sign all the
// time. In the middle of each step the replica that was asked for it is killed, cut
// off from the store, or stopped for longer than its lease; agents are led to others,
// as a Service does; then another one is asked for the same, and the first comes back. At the end all that was ever received is in
// the ledger, was signed by the authority of its time, and every change is on record.
func TestReplicas(t *testing.T) {
	t.Parallel()
	for _, store := range []struct {
		name string
		open func(t *testing.T) sharedStore
	}{
		{"postgres", func(t *testing.T) sharedStore { return newPostgresStore(t) }},
		{"kubernetes", func(t *testing.T) sharedStore { return newKubernetesStore(t) }},
	} {
		for n := 2; n <= 3; n++ {
			t.Run(fmt.Sprintf("%d on %s", n, store.name), func(t *testing.T) {
				t.Parallel()
				testReplicas(t, n, store.open(t))
			})
		}
	}
}

// stepsLife is how long SVIDs live here, and stepsLease how long a replica may sign
// without the store's word: a quarter of it.
const (
	stepsLife  = 30 * time.Second
	stepsLease = stepsLife / 4
)

func testReplicas(t *testing.T, n int, store sharedStore) {
	p := newReplicas(t, n, stepsLife, store, "-agent-return=1s")
	root := newCgroup(t)
	account := p.account(t, "web")
	node := p.newNode(t)
	node.start(t)
	pod := p.pod(t, node, account)
	w := startWorkload(t).enter(t, root, pod).watch(t, node)
	w.svid(t, &p.plane, p.id(account))

	s := &steps{replicas: p, operators: make([]trothv1.AuthorityServiceClient, n)}
	for k, r := range p.each {
		s.operators[k] = p.operator(t, r.address)
	}
	s.sign(t, cluster.Token(t, pod, trustDomain.IDString(), 100*time.Minute))

	first := s.active(t)
	var next string
	prepare := func(ctx context.Context, c trothv1.AuthorityServiceClient) error {
		out, err := c.PrepareAuthority(ctx, &trothv1.PrepareAuthorityRequest{Reason: "steps"})
		next = out.GetAuthority().GetId()
		return err
	}
	activate := func(ctx context.Context, c trothv1.AuthorityServiceClient) error {
		_, err := c.ActivateAuthority(ctx, &trothv1.ActivateAuthorityRequest{Id: next})
		return err
	}
	revoke := func(ctx context.Context, c trothv1.AuthorityServiceClient) error {
		_, err := c.RevokeAuthority(ctx, &trothv1.RevokeAuthorityRequest{Id: first})
		return err
	}
	s.step(t, "prepare", prepare)
	s.step(t, "activate", activate)
	s.step(t, "revoke", revoke)
	second := next
	s.step(t, "prepare another", prepare)
	s.step(t, "abort", func(ctx context.Context, c trothv1.AuthorityServiceClient) error {
		_, err := c.AbortAuthority(ctx, &trothv1.AbortAuthorityRequest{Id: next})
		return err
	})
	s.step(t, "taint", func(ctx context.Context, c trothv1.AuthorityServiceClient) error {
		_, err := c.TaintAuthority(ctx, &trothv1.TaintAuthorityRequest{Id: second, Reason: "steps"})
		return err
	})
	// The schedule does the rest, whoever of them is first.
	s.agree(t, "the tainted one to be revoked", func(s *trothv1.AuthorityStatus) bool {
		active := inState(s, trothv1.AuthorityState_AUTHORITY_STATE_ACTIVE)
		return active != nil && active.GetId() != second && inState(s, trothv1.AuthorityState_AUTHORITY_STATE_TAINTED) == nil
	})
	s.stop()
	w.checkValid(t)
	s.judge(t, store.open(t))
}

// steps is a control plane whose authorities are changed while it signs.
type steps struct {
	*replicas

	operators []trothv1.AuthorityServiceClient // of each replica
	taken     int                              // how many steps
	stop      func()                           // ends the signing

	mu       sync.Mutex
	receipts []receipt // guarded by mu
	refused  int       // guarded by mu
}

// receipt is one certificate that somebody got.
type receipt struct {
	serial, authority string
	replica           int
	at                time.Time
}

// sign has each replica issue certificates, ten a second.
func (s *steps) sign(t *testing.T, token string) {
	t.Helper()
	c := s.client(t)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var signing sync.WaitGroup
	for k, r := range s.each {
		one := *c
		one.address, one.bundles = r.address, published{s.bundle}
		signing.Go(func() {
			for ctx.Err() == nil {
				s.signOne(ctx, &one, token, k)
				select {
				case <-ctx.Done():
				case <-time.After(100 * time.Millisecond):
				}
			}
		})
	}
	s.stop = sync.OnceFunc(func() { cancel(); signing.Wait() })
	t.Cleanup(s.stop)
}

func (s *steps) signOne(ctx context.Context, c *client, token string, k int) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	conn, err := c.withToken(token)
	if err != nil {
		panic(err) // of what does not depend on the replica
	}
	defer conn.Close()
	// Not WaitForReady: a replica that is away is asked again soon enough.
	out, err := trothv1.NewSVIDServiceClient(conn).IssueX509SVIDs(ctx, &trothv1.IssueX509SVIDsRequest{
		Items: []*trothv1.X509SVIDRequest{{Csr: c.csr}},
	}, grpc.WaitForReady(false))
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil || out.GetResults()[0].GetSvid() == nil {
		s.refused++
		return
	}
	chain, err := parse(out.GetResults()[0].GetSvid())
	if err != nil {
		panic(err)
	}
	s.receipts = append(s.receipts, receipt{serial(chain[0]), hex.EncodeToString(chain[0].AuthorityKeyId), k, time.Now()})
}

// step does something to an authority by one replica, which something happens to
// meanwhile, and then by the others until it is done; then all replicas say that it
// is. What a gate refuses for now is tried until it opens.
func (s *steps) step(t *testing.T, what string, do func(context.Context, trothv1.AuthorityServiceClient) error) {
	t.Helper()
	victim := s.taken % len(s.each)
	disturbance := []func(*replica, *testing.T) (restore func()){(*replica).dieAndReturn, (*replica).loseStore, (*replica).standStill}[s.taken%3]
	s.taken++

	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	restored := make(chan func())
	go func() {
		time.Sleep(mathrand.N(20 * time.Millisecond))
		restored <- disturbance(s.each[victim], t)
	}()
	switch err := do(ctx, s.operators[victim]); status.Code(err) {
	case codes.OK, codes.FailedPrecondition, codes.Unavailable, codes.DeadlineExceeded:
	default:
		t.Errorf("%s, by a replica that is disturbed: %v", what, err)
	}
	restore := <-restored
	s.balancer.avoid(victim, true)
	s.await(t, what, do, victim)
	restore()
	s.balancer.avoid(victim, false)
	s.agree(t, what+", at all replicas", func(*trothv1.AuthorityStatus) bool { return true })
}

// await repeats it, as long as a gate refuses it, at all replicas but one in turn.
func (s *steps) await(t *testing.T, what string, do func(context.Context, trothv1.AuthorityServiceClient) error, but int) {
	t.Helper()
	for k, late := 0, time.Now().Add(3*patience); ; k++ {
		if k%len(s.operators) == but {
			continue
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		err := do(ctx, s.operators[k%len(s.operators)])
		cancel()
		if err == nil {
			return
		}
		if time.Now().After(late) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// agree waits until all replicas have the same revision, for which the condition
// holds.
func (s *steps) agree(t *testing.T, what string, holds func(*trothv1.AuthorityStatus) bool) {
	t.Helper()
	var last []string
	for late := time.Now().Add(3 * patience); ; {
		last = nil
		revisions := make(map[uint64]bool)
		fine := true
		for k, c := range s.operators {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			out, err := c.GetAuthorityStatus(ctx, &trothv1.GetAuthorityStatusRequest{})
			cancel()
			fine = fine && err == nil && holds(out.GetStatus())
			revisions[out.GetStatus().GetRevision()] = true
			last = append(last, fmt.Sprintf("%d: %d %v", k, out.GetStatus().GetRevision(), err))
		}
		if fine && len(revisions) == 1 {
			return
		}
		if time.Now().After(late) {
			t.Fatalf("wait for %s: %v", what, last)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (s *steps) active(t *testing.T) string {
	t.Helper()
	out, err := s.operators[0].GetAuthorityStatus(bounded(t), &trothv1.GetAuthorityStatusRequest{}, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	return inState(out.GetStatus(), trothv1.AuthorityState_AUTHORITY_STATE_ACTIVE).GetId()
}

// dieAndReturn kills a replica.
func (r *replica) dieAndReturn(t *testing.T) (restore func()) {
	r.kill()
	return func() { r.serve(t) }
}

// loseStore cuts the replica off from the store for longer than its lease.
func (r *replica) loseStore(*testing.T) (restore func()) {
	r.wire.pull()
	return func() {
		time.Sleep(stepsLease + time.Second)
		r.wire.plug()
	}
}

// standStill stops the replica for as long, as a machine does that is short of
// memory, or a hypervisor.
func (r *replica) standStill(t *testing.T) (restore func()) {
	check(t, r.cmd.Process.Signal(syscall.SIGSTOP))
	return func() {
		time.Sleep(stepsLease + time.Second)
		check(t, r.cmd.Process.Signal(syscall.SIGCONT))
	}
}

// judge holds what was received against the ledger and the record of changes.
func (s *steps) judge(t *testing.T, store ledgerStore) {
	t.Helper()
	out, err := s.operators[0].ListAuthorityChanges(bounded(t), &trothv1.ListAuthorityChangesRequest{}, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	changes := out.GetChanges()
	slices.Reverse(changes)
	from, until := make(map[string]time.Time), make(map[string]time.Time)
	revision := uint64(1)
	for _, c := range changes {
		if c.GetRevision() != revision && c.GetRevision() != revision+1 {
			t.Errorf("the record goes from revision %d to %d", revision, c.GetRevision())
		}
		revision = c.GetRevision()
		switch c.GetState() {
		case trothv1.AuthorityState_AUTHORITY_STATE_ACTIVE:
			if from[c.GetAuthorityId()].IsZero() {
				from[c.GetAuthorityId()] = c.GetAt().AsTime()
			}
		case trothv1.AuthorityState_AUTHORITY_STATE_OLD, trothv1.AuthorityState_AUTHORITY_STATE_TAINTED:
			if until[c.GetAuthorityId()].IsZero() {
				until[c.GetAuthorityId()] = c.GetAt().AsTime()
			}
		default:
		}
	}
	recorded := make(map[string]storage.Issuance)
	for q := (storage.Query{}); ; {
		page, err := store.Query(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		before := len(recorded)
		for _, i := range page {
			recorded[i.Serial] = i
		}
		if len(page) < q.Max() {
			break
		}
		if len(recorded) == before {
			t.Fatal("the ledger has more in a millisecond than it returns")
		}
		q.IssuedUntil = page[len(page)-1].IssuedAt.Add(time.Millisecond)
	}
	by := make(map[int]int)
	const slack = 2 * time.Second // from the signature to the receipt
	for _, r := range s.receipts {
		by[r.replica]++
		if i, ok := recorded[r.serial]; !ok || i.AuthorityID != r.authority {
			t.Errorf("%+v is not in the ledger: %+v", r, i)
		}
		if end := until[r.authority]; !end.IsZero() && r.at.After(end.Add(stepsLease+slack)) {
			t.Errorf("replica %d signed with %s %v after it was replaced", r.replica, r.authority, r.at.Sub(end))
		}
		if r.at.Before(from[r.authority]) {
			t.Errorf("replica %d signed with %s %v before it was activated", r.replica, r.authority, from[r.authority].Sub(r.at))
		}
	}
	for k := range s.each {
		if by[k] == 0 {
			t.Errorf("replica %d has signed nothing", k)
		}
	}
	t.Logf("%d certificates from %v, %d refused, %d changes", len(s.receipts), by, s.refused, len(changes))
}
