package batch_test

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"runtime"
	"strings"
	"testing"

	"troth.dev/troth/storage/kubernetes/internal/batch"
)

func compress(t testing.TB, texts ...string) []byte {
	t.Helper()
	var data bytes.Buffer
	for _, text := range texts {
		z := gzip.NewWriter(&data)
		if _, err := z.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
		if err := z.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return data.Bytes()
}

const goodLine = `{"serial":"40ff","id":"spiffe://example.org/ns/a/sa/b","authority":"a","notBefore":1,"notAfter":3600,"issuedAt":1999,"caller":"c"}` + "\n"

func TestDecodeRefuses(t *testing.T) {
	bomb := strings.Repeat(" ", 16<<20)
	for _, test := range []struct {
		name, want string
		data       []byte
	}{
		{"nothing", "EOF", nil},
		{"not gzip", "gzip", []byte(goodLine)},
		{"cut off", "unexpected EOF", compress(t, goodLine)[:40]},
		{"something behind", "gzip", append(compress(t, goodLine), "garbage garbage"...)},
		{"not JSON", "issuance 1", compress(t, goodLine+"x")},
		{"cut line", "issuance 0", compress(t, goodLine[:50])},
		{"unknown field", "unknown field", compress(t, `{"serial":"1","more":true}`)},
		{"no ID", "issuance 0", compress(t, strings.Replace(goodLine, "spiffe://example.org/ns/a/sa/b", "", 1))},
		{"not a serial number", "serial number", compress(t, strings.Replace(goodLine, "40ff", "0x", 1))},
		{"ends before it was made", "ends at", compress(t, strings.Replace(goodLine, "1999", "9999999", 1))},
		{"a bomb", fmt.Sprintf("more than %d bytes", batch.Max), compress(t, bomb)},
		{"a bomb in parts", fmt.Sprintf("more than %d bytes", batch.Max), compress(t, bomb[:200<<10], bomb[:200<<10])},
	} {
		t.Run(test.name, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			all, err := batch.Decode(test.data)
			runtime.ReadMemStats(&after)
			if took := after.TotalAlloc - before.TotalAlloc; took > 8<<20 {
				t.Errorf("Decode(%d bytes) took %d bytes of memory", len(test.data), took)
			}
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("Decode = %d issuances, %v, want an error with %q", len(all), err, test.want)
			}
		})
	}
	if all, err := batch.Decode(compress(t, goodLine)); len(all) != 1 || err != nil {
		t.Errorf("Decode(what the others were made of) = %v, %v, want one issuance", all, err)
	}
}

// What can be decoded is what a ledger may hold, of bounded size, and nothing else
// happens to whoever decodes.
func FuzzDecode(f *testing.F) {
	f.Add(compress(f, goodLine))
	f.Add(compress(f, goodLine, goodLine))
	f.Add(compress(f))
	f.Add([]byte(goodLine))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, given := range [][]byte{data, compress(t, string(data))} {
			all, err := batch.Decode(given)
			if err != nil {
				continue
			}
			if len(all) > batch.Max/20 {
				t.Fatalf("%d issuances", len(all))
			}
			for _, i := range all {
				if i.Serial == "" || i.ID.IsZero() || i.NotAfter.Before(i.NotBefore) {
					t.Errorf("Decode let %+v pass", i)
				}
			}
		}
	})
}
