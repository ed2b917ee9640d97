package handshake_test

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"troth.dev/troth/handshake"
)

// The standard order is for peers that are not ours: OpenSSL's own programs.

func TestAcceptOpenSSL(t *testing.T) {
	ca := newAuthority(t)
	files := writeFiles(t, ca, ca.svid(t, idA, nil))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()

	client := openssl(t, files, "s_client", "-connect", listener.Addr().String(),
		"-quiet", "-verify_return_error", "-alpn", "h2", "-tls1_3")
	listener.(*net.TCPListener).SetDeadline(time.Now().Add(30 * time.Second))
	conn, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	cfg := handshake.Config{Order: handshake.Standard, SVID: ca.svid(t, idB, nil), Bundles: ca.bundle()}
	c, err := handshake.Accept(t.Context(), conn, &cfg, only(idA))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(client.in, lineA)
	expectLine(t, "Accept", c, lineA)
	io.WriteString(c, lineB)
	expectLine(t, "s_client", client.out, lineB)
}

func TestInitiateOpenSSL(t *testing.T) {
	ca := newAuthority(t)
	cfg := handshake.Config{Order: handshake.Standard, SVID: ca.svid(t, idA, nil), Bundles: ca.bundle()}
	start := func(t *testing.T, ca *authority) net.Conn {
		files := writeFiles(t, ca, ca.svid(t, idB, nil))
		server := openssl(t, files, "s_server", "-accept", "127.0.0.1:0",
			"-rev", "-naccept", "1", "-Verify", "1", "-verify_return_error", "-alpn", "h2", "-tls1_3")
		address := ""
		for found := false; !found; {
			line, err := server.out.ReadString('\n')
			if err != nil {
				t.Fatalf("s_server does not say where it listens: %v", err)
			}
			address, found = strings.CutPrefix(strings.TrimSpace(line), "ACCEPT ")
		}
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		return conn
	}
	t.Run("trusted", func(t *testing.T) {
		c, err := handshake.Initiate(t.Context(), start(t, ca), &cfg, idB)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.WriteString(c, "never odd\n")
		expectLine(t, "s_server -rev", c, "ddo reven\n")
	})
	t.Run("untrusted", func(t *testing.T) {
		_, err := handshake.Initiate(t.Context(), start(t, newAuthority(t)), &cfg, idB)
		if codeOf(err) != handshake.CertificateUntrusted {
			t.Errorf("Initiate() = %v, want %v", err, handshake.CertificateUntrusted)
		}
	})
}

// go-spiffe's own TLS configurations, as a workload with the SPIFFE libraries
// has them.
func TestGoSPIFFE(t *testing.T) {
	ca := newAuthority(t)
	svidA, svidB := ca.svid(t, idA, nil), ca.svid(t, idB, nil)
	foreign := func(wrap func(net.Conn, *tls.Config) *tls.Conn, cfg *tls.Config, line string) perform {
		cfg.NextProtos = []string{"h2"}
		return func(conn net.Conn) outcome {
			c := wrap(conn, cfg)
			defer c.Close()
			o := outcome{err: c.Handshake()}
			if o.err == nil {
				io.WriteString(c, line)
				c.CloseWrite()
				o.received, o.readErr = io.ReadAll(c)
			}
			return o
		}
	}
	check := func(t *testing.T, a, b outcome) {
		t.Helper()
		if a.err != nil || b.err != nil || string(a.received) != lineB || string(b.received) != lineA {
			t.Errorf("A: %v, received %q; B: %v, received %q", a.err, a.received, b.err, b.received)
		}
	}
	t.Run("as client", func(t *testing.T) {
		a, b := connect(t,
			foreign(tls.Client, tlsconfig.MTLSClientConfig(svidA, ca.bundle(), tlsconfig.AuthorizeID(idB)), lineA),
			accept(t, handshake.Config{Order: handshake.Standard, SVID: svidB, Bundles: ca.bundle()}, only(idA)))
		check(t, a, b)
	})
	t.Run("as server", func(t *testing.T) {
		a, b := connect(t,
			initiate(t, handshake.Config{Order: handshake.Standard, SVID: svidA, Bundles: ca.bundle()}, idB),
			foreign(tls.Server, tlsconfig.MTLSServerConfig(svidB, ca.bundle(), tlsconfig.AuthorizeID(idA)), lineB))
		check(t, a, b)
	})
}

// program is a running openssl.
type program struct {
	in  io.WriteCloser
	out *bufio.Reader
}

// openssl runs a command of openssl until the end of the test, with the files of
// writeFiles.
func openssl(t *testing.T, files []string, command string, args ...string) program {
	t.Helper()
	path, err := exec.LookPath("openssl")
	if err != nil {
		t.Fatal("no openssl: apt-get install openssl")
	}
	cmd := exec.CommandContext(t.Context(), path, slices.Concat([]string{command}, args, files)...)
	cmd.Stderr = t.Output()
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return program{in: in, out: bufio.NewReader(out)}
}

// writeFiles writes what openssl needs to be svid and to trust ca, and returns
// the options that name it.
func writeFiles(t *testing.T, ca *authority, svid *x509svid.SVID) []string {
	t.Helper()
	certs, key, err := svid.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	return []string{
		"-cert", write("cert.pem", certs),
		"-key", write("key.pem", key),
		"-CAfile", write("ca.pem", pemOf(ca.cert)),
	}
}

func pemOf(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
}

func expectLine(t *testing.T, who string, r io.Reader, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(r, got); err != nil || string(got) != want {
		t.Errorf("%s received %q, %v, want %q", who, got, err, want)
	}
}
