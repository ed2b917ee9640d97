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

	"troth.dev/troth/test/apiserver"
)

// replicas is a control plane of several replicas on one store, behind a balancer
// in the place of a Kubernetes Service.
type replicas struct {
	plane    // its server is nil: there are several
	keyFile  string
	each     []*replica
	balancer *balancer
}

type replica struct {
	*process
	args    []string
	address string // the same after a restart
}

// newReplicas starts n replicas on the store that the flags name, whose SVIDs have
// the given life.
func newReplicas(t *testing.T, n int, life time.Duration, storeFlags ...string) *replicas {
	t.Helper()
	dir := t.TempDir()
	p := &replicas{
		plane:   plane{bundle: filepath.Join(dir, "bundle.pem"), shop: cluster.CreateNamespace(t, "shop-")},
		keyFile: filepath.Join(dir, "key-encryption-key"),
	}
	key := make([]byte, 32)
	rand.Read(key)
	if err := os.WriteFile(p.keyFile, key, 0o600); err != nil {
		t.Fatal(err)
	}
	pod := cluster.CreatePod(t, apiserver.Pod{
		Namespace: system, Name: "troth-server-", ServiceAccount: serverAccount, Node: cluster.CreateNode(t, "control-").Name,
	})
	kubeconfig := cluster.Kubeconfig(t, cluster.Bearer(cluster.AutomountToken(t, pod)))
	for k := range n {
		r := &replica{address: fmt.Sprintf("127.%d.%d.%d:0", 1+mathrand.N(254), mathrand.N(256), 1+mathrand.N(254))}
		r.args = append([]string{
			"-trust-domain=" + trustDomain.Name(), "-health=127.0.0.1:0", "-key-encryption-key=" + p.keyFile,
			"-kubeconfig=" + kubeconfig, "-svid-life=" + life.String(), fmt.Sprintf("-replica=replica-%d", k),
		}, storeFlags...)
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

// balancer passes connections on to replicas, by chance.
type balancer struct {
	backends []string
	ctx      context.Context //nolint:containedctx // of all connections
	open     sync.WaitGroup
}

func newBalancer(t *testing.T, each []*replica) *balancer {
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	b := &balancer{ctx: ctx}
	for _, r := range each {
		b.backends = append(b.backends, r.address)
	}
	t.Cleanup(func() { cancel(); b.open.Wait() })
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
	b.open.Go(func() {
		for {
			front, err := l.Accept()
			if err != nil {
				return // the test has ended
			}
			b.open.Go(func() { b.pass(front) })
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
		defer back.Close()
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
