// Package payments is an example: a gRPC service that only the shop's frontend may
// call, by mutual TLS with SPIFFE identities. Its test takes it through the replacement
// of a root and through an expiry, in less than a second.
//
// It knows nothing of Troth. In production a [Source] is a workloadapi.X509Source, of
// whatever serves the SPIFFE Workload API there.
package payments

import (
	"context"
	"net"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffegrpc/grpccredentials"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Source is where a service's identity comes from. It is asked at each handshake, so
// that a renewed SVID and a new root are used at once.
type Source interface {
	x509svid.Source
	x509bundle.Source
}

// Serve answers the callers that l accepts, if they are the one given, until ctx ends.
func Serve(ctx context.Context, l net.Listener, source Source, caller spiffeid.ID) error {
	server := grpc.NewServer(grpc.Creds(
		grpccredentials.MTLSServerCredentials(source, source, tlsconfig.AuthorizeID(caller))))
	server.RegisterService(&service, nil)
	stop := context.AfterFunc(ctx, server.Stop)
	defer stop()
	return server.Serve(l)
}

// Client calls the service.
type Client struct{ connection *grpc.ClientConn }

// NewClient returns a client of the service at target, which has to be the one given.
// The caller closes it.
func NewClient(target string, source Source, server spiffeid.ID, options ...grpc.DialOption) (*Client, error) {
	options = append(options, grpc.WithTransportCredentials(
		grpccredentials.MTLSClientCredentials(source, source, tlsconfig.AuthorizeID(server))))
	connection, err := grpc.NewClient(target, options...)
	if err != nil {
		return nil, err
	}
	return &Client{connection}, nil
}

// Pay pays an invoice, and returns the receipt.
func (c *Client) Pay(ctx context.Context, invoice string) (receipt string, err error) {
	answer := new(wrapperspb.StringValue)
	err = c.connection.Invoke(ctx, "/shop.Payments/Pay", wrapperspb.String(invoice), answer)
	return answer.GetValue(), err
}

// Close closes the connection.
func (c *Client) Close() error { return c.connection.Close() }

// service is what protoc would make of
//
//	service Payments { rpc Pay(google.protobuf.StringValue) returns (google.protobuf.StringValue); }
var service = grpc.ServiceDesc{ //nolint:gochecknoglobals // it is generated code, but for its length
	ServiceName: "shop.Payments",
	HandlerType: (*any)(nil),
	Methods:     []grpc.MethodDesc{{MethodName: "Pay", Handler: pay}},
}

func pay(_ any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
	invoice := new(wrapperspb.StringValue)
	if err := decode(invoice); err != nil {
		return nil, err
	}
	caller, ok := grpccredentials.PeerIDFromContext(ctx)
	if !ok {
		return nil, status.Error(codes.Unauthenticated, "no SPIFFE ID")
	}
	return wrapperspb.String(invoice.GetValue() + " paid by " + caller.Path()), nil
}
