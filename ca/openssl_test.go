package ca_test

import (
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"troth.dev/troth/ca"
	"troth.dev/troth/storage"
)

// OpenSSL is the third party: it knows nothing of Go's idea of a certificate.
func TestOpenSSLAgrees(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Fatal("no openssl: apt-get install openssl")
	}
	config := newConfig(t)
	issuer := open(t, config)
	authority := currentBundle(issuer).Authorities[0]
	root := writePEM(t, authority.Certificate.Raw)

	text := openssl(t, "x509", "-in", root, "-noout", "-text")
	contains(t, text,
		"Subject: CN = Troth authority, serialNumber = "+authority.ID,
		"X509v3 Basic Constraints: critical\nCA:TRUE, pathlen:0\n",
		"X509v3 Key Usage: critical\nCertificate Sign, CRL Sign\n",
		"X509v3 Subject Alternative Name:\nURI:spiffe://example.test\n",
		"X509v3 Subject Key Identifier:\n"+colons(authority.ID)+"\n")

	for _, kind := range acceptedKeys {
		t.Run(kind, func(t *testing.T) {
			svid := issue(t, issuer, ca.Request{ID: web, CSR: newCSR(t, newKey(t, kind)), Caller: "test"})
			leaf := writePEM(t, svid.Certificates[0])
			for _, purpose := range []string{"sslserver", "sslclient"} {
				got := openssl(t, "verify", "-x509_strict", "-purpose", purpose, "-CAfile", root, leaf)
				if got != leaf+": OK\n" {
					t.Errorf("openssl verify for %s: %s", purpose, got)
				}
			}

			text := openssl(t, "x509", "-in", leaf, "-noout", "-text")
			contains(t, text,
				"Version: 3 (0x2)\n",
				"Signature Algorithm: ecdsa-with-SHA256\n",
				"Subject:\n",
				"X509v3 Key Usage: critical\nDigital Signature\n",
				"X509v3 Extended Key Usage:\nTLS Web Server Authentication, TLS Web Client Authentication\n",
				"X509v3 Basic Constraints: critical\nCA:FALSE\n",
				"X509v3 Authority Key Identifier:\n"+colons(authority.ID)+"\n",
				"X509v3 Subject Alternative Name: critical\nURI:"+web.String()+"\n")
			if n := strings.Count(text, "X509v3 "); n != 7 { // "X509v3 extensions:" and six
				t.Errorf("%d lines begin with X509v3, want 7:\n%s", n, text)
			}

			fields := openssl(t, "x509", "-in", leaf, "-noout", "-serial", "-startdate", "-enddate", "-dateopt", "iso_8601")
			serial, _, _ := strings.Cut(strings.TrimPrefix(fields, "serial="), "\n")
			records, err := config.Ledger.Query(t.Context(), storage.Query{Serial: strings.ToLower(serial)})
			if err != nil || len(records) != 1 {
				t.Fatalf("the ledger has %d records of openssl's serial %s (%v)", len(records), serial, err)
			}
			want := fmt.Sprintf("serial=%s\nnotBefore=%s\nnotAfter=%s\n", strings.ToUpper(records[0].Serial),
				records[0].NotBefore.Format("2006-01-02 15:04:05Z"), records[0].NotAfter.Format("2006-01-02 15:04:05Z"))
			if fields != want {
				t.Errorf("openssl prints %q, the ledger has %q", fields, want)
			}
		})
	}

	t.Run("another authority", func(t *testing.T) {
		stranger := writePEM(t, currentBundle(open(t, newConfig(t))).Authorities[0].Certificate.Raw)
		leaf := writePEM(t, issue(t, issuer, requestFor(t)).Certificates[0])
		if out, err := exec.CommandContext(t.Context(), "openssl", "verify", "-CAfile", stranger, leaf).CombinedOutput(); err == nil {
			t.Errorf("openssl verifies under an authority that did not sign: %s", out)
		}
	})
}

func openssl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "openssl", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func writePEM(t *testing.T, der []byte) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "certificate.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// contains looks for each of the pieces, whatever the indentation of openssl.
func contains(t *testing.T, text string, pieces ...string) {
	t.Helper()
	var lines []string
	for line := range strings.Lines(text) {
		lines = append(lines, strings.TrimSpace(line))
	}
	plain := strings.Join(lines, "\n")
	for _, piece := range pieces {
		if !strings.Contains(plain, piece) {
			t.Errorf("openssl does not print %q:\n%s", piece, text)
		}
	}
}

// colons spells a hexadecimal identifier as openssl does.
func colons(id string) string {
	var octets []string
	for n := 0; n < len(id); n += 2 {
		octets = append(octets, strings.ToUpper(id[n:n+2]))
	}
	return strings.Join(octets, ":")
}
