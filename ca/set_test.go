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
	f.Add(asFormat2(f, ofFormat3(f)))
	f.Add(ofFormat3(f))
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

// ofFormat3 returns a stored set with all that the format has.
func ofFormat3(t testing.TB) []byte {
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

// asFormat2 writes a set as the server did that knew no history.
func asFormat2(t testing.TB, data []byte) []byte {
	var d struct {
		document
		Authorities []json.RawMessage `json:"authorities"`
		History     []map[string]any  `json:"history,omitempty"`
	}
	if err := json.Unmarshal(data, &d); err != nil {
		t.Fatal(err)
	}
	for n, raw := range d.Authorities {
		var a map[string]any
		if err := json.Unmarshal(raw, &a); err != nil {
			t.Fatal(err)
		}
		for _, c := range d.History {
			if c["authority_id"] == a["id"] {
				a["changed"] = map[string]any{"at": c["at"], "revision": c["revision"], "actor": c["actor"], "reason": c["reason"], "evidence": c["evidence"]}
			}
		}
		var err error
		if d.Authorities[n], err = json.Marshal(a); err != nil {
			t.Fatal(err)
		}
	}
	d.History, d.Format = nil, 2
	data, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// What a later format has beyond an earlier one is refused where it cannot be.
func TestFormats(t *testing.T) {
	third := ofFormat3(t)
	second := asFormat2(t, third)
	for _, test := range []struct {
		name           string
		good           []byte
		old, new, want string
	}{
		{"2 as it is", second, "", "", ""},
		{"2 in the first format", second, `"format":2`, `"format":1`, "have what format 1 does not know"},
		{"2 with an operation", second, `"actor":`, `"operation":"taint","actor":`, "have what format 2 does not know"},
		{"3 as it is", third, "", "", ""},
		{"3 in the first format", third, `"format":3`, `"format":1`, "have what format 1 does not know"},
		{"3 in the second format", third, `"format":3`, `"format":2`, "have what format 2 does not know"},
		{"pending on one that is not active", third, `"taint_pending":true`, `"taint_pending":true,"state":"old"`, "and waits for a successor"},
		{"in another state than by its last change", third, `"state":"tainted"`, `"state":"old"`, "and its last change made"},
		{"changed in a later revision", third, `"reissue_by":`, `"changed":{"at":"2000-01-01T00:00:00Z","revision":99,"actor":"alice"},"reissue_by":`, "was changed in revision 99, which is yet to come"},
		{"a time that cannot be written", third, `"reissue_by":"`, `"reissue_by":"0000-01-01T00:00:00Z","x":"`, "has a time in the year 0"},
		{"no time", third, `"reissue_by":"20`, `"reissue_by":"x20`, "cannot parse"},
		{"history of a later revision", third, `"revision":2,"operation"`, `"revision":99,"operation"`, "history has revision 99"},
		{"history that goes back", third, `"revision":3,"operation"`, `"revision":1,"operation"`, "history has revision 1 after 2"},
		{"history of nobody", third, `"history":[{"authority_id":`, `"history":[{"x":`, "of no authority or by no operation"},
		{"history of no state", third, `"state":"tainted","at"`, `"x":"tainted","at"`, "is not the state of an authority"},
		{"history of no time", third, `"at":"`, `"at":"0000-01-01T00:00:00Z","x":"`, "in the year 0"},
		{"history too long", third, `"history":[`, `"history":[` + strings.Repeat(`{"authority_id":"x","state":"revoked","operation":"forget","at":"2000-01-01T00:00:00Z","revision":1,"actor":"x"},`, 197), "history of 201 changes, more than 200"},
	} {
		t.Run(test.name, func(t *testing.T) {
			data := []byte(strings.Replace(string(test.good), test.old, test.new, 1))
			if test.old != test.new && bytes.Equal(data, test.good) {
				t.Fatalf("%s has no %s", test.good, test.old)
			}
			_, err := ca.DecodeSet(data)
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("DecodeSet = %v, want %q", err, test.want)
			}
		})
	}
}

// Who never rotated can go back to a server that knows only the first format, and
// a set that such a server has changed goes on to be changed.
func TestTheFirstFormatThatHasRoom(t *testing.T) {
	config := newConfig(t)
	issuer := open(t, config)
	if got := stored(t, config.Authorities).Format; got != 1 {
		t.Errorf("the first set is of format %d, want 1", got)
	}
	if _, err := issuer.Prepare(t.Context(), operator); err != nil {
		t.Fatal(err)
	}
	if got := stored(t, config.Authorities).Format; got != 3 {
		t.Errorf("a changed set is of format %d, want 3", got)
	}

	second := asFormat2(t, ofFormat3(t))
	set, err := ca.DecodeSet(second)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := ca.EncodeSet(set); err != nil || !bytes.Contains(again, []byte(`"format":2`)) {
		t.Errorf("a set of format 2 became %s, %v", again, err)
	}
}
