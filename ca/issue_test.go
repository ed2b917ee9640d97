package ca_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/ca"
	"troth.dev/troth/storage"
)

var equalIDs = cmp.Comparer(func(a, b spiffeid.ID) bool { return a == b })

// The whole profile, on what a peer would parse.
func TestIssue(t *testing.T) {
	for _, kind := range acceptedKeys {
		t.Run(kind, func(t *testing.T) {
			config := newConfig(t)
			issuer := open(t, config)
			authority := currentBundle(issuer).Authorities[0]
			key := newKey(t, kind)
			request := ca.Request{
				ID: web, CSR: newCSR(t, key),
				Caller: "spiffe://example.test/troth/server", Node: "node-1", PodUID: "8e4c3a52",
			}
			before := time.Now()
			svid := issue(t, issuer, request)
			after := time.Now()

			leaf := parseLeaf(t, svid)
			checkLeaf(t, leaf, web, authority.Certificate)
			checkVerifies(t, currentBundle(issuer), svid)
			if !leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool }).Equal(key.Public()) {
				t.Error("the certificate has another public key")
			}
			if min, max := before.Add(-time.Minute), after.Add(-time.Minute); leaf.NotBefore.Before(min.Truncate(time.Second)) || leaf.NotBefore.After(max) {
				t.Errorf("valid from %v, want one minute before the issuance at %v", leaf.NotBefore, before)
			}
			if life := leaf.NotAfter.Sub(leaf.NotBefore); life != time.Hour+time.Minute {
				t.Errorf("valid for %v, want 1h1m", life)
			}
			want := ca.SVID{ID: web, Certificates: [][]byte{leaf.Raw}, NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter, AuthorityID: authority.ID}
			if diff := cmp.Diff(want, svid, equalIDs); diff != "" {
				t.Errorf("the SVID is not what its certificate says (-certificate +SVID):\n%s", diff)
			}

			records, err := config.Ledger.Query(t.Context(), storage.Query{})
			if err != nil {
				t.Fatal(err)
			}
			wantRecord := []storage.Issuance{{
				Serial: fmt.Sprintf("%x", leaf.SerialNumber), ID: web, AuthorityID: authority.ID,
				NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter,
				Caller: request.Caller, Node: request.Node, PodUID: request.PodUID,
			}}
			if len(records) == 1 {
				if at := records[0].IssuedAt; at.Before(before.Truncate(time.Millisecond)) || at.After(after) {
					t.Errorf("recorded at %v, issued between %v and %v", at, before, after)
				}
				wantRecord[0].IssuedAt = records[0].IssuedAt
			}
			if diff := cmp.Diff(wantRecord, records, equalIDs); diff != "" {
				t.Errorf("the ledger differs from the certificate (-certificate +ledger):\n%s", diff)
			}
		})
	}
}

// checkLeaf holds a certificate against the rules for a leaf in X509-SVID, and
// against the narrower ones of our profile.
func checkLeaf(t testing.TB, c *x509.Certificate, id spiffeid.ID, authority *x509.Certificate) {
	t.Helper()
	if c.Version != 3 || c.SignatureAlgorithm != x509.ECDSAWithSHA256 {
		t.Errorf("version %d, signed with %v", c.Version, c.SignatureAlgorithm)
	}
	if c.SerialNumber.Sign() != 1 || c.SerialNumber.BitLen() < 120 || c.SerialNumber.BitLen() > 159 {
		t.Errorf("serial number %x has %d bits", c.SerialNumber, c.SerialNumber.BitLen())
	}
	if !bytes.Equal(c.RawSubject, []byte{0x30, 0}) || !bytes.Equal(c.RawIssuer, authority.RawSubject) {
		t.Errorf("subject %q, issuer %q; want none and %q", c.Subject, c.Issuer, authority.Subject)
	}
	sum := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	if !bytes.Equal(c.SubjectKeyId, sum[:20]) || !bytes.Equal(c.AuthorityKeyId, authority.SubjectKeyId) {
		t.Errorf("key identifiers %x and %x; want %x and %x", c.SubjectKeyId, c.AuthorityKeyId, sum[:20], authority.SubjectKeyId)
	}
	// X509-SVID §2, §3.1.
	if len(c.URIs) != 1 || c.URIs[0].String() != id.String() {
		t.Errorf("URIs %v, want %v alone", c.URIs, id)
	}
	if len(c.DNSNames)+len(c.EmailAddresses)+len(c.IPAddresses) != 0 {
		t.Errorf("names beside the URI: %q %q %v", c.DNSNames, c.EmailAddresses, c.IPAddresses)
	}
	// §4.1, §4.3, §4.4.
	if c.IsCA || !c.BasicConstraintsValid || c.KeyUsage != x509.KeyUsageDigitalSignature {
		t.Errorf("CA %t, key usage %b; want no CA and digitalSignature alone", c.IsCA, c.KeyUsage)
	}
	if want := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}; !slices.Equal(c.ExtKeyUsage, want) || len(c.UnknownExtKeyUsage) != 0 {
		t.Errorf("extended key usages %v and %v, want %v", c.ExtKeyUsage, c.UnknownExtKeyUsage, want)
	}
	extensions := make(map[string]bool)
	for _, e := range c.Extensions {
		extensions[e.Id.String()] = e.Critical
	}
	want := map[string]bool{
		"2.5.29.15": true, "2.5.29.19": true, "2.5.29.17": true, // key usage, basic constraints, SAN
		"2.5.29.14": false, "2.5.29.35": false, "2.5.29.37": false, // key identifiers, extended key usage
	}
	if diff := cmp.Diff(want, extensions); diff != "" {
		t.Errorf("extensions and whether they are critical (-want +got):\n%s", diff)
	}
	if c.NotBefore.Before(authority.NotBefore) || c.NotAfter.After(authority.NotAfter) {
		t.Errorf("valid from %v to %v, outside of the authority's %v to %v", c.NotBefore, c.NotAfter, authority.NotBefore, authority.NotAfter)
	}
}

// What a request says about itself is not taken, whatever it is.
func TestIssueIgnoresWhatTheRequestSays(t *testing.T) {
	issuer := open(t, newConfig(t))
	basicConstraints := pkix.Extension{Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}}
	keyUsage := pkix.Extension{Id: []int{2, 5, 29, 15}, Critical: true, Value: []byte{3, 2, 1, 6}} // certSign, crlSign
	csr := csrOf(t, &x509.CertificateRequest{
		Subject:         pkix.Name{CommonName: "evil", Organization: []string{"system:masters"}},
		DNSNames:        []string{"kubernetes.default.svc"},
		EmailAddresses:  []string{"root@example.test"},
		IPAddresses:     []net.IP{net.IPv4(10, 0, 0, 1)},
		URIs:            []*url.URL{{Scheme: "spiffe", Host: "example.test", Path: "/troth/server"}},
		ExtraExtensions: []pkix.Extension{basicConstraints, keyUsage},
	}, newKey(t, p256))

	svid := issue(t, issuer, ca.Request{ID: web, CSR: csr, Caller: "test"})
	leaf := parseLeaf(t, svid)
	checkLeaf(t, leaf, web, currentBundle(issuer).Authorities[0].Certificate)
	for _, text := range []string{"evil", "system:masters", "kubernetes", "root@", "troth/server"} {
		if bytes.Contains(leaf.Raw, []byte(text)) {
			t.Errorf("the certificate contains %q", text)
		}
	}
}

func TestIssueBatch(t *testing.T) {
	config := newConfig(t)
	issuer := open(t, config)
	good := requestFor(t)
	with := func(f func(*ca.Request)) ca.Request {
		r := good
		f(&r)
		return r
	}
	requests := []struct {
		request ca.Request
		want    string // the error
	}{
		{good, ""},
		{with(func(r *ca.Request) { r.ID = spiffeid.ID{} }), `ca: "" is no identity of trust domain "example.test"`},
		{with(func(r *ca.Request) { r.ID = spiffeid.RequireFromString("spiffe://other.test/web") }), `ca: "spiffe://other.test/web" is no identity of trust domain "example.test"`},
		{good, ""},
		{with(func(r *ca.Request) { r.ID = trustDomain.ID() }), `ca: "spiffe://example.test" is no identity of trust domain "example.test"`},
		{with(func(r *ca.Request) { r.CSR = nil }), "certificate request: CSR_MALFORMED: asn1: syntax error: sequence truncated"},
		{with(func(r *ca.Request) { r.Caller = "" }), "ca: storage: the issuance names no caller"},
		{with(func(r *ca.Request) { r.PodUID = "\xff" }), `ca: storage: "\xff" is longer than 2048 bytes, or is not UTF-8 without NUL`},
		{with(func(r *ca.Request) {
			r.ID = spiffeid.RequireFromString("spiffe://example.test/" + strings.Repeat("a", 2048-len("spiffe://example.test/")+1))
		}), `ca: storage: "spiffe://example.test/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" is longer than 2048 bytes, or is not UTF-8 without NUL`},
		{with(func(r *ca.Request) {
			r.ID = spiffeid.RequireFromString("spiffe://example.test/" + strings.Repeat("a", 2048-len("spiffe://example.test/")))
		}), ""},
	}
	var batch []ca.Request
	for _, r := range requests {
		batch = append(batch, r.request)
	}
	results, err := issuer.Issue(t.Context(), batch...)
	if err != nil || len(results) != len(batch) {
		t.Fatalf("Issue = %d results, %v; want %d", len(results), err, len(batch))
	}
	issued := 0
	for n, result := range results {
		if want := requests[n].want; want != "" {
			if result.Err == nil || result.Err.Error() != want {
				t.Errorf("result %d: error %v, want %q", n, result.Err, want)
			}
			if !reflect.ValueOf(result.SVID).IsZero() {
				t.Errorf("result %d has an error and an SVID", n)
			}
			continue
		}
		if result.Err != nil {
			t.Errorf("result %d: %v", n, result.Err)
			continue
		}
		issued++
		checkLeaf(t, parseLeaf(t, result.SVID), batch[n].ID, currentBundle(issuer).Authorities[0].Certificate)
		checkVerifies(t, currentBundle(issuer), result.SVID)
	}
	if records, err := config.Ledger.Query(t.Context(), storage.Query{}); err != nil || len(records) != issued {
		t.Errorf("the ledger has %d records (%v), want %d", len(records), err, issued)
	}
}

func TestIssueNothing(t *testing.T) {
	config := newConfig(t)
	config.Ledger = ledger{Ledger: config.Ledger, record: func([]storage.Issuance) error { return errors.New("called") }}
	results, err := open(t, config).Issue(t.Context())
	if len(results) != 0 || err != nil {
		t.Errorf("Issue() = %v, %v; want nothing, without the ledger", results, err)
	}
}

// ledger is a ledger whose Record is watched, and fails if record does.
type ledger struct {
	storage.Ledger
	record func([]storage.Issuance) error
}

func (l ledger) Record(ctx context.Context, issuances ...storage.Issuance) error {
	if err := l.record(issuances); err != nil {
		return err
	}
	return l.Ledger.Record(ctx, issuances...)
}

// Recorded before released, and before it even exists: the ledger sees the batch
// in one piece before the first signature.
func TestIssueRecordsBeforeItSigns(t *testing.T) {
	var events []string
	config := newConfig(t)
	config.Ledger = ledger{config.Ledger, func(i []storage.Issuance) error {
		events = append(events, fmt.Sprintf("record %d", len(i)))
		return nil
	}}
	config.Keys = signingKeys{config.Keys, func(key crypto.Signer, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
		events = append(events, "sign")
		return key.Sign(nil, digest, opts)
	}}
	issuer := open(t, config)
	if len(events) != 0 {
		t.Fatalf("Open: %q", events)
	}
	bad := ca.Request{ID: web, CSR: []byte("no"), Caller: "test"}
	if _, err := issuer.Issue(t.Context(), requestFor(t), bad, requestFor(t), requestFor(t)); err != nil {
		t.Fatal(err)
	}
	if want := []string{"record 3", "sign", "sign", "sign"}; !slices.Equal(events, want) {
		t.Errorf("events %q, want %q", events, want)
	}

	events = nil
	if _, err := issuer.Issue(t.Context(), bad, bad); err != nil || len(events) != 0 {
		t.Errorf("a batch without one good request: %v, events %q; want none", err, events)
	}
}

func TestIssueWithoutLedger(t *testing.T) {
	full := errors.New("disk full")
	signed, audit := 0, new(bytes.Buffer)
	config := newConfig(t)
	config.Audit = slog.New(slog.NewJSONHandler(audit, nil))
	config.Ledger = ledger{config.Ledger, func([]storage.Issuance) error { return full }}
	config.Keys = signingKeys{config.Keys, func(key crypto.Signer, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
		signed++
		return key.Sign(nil, digest, opts)
	}}
	issuer := open(t, config)
	audit.Reset()

	results, err := issuer.Issue(t.Context(), requestFor(t), requestFor(t))
	if !errors.Is(err, ca.ErrLedger) || !errors.Is(err, full) || results != nil {
		t.Errorf("Issue = %v, %v; want %v and %v alone", results, err, ca.ErrLedger, full)
	}
	if signed != 0 || audit.Len() != 0 {
		t.Errorf("%d signatures and audit %q; want none", signed, audit)
	}
}

func TestIssueContextEnds(t *testing.T) {
	issuer := open(t, newConfig(t))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	results, err := issuer.Issue(ctx, requestFor(t))
	if !errors.Is(err, ca.ErrLedger) || !errors.Is(err, context.Canceled) || results != nil {
		t.Errorf("Issue = %v, %v; want %v because of %v", results, err, ca.ErrLedger, context.Canceled)
	}
}

// A key that signs wrongly, by a fault or by design, releases nothing. The
// second of three signatures is wrong: the others are released.
func TestIssueVerifiesWhatItSigned(t *testing.T) {
	another := newKey(t, p256)
	for _, test := range []struct {
		name string
		sign func(key crypto.Signer, digest []byte, opts crypto.SignerOpts) ([]byte, error)
		want string
	}{
		{"a bit flipped", func(key crypto.Signer, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
			signature, err := key.Sign(nil, digest, opts)
			signature[len(signature)-1] ^= 1
			return signature, err
		}, "ca: verify what was signed: "},
		{"another key", func(_ crypto.Signer, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
			return another.Sign(nil, digest, opts)
		}, "ca: verify what was signed: "},
		{"another digest", func(key crypto.Signer, _ []byte, opts crypto.SignerOpts) ([]byte, error) {
			return key.Sign(nil, make([]byte, 32), opts)
		}, "ca: verify what was signed: "},
		{"no signature", func(crypto.Signer, []byte, crypto.SignerOpts) ([]byte, error) { return nil, nil }, "ca: verify what was signed: "},
		{"much too long", func(crypto.Signer, []byte, crypto.SignerOpts) ([]byte, error) { return make([]byte, 1<<16), nil }, "ca: verify what was signed: "},
		{"error", func(crypto.Signer, []byte, crypto.SignerOpts) ([]byte, error) {
			return nil, errors.New("token removed")
		}, "ca: sign: token removed"},
	} {
		t.Run(test.name, func(t *testing.T) {
			signed, audit := 0, new(bytes.Buffer)
			config := newConfig(t)
			config.Audit = slog.New(slog.NewJSONHandler(audit, nil))
			config.Keys = signingKeys{config.Keys, func(key crypto.Signer, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
				if signed++; signed == 2 {
					return test.sign(key, digest, opts)
				}
				return key.Sign(nil, digest, opts)
			}}
			issuer := open(t, config)
			audit.Reset()

			results, err := issuer.Issue(t.Context(), requestFor(t), requestFor(t), requestFor(t))
			if err != nil {
				t.Fatal(err)
			}
			if err := results[1].Err; err == nil || !strings.HasPrefix(err.Error(), test.want) {
				t.Errorf("error %v, want %q", err, test.want)
			}
			if !reflect.ValueOf(results[1].SVID).IsZero() {
				t.Error("a certificate left with the error")
			}
			for _, n := range []int{0, 2} {
				if results[n].Err != nil {
					t.Fatalf("result %d: %v", n, results[n].Err)
				}
				checkVerifies(t, currentBundle(issuer), results[n].SVID)
			}
			if lines := strings.Count(audit.String(), `"issued"`); lines != 2 {
				t.Errorf("%d lines of audit, want 2:\n%s", lines, audit)
			}
			if records, err := config.Ledger.Query(t.Context(), storage.Query{}); err != nil || len(records) != 3 {
				t.Errorf("the ledger has %d records (%v), want all 3: it may list what nobody got", len(records), err)
			}
		})
	}
}

func TestIssueAudit(t *testing.T) {
	audit := new(bytes.Buffer)
	config := newConfig(t)
	config.Audit = slog.New(slog.NewJSONHandler(audit, nil))
	issuer := open(t, config)

	var line map[string]any
	read := func() map[string]any {
		t.Helper()
		line = nil
		if err := json.Unmarshal(audit.Bytes(), &line); err != nil {
			t.Fatalf("audit %q: %v; want one line of JSON", audit, err)
		}
		audit.Reset()
		delete(line, "time")
		delete(line, "level")
		return line
	}
	a := currentBundle(issuer).Authorities[0]
	want := map[string]any{"msg": "authority created", "authority_id": a.ID, "state": "active",
		"not_after": a.Certificate.NotAfter.Format(time.RFC3339), "revision": 1.0}
	if diff := cmp.Diff(want, read()); diff != "" {
		t.Errorf("audit of Open (-want +got):\n%s", diff)
	}

	request := requestFor(t)
	request.Node, request.PodUID = "node-1", "uid-1"
	svid := issue(t, issuer, request)
	want = map[string]any{"msg": "issued", "spiffe_id": web.String(), "serial": fmt.Sprintf("%x", parseLeaf(t, svid).SerialNumber),
		"authority_id": a.ID, "not_after": svid.NotAfter.Format(time.RFC3339), "caller": request.Caller, "node": "node-1", "pod_uid": "uid-1"}
	if diff := cmp.Diff(want, read()); diff != "" {
		t.Errorf("audit of Issue (-want +got):\n%s", diff)
	}
}

func TestIssueSerials(t *testing.T) {
	issuer := open(t, newConfig(t))
	request := requestFor(t)
	requests := make([]ca.Request, 200)
	for n := range requests {
		requests[n] = request
	}
	results, err := issuer.Issue(t.Context(), requests...)
	if err != nil {
		t.Fatal(err)
	}
	serials := make([]byte, 20) // the bits that were ever set
	seen := make(map[string]bool)
	for n, result := range results {
		if result.Err != nil {
			t.Fatalf("result %d: %v", n, result.Err)
		}
		serial := parseLeaf(t, result.SVID).SerialNumber
		if serial.Sign() != 1 || serial.BitLen() != 159 {
			t.Fatalf("serial %x has %d bits", serial, serial.BitLen())
		}
		if seen[serial.String()] {
			t.Fatalf("serial %x twice", serial)
		}
		seen[serial.String()] = true
		for n, b := range serial.FillBytes(make([]byte, 20)) {
			serials[n] |= b
		}
	}
	// The first four octets are the time. With 200 serials, the chance that a
	// random bit of the others is never set is 2^-200.
	if want := strings.Repeat("ff", 16); hex.EncodeToString(serials[4:]) != want {
		t.Errorf("bits ever set %x, want %s in all after the time", serials, want)
	}
}

func TestIssueNeedsLifeLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := newConfig(t)
		config.AuthorityLife = 3 * time.Hour
		issuer := open(t, config)
		request := requestFor(t)

		time.Sleep(2 * time.Hour) // an SVID ends with the authority, to the second
		svid := issue(t, issuer, request)
		if end := currentBundle(issuer).Authorities[0].Certificate.NotAfter; !svid.NotAfter.Equal(end) {
			t.Errorf("the last SVID ends at %v, want %v", svid.NotAfter, end)
		}
		if err := issuer.Ready(); err != nil {
			t.Errorf("Ready() = %v", err)
		}

		time.Sleep(time.Nanosecond)
		for _, again := range []time.Duration{0, 30 * time.Minute, 24 * time.Hour} {
			time.Sleep(again)
			results, err := issuer.Issue(t.Context(), request)
			if !errors.Is(err, ca.ErrAuthorityExpiring) || results != nil {
				t.Errorf("Issue = %v, %v; want %v", results, err, ca.ErrAuthorityExpiring)
			}
			if err := issuer.Ready(); !errors.Is(err, ca.ErrAuthorityExpiring) {
				t.Errorf("Ready() = %v, want %v", err, ca.ErrAuthorityExpiring)
			}
		}
		if _, err := ca.Open(t.Context(), config); err != nil {
			t.Errorf("Open with an expired authority = %v; want it to serve the bundle", err)
		}
	})
}

// An SVID begins with its authority at the earliest: a chain is valid only where
// all of it is.
func TestIssueBackdate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := newConfig(t)
		config.Profile = newProfile(t, ca.ProfileConfig{Life: 24 * time.Hour, Backdate: time.Hour})
		issuer := open(t, config)
		authority := currentBundle(issuer).Authorities[0].Certificate
		if svid := issue(t, issuer, requestFor(t)); !svid.NotBefore.Equal(authority.NotBefore) {
			t.Errorf("valid from %v, want the authority's %v", svid.NotBefore, authority.NotBefore)
		}
		time.Sleep(2 * time.Hour)
		svid := issue(t, issuer, requestFor(t))
		if want := time.Now().Add(-time.Hour); !svid.NotBefore.Equal(want) {
			t.Errorf("valid from %v, want %v", svid.NotBefore, want)
		}
		if want := time.Now().Add(24 * time.Hour); !svid.NotAfter.Equal(want) {
			t.Errorf("valid until %v, want %v", svid.NotAfter, want)
		}
		checkVerifies(t, currentBundle(issuer), svid)
	})
}

// A request may ask for less of a life than the profile gives, and for no more.
func TestIssueForLess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		issuer := open(t, newConfig(t))
		for life, want := range map[time.Duration]time.Duration{
			0: time.Hour, 2 * time.Second: 2 * time.Second, 90 * time.Second: 90 * time.Second, time.Hour: time.Hour,
		} {
			request := requestFor(t)
			request.Life = life
			if got := time.Until(parseLeaf(t, issue(t, issuer, request)).NotAfter); got != want {
				t.Errorf("Life %v: valid for another %v, want %v", life, got, want)
			}
		}
		for _, life := range []time.Duration{-1, time.Second, time.Hour + 1, 24 * time.Hour} {
			request := requestFor(t)
			request.Life = life
			results, err := issuer.Issue(t.Context(), request)
			if err != nil || results[0].Err == nil {
				t.Errorf("Life %v: %v, %v; want a refusal of this request", life, results, err)
			}
		}
	})
}

// RFC 5280 §4.1.2.5: UTCTime through 2049, GeneralizedTime from 2050 on.
func TestIssueAfter2050(t *testing.T) {
	const utc, generalized = 0x17, 0x18
	for _, test := range []struct {
		name            string
		at              time.Time
		before, after   byte
		beforeS, afterS string
	}{
		{"before", time.Date(2049, 12, 31, 12, 0, 0, 0, time.UTC), utc, utc, "491231115900Z", "491231130000Z"},
		{"across", time.Date(2049, 12, 31, 23, 30, 0, 0, time.UTC), utc, generalized, "491231232900Z", "20500101003000Z"},
		{"after", time.Date(2050, 1, 1, 0, 1, 0, 0, time.UTC), generalized, generalized, "20500101000000Z", "20500101010100Z"},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				time.Sleep(time.Until(test.at))
				issuer := open(t, newConfig(t))
				svid := issue(t, issuer, requestFor(t))
				checkVerifies(t, currentBundle(issuer), svid)
				validity := append([]byte{test.before, byte(len(test.beforeS))}, test.beforeS...)
				validity = append(append(validity, test.after, byte(len(test.afterS))), test.afterS...)
				if !bytes.Contains(svid.Certificates[0], validity) {
					t.Errorf("no validity %q in the certificate, which is valid from %v to %v", validity, svid.NotBefore, svid.NotAfter)
				}
			})
		})
	}
}

// Issuing goes on while other replicas rotate, and all of it verifies.
func TestIssueDuringRotation(t *testing.T) {
	const rotations, workers = 5, 4
	config := newConfig(t)
	issuer := open(t, config)
	ctx, cancel := context.WithCancel(t.Context())
	var running, issuing sync.WaitGroup
	running.Go(func() {
		if err := issuer.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	issued := make(chan ca.SVID)
	for range workers {
		request := requestFor(t)
		issuing.Go(func() {
			for {
				results, err := issuer.Issue(t.Context(), request)
				if err != nil || results[0].Err != nil {
					t.Errorf("Issue: %v, %v", err, results)
					cancel()
					return
				}
				select {
				case issued <- results[0].SVID:
				case <-ctx.Done():
					return
				}
			}
		})
	}
	var svids []ca.SVID
	for range rotations {
		next := anotherAuthority(t, config, "active")
		replace(t, config.Authorities, rotated(stored(t, config.Authorities), next).encode(t))
		for n := 0; n < workers && ctx.Err() == nil; {
			select {
			case svid := <-issued:
				svids = append(svids, svid)
				if svid.AuthorityID == next.ID {
					n++
				}
			case <-ctx.Done():
			}
		}
	}
	cancel()
	issuing.Wait()
	running.Wait()

	bundle := currentBundle(issuer)
	if len(bundle.Authorities) != rotations+1 {
		t.Errorf("the bundle has %d authorities, want %d", len(bundle.Authorities), rotations+1)
	}
	for _, svid := range svids {
		checkVerifies(t, bundle, svid)
	}
}
