package server

import (
	"context"
	"errors"
	"fmt"
	"net"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"troth.dev/troth/identity"
	"troth.dev/troth/internal/proc"
)

// ServeOperators answers the calls of operators on a Unix socket, without
// encryption and without tokens: whoever may connect to the socket may do all that
// operators may, under the name of uid:N, by the kernel's word. That is what
// development has; in a cluster operators come to the port of [Server.Serve]. It
// serves until ctx ends, and closes l.
func (s *Server) ServeOperators(ctx context.Context, l net.Listener) error {
	g := grpc.NewServer(
		grpc.Creds(localCredentials{}),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(s.stream),
	)
	s.registerForOperators(g)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		<-ctx.Done()
		g.Stop()
		return nil
	})
	group.Go(func() error {
		if err := g.Serve(l); !errors.Is(err, grpc.ErrServerStopped) {
			return err // nil if it was stopped while it served
		}
		return nil
	})
	return group.Wait()
}

// localCredentials are those of a Unix socket's peers: who they are, by the kernel.
type localCredentials struct{}

// local is who has connected to a Unix socket.
type local struct {
	credentials.CommonAuthInfo
	uid uint32
}

func (local) AuthType() string { return "unix" }

func (localCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	u, ok := raw.(*net.UnixConn)
	if !ok {
		return nil, nil, errors.New("server: operators without a token connect to a Unix socket")
	}
	peer, err := proc.Peer(u)
	if err != nil {
		return nil, nil, fmt.Errorf("server: who connects: %w", err)
	}
	return raw, local{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, peer.UID}, nil
}

func (localCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("server: these are the credentials of a server")
}

func (localCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix"}
}

func (c localCredentials) Clone() credentials.TransportCredentials { return c }

func (localCredentials) OverrideServerName(string) error { return nil }

// caller is the operator at the other end of the socket.
func (l local) caller() identity.Caller {
	return identity.Caller{Kind: identity.Operator, User: fmt.Sprintf("uid:%d", l.uid)}
}
