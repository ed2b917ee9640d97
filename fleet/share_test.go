package fleet

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"troth.dev/troth/ca"
	"troth.dev/troth/storage"
)

var at = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// heard is what a replica of n agents may have heard in the middle of a rotation.
func heard(n int) map[string]record {
	old, prepared := strings.Repeat("01", 20), strings.Repeat("ab", 20)
	all := make(map[string]record, n)
	for k := range n {
		r := record{
			node: fmt.Sprintf("ip-10-%d-%d-%d.eu-central-1.compute.internal", k>>16, k>>8&255, k&255),
			report: Report{
				Received: 41, Applied: 41, Proved: 41, ProvedAuthority: prepared, RunningFor: time.Duration(rand.N(1_000_000)) * time.Second,
				Uses: map[string]ca.Use{old: {SVIDs: 10 + k%30, Connections: rand.N(2000)}, prepared: {SVIDs: k % 7}},
			},
			heard: at.Add(-time.Duration(1000+rand.N(59_000)) * time.Millisecond), connected: k%10 > 0,
		}
		if !r.connected {
			r.lost = r.heard.Add(time.Second)
		}
		if r.report.Uses[prepared] == (ca.Use{}) {
			delete(r.report.Uses, prepared)
		}
		all[uuid.NewString()] = r
	}
	return all
}

func TestSummaryRoundTrip(t *testing.T) {
	for _, n := range []int{0, 1, 100} {
		want := summary{at: at, heard: heard(n)}
		data, err := encode(want)
		if err != nil {
			t.Fatal(err)
		}
		got, err := decode(data)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(summary{}, record{})); diff != "" {
			t.Errorf("%d agents (-want +got):\n%s", n, diff)
		}
	}
}

// A replica to which all agents report fits into what a store takes, and one with
// more tells of as many as fit: those who reported last.
func TestSummaryOfManyAgents(t *testing.T) {
	data, err := encode(summary{at: at, heard: heard(MaxAgents)})
	if err != nil {
		t.Fatal(err)
	}
	if len(data) > storage.MaxDocument {
		t.Errorf("%d agents take %d bytes, and a store takes %d", MaxAgents, len(data), storage.MaxDocument)
	}
	t.Logf("%d agents take %d bytes", MaxAgents, len(data))
	if _, err := decode(data); err != nil {
		t.Error(err)
	}

	all := heard(MaxAgents + 5)
	var oldest time.Time
	for _, r := range all {
		if oldest.IsZero() || r.heard.Before(oldest) {
			oldest = r.heard
		}
	}
	if data, err = encode(summary{at: at, heard: all}); err != nil {
		t.Fatal(err)
	}
	got, err := decode(data)
	if err != nil || len(got.heard) != MaxAgents {
		t.Fatalf("a summary of %d agents, %v", len(got.heard), err)
	}
	for uid, r := range got.heard {
		if r.heard.Equal(oldest) {
			t.Errorf("of too many agents the one that reported first, %s, is told of", uid)
		}
	}
}

func pack(text string) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write([]byte(text)); err != nil {
		panic(err)
	}
	if err := w.Close(); err != nil {
		panic(err)
	}
	return b.Bytes()
}

func TestDecodeRefuses(t *testing.T) {
	for _, test := range []struct{ name, text, want string }{
		{"no JSON", "{", "unexpected end"},
		{"no format", "{}", "format 0"},
		{"a newer format", `{"format":2}`, "format 2"},
		{"an authority that is not there", `{"format":1,"agents":[{"u":"a","q":1}]}`, "no authority 1"},
		{"a use of none", `{"format":1,"agents":[{"u":"a","x":[[0,1,1]]}]}`, "impossible use"},
		{"a negative use", `{"format":1,"authorities":["i"],"agents":[{"u":"a","x":[[1,-1,1]]}]}`, "impossible use"},
		{"a report of the future", `{"format":1,"agents":[{"u":"a","h":-1}]}`, "impossible time"},
		{"an overflowing time", `{"format":1,"agents":[{"u":"a","s":9223372036854775807}]}`, "impossible time"},
		{"more agents than there can be", `{"format":1,"agents":[` + strings.Repeat("{},", MaxAgents) + `{}]}`, "10001 agents"},
		{"a bomb", strings.Repeat(" ", maxSummary+1), "unpacks to more"},
	} {
		if _, err := decode(pack(test.text)); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("decode(%s) = %v, want an error with %q", test.name, err, test.want)
		}
	}
	if _, err := decode([]byte("no gzip")); err == nil {
		t.Error("decode(no gzip) = nil")
	}
	if _, err := decode(make([]byte, storage.MaxDocument+1)); err == nil {
		t.Error("decode(more than a document) = nil")
	}
}

// Whatever the store holds: decode does not fall, and what it takes means the same
// when it is written again.
func FuzzDecode(f *testing.F) {
	sound, err := encode(summary{at: at, heard: heard(2)})
	if err != nil {
		f.Fatal(err)
	}
	unpacked, err := gzip.NewReader(bytes.NewReader(sound))
	if err != nil {
		f.Fatal(err)
	}
	var text bytes.Buffer
	if _, err := text.ReadFrom(unpacked); err != nil {
		f.Fatal(err)
	}
	f.Add(text.String())
	f.Add(`{"format":1,"at":-1,"agents":[{"u":"a","h":1,"l":1}]}`)
	f.Fuzz(func(t *testing.T, text string) {
		s, err := decode(pack(text))
		if err != nil {
			return
		}
		again, err := encode(s)
		if err != nil {
			t.Fatal(err)
		}
		if len(again) > storage.MaxDocument {
			return // names that no node has
		}
		got, err := decode(again)
		if err != nil {
			t.Fatalf("what was written again: %v", err)
		}
		if diff := cmp.Diff(s.heard, got.heard, cmp.AllowUnexported(record{})); diff != "" {
			t.Errorf("what was written again (-first +second):\n%s", diff)
		}
	})
}
