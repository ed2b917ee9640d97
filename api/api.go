// Package api is what every Go client of Troth's control plane must get right:
// [Dial] connects to a server that proves itself by the trust bundle, and
// [TokenFile] presents a token that is rotated under way.
//
// The protocol itself is in package trothv1, below this one. What it means is
// said in the .proto files.
package api

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"troth.dev/troth/handshake"
	"troth.dev/troth/identity"
)

// Config says whom to connect to, and as whom.
type Config struct {
	// Address is the server's HOST:PORT, or any other target that gRPC resolves.
	// Required.
	Address string
	// TrustDomain is the server's. Required.
	TrustDomain spiffeid.TrustDomain
	// Bundles verify the server, on each new connection. Required: there is no
	// way to connect to a server that one does not trust.
	Bundles x509bundle.Source
	// SVID, if it is there, is presented on each new connection.
	SVID x509svid.Source
	// Token, if it is there, is asked before each call for the token to present.
	Token func() (string, error)
}

// Dial returns a client connection that connects on its first use, over TLS 1.3
// and only to the trust domain's server, [identity.ServerID]. The caller closes
// it.
func Dial(c Config) (*grpc.ClientConn, error) {
	if c.Address == "" || c.Bundles == nil {
		return nil, errors.New("api: Address and Bundles are required")
	}
	if c.SVID != nil && c.Token != nil {
		return nil, errors.New("api: a call presents an SVID or a token, not both")
	}
	server, err := identity.ServerID(c.TrustDomain)
	if err != nil {
		return nil, err
	}
	config := &tls.Config{
		MinVersion: tls.VersionTLS13,
		// SPIFFE verification, by ID and bundle, takes the place of host names.
		// VerifyConnection runs on resumed sessions too.
		InsecureSkipVerify: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			peer, err := handshake.Verify(state.PeerCertificates, c.Bundles, time.Now())
			if err != nil {
				return fmt.Errorf("api: the server at %q: %w", c.Address, err)
			}
			if peer.ID != server {
				return fmt.Errorf("api: the server at %q is %q, not %q", c.Address, peer.ID, server)
			}
			return nil
		},
	}
	if c.SVID != nil {
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			svid, err := c.SVID.GetX509SVID()
			if err != nil {
				return nil, fmt.Errorf("api: own SVID: %w", err)
			}
			certificate := &tls.Certificate{PrivateKey: svid.PrivateKey, Leaf: svid.Certificates[0]}
			for _, each := range svid.Certificates {
				certificate.Certificate = append(certificate.Certificate, each.Raw)
			}
			return certificate, nil
		}
	}
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(credentials.NewTLS(config)),
		// A server that vanished is noticed within half a minute. The server
		// permits a ping every ten seconds.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 15 * time.Second, Timeout: 10 * time.Second}),
		// A server that is back is found again in seconds: left to itself, the
		// connection would wait for up to two minutes, whoever asks.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 250 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 5 * time.Second},
			MinConnectTimeout: 10 * time.Second,
		}),
		grpc.WithNoProxy(),
	}
	if c.Token != nil {
		options = append(options, grpc.WithPerRPCCredentials(bearer(c.Token)))
	}
	return grpc.NewClient(c.Address, options...)
}

// bearer presents what the function returns (RFC 6750 §2.1).
type bearer func() (string, error)

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	token, err := b()
	if err != nil {
		return nil, fmt.Errorf("api: own token: %w", err)
	}
	return map[string]string{"authorization": "Bearer " + token}, nil
}

// RequireTransportSecurity keeps the token off every connection that is not TLS.
func (bearer) RequireTransportSecurity() bool { return true }

// TokenFile returns a function that reads the token in the file anew at each
// call, because the kubelet replaces a projected token before it expires.
func TokenFile(path string) func() (string, error) {
	const limit = 16 << 10
	return func() (string, error) {
		f, err := os.Open(path)
		if err != nil {
			return "", err
		}
		defer f.Close()
		token, err := io.ReadAll(io.LimitReader(f, limit+1))
		if err != nil {
			return "", err
		}
		if len(token) == 0 || len(token) > limit {
			return "", fmt.Errorf("token file %q has %d bytes or more; a token has 1 to %d", path, len(token), limit)
		}
		return strings.TrimSpace(string(token)), nil
	}
}
