package e2e_test

import (
	"context"
	"crypto/x509"
	"fmt"
	mathrand "math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/storage"
)

// The server is killed again and again, at random moments, under load and while
// workloads renew. No workload ever holds an SVID that a peer would refuse, and
// no certificate that anybody was given is missing from the ledger.
func TestServerKilled(t *testing.T) {
	t.Parallel()
	const (
		kills   = 5   // at least
		longest = 600 // certificates that the load is given before a kill, at most
		pause   = 2 * time.Second
		life    = 30 * time.Second
	)
	p := newPlane(t, life)
	r := &receipts{}

	n, root := p.newNode(t).start(t), newCgroup(t)
	workloads := make(map[string]*workload) // by SPIFFE ID
	for _, name := range []string{"cart", "web", "pay"} {
		account := p.account(t, name)
		workloads[p.id(account)] = startWorkload(t).enter(t, root, p.pod(t, n, account)).watch(t, n)
	}
	for id, w := range workloads {
		w.svid(t, p, id)
	}

	end := p.startLoad(t, r)
	killed, renewed := 0, false
	for ; killed < kills || !renewed; killed++ {
		// Half of the servers live long enough for the workloads' agent to come back
		// and renew, and the others do not.
		wait(t, mathrand.N(pause))
		r.killAfter(t, p.server, 1+mathrand.N(longest))
		p.serve(t)
		for id, w := range workloads {
			renewed = renewed || len(updates(t, p, w, id)) > 1
		}
	}
	end()

	// All renew once more after the last kill.
	restarted := time.Now()
	for id, w := range workloads {
		for leaf := w.svid(t, p, id); leaf.NotAfter.Before(restarted.Add(life)); {
			leaf = w.rotated(t, p, id, leaf)
		}
		w.checkValid(t)
		for _, leaf := range updates(t, p, w, id) {
			r.add(leaf)
		}
	}

	ledger := p.ledger(t)
	serials, broken := r.all()
	if broken == 0 {
		t.Errorf("none of %d kills broke a call: the load is too light to show anything", killed)
	}
	for _, s := range serials {
		found, err := ledger.Query(t.Context(), storage.Query{Serial: s})
		if err != nil {
			t.Fatal(err)
		}
		if len(found) != 1 {
			t.Errorf("certificate %s was received and is %d times in the ledger, want once", s, len(found))
		}
	}
	t.Logf("%d kills, which broke %d calls; %d certificates received and looked up in the ledger", killed, broken, len(serials))
}

// updates returns the leaves of all SVIDs that a workload has been sent.
func updates(t *testing.T, p *plane, w *workload, id string) []*x509.Certificate {
	t.Helper()
	var leaves []*x509.Certificate
	for _, e := range written(w.process, func(e event) bool { return e.Kind == "update" }) {
		leaves = append(leaves, leaf(t, p, e, id))
	}
	return leaves
}

// startLoad starts the agents of eight further nodes, as goroutines, that ask for
// SVIDs whenever the server is about to be killed, until end is called, or the
// test ends.
func (p *plane) startLoad(t *testing.T, r *receipts) (end func()) {
	t.Helper()
	const agents, podsEach = 8, 5
	account := p.account(t, "load")
	ctx, cancel := context.WithCancel(t.Context())
	load, ctx := errgroup.WithContext(ctx)
	for range agents {
		node := p.newNode(t)
		l := &loader{client: p.client(t), token: node.token, receipts: r}
		for range podsEach {
			l.pods = append(l.pods, reference(p.pod(t, node, account)))
		}
		load.Go(func() error { return l.run(ctx) })
	}
	end = sync.OnceFunc(func() {
		cancel()
		if err := load.Wait(); err != nil {
			t.Errorf("the load: %v", err)
		}
	})
	t.Cleanup(end)
	return end
}

// loader is an agent that asks for SVIDs without end.
type loader struct {
	*client

	token    string
	pods     []*trothv1.PodReference
	receipts *receipts
}

// run attests and asks until ctx ends. It fails when it is refused something: that
// the server is away is no refusal, and that its SVID has expired means to attest
// again.
func (l *loader) run(ctx context.Context) error {
	for l.receipts.wanted(ctx) == nil {
		svid, err := l.attest(ctx, l.token)
		if err == nil {
			l.receipts.add(svid.Certificates[0])
			err = l.ask(ctx, svid)
		}
		switch code := status.Code(err); {
		case ctx.Err() != nil, code == codes.Unauthenticated:
		case code == codes.Unavailable:
			l.receipts.broke()
		default:
			return err
		}
	}
	return nil
}

// ask keeps a few calls in flight, so that a kill finds one of them at every step
// between the request and the answer.
func (l *loader) ask(ctx context.Context, svid *x509svid.SVID) error {
	const inFlight = 4
	conn, err := l.withSVID(svid)
	if err != nil {
		return err
	}
	defer conn.Close()
	calls, ctx := errgroup.WithContext(ctx)
	for range inFlight {
		calls.Go(func() error {
			for {
				if err := l.askOnce(ctx, conn); err != nil {
					return err
				}
			}
		})
	}
	return calls.Wait()
}

func (l *loader) askOnce(ctx context.Context, conn *grpc.ClientConn) error {
	if err := l.receipts.wanted(ctx); err != nil {
		return err
	}
	results, err := l.issue(ctx, conn, l.pods...)
	if status.Code(err) == codes.Unavailable {
		l.receipts.broke()
		return nil
	}
	if err != nil {
		return err
	}
	for _, r := range results {
		if refused := r.GetRefusal(); refused != nil && codes.Code(refused.GetCode()) != codes.Unavailable {
			return fmt.Errorf("refused: %s", refused)
		} else if refused != nil {
			continue // the server has just started and does not know the pods yet
		}
		chain, err := parse(r.GetSvid())
		if err != nil {
			return err
		}
		l.receipts.add(chain[0])
	}
	return nil
}

// receipts are the certificates that anybody was given.
type receipts struct {
	victim latest.Value[*process] // who is to be killed, or nil

	mu      sync.Mutex
	serials []string // guarded by mu, as is all below
	broken  int      // calls that a kill broke
	when    int      // the victim dies when there are that many serials
}

// wanted blocks until there is somebody to kill.
func (r *receipts) wanted(ctx context.Context) error {
	for {
		victim, changed := r.victim.Load()
		if victim != nil {
			return ctx.Err()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// add is called at once when a certificate has arrived, and the kill comes within
// few milliseconds of one: a server that records what it has already sent is to be
// caught between the two.
func (r *receipts) add(certificate *x509.Certificate) {
	const within = 4 * time.Millisecond
	r.mu.Lock()
	defer r.mu.Unlock()
	r.serials = append(r.serials, serial(certificate))
	if victim, _ := r.victim.Load(); victim != nil && len(r.serials) == r.when {
		time.AfterFunc(mathrand.N(within), victim.kill)
	}
}

func (r *receipts) broke() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.broken++
}

func (r *receipts) all() (serials []string, broken int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.serials, r.broken
}

// killAfter kills a process when n more certificates have arrived, and returns
// when it has ended.
func (r *receipts) killAfter(t *testing.T, victim *process, n int) {
	t.Helper()
	r.mu.Lock()
	r.when = len(r.serials) + n
	r.mu.Unlock()
	r.victim.Set(victim)
	defer r.victim.Set(nil)
	select {
	case <-victim.ended:
	case <-time.After(patience):
		t.Fatalf("wait for %d more certificates: not within %s", n, patience)
	}
}

// wait lets time pass: when the server is killed is to be a matter of chance.
func wait(t *testing.T, d time.Duration) {
	t.Helper()
	select {
	case <-time.After(d):
	case <-t.Context().Done():
		t.Fatal(t.Context().Err())
	}
}
