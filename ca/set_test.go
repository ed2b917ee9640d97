package ca_test

import (
	"encoding/json"
	"reflect"
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
