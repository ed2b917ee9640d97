package check_test

import (
	"bytes"
	"encoding/pem"
	"slices"
	"strings"
	"testing"

	"troth.dev/troth/check"
)

func FuzzParseConflist(f *testing.F) {
	for _, seed := range []string{
		`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"},{"type":"troth-cni"}]}`,
		`{"type":"bridge"}`, `{"plugins":[]}`, `{"plugins":[{}]}`, `{"plugins":null}`, `{} {}`, `[`, `null`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		plugins, err := check.ParseConflist(content)
		if err == nil && (len(plugins) == 0 || slices.Contains(plugins, "")) {
			t.Errorf("%q has the plugins %q", content, plugins)
		}
	})
}

func FuzzParsePEM(f *testing.F) {
	c := certificate(f, "", -day, day)
	whole := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	f.Add(string(whole))
	f.Add(string(whole) + "\n" + string(whole))
	f.Add(string(whole) + "more")
	f.Add(string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: c.Raw})))
	f.Add(strings.Replace(string(whole), "M", "N", 1))
	f.Fuzz(func(t *testing.T, content string) {
		certificates, err := check.ParsePEM(content)
		if err != nil {
			return
		}
		// What was read can be written and read again, as it was.
		var again bytes.Buffer
		for _, c := range certificates {
			if err := pem.Encode(&again, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}); err != nil {
				t.Fatal(err)
			}
		}
		same, err := check.ParsePEM(again.String())
		if err != nil || len(same) != len(certificates) {
			t.Errorf("%d certificates, and %d when read again: %v", len(certificates), len(same), err)
		}
	})
}
