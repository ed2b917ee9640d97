package bad_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"troth.dev/troth/ca"
	"troth.dev/troth/handshake"
	"troth.dev/troth/identity"
	"troth.dev/troth/storage"
	"troth.dev/troth/trothtest/bad"
)

var update = flag.Bool("update", false, "write docs/bad-certificates.md anew")

var (
	domain = spiffeid.RequireTrustDomainFromString("ci.test")
	client = spiffeid.RequireFromString("spiffe://ci.test/ns/shop/sa/cart")
)

// hall is an authority, the gallery that it signed, and one good certificate, by which
// a verifier that refuses everything is found out.
type hall struct {
	authority *x509.Certificate
	bundle    *x509bundle.Bundle
	gallery   []bad.Certificate
	good      bad.Certificate
}

func open(t testing.TB) hall {
	t.Helper()
	authority, err := bad.NewAuthority(domain)
	if err != nil {
		t.Fatal(err)
	}
	return hang(t, authority)
}

func hang(t testing.TB, authority bad.Authority) hall {
	t.Helper()
	gallery, err := bad.Certificates(authority, client)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		URIs:        []*url.URL{client.URL()}, Policies: []x509.OID{identity.TestPolicy},
	}, authority.Certificate, key.Public(), authority.Key)
	if err != nil {
		t.Fatal(err)
	}
	return hall{
		authority: authority.Certificate, gallery: gallery,
		bundle: x509bundle.FromX509Authorities(domain, []*x509.Certificate{authority.Certificate}),
		good:   bad.Certificate{Name: "good", Chain: [][]byte{good}, Key: key},
	}
}

// Under an authority as package ca makes it, nothing of the gallery passes either.
func TestAuthorityOfCA(t *testing.T) {
	keys := &openKeys{}
	store := storage.NewMemory()
	issuer, err := ca.Open(t.Context(), ca.Config{
		TrustDomain: domain, Keys: keys, Authorities: store, Ledger: store,
		Audit: slog.New(slog.DiscardHandler), Test: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	bundle, _ := issuer.Bundle().Load()
	h := hang(t, bad.Authority{Certificate: bundle.Authorities[0].Certificate, Key: keys.key})
	for _, c := range h.gallery {
		chain, err := parse(c.Chain)
		if err != nil {
			continue
		}
		_, err = handshake.VerifyAcceptingTests(chain, h.bundle, time.Now())
		if err == nil && !c.Production && !c.Unreadable {
			t.Errorf("%s passes", c.Name)
		}
	}
}

// openKeys is [ca.Keys] that gives the key away.
type openKeys struct{ key crypto.Signer }

func (k *openKeys) Create(context.Context) (crypto.Signer, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	k.key = key
	return key, []byte("the one"), err
}

func (k *openKeys) Open(context.Context, string, []byte) (crypto.Signer, error) { return k.key, nil }

func parse(chain [][]byte) ([]*x509.Certificate, error) {
	var parsed []*x509.Certificate
	for _, der := range chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		parsed = append(parsed, c)
	}
	return parsed, nil
}

func codeOf(err error) handshake.Code {
	if e, ok := errors.AsType[*handshake.Error](err); ok {
		return e.Code
	}
	return ""
}

// Our own verifier gives the exact reason, in production and for tests.
func TestVerify(t *testing.T) {
	h := open(t)
	good, err := parse(h.good.Chain)
	if err != nil {
		t.Fatal(err)
	}
	if peer, err := handshake.VerifyAcceptingTests(good, h.bundle, time.Now()); err != nil || peer.ID != client {
		t.Fatalf("the good one: %v, %v", peer, err)
	}
	seen := make(map[string]bool)
	for _, c := range h.gallery {
		t.Run(c.Name, func(t *testing.T) {
			if seen[c.Name] || c.Code == "" || c.Reason == "" || c.Key == nil {
				t.Errorf("it is there twice, or lacks something: %+v", c)
			}
			seen[c.Name] = true
			chain, err := parse(c.Chain)
			if c.Unreadable {
				if err == nil && len(c.Chain[0]) < 256<<10 {
					t.Error("crypto/tls can read it")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			_, err = handshake.VerifyAcceptingTests(chain, h.bundle, time.Now())
			switch {
			case c.Production && err != nil:
				t.Errorf("VerifyAcceptingTests() = %v", err)
			case !c.Production && codeOf(err) != c.Code:
				t.Errorf("VerifyAcceptingTests() = %v, want %v", err, c.Code)
			}
			if _, err := handshake.Verify(chain, h.bundle, time.Now()); c.Production && codeOf(err) != c.Code || err == nil {
				t.Errorf("Verify() = %v, want %v", err, c.Code)
			}
		})
	}
}

// svid is a source of what we are ourselves.
type svid struct{ *x509svid.SVID }

func (s svid) GetX509SVID() (*x509svid.SVID, error) { return s.SVID, nil }

// A handshake stops for the same reason, on either end.
func TestHandshake(t *testing.T) {
	h := open(t)
	good, err := parse(h.good.Chain)
	if err != nil {
		t.Fatal(err)
	}
	own := svid{&x509svid.SVID{ID: client, Certificates: good, PrivateKey: h.good.Key}}
	for _, c := range h.gallery {
		config := &handshake.Config{Order: handshake.Standard, SVID: own, Bundles: h.bundle, AcceptTests: !c.Production}
		theirs := &tls.Config{
			Certificates:       []tls.Certificate{{Certificate: c.Chain, PrivateKey: c.Key}},
			InsecureSkipVerify: true, ClientAuth: tls.RequireAnyClientCert, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13,
		}
		t.Run(c.Name+"/caller", func(t *testing.T) {
			ours, peer := connected(t)
			defer peer.Close()
			over := speak(tls.Client(peer, theirs))
			conn, err := handshake.Accept(t.Context(), ours, config, func(spiffeid.ID) error { return nil })
			if err == nil {
				conn.Close()
			}
			if codeOf(err) != c.Code {
				t.Errorf("Accept() = %v, want %v", err, c.Code)
			}
			<-over
		})
		t.Run(c.Name+"/callee", func(t *testing.T) {
			ours, peer := connected(t)
			defer peer.Close()
			over := speak(tls.Server(peer, theirs))
			conn, err := handshake.Initiate(t.Context(), ours, config, client)
			if err == nil {
				conn.Close()
			}
			if codeOf(err) != c.Code {
				t.Errorf("Initiate() = %v, want %v", err, c.Code)
			}
			<-over
		})
	}
}

// connected returns the two ends of a connection.
func connected(t *testing.T) (ours, peer net.Conn) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	if peer, err = net.Dial("tcp", listener.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if ours, err = listener.Accept(); err != nil {
		t.Fatal(err)
	}
	return ours, peer
}

// speak has a peer shake hands and read until it ends.
func speak(peer *tls.Conn) <-chan struct{} {
	over := make(chan struct{})
	go func() {
		defer close(over)
		if peer.Handshake() == nil {
			io.Copy(io.Discard, peer)
		}
	}()
	return over
}

// What the others say is what the gallery says of them, and what the page says.
func TestOthers(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Fatal("no openssl: apt-get install openssl")
	}
	h := open(t)
	server := startOpenSSL(t, h)
	if got := h.ask(t, h.good, server); got != (bad.Verdicts{}) {
		t.Fatalf("the good one is refused: %+v", got)
	}
	for _, c := range h.gallery {
		got := h.ask(t, c, server)
		for _, verdict := range []struct{ who, got, want string }{
			{"X509", got.X509, c.Others.X509},
			{"GoSPIFFE", got.GoSPIFFE, c.Others.GoSPIFFE},
			{"OpenSSLVerify", got.OpenSSLVerify, c.Others.OpenSSLVerify},
			{"OpenSSLTLS", got.OpenSSLTLS, c.Others.OpenSSLTLS},
		} {
			// What a server does not read to its end, its kernel answers by a reset, which
			// may overtake the alert.
			overtaken := len(c.Chain[0]) > 64<<10 && verdict.want != "" && strings.HasPrefix(verdict.got, ends)
			if (verdict.got == "") != (verdict.want == "") || !strings.Contains(verdict.got, verdict.want) && !overtaken {
				t.Errorf("%s: %s: %q, want %q", c.Name, verdict.who, verdict.got, verdict.want)
			}
		}
	}
	page := filepath.Join("..", "..", "docs", "bad-certificates.md")
	content, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	const begin, end = "<!-- the gallery -->\n", "<!-- end of the gallery -->"
	before, rest, ok := strings.Cut(string(content), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the table", page)
	}
	want := before + begin + table(h.gallery) + end + after
	if *update {
		if err := os.WriteFile(page, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if diff := cmp.Diff(want, string(content)); diff != "" {
		t.Errorf("%s is not what happens (go test ./trothtest/bad -update writes it):\n%s", page, diff)
	}
}

func table(gallery []bad.Certificate) string {
	var b strings.Builder
	fmt.Fprintln(&b, "| certificate | Troth says | why | crypto/x509 | go-spiffe | openssl verify | OpenSSL in TLS |")
	fmt.Fprintln(&b, "|---|---|---|---|---|---|---|")
	said := func(verdict string) string {
		if verdict == "" {
			return "**accepts**"
		}
		return verdict
	}
	for _, c := range gallery {
		fmt.Fprintf(&b, "| `%s` | `%s` | %s | %s | %s | %s | %s |\n", c.Name, c.Code, c.Reason,
			said(c.Others.X509), said(c.Others.GoSPIFFE), said(c.Others.OpenSSLVerify), said(c.Others.OpenSSLTLS))
	}
	return b.String()
}

// ask asks all of them.
func (h hall) ask(t *testing.T, c bad.Certificate, server string) bad.Verdicts {
	t.Helper()
	return bad.Verdicts{
		X509:          textOf(h.askX509(c)),
		GoSPIFFE:      textOf(h.askGoSPIFFE(c)),
		OpenSSLVerify: h.askOpenSSL(t, c),
		OpenSSLTLS:    askServer(t, c, server),
	}
}

func textOf(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// askX509 verifies as a server of crypto/tls does with its clients.
func (h hall) askX509(c bad.Certificate) error {
	chain, err := parse(c.Chain)
	if err != nil {
		return err
	}
	options := x509.VerifyOptions{
		Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	options.Roots.AddCert(h.authority)
	for _, above := range chain[1:] {
		options.Intermediates.AddCert(above)
	}
	_, err = chain[0].Verify(options)
	return err
}

func (h hall) askGoSPIFFE(c bad.Certificate) error {
	_, _, err := x509svid.ParseAndVerify(c.Chain, h.bundle)
	return err
}

var opensslSays = regexp.MustCompile(`(?m)^error \d+ at \d+ depth lookup: (.*)$`)

func (h hall) askOpenSSL(t *testing.T, c bad.Certificate) string {
	t.Helper()
	folder := t.TempDir()
	args := []string{"verify", "-purpose", "sslclient", "-CAfile", writePEM(t, folder, "authority", h.authority.Raw)}
	if len(c.Chain) > 1 {
		args = append(args, "-untrusted", writePEM(t, folder, "above", c.Chain[1:]...))
	}
	args = append(args, writePEM(t, folder, "leaf", c.Chain[0]))
	out, err := exec.CommandContext(t.Context(), "openssl", args...).CombinedOutput()
	if err == nil {
		return ""
	}
	if says := opensslSays.FindSubmatch(out); says != nil {
		return string(says[1])
	}
	return string(out)
}

func writePEM(t *testing.T, folder, name string, der ...[]byte) string {
	t.Helper()
	var b bytes.Buffer
	for _, each := range der {
		if err := pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: each}); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(folder, name+".pem")
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

var accepts = regexp.MustCompile(`^ACCEPT (127\.0\.0\.1:\d+)`)

// startOpenSSL starts a server of OpenSSL that demands certificates, and returns its
// address.
func startOpenSSL(t *testing.T, h hall) string {
	t.Helper()
	folder := t.TempDir()
	key, err := x509.MarshalPKCS8PrivateKey(h.good.Key)
	if err != nil {
		t.Fatal(err)
	}
	keyFile := filepath.Join(folder, "key.pem")
	if err := os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "openssl", "s_server", "-accept", "127.0.0.1:0", "-www", "-tls1_3",
		"-cert", writePEM(t, folder, "cert", h.good.Chain...), "-key", keyFile,
		"-CAfile", writePEM(t, folder, "authority", h.authority.Raw), "-Verify", "20", "-verify_return_error",
		"-cipher", "DEFAULT@SECLEVEL=2") // as Debian and Fedora configure it
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	address := make(chan string, 1)
	read := make(chan struct{})
	go func() {
		defer close(read)
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			if match := accepts.FindStringSubmatch(lines.Text()); match != nil {
				select {
				case address <- match[1]:
				default:
				}
			}
		}
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-read
		cmd.Wait()
	})
	select {
	case a := <-address:
		return a
	case <-read:
		t.Fatalf("openssl s_server ended: %s", &stderr)
	case <-time.After(30 * time.Second):
		t.Fatal("openssl s_server does not say where it listens")
	}
	return ""
}

// ends is a verdict without an alert.
const ends = "ends the connection"

// askServer presents a certificate to the server and returns the alert that comes back.
func askServer(t *testing.T, c bad.Certificate, server string) string {
	t.Helper()
	dialer := &net.Dialer{Timeout: 30 * time.Second}
	raw, err := dialer.DialContext(t.Context(), "tcp", server)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	if err := raw.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	certificate := tls.Certificate{Certificate: c.Chain, PrivateKey: c.Key}
	conn := tls.Client(raw, &tls.Config{
		InsecureSkipVerify: true, MinVersion: tls.VersionTLS13,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &certificate, nil },
	})
	if _, err = conn.Write([]byte("GET / HTTP/1.0\r\n\r\n")); err == nil {
		var page []byte
		if page, err = io.ReadAll(conn); bytes.Contains(page, []byte("200 ok")) {
			return ""
		}
	}
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "remote error" {
		return strings.TrimPrefix(op.Err.Error(), "tls: ")
	}
	return fmt.Sprintf("%s: %v", ends, err)
}
