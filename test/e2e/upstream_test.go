package e2e_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// upstream is a PKI that issues intermediates, and the files in which it delivers.
type upstream struct {
	root *x509.Certificate
	key  *ecdsa.PrivateKey
	dir  string
}

func newUpstream(t *testing.T) *upstream {
	t.Helper()
	u := &upstream{dir: t.TempDir()}
	u.root, u.key = u.issue(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: "An upstream root"}, NotAfter: time.Now().AddDate(10, 0, 0),
	})
	u.write(t, "ca.crt", "CERTIFICATE", u.root.Raw)
	return u
}

// deliver issues an intermediate with a new key, and returns it.
func (u *upstream) deliver(t *testing.T) *x509.Certificate {
	t.Helper()
	certificate, key := u.issue(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: "Troth"}, NotAfter: time.Now().AddDate(0, 0, 30), MaxPathLenZero: true,
		URIs: []*url.URL{{Scheme: "spiffe", Host: trustDomain.Name()}},
	})
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	// One after the other, so that for a moment they do not match.
	u.write(t, "tls.key", "PRIVATE KEY", der)
	u.write(t, "tls.crt", "CERTIFICATE", certificate.Raw)
	return certificate
}

func (u *upstream) issue(t *testing.T, template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial := make([]byte, 16)
	rand.Read(serial)
	template.SerialNumber = new(big.Int).SetBytes(serial)
	template.NotBefore = time.Now().Add(-time.Hour)
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	template.BasicConstraintsValid, template.IsCA = true, true
	parent, signer := u.root, u.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return certificate, key
}

func (u *upstream) file(name string) string { return filepath.Join(u.dir, name) }

func (u *upstream) write(t *testing.T, name, kind string, der []byte) {
	t.Helper()
	if err := os.WriteFile(u.file(name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Workloads trust the upstream's root and no other, are signed for by its
// intermediate, and get SVIDs under the next one when that is delivered, while their
// peers go on to trust the same root.
func TestUpstreamRoot(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	first := u.deliver(t)
	p := newPlane(t, 30*time.Second, "-upstream-cert="+u.file("tls.crt"), "-upstream-key="+u.file("tls.key"), "-upstream-root="+u.file("ca.crt"),
		"-agent-return=1s", "-agents="+system+"/"+cluster.CreateServiceAccount(t, system, "upstream-agent").Name)
	p.agents = "upstream-agent"
	root := newCgroup(t)
	web := p.account(t, "web")
	n := p.newNode(t).start(t)
	w := startWorkload(t).enter(t, root, p.pod(t, n, web)).watch(t, n)

	if trusted := p.trusted(t).X509Authorities(); len(trusted) != 1 || !trusted[0].Equal(u.root) {
		t.Errorf("%d authorities are trusted, want the upstream's root alone", len(trusted))
	}
	svid := w.svid(t, p, p.id(web))
	if !bytes.Equal(svid.AuthorityKeyId, first.SubjectKeyId) {
		t.Errorf("signed by %x, want the first intermediate, %x", svid.AuthorityKeyId, first.SubjectKeyId)
	}
	next := u.deliver(t)
	for !bytes.Equal(svid.AuthorityKeyId, next.SubjectKeyId) {
		svid = w.rotated(t, p, p.id(web), svid)
	}
	if trusted := p.trusted(t).X509Authorities(); len(trusted) != 1 || !trusted[0].Equal(u.root) {
		t.Errorf("%d authorities are trusted after the next was delivered, want the upstream's root alone", len(trusted))
	}
	w.checkValid(t)
}
