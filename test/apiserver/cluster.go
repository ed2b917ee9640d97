// Package apiserver gives tests a real Kubernetes control plane: kube-apiserver
// and etcd, built from the Go modules that the module in the folder parts pins,
// run as two processes on this machine. Only tests import it. It needs Linux and
// the go command.
//
// Start with [Start], a cluster for one test, or with [Run], one that a TestMain
// shares between the tests of a package. A cluster is ready in about 3 seconds,
// after a first build of some minutes whose result is kept in the user's cache
// folder.
//
// The API server is what it is in production: TLS, the Node and RBAC authorizers,
// NodeRestriction and the other default admission plugins, an audit log. There is
// no kubelet and no controller manager: nothing runs the pods, so that a test
// says itself what becomes of them; a pod deleted with a grace stays; a namespace
// is never emptied; and a namespace has no service account that nobody created.
package apiserver

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"troth.dev/troth/test/parts"
	"troth.dev/troth/test/pki"
)

// Issuer is the issuer of the service-account tokens of every cluster, and the
// API server's own audience.
const Issuer = "https://kubernetes.default.svc.cluster.local"

// Parts is what a control plane is built from: kube-apiserver, and etcd, whose main
// package is called server, and so is the program that go build makes of it.
var Parts = parts.Module{Folder: "test/apiserver/parts", Cache: "apiserver", Kubernetes: true}

// Cluster is one running control plane. Its methods that stop and start the API
// server or etcd must not run at the same time as each other; all others may.
type Cluster struct {
	dir         string // state and logs of this cluster
	sockets     string // etcd's; a folder of its own because a socket's path is 107 bytes at most
	programs    string
	port        int // of the API server, for the cluster's whole life
	releasePort func()
	authority   *pki.Authority
	admin       *rest.Config
	client      *kubernetes.Clientset
	dynamic     *dynamic.DynamicClient
	etcd        *process
	apiserver   *process   // nil during an outage
	tokenKeys   []tokenKey // the last one signs
	rotations   int
	addresses   atomic.Uint32 // how many pods have been given one
}

// Start starts a cluster that ends with the test. If the test fails, the ends of
// the cluster's logs are in the test's.
func Start(t testing.TB) *Cluster {
	t.Helper()
	c, err := Run(t.Context(), t.TempDir())
	if err != nil {
		t.Fatalf("start a control plane: %v", err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(c.Logs())
		}
		c.Close()
	})
	return c
}

// Main runs the tests of a package that share one cluster, which use is given before the
// first of them. It returns the code to exit with, and shows the cluster's logs if that
// is not 0. The cluster and its folder are gone by then.
func Main(m *testing.M, use func(*Cluster)) int {
	dir, err := os.MkdirTemp("", "apiserver-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	c, err := Run(context.Background(), dir)
	if err != nil {
		fmt.Fprintln(os.Stderr, "start a control plane:", err)
		return 1
	}
	defer c.Close()
	use(c)
	code := m.Run()
	if code != 0 {
		fmt.Fprintln(os.Stderr, c.Logs())
	}
	return code
}

// Run starts a cluster that keeps its state and its logs in the folder dir, and
// returns once it is ready. ctx bounds the start, not the cluster's life: the
// caller calls [Cluster.Close].
func Run(ctx context.Context, dir string) (*Cluster, error) {
	programs, err := parts.Build(ctx, Parts)
	if err != nil {
		return nil, err
	}
	c := &Cluster{dir: dir, programs: programs}
	if err := c.start(ctx); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// Close ends both processes and returns once they have ended. The folder given
// to [Run] stays.
func (c *Cluster) Close() {
	// The API server first: without etcd it would take 20 seconds to end.
	c.stopAPIServer()
	if c.etcd != nil {
		c.etcd.stop(0)
		c.etcd = nil
	}
	if c.releasePort != nil {
		c.releasePort()
		c.releasePort = nil
	}
	os.RemoveAll(c.sockets)
}

// Client returns an admin's client.
func (c *Cluster) Client() kubernetes.Interface { return c.client }

// AuditLog returns the path of the API server's audit log: one line of JSON for
// each request, by whom and with which outcome.
func (c *Cluster) AuditLog() string { return filepath.Join(c.dir, "audit.log") }

// Logs returns the ends of the logs of both processes, for people.
func (c *Cluster) Logs() string {
	var logs string
	for _, p := range []*process{c.etcd, c.apiserver} {
		if p != nil {
			logs += p.tail() + "\n"
		}
	}
	return logs
}

// StopAPIServer begins an outage: the API server ends, all connections to it are
// cut and its port refuses new ones. etcd keeps its state.
func (c *Cluster) StopAPIServer(t testing.TB) {
	t.Helper()
	if c.apiserver == nil {
		t.Fatal("stop the API server: it does not run")
	}
	c.stopAPIServer()
}

// KillAPIServer begins an outage as StopAPIServer does, by a SIGKILL: no request is
// finished.
func (c *Cluster) KillAPIServer(t testing.TB) {
	t.Helper()
	if c.apiserver == nil {
		t.Fatal("kill the API server: it does not run")
	}
	c.apiserver.stop(0)
	c.apiserver = nil
}

// RestartEtcd kills etcd by a SIGKILL and starts it with what it had on disk. It
// returns once the API server is ready again.
func (c *Cluster) RestartEtcd(t testing.TB) {
	t.Helper()
	c.etcd.stop(0)
	var err error
	if c.etcd, err = c.startEtcd(); err != nil {
		t.Fatalf("start etcd again: %v", err)
	}
	if err := c.awaitReady(context.WithoutCancel(t.Context())); err != nil {
		t.Fatalf("start etcd again: %v", err)
	}
}

// StartAPIServer ends an outage, on the same port, and returns once the API
// server is ready.
func (c *Cluster) StartAPIServer(t testing.TB) {
	t.Helper()
	// Not the test's context: a cleanup, too, may end an outage.
	if err := c.startAPIServer(context.WithoutCancel(t.Context())); err != nil {
		t.Fatalf("start the API server: %v", err)
	}
}

// RotateSigningKey restarts the API server with a new key for service-account
// tokens. Those signed by the keys before it are still accepted. The first key is
// RSA, as in most clusters, and all further ones are ECDSA P-256.
func (c *Cluster) RotateSigningKey(t testing.TB) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatalf("rotate the signing key: %v", err)
	}
	if err := c.addTokenKey(key); err != nil {
		t.Fatalf("rotate the signing key: %v", err)
	}
	c.stopAPIServer()
	c.StartAPIServer(t)
}

// DropOldSigningKeys restarts the API server with its newest key for
// service-account tokens alone: those signed by older ones are refused.
func (c *Cluster) DropOldSigningKeys(t testing.TB) {
	t.Helper()
	c.tokenKeys = c.tokenKeys[len(c.tokenKeys)-1:]
	c.stopAPIServer()
	c.StartAPIServer(t)
}

func (c *Cluster) start(ctx context.Context) error {
	var err error
	if c.authority, err = pki.NewAuthority(); err != nil {
		return fmt.Errorf("make the cluster's authority: %w", err)
	}
	certificate, key, err := c.issueServing()
	if err != nil {
		return fmt.Errorf("issue the API server's certificate: %w", err)
	}
	for name, content := range map[string][]byte{
		"ca.crt":      c.authority.CertificatePEM(),
		"serving.crt": certificate,
		"serving.key": key,
		"audit.yaml":  []byte(auditPolicy),
	} {
		if err := os.WriteFile(c.path(name), content, 0o600); err != nil {
			return err
		}
	}
	signer, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return fmt.Errorf("make a signing key: %w", err)
	}
	if err := c.addTokenKey(signer); err != nil {
		return err
	}
	if c.port, c.releasePort, err = reservePort(); err != nil {
		return err
	}
	if c.sockets, err = os.MkdirTemp("", "etcd-"); err != nil {
		return err
	}
	if c.admin, err = c.clientConfig("admin", "system:masters"); err != nil {
		return fmt.Errorf("issue the admin's certificate: %w", err)
	}
	if c.client, err = kubernetes.NewForConfig(c.admin); err != nil {
		return err
	}
	if c.dynamic, err = dynamic.NewForConfig(c.admin); err != nil {
		return err
	}
	if c.etcd, err = c.startEtcd(); err != nil {
		return fmt.Errorf("start etcd: %w", err)
	}
	return c.startAPIServer(ctx)
}

const (
	apiserverProgram = "kube-apiserver"
	etcdProgram      = "server"
)

// startEtcd starts etcd. The API server waits for it by itself.
func (c *Cluster) startEtcd() (*process, error) {
	const name = "test"
	peers := "unix://" + filepath.Join(c.sockets, "peers")
	return startProcess(c.path("etcd.log"), filepath.Join(c.programs, etcdProgram),
		"--name="+name,
		"--data-dir="+c.path("etcd"),
		"--listen-client-urls="+c.etcdURL(),
		"--advertise-client-urls="+c.etcdURL(),
		"--listen-peer-urls="+peers,
		"--initial-advertise-peer-urls="+peers,
		"--initial-cluster="+name+"="+peers,
		"--unsafe-no-fsync", // nothing here has to survive a crash of the machine
		"--log-level=warn",
	)
}

func (c *Cluster) startAPIServer(ctx context.Context) error {
	if c.apiserver != nil {
		return errors.New("it runs already")
	}
	signing := c.tokenKeys[len(c.tokenKeys)-1]
	args := []string{
		"--etcd-servers=" + c.etcdURL(),
		"--bind-address=127.0.0.1",
		fmt.Sprintf("--secure-port=%d", c.port),
		"--permit-port-sharing", // with the socket that reserves the port
		"--tls-cert-file=" + c.path("serving.crt"),
		"--tls-private-key-file=" + c.path("serving.key"),
		"--cert-dir=" + c.path("certificates"),
		"--client-ca-file=" + c.path("ca.crt"),
		"--service-account-issuer=" + Issuer,
		"--service-account-signing-key-file=" + signing.private,
		"--authorization-mode=Node,RBAC",
		"--enable-admission-plugins=NodeRestriction",
		"--service-cluster-ip-range=10.96.0.0/16,fd00:96::/112",
		"--endpoint-reconciler-type=none",
		"--allow-privileged",
		"--audit-policy-file=" + c.path("audit.yaml"),
		"--audit-log-path=" + c.AuditLog(),
	}
	for _, key := range c.tokenKeys {
		args = append(args, "--service-account-key-file="+key.public)
	}
	var err error
	c.apiserver, err = startProcess(c.path("kube-apiserver.log"), filepath.Join(c.programs, apiserverProgram), args...)
	if err != nil {
		c.apiserver = nil
		return err
	}
	return c.awaitReady(ctx)
}

// awaitReady polls the API server, which tells nobody when it is ready. It waits
// a minute at most, twenty times what an idle machine needs.
func (c *Cluster) awaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	poll := time.NewTicker(50 * time.Millisecond)
	defer poll.Stop()
	for {
		_, err := c.client.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Raw()
		if err == nil {
			return nil
		}
		select {
		case <-poll.C:
		case <-c.apiserver.done:
			return fmt.Errorf("the API server ended: %s\n%s", c.apiserver.cmd.ProcessState, c.Logs())
		case <-c.etcd.done:
			return fmt.Errorf("etcd ended: %s\n%s", c.etcd.cmd.ProcessState, c.Logs())
		case <-ctx.Done():
			return fmt.Errorf("the API server is not ready: %w\n%s", err, c.Logs())
		}
	}
}

func (c *Cluster) stopAPIServer() {
	if c.apiserver != nil {
		c.apiserver.stop(2 * time.Second)
		c.apiserver = nil
	}
}

func (c *Cluster) addTokenKey(signer crypto.Signer) error {
	c.rotations++
	key, err := writeTokenKey(c.dir, fmt.Sprintf("tokens-%d", c.rotations), signer)
	if err != nil {
		return fmt.Errorf("write a signing key: %w", err)
	}
	c.tokenKeys = append(c.tokenKeys, key)
	return nil
}

func (c *Cluster) etcdURL() string { return "unix://" + filepath.Join(c.sockets, "clients") }

func (c *Cluster) path(name string) string { return filepath.Join(c.dir, name) }

// auditPolicy logs each request once, when it is answered or, for a watch, when
// it ends, without bodies: tokens stay out of the log.
const auditPolicy = `
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: Metadata
`
