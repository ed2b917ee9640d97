package handshake_test

import (
	"crypto/x509"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"

	"troth.dev/troth/handshake"
)

var update = flag.Bool("update", false, "write a new authority and new seeds to testdata")

const (
	fuzzAuthority = "testdata/authority.der"
	fuzzSeeds     = "testdata/fuzz/FuzzVerify"
)

// FuzzVerify gives Verify any bytes that parse as certificates. It must not
// panic, and what it accepts must be an SVID by the authority in testdata: the
// leaf's own words are compared with what crypto/x509 makes of them.
func FuzzVerify(f *testing.F) {
	ca, now := readAuthority(f)
	bundle := x509bundle.FromX509Authorities(domain, []*x509.Certificate{ca})
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	f.Fuzz(func(t *testing.T, der []byte) {
		chain, err := x509.ParseCertificates(der)
		if err != nil {
			return
		}
		peer, err := handshake.Verify(chain, bundle, now)
		if err != nil {
			if codeOf(err) == "" {
				t.Errorf("Verify() = %v, without a code", err)
			}
			return
		}
		intermediates := x509.NewCertPool()
		for _, cert := range chain[1:] {
			intermediates.AddCert(cert)
		}
		if _, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, CurrentTime: now}); err != nil {
			t.Errorf("accepted, and crypto/x509 says %v", err)
		}
		if uris := chain[0].URIs; len(uris) != 1 || uris[0].String() != peer.ID.String() || peer.ID.TrustDomain() != domain {
			t.Errorf("accepted as %v a leaf with %v", peer.ID, uris)
		}
		if now.After(peer.Expiry) || !peer.Authority.Equal(ca) {
			t.Errorf("accepted until %v, by %v", peer.Expiry, peer.Authority.Subject)
		}
	})
}

// The seeds are what FuzzVerify says they are: one is accepted, the others are
// each refused for their own reason.
func TestFuzzSeeds(t *testing.T) {
	if *update {
		writeSeeds(t)
	}
	ca, now := readAuthority(t)
	bundle := x509bundle.FromX509Authorities(domain, []*x509.Certificate{ca})
	for name, want := range map[string]handshake.Code{
		"good":                 "",
		"good-by-intermediate": "",
		"two-URIs":             handshake.NotOneURI,
		"empty-fragment":       handshake.NotASPIFFEID,
		"authority-as-leaf":    handshake.CAAsLeaf,
		"another-authority":    handshake.CertificateUntrusted,
	} {
		data, err := os.ReadFile(filepath.Join(fuzzSeeds, name))
		if err != nil {
			t.Fatal(err)
		}
		var der []byte
		if _, err := fmt.Sscanf(strings.SplitAfterN(string(data), "\n", 2)[1], "[]byte(%q)", &der); err != nil {
			t.Fatal(err)
		}
		chain, err := x509.ParseCertificates(der)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := handshake.Verify(chain, bundle, now); codeOf(err) != want || (err == nil) != (want == "") {
			t.Errorf("Verify(%s) = %v, want %q", name, err, want)
		}
	}
}

// readAuthority returns the authority of the seeds, and the time they are for.
func readAuthority(t testing.TB) (*x509.Certificate, time.Time) {
	t.Helper()
	der, err := os.ReadFile(fuzzAuthority)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return ca, ca.NotBefore.Add(time.Hour)
}

func writeSeeds(t *testing.T) {
	t.Helper()
	ca := newAuthority(t)
	seeds := map[string][]*x509.Certificate{
		"good":                 ca.svid(t, idA, nil).Certificates,
		"good-by-intermediate": chained(t, ca, nil).Certificates,
	}
	for _, s := range spoiledCertificates() {
		name := strings.ReplaceAll(s.name, " ", "-")
		if slices.Contains([]string{"two-URIs", "empty-fragment", "authority-as-leaf", "another-authority"}, name) {
			seeds[name] = s.svid(t, ca).Certificates
		}
	}
	if err := os.MkdirAll(fuzzSeeds, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, chain := range seeds {
		var der []byte
		for _, cert := range chain {
			der = append(der, cert.Raw...)
		}
		seed := fmt.Sprintf("go test fuzz v1\n[]byte(%q)\n", der)
		if err := os.WriteFile(filepath.Join(fuzzSeeds, name), []byte(seed), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(fuzzAuthority, ca.cert.Raw, 0o644); err != nil {
		t.Fatal(err)
	}
}
