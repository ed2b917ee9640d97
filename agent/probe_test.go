package agent

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"log/slog"
	"math/big"
	"net/url"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/ca"
	"troth.dev/troth/storage"
)

func sentProbe(p ca.Probe) *trothv1.Probe {
	return &trothv1.Probe{
		Revision: p.Revision, AuthorityId: p.Authority,
		Trusted: p.Trusted, Untrusted: p.Untrusted,
	}
}

// prepared is an issuer with a prepared authority, and what the control plane sends
// of it.
func prepared(t *testing.T) (*ca.Issuer, *trust, *trothv1.Probe) {
	t.Helper()
	issuer := newIssuer(t)
	if _, err := issuer.Prepare(t.Context(), order); err != nil {
		t.Fatal(err)
	}
	made, err := issuer.Probe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	bundle, _ := issuer.Bundle().Load()
	return issuer, trustOf(t, bundle), sentProbe(made)
}

// What is a proof, and what is none.
func TestTry(t *testing.T) {
	const (
		proof   = trothv1.ProbeFailure_PROBE_FAILURE_UNSPECIFIED
		refused = trothv1.ProbeFailure_PROBE_FAILURE_TRUSTED_REFUSED
		taken   = trothv1.ProbeFailure_PROBE_FAILURE_UNTRUSTED_ACCEPTED
	)
	synctest.Test(t, func(t *testing.T) {
		issuer, to, good := prepared(t)
		other := newIssuer(t)
		web := spiffeid.RequireFromPath(td, "/ns/shop/sa/web")
		active := issue(t, issuer, web).Certificates[0].Raw
		foreign := issue(t, other, web).Certificates[0].Raw
		elsewhere := foreignLeaf(t)
		untrusting, _ := newIssuer(t).Bundle().Load()
		root := to.bundle.X509Authorities()[0].Raw

		for name, test := range map[string]struct {
			change func(*trothv1.Probe)
			trust  *trust
			after  time.Duration
			want   trothv1.ProbeFailure
		}{
			"good":                               {want: proof},
			"good, untrusted by another":         {change: func(p *trothv1.Probe) { p.Untrusted[0] = foreign }, want: proof},
			"the bundle lacks the authority":     {trust: trustOf(t, untrusting), want: refused},
			"expired":                            {after: 2 * time.Hour, want: refused},
			"not yet valid":                      {after: -24 * time.Hour, want: refused},
			"trusted: none":                      {change: func(p *trothv1.Probe) { p.Trusted = nil }, want: refused},
			"trusted: garbage":                   {change: func(p *trothv1.Probe) { p.Trusted[0] = []byte("x") }, want: refused},
			"trusted: by the active authority":   {change: func(p *trothv1.Probe) { p.Trusted[0] = active }, want: refused},
			"trusted: by somebody else":          {change: func(p *trothv1.Probe) { p.Trusted[0] = foreign }, want: refused},
			"trusted: the untrusted one":         {change: func(p *trothv1.Probe) { p.Trusted = p.GetUntrusted() }, want: refused},
			"trusted: of another trust domain":   {change: func(p *trothv1.Probe) { p.Trusted[0] = elsewhere }, want: refused},
			"trusted: an authority":              {change: func(p *trothv1.Probe) { p.Trusted[0] = root }, want: refused},
			"trusted: larger than an SVID":       {change: func(p *trothv1.Probe) { p.Trusted = append(p.Trusted, make([]byte, maxCertificate+1)) }, want: refused},
			"trusted: a chain longer than any":   {change: func(p *trothv1.Probe) { p.Trusted = repeat(p.GetTrusted()[0], maxChain+1) }, want: refused},
			"another authority's id":             {change: func(p *trothv1.Probe) { p.AuthorityId = "00" }, want: refused},
			"untrusted: none":                    {change: func(p *trothv1.Probe) { p.Untrusted = nil }, want: taken},
			"untrusted: garbage":                 {change: func(p *trothv1.Probe) { p.Untrusted[0] = []byte("x") }, want: taken},
			"untrusted: garbage behind it":       {change: func(p *trothv1.Probe) { p.Untrusted = append(p.Untrusted, []byte("x")) }, want: taken},
			"untrusted: the trusted one":         {change: func(p *trothv1.Probe) { p.Untrusted = p.GetTrusted() }, want: taken},
			"untrusted: by the active authority": {change: func(p *trothv1.Probe) { p.Untrusted[0] = active }, want: taken},
			"untrusted: of another trust domain": {change: func(p *trothv1.Probe) { p.Untrusted[0] = elsewhere }, want: taken},
			"untrusted: an authority":            {change: func(p *trothv1.Probe) { p.Untrusted[0] = root }, want: taken},
			"untrusted: larger than an SVID":     {change: func(p *trothv1.Probe) { p.Untrusted[0] = make([]byte, maxCertificate+1) }, want: taken},
			"untrusted: a chain longer than any": {change: func(p *trothv1.Probe) { p.Untrusted = repeat(p.GetUntrusted()[0], maxChain+1) }, want: taken},
		} {
			in := proto.CloneOf(good)
			if test.change != nil {
				test.change(in)
			}
			by := to
			if test.trust != nil {
				by = test.trust
			}
			got := newProbe(in).try(by, time.Now().Add(test.after))
			if got.failure != test.want || got.proves() != (test.want == proof) {
				t.Errorf("%s: %v (%v), want %v", name, got.failure, got.err, test.want)
			}
		}

		// Both leaves end together. One of a probe that ended before the other proves
		// nothing by being refused.
		time.Sleep(30 * time.Minute)
		later, err := issuer.Probe(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		mixed := sentProbe(later)
		mixed.Untrusted = good.GetUntrusted()
		time.Sleep(45 * time.Minute)
		if got := newProbe(mixed).try(to, time.Now()); got.failure != taken {
			t.Errorf("an untrusted leaf that has expired: %v (%v), want %v", got.failure, got.err, taken)
		}
		// What is no SVID would be refused by who trusts everybody.
		unfit := sentProbe(later)
		unfit.Untrusted = [][]byte{unfitLeaf(t)}
		if got := newProbe(unfit).try(to, time.Now()); got.failure != taken {
			t.Errorf("an untrusted leaf that is no SVID: %v (%v), want %v", got.failure, got.err, taken)
		}
		if newProbe(&trothv1.Probe{Revision: 9}) != nil {
			t.Error("a probe without leaves is something to prove")
		}
	})
}

func repeat(der []byte, times int) [][]byte {
	chain := make([][]byte, times)
	for n := range chain {
		chain[n] = der
	}
	return chain
}

// foreignLeaf is an SVID of another trust domain.
func foreignLeaf(t *testing.T) []byte {
	t.Helper()
	other := spiffeid.RequireTrustDomainFromString("example.com")
	keys, err := ca.NewSealedKeys(bytes.Repeat([]byte{2}, ca.KeySize))
	if err != nil {
		t.Fatal(err)
	}
	store := storage.NewMemory()
	issuer, err := ca.Open(t.Context(), ca.Config{
		TrustDomain: other, Keys: keys, Authorities: store, Ledger: store, Audit: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	return issue(t, issuer, spiffeid.RequireFromPath(other, "/ns/shop/sa/web")).Certificates[0].Raw
}

// unfitLeaf is a self-signed leaf whose key may sign nothing.
func unfitLeaf(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		URIs: []*url.URL{spiffeid.RequireFromPath(td, "/troth/probe").URL()},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// When the agent says that it has proved something: of the newest probe alone, at the
// revision that is applied, and never of one before.
func TestProve(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		issuer, first, in := prepared(t)
		i := newIdentities(td)
		want := func(when string, applied uint64, proved, news bool, failure trothv1.ProbeFailure) {
			t.Helper()
			got, isNews := i.prove(applied, time.Now())
			if got.proves() != proved || isNews != news || got.failure != failure {
				t.Errorf("%s: proved %t, news %t, failure %v (%v); want %t, %t, %v",
					when, got.proves(), isNews, got.failure, got.err, proved, news, failure)
			}
		}
		const none, refused = trothv1.ProbeFailure_PROBE_FAILURE_UNSPECIFIED, trothv1.ProbeFailure_PROBE_FAILURE_TRUSTED_REFUSED
		want("before anything came", 0, false, false, none)
		if err := i.setTrust(first); err != nil {
			t.Fatal(err)
		}
		want("without a probe", 2, false, false, none)
		future := proto.CloneOf(in)
		future.Revision = 3
		i.setProbe(newProbe(future))
		want("a probe of a revision to come", 2, false, false, none)
		i.setProbe(newProbe(in))
		want("at the revision before", 1, false, false, none)
		if got, _ := i.prove(2, time.Now().Add(-24*time.Hour)); got.failure != refused {
			t.Errorf("by a clock that is wrong: %v (%v), want %v", got.failure, got.err, refused)
		}
		want("when the clock is right", 2, true, true, none)
		want("again", 2, true, false, none)

		time.Sleep(2 * time.Hour)
		want("after the leaf has expired", 2, true, false, none)
		newer := *first
		newer.revision++
		if err := i.setTrust(&newer); err != nil {
			t.Fatal(err)
		}
		want("while a stream has the one before", 2, true, false, none)
		want("at the next revision, by a leaf that has expired", 3, false, true, refused)
		want("again", 3, false, false, refused)
		want("what was proved before that is no longer", 2, false, false, none)
		// The issuer's document is of revision 2: what it makes now, the bundle has.
		fresh, err := issuer.Probe(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		i.setProbe(newProbe(sentProbe(fresh)))
		want("with a new probe", 3, true, true, none)
		i.setProbe(nil)
		want("when there is nothing to prove", 3, false, false, none)
	})
}

// Whatever bytes come for a probe and a bundle, there is no proof but by the leaves
// that were made for it.
func FuzzProbe(f *testing.F) {
	keys, err := ca.NewSealedKeys(bytes.Repeat([]byte{1}, ca.KeySize))
	if err != nil {
		f.Fatal(err)
	}
	store := storage.NewMemory()
	issuer, err := ca.Open(f.Context(), ca.Config{
		TrustDomain: td, Keys: keys, Authorities: store, Ledger: store, Audit: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		f.Fatal(err)
	}
	if _, err := issuer.Prepare(f.Context(), order); err != nil {
		f.Fatal(err)
	}
	made, err := issuer.Probe(f.Context())
	if err != nil {
		f.Fatal(err)
	}
	bundle, _ := issuer.Bundle().Load()
	good, err := parseTrust(td, sent(bundle), time.Now())
	if err != nil {
		f.Fatal(err)
	}
	for _, m := range []*trothv1.WatchResponse{
		{Part: &trothv1.WatchResponse_Probe{Probe: sentProbe(made)}},
		{Part: &trothv1.WatchResponse_Probe{Probe: &trothv1.Probe{Revision: 3}}},
		{Part: &trothv1.WatchResponse_Bundles{Bundles: &trothv1.Bundles{Bundles: []*trothv1.Bundle{sent(bundle)}}}},
	} {
		raw, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		m := &trothv1.WatchResponse{}
		if proto.Unmarshal(raw, m) != nil {
			return
		}
		for _, b := range m.GetBundles().GetBundles() {
			parsed, err := parseTrust(td, b, time.Now())
			if err == nil && len(parsed.bundle.X509Authorities()) == 0 {
				t.Error("a bundle without authorities is taken")
			}
		}
		p := newProbe(m.GetProbe())
		if p == nil {
			return
		}
		o := p.try(good, time.Now())
		if o.proves() && (p.authority != made.Authority || !bytes.Equal(p.trusted[0], made.Trusted[0])) {
			t.Errorf("the bytes prove authority %q", p.authority)
		}
	})
}
