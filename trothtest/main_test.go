package trothtest_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/test/bufconn"

	"troth.dev/troth/trothtest"
)

// The test's own program, as a child process, is an application that is handed
// nothing but the environment: it prints the SPIFFE ID that it has.
func TestMain(m *testing.M) {
	if os.Getenv("TROTHTEST_CHILD") != "" {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		svid, err := workloadapi.FetchX509SVID(ctx)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println(svid.ID)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func child(t *testing.T, socket string) string {
	t.Helper()
	c := exec.CommandContext(t.Context(), os.Args[0])
	c.Env = append(os.Environ(), "TROTHTEST_CHILD=1", "SPIFFE_ENDPOINT_SOCKET="+socket)
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("child: %v: %s", err, out)
	}
	return strings.TrimSpace(string(out))
}

// newSource is an unmodified go-spiffe client.
func newSource(t testing.TB, socket string) *workloadapi.X509Source {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(socket)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { source.Close() })
	return source
}

// eventually waits until the condition holds.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !holds(); {
		if time.Now().After(deadline) {
			t.Fatalf("30 s have passed, and not: %s", what)
		}
		time.Sleep(time.Millisecond) // to look again, not to wait for something to have happened
	}
}

func serialOf(t *testing.T, source x509svid.Source) string {
	t.Helper()
	return leafOf(t, source).SerialNumber.String()
}

func leafOf(t *testing.T, source x509svid.Source) *x509.Certificate {
	t.Helper()
	svid, err := source.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	return svid.Certificates[0]
}

// call performs one mutual TLS handshake and an echo, over the two ends of a
// connection, and returns how each end fared. It closes both.
func call(client, server net.Conn, clientTLS, serverTLS *tls.Config) (clientErr, serverErr error) {
	done := make(chan error, 1)
	go func() {
		c := tls.Server(server, serverTLS)
		defer server.Close()
		err := c.Handshake()
		if err == nil {
			_, err = io.CopyN(c, c, 4)
		}
		done <- err
	}()
	c := tls.Client(client, clientTLS)
	defer client.Close()
	clientErr = func() error {
		if _, err := c.Write([]byte("ping")); err != nil {
			return err
		}
		answer := make([]byte, 4)
		if _, err := io.ReadFull(c, answer); err != nil {
			return err
		}
		if string(answer) != "ping" {
			return errors.New("another answer")
		}
		return nil
	}()
	client.Close()
	return clientErr, <-done
}

// callInMemory is call without the kernel. It has room for what is written and not
// read yet: over net.Pipe, a server's refusal and a client's first data would wait for
// each other.
func callInMemory(client, server *trothtest.Identity) (clientErr, serverErr error) {
	near, far := pipe()
	return call(near, far, client.TLSClient(tlsconfig.AuthorizeID(server.ID())), server.TLSServer(tlsconfig.AuthorizeID(client.ID())))
}

func pipe() (near, far net.Conn) {
	l := bufconn.Listen(64 << 10)
	defer l.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			panic(err)
		}
		accepted <- c
	}()
	near, err := l.Dial()
	if err != nil {
		panic(err)
	}
	return near, <-accepted
}

func mustCall(t *testing.T, client, server *trothtest.Identity) {
	t.Helper()
	if clientErr, serverErr := callInMemory(client, server); clientErr != nil || serverErr != nil {
		t.Fatalf("call: client: %v, server: %v", clientErr, serverErr)
	}
}

func mustRefuse(t *testing.T, client, server *trothtest.Identity, why string) {
	t.Helper()
	clientErr, serverErr := callInMemory(client, server)
	if clientErr == nil && serverErr == nil {
		t.Fatalf("call succeeded, want %q", why)
	}
	if both := fmt.Sprint(clientErr, serverErr); !strings.Contains(both, why) {
		t.Fatalf("call: client: %v, server: %v; want %q", clientErr, serverErr, why)
	}
}

var domain = spiffeid.RequireTrustDomainFromString("troth.test")
