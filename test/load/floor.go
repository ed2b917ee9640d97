package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/url"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/identity"
	"troth.dev/troth/internal/latest"
)

// floor is the least that does the job: grpc-go as it comes, mutual TLS 1.3 by
// crypto/tls, and then, for a certificate, the verification of the request and
// x509.CreateCertificate, and for a bundle, one message to each stream. It knows
// no callers, records nothing and looks at nothing that it signs.
type floor struct {
	trothv1.UnimplementedSVIDServiceServer
	trothv1.UnimplementedNodeServiceServer
	own    *authority
	server tls.Certificate
	fleet  []agent
	bundle latest.Value[*trothv1.WatchResponse]
}

func openFloor(ctx context.Context, s spec) (target, error) {
	f := &floor{}
	var err error
	if f.own, err = newAuthority(); err != nil {
		return nil, err
	}
	f.fleet, err = newCluster(s.Nodes, s.PodsPerNode).withSVIDs(func(id spiffeid.ID, key *ecdsa.PrivateKey) ([][]byte, error) {
		leaf, err := f.own.issue(id.URL(), key.Public())
		return [][]byte{leaf}, err
	})
	if err != nil {
		return nil, err
	}
	id, err := identity.ServerID(trustDomain)
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	leaf, err := f.own.issue(id.URL(), key.Public())
	if err != nil {
		return nil, err
	}
	f.server = tls.Certificate{Certificate: [][]byte{leaf}, PrivateKey: key}
	return f, f.push(ctx)
}

func (f *floor) agents() []agent       { return f.fleet }
func (f *floor) authorities() [][]byte { return [][]byte{f.own.certificate.Raw} }
func (f *floor) close() error          { return nil }

// push replaces the bundle by one of 2 KB.
func (f *floor) push(context.Context) error {
	content := make([]byte, 2000)
	rand.Read(content)
	f.bundle.Set(&trothv1.WatchResponse{Part: &trothv1.WatchResponse_Bundles{Bundles: &trothv1.Bundles{
		Bundles: []*trothv1.Bundle{{X509Authorities: []*trothv1.Authority{{Certificate: content}}}},
	}}})
	return nil
}

// prepare is a push: there is nothing else that has to arrive.
func (f *floor) prepare(ctx context.Context) error { return f.push(ctx) }

// awaitProof returns at once: whoever measures has counted the reports.
func (f *floor) awaitProof(context.Context) error { return nil }

func (f *floor) abort(ctx context.Context) error { return f.push(ctx) }

func (f *floor) serve(ctx context.Context, l net.Listener) error {
	roots := x509.NewCertPool()
	roots.AddCert(f.own.certificate)
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true,
		ClientAuth:             tls.RequireAndVerifyClientCert,
		ClientCAs:              roots,
		Certificates:           []tls.Certificate{f.server},
	})))
	trothv1.RegisterSVIDServiceServer(g, f)
	trothv1.RegisterNodeServiceServer(g, f)
	stop := context.AfterFunc(ctx, g.Stop)
	defer stop()
	return g.Serve(l)
}

// IssueX509SVIDs verifies and signs.
func (f *floor) IssueX509SVIDs(_ context.Context, in *trothv1.IssueX509SVIDsRequest) (*trothv1.IssueX509SVIDsResponse, error) {
	out := &trothv1.IssueX509SVIDsResponse{}
	for _, item := range in.GetItems() {
		request, err := x509.ParseCertificateRequest(item.GetCsr())
		if err != nil {
			return nil, err
		}
		if err := request.CheckSignature(); err != nil {
			return nil, err
		}
		id := &url.URL{Scheme: "spiffe", Host: trustDomain.Name(), Path: "/ns/shop/sa/" + item.GetPod().GetServiceAccount()}
		leaf, err := f.own.issue(id, request.PublicKey)
		if err != nil {
			return nil, err
		}
		svid := &trothv1.X509SVID{Certificates: [][]byte{leaf}}
		out.Results = append(out.Results, &trothv1.X509SVIDResult{Result: &trothv1.X509SVIDResult_Svid{Svid: svid}})
	}
	return out, nil
}

// Watch sends each bundle as it is.
func (f *floor) Watch(_ *trothv1.WatchRequest, stream grpc.ServerStreamingServer[trothv1.WatchResponse]) error {
	for {
		bundle, changed := f.bundle.Load()
		if err := stream.Send(bundle); err != nil {
			return err
		}
		select {
		case <-stream.Context().Done():
			return stream.Context().Err()
		case <-changed:
		}
	}
}

// Report looks at nothing.
func (f *floor) Report(context.Context, *trothv1.ReportRequest) (*trothv1.ReportResponse, error) {
	return &trothv1.ReportResponse{}, nil
}
