package ca

import (
	"context"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
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

// SealedKeys keeps keys in their handles, encrypted: ECDSA P-256 under
// AES-256-GCM, with the authority's ID as associated data, so that a handle moved
// to another authority does not open.
type SealedKeys struct {
	aead cipher.AEAD
}

// KeySize is the size of a key-encryption key, in bytes.
const KeySize = 32

// NewSealedKeys returns the Keys under a key-encryption key of KeySize bytes.
func NewSealedKeys(keyEncryptionKey []byte) (*SealedKeys, error) {
	if len(keyEncryptionKey) != KeySize {
		return nil, fmt.Errorf("ca: the key-encryption key has %d bytes, not %d", len(keyEncryptionKey), KeySize)
	}
	block, err := aes.NewCipher(keyEncryptionKey)
	if err != nil {
		return nil, fmt.Errorf("ca: key-encryption key: %w", err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, fmt.Errorf("ca: key-encryption key: %w", err)
	}
	return &SealedKeys{aead: aead}, nil
}

// String hides the key from logs.
func (*SealedKeys) String() string { return "SealedKeys" }

// sealedFormat is the first byte of a handle.
const sealedFormat = 1

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
	return key, k.aead.Seal([]byte{sealedFormat}, nil, der, []byte(id)), nil
}

// Open implements [Keys].
func (k *SealedKeys) Open(_ context.Context, authorityID string, handle []byte) (crypto.Signer, error) {
	if len(handle) == 0 || handle[0] != sealedFormat {
		return nil, errors.New("ca: the sealed key has an unknown format")
	}
	der, err := k.aead.Open(nil, nil, handle[1:], []byte(authorityID))
	if err != nil {
		return nil, errors.New("ca: the sealed key does not open: is this the key-encryption key that it was sealed under?")
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

// signer is an authority that can sign.
type signer struct {
	id          string
	certificate *x509.Certificate
	key         crypto.Signer
	// extensions are those that are alike in all that it signs, encoded.
	extensions []byte
}

// openSigner opens the key of an authority and refuses one that does not belong
// to the certificate.
func openSigner(ctx context.Context, keys Keys, a Authority) (*signer, error) {
	key, err := keys.Open(ctx, a.ID, a.Key)
	if err != nil {
		return nil, fmt.Errorf("ca: open the key of authority %s: %w", a.ID, err)
	}
	public, ok := key.Public().(*ecdsa.PublicKey)
	if !ok || public.Curve != elliptic.P256() {
		return nil, fmt.Errorf("ca: the key of authority %s is not ECDSA P-256", a.ID)
	}
	if !public.Equal(a.Certificate.PublicKey) {
		return nil, fmt.Errorf("ca: the key of authority %s does not match its certificate", a.ID)
	}
	extensions, err := commonExtensions(a.Certificate.SubjectKeyId)
	if err != nil {
		return nil, fmt.Errorf("ca: encode the extensions of authority %s: %w", a.ID, err)
	}
	return &signer{id: a.ID, certificate: a.Certificate, key: key, extensions: extensions}, nil
}
