package storage_test

import (
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/storage"
)

func valid() storage.Issuance {
	now := time.Date(2031, 2, 3, 4, 5, 6, 0, time.UTC)
	return storage.Issuance{
		Serial: "1f", ID: spiffeid.RequireFromString("spiffe://example.org/web"), AuthorityID: "a",
		NotBefore: now, NotAfter: now.Add(time.Hour), IssuedAt: now, Caller: "workload",
	}
}

func TestCheck(t *testing.T) {
	tests := []struct {
		name   string
		change func(*storage.Issuance)
		want   string // part of the error; empty if none
	}{
		{"all that is required", func(*storage.Issuance) {}, ""},
		{"a serial of one digit", func(i *storage.Issuance) { i.Serial = "1" }, ""},
		{"a serial of 20 octets", func(i *storage.Issuance) { i.Serial = strings.Repeat("f", 40) }, ""},
		{"valid for no time", func(i *storage.Issuance) { i.NotAfter = i.NotBefore }, ""},
		{"the longest text", func(i *storage.Issuance) { i.Node = strings.Repeat("n", 2048) }, ""},

		{"the zero value", func(i *storage.Issuance) { *i = storage.Issuance{} }, `serial number ""`},
		{"no serial", func(i *storage.Issuance) { i.Serial = "" }, `serial number ""`},
		{"serial 0", func(i *storage.Issuance) { i.Serial = "0" }, `serial number "0"`},
		{"a leading zero", func(i *storage.Issuance) { i.Serial = "01" }, `serial number "01"`},
		{"upper case", func(i *storage.Issuance) { i.Serial = "1F" }, `serial number "1F"`},
		{"not hexadecimal", func(i *storage.Issuance) { i.Serial = "1g" }, `serial number "1g"`},
		{"a sign", func(i *storage.Issuance) { i.Serial = "-1" }, `serial number "-1"`},
		{"a serial of 21 octets", func(i *storage.Issuance) { i.Serial = strings.Repeat("f", 41) }, "of 1 to 40 digits"},
		{"no ID", func(i *storage.Issuance) { i.ID = spiffeid.ID{} }, "no SPIFFE ID"},
		{"no authority", func(i *storage.Issuance) { i.AuthorityID = "" }, "no authority"},
		{"no caller", func(i *storage.Issuance) { i.Caller = "" }, "no caller"},
		{"no NotBefore", func(i *storage.Issuance) { i.NotBefore = time.Time{} }, "lacks a time"},
		{"no NotAfter", func(i *storage.Issuance) { i.NotAfter = time.Time{} }, "lacks a time"},
		{"issued after its end", func(i *storage.Issuance) { i.IssuedAt = i.NotAfter.Add(time.Millisecond) }, "before it was made"},
		{"no IssuedAt", func(i *storage.Issuance) { i.IssuedAt = time.Time{} }, "lacks a time"},
		{"ends before it begins", func(i *storage.Issuance) { i.NotAfter = i.NotBefore.Add(-1) }, "before it begins"},
		{"a text too long", func(i *storage.Issuance) { i.Node = strings.Repeat("n", 2049) }, "longer than 2048 bytes"},
		{"a NUL", func(i *storage.Issuance) { i.PodUID = "a\x00b" }, `"a\x00b"`},
		{"not UTF-8", func(i *storage.Issuance) { i.Caller = "\xff" }, `"\xff"`},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			i := valid()
			test.change(&i)
			err := i.Check()
			if test.want == "" {
				if err != nil {
					t.Errorf("Check() = %v, want nil", err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("Check() = %v, want an error with %q", err, test.want)
			}
		})
	}
}

func TestQueryMax(t *testing.T) {
	for limit, want := range map[int]int{-1: 1000, 0: 1000, 1: 1, 999: 999, 1000: 1000, 1001: 1000} {
		if got := (storage.Query{Limit: limit}).Max(); got != want {
			t.Errorf("Query{Limit: %d}.Max() = %d, want %d", limit, got, want)
		}
	}
}
