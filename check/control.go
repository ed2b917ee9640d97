package check

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"troth.dev/troth/api"
	trothv1 "troth.dev/troth/api/troth/v1"
)

// control is what the control plane is asked. Each read has a connection of its own: one
// that fails says nothing about the others.
func (c *collector) control() []read {
	if c.config.Server == nil {
		c.s.Served = Unread[Served](ErrNoServer)
		c.s.Status = Unread[*trothv1.AuthorityStatus](ErrNoServer)
		c.s.Peers = Unread[*trothv1.ListPlaintextPeersResponse](ErrNoServer)
		return nil
	}
	return []read{
		{"the served bundle", func(ctx context.Context) { c.s.Served = fact(c.served(ctx)) }},
		{"the authorities", func(ctx context.Context) {
			c.s.Status = fact(ask(*c.config.Server, func(conn *grpc.ClientConn) (*trothv1.AuthorityStatus, error) {
				response, err := trothv1.NewAuthorityServiceClient(conn).GetAuthorityStatus(ctx, &trothv1.GetAuthorityStatusRequest{})
				return response.GetStatus(), err
			}))
		}},
		{"plaintext peers", func(ctx context.Context) {
			c.s.Peers = fact(ask(*c.config.Server, func(conn *grpc.ClientConn) (*trothv1.ListPlaintextPeersResponse, error) {
				return trothv1.NewPolicyServiceClient(conn).ListPlaintextPeers(ctx, &trothv1.ListPlaintextPeersRequest{})
			}))
		}},
	}
}

// ask makes one call to the control plane.
func ask[T any](config api.Config, call func(*grpc.ClientConn) (T, error)) (T, error) {
	conn, err := api.Dial(config)
	if err != nil {
		var zero T
		return zero, err
	}
	defer conn.Close()
	value, err := call(conn)
	if err != nil {
		return value, fmt.Errorf("the control plane says %s: %s", status.Code(err), status.Convert(err).Message())
	}
	return value, nil
}

// served asks for the bundle as anybody may, without the operator's token: what is wrong
// with the token is found by the other calls.
func (c *collector) served(ctx context.Context) (Served, error) {
	config := *c.config.Server
	config.Token = nil
	var by peer.Peer
	response, err := ask(config, func(conn *grpc.ClientConn) (*trothv1.GetBundleResponse, error) {
		return trothv1.NewBundleServiceClient(conn).GetBundle(ctx, &trothv1.GetBundleRequest{}, grpc.Peer(&by))
	})
	if err != nil {
		return Served{}, err
	}
	s := Served{Revision: response.GetBundle().GetRevision()}
	for _, a := range response.GetBundle().GetX509Authorities() {
		certificate, err := x509.ParseCertificate(a.GetCertificate())
		if err != nil {
			return Served{}, fmt.Errorf("the served bundle: %w", err)
		}
		s.Authorities = append(s.Authorities, certificate)
	}
	info, ok := by.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return Served{}, errors.New("the server showed no certificate")
	}
	s.Certificate = info.State.PeerCertificates[0]
	return s, nil
}
