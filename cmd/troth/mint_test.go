package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pavlo-v-chernykh/keystore-go/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/yaml"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/test/apiserver"
)

// mintedBy runs mint in this process.
func mintedBy(t testing.TB, args ...string) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	if err := run(t.Context(), append([]string{"mint"}, args...), strings.NewReader(""), &stdout, &stderr); err != nil {
		t.Fatalf("troth mint %s: %v", strings.Join(args, " "), err)
	}
}

// listOf writes a list of n identities.
func listOf(t testing.TB, n int) string {
	t.Helper()
	var list strings.Builder
	for k := range n {
		fmt.Fprintf(&list, "spiffe://ci.test/ns/load/sa/service-%03d\n", k)
	}
	path := filepath.Join(t.TempDir(), "list")
	if err := os.WriteFile(path, []byte(list.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// go-spiffe accepts each of them for what it is, and nothing else does.
func TestMintedAreSVIDs(t *testing.T) {
	out := filepath.Join(t.TempDir(), "out")
	mintedBy(t, "--file", listOf(t, 500), "--ephemeral", "--ttl", "90s", "--out", out)
	td := spiffeid.RequireTrustDomainFromString("ci.test")
	bundle, err := x509bundle.Load(td, filepath.Join(out, "bundle.pem"))
	if err != nil {
		t.Fatal(err)
	}
	index, err := os.ReadFile(filepath.Join(out, mintIndex))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for line := range strings.Lines(string(index)) {
		id, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "\t")
		folder, until, _ := strings.Cut(rest, "\t")
		svid, err := x509svid.Load(filepath.Join(out, folder, "svid.pem"), filepath.Join(out, folder, "key.pem"))
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := x509svid.Verify(svid.Certificates, bundle); err != nil {
			t.Fatal(err)
		}
		leaf := svid.Certificates[0]
		if svid.ID.String() != id || leaf.NotAfter.Format(time.RFC3339) != until {
			t.Fatalf("%s has %v until %v; the index says %s", folder, svid.ID, leaf.NotAfter, line)
		}
		if life := time.Until(leaf.NotAfter); life > 90*time.Second {
			t.Fatalf("%v lives for %v more", id, life)
		}
		n++
	}
	if n != 500 {
		t.Errorf("the index has %d identities", n)
	}
}

// A list longer than Go's idea of it: no two identities share a folder.
func TestFolderNames(t *testing.T) {
	long := strings.Repeat("a", 200)
	seen := make(map[string]string)
	for _, text := range []string{
		"spiffe://ci.test/a/b", "spiffe://ci.test/a.b", "spiffe://ci.test/a-b", "spiffe://ci.test/a_b", "spiffe://ci.test/ab",
		"spiffe://ci.test/" + long, "spiffe://ci.test/" + long + "b", "spiffe://ci.test/" + long + "/b",
		"spiffe://ci.test/" + strings.Repeat("a/", 1000) + "a",
	} {
		name := folderName(spiffeid.RequireFromString(text))
		if other, twice := seen[name]; twice || len(name) > 200 || strings.ContainsAny(name, "/\x00") || name == "." || name == ".." {
			t.Errorf("folderName(%q) = %q, of %d bytes, which is also that of %q", text, name, len(name), other)
		}
		seen[name] = text
	}
}

func TestSecretNames(t *testing.T) {
	for _, tt := range []struct{ id, namespace, name string }{
		{"spiffe://ci.test/ns/shop/sa/cart", "shop", "svid-cart"},
		{"spiffe://ci.test/A/b_c", "", "svid-a-b-c-624403261a"},
		{"spiffe://ci.test/A/b-c", "", "svid-a-b-c-562a71bbb9"},
	} {
		if namespace, name := secretName(spiffeid.RequireFromString(tt.id)); namespace != tt.namespace || name != tt.name {
			t.Errorf("secretName(%q) = %q, %q; want %q, %q", tt.id, namespace, name, tt.namespace, tt.name)
		}
	}
	long := spiffeid.RequireFromString("spiffe://ci.test/" + strings.Repeat("a", 300))
	if _, name := secretName(long); !dnsName.MatchString(name) || len(name) > 253 {
		t.Errorf("secretName() = %q, which Kubernetes does not take", name)
	}
}

// The shell is the third party that says what was quoted.
func TestShellQuoted(t *testing.T) {
	for _, s := range []string{"", "plain", "it's", `$HOME \ "x" ` + "`id`", "two\nlines\n", "'", "''", `\'`, "!", "*", "ü"} {
		out, err := exec.CommandContext(t.Context(), "sh", "-c", "printf %s. "+shellQuoted(s)).Output()
		if err != nil || string(out) != s+"." {
			t.Errorf("sh takes %s for %q (%v), not for %q", shellQuoted(s), out, err, s)
		}
	}
}

// JKS is read back by the library that wrote it, and by Java's keytool where Java is
// installed: nothing else of what is tested needs it.
func TestJKS(t *testing.T) {
	out := filepath.Join(t.TempDir(), "out")
	mintedBy(t, "--spiffe-id", "spiffe://ci.test/ns/shop/sa/cart", "--ephemeral", "--format", "jks", "--out", out)
	password, err := os.ReadFile(filepath.Join(out, "password"))
	if err != nil {
		t.Fatal(err)
	}
	password = bytes.TrimSpace(password)
	folder := filepath.Join(out, "ns+shop+sa+cart")
	load := func(path string) keystore.KeyStore {
		t.Helper()
		file, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		store := keystore.New()
		if err := store.Load(file, password); err != nil {
			t.Fatal(err)
		}
		return store
	}
	entry, err := load(filepath.Join(folder, "keystore.jks")).GetPrivateKeyEntry("svid", password)
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.ParsePKCS8PrivateKey(entry.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(entry.CertificateChain[0].Content)
	if err != nil {
		t.Fatal(err)
	}
	if !key.(*ecdsa.PrivateKey).PublicKey.Equal(leaf.PublicKey) {
		t.Error("key and certificate do not belong together")
	}
	trusted, err := load(filepath.Join(out, "truststore.jks")).GetTrustedCertificateEntry("authority-1")
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := x509bundle.Load(spiffeid.RequireTrustDomainFromString("ci.test"), filepath.Join(out, "bundle.pem"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(trusted.Certificate.Content, bundle.X509Authorities()[0].Raw) {
		t.Error("the trust store has another authority than the bundle")
	}

	keytool, err := exec.LookPath("keytool")
	if err != nil {
		t.Log("no keytool on this machine: the library alone has read what it wrote")
		return
	}
	for _, store := range []string{filepath.Join(folder, "keystore.jks"), filepath.Join(out, "truststore.jks")} {
		list := exec.CommandContext(t.Context(), keytool, "-list", "-v", "-keystore", store, "-storepass:file", filepath.Join(out, "password"))
		said, err := list.CombinedOutput()
		if err != nil {
			t.Fatalf("keytool -list %s: %v\n%s", store, err, said)
		}
		want := "Entry type: trustedCertEntry"
		if filepath.Base(store) == "keystore.jks" {
			want = "Entry type: PrivateKeyEntry"
			if !bytes.Contains(said, []byte("URIName: spiffe://ci.test/ns/shop/sa/cart")) {
				t.Errorf("keytool does not see the SPIFFE ID:\n%s", said)
			}
		}
		if !bytes.Contains(said, []byte(want)) {
			t.Errorf("keytool does not print %q of %s:\n%s", want, store, said)
		}
	}
	// To be exported, the key has to be decrypted.
	exported := filepath.Join(t.TempDir(), "exported.p12")
	export := exec.CommandContext(t.Context(), keytool, "-importkeystore", "-noprompt",
		"-srckeystore", filepath.Join(folder, "keystore.jks"), "-srcstorepass:file", filepath.Join(out, "password"),
		"-destkeystore", exported, "-deststoretype", "PKCS12", "-deststorepass:file", filepath.Join(out, "password"))
	if said, err := export.CombinedOutput(); err != nil {
		t.Fatalf("keytool -importkeystore: %v\n%s", err, said)
	}
}

// Killed at whatever moment, mint leaves the folder as it was or whole. The next one
// deletes what the dead one left.
func TestMintKilled(t *testing.T) {
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	parent := t.TempDir()
	out := filepath.Join(parent, "out")
	list := listOf(t, 200)
	args := []string{"mint", "--file", list, "--ephemeral", "--force", "--out", out}
	trothAgain := func(ctx context.Context) *exec.Cmd {
		// testscript.Main runs the command when the program has its name.
		cmd := exec.CommandContext(ctx, program, args...)
		cmd.Args[0] = "troth"
		return cmd
	}

	killed := 0
	for round := range 8 {
		before := indexOf(t, out)
		cmd := trothAgain(t.Context())
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		over := make(chan error, 1)
		go func() { over <- cmd.Wait() }()
		// Killed when the unfinished folder has so many entries, or when the
		// command was faster than we looked.
		var ended error
		var isOver bool
		for entries := 0; entries < round*28 && !isOver; {
			select {
			case ended = <-over:
				isOver = true
			default:
				entries = unfinished(t, parent)
			}
		}
		if !isOver {
			if err := cmd.Process.Signal(syscall.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
				t.Fatal(err)
			}
			ended = <-over
		}
		if ended != nil {
			killed++
		}
		after := indexOf(t, out)
		if after != before {
			checkWhole(t, out, 200)
		}
	}
	if killed == 0 {
		t.Error("nobody was killed: the test shows nothing")
	}
	if said, err := trothAgain(t.Context()).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, said)
	}
	checkWhole(t, out, 200)
	entries, err := os.ReadDir(parent)
	if err != nil || len(entries) != 1 {
		t.Errorf("beside the folder is left: %v (%v)", entries, err)
	}
}

// unfinished returns how many entries unfinished folders have.
func unfinished(t *testing.T, parent string) int {
	t.Helper()
	folders, err := filepath.Glob(filepath.Join(parent, ".out.unfinished-*"))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, folder := range folders {
		entries, _ := os.ReadDir(folder) // it may be gone
		n += len(entries)
	}
	return n
}

func indexOf(t *testing.T, out string) string {
	t.Helper()
	bundle, err := os.ReadFile(filepath.Join(out, "bundle.pem"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return string(bundle)
}

// checkWhole checks that each identity of a folder is there with its key, under the
// folder's bundle.
func checkWhole(t *testing.T, out string, n int) {
	t.Helper()
	bundle, err := x509bundle.Load(spiffeid.RequireTrustDomainFromString("ci.test"), filepath.Join(out, "bundle.pem"))
	if err != nil {
		t.Fatal(err)
	}
	keys, err := filepath.Glob(filepath.Join(out, "*", "key.pem"))
	if err != nil || len(keys) != n {
		t.Fatalf("%d keys, not %d (%v)", len(keys), n, err)
	}
	for _, key := range keys {
		svid, err := x509svid.Load(filepath.Join(filepath.Dir(key), "svid.pem"), key)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := x509svid.Verify(svid.Certificates, bundle); err != nil {
			t.Fatal(err)
		}
	}
}

// Two at once: the second does not take the first one's work for something dead.
func TestMintLeavesTheLivingAlone(t *testing.T) {
	out := filepath.Join(t.TempDir(), "out")
	first, err := newMintFolder(out, false)
	if err != nil {
		t.Fatal(err)
	}
	defer first.close()
	mintedBy(t, "--spiffe-id", "spiffe://ci.test/a", "--ephemeral", "--out", out)
	if _, err := os.Stat(first.stage); err != nil {
		t.Errorf("the first one's folder: %v", err)
	}
	// And the first one does not take the place of the second's.
	if err := first.publish(); err == nil || !strings.Contains(err.Error(), "is not empty") {
		t.Errorf("publish() = %v", err)
	}
}

func FuzzMintList(f *testing.F) {
	f.Add([]byte("# The shop.\nspiffe://ci.test/ns/shop/sa/cart\n\n spiffe://ci.test/a # b\r\nspiffe://ci.test/a/b"))
	f.Add([]byte("spiffe://ci.test/a\nspiffe://ci.test/a"))
	f.Add([]byte("spiffe://ci.test\x00/a"))
	f.Fuzz(func(t *testing.T, content []byte) {
		var l mintList
		if err := l.parse(content); err != nil {
			return
		}
		// What was read is written and read again to the same.
		var again strings.Builder
		for _, id := range l.ids {
			if id.Path() == "" || len(id.String()) > maxSPIFFEID {
				t.Fatalf("%q passed", id)
			}
			fmt.Fprintln(&again, id)
		}
		var second mintList
		if err := second.parse([]byte(again.String())); err != nil {
			t.Fatal(err)
		}
		if len(second.ids) != len(l.ids) {
			t.Fatalf("%d IDs, then %d", len(l.ids), len(second.ids))
		}
		for n, id := range l.ids {
			if second.ids[n] != id {
				t.Fatalf("%q became %q", id, second.ids[n])
			}
		}
	})
}

// BenchmarkMint mints 500 identities as a process of its own, from its start to its
// end. Its CPU time says what it takes on a machine that is busy with other things.
func BenchmarkMint(b *testing.B) {
	program, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	list := listOf(b, 500)
	for _, format := range []string{"pem", "pkcs12", "jks", "k8s-secret", "env"} {
		b.Run(format, func(b *testing.B) {
			parent := b.TempDir()
			var cpu time.Duration
			n := 0
			for b.Loop() {
				n++
				cmd := exec.CommandContext(b.Context(), program, "mint", "--file", list, "--ephemeral", "--format", format, "--out", filepath.Join(parent, fmt.Sprint(n)))
				cmd.Args[0] = "troth"
				if said, err := cmd.CombinedOutput(); err != nil {
					b.Fatalf("%v\n%s", err, said)
				}
				cpu += cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
			}
			b.ReportMetric(float64(cpu.Milliseconds())/float64(n), "cpu-ms/op")
		})
	}
}

// A real API server takes the Secrets, and knows them for TLS.
func TestSecretsInCluster(t *testing.T) {
	cluster := apiserver.Start(t)
	cluster.CreateNamespace(t, "shop")
	out := filepath.Join(t.TempDir(), "out")
	mintedBy(t, "--spiffe-id", "spiffe://ci.test/ns/shop/sa/cart", "--spiffe-id", "spiffe://ci.test/Other/one_2.3", "--ephemeral", "--format", "k8s-secret", "--out", out)
	for _, folder := range []string{"ns+shop+sa+cart", "Other+one_2.3"} {
		manifest, err := os.ReadFile(filepath.Join(out, folder, "secret.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		var secret corev1.Secret
		if err := yaml.NewYAMLToJSONDecoder(bytes.NewReader(manifest)).Decode(&secret); err != nil {
			t.Fatal(err)
		}
		made, err := cluster.Client().CoreV1().Secrets("shop").Create(t.Context(), &secret, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		pair, err := tls.X509KeyPair(made.Data[corev1.TLSCertKey], made.Data[corev1.TLSPrivateKeyKey])
		if err != nil || made.Type != corev1.SecretTypeTLS || len(made.Data["ca.crt"]) == 0 {
			t.Fatalf("the API server has a Secret of type %s, %v", made.Type, err)
		}
		if got := pair.Leaf.URIs[0].String(); got != made.Annotations["troth.dev/spiffe-id"] {
			t.Errorf("the Secret says %v and has %s", made.Annotations, got)
		}
	}
}

// What a server sends is verified before it is written.
func TestCheckMinted(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("ci.test")
	cart, stock := spiffeid.RequireFromString("spiffe://ci.test/cart"), spiffeid.RequireFromString("spiffe://ci.test/stock")
	_, csr, err := newMintKey()
	if err != nil {
		t.Fatal(err)
	}
	_, otherCSR, err := newMintKey()
	if err != nil {
		t.Fatal(err)
	}
	issued := func() ([][]byte, *x509bundle.Bundle) {
		by, err := openEphemeral(t.Context(), td, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		chains, bundle, err := by.issue(t.Context(), []spiffeid.ID{cart}, [][]byte{csr})
		if err != nil {
			t.Fatal(err)
		}
		return chains[0].certificates, bundle
	}
	chain, bundle := issued()
	_, other := issued()
	for _, tt := range []struct {
		name   string
		id     spiffeid.ID
		csr    []byte
		chain  [][]byte
		bundle *x509bundle.Bundle
		want   string
	}{
		{"good", cart, csr, chain, bundle, ""},
		{"another's identity", stock, csr, chain, bundle, `it is for "spiffe://ci.test/cart"`},
		{"another key", cart, otherCSR, chain, bundle, "it is for another key"},
		{"another authority", cart, csr, chain, other, "CERTIFICATE_UNTRUSTED"},
		{"no certificate", cart, csr, nil, bundle, "CERTIFICATE_MISSING"},
		{"nonsense", cart, csr, [][]byte{{1}}, bundle, "x509: malformed certificate"},
	} {
		_, err := checkMinted(tt.id, tt.csr, tt.chain, tt.bundle)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: checkMinted() = %v, want %q", tt.name, err, tt.want)
		}
	}
	if _, err := bundleOf(&trothv1.Bundle{TrustDomain: "example.org"}, td); err == nil || !strings.Contains(err.Error(), `the bundle of "example.org", not of "ci.test"`) {
		t.Errorf("bundleOf() = %v", err)
	}
	if _, err := bundleOf(&trothv1.Bundle{TrustDomain: "ci.test", X509Authorities: []*trothv1.Authority{{Certificate: []byte{1}}}}, td); err == nil {
		t.Error("bundleOf() takes nonsense for an authority")
	}
	if err := refusedItems([]spiffeid.ID{cart}, []*trothv1.X509SVIDResult{{}}); err == nil || !strings.Contains(err.Error(), "an answer that this program does not know") {
		t.Errorf("refusedItems() = %v", err)
	}
}
