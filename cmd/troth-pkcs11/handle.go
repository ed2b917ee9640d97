package main

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
)

// handle says where a key is. It is stored as a PKCS #11 URI (RFC 7512), which
// other programs understand too:
//
//	pkcs11:serial=6f3e9a40c1d2b7f8;id=%01%9c...;type=private
type handle struct {
	serial string // of the token
	id     []byte // CKA_ID
}

const (
	maxID     = 64
	maxSerial = 16 // bytes, PKCS #11 §3.2
)

func (h handle) String() string {
	var id strings.Builder
	for _, b := range h.id {
		fmt.Fprintf(&id, "%%%02x", b)
	}
	return "pkcs11:serial=" + url.PathEscape(h.serial) + ";id=" + id.String() + ";type=private"
}

// parseHandle reads what String wrote, and refuses all else.
func parseHandle(text []byte) (handle, error) {
	rest, ok := strings.CutPrefix(string(text), "pkcs11:serial=")
	serial, rest, okSerial := strings.Cut(rest, ";id=")
	id, ok2 := strings.CutSuffix(rest, ";type=private")
	if !ok || !okSerial || !ok2 {
		return handle{}, fmt.Errorf("the handle %.64q is not of a key in a token: was the key made by other means?", text)
	}
	s, err := url.PathUnescape(serial)
	if err != nil {
		return handle{}, fmt.Errorf("the handle of a key: %w", err)
	}
	i, err := url.PathUnescape(id)
	if err != nil {
		return handle{}, fmt.Errorf("the handle of a key: %w", err)
	}
	h := handle{serial: s, id: []byte(i)}
	if len(s) == 0 || len(s) > maxSerial || len(i) == 0 || len(i) > maxID {
		return handle{}, errors.New("the handle of a key has a serial number or an ID that is empty or too long")
	}
	if h.String() != string(text) {
		return handle{}, errors.New("the handle of a key is not written as it should be")
	}
	return h, nil
}
