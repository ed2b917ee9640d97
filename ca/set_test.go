package ca_test

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"troth.dev/troth/ca"
	"troth.dev/troth/storage"
)

// What is accepted has everything that the rest relies on, and survives being
// written again.
func FuzzDecodeSet(f *testing.F) {
	config := newConfig(f)
	open(f, config)
	d := stored(f, config.Authorities)
	f.Add(d.encode(f))
	d = rotated(d, anotherAuthority(f, config, "active"))
	d.Authorities = append(d.Authorities, anotherAuthority(f, config, "revoked"))
	f.Add(d.encode(f))
	f.Add([]byte(`{"format":1,"trust_domain":"example.test","revision":1,"authorities":[null]}`))
	f.Add([]byte(`{"format":1,"trust_domain":"example.test","revision":-1,"authorities":[{"state":"active"}]}`))
	f.Add([]byte("null"))
	f.Add(ofFormat2(f))
	f.Fuzz(func(t *testing.T, data []byte) {
		set, err := ca.DecodeSet(data)
		if err != nil {
			return
		}
		if len(data) > storage.MaxDocument || set.TrustDomain.IsZero() || set.Revision == 0 || !json.Valid(data) {
			t.Fatalf("accepted %q", data)
		}
		active := 0
		for _, a := range set.Authorities {
			if a.State == ca.Active {
				active++
			}
			if !a.Certificate.IsCA || a.ID == "" {
				t.Fatalf("accepted authority %+v", a)
			}
		}
		if active > 1 || len(set.Bundle().Authorities) == 0 {
			t.Fatalf("accepted %d active authorities and %d trusted ones", active, len(set.Bundle().Authorities))
		}
		again, err := ca.EncodeSet(set)
		if err != nil {
			t.Fatalf("EncodeSet: %v", err)
		}
		if len(again) > storage.MaxDocument {
			return // it was in a shorter spelling than ours
		}
		back, err := ca.DecodeSet(again)
		if err != nil {
			t.Fatalf("DecodeSet of what EncodeSet wrote: %v", err)
		}
		for n := range set.Authorities { // an empty key is left out and comes back as none
			if len(set.Authorities[n].Key) == 0 {
				set.Authorities[n].Key = nil
			}
		}
		if !reflect.DeepEqual(set, back) {
			t.Fatal("the set changed by being written and read")
		}
	})
}

// ofFormat2 returns a stored set with all that the format has.
func ofFormat2(t testing.TB) []byte {
	config := newConfig(t)
	issuer := open(t, config)
	id := currentSet(issuer).Authorities[0].ID
	if _, err := issuer.Taint(t.Context(), id, forced); err != nil {
		t.Fatal(err)
	}
	if _, err := issuer.Taint(t.Context(), stored(t, config.Authorities).Authorities[1].ID, operator); err != nil {
		t.Fatal(err)
	}
	doc, err := config.Authorities.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return doc.Data
}

// What the second format has beyond the first is refused where it cannot be.
func TestFormat2(t *testing.T) {
	good := ofFormat2(t)
	for _, test := range []struct{ name, old, new, want string }{
		{"as it is", "", "", ""},
		{"in the first format", `"format":2`, `"format":1`, "has what format 1 does not know"},
		{"pending on one that is not active", `"taint_pending":true`, `"taint_pending":true,"state":"old"`, "and waits for a successor"},
		{"of a later revision", `"revision":2,"actor"`, `"revision":99,"actor"`, "was changed in revision 99, which is yet to come"},
		{"a time that cannot be written", `"reissue_by":"`, `"reissue_by":"0000-01-01T00:00:00Z","x":"`, "has a time in the year 0"},
		{"no time", `"reissue_by":"20`, `"reissue_by":"x20`, "cannot parse"},
	} {
		t.Run(test.name, func(t *testing.T) {
			data := []byte(strings.Replace(string(good), test.old, test.new, 1))
			if test.old != "" && bytes.Equal(data, good) {
				t.Fatalf("%s has no %s", good, test.old)
			}
			_, err := ca.DecodeSet(data)
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("DecodeSet = %v, want %q", err, test.want)
			}
		})
	}
}

// Who never rotated can go back to a server that knows only the first format.
func TestFormat1IsKept(t *testing.T) {
	config := newConfig(t)
	issuer := open(t, config)
	if got := stored(t, config.Authorities).Format; got != 1 {
		t.Errorf("the first set is of format %d, want 1", got)
	}
	if _, err := issuer.Prepare(t.Context(), operator); err != nil {
		t.Fatal(err)
	}
	if got := stored(t, config.Authorities).Format; got != 2 {
		t.Errorf("a changed set is of format %d, want 2", got)
	}
}
