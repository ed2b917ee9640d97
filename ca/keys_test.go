package ca_test

import (
	"bytes"
	"crypto/ecdsa"
	"fmt"
	"strings"
	"testing"

	"troth.dev/troth/ca"
)

func TestSealedKeysSize(t *testing.T) {
	for _, size := range []int{0, 16, 24, 31, 33, 64} {
		want := fmt.Sprintf("ca: the key-encryption key has %d bytes, not 32", size)
		if _, err := ca.NewSealedKeys(make([]byte, size)); err == nil || err.Error() != want {
			t.Errorf("NewSealedKeys(%d bytes) = %v, want %q", size, err, want)
		}
	}
}

func TestSealedKeysRefuse(t *testing.T) {
	one, two := newKEK(), newKEK()
	for _, test := range []struct {
		name     string
		current  []byte
		previous [][]byte
		want     string
	}{
		{"a short previous one", one, [][]byte{two[:31]}, "ca: the key-encryption key has 31 bytes, not 32"},
		{"the current one as previous", one, [][]byte{two, one}, "ca: the key-encryption key " + under(one) + " is given twice"},
		{"a previous one twice", one, [][]byte{two, two}, "ca: the key-encryption key " + under(two) + " is given twice"},
	} {
		if _, err := ca.NewSealedKeys(test.current, test.previous...); err == nil || err.Error() != test.want {
			t.Errorf("%s: NewSealedKeys = %v, want %q", test.name, err, test.want)
		}
	}
}

func TestSealedKeysOpenOnlyWhatTheySealed(t *testing.T) {
	config := newConfig(t)
	open(t, config)
	sealed := stored(t, config.Authorities).Authorities[0]
	key, err := config.Keys.Open(t.Context(), sealed.ID, sealed.Key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := key.(*ecdsa.PrivateKey).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(sealed.Key, private) {
		t.Fatal("the handle has the private key in the clear")
	}

	for n := range sealed.Key {
		for _, bit := range []byte{0x01, 0x80} {
			damaged := bytes.Clone(sealed.Key)
			damaged[n] ^= bit
			if _, err := config.Keys.Open(t.Context(), sealed.ID, damaged); err == nil {
				t.Errorf("a handle with byte %d changed opens", n)
			}
		}
		if _, err := config.Keys.Open(t.Context(), sealed.ID, sealed.Key[:n]); err == nil {
			t.Errorf("a handle cut off after %d bytes opens", n)
		}
	}
	for _, id := range []string{"", sealed.ID[1:], strings.ToUpper(sealed.ID)} {
		if _, err := config.Keys.Open(t.Context(), id, sealed.Key); err == nil {
			t.Errorf("the handle opens for authority %q", id)
		}
	}
}

func TestSealedKeysHide(t *testing.T) {
	kek := bytes.Repeat([]byte{0xa5}, ca.KeySize)
	keys, err := ca.NewSealedKeys(kek)
	if err != nil {
		t.Fatal(err)
	}
	for _, format := range []string{"%v", "%+v", "%s"} {
		if got := fmt.Sprintf(format, keys); got != "SealedKeys" {
			t.Errorf("%s prints %q", format, got)
		}
	}
}

// FuzzSealedKeys opens what whoever can write the store may put there.
func FuzzSealedKeys(f *testing.F) {
	first, second := newKEK(), newKEK()
	config := newConfig(f)
	config.Keys = keysUnder(f, first)
	open(f, config)
	a := stored(f, config.Authorities).Authorities[0]
	f.Add(a.ID, a.Key)
	f.Add(a.ID, sealUnnamed(f, config.Keys, first, a))
	f.Add("", []byte(nil))
	f.Add(a.ID, []byte{2})
	keys := keysUnder(f, second, first)
	f.Fuzz(func(t *testing.T, id string, handle []byte) {
		key, err := keys.Open(t.Context(), id, handle)
		again, changed, resealErr := keys.Reseal(t.Context(), id, handle)
		if (err == nil) != (resealErr == nil) {
			t.Fatalf("Open = %v, Reseal = %v", err, resealErr)
		}
		if err != nil {
			return
		}
		if !changed {
			t.Fatal("a handle under the previous key is left as it is")
		}
		if same, err := keysUnder(t, second).Open(t.Context(), id, again); err != nil || !same.(*ecdsa.PrivateKey).Equal(key) {
			t.Fatalf("sealed anew, it opens to another key (%v)", err)
		}
	})
}
