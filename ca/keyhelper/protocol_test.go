package keyhelper_test

import (
	"bytes"
	"encoding/binary"
	"io"
	"strings"
	"testing"

	"troth.dev/troth/ca/keyhelper"
)

func frame(message string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(message))), message...)
}

const greeting = `{"id":1,"method":"hello","version":1}`

// What ends a conversation, as the helper sees it.
func TestServeRefuses(t *testing.T) {
	for _, test := range []struct {
		name string
		in   []byte
		want string
	}{
		{"nothing", nil, ""},
		{"hello", frame(greeting), ""},
		{"cut off in the length", []byte{0, 0}, "keyhelper: read a request: unexpected EOF"},
		{"cut off", frame(greeting)[:20], "keyhelper: read a request: unexpected EOF"},
		{"empty", []byte{0, 0, 0, 0}, "a message of 0 bytes"},
		{"too long", []byte{0, 0, 0x40, 1}, "a message of 16385 bytes"},
		{"no JSON", frame("PK"), "a message that is none"},
		{"unknown field", frame(`{"id":1,"method":"hello","version":1,"pin":"1234"}`), "a message that is none"},
		{"two", frame(greeting + greeting), "a message with something after it"},
		{"no hello", frame(`{"id":1,"method":"create"}`), "create comes before a hello of version 1"},
		{"hello of another version", append(frame(`{"id":1,"method":"hello","version":2}`), frame(`{"id":2,"method":"create"}`)...),
			"create comes before a hello of version 1"},
	} {
		t.Run(test.name, func(t *testing.T) {
			err := keyhelper.Serve(t.Context(), bytes.NewReader(test.in), io.Discard, folder(t.TempDir()))
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("Serve = %v, want %q", err, test.want)
			}
		})
	}
}

// What is answered with an error, and does not end the conversation.
func TestServeAnswersErrors(t *testing.T) {
	for _, test := range []struct {
		name, in, want string
	}{
		{"unknown method", `{"id":2,"method":"export"}`, `{"id":2,"error":{"code":"INVALID","message":"unknown method \"export\""}}`},
		{"no handle", `{"id":2,"method":"open"}`, `"code":"INVALID"`},
		{"other hash", `{"id":2,"method":"sign","handle":"AA==","hash":"SHA-512","digest":"AAAA"}`, `"code":"INVALID"`},
		{"long handle", `{"id":2,"method":"open","handle":"` + strings.Repeat("AAAA", 400) + `"}`, `"code":"INVALID"`},
	} {
		t.Run(test.name, func(t *testing.T) {
			var out bytes.Buffer
			in := bytes.Join([][]byte{frame(greeting), frame(test.in), frame(`{"id":3,"method":"hello","version":1}`)}, nil)
			if err := keyhelper.Serve(t.Context(), bytes.NewReader(in), &out, folder(t.TempDir())); err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(out.String(), test.want) || !strings.Contains(out.String(), `{"id":3,"version":1}`) {
				t.Errorf("it answers %q, want %q and to go on", out.String(), test.want)
			}
		})
	}
}

// FuzzServe is what a helper makes of bytes that no server sends.
func FuzzServe(f *testing.F) {
	f.Add(frame(greeting))
	f.Add(append(frame(greeting), frame(`{"id":2,"method":"create"}`)...))
	f.Add(append(frame(greeting), frame(`{"id":2,"method":"open","authority_id":"a","handle":"AA=="}`)...))
	f.Add(append(frame(greeting), frame(`{"id":2,"method":"sign","handle":"AA==","hash":"SHA-256","digest":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}`)...))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, in []byte) {
		// It ends, whatever comes.
		_ = keyhelper.Serve(t.Context(), bytes.NewReader(in), io.Discard, wrong{folder(dir), "no-handle"})
	})
}

// FuzzResponse is what the server makes of bytes that no helper sends.
func FuzzResponse(f *testing.F) {
	f.Add([]byte(`{"id":1,"version":1}`))
	f.Add([]byte(`{"id":2,"public_key":"AAAA","handle":"AAAA"}`))
	f.Add([]byte(`{"id":3,"signature":"AAAA"}`))
	f.Add([]byte(`{"id":4,"error":{"code":"PIN_REFUSED","message":"no"}}`))
	f.Add([]byte(`{"id":4,"error":{}}`))
	f.Fuzz(func(t *testing.T, message []byte) {
		if err := keyhelper.CheckResponse(message); err != nil {
			return
		}
		if len(message) > 16<<10 {
			return
		}
		got, err := keyhelper.ReadFrame(bytes.NewReader(frame(string(message))))
		if err != nil || !bytes.Equal(got, message) {
			t.Errorf("a response does not come through its frame: %v", err)
		}
	})
}
