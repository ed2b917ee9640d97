package ca_test

import (
	"bytes"
	"crypto"
	"crypto/dsa" //nolint:staticcheck // a key type to refuse
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"math/big"
	"strings"
	"testing"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"troth.dev/troth/ca"
	"troth.dev/troth/storage"
)

// Algorithm identifiers (RFC 5758 §3.2, RFC 3279 §2.2.3, RFC 8410 §3).
var (
	ecdsaWithSHA256 = []byte{0x30, 10, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2}
	ecdsaWithSHA1   = []byte{0x30, 9, 6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 1}
	rsaWithSHA256   = []byte{0x30, 13, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 11, 5, 0}
	rsaWithSHA1     = []byte{0x30, 13, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 5, 5, 0}
)

// rawCSR is a PKCS #10 request (RFC 2986 §4) put together by hand, for the
// requests that crypto/x509 declines to make.
func rawCSR(t *testing.T, spki, algorithm []byte, sign func(tbs []byte) ([]byte, error)) []byte {
	t.Helper()
	var info cryptobyte.Builder
	info.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1Int64(0)
		b.AddASN1(asn1.SEQUENCE, func(*cryptobyte.Builder) {})
		b.AddBytes(spki)
		b.AddASN1(asn1.Tag(0).ContextSpecific().Constructed(), func(*cryptobyte.Builder) {})
	})
	tbs := info.BytesOrPanic()
	signature, err := sign(tbs)
	if err != nil {
		t.Fatal(err)
	}
	var csr cryptobyte.Builder
	csr.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(tbs)
		b.AddBytes(algorithm)
		b.AddASN1BitString(signature)
	})
	return csr.BytesOrPanic()
}

func spkiOf(t *testing.T, public any) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// rsaOf is a public RSA key of this size that nobody can sign with: to make a
// real one takes seconds, and it has to be refused before it costs anything.
func rsaOf(bits, exponent int) *rsa.PublicKey {
	n := new(big.Int).Lsh(big.NewInt(1), uint(bits-1))
	return &rsa.PublicKey{N: n.SetBit(n, 0, 1), E: exponent}
}

func unsigned([]byte) ([]byte, error) { return make([]byte, 64), nil }

func signedSHA256(key crypto.Signer) func([]byte) ([]byte, error) {
	return func(tbs []byte) ([]byte, error) {
		digest := sha256.Sum256(tbs)
		return key.Sign(rand.Reader, digest[:], crypto.SHA256)
	}
}

func signedSHA1(key crypto.Signer) func([]byte) ([]byte, error) {
	return func(tbs []byte) ([]byte, error) {
		digest := sha1.Sum(tbs)
		return key.Sign(rand.Reader, digest[:], crypto.SHA1)
	}
}

// withJunk adds an element of the attacker's choice to the end of a SEQUENCE.
func withJunk(t *testing.T, sequence []byte) []byte {
	t.Helper()
	var content cryptobyte.String
	input := cryptobyte.String(sequence)
	if !input.ReadASN1(&content, asn1.SEQUENCE) {
		t.Fatalf("no sequence: %x", sequence)
	}
	var b cryptobyte.Builder
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(content)
		b.AddASN1OctetString([]byte("junk of the attacker"))
	})
	return b.BytesOrPanic()
}

func TestIssueRefusesCSR(t *testing.T) {
	key := newKey(t, p256)
	good := newCSR(t, key)
	rsaKey := newKey(t, rsa2048)
	p224Key, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p521Key, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	x25519Key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	flipped := bytes.Clone(good)
	flipped[len(flipped)-1] ^= 1
	long := csrOf(t, &x509.CertificateRequest{DNSNames: []string{strings.Repeat("a", ca.MaxCSR)}}, key)

	for _, test := range []struct {
		name string
		csr  []byte
		want ca.Reason
	}{
		{"nothing", nil, ca.CSRMalformed},
		{"empty", []byte{}, ca.CSRMalformed},
		{"garbage", []byte("-----BEGIN CERTIFICATE REQUEST-----"), ca.CSRMalformed},
		{"cut off", good[:len(good)-1], ca.CSRMalformed},
		{"something after it", append(bytes.Clone(good), 0), ca.CSRMalformed},
		{"zeros of 4096 bytes", make([]byte, ca.MaxCSR), ca.CSRMalformed},
		{"zeros of 4097 bytes", make([]byte, ca.MaxCSR+1), ca.CSRTooLarge},
		{"good but too large", long, ca.CSRTooLarge},
		{"a certificate", currentBundle(open(t, newConfig(t))).Authorities[0].Certificate.Raw, ca.CSRMalformed},

		{"RSA 1024", rawCSR(t, spkiOf(t, rsaOf(1024, 65537)), rsaWithSHA256, unsigned), ca.CSRKeyType},
		{"RSA 2047", rawCSR(t, spkiOf(t, rsaOf(2047, 65537)), rsaWithSHA256, unsigned), ca.CSRKeyType},
		{"RSA 4097", rawCSR(t, spkiOf(t, rsaOf(4097, 65537)), rsaWithSHA256, unsigned), ca.CSRKeyType},
		{"RSA 8192", rawCSR(t, spkiOf(t, rsaOf(8192, 65537)), rsaWithSHA256, unsigned), ca.CSRKeyType},
		{"RSA exponent 3", rawCSR(t, spkiOf(t, rsaOf(2048, 3)), rsaWithSHA256, unsigned), ca.CSRKeyType},
		{"P-224", newCSR(t, p224Key), ca.CSRKeyType},
		{"P-521", newCSR(t, p521Key), ca.CSRKeyType},
		{"X25519", rawCSR(t, spkiOf(t, x25519Key.PublicKey()), ecdsaWithSHA256, unsigned), ca.CSRKeyType},
		{"DSA", rawCSR(t, dsaSPKI(), ecdsaWithSHA256, unsigned), ca.CSRKeyType},

		{"signature changed", flipped, ca.CSRSignature},
		{"signed by another key", rawCSR(t, spkiOf(t, key.Public()), ecdsaWithSHA256, signedSHA256(newKey(t, p256))), ca.CSRSignature},
		{"not signed", rawCSR(t, spkiOf(t, key.Public()), ecdsaWithSHA256, unsigned), ca.CSRSignature},
		{"empty signature", rawCSR(t, spkiOf(t, key.Public()), ecdsaWithSHA256, func([]byte) ([]byte, error) { return nil, nil }), ca.CSRSignature},
		{"RSA signature that was never made", rawCSR(t, spkiOf(t, rsaOf(2048, 65537)), rsaWithSHA256, unsigned), ca.CSRSignature},
		{"signature of another algorithm", rawCSR(t, spkiOf(t, key.Public()), rsaWithSHA256, signedSHA256(key)), ca.CSRSignature},
		{"ECDSA over SHA-1", rawCSR(t, spkiOf(t, key.Public()), ecdsaWithSHA1, signedSHA1(key)), ca.CSRSignature},
		{"RSA over SHA-1", rawCSR(t, spkiOf(t, rsaKey.Public()), rsaWithSHA1, signedSHA1(rsaKey)), ca.CSRSignature},

		// Signed by the right key, but there is more in it than the key.
		{"junk beside a P-256 key", rawCSR(t, withJunk(t, spkiOf(t, key.Public())), ecdsaWithSHA256, signedSHA256(key)), ca.CSRMalformed},
		{"junk beside an RSA key", rawCSR(t, withJunk(t, spkiOf(t, rsaKey.Public())), rsaWithSHA256, signedSHA256(rsaKey)), ca.CSRMalformed},
	} {
		t.Run(test.name, func(t *testing.T) {
			config := newConfig(t)
			results, err := open(t, config).Issue(t.Context(), ca.Request{ID: web, CSR: test.csr, Caller: "test"})
			if err != nil {
				t.Fatal(err)
			}
			var refusal *ca.Error
			if !errors.As(results[0].Err, &refusal) || refusal.Reason != test.want {
				t.Errorf("error %v, want reason %s", results[0].Err, test.want)
			} else if errors.Unwrap(refusal) == nil {
				t.Error("the refusal does not say what led to it")
			}
			if results[0].SVID.Certificates != nil {
				t.Error("a certificate left with the refusal")
			}
			if records, err := config.Ledger.Query(t.Context(), storage.Query{}); err != nil || len(records) != 0 {
				t.Errorf("%d records in the ledger (%v), want none", len(records), err)
			}
		})
	}
}

// dsaSPKI is a DSA public key (RFC 3279 §2.3.2), which Go parses but no longer
// writes. Its numbers are none that anybody would use.
func dsaSPKI() []byte {
	key := dsa.PublicKey{Parameters: dsa.Parameters{P: big.NewInt(23), Q: big.NewInt(11), G: big.NewInt(4)}, Y: big.NewInt(8)}
	var y, b cryptobyte.Builder
	y.AddASN1BigInt(key.Y)
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddBytes([]byte{6, 7, 0x2a, 0x86, 0x48, 0xce, 0x38, 4, 1})
			b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddASN1BigInt(key.P)
				b.AddASN1BigInt(key.Q)
				b.AddASN1BigInt(key.G)
			})
		})
		b.AddASN1BitString(y.BytesOrPanic())
	})
	return b.BytesOrPanic()
}

func FuzzIssueCSR(f *testing.F) {
	for _, kind := range acceptedKeys {
		f.Add(newCSR(f, newKey(f, kind)))
	}
	f.Add(csrOf(f, &x509.CertificateRequest{DNSNames: []string{"evil.test"}}, newKey(f, p256)))
	f.Add([]byte{})
	f.Add([]byte{0x30, 0x80, 0, 0})
	config := newConfig(f)
	issuer := open(f, config)
	authority := currentBundle(issuer).Authorities[0].Certificate
	f.Fuzz(func(t *testing.T, csr []byte) {
		results, err := issuer.Issue(t.Context(), ca.Request{ID: web, CSR: csr, Caller: "fuzz"})
		if err != nil {
			t.Fatal(err)
		}
		if err := results[0].Err; err != nil {
			var refusal *ca.Error
			if !errors.As(err, &refusal) {
				t.Errorf("error %v, want a refusal of the request", err)
			}
			return
		}
		leaf := parseLeaf(t, results[0].SVID)
		checkLeaf(t, leaf, web, authority)
		checkVerifies(t, currentBundle(issuer), results[0].SVID)
		request, err := x509.ParseCertificateRequest(csr)
		if err != nil {
			t.Fatalf("accepted although %v", err)
		}
		switch key := request.PublicKey.(type) {
		case *ecdsa.PublicKey, *rsa.PublicKey, ed25519.PublicKey:
			if !key.(interface{ Equal(crypto.PublicKey) bool }).Equal(leaf.PublicKey) {
				t.Error("the certificate has another public key")
			}
		default:
			t.Errorf("accepted a key of type %T", key)
		}
	})
}
