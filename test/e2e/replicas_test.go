package e2e_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/api"
	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/test/apiserver"
)

// replicas is a control plane of several replicas on one store, behind a balancer
// in the place of a Kubernetes Service.
type replicas struct {
	plane     // its server is nil: there are several
	keyFile   string
	each      []*replica
	balancer  *balancer
	operators string // a token
}

type replica struct {
	*process
	args    []string
	address string // the same after a restart
	wire    *wire  // to the store
}

// newReplicas starts n replicas on the store, whose SVIDs have the given life.
func newReplicas(t *testing.T, n int, life time.Duration, store sharedStore, flags ...string) *replicas {
	t.Helper()
	dir := t.TempDir()
	p := &replicas{
		plane:   plane{bundle: filepath.Join(dir, "bundle.pem"), shop: cluster.CreateNamespace(t, "shop-")},
		keyFile: filepath.Join(dir, "key-encryption-key"),
	}
	// Agents of its own: it waits for the proof of all that there are.
	p.agents = cluster.CreateServiceAccount(t, system, "agent-"+p.shop).Name
	key := make([]byte, 32)
	rand.Read(key)
	if err := os.WriteFile(p.keyFile, key, 0o600); err != nil {
		t.Fatal(err)
	}
	pod := cluster.CreatePod(t, apiserver.Pod{
		Namespace: system, Name: "troth-server-", ServiceAccount: serverAccount, Node: cluster.CreateNode(t, "control-").Name,
	})
	account := cluster.Bearer(cluster.AutomountToken(t, pod))
	for k := range n {
		r := &replica{address: fmt.Sprintf("127.%d.%d.%d:0", 1+mathrand.N(254), mathrand.N(256), 1+mathrand.N(254))}
		r.args = append([]string{
			"-trust-domain=" + trustDomain.Name(), "-health=127.0.0.1:0", "-key-encryption-key=" + p.keyFile,
			"-agents=" + system + "/" + p.agents, "-svid-life=" + life.String(), fmt.Sprintf("-replica=replica-%d", k),
		}, flags...)
		var own []string
		own, r.wire = store.flags(t, account)
		r.args = append(r.args, own...)
		if k == 0 { // it publishes for all
			r.args = append(r.args, "-bundle="+p.bundle)
		}
		p.each = append(p.each, r)
		r.serve(t)
	}
	eventually(t, "the trust bundle", func() bool {
		_, err := os.Stat(p.bundle)
		return err == nil
	})
	p.balancer = newBalancer(t, p.each)
	p.address = p.balancer.listen(t, "127.0.0.1")
	return p
}

func (r *replica) serve(t *testing.T) {
	t.Helper()
	r.process = startProgram(t, "troth-server", append(r.args, "-listen="+r.address)...)
	r.address = await(t, r.process, "a replica to serve", func(l logLine) bool { return l.Message == "serving" }).Address
}

// operator returns a client at an address with all rights on authorities.
func (p *replicas) operator(t *testing.T, address string) trothv1.AuthorityServiceClient {
	t.Helper()
	if p.operators == "" {
		p.operators = p.newOperator(t)
	}
	conn, err := api.Dial(api.Config{
		Address: address, TrustDomain: trustDomain, Bundles: published{p.bundle},
		Token: func() (string, error) { return p.operators, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return trothv1.NewAuthorityServiceClient(conn)
}

// published is the bundle in a file, as it is at each question.
type published struct{ path string }

func (p published) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return x509bundle.Load(td, p.path)
}

// balancer passes connections on to replicas, by chance, in the place of a Service.
type balancer struct {
	backends []string
	ctx      context.Context
	ended    sync.WaitGroup

	mu    sync.Mutex
	unfit map[int]bool     // guarded by mu; which backends are not ready
	open  map[net.Conn]int // guarded by mu; to which backend
}

func newBalancer(t *testing.T, each []*replica) *balancer {
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	b := &balancer{ctx: ctx, unfit: make(map[int]bool), open: make(map[net.Conn]int)}
	for _, r := range each {
		b.backends = append(b.backends, r.address)
	}
	t.Cleanup(func() { cancel(); b.ended.Wait() })
	return b
}

// listen takes connections at an address of this machine too, and returns it with
// its port.
func (b *balancer) listen(t *testing.T, host string) string {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		t.Fatal(err)
	}
	context.AfterFunc(b.ctx, func() { l.Close() })
	b.ended.Go(func() {
		for {
			front, err := l.Accept()
			if err != nil {
				return // the test has ended
			}
			b.ended.Go(func() { b.pass(front) })
		}
	})
	return l.Addr().String()
}

func (b *balancer) pass(front net.Conn) {
	defer front.Close()
	for _, n := range mathrand.Perm(len(b.backends)) {
		back, err := net.DialTimeout("tcp", b.backends[n], time.Second)
		if err != nil {
			continue // it is down: the next
		}
		if !b.enter(back, n) {
			back.Close()
			continue
		}
		defer b.leave(back)
		defer context.AfterFunc(b.ctx, func() { front.Close(); back.Close() })()
		var both sync.WaitGroup
		for _, way := range [][2]net.Conn{{front, back}, {back, front}} {
			both.Go(func() {
				_, _ = io.Copy(way[0], way[1])
				// gRPC has no use for half of a connection.
				front.Close()
				back.Close()
			})
		}
		both.Wait()
		return
	}
}

func (b *balancer) enter(back net.Conn, n int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.unfit[n] {
		b.open[back] = n
	}
	return !b.unfit[n]
}

func (b *balancer) leave(back net.Conn) {
	back.Close()
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.open, back)
}

// avoid takes a replica out, as a Service does with one that is not ready, and
// brings it in again.
func (b *balancer) avoid(n int, unfit bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.unfit[n] = unfit
	for back, to := range b.open {
		if to == n && unfit {
			back.Close()
		}
	}
}
