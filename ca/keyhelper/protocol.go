package keyhelper

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
)

// The protocol, version 1. Both sides send frames: the length of a message in four
// bytes, big-endian, and the message in JSON. The issuing side sends requests, the
// helper one response to each, in any order, with the request's id.
//
//	hello   version                   -> version
//	create                            -> public_key (SPKI, DER), handle
//	open    authority_id, handle      -> public_key
//	sign    handle, hash, digest      -> signature (ECDSA, DER)
//
// hello comes first. In the place of a result comes an error, with a code and a
// text. No more than InFlight requests wait for their responses at a time. What
// does not parse, or answers nothing, ends the conversation.
const version = 1

const (
	methodHello  = "hello"
	methodCreate = "create"
	methodOpen   = "open"
	methodSign   = "sign"

	hashSHA256 = "SHA-256"
)

// The bounds of the protocol.
const (
	// InFlight is how many requests a helper has at a time.
	InFlight = 16
	// MaxHandle bounds a handle, in bytes.
	MaxHandle = 1 << 10

	maxMessage     = 16 << 10
	maxErrorText   = 1 << 10
	maxAuthorityID = 128
)

type request struct {
	ID          uint64 `json:"id"`
	Method      string `json:"method"`
	Version     int    `json:"version,omitempty"`
	AuthorityID string `json:"authority_id,omitempty"`
	Handle      []byte `json:"handle,omitempty"`
	Hash        string `json:"hash,omitempty"`
	Digest      []byte `json:"digest,omitempty"`
}

type response struct {
	ID        uint64 `json:"id"`
	Version   int    `json:"version,omitempty"`
	PublicKey []byte `json:"public_key,omitempty"`
	Handle    []byte `json:"handle,omitempty"`
	Signature []byte `json:"signature,omitempty"`
	Error     *Error `json:"error,omitempty"`
}

// Error is what a request failed with.
type Error struct {
	Code    Code   `json:"code"`
	Message string `json:"message"`
}

// Code is a machine-readable kind of Error.
type Code string

// The codes of errors.
const (
	TokenGone  Code = "TOKEN_GONE"  // the token cannot be reached
	PINRefused Code = "PIN_REFUSED" // the token does not take the PIN
	NoSuchKey  Code = "NO_SUCH_KEY" // the token does not have the key, or has another
	Invalid    Code = "INVALID"     // the request is none
	Failed     Code = "FAILED"      // anything else that the token says
	HelperGone Code = "HELPER_GONE" // the helper ended, or could not be started
	TimedOut   Code = "TIMED_OUT"   // the helper did not answer in time, and was killed
)

// Error returns the code and the text.
func (e *Error) Error() string { return string(e.Code) + ": " + e.Message }

// check refuses a request that no helper has to look at.
func (r request) check() error {
	switch {
	case len(r.Handle) > MaxHandle:
		return &Error{Invalid, fmt.Sprintf("a handle of %d bytes", len(r.Handle))}
	case len(r.AuthorityID) > maxAuthorityID:
		return &Error{Invalid, fmt.Sprintf("the ID of an authority has %d bytes", len(r.AuthorityID))}
	}
	switch r.Method {
	case methodHello, methodCreate:
	case methodOpen:
		if len(r.Handle) == 0 {
			return &Error{Invalid, "open without a handle"}
		}
	case methodSign:
		if len(r.Handle) == 0 {
			return &Error{Invalid, "sign without a handle"}
		}
		if r.Hash != hashSHA256 || len(r.Digest) != 32 {
			return &Error{Invalid, fmt.Sprintf("sign %d bytes of hash %.16q; only digests of SHA-256 are signed", len(r.Digest), r.Hash)}
		}
	default:
		return &Error{Invalid, fmt.Sprintf("unknown method %.32q", r.Method)}
	}
	return nil
}

// parseResponse reads a response; what it has to hold depends on the request.
func parseResponse(message []byte) (response, error) {
	var r response
	if err := decode(message, &r); err != nil {
		return response{}, err
	}
	switch {
	case len(r.Handle) > MaxHandle:
		return response{}, fmt.Errorf("a handle of %d bytes", len(r.Handle))
	case len(r.PublicKey) > 1<<10, len(r.Signature) > 1<<10:
		return response{}, fmt.Errorf("a key of %d bytes, a signature of %d", len(r.PublicKey), len(r.Signature))
	case r.Error != nil && (r.Error.Code == "" || len(r.Error.Code) > 64):
		return response{}, fmt.Errorf("an error with the code %.64q", r.Error.Code)
	}
	return r, nil
}

// parseRequest reads a request. If it is one that cannot be carried out, the error
// is an [*Error] to be answered; any other ends the conversation.
func parseRequest(message []byte) (request, error) {
	var r request
	if err := decode(message, &r); err != nil {
		return request{}, err
	}
	return r, r.check()
}

func decode(message []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(message))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return fmt.Errorf("a message that is none: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("a message with something after it")
	}
	return nil
}

// encode returns the frame of a message.
func encode(message any) ([]byte, error) {
	body, err := json.Marshal(message)
	if err != nil {
		return nil, err
	}
	if len(body) > maxMessage {
		return nil, fmt.Errorf("a message of %d bytes", len(body))
	}
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...), nil
}

// readFrame reads one message. At the end of r, and nowhere else, the error is
// [io.EOF].
func readFrame(r io.Reader) ([]byte, error) {
	var length [4]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(length[:])
	if n == 0 || n > maxMessage {
		return nil, fmt.Errorf("a message of %d bytes; at most %d are read: did something else write to standard output?", n, maxMessage)
	}
	message := make([]byte, n)
	if _, err := io.ReadFull(r, message); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return message, nil
}

// asError returns err as one that may be sent.
func asError(err error) *Error {
	var e *Error
	if !errors.As(err, &e) {
		e = &Error{Failed, err.Error()}
	}
	text := strings.ToValidUTF8(e.Message, "?")
	if len(text) > maxErrorText {
		text = strings.ToValidUTF8(text[:maxErrorText], "")
	}
	return &Error{e.Code, text}
}
