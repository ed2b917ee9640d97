package ca_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/ca"
	"troth.dev/troth/identity"
)

// issuerOf is an authority of somebody else's PKI.
type issuerOf struct {
	certificate *x509.Certificate
	key         crypto.Signer
}

// certify has the parent issue an authority, or has it sign itself if there is no
// parent. change makes it one that should not be.
func certify(t testing.TB, parent *issuerOf, name string, key crypto.Signer, life time.Duration, change func(*x509.Certificate)) *issuerOf {
	t.Helper()
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	c := &x509.Certificate{
		SerialNumber: serial.Add(serial, big.NewInt(1)), Subject: pkix.Name{CommonName: name},
		NotBefore: now.Add(-time.Minute).UTC().Truncate(time.Second), NotAfter: now.Add(life).UTC().Truncate(time.Second),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true,
	}
	if change != nil {
		change(c)
	}
	by := &issuerOf{c, key}
	if parent != nil {
		by = parent
	}
	der, err := x509.CreateCertificate(rand.Reader, c, by.certificate, key.Public(), by.key)
	if err != nil {
		t.Fatal(err)
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return &issuerOf{c, key}
}

const (
	year             = 365 * 24 * time.Hour
	intermediateLife = 12 * time.Hour
)

func newRoot(t testing.TB) *issuerOf {
	t.Helper()
	return certify(t, nil, "Example root", newKey(t, p256), 10*year, nil)
}

func newIntermediate(t testing.TB, root *issuerOf) *issuerOf {
	t.Helper()
	return certify(t, root, "Example intermediate", newKey(t, p256), intermediateLife, nil)
}

func pemOf(all ...*issuerOf) []byte {
	var out []byte
	for _, a := range all {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.certificate.Raw})...)
	}
	return out
}

func keyPEM(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// secret is a folder in which files are replaced all at once, as the kubelet does.
type secret struct {
	path string
	n    int           // how often it was written
	life time.Duration // of what is delivered; 0 means intermediateLife
}

func newSecret(t testing.TB) *secret { return &secret{path: t.TempDir()} }

func (s *secret) upstream() *ca.Upstream {
	in := func(name string) string { return filepath.Join(s.path, "..data", name) }
	return &ca.Upstream{Certificate: in("tls.crt"), Key: in("tls.key"), Root: in("ca.crt")}
}

func (s *secret) write(t testing.TB, crt, key, root []byte) {
	t.Helper()
	s.n++
	folder := filepath.Join(s.path, fmt.Sprintf("..%d", s.n))
	err := os.Mkdir(folder, 0o700)
	for name, content := range map[string][]byte{"tls.crt": crt, "tls.key": key, "ca.crt": root} {
		err = errors.Join(err, os.WriteFile(filepath.Join(folder, name), content, 0o600))
	}
	link := filepath.Join(s.path, "..data_tmp")
	if err = errors.Join(err, os.Symlink(folder, link), os.Rename(link, filepath.Join(s.path, "..data"))); err != nil {
		t.Fatal(err)
	}
}

// deliver has the root issue another intermediate and returns its ID.
func (s *secret) deliver(t testing.TB, root *issuerOf) string {
	t.Helper()
	life := s.life
	if life == 0 {
		life = intermediateLife
	}
	a := certify(t, root, "Example intermediate", newKey(t, p256), life, nil)
	s.write(t, pemOf(a), keyPEM(t, a.key), pemOf(root))
	return hex.EncodeToString(a.certificate.SubjectKeyId)
}

func withUpstream(t testing.TB) (ca.Config, *secret, *issuerOf) {
	t.Helper()
	config, s, root := newConfig(t), newSecret(t), newRoot(t)
	config.Upstream = s.upstream()
	return config, s, root
}

// What is issued under an upstream root verifies by the root alone, in the eyes of
// Go, of SPIFFE, of our handshake and of OpenSSL.
func TestUpstream(t *testing.T) {
	root := certify(t, nil, "Example root", newKey(t, rsa2048), 10*year, nil)
	policy := certify(t, root, "Example policy authority", newKey(t, p384), 5*year, nil)
	issuing := func(above *issuerOf, change func(*x509.Certificate)) *issuerOf {
		return certify(t, above, "Example intermediate", newKey(t, p256), year, change)
	}
	sec1 := func(key crypto.Signer) []byte {
		der, err := x509.MarshalECPrivateKey(key.(*ecdsa.PrivateKey))
		if err != nil {
			t.Fatal(err)
		}
		parameters := pem.EncodeToMemory(&pem.Block{Type: "EC PARAMETERS", Bytes: []byte("\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07")})
		return append(parameters, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})...)
	}
	for _, test := range []struct {
		name string
		make func() (intermediate *issuerOf, crt, root []byte)
		sec1 bool
		sent int // certificates
	}{
		{"an intermediate and a root file", func() (*issuerOf, []byte, []byte) { a := issuing(root, nil); return a, pemOf(a), pemOf(root) }, false, 2},
		{"SEC 1", func() (*issuerOf, []byte, []byte) { a := issuing(root, nil); return a, pemOf(a), pemOf(root) }, true, 2},
		{"the root in the chain", func() (*issuerOf, []byte, []byte) { a := issuing(root, nil); return a, pemOf(a, root), nil }, false, 2},
		{"the root in both", func() (*issuerOf, []byte, []byte) { a := issuing(root, nil); return a, pemOf(a, root), pemOf(root) }, false, 2},
		{"two intermediates", func() (*issuerOf, []byte, []byte) {
			a := issuing(policy, nil)
			return a, append([]byte("subject=Example\n"), pemOf(a, policy)...), pemOf(root)
		}, false, 3},
		{"two roots", func() (*issuerOf, []byte, []byte) {
			a := issuing(root, nil)
			return a, pemOf(a), pemOf(newRoot(t), newRoot(t), root)
		}, false, 2},
		{"all that an intermediate may have", func() (*issuerOf, []byte, []byte) {
			a := issuing(root, func(c *x509.Certificate) {
				c.MaxPathLenZero = true
				c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.test"}}
				c.PermittedURIDomains, c.PermittedDNSDomainsCritical = []string{"example.test"}, true
				c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
				c.KeyUsage |= x509.KeyUsageDigitalSignature // cert-manager has it in all that it issues
				c.DNSNames = nil
			})
			return a, pemOf(a), pemOf(root)
		}, false, 2},
	} {
		t.Run(test.name, func(t *testing.T) {
			config, s := newConfig(t), newSecret(t)
			config.Upstream = s.upstream()
			a, crt, rootPEM := test.make()
			key := keyPEM(t, a.key)
			if test.sec1 {
				key = sec1(a.key)
			}
			if rootPEM == nil {
				config.Upstream.Root = ""
			}
			s.write(t, crt, key, rootPEM)
			issuer := open(t, config)
			authority, _ := currentSet(issuer).Active()
			if authority.ID != hex.EncodeToString(a.certificate.SubjectKeyId) || !authority.NotAfter().Equal(a.certificate.NotAfter) {
				t.Errorf("active is %s until %v", authority.ID, authority.NotAfter())
			}
			bundle := currentBundle(issuer)
			if b := bundle.Authorities; len(b) != 1 || !b[0].Certificate.Equal(root.certificate) || b[0].ID != authority.ID || !b[0].NotAfter.Equal(authority.NotAfter()) {
				t.Errorf("the bundle has %v", b)
			}
			if data := stored(t, config.Authorities); data.Format != 3 {
				t.Errorf("stored in format %d", data.Format)
			}
			doc, err := config.Authorities.Load(t.Context())
			raw, _ := a.key.(*ecdsa.PrivateKey).Bytes()
			if err != nil || bytes.Contains(doc.Data, raw) {
				t.Errorf("the document has the key in the clear, or %v", err)
			}

			svid := issue(t, open(t, config), requestFor(t))
			checkVerifies(t, bundle, svid)
			if n := len(svid.Certificates); n != test.sent || bytes.Equal(svid.Certificates[n-1], root.certificate.Raw) {
				t.Errorf("the SVID has %d certificates, want %d without the root", n, test.sent)
			}
			if leaf := parseLeaf(t, svid); hex.EncodeToString(leaf.AuthorityKeyId) != svid.AuthorityID {
				t.Errorf("the leaf's authority key identifier is %x, the authority is %s", leaf.AuthorityKeyId, svid.AuthorityID)
			}
			var above []byte
			for _, der := range svid.Certificates[1:] {
				above = append(above, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
			}
			untrusted := filepath.Join(t.TempDir(), "above.pem")
			if err := os.WriteFile(untrusted, above, 0o600); err != nil {
				t.Fatal(err)
			}
			for _, purpose := range []string{"sslserver", "sslclient"} {
				out, err := exec.CommandContext(t.Context(), "openssl", "verify", "-x509_strict", "-purpose", purpose,
					"-CAfile", writePEM(t, root.certificate.Raw), "-untrusted", untrusted, writePEM(t, svid.Certificates[0])).CombinedOutput()
				if err != nil {
					t.Errorf("openssl verify for %s: %v\n%s", purpose, err, out)
				}
			}
		})
	}
}

// Whatever would not work, or not for long, is refused before anything is stored.
func TestUpstreamIsRefused(t *testing.T) {
	root := newRoot(t)
	good := newIntermediate(t, root)
	under := func(parent *issuerOf, kind string, life time.Duration, change func(*x509.Certificate)) func(t *testing.T, s *secret) {
		return func(t *testing.T, s *secret) {
			a := certify(t, parent, "Example intermediate", newKey(t, kind), life, change)
			s.write(t, pemOf(a), keyPEM(t, a.key), pemOf(root))
		}
	}
	with := func(change func(*x509.Certificate)) func(t *testing.T, s *secret) {
		return under(root, p256, year, change)
	}
	files := func(crt, key, root []byte) func(t *testing.T, s *secret) {
		return func(t *testing.T, s *secret) { s.write(t, crt, key, root) }
	}
	crt, key, ca1 := pemOf(good), keyPEM(t, good.key), pemOf(root)
	for _, test := range []struct {
		name  string
		write func(t *testing.T, s *secret)
		want  string
	}{
		{"no files", func(*testing.T, *secret) {}, "no such file"},
		{"empty", files(nil, key, ca1), "tls.crt is empty, or larger"},
		{"too large", files(bytes.Repeat(crt, 200), key, ca1), "tls.crt is empty, or larger than 65536 bytes"},
		{"no PEM", files([]byte("hello"), key, ca1), "0 PEM blocks begin"},
		{"cut off", files(crt[:len(crt)/2], key, ca1), "cut off, damaged or no PEM"},
		{"the second cut off", files(append(bytes.Clone(crt), crt[:len(crt)/2]...), key, ca1), "cut off, damaged or no PEM"},
		{"too many", files(bytes.Repeat(crt, 7), key, ca1), "7 PEM blocks, more than 6"},
		{"key among the certificates", files(append(bytes.Clone(crt), key...), key, ca1), `a "PRIVATE KEY" among the certificates`},
		{"damaged certificate", files(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")}), key, ca1), "certificate 1: x509: malformed"},
		{"large certificate", files(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: make([]byte, 5000)}), key, ca1), "of 5000 bytes, more than 4096"},
		{"no key", files(crt, crt, ca1), `a "CERTIFICATE", not a private key`},
		{"two keys", files(crt, append(bytes.Clone(key), key...), ca1), "2 private keys, not one"},
		{"encrypted key", files(crt, pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte("x")}), ca1), "is encrypted"},
		{"damaged key", files(crt, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")}), ca1), "cannot be read"},
		{"RSA", under(root, rsa2048, year, nil), "the private key is RSA of 2048 bits: have the PKI issue the intermediate for an ECDSA P-256 key"},
		{"P-384", under(root, p384, year, nil), "the private key is ECDSA P-384: have the PKI"},
		{"Ed25519", under(root, ed, year, nil), "the private key is Ed25519: have the PKI"},
		{"another key", files(crt, keyPEM(t, newKey(t, p256)), ca1), "the key is not that of the first certificate"},
		{"the root's own key", files(ca1, keyPEM(t, root.key), ca1), "is a root itself"},
		{"no root", files(crt, key, nil), "ca.crt is empty"},
		{"another root", files(crt, key, pemOf(newRoot(t))), "no root that signed itself has signed"},
		{"an intermediate as root", files(crt, key, crt), "no root that signed itself has signed"},
		{"out of order", files(append(bytes.Clone(crt), pemOf(newIntermediate(t, root))...), key, ca1), "certificate 1 is not signed by the one after it"},

		{"no CA", with(func(c *x509.Certificate) { c.IsCA = false }), "CA:TRUE"},
		{"no key usage", with(func(c *x509.Certificate) { c.KeyUsage = 0 }), "its key usage is not keyCertSign"},
		{"another key usage", with(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }), "its key usage is not keyCertSign"},
		{"no subject", with(func(c *x509.Certificate) { c.Subject = pkix.Name{} }), "empty subject"},
		{"short identifier", with(func(c *x509.Certificate) { c.SubjectKeyId = []byte("x") }), "identifier of 1 bytes"},
		{"long identifier", with(func(c *x509.Certificate) { c.SubjectKeyId = make([]byte, 33) }), "identifier of 33 bytes"},
		{"wrong issuer identifier", func(t *testing.T, s *secret) {
			as := *root.certificate
			as.SubjectKeyId = []byte("another!")
			a := certify(t, &issuerOf{&as, root.key}, "Example", newKey(t, p256), year, nil)
			s.write(t, pemOf(a), keyPEM(t, a.key), ca1)
		}, "its authority key identifier is"},
		{"SPIFFE ID with a path", with(func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.test", Path: "/ca"}} }), `has the URI "spiffe://example.test/ca"`},
		{"SPIFFE ID of another", with(func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "other.test"}} }), `has the URI "spiffe://other.test"`},
		{"two URIs", with(func(c *x509.Certificate) {
			c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.test"}, {Scheme: "https", Host: "example.test"}}
		}), `a SPIFFE ID in it has to be "spiffe://example.test", alone`},
		{"constrained to others", with(func(c *x509.Certificate) { c.PermittedURIDomains = []string{"other.test"} }), "is not permitted by any constraint"},
		{"constrained not to us", with(func(c *x509.Certificate) { c.ExcludedURIDomains = []string{"example.test"} }), "is excluded by constraint"},
		{"for servers alone", with(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), "incompatible key usage"},
		{"for clients alone", with(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }), "incompatible key usage"},
		{"unknown critical extension", with(func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}}
		}), "the critical extension 1.2.3.4"},
		{"for tests", with(func(c *x509.Certificate) { c.Policies = []x509.OID{identity.TestPolicy} }), "is for tests"},
		{"no room in the path", func(t *testing.T, s *secret) {
			short := certify(t, nil, "Short root", newKey(t, p256), year, func(c *x509.Certificate) { c.MaxPathLenZero = true })
			a := certify(t, short, "Example", newKey(t, p256), year, nil)
			s.write(t, pemOf(a), keyPEM(t, a.key), pemOf(short))
		}, "path length"},
		{"a weak root", func(t *testing.T, s *secret) {
			weak := weakRoot(t)
			a := certify(t, weak, "Example", newKey(t, p256), year, nil)
			s.write(t, pemOf(a), keyPEM(t, a.key), pemOf(weak))
		}, "an RSA key of 1024 bits"},

		{"not yet valid", with(func(c *x509.Certificate) { c.NotBefore = c.NotBefore.Add(time.Hour) }), "it is not valid before"},
		{"short life", under(root, p256, 2*time.Hour+30*time.Minute, nil), `"CN=Example intermediate" ends at`},
		{"nearly over", with(func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = c.NotBefore.Add(-year), time.Now().Add(119*time.Minute)
		}), `"CN=Example intermediate" ends at`},
		{"a root that is nearly over", func(t *testing.T, s *secret) {
			old := certify(t, nil, "Old root", newKey(t, p256), 119*time.Minute, nil)
			a := certify(t, old, "Example", newKey(t, p256), year, nil)
			s.write(t, pemOf(a), keyPEM(t, a.key), pemOf(old))
		}, `"CN=Old root" ends at`},
	} {
		t.Run(test.name, func(t *testing.T) {
			config, s := newConfig(t), newSecret(t)
			config.Upstream = s.upstream()
			test.write(t, s)
			_, err := ca.Open(t.Context(), config)
			if err == nil || !strings.HasPrefix(err.Error(), "ca: upstream: ") || !strings.Contains(err.Error(), test.want) {
				t.Errorf("Open = %v, want %q", err, test.want)
			}
			if doc, err := config.Authorities.Load(t.Context()); err != nil || doc.Version != "" {
				t.Errorf("the store has version %q, %v", doc.Version, err)
			}
		})
	}
}

// weakRoot has a key of the kind that was enough once.
func weakRoot(t *testing.T) *issuerOf {
	t.Helper()
	t.Setenv("GODEBUG", "rsa1024min=0")
	key, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	return certify(t, nil, "Weak root", key, year, nil)
}

// hardware are keys that take in none.
type hardware struct{ keys ca.Keys }

func (h hardware) Create(ctx context.Context) (crypto.Signer, []byte, error) {
	return h.keys.Create(ctx)
}

func (h hardware) Open(ctx context.Context, id string, handle []byte) (crypto.Signer, error) {
	return h.keys.Open(ctx, id, handle)
}

func TestUpstreamConfigIsRefused(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*ca.Config)
		want   string
	}{
		{"no certificate", func(c *ca.Config) { c.Upstream.Certificate = "" }, "ca: Upstream needs a certificate and a key"},
		{"no key", func(c *ca.Config) { c.Upstream.Key = "" }, "ca: Upstream needs a certificate and a key"},
		{"keys in hardware", func(c *ca.Config) { c.Keys = hardware{c.Keys} }, "do not take in the key of an upstream authority"},
		{"no root at all", func(c *ca.Config) { c.Upstream.Root = "" }, "does not end in a root, and there is no root file"},
	} {
		t.Run(test.name, func(t *testing.T) {
			config, s, root := withUpstream(t)
			s.deliver(t, root)
			test.change(&config)
			if _, err := ca.Open(t.Context(), config); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("Open = %v, want %q", err, test.want)
			}
		})
	}
}

// replicas are issuers that run and rotate, with a fleet, until stop.
func replicas(t *testing.T, f *fleet, configs ...ca.Config) (issuers []*ca.Issuer, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 2*len(configs)+1)
	for _, config := range configs {
		issuers = append(issuers, open(t, config))
	}
	for _, issuer := range issuers {
		go func() { ended <- issuer.Run(ctx) }()
		go func() { ended <- issuer.Rotate(ctx, &f.known) }()
	}
	go func() { f.run(t, ctx, issuers); ended <- nil }()
	return issuers, func() {
		t.Helper()
		cancel()
		for range cap(ended) {
			if err := <-ended; err != nil {
				t.Errorf("ended with %v", err)
			}
		}
	}
}

// The upstream renews at two thirds of a life, and two replicas take that up with
// nobody to help them. What is due and is not delivered is said in time.
func TestUpstreamRenews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config, s, root := withUpstream(t)
		first := s.deliver(t, root)
		f := &fleet{agents: 2}
		issuers, stop := replicas(t, f, config, config)
		const life = intermediateLife
		time.Sleep(life * 2 / 3)
		if got := states(currentSet(issuers[0])); got != "active" {
			t.Errorf("became %q while the upstream issued nothing", got)
		}
		if overdue, _ := issuers[1].Overdue().Load(); overdue != nil {
			t.Errorf("overdue at two thirds: %v", overdue)
		}
		second := s.deliver(t, root)
		time.Sleep(5*time.Minute + time.Second)
		synctest.Wait()
		set := currentSet(issuers[1])
		active, _ := set.Active()
		if states(set) != "old active" || active.ID != second {
			t.Fatalf("%q, active is %s, want %s", states(set), active.ID, second)
		}
		if c := set.History[0]; c.Actor != "upstream" || c.Operation != "prepare" || c.AuthorityID != second || c.Reason != "issued by CN=Example root" {
			t.Errorf("prepared by %+v", c)
		}
		bundle := currentBundle(issuers[0])
		if n := len(bundle.X509Bundle().X509Authorities()); len(bundle.Authorities) != 2 || n != 1 {
			t.Errorf("the bundle has %d authorities under %d roots, want 2 under one", len(bundle.Authorities), n)
		}
		time.Sleep(3 * time.Hour)
		if set = currentSet(issuers[0]); states(set) != "revoked active" {
			t.Errorf("became %q, want the first revoked", states(set))
		}
		if gone, _ := set.Authority(first); gone.Key != nil || gone.Upstream != nil {
			t.Errorf("the revoked one has a key of %d bytes and an upstream of %d", len(gone.Key), len(gone.Upstream))
		}

		time.Sleep(life*3/4 - 3*time.Hour - 20*time.Minute) // of the second, since it was issued
		if overdue, _ := issuers[0].Overdue().Load(); overdue != nil {
			t.Errorf("overdue before three quarters: %v", overdue)
		}
		time.Sleep(20 * time.Minute)
		overdue, _ := issuers[0].Overdue().Load()
		if obstacles(overdue) != "UPSTREAM_UNCHANGED" || !strings.Contains(overdue.Error(), "what the upstream has issued is authority "+second+", which is active since: have it issue another, for a new key") {
			t.Errorf("overdue at three quarters: %v", overdue)
		}
		s.deliver(t, root)
		time.Sleep(11 * time.Minute)
		if overdue, _ := issuers[0].Overdue().Load(); overdue != nil {
			t.Errorf("overdue after it was delivered: %v", overdue)
		}
		stop()
	})
}

// A trust domain that signed for itself moves to an upstream root, and back again:
// each is a rotation like any other, and nothing that is in use is ever refused.
func TestMoveToAnUpstreamRootAndBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config, s, root := withUpstream(t)
		own := config
		own.Upstream = nil
		f := &fleet{agents: 2}
		issuers, stop := replicas(t, f, own, own)
		first, _ := currentSet(issuers[0]).Active()
		early := issue(t, issuers[0], requestFor(t))
		time.Sleep(time.Hour / 2)
		stop()

		second := s.deliver(t, root)
		issuers, stop = replicas(t, f, config, own) // one after the other is restarted
		time.Sleep(6 * time.Minute)
		active, _ := currentSet(issuers[1]).Active()
		if active.ID != second {
			t.Fatalf("active is %s, want %s from upstream", active.ID, second)
		}
		checkVerifies(t, currentBundle(issuers[0]), early)
		checkVerifies(t, currentBundle(issuers[0]), issue(t, issuers[1], requestFor(t)))
		time.Sleep(3 * time.Hour)
		if _, still := currentSet(issuers[0]).Authority(first.ID); !still || len(currentBundle(issuers[0]).Authorities) != 1 {
			t.Errorf("the bundle has %v, want the upstream root alone", currentBundle(issuers[0]).Authorities)
		}
		stop()

		issuers, stop = replicas(t, f, own, own)
		third, err := issuers[0].Prepare(t.Context(), operator)
		if err != nil || len(third.Upstream) != 0 {
			t.Fatalf("Prepare = %d certificates above, %v", len(third.Upstream), err)
		}
		time.Sleep(time.Minute)
		if _, err := issuers[1].Activate(t.Context(), third.ID, by(proved(currentSet(issuers[1]), 2))); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Hour)
		b := currentBundle(issuers[1]).Authorities
		if len(b) != 1 || b[0].ID != third.ID || b[0].Certificate.Equal(root.certificate) {
			t.Errorf("the bundle has %v, want the third authority alone", b)
		}
		stop()
	})
}

// What only the upstream can do is said, and is not done in another way.
func TestUpstreamUnchanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config, s, root := withUpstream(t)
		first := s.deliver(t, root)
		issuer := open(t, config)
		_, err := issuer.Prepare(t.Context(), operator)
		var blocked *ca.Blocked
		if !errors.As(err, &blocked) || obstacles(err) != "UPSTREAM_UNCHANGED" || blocked.Operation != "prepare" || blocked.Authority != first || blocked.Forcible() {
			t.Errorf("Prepare = %v", err)
		}
		if _, err := issuer.Taint(t.Context(), first, forced); obstacles(err) != "UPSTREAM_UNCHANGED" {
			t.Errorf("Taint with force = %v", err)
		}
		if a, err := issuer.Taint(t.Context(), first, operator); err != nil || !a.TaintPending || states(currentSet(issuer)) != "active+taint" {
			t.Errorf("Taint = %+v, %v", a.State, err)
		}
		if a, err := issuer.Taint(t.Context(), first, operator); err != nil || !a.TaintPending || currentSet(issuer).Revision != 2 {
			t.Errorf("Taint again = %+v, %v at revision %d", a.State, err, currentSet(issuer).Revision)
		}
		s.write(t, []byte("x"), nil, nil)
		if _, err := issuer.Prepare(t.Context(), operator); obstacles(err) != "UPSTREAM_UNCHANGED" || !strings.Contains(err.Error(), "tls.key is empty") {
			t.Errorf("Prepare of nonsense = %v", err)
		}

		second := s.deliver(t, root)
		a, err := issuer.Prepare(t.Context(), operator)
		if err != nil || a.ID != second || a.Changed.Actor != "alice" {
			t.Errorf("Prepare = %s by %s, %v; want %s", a.ID, a.Changed.Actor, err, second)
		}
		probe, err := issuer.Probe(t.Context())
		if err != nil || len(probe.Trusted) != 2 || len(probe.Untrusted) != 1 {
			t.Fatalf("a probe of %d and %d certificates, %v", len(probe.Trusted), len(probe.Untrusted), err)
		}
		checkVerifies(t, currentBundle(issuer), ca.SVID{ID: spiffeid.RequireFromString("spiffe://example.test/troth/probe"), Certificates: probe.Trusted})
		if _, err := issuer.Taint(t.Context(), first, forced); err != nil || states(currentSet(issuer)) != "tainted active" {
			t.Errorf("Taint with force = %v: %q", err, states(currentSet(issuer)))
		}
	})
}

// What comes in bit by bit is used when it is whole, and what came before is not
// used again.
func TestUpstreamIsFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config, s, root := withUpstream(t)
		log := new(bytes.Buffer)
		config.Audit = slog.New(slog.NewTextHandler(log, nil))
		a := certify(t, root, "Example intermediate", newKey(t, p256), year, nil)
		b := certify(t, root, "Example intermediate", newKey(t, p256), year, nil)
		s.write(t, pemOf(a), keyPEM(t, a.key), pemOf(root))
		issuer := open(t, config)
		stop := run(t, issuer)
		time.Sleep(time.Hour)
		if lines := strings.Count(log.String(), "level=ERROR"); lines != 0 {
			t.Errorf("%d errors while nothing changed", lines)
		}
		check := func(what, want, says string) {
			t.Helper()
			time.Sleep(5*time.Second + time.Millisecond)
			synctest.Wait()
			if got := states(currentSet(issuer)); got != want {
				t.Errorf("%s: %q, want %q", what, got, want)
			}
			time.Sleep(2 * time.Minute)
			synctest.Wait()
			if n := strings.Count(log.String(), "is not taken"); says == "" && n != 0 || says != "" && (n < 1 || n > 4) || !strings.Contains(log.String(), says) {
				t.Errorf("%s: %d lines in %q, want %q", what, n, log, says)
			}
			log.Reset()
		}
		s.write(t, pemOf(b), keyPEM(t, a.key), pemOf(root))
		check("certificate before the key", "active", "the key is not that of the first certificate")
		s.write(t, pemOf(b)[:100], keyPEM(t, b.key), pemOf(root))
		check("half a certificate", "active", "cut off")
		s.write(t, pemOf(b), keyPEM(t, b.key), pemOf(newRoot(t)))
		check("with another root", "active", "no root that signed itself has signed")
		s.write(t, pemOf(b), keyPEM(t, b.key), pemOf(root))
		check("whole", "active prepared", "")

		again := certify(t, root, "Example intermediate", b.key, year, nil)
		s.write(t, pemOf(again), keyPEM(t, b.key), pemOf(root))
		check("renewed with the same key", "active prepared", "another certificate for the key of authority "+hex.EncodeToString(b.certificate.SubjectKeyId))
		again = certify(t, root, "Example intermediate", b.key, year, func(c *x509.Certificate) { c.SubjectKeyId = []byte("another identifier") })
		s.write(t, pemOf(again), keyPEM(t, b.key), pemOf(root))
		check("renewed with the same key by another name", "active prepared", "rotationPolicy: Always")
		crossed := certify(t, nil, "Example root", root.key, year, nil)
		s.write(t, pemOf(b), keyPEM(t, b.key), pemOf(crossed))
		check("with the root renewed", "active prepared", "or another root above it")

		s.deliver(t, root)
		check("another before that one was activated", "active revoked prepared", "")
		third := currentSet(issuer).Authorities[2]
		s.write(t, pemOf(b), keyPEM(t, b.key), pemOf(root))
		check("set back to what was revoked", "active revoked prepared", "")
		s.write(t, pemOf(a), keyPEM(t, a.key), pemOf(root))
		check("set back to what is active", "active revoked prepared", "")
		if _, err := issuer.Abort(t.Context(), third.ID, operator); err != nil {
			t.Fatal(err)
		}
		stop()
		time.Sleep(8 * 24 * time.Hour)
		for range 2 {
			if did, err := issuer.StepOnce(t.Context(), ca.Propagation{}); did != "forget" || err != nil {
				t.Fatalf("did %q, %v", did, err)
			}
		}
		s.write(t, pemOf(b), keyPEM(t, b.key), pemOf(root))
		stop = run(t, issuer)
		check("set back to what is forgotten", "active", "")
		if _, err := issuer.Prepare(t.Context(), operator); obstacles(err) != "UPSTREAM_UNCHANGED" || !strings.Contains(err.Error(), "which was revoked by schedule") {
			t.Errorf("Prepare of what is forgotten = %v", err)
		}
		stop()
	})
}

// A server that has its authorities does not need the upstream to start.
func TestOpenWhileTheUpstreamIsAway(t *testing.T) {
	config, s, root := withUpstream(t)
	s.deliver(t, root)
	open(t, config)
	if err := os.Remove(filepath.Join(s.path, "..data")); err != nil {
		t.Fatal(err)
	}
	issuer := open(t, config)
	checkVerifies(t, currentBundle(issuer), issue(t, issuer, requestFor(t)))
}

// An authority ends when the first certificate above it does.
func TestUpstreamEndsWithItsRoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config, s, _ := withUpstream(t)
		root := certify(t, nil, "Old root", newKey(t, p256), 12*time.Hour, nil)
		s.deliver(t, root)
		issuer := open(t, config)
		a, _ := currentSet(issuer).Active()
		if !a.NotAfter().Equal(root.certificate.NotAfter) {
			t.Errorf("ends at %v, its root at %v", a.NotAfter(), root.certificate.NotAfter)
		}
		time.Sleep(11 * time.Hour)
		issue(t, issuer, requestFor(t))
		time.Sleep(time.Second)
		if err := issuer.Ready(); !errors.Is(err, ca.ErrAuthorityExpiring) {
			t.Errorf("Ready = %v", err)
		}
		if _, err := issuer.Issue(t.Context(), requestFor(t)); !errors.Is(err, ca.ErrAuthorityExpiring) {
			t.Errorf("Issue = %v", err)
		}
	})
}

// A stored path that does not lead to a root is refused.
func TestStoredUpstream(t *testing.T) {
	config, s, root := withUpstream(t)
	s.deliver(t, root)
	open(t, config)
	doc, err := config.Authorities.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	set, err := ca.DecodeSet(doc.Data)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name   string
		change func(*ca.Authority)
		want   string
	}{
		{"none", func(a *ca.Authority) { a.Upstream = nil }, "does not end in a root"},
		{"itself", func(a *ca.Authority) { a.Upstream = []*x509.Certificate{a.Certificate} }, "does not end in a root"},
		{"another root", func(a *ca.Authority) {
			a.Upstream = []*x509.Certificate{certify(t, nil, "Other", newKey(t, p256), year, nil).certificate}
		}, "does not lead from one certificate to the next"},
		{"too long", func(a *ca.Authority) {
			for len(a.Upstream) < 6 {
				a.Upstream = append(a.Upstream, a.Upstream[0])
			}
		}, "6 certificates"},
		{"another ID", func(a *ca.Authority) { a.ID = strings.Repeat("0", 40) }, "is not the one of its certificate"},
		{"a root with one", func(a *ca.Authority) {
			own := currentSet(open(t, newConfig(t))).Authorities[0]
			own.State, own.Upstream = ca.Active, a.Upstream
			*a = own
		}, "signed itself and has an upstream"},
	} {
		t.Run(test.name, func(t *testing.T) {
			changed := set
			changed.Authorities = []ca.Authority{set.Authorities[0]}
			test.change(&changed.Authorities[0])
			if _, err := ca.EncodeSet(changed); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("EncodeSet = %v, want %q", err, test.want)
			}
		})
	}
}

// What is accepted leads from a P-256 key to a root, and fits into the document.
func FuzzParseUpstream(f *testing.F) {
	root := newRoot(f)
	policy := certify(f, root, "Example policy authority", newKey(f, p256), year, nil)
	a := certify(f, policy, "Example intermediate", newKey(f, p256), year, nil)
	key := keyPEM(f, a.key)
	f.Add(pemOf(a, policy), key, pemOf(root))
	f.Add(pemOf(a, policy, root), key, []byte(nil))
	f.Add(pemOf(root), keyPEM(f, root.key), pemOf(root))
	f.Add(pemOf(a), keyPEM(f, newKey(f, rsa2048)), pemOf(policy))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"), []byte("-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----\n"), []byte("x"))
	f.Fuzz(func(t *testing.T, chain, key, root []byte) {
		got, err := ca.ParseUpstream(chain, key, root)
		if err != nil {
			return
		}
		public, ok := got.Certificate.PublicKey.(*ecdsa.PublicKey)
		if !ok || public.Curve.Params().BitSize != 256 || len(got.Upstream) < 1 || len(got.Upstream) > 6 {
			t.Fatalf("accepted a key of type %T under %d certificates", got.Certificate.PublicKey, len(got.Upstream))
		}
		child := got.Certificate
		for _, parent := range append(got.Upstream, got.Upstream[len(got.Upstream)-1]) {
			if err := child.CheckSignatureFrom(parent); err != nil {
				t.Fatal(err)
			}
			child = parent
		}
	})
}
