package server

import (
	"context"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/ca"
)

// refreshHint is for those who poll. Whoever watches hears at once.
const refreshHint = 5 * time.Minute

type bundleService struct {
	trothv1.UnimplementedBundleServiceServer
	server *Server
}

// GetBundle is specified in bundle.proto.
func (b *bundleService) GetBundle(_ context.Context, in *trothv1.GetBundleRequest) (*trothv1.GetBundleResponse, error) {
	if name := in.GetTrustDomain(); name != "" {
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return nil, refusals.invalidTrustDomain
		}
		if m := b.server.minter; m != nil && td == m.Rules.TrustDomain() {
			bundle, _ := m.Issuer.Bundle().Load()
			return &trothv1.GetBundleResponse{Bundle: bundleProto(bundle)}, nil
		}
		if td != b.server.TrustDomain {
			return nil, refusals.unknownTrustDomain
		}
	}
	bundle, _ := b.server.Issuer.Bundle().Load()
	return &trothv1.GetBundleResponse{Bundle: bundleProto(bundle)}, nil
}

// WatchBundles is specified in bundle.proto.
func (b *bundleService) WatchBundles(in *trothv1.WatchBundlesRequest, stream grpc.ServerStreamingServer[trothv1.WatchBundlesResponse]) error {
	sent := in.GetHaveRevisions()[b.server.TrustDomain.Name()]
	for {
		bundle, changed := b.server.Issuer.Bundle().Load()
		if bundle.Revision != sent {
			if err := stream.Send(&trothv1.WatchBundlesResponse{Bundles: []*trothv1.Bundle{bundleProto(bundle)}}); err != nil {
				return err
			}
			sent = bundle.Revision
		}
		select {
		case <-stream.Context().Done():
			return stream.Context().Err()
		case <-b.server.draining:
			return refusals.shuttingDown
		case <-changed:
		}
	}
}

func bundleProto(b ca.Bundle) *trothv1.Bundle {
	p := &trothv1.Bundle{
		TrustDomain: b.TrustDomain.Name(),
		Revision:    b.Revision,
		RefreshHint: durationpb.New(refreshHint),
	}
	for _, a := range b.Authorities {
		p.X509Authorities = append(p.X509Authorities, &trothv1.Authority{
			Id: a.ID, Certificate: a.Certificate.Raw, ReissueFrom: timeProto(a.ReissueFrom), ReissueBy: timeProto(a.ReissueBy),
		})
	}
	return p
}
