package ca_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"troth.dev/troth/ca"
	"troth.dev/troth/storage"
)

func newKEK() []byte {
	kek := make([]byte, ca.KeySize)
	rand.Read(kek)
	return kek
}

func keysUnder(t testing.TB, current []byte, previous ...[]byte) *ca.SealedKeys {
	t.Helper()
	keys, err := ca.NewSealedKeys(current, previous...)
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

// under returns the ID of a key-encryption key, written down a second time.
func under(kek []byte) string {
	mac := hmac.New(sha256.New, kek)
	mac.Write([]byte("troth key-encryption key"))
	return hex.EncodeToString(mac.Sum(nil)[:8])
}

// sealUnnamed returns a handle of format 1, written down a second time.
func sealUnnamed(t testing.TB, keys ca.Keys, kek []byte, a authority) []byte {
	t.Helper()
	key, err := keys.Open(t.Context(), a.ID, a.Key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	block, err := aes.NewCipher(kek)
	if err != nil {
		t.Fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	nonce := make([]byte, aead.NonceSize())
	rand.Read(nonce)
	return aead.Seal(append([]byte{1}, nonce...), nonce, der, []byte(a.ID))
}

// checkSealed fails unless every key in the document is under the key-encryption
// key, and opens with it alone.
func checkSealed(t *testing.T, d document, kek []byte) {
	t.Helper()
	keys := keysUnder(t, kek)
	for _, a := range d.Authorities {
		if a.State == "revoked" {
			continue
		}
		if len(a.Key) < 9 || a.Key[0] != 2 || hex.EncodeToString(a.Key[1:9]) != under(kek) {
			t.Errorf("the key of the authority that is %s begins with %.9x, want 02%s", a.State, a.Key, under(kek))
		}
		if _, err := keys.Open(t.Context(), a.ID, a.Key); err != nil {
			t.Error(err)
		}
	}
}

// mixed stores a set with an authority in each state, and returns it: the active
// one is sealed in format 1 under the first key, the others under both.
func mixed(t *testing.T, config *ca.Config, first, second []byte) document {
	t.Helper()
	one, two := *config, *config
	one.Keys, two.Keys = keysUnder(t, first), keysUnder(t, second)
	config.Keys = one.Keys
	open(t, *config)
	d := stored(t, config.Authorities)
	d.Authorities[0].Key = sealUnnamed(t, one.Keys, first, d.Authorities[0])
	revoked := anotherAuthority(t, one, "revoked")
	revoked.Key = nil
	d.Authorities = append(d.Authorities, anotherAuthority(t, one, "prepared"), anotherAuthority(t, two, "old"),
		anotherAuthority(t, one, "tainted"), revoked)
	replace(t, config.Authorities, d.encode(t))
	return d
}

func TestReseal(t *testing.T) {
	first, second := newKEK(), newKEK()
	config := newConfig(t)
	log := new(bytes.Buffer)
	config.Audit = slog.New(slog.NewJSONHandler(log, nil))
	before := mixed(t, &config, first, second)
	config.Keys = keysUnder(t, second, first)
	issuer := open(t, config)
	svid := issue(t, issuer, requestFor(t))
	was := currentBundle(issuer)

	log.Reset()
	if n, err := issuer.Reseal(t.Context()); n != 3 || err != nil {
		t.Fatalf("Reseal = %d, %v; want 3", n, err)
	}
	after := stored(t, config.Authorities)
	checkSealed(t, after, second)
	if after.Revision != before.Revision+1 {
		t.Errorf("revision %d, want %d", after.Revision, before.Revision+1)
	}
	for n, a := range after.Authorities {
		want := before.Authorities[n]
		if a.ID != want.ID || a.State != want.State || !bytes.Equal(a.Certificate, want.Certificate) || (a.Key == nil) != (want.Key == nil) {
			t.Errorf("authority %s, %s became %s, %s", want.ID, want.State, a.ID, a.State)
		}
	}
	if a, _ := currentSet(issuer).Active(); a.Changed != (ca.Change{}) {
		t.Errorf("the active authority changed by %+v; it did not", a.Changed)
	}
	if !bytes.Equal(before.Authorities[2].Key, after.Authorities[2].Key) {
		t.Error("what was sealed under the current key is sealed anew")
	}
	bundle := currentBundle(issuer)
	if len(bundle.Authorities) != len(was.Authorities) || bundle.Revision != after.Revision {
		t.Errorf("the bundle has %d authorities at revision %d; want %d at %d", len(bundle.Authorities), bundle.Revision, len(was.Authorities), after.Revision)
	}
	checkVerifies(t, bundle, svid)
	checkVerifies(t, was, issue(t, issuer, requestFor(t)))
	if lines := strings.Count(log.String(), `"operation":"reseal"`); lines != 1 || !strings.Contains(log.String(), `"actor":"server"`) ||
		!strings.Contains(log.String(), "sealed anew: "+before.Authorities[0].ID+", "+before.Authorities[1].ID) {
		t.Errorf("the audit log says %s; want one line that names the authorities", log)
	}

	// Once more changes nothing.
	doc, err := config.Authorities.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if n, err := issuer.Reseal(t.Context()); n != 0 || err != nil {
		t.Errorf("the second Reseal = %d, %v; want 0", n, err)
	}
	if again, err := config.Authorities.Load(t.Context()); err != nil || again.Version != doc.Version {
		t.Errorf("the second Reseal stored version %q after %q (%v)", again.Version, doc.Version, err)
	}

	// The first key can go.
	config.Keys = keysUnder(t, second)
	checkVerifies(t, bundle, issue(t, open(t, config), requestFor(t)))
}

// Nothing is stored for keys that are as they should be, or are not sealed.
func TestResealLeaves(t *testing.T) {
	kek := newKEK()
	for _, test := range []struct {
		name string
		keys ca.Keys
	}{
		{"format 1 under the current key", keysUnder(t, kek)},
		{"keys that cannot be sealed", struct{ ca.Keys }{keysUnder(t, newKEK(), kek)}},
	} {
		t.Run(test.name, func(t *testing.T) {
			config := newConfig(t)
			config.Keys = keysUnder(t, kek)
			open(t, config)
			d := stored(t, config.Authorities)
			d.Authorities[0].Key = sealUnnamed(t, config.Keys, kek, d.Authorities[0])
			replace(t, config.Authorities, d.encode(t))
			config.Keys = test.keys
			issuer := open(t, config)
			if n, err := issuer.Reseal(t.Context()); n != 0 || err != nil {
				t.Errorf("Reseal = %d, %v; want 0", n, err)
			}
			if now := stored(t, config.Authorities); now.Revision != d.Revision || !bytes.Equal(now.Authorities[0].Key, d.Authorities[0].Key) {
				t.Errorf("the document changed to revision %d", now.Revision)
			}
		})
	}
}

// What signs no more is no reason to refuse; what signs is.
func TestResealOfKeysThatDoNotOpen(t *testing.T) {
	first, second, lost := newKEK(), newKEK(), newKEK()
	config := newConfig(t)
	log := new(bytes.Buffer)
	config.Audit = slog.New(slog.NewJSONHandler(log, nil))
	d := mixed(t, &config, first, second)
	foreign := config
	foreign.Keys = keysUnder(t, lost)
	d.Authorities = append(d.Authorities, anotherAuthority(t, foreign, "old"))
	d.Revision++
	replace(t, config.Authorities, d.encode(t))

	config.Keys = keysUnder(t, second, first)
	issuer := open(t, config)
	if n, err := issuer.Reseal(t.Context()); n != 3 || err != nil {
		t.Fatalf("Reseal = %d, %v; want 3", n, err)
	}
	left := d.Authorities[len(d.Authorities)-1]
	if now := stored(t, config.Authorities); !bytes.Equal(now.Authorities[len(d.Authorities)-1].Key, left.Key) {
		t.Error("the handle that does not open was changed")
	}
	if !strings.Contains(log.String(), "signs no more does not open") || !strings.Contains(log.String(), left.ID) {
		t.Errorf("the log does not name what was left: %s", log)
	}

	now := stored(t, config.Authorities)
	now.Authorities = append(now.Authorities, anotherAuthority(t, foreign, "prepared"))
	now.Revision++
	replace(t, config.Authorities, now.encode(t))
	want := "ca: seal the key of authority " + now.Authorities[len(now.Authorities)-1].ID + ", which is prepared, anew: ca: the sealed key does not open: it is under key-encryption key " + under(lost)
	if _, err := issuer.Reseal(t.Context()); err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("Reseal = %v, want %s", err, want)
	}
}

func TestResealFromManyReplicas(t *testing.T) {
	const replicas = 16
	first, second := newKEK(), newKEK()
	config := newConfig(t)
	d := mixed(t, &config, first, second)
	config.Keys = keysUnder(t, second, first)
	issuers := make([]*ca.Issuer, replicas)
	for n := range issuers {
		issuers[n] = open(t, config)
	}
	var mu sync.Mutex
	total := 0
	start := make(chan struct{})
	var all sync.WaitGroup
	for _, issuer := range issuers {
		all.Go(func() {
			<-start
			n, err := issuer.Reseal(t.Context())
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			total += n
		})
	}
	close(start)
	all.Wait()
	now := stored(t, config.Authorities)
	checkSealed(t, now, second)
	if total != 3 || now.Revision != d.Revision+1 {
		t.Errorf("%d keys were sealed anew, up to revision %d; want 3, in one step", total, now.Revision)
	}
	for _, issuer := range issuers {
		checkVerifies(t, currentBundle(issuers[0]), issue(t, issuer, requestFor(t)))
	}
}

// The store fails, or the process dies, before and after each call.
func TestResealWithFaultAtEveryPoint(t *testing.T) {
	for _, dies := range []bool{false, true} {
		points := 0
		for at := 1; ; at++ {
			first, second := newKEK(), newKEK()
			config := newConfig(t)
			before := mixed(t, &config, first, second)
			sound := config.Authorities.(store)
			config.Keys = keysUnder(t, second, first)
			broken := config
			f := &faulty{store: sound, dies: dies}
			broken.Authorities, broken.Ledger = f, f
			issuer := open(t, broken)
			f.count, f.at = 0, at
			_, err := issuer.Reseal(t.Context())
			if f.hit == "" {
				break
			}
			points++
			switch now := stored(t, sound); {
			case f.hit == "after Swap":
				checkSealed(t, now, second)
				if dies == (err == nil) {
					t.Errorf("%s, dies %t: Reseal = %v", f.hit, dies, err)
				}
			case now.Revision != before.Revision || !bytes.Equal(now.Authorities[0].Key, before.Authorities[0].Key):
				t.Errorf("%s: revision %d is stored, want %d as it was", f.hit, now.Revision, before.Revision)
			case !errors.Is(err, errFault):
				t.Errorf("%s: Reseal = %v, want %v", f.hit, err, errFault)
			}
			if dies {
				issuer = open(t, config)
			}
			if _, err := issuer.Reseal(t.Context()); err != nil {
				t.Errorf("%s: the next Reseal = %v", f.hit, err)
			}
			now := stored(t, sound)
			checkSealed(t, now, second)
			if now.Revision != before.Revision+1 {
				t.Errorf("%s: revision %d, want %d", f.hit, now.Revision, before.Revision+1)
			}
			checkVerifies(t, currentBundle(issuer), issue(t, issuer, requestFor(t)))
		}
		if points != 4 {
			t.Errorf("dies %t: failed at %d points, want before and after Load and Swap", dies, points)
		}
	}
}

// The order in which replicas learn of a key: all know it, one makes it current,
// all do, the old one goes. Each signs at every moment.
func TestResealInRollingOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second := newKEK(), newKEK()
		config := newConfig(t)
		start := func(current []byte, previous ...[]byte) (*ca.Issuer, func()) {
			t.Helper()
			c := config
			c.Keys = keysUnder(t, current, previous...)
			issuer := open(t, c)
			if _, err := issuer.Reseal(t.Context()); err != nil {
				t.Fatal(err)
			}
			return issuer, run(t, issuer)
		}
		check := func(issuers ...*ca.Issuer) {
			t.Helper()
			synctest.Wait()
			for _, issuer := range issuers {
				checkVerifies(t, currentBundle(issuers[0]), issue(t, issuer, requestFor(t)))
			}
		}
		a, stopA := start(first)
		b, stopB := start(first)
		check(a, b)
		for _, keys := range [][][]byte{{first, second}, {second, first}, {second}} {
			stopA()
			a, stopA = start(keys[0], keys[1:]...)
			check(a, b)
			stopB()
			b, stopB = start(keys[0], keys[1:]...)
			check(a, b)
		}
		checkSealed(t, stored(t, config.Authorities), second)
		stopA()
		stopB()
	})
}

// A replica that does not know the key-encryption key of another one signs on with
// the keys that it holds, through an activation too, says so, and does not start.
func TestOpenedKeysOutliveTheirHandles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second := newKEK(), newKEK()
		config := newConfig(t)
		config.Keys = keysUnder(t, first)
		log := new(bytes.Buffer)
		old := config
		old.Audit = slog.New(slog.NewJSONHandler(log, nil))
		behind := open(t, old)
		stop := run(t, behind)
		defer stop()
		next, err := behind.Prepare(t.Context(), operator)
		if err != nil {
			t.Fatal(err)
		}

		config.Keys = keysUnder(t, second, first)
		ahead := open(t, config)
		if n, err := ahead.Reseal(t.Context()); n != 2 || err != nil {
			t.Fatalf("Reseal = %d, %v; want 2", n, err)
		}
		synctest.Wait()
		if lines := strings.Count(log.String(), "this replica signs with it as long as it runs"); lines != 2 {
			t.Errorf("the log says so %d times, want 2: %s", lines, log)
		}
		checkVerifies(t, currentBundle(ahead), issue(t, behind, requestFor(t)))
		if _, err := ahead.Activate(t.Context(), next.ID, by(proved(currentSet(ahead), 2))); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		svid := issue(t, behind, requestFor(t))
		if checkVerifies(t, currentBundle(ahead), svid); svid.AuthorityID != next.ID {
			t.Errorf("signed by %s, want %s, which is active now", svid.AuthorityID, next.ID)
		}

		// What is prepared under a key that it never knew it cannot sign with: it says
		// so while there is time, and serves.
		log.Reset()
		if _, err := ahead.Prepare(t.Context(), operator); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if !strings.Contains(log.String(), "this replica cannot sign once it is active") {
			t.Errorf("the log does not say that a prepared key does not open: %s", log)
		}
		checkVerifies(t, currentBundle(ahead), issue(t, behind, requestFor(t)))

		if _, err := ca.Open(t.Context(), old); err == nil || !strings.Contains(err.Error(), next.ID+", which is active: ca: the sealed key does not open: it is under key-encryption key "+under(second)+", and known is "+under(first)) {
			t.Errorf("Open = %v, want an error that names the authority and the keys", err)
		}
	})
}

// Every key that signs or may come to is checked before the server starts.
func TestOpenRefusesKeysThatDoNotBelong(t *testing.T) {
	kek := newKEK()
	base := newConfig(t)
	base.Keys = keysUnder(t, kek)
	open(t, base)
	good := stored(t, base.Authorities)
	good.Authorities = append(good.Authorities, anotherAuthority(t, base, "prepared"))
	wrong := base
	wrong.Keys = keysUnder(t, newKEK())
	foreign := anotherAuthority(t, wrong, "prepared")

	for n, state := range []string{"active", "prepared"} {
		for _, test := range []struct {
			name   string
			change func(as []authority)
			want   string
		}{
			{"good", func([]authority) {}, ""},
			{"handle of the other", func(as []authority) { as[n].Key = as[1-n].Key },
				"ca: the sealed key does not open under key-encryption key " + under(kek) + ", which it names: it is damaged or another authority's; restore the store from a backup"},
			{"damaged", func(as []authority) {
				as[n].Key = bytes.Clone(as[n].Key)
				as[n].Key[20] ^= 1
			},
				"ca: the sealed key does not open under key-encryption key " + under(kek) + ", which it names: it is damaged or another authority's; restore the store from a backup"},
			{"damaged, format 1", func(as []authority) {
				as[n].Key = sealUnnamed(t, base.Keys, kek, as[n])
				as[n].Key[20] ^= 1
			},
				"ca: the sealed key does not open: is the key-encryption key that it was sealed under among those given? If so, it is damaged or another authority's: restore the store from a backup"},
			{"cut off", func(as []authority) { as[n].Key = as[n].Key[:8] },
				"ca: the sealed key does not open: it is cut off; restore the store from a backup"},
			{"sealed under another key", func(as []authority) { as[n].Key = foreign.Key },
				"ca: the sealed key does not open: it is under key-encryption key " + hex.EncodeToString(foreign.Key[1:9]) + ", and known is " + under(kek) + "; give that one too, as a previous one"},
			{"made by other means", func(as []authority) { as[n].Key = []byte("pkcs11:id=%01") },
				"ca: the sealed key has an unknown format: was it made by a later server, or by other means, in a token for instance?"},
			{"none", func(as []authority) { as[n].Key = nil },
				"ca: the sealed key has an unknown format: was it made by a later server, or by other means, in a token for instance?"},
		} {
			t.Run(state+"/"+test.name, func(t *testing.T) {
				d := good
				d.Authorities = append([]authority(nil), good.Authorities...)
				test.change(d.Authorities)
				config := base
				config.Authorities = storage.NewMemory()
				replace(t, config.Authorities, d.encode(t))
				want := "ca: open the key of authority " + d.Authorities[n].ID + ", which is " + state + ": " + test.want
				switch _, err := ca.Open(t.Context(), config); {
				case test.want == "" && err != nil:
					t.Errorf("Open = %v", err)
				case test.want != "" && (err == nil || err.Error() != want):
					t.Errorf("Open = %v, want %s", err, want)
				}
			})
		}
		t.Run(state+"/certificate of another key", func(t *testing.T) {
			config := base
			config.Authorities = storage.NewMemory()
			replace(t, config.Authorities, good.encode(t))
			for _, a := range good.Authorities {
				if a.State == state {
					config.Keys = oneOther{base.Keys, a.ID, otherKeys{key: newKey(t, p256)}}
				}
			}
			want := "ca: the key of authority " + good.Authorities[n].ID + ", which is " + state + ", does not match its certificate: "
			if _, err := ca.Open(t.Context(), config); err == nil || !strings.HasPrefix(err.Error(), want) {
				t.Errorf("Open = %v, want %s", err, want)
			}
		})
	}
}

// oneOther opens the handle of one authority by other Keys.
type oneOther struct {
	ca.Keys
	id    string
	other otherKeys
}

func (k oneOther) Open(ctx context.Context, id string, handle []byte) (crypto.Signer, error) {
	if id == k.id {
		return k.other.Open(ctx, id, handle)
	}
	return k.Keys.Open(ctx, id, handle)
}
