package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"strings"
)

// Keys makes authority keys and opens them again. A key leaves this package's
// memory only in the form that Create returns for storing.
type Keys interface {
	// Create makes a key, and returns it with the handle by which Open finds it.
	// The handle is stored beside the certificate and gives nothing away.
	Create(ctx context.Context) (key crypto.Signer, handle []byte, err error)

	// Open returns the key of the authority with this ID.
	Open(ctx context.Context, authorityID string, handle []byte) (crypto.Signer, error)
}

// Resealer is implemented by Keys whose handles are encrypted under a key that can
// change. [Issuer.Reseal] uses it.
type Resealer interface {
	Keys

	// Reseal returns the handle of the same key of the authority under the current
	// key-encryption key. If it is under that already, Reseal returns it as it is,
	// and changed is false.
	Reseal(ctx context.Context, authorityID string, handle []byte) (again []byte, changed bool, err error)
}

// SealedKeys keeps keys in their handles, encrypted: ECDSA P-256 under
// AES-256-GCM, with the authority's ID as associated data, so that a handle moved
// to another authority does not open. It implements [Resealer].
type SealedKeys struct {
	keks []keyEncryptionKey // the current one first
}

// keyEncryptionKey is one key that seals others.
type keyEncryptionKey struct {
	id   [kekIDSize]byte
	aead cipher.AEAD
}

// KeySize is the size of a key-encryption key, in bytes.
const KeySize = 32

// NewSealedKeys returns the Keys under key-encryption keys of KeySize bytes. What
// is created is sealed under the current one. What was sealed under a previous one
// opens, until [Issuer.Reseal] has sealed it anew and the previous one can go.
func NewSealedKeys(current []byte, previous ...[]byte) (*SealedKeys, error) {
	k := &SealedKeys{}
	for _, kek := range append([][]byte{current}, previous...) {
		if len(kek) != KeySize {
			return nil, fmt.Errorf("ca: the key-encryption key has %d bytes, not %d", len(kek), KeySize)
		}
		block, err := aes.NewCipher(kek)
		if err != nil {
			return nil, fmt.Errorf("ca: key-encryption key: %w", err)
		}
		aead, err := cipher.NewGCMWithRandomNonce(block)
		if err != nil {
			return nil, fmt.Errorf("ca: key-encryption key: %w", err)
		}
		one := keyEncryptionKey{id: kekID(kek), aead: aead}
		if _, twice := k.find(one.id); twice {
			// Whoever changes the key and gives the same file twice has changed nothing.
			return nil, fmt.Errorf("ca: the key-encryption key %x is given twice", one.id)
		}
		k.keks = append(k.keks, one)
	}
	return k, nil
}

// String hides the keys from logs.
func (*SealedKeys) String() string { return "SealedKeys" }

// The first byte of a handle is its format. Format 1 does not say which
// key-encryption key it is under. Format 2 does, in the bytes that follow:
//
//	1 | nonce, ciphertext, tag              associated data: authority ID
//	2 | ID of the key | nonce, ciphertext, tag   associated data: 2 | ID of the key | authority ID
//
// Format 1 is read and no longer written.
const (
	sealedUnnamed = 1
	sealedNamed   = 2
)

// kekIDSize is enough to keep a handful of keys apart. It proves nothing: the
// seal does.
const kekIDSize = 8

// kekID names a key-encryption key and gives nothing of it away.
func kekID(kek []byte) [kekIDSize]byte {
	mac := hmac.New(sha256.New, kek)
	mac.Write([]byte("troth key-encryption key"))
	return [kekIDSize]byte(mac.Sum(nil))
}

func (k *SealedKeys) find(id [kekIDSize]byte) (keyEncryptionKey, bool) {
	for _, kek := range k.keks {
		if kek.id == id {
			return kek, true
		}
	}
	return keyEncryptionKey{}, false
}

// Create implements [Keys].
func (k *SealedKeys) Create(context.Context) (crypto.Signer, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	id, err := authorityID(key.Public())
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	defer clear(der)
	return key, k.seal(id, der), nil
}

// Open implements [Keys].
func (k *SealedKeys) Open(_ context.Context, authorityID string, handle []byte) (crypto.Signer, error) {
	der, _, err := k.unseal(authorityID, handle)
	if err != nil {
		return nil, err
	}
	defer clear(der)
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, errors.New("ca: the sealed key is damaged")
	}
	signer, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, errors.New("ca: the sealed key is not an ECDSA key")
	}
	return signer, nil
}

// Reseal implements [Resealer]. A handle of format 1 under the current key stays as
// it is, because a server that knows no other format may have to open it.
func (k *SealedKeys) Reseal(_ context.Context, authorityID string, handle []byte) ([]byte, bool, error) {
	der, under, err := k.unseal(authorityID, handle)
	if err != nil {
		return nil, false, err
	}
	defer clear(der)
	if under == k.keks[0].id {
		return handle, false, nil
	}
	return k.seal(authorityID, der), true, nil
}

// seal returns the handle of a key under the current key-encryption key.
func (k *SealedKeys) seal(authorityID string, der []byte) []byte {
	header := append([]byte{sealedNamed}, k.keks[0].id[:]...)
	return k.keks[0].aead.Seal(header, nil, der, append(bytes.Clone(header), authorityID...))
}

// unseal returns the key in a handle, and the ID of the key-encryption key that the
// handle is under.
func (k *SealedKeys) unseal(authorityID string, handle []byte) (der []byte, under [kekIDSize]byte, err error) {
	format := byte(0)
	if len(handle) > 0 {
		format = handle[0]
	}
	switch format {
	case sealedUnnamed:
		for _, kek := range k.keks {
			if der, err := kek.aead.Open(nil, nil, handle[1:], []byte(authorityID)); err == nil {
				return der, kek.id, nil
			}
		}
		return nil, under, errors.New("ca: the sealed key does not open: is the key-encryption key that it was sealed under among those given? If so, it is damaged or another authority's: restore the store from a backup")
	case sealedNamed:
		if len(handle) < 1+kekIDSize {
			return nil, under, errors.New("ca: the sealed key does not open: it is cut off; restore the store from a backup")
		}
		under = [kekIDSize]byte(handle[1:])
		kek, ok := k.find(under)
		if !ok {
			known := make([]string, len(k.keks))
			for n, kek := range k.keks {
				known[n] = hex.EncodeToString(kek.id[:])
			}
			return nil, under, fmt.Errorf("ca: the sealed key does not open: it is under key-encryption key %x, and known is %s; give that one too, as a previous one",
				under, strings.Join(known, ", "))
		}
		header := handle[:1+kekIDSize]
		der, err = kek.aead.Open(nil, nil, handle[len(header):], append(bytes.Clone(header), authorityID...))
		if err != nil {
			return nil, under, fmt.Errorf("ca: the sealed key does not open under key-encryption key %x, which it names: it is damaged or another authority's; restore the store from a backup", under)
		}
		return der, under, nil
	default:
		return nil, under, errors.New("ca: the sealed key has an unknown format: was it made by a later server, or by other means, in a token for instance?")
	}
}

// signer is an authority that can sign.
type signer struct {
	id          string
	certificate *x509.Certificate
	key         crypto.Signer
	handle      []byte // that key was opened by
	// extensions are those that are alike in all that it signs, encoded.
	extensions []byte
}

// openSigner opens the key of an authority and refuses one that does not belong
// to the certificate.
func openSigner(ctx context.Context, keys Keys, a Authority) (*signer, error) {
	key, err := keys.Open(ctx, a.ID, a.Key)
	if err != nil {
		return nil, fmt.Errorf("ca: open the key of authority %s, which is %v: %w", a.ID, a.State, err)
	}
	return newSigner(a, key, a.Key)
}

func newSigner(a Authority, key crypto.Signer, handle []byte) (*signer, error) {
	public, ok := key.Public().(*ecdsa.PublicKey)
	if !ok || public.Curve != elliptic.P256() {
		return nil, fmt.Errorf("ca: the key of authority %s, which is %v, is not ECDSA P-256: it was not made by this server; restore the store from a backup",
			a.ID, a.State)
	}
	if !public.Equal(a.Certificate.PublicKey) {
		return nil, fmt.Errorf("ca: the key of authority %s, which is %v, does not match its certificate: they come from two stores or two tokens; bring the two together again",
			a.ID, a.State)
	}
	extensions, err := commonExtensions(a.Certificate)
	if err != nil {
		return nil, fmt.Errorf("ca: encode the extensions of authority %s: %w", a.ID, err)
	}
	return &signer{id: a.ID, certificate: a.Certificate, key: key, handle: handle, extensions: extensions}, nil
}

// signers opens the keys of the authorities that sign or may come to, by ID.
//
// Before Open has returned, all of them have to open: a replica that cannot sign
// as soon as its document wants it to should not start. After that, what is open
// stays open. A replica that does not know the key-encryption key under which
// another has sealed its document anew signs on with the keys that it holds; one
// that cannot open what was prepared since says so, while there is time.
func (i *Issuer) signers(ctx context.Context, set Set, before *authorities) (map[string]*signer, error) {
	opened := make(map[string]*signer)
	for _, a := range set.Authorities {
		if a.State != Prepared && a.State != Active {
			continue
		}
		var held *signer
		if before != nil {
			held = before.signers[a.ID]
		}
		var err error
		if held != nil && bytes.Equal(held.handle, a.Key) {
			opened[a.ID], err = newSigner(a, held.key, held.handle)
		} else {
			opened[a.ID], err = openSigner(ctx, i.config.Keys, a)
		}
		switch {
		case err == nil:
		case held != nil && held.key.Public().(*ecdsa.PublicKey).Equal(a.Certificate.PublicKey):
			i.config.Audit.LogAttrs(ctx, slog.LevelError, "the key of an authority does not open; this replica signs with it as long as it runs, and cannot start again",
				slog.String("authority_id", a.ID), slog.Any("err", err))
			if opened[a.ID], err = newSigner(a, held.key, held.handle); err != nil {
				return nil, err
			}
		case before != nil && a.State == Prepared:
			i.config.Audit.LogAttrs(ctx, slog.LevelError, "the key of a prepared authority does not open; this replica cannot sign once it is active",
				slog.String("authority_id", a.ID), slog.Any("err", err))
			delete(opened, a.ID)
		default:
			return nil, err
		}
	}
	return opened, nil
}
