package workload_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"troth.dev/troth/agent/workload"
	"troth.dev/troth/internal/latest"
)

// A test that needs another process runs its own binary again, as one of these.
func TestMain(m *testing.M) {
	switch os.Getenv("WORKLOAD_TEST_HELPER") {
	case "wait":
		waitHelper()
	case "lend":
		lendHelper()
	case "fetch":
		fetchHelper()
	case "serve":
		serveHelper()
	case "look":
		lookHelper()
	default:
		os.Exit(m.Run())
	}
}

// waitHelper lives until its standard input ends.
func waitHelper() {
	os.Stdout.WriteString("ready\n")
	io.Copy(io.Discard, os.Stdin)
}

type child struct {
	*exec.Cmd

	stdin  io.WriteCloser
	pipe   *os.File // that stdout reads from
	stdout *bufio.Reader
}

// run starts a helper. It ends with the test, at the latest.
func run(tb testing.TB, helper string, change func(*exec.Cmd), args ...string) *child {
	tb.Helper()
	self, err := os.Executable()
	if err != nil {
		tb.Fatal(err)
	}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), "WORKLOAD_TEST_HELPER="+helper)
	cmd.Stderr = os.Stderr
	if change != nil {
		change(cmd)
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		tb.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		tb.Fatalf("start helper %q: %v", helper, err)
	}
	c := &child{Cmd: cmd, stdin: stdin, pipe: stdout.(*os.File), stdout: bufio.NewReader(stdout)}
	tb.Cleanup(func() { c.end() })
	return c
}

// line returns the next line that the child writes.
func (c *child) line(tb testing.TB) string {
	tb.Helper()
	if err := c.pipe.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		tb.Fatal(err)
	}
	line, err := c.stdout.ReadString('\n')
	if err != nil {
		tb.Fatalf("helper wrote %q and then: %v", line, err)
	}
	return line[:len(line)-1]
}

// end ends the child and reaps it, so that its number is free.
func (c *child) end() {
	c.stdin.Close()
	c.Process.Kill()
	c.Wait()
}

// pods is a Source that the test writes. It does not know a pod until it is set.
type pods struct {
	mu     sync.Mutex
	states map[string]*latest.Value[workload.State]
	open   int
}

func (p *pods) Workload(podUID string) (*latest.Value[workload.State], func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.open++
	var once sync.Once
	return p.state(podUID), func() {
		once.Do(func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.open--
		})
	}
}

func (p *pods) set(podUID string, s workload.State) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.state(podUID).Set(s)
}

func (p *pods) state(podUID string) *latest.Value[workload.State] {
	if p.states == nil {
		p.states = make(map[string]*latest.Value[workload.State])
	}
	if p.states[podUID] == nil {
		p.states[podUID] = latest.New(workload.State{Status: workload.StatusDenied})
	}
	return p.states[podUID]
}

// authority is an X.509 authority of a trust domain.
type authority struct {
	td   spiffeid.TrustDomain
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(tb testing.TB, trustDomain string) *authority {
	tb.Helper()
	a := &authority{td: spiffeid.RequireTrustDomainFromString(trustDomain), key: newKey(tb)}
	template := &x509.Certificate{
		SerialNumber:          serial(tb),
		Subject:               pkix.Name{CommonName: rand.Text()},
		URIs:                  []*url.URL{a.td.ID().URL()},
		NotBefore:             time.Now().Add(-time.Minute),
		NotAfter:              time.Now().Add(24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	a.cert = sign(tb, template, template, a.key.Public(), a.key)
	return a
}

// issue returns the SVID of a path, with a chain of one intermediate. It expires
// after life, which may be negative.
func (a *authority) issue(tb testing.TB, path string, life time.Duration) *x509svid.SVID {
	tb.Helper()
	intermediateKey, key := newKey(tb), newKey(tb)
	template := &x509.Certificate{
		SerialNumber:          serial(tb),
		Subject:               pkix.Name{CommonName: "intermediate"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	intermediate := sign(tb, template, a.cert, intermediateKey.Public(), a.key)
	id := spiffeid.RequireFromPath(a.td, path)
	leaf := sign(tb, &x509.Certificate{
		SerialNumber: serial(tb),
		URIs:         []*url.URL{id.URL()},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(life),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, intermediate, key.Public(), intermediateKey)
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{leaf, intermediate}, PrivateKey: key}
}

// bundle returns the trust bundle of a's trust domain, of a and its siblings.
func (a *authority) bundle(revision uint64, siblings ...*authority) workload.Bundle {
	b := x509bundle.FromX509Authorities(a.td, []*x509.Certificate{a.cert})
	for _, s := range siblings {
		b.AddX509Authority(s.cert)
	}
	return workload.Bundle{Bundle: b, Revision: revision}
}

func newKey(tb testing.TB) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

func serial(tb testing.TB) *big.Int {
	tb.Helper()
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		tb.Fatal(err)
	}
	return n
}

func sign(tb testing.TB, template, parent *x509.Certificate, public any, key *ecdsa.PrivateKey) *x509.Certificate {
	tb.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		tb.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	return cert
}

// ready is the state of a pod with one identity and one bundle.
func ready(tb testing.TB, a *authority, revision uint64) workload.State {
	tb.Helper()
	return workload.State{
		Status:     workload.StatusReady,
		Identities: []workload.Identity{{SVID: a.issue(tb, "/ns/shop/sa/web", time.Hour)}},
		Bundles:    []workload.Bundle{a.bundle(revision)},
	}
}

const webPod = "0f8b25c2-3f0e-4c57-9d55-5d3ac1a0a001"

// inPod is a PodOf that has every process in one pod.
func inPod(podUID string) func(workload.Peer) (string, error) {
	return func(workload.Peer) (string, error) { return podUID, nil }
}

func newServer(tb testing.TB, c workload.Config) *workload.Server {
	tb.Helper()
	if c.PodOf == nil {
		c.PodOf = inPod(webPod)
	}
	s, err := workload.New(c)
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

// serve serves at path until the test ends, or stop is called. A test that ends has
// seen Serve return.
func serve(tb testing.TB, s *workload.Server, path string) (stop func()) {
	tb.Helper()
	l, err := workload.Listen(path)
	if err != nil {
		tb.Fatal(err)
	}
	return serveOn(tb, s, l)
}

func serveOn(tb testing.TB, s *workload.Server, l net.Listener) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			tb.Errorf("Serve() = %v, want nil after the end of its context", err)
		}
	})
	tb.Cleanup(stop)
	return stop
}

// socketPath returns a path that is short enough for a socket, however long the
// test's name.
func socketPath(tb testing.TB) string {
	tb.Helper()
	dir, err := os.MkdirTemp("", "troth")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil { // a child may be another user
		tb.Fatal(err)
	}
	return filepath.Join(dir, "workload.sock")
}

// start serves c on a new socket.
func start(tb testing.TB, c workload.Config) (*workload.Server, string) {
	tb.Helper()
	s, path := newServer(tb, c), socketPath(tb)
	serve(tb, s, path)
	return s, path
}

func dial(tb testing.TB, path string) *grpc.ClientConn {
	tb.Helper()
	return dialWith(tb, func(ctx context.Context, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	})
}

func dialWith(tb testing.TB, dialer func(context.Context, string) (net.Conn, error)) *grpc.ClientConn {
	tb.Helper()
	conn, err := grpc.NewClient("passthrough:///workload",
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(dialer))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { conn.Close() })
	return conn
}

// withHeader returns a context whose requests carry the header, and that ends before
// a test that hangs would.
func withHeader(tb testing.TB) context.Context {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), 20*time.Second)
	tb.Cleanup(cancel)
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

func fetchSVID(tb testing.TB, conn grpc.ClientConnInterface) grpc.ServerStreamingClient[workloadpb.X509SVIDResponse] {
	tb.Helper()
	stream, err := workloadpb.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(withHeader(tb), &workloadpb.X509SVIDRequest{})
	if err != nil {
		tb.Fatalf("FetchX509SVID() = %v", err)
	}
	return stream
}

func fetchBundles(tb testing.TB, conn grpc.ClientConnInterface) grpc.ServerStreamingClient[workloadpb.X509BundlesResponse] {
	tb.Helper()
	stream, err := workloadpb.NewSpiffeWorkloadAPIClient(conn).FetchX509Bundles(withHeader(tb), &workloadpb.X509BundlesRequest{})
	if err != nil {
		tb.Fatalf("FetchX509Bundles() = %v", err)
	}
	return stream
}

func recv[T any](tb testing.TB, stream grpc.ServerStreamingClient[T]) *T {
	tb.Helper()
	message, err := stream.Recv()
	if err != nil {
		tb.Fatalf("Recv() = %v, want a message", err)
	}
	return message
}

// await waits until the value satisfies ok.
func await[T any](tb testing.TB, v *latest.Value[T], ok func(T) bool) T {
	tb.Helper()
	deadline := time.After(20 * time.Second)
	for {
		value, changed := v.Load()
		if ok(value) {
			return value
		}
		select {
		case <-changed:
		case <-deadline:
			tb.Fatalf("the value is still %+v", value)
		}
	}
}

// lines is a log whose lines can be waited for.
type lines chan string

func (l lines) Write(line []byte) (int, error) {
	l <- string(line)
	return len(line), nil
}

// next returns the next line.
func (l lines) next(tb testing.TB) string {
	tb.Helper()
	select {
	case line := <-l:
		return line
	case <-time.After(20 * time.Second):
		tb.Fatal("nothing was logged")
		return ""
	}
}

func newLog() (*slog.Logger, lines) {
	l := make(lines, 1000) // more than any test logs
	return slog.New(slog.NewTextHandler(l, nil)), l
}
