package ca

import (
	"crypto/x509"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Meant is what a certificate should have become: what Lint compares it with.
type Meant struct {
	ID                  spiffeid.ID
	SPKI                []byte
	NotBefore, NotAfter time.Time
	Authority           *x509.Certificate
}

// Lint is what stands between the template and the signature.
func Lint(c *x509.Certificate, m Meant) error {
	l := &leaf{request: Request{ID: m.ID}, spki: m.SPKI, notBefore: m.NotBefore, notAfter: m.NotAfter}
	return lint(c, l, m.Authority)
}

// DecodeSet reads the stored form of a set.
func DecodeSet(data []byte) (Set, error) { return decodeSet(data) }

// EncodeSet is the inverse of DecodeSet.
func EncodeSet(s Set) ([]byte, error) { return s.encode() }
