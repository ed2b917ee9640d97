package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/credentials"

	"troth.dev/troth/ca"
	"troth.dev/troth/handshake"
	"troth.dev/troth/identity"
)

// ownSVID is the server's own identity, issued like any other.
type ownSVID struct {
	id          spiffeid.ID
	issuer      *ca.Issuer
	certificate atomic.Pointer[tls.Certificate]
}

func newOwnSVID(td spiffeid.TrustDomain, issuer *ca.Issuer) (*ownSVID, error) {
	id, err := identity.ServerID(td)
	if err != nil {
		return nil, err
	}
	return &ownSVID{id: id, issuer: issuer}, nil
}

// renew replaces the certificate by a new one with a new key.
func (o *ownSVID) renew(ctx context.Context) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return err
	}
	results, err := o.issuer.Issue(ctx, ca.Request{ID: o.id, CSR: csr, Caller: "server"})
	if err != nil {
		return err
	}
	if err := results[0].Err; err != nil {
		return err
	}
	svid := results[0].SVID
	leaf, err := x509.ParseCertificate(svid.Certificates[0])
	if err != nil {
		return err
	}
	o.certificate.Store(&tls.Certificate{Certificate: svid.Certificates, PrivateKey: key, Leaf: leaf})
	return nil
}

// run renews when half of the time that is left to the certificate has passed, and
// at once when its authority is to sign no more; then it tries every few seconds
// while the old one serves.
func (o *ownSVID) run(ctx context.Context, log *slog.Logger) error {
	const retry = 5 * time.Second
	for {
		leaf := o.certificate.Load().Leaf
		// Not half of its life: NotBefore is backdated, and with a short life the
		// middle between the two has passed before the certificate is made.
		if !o.await(ctx, leaf, time.Until(leaf.NotAfter)/2) {
			return nil
		}
		for {
			err := o.renew(ctx)
			if ctx.Err() != nil {
				return nil //nolint:nilerr // the end that was asked for is no error
			}
			if err == nil {
				break
			}
			log.LogAttrs(ctx, slog.LevelError, "own SVID not renewed; the old one serves",
				slog.Time("not_after", leaf.NotAfter), slog.Any("err", err))
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(retry):
			}
		}
	}
}

// await returns true when the certificate is to be renewed: when the time is over,
// or another authority is active than that which signed it. It returns false if ctx
// ends first.
func (o *ownSVID) await(ctx context.Context, leaf *x509.Certificate, wait time.Duration) bool {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		set, changed := o.issuer.Authorities().Load()
		if active, ok := set.Active(); ok && active.ID != hex.EncodeToString(leaf.AuthorityKeyId) {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-timer.C:
			return true
		case <-changed:
		}
	}
}

// tls returns the credentials of the server's connections: TLS 1.3, its own SVID,
// and a client certificate that may be missing but must be good.
func (s *Server) tls() credentials.TransportCredentials {
	return credentials.NewTLS(&tls.Config{
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true,
		ClientAuth:             tls.RequestClientCert,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			certificate := s.own.certificate.Load()
			if !time.Now().Before(certificate.Leaf.NotAfter) {
				return nil, errors.New("server: own SVID has expired")
			}
			return certificate, nil
		},
		VerifyConnection: func(state tls.ConnectionState) error {
			if len(state.PeerCertificates) == 0 {
				return nil // a caller with a token, or with nothing
			}
			bundle, _ := s.Issuer.Bundle().Load()
			peer, err := handshake.Verify(state.PeerCertificates, bundle.X509Bundle(), time.Now())
			if err != nil {
				return err
			}
			if !peer.ID.MemberOf(s.TrustDomain) {
				return fmt.Errorf("server: a client of trust domain %q", peer.ID.TrustDomain())
			}
			return nil
		},
	})
}
