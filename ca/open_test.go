package ca_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/ca"
	"troth.dev/troth/storage"
)

func TestOpenMakesOneAuthorityAndFindsItAgain(t *testing.T) {
	config := newConfig(t)
	first := open(t, config)
	made := currentBundle(first)
	if len(made.Authorities) != 1 || made.Revision != 1 || made.TrustDomain != trustDomain {
		t.Fatalf("first Open: bundle of %q, revision %d, %d authorities; want %q, 1, 1",
			made.TrustDomain, made.Revision, len(made.Authorities), trustDomain)
	}
	if d := stored(t, config.Authorities); d.Authorities[0].State != "active" {
		t.Fatalf("first Open: the authority is %s, want active", d.Authorities[0].State)
	}
	if err := first.Ready(); err != nil {
		t.Fatalf("Ready() = %v", err)
	}

	second := open(t, config)
	found := currentBundle(second)
	if len(found.Authorities) != 1 || found.Authorities[0].ID != made.Authorities[0].ID || found.Revision != 1 {
		t.Fatalf("second Open: authorities %v at revision %d; want %v at 1", found.Authorities, found.Revision, made.Authorities)
	}
	checkVerifies(t, made, issue(t, second, requestFor(t)))
}

// The rules for a signing certificate: X509-SVID §2, §3.2, §4.1 and §4.3.
func TestOpenAuthorityProfile(t *testing.T) {
	before := time.Now()
	config := newConfig(t)
	a := currentBundle(open(t, config)).Authorities[0]
	c := a.Certificate
	if !a.NotAfter.Equal(c.NotAfter) {
		t.Errorf("ends at %v, its certificate at %v", a.NotAfter, c.NotAfter)
	}

	if !c.IsCA || !c.BasicConstraintsValid || c.MaxPathLen != 0 || !c.MaxPathLenZero {
		t.Errorf("CA %t, path length %d (zero %t); want a CA for leaves alone", c.IsCA, c.MaxPathLen, c.MaxPathLenZero)
	}
	if want := x509.KeyUsageCertSign | x509.KeyUsageCRLSign; c.KeyUsage != want {
		t.Errorf("key usage %b, want %b", c.KeyUsage, want)
	}
	if len(c.URIs) != 1 || c.URIs[0].String() != trustDomain.IDString() {
		t.Errorf("URIs %v, want the trust domain's, without a path", c.URIs)
	}
	if len(c.ExtKeyUsage) != 0 || len(c.DNSNames)+len(c.IPAddresses)+len(c.EmailAddresses) != 0 {
		t.Errorf("extended key usages %v or names beside the URI", c.ExtKeyUsage)
	}
	if len(c.RawSubject) <= 2 || !bytes.Equal(c.RawIssuer, c.RawSubject) {
		t.Errorf("subject %q, issuer %q; want the same, not empty (RFC 5280 §4.1.2.6)", c.Subject, c.Issuer)
	}
	sum := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	if id := hex.EncodeToString(c.SubjectKeyId); id != a.ID || id != hex.EncodeToString(sum[:20]) {
		t.Errorf("subject key identifier %s, ID %s; want both to be the key's", id, a.ID)
	}
	if err := c.CheckSignatureFrom(c); err != nil {
		t.Errorf("self-signature: %v", err)
	}
	if c.SerialNumber.Sign() <= 0 || c.SerialNumber.BitLen() < 120 || c.SerialNumber.BitLen() > 159 {
		t.Errorf("serial number of %d bits", c.SerialNumber.BitLen())
	}
	if life := c.NotAfter.Sub(before); life < 30*24*time.Hour-time.Second || life > 30*24*time.Hour+time.Minute {
		t.Errorf("valid for %v from now, want 30 days", life)
	}
	if age := before.Sub(c.NotBefore); age < 9*time.Minute || age > 11*time.Minute {
		t.Errorf("valid since %v, want 10 minutes", age)
	}
	for _, e := range c.Extensions {
		critical := e.Id.String() == "2.5.29.15" || e.Id.String() == "2.5.29.19" // key usage, basic constraints
		if e.Critical != critical {
			t.Errorf("extension %v critical: %t, want %t", e.Id, e.Critical, critical)
		}
	}
}

func TestOpenFromManyReplicas(t *testing.T) {
	const replicas = 16
	config := newConfig(t)
	issuers := make([]*ca.Issuer, replicas)
	start := make(chan struct{})
	var all sync.WaitGroup
	for n := range issuers {
		all.Go(func() {
			<-start
			issuer, err := ca.Open(t.Context(), config)
			if err != nil {
				t.Errorf("Open of replica %d: %v", n, err)
			}
			issuers[n] = issuer
		})
	}
	close(start)
	all.Wait()
	if t.Failed() {
		return
	}

	d := stored(t, config.Authorities)
	if len(d.Authorities) != 1 {
		t.Fatalf("%d authorities are stored, want 1", len(d.Authorities))
	}
	for n, issuer := range issuers {
		svid := issue(t, issuer, requestFor(t))
		if svid.AuthorityID != d.Authorities[0].ID {
			t.Errorf("replica %d signs with %s, want %s", n, svid.AuthorityID, d.Authorities[0].ID)
		}
		checkVerifies(t, currentBundle(issuers[(n+1)%replicas]), svid)
	}
}

func TestOpenRefusesConfig(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*ca.Config)
		want   string
	}{
		{"nothing", func(c *ca.Config) { *c = ca.Config{} }, "ca: no trust domain"},
		{"no trust domain", func(c *ca.Config) { c.TrustDomain = spiffeid.TrustDomain{} }, "ca: no trust domain"},
		{"no keys", func(c *ca.Config) { c.Keys = nil }, "ca: Keys, Authorities, Ledger and Audit are required"},
		{"no authorities", func(c *ca.Config) { c.Authorities = nil }, "ca: Keys, Authorities, Ledger and Audit are required"},
		{"no ledger", func(c *ca.Config) { c.Ledger = nil }, "ca: Keys, Authorities, Ledger and Audit are required"},
		{"no audit", func(c *ca.Config) { c.Audit = nil }, "ca: Keys, Authorities, Ledger and Audit are required"},
		{"short authorities", func(c *ca.Config) { c.AuthorityLife = 3*time.Hour - 1 },
			"ca: authorities that live 2h59m59.999999999s cannot sign SVIDs that live 1h0m0s: give them at least three times as long"},
		{"negative life", func(c *ca.Config) { c.AuthorityLife = -time.Hour },
			"ca: authorities that live -1h0m0s cannot sign SVIDs that live 1h0m0s: give them at least three times as long"},
	} {
		t.Run(test.name, func(t *testing.T) {
			config := newConfig(t)
			memory := config.Authorities
			test.change(&config)
			if _, err := ca.Open(t.Context(), config); err == nil || err.Error() != test.want {
				t.Errorf("Open = %v, want %q", err, test.want)
			}
			if doc, err := memory.Load(t.Context()); err != nil || doc.Version != "" {
				t.Errorf("the store has version %q (%v) after a refusal", doc.Version, err)
			}
		})
	}
}

// Whatever the store holds that was not meant for this server stops it from
// starting, and is still there afterwards.
func TestOpenRefusesDocument(t *testing.T) {
	base := newConfig(t)
	open(t, base)
	good := stored(t, base.Authorities)
	second := anotherAuthority(t, base, "active")
	leaf := parseLeaf(t, issue(t, open(t, base), requestFor(t)))
	sum := sha256.Sum256(leaf.RawSubjectPublicKeyInfo)

	foreign := base
	foreign.TrustDomain = spiffeid.RequireTrustDomainFromString("other.test")
	foreign.Authorities = storage.NewMemory()
	open(t, foreign)

	change := func(f func(*document)) []byte {
		d := good
		d.Authorities = append([]authority(nil), good.Authorities...)
		f(&d)
		return d.encode(t)
	}
	for _, test := range []struct {
		name string
		data []byte
		want string
	}{
		{"empty", []byte{}, "unexpected end of JSON input"},
		{"cut off", good.encode(t)[:100], "unexpected end of JSON input"},
		{"no JSON", []byte("PK\x03\x04"), "invalid character 'P'"},
		{"something after it", append(good.encode(t), "{}"...), "invalid character '{' after top-level value"},
		{"no format", change(func(d *document) { d.Format = 0 }), "have format 0, and this server knows only 1 to 3"},
		{"later format", change(func(d *document) { d.Format = 4 }), "have format 4, and this server knows only 1 to 3: was it downgraded?"},
		{"foreign trust domain", stored(t, foreign.Authorities).encode(t), `are of trust domain "other.test", not "example.test"`},
		{"no trust domain", change(func(d *document) { d.TrustDomain = "" }), "trust domain is missing"},
		{"no revision", change(func(d *document) { d.Revision = 0 }), "without a revision"},
		{"no authority", change(func(d *document) { d.Authorities = nil }), "trusts none"},
		{"all revoked", change(func(d *document) { d.Authorities[0].State = "revoked" }), "trusts none"},
		{"two active", change(func(d *document) { d.Authorities = append(d.Authorities, second) }), "2 authorities are active at once"},
		{"one twice", change(func(d *document) {
			again := d.Authorities[0]
			again.State = "old"
			d.Authorities = append(d.Authorities, again)
		}), "is there twice"},
		{"no state", change(func(d *document) { d.Authorities[0].State = "" }), `unknown state "" of an authority`},
		{"unknown state", change(func(d *document) { d.Authorities[0].State = "Active" }), `unknown state "Active" of an authority`},
		{"damaged certificate", change(func(d *document) { d.Authorities[0].Certificate = []byte{0x30, 0} }), "stored authority"},
		{"no certificate", change(func(d *document) { d.Authorities[0].Certificate = nil }), "stored authority"},
		{"certificate of another", change(func(d *document) { d.Authorities[0].Certificate = second.Certificate }), "is not the one of its certificate"},
		{"certificate of a leaf", change(func(d *document) {
			d.Authorities = append(d.Authorities, authority{ID: hex.EncodeToString(sum[:20]), State: "old", Certificate: leaf.Raw})
		}), "may sign no others"},
		{"key of another", change(func(d *document) { d.Authorities[0].Key = second.Key }), "the sealed key does not open"},
		{"damaged key", change(func(d *document) {
			key := bytes.Clone(d.Authorities[0].Key)
			key[len(key)-1] ^= 1
			d.Authorities[0].Key = key
		}), "the sealed key does not open"},
		{"key of unknown format", change(func(d *document) {
			key := bytes.Clone(d.Authorities[0].Key)
			key[0] = 9
			d.Authorities[0].Key = key
		}), "the sealed key has an unknown format"},
		{"no key", change(func(d *document) { d.Authorities[0].Key = nil }), "the sealed key has an unknown format"},
	} {
		t.Run(test.name, func(t *testing.T) {
			config := base
			config.Authorities = storage.NewMemory()
			replace(t, config.Authorities, test.data)
			_, err := ca.Open(t.Context(), config)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("Open = %v, want an error with %q", err, test.want)
			}
			if doc, err := config.Authorities.Load(t.Context()); err != nil || !bytes.Equal(doc.Data, test.data) {
				t.Errorf("Open replaced the document that it refused (%v)", err)
			}
		})
	}
}

// oversized answers with more than a store may hold.
type oversized struct{ storage.AuthorityStore }

func (oversized) Load(context.Context) (storage.Document, error) {
	return storage.Document{Version: "1", Data: bytes.Repeat([]byte(" "), storage.MaxDocument+1)}, nil
}

func TestOpenRefusesOversizedDocument(t *testing.T) {
	config := newConfig(t)
	config.Authorities = oversized{config.Authorities}
	if _, err := ca.Open(t.Context(), config); !errors.Is(err, storage.ErrDocumentSize) {
		t.Errorf("Open = %v, want %v", err, storage.ErrDocumentSize)
	}
}

// otherKeys opens every handle to the same key.
type otherKeys struct {
	ca.Keys
	key crypto.Signer
	err error
}

func (k otherKeys) Open(context.Context, string, []byte) (crypto.Signer, error) { return k.key, k.err }

func (k otherKeys) Create(context.Context) (crypto.Signer, []byte, error) { return k.key, nil, k.err }

func TestOpenRefusesKeys(t *testing.T) {
	broken := errors.New("the key store is on fire")
	for _, test := range []struct {
		name string
		keys func(t *testing.T) ca.Keys
		want string
	}{
		{"sealed under another key", func(t *testing.T) ca.Keys { return newKeys(t) },
			"the sealed key does not open: it is under key-encryption key "},
		{"key of nobody", func(t *testing.T) ca.Keys { return otherKeys{key: newKey(t, p256)} }, "does not match its certificate"},
		{"P-384", func(t *testing.T) ca.Keys { return otherKeys{key: newKey(t, p384)} }, "is not ECDSA P-256"},
		{"Ed25519", func(t *testing.T) ca.Keys { return otherKeys{key: newKey(t, ed)} }, "is not ECDSA P-256"},
		{"error", func(*testing.T) ca.Keys { return otherKeys{err: broken} }, broken.Error()},
	} {
		t.Run(test.name, func(t *testing.T) {
			config := newConfig(t)
			open(t, config)
			config.Keys = test.keys(t)
			if _, err := ca.Open(t.Context(), config); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("Open = %v, want an error with %q", err, test.want)
			}
		})
	}

	t.Run("error at first start", func(t *testing.T) {
		config := newConfig(t)
		config.Keys = otherKeys{err: broken}
		if _, err := ca.Open(t.Context(), config); !errors.Is(err, broken) {
			t.Errorf("Open = %v, want %v", err, broken)
		}
	})
}

// A P-256 key of another implementation is as good as ours.
func TestOpenTakesKeysOfOthers(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	config := newConfig(t)
	config.Keys = otherKeys{key: key}
	issuer := open(t, config)
	checkVerifies(t, currentBundle(issuer), issue(t, issuer, requestFor(t)))
}

// dying is a store whose process dies at the first Swap: nobody learns how it
// went. It stands for the crash before and after the write.
type dying struct {
	storage.AuthorityStore
	after bool
}

var errDied = errors.New("the process died")

func (s dying) Swap(ctx context.Context, old string, data []byte) (storage.Document, error) {
	if s.after {
		if _, err := s.AuthorityStore.Swap(ctx, old, data); err != nil {
			return storage.Document{}, err
		}
	}
	return storage.Document{}, errDied
}

func TestOpenAfterACrash(t *testing.T) {
	for _, test := range []struct {
		name   string
		after  bool
		stored int // authorities after the crash
	}{
		{"before the Swap", false, 0},
		{"after the Swap", true, 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			config := newConfig(t)
			crashing := config
			crashing.Authorities = dying{config.Authorities, test.after}
			if _, err := ca.Open(t.Context(), crashing); !errors.Is(err, errDied) {
				t.Fatalf("Open = %v, want %v", err, errDied)
			}
			var before document
			if test.stored > 0 {
				before = stored(t, config.Authorities)
			}
			if len(before.Authorities) != test.stored {
				t.Fatalf("%d authorities after the crash, want %d", len(before.Authorities), test.stored)
			}

			issuer := open(t, config)
			now := stored(t, config.Authorities)
			if len(now.Authorities) != 1 {
				t.Fatalf("%d authorities after the next Open, want 1", len(now.Authorities))
			}
			if test.stored > 0 && now.Authorities[0].ID != before.Authorities[0].ID {
				t.Errorf("the next Open made another authority")
			}
			checkVerifies(t, currentBundle(issuer), issue(t, issuer, requestFor(t)))
		})
	}
}

func TestOpenWithoutActiveAuthority(t *testing.T) {
	config := newConfig(t)
	open(t, config)
	d := stored(t, config.Authorities)
	d.Authorities[0].State = "prepared"
	replace(t, config.Authorities, d.encode(t))

	issuer := open(t, config)
	if err := issuer.Ready(); !errors.Is(err, ca.ErrNoActiveAuthority) {
		t.Errorf("Ready() = %v, want %v", err, ca.ErrNoActiveAuthority)
	}
	if results, err := issuer.Issue(t.Context(), requestFor(t)); !errors.Is(err, ca.ErrNoActiveAuthority) || results != nil {
		t.Errorf("Issue = %v, %v; want %v alone", results, err, ca.ErrNoActiveAuthority)
	}
	if n := len(currentBundle(issuer).Authorities); n != 1 {
		t.Errorf("the bundle has %d authorities, want the prepared one", n)
	}
}

// Every state but revoked is trusted, and only those that sign or may come to need
// their key.
func TestOpenBundle(t *testing.T) {
	config := newConfig(t)
	open(t, config)
	d := stored(t, config.Authorities)
	want := []string{d.Authorities[0].ID}
	for _, state := range []string{"prepared", "old", "tainted", "revoked"} {
		a := anotherAuthority(t, config, state)
		if state != "prepared" {
			a.Key = nil
		}
		d.Authorities = append(d.Authorities, a)
		if state != "revoked" {
			want = append(want, a.ID)
		}
	}
	replace(t, config.Authorities, d.encode(t))

	var got []string
	for _, a := range currentBundle(open(t, config)).Authorities {
		got = append(got, a.ID)
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("the bundle has %v, want %v", got, want)
	}
}
