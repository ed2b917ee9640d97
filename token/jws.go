package token

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/base64"
	"math/big"
	"strings"

	"github.com/go-jose/go-jose/v4/json"
)

// compact is a JWS in its compact serialisation (RFC 7515 §7.1), of which
// nothing is proved.
//
// It is taken apart here, and not by go-jose, which parses the header twice and
// encodes the payload again to verify it: that came to 1.6 times the bare RSA
// verification, before the token was hashed for the cache. The JSON decoder is
// go-jose's: unlike the standard library's it refuses a member given twice and
// tells "alg" from "ALG", so that no two readers of one token see two things.
type compact struct {
	algorithm string
	keyID     string
	input     string // the header and payload as they were signed
	payload   string // in base64url
	signature []byte
}

func parseCompact(raw string) (compact, error) {
	// The base64 decoder skips line breaks, which would let one signature be
	// spelled in many ways.
	if strings.Contains(raw, "\r") || strings.Contains(raw, "\n") {
		return compact{}, refuse(Malformed, "a line break")
	}
	header, rest, _ := strings.Cut(raw, ".")
	payload, signature, ok := strings.Cut(rest, ".")
	if !ok || strings.Contains(signature, ".") {
		return compact{}, refuse(Malformed, "not a compact JWS of three parts")
	}
	if header == "" || payload == "" {
		return compact{}, refuse(Malformed, "an empty header or payload")
	}
	headerJSON, err := decodePart(header)
	if err != nil {
		return compact{}, refuse(Malformed, "header: %w", err)
	}
	var h struct {
		Algorithm string          `json:"alg"`
		KeyID     string          `json:"kid"`
		Critical  json.RawMessage `json:"crit"`
	}
	if err := json.Unmarshal(headerJSON, &h); err != nil {
		return compact{}, refuse(Malformed, "header: %w", err)
	}
	switch h.Algorithm {
	case rs256, es256, es384, es512:
	default:
		// RFC 8725 §3.1: "none" accepts everything, and HS256 anybody who can
		// read the public key, once it is taken for the secret.
		return compact{}, refuse(WrongAlgorithm, "algorithm %.80q is not one of RS256, ES256, ES384 and ES512", h.Algorithm)
	}
	if h.Critical != nil {
		// RFC 7515 §4.1.11: an extension that is not understood must be refused,
		// and none is understood here.
		return compact{}, refuse(CriticalHeader, "a critical header")
	}
	if h.KeyID == "" || len(h.KeyID) > maxKeyID {
		return compact{}, refuse(UnknownKey, "no key ID, or one of more than %d bytes", maxKeyID)
	}
	signatureBytes, err := decodePart(signature)
	if err != nil {
		return compact{}, refuse(Malformed, "signature: %w", err)
	}
	return compact{
		algorithm: h.Algorithm,
		keyID:     h.KeyID,
		input:     raw[:len(header)+1+len(payload)],
		payload:   payload,
		signature: signatureBytes,
	}, nil
}

// decodePart decodes one part of a token: base64url without padding (RFC 7515
// §2), and strictly, so that each part has one spelling.
func decodePart(part string) ([]byte, error) {
	return base64.RawURLEncoding.Strict().DecodeString(part)
}

// The accepted algorithms (RFC 7518 §3.1) are those with which an API server
// signs.
const (
	rs256 = "RS256"
	es256 = "ES256"
	es384 = "ES384"
	es512 = "ES512"
)

// publicKey is a key and the one algorithm that it is used with. The zero
// publicKey verifies nothing.
type publicKey struct {
	algorithm string
	key       interface{ Equal(crypto.PublicKey) bool } // *rsa.PublicKey or *ecdsa.PublicKey
}

// newPublicKey returns false for every key that no accepted algorithm uses:
// private and symmetric ones among them.
func newPublicKey(key any) (publicKey, bool) {
	switch key := key.(type) {
	case *rsa.PublicKey:
		// RFC 7518 §3.3 asks for 2048 bits; from above, the cost of one
		// verification is bounded.
		if bits := key.N.BitLen(); bits < 2048 || bits > 8192 {
			return publicKey{}, false
		}
		return publicKey{rs256, key}, true
	case *ecdsa.PublicKey:
		switch key.Curve {
		case elliptic.P256():
			return publicKey{es256, key}, true
		case elliptic.P384():
			return publicKey{es384, key}, true
		case elliptic.P521():
			return publicKey{es512, key}, true
		}
	}
	return publicKey{}, false
}

func (k publicKey) equal(other publicKey) bool {
	return k.key != nil && k.algorithm == other.algorithm && k.key.Equal(other.key)
}

// verifies reports whether signature is the key's over input.
func (k publicKey) verifies(input string, signature []byte) bool {
	var hash crypto.Hash
	switch k.algorithm {
	case rs256, es256:
		hash = crypto.SHA256
	case es384:
		hash = crypto.SHA384
	case es512:
		hash = crypto.SHA512
	default:
		return false
	}
	h := hash.New()
	h.Write([]byte(input)) // a hash never fails
	digest := h.Sum(nil)

	switch key := k.key.(type) {
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(key, hash, digest, signature) == nil
	case *ecdsa.PublicKey:
		// RFC 7518 §3.4: r and s, each as long as the curve's order.
		size := (key.Curve.Params().N.BitLen() + 7) / 8
		if len(signature) != 2*size {
			return false
		}
		r := new(big.Int).SetBytes(signature[:size])
		s := new(big.Int).SetBytes(signature[size:])
		return ecdsa.Verify(key, digest, r, s)
	default:
		return false
	}
}

// maxKeyID bounds a key ID, in bytes: as long as Kubernetes lets an external
// signer choose.
const maxKeyID = 1024
