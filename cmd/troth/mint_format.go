package main

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/pavlo-v-chernykh/keystore-go/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v3"
	"software.sslmate.com/src/go-pkcs12"

	"troth.dev/troth/identity"
)

// mintFile is one file of an identity's folder.
type mintFile struct {
	name    string
	content []byte
}

// mintFormat turns identities into files.
type mintFormat struct {
	// own returns the files of one identity; authorities is the bundle's PEM.
	own func(m minted, authorities []byte) ([]mintFile, error)
	// trust returns what whoever verifies them reads beside bundle.pem, if it is
	// there.
	trust func(*x509bundle.Bundle) (mintFile, error)
	// password, if it is there, was made here, and whoever reads the files needs it.
	password string
}

// formatted returns the format that the flags ask for.
func (f *mintFlags) formatted() (mintFormat, error) {
	switch f.format {
	case "pem":
		return mintFormat{own: pemFiles}, nil
	case "k8s-secret":
		return mintFormat{own: secretFile}, nil
	case "env":
		return mintFormat{own: func(m minted, authorities []byte) ([]mintFile, error) {
			script, err := envScript(m, authorities)
			return []mintFile{{"env.sh", script}}, err
		}}, nil
	case "pkcs12", "jks":
	default:
		return mintFormat{}, inputErrorf("--format %q: it must be pem, pkcs12, jks, k8s-secret or env", f.format)
	}

	var format mintFormat
	password, err := "", error(nil)
	if f.passwordFile != "" {
		password, err = readPassword(f.passwordFile)
	} else {
		password = rand.Text()
		format.password = password
	}
	if err != nil {
		return mintFormat{}, err
	}
	trust, own := pkcs12Trust, pkcs12Files
	if f.format == "jks" {
		trust, own = jksTrust, jksFiles
	}
	format.trust = func(bundle *x509bundle.Bundle) (mintFile, error) { return trust(bundle, password) }
	format.own = func(m minted, _ []byte) ([]mintFile, error) { return own(m, password) }
	return format, nil
}

// readPassword reads the password of key stores: the file's one line.
func readPassword(path string) (string, error) {
	const least, most = 6, 1000 // keytool demands the least
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer file.Close()
	content, err := io.ReadAll(io.LimitReader(file, most+3))
	if err != nil {
		return "", err
	}
	password := strings.TrimSuffix(strings.TrimSuffix(string(content), "\n"), "\r")
	// Outside of ASCII, Java and OpenSSL do not agree on what a password's bytes are.
	if len(password) < least || len(password) > most || strings.ContainsFunc(password, func(r rune) bool { return r < ' ' || r > '~' }) {
		return "", inputErrorf("--password-file: a password is one line of %d to %d printable ASCII characters", least, most)
	}
	return password, nil
}

// pems returns the chain and the key of an identity as PEM.
func (m minted) pems() (chain, key []byte, err error) {
	var b bytes.Buffer
	for _, der := range m.certificates {
		if err := pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: der}); err != nil {
			return nil, nil, err
		}
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(m.key)
	if err != nil {
		return nil, nil, err
	}
	return b.Bytes(), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), nil
}

func pemFiles(m minted, _ []byte) ([]mintFile, error) {
	chain, key, err := m.pems()
	return []mintFile{{"svid.pem", chain}, {"key.pem", key}}, err
}

// Names of what is in a key store.
const (
	svidAlias      = "svid"
	authorityAlias = "authority-%d"
)

func pkcs12Files(m minted, password string) ([]mintFile, error) {
	chain := make([]*x509.Certificate, len(m.certificates))
	for n, der := range m.certificates {
		var err error
		if chain[n], err = x509.ParseCertificate(der); err != nil {
			return nil, err
		}
	}
	store, err := pkcs12.Modern2023.Encode(m.key, chain[0], chain[1:], password)
	return []mintFile{{"keystore.p12", store}}, err
}

func pkcs12Trust(bundle *x509bundle.Bundle, password string) (mintFile, error) {
	var entries []pkcs12.TrustStoreEntry
	for n, authority := range bundle.X509Authorities() {
		entries = append(entries, pkcs12.TrustStoreEntry{Cert: authority, FriendlyName: fmt.Sprintf(authorityAlias, n+1)})
	}
	store, err := pkcs12.Modern2023.EncodeTrustStoreEntries(entries, password)
	return mintFile{"truststore.p12", store}, err
}

func jksFiles(m minted, password string) ([]mintFile, error) {
	pkcs8, err := x509.MarshalPKCS8PrivateKey(m.key)
	if err != nil {
		return nil, err
	}
	entry := keystore.PrivateKeyEntry{CreationTime: time.Now(), PrivateKey: pkcs8}
	for _, der := range m.certificates {
		entry.CertificateChain = append(entry.CertificateChain, keystore.Certificate{Type: "X509", Content: der})
	}
	store := keystore.New()
	if err := store.SetPrivateKeyEntry(svidAlias, entry, []byte(password)); err != nil {
		return nil, err
	}
	var b bytes.Buffer
	err = store.Store(&b, []byte(password))
	return []mintFile{{"keystore.jks", b.Bytes()}}, err
}

func jksTrust(bundle *x509bundle.Bundle, password string) (mintFile, error) {
	store := keystore.New(keystore.WithOrderedAliases())
	for n, authority := range bundle.X509Authorities() {
		entry := keystore.TrustedCertificateEntry{
			CreationTime: time.Now(),
			Certificate:  keystore.Certificate{Type: "X509", Content: authority.Raw},
		}
		if err := store.SetTrustedCertificateEntry(fmt.Sprintf(authorityAlias, n+1), entry); err != nil {
			return mintFile{}, err
		}
	}
	var b bytes.Buffer
	err := store.Store(&b, []byte(password))
	return mintFile{"truststore.jks", b.Bytes()}, err
}

// secretManifest is a Secret of Kubernetes.
type secretManifest struct {
	APIVersion string            `yaml:"apiVersion"`
	Kind       string            `yaml:"kind"`
	Metadata   secretMetadata    `yaml:"metadata"`
	Type       string            `yaml:"type"`
	StringData map[string]string `yaml:"stringData"`
}

type secretMetadata struct {
	Name        string            `yaml:"name"`
	Namespace   string            `yaml:"namespace,omitempty"`
	Annotations map[string]string `yaml:"annotations"`
}

func secretFile(m minted, authorities []byte) ([]mintFile, error) {
	chain, key, err := m.pems()
	if err != nil {
		return nil, err
	}
	namespace, name := secretName(m.id)
	manifest, err := yaml.Marshal(secretManifest{
		APIVersion: "v1", Kind: "Secret", Type: "kubernetes.io/tls",
		Metadata: secretMetadata{Name: name, Namespace: namespace, Annotations: map[string]string{
			"troth.dev/spiffe-id": m.id.String(),
			"troth.dev/until":     m.until.UTC().Format(time.RFC3339),
		}},
		StringData: map[string]string{"tls.crt": string(chain), "tls.key": string(key), "ca.crt": string(authorities)},
	})
	return []mintFile{{"secret.yaml", manifest}}, err
}

// secretName returns where the Secret of an identity belongs. The identity of a
// service account goes into its namespace, by its name. Any other is spelled as far
// as Kubernetes can spell it, and told apart by a hash; it has no namespace.
func secretName(id spiffeid.ID) (namespace, name string) {
	if account, err := identity.ParseServiceAccount(id); err == nil && len(account.Name) < 248 {
		return account.Namespace, "svid-" + account.Name
	}
	const most = 200
	spelled := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, strings.ToLower(id.Path()))
	sum := sha256.Sum256([]byte(id.String()))
	return "", "svid" + spelled[:min(len(spelled), most)] + "-" + hex.EncodeToString(sum[:5])
}

// envScript returns exports for a POSIX shell.
func envScript(m minted, authorities []byte) ([]byte, error) {
	chain, key, err := m.pems()
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	for _, v := range []struct {
		name  string
		value []byte
	}{
		{"TROTH_SPIFFE_ID", []byte(m.id.String())},
		{"TROTH_SVID", chain},
		{"TROTH_KEY", key},
		{"TROTH_BUNDLE", authorities},
	} {
		fmt.Fprintf(&b, "export %s=%s\n", v.name, shellQuoted(string(v.value)))
	}
	return b.Bytes(), nil
}

// shellQuoted returns a word of a POSIX shell that stands for exactly s. Within
// single quotes nothing has a meaning but the single quote.
func shellQuoted(s string) string {
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
