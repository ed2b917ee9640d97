package token

import (
	"context"
	"time"
)

// Signed is a token whose form and header are in order, and of which nothing is
// proved. The zero Signed is refused by every key.
type Signed struct{ compact compact }

// Parse takes a token apart: its size, form, algorithm and header are checked, as
// [Verifier.Verify] does. It returns an [*Error] if one of them is refused.
func Parse(raw string) (Signed, error) {
	if len(raw) > maxToken {
		return Signed{}, refuse(TooLarge, "%d bytes, more than %d", len(raw), maxToken)
	}
	c, err := parseCompact(raw)
	return Signed{c}, err
}

// Algorithm is what the header says; it has to be the key's.
func (s Signed) Algorithm() string { return s.compact.algorithm }

// Input is what the signature is over: the header and the payload as they are
// spelled. Two tokens of one Input say the same, whatever their signatures are.
func (s Signed) Input() string { return s.compact.input }

// Payload decodes what the token says, which is nobody's word until a signature
// proves it.
func (s Signed) Payload() ([]byte, error) {
	payload, err := decodePart(s.compact.payload)
	if err != nil {
		return nil, refuse(Malformed, "payload: %w", err)
	}
	return payload, nil
}

// Keys are the keys of one issuer, whatever its tokens are about. Whoever reads
// service-account tokens wants a [Verifier], which has its own.
type Keys struct{ keyring *keyring }

// NewKeys returns the keys that fetch fetches, which is as [Config.Keys]. It fetches
// nothing. The caller closes the Keys.
func NewKeys(fetch func(ctx context.Context) ([]byte, error)) *Keys {
	return &Keys{&keyring{fetch: fetch}}
}

// Verify returns nil if the issuer signed the token, and an [*Error] if not. What the
// token says is not looked at. Verify blocks, until ctx ends at the latest, as
// [Verifier.Verify] does.
func (k *Keys) Verify(ctx context.Context, s Signed) error {
	_, err := k.keyring.prove(ctx, s.compact, time.Now())
	return err
}

// Close ends the fetch that is under way, as [Verifier.Close] does.
func (k *Keys) Close() { k.keyring.close() }

// prove returns the key that signed the token. The algorithm is the key's: the header
// may only agree.
func (r *keyring) prove(ctx context.Context, signed compact, now time.Time) (publicKey, error) {
	key, err := r.find(ctx, signed.keyID, now)
	if err != nil {
		return publicKey{}, err
	}
	if signed.algorithm != key.algorithm {
		return publicKey{}, refuse(WrongAlgorithm, "the header says %q, and key %.80q is for %q", signed.algorithm, signed.keyID, key.algorithm)
	}
	if !key.verifies(signed.input, signed.signature) {
		return publicKey{}, refuse(BadSignature, "not signed by key %.80q", signed.keyID)
	}
	return key, nil
}
