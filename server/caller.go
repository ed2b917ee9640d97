package server

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"net"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"troth.dev/troth/identity"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/policy"
)

// connectionCredentials parse what a connection proves once, when it is made.
type connectionCredentials struct {
	credentials.TransportCredentials
	perConnection rate.Limit
}

// connection is what is known about a connection. It is immutable.
type connection struct {
	credentials.TLSInfo
	presented bool           // whether the client presented a certificate
	id        spiffeid.ID    // of the certificate
	agent     identity.Agent // zero if id is not an agent's
	authority string         // who signed the certificate
	notAfter  time.Time      // of the certificate
	unproven  *rate.Limiter
}

func (c *connectionCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, auth, err := c.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	info, ok := auth.(credentials.TLSInfo)
	if !ok {
		conn.Close()
		return nil, nil, errors.New("server: a connection without TLS")
	}
	known := connection{TLSInfo: info, unproven: rate.NewLimiter(c.perConnection, 2*int(c.perConnection))}
	if certificates := info.State.PeerCertificates; len(certificates) > 0 {
		// The handshake has verified it.
		known.presented = true
		known.id, known.authority, known.notAfter = leafFacts(certificates[0])
		if agent, err := identity.ParseAgent(known.id); err == nil {
			known.agent = agent
		}
	}
	return conn, known, nil
}

func (c *connectionCredentials) Clone() credentials.TransportCredentials {
	return &connectionCredentials{TransportCredentials: c.TransportCredentials.Clone(), perConnection: c.perConnection}
}

func leafFacts(leaf *x509.Certificate) (id spiffeid.ID, authority string, notAfter time.Time) {
	if len(leaf.URIs) == 1 {
		id, _ = spiffeid.FromURI(leaf.URIs[0]) // the zero ID is nobody's
	}
	return id, hex.EncodeToString(leaf.AuthorityKeyId), leaf.NotAfter
}

// caller settles who makes a call: by certificate or by token, and by the API
// server's present record of the pod behind it.
func (s *Server) caller(ctx context.Context) (identity.Caller, error) {
	conn, raw, err := presented(ctx)
	switch {
	case err != nil:
		return identity.Caller{}, err
	case conn.presented:
		return s.agentCaller(ctx, conn)
	case raw != "":
		return s.tokenCaller(ctx, raw)
	default:
		return identity.Caller{}, refusals.noCredentials
	}
}

// agentCaller settles that the certificate of a connection is that of an agent
// who lives. What the handshake found may have changed since.
func (s *Server) agentCaller(ctx context.Context, conn connection) (identity.Caller, error) {
	if conn.agent == (identity.Agent{}) {
		return identity.Caller{}, refusals.notAnAgent
	}
	if err := s.limitCaller(conn.agent); err != nil {
		return identity.Caller{}, err
	}
	caller := identity.Caller{Kind: identity.AgentCaller, ID: conn.id, Agent: conn.agent, Until: conn.notAfter}
	if err := s.svidHolds(conn); err != nil {
		return identity.Caller{}, err
	}
	var err error
	caller.Pod, err = s.agentPod(ctx, conn.agent)
	return caller, err
}

// svidHolds returns an error unless the certificate is in force and its
// authority still trusted.
func (s *Server) svidHolds(conn connection) error {
	if !time.Now().Before(conn.notAfter) {
		return refusals.svidExpired
	}
	bundle, _ := s.Issuer.Bundle().Load()
	for _, a := range bundle.Authorities {
		if a.ID == conn.authority {
			return nil
		}
	}
	return refusals.svidAuthority
}

// agentPod returns the pod that the agent runs as, if it lives and is still what
// the agent's SVID was issued for.
func (s *Server) agentPod(ctx context.Context, agent identity.Agent) (identity.Pod, error) {
	ref := identity.PodReference{Namespace: s.Agents.Namespace, Name: agent.PodName, UID: agent.PodUID}
	pod, err := s.Pods.Pod(ctx, ref)
	if err != nil {
		return identity.Pod{}, &callerPodError{err}
	}
	if err := pod.Live(time.Now()); err != nil {
		return identity.Pod{}, &callerPodError{err}
	}
	if pod.PodReference != ref || pod.Account() != s.Agents || pod.Node != agent.Node {
		return identity.Pod{}, refusals.agentChanged
	}
	return pod, nil
}

// tokenCaller settles whose token it is. The cheap checks come first: what is
// not signed by the issuer costs nobody a look-up.
func (s *Server) tokenCaller(ctx context.Context, raw string) (identity.Caller, error) {
	if err := s.limitUnproven(ctx); err != nil {
		return identity.Caller{}, err
	}
	claims, err := s.Tokens.Verify(ctx, raw)
	s.metrics.verified(err)
	if err != nil {
		return identity.Caller{}, err
	}
	if s.ReviewToken != nil {
		if err := s.ReviewToken(ctx, raw); err != nil {
			return identity.Caller{}, &reviewError{err}
		}
	}
	pod, err := s.Pods.Pod(ctx, claims.Pod)
	if err != nil {
		return identity.Caller{}, &callerPodError{err}
	}
	if err := claims.Matches(pod, time.Now()); err != nil {
		return identity.Caller{}, err
	}
	caller := identity.Caller{Kind: identity.WorkloadCaller, Pod: pod, Until: claims.Expiry}
	if pod.Account() == s.Agents {
		caller.Kind = identity.AgentCandidate
		caller.Agent = identity.Agent{Node: pod.Node, PodName: pod.Name, PodUID: pod.UID}
		return caller, nil
	}
	caller.ID, err = pod.Account().ID(s.TrustDomain)
	return caller, err
}

// operatorCaller settles that the caller is a user who has the right.
func (s *Server) operatorCaller(ctx context.Context, right Right) (identity.Caller, error) {
	if p, ok := peer.FromContext(ctx); ok {
		if at, ok := p.AuthInfo.(local); ok {
			return at.caller(), nil
		}
	}
	conn, raw, err := presented(ctx)
	switch {
	case err != nil:
		return identity.Caller{}, err
	case conn.presented, s.Operator == nil:
		return identity.Caller{}, refusals.methodNotPermitted
	case raw == "":
		return identity.Caller{}, refusals.noCredentials
	}
	if err := s.limitUnproven(ctx); err != nil {
		return identity.Caller{}, err
	}
	user, err := s.Operator(ctx, raw, right)
	if err != nil {
		return identity.Caller{}, &reviewError{err}
	}
	return identity.Caller{Kind: identity.Operator, User: user}, nil
}

// isLocal reports whether a call came to the socket of [Server.ServeOperators].
func isLocal(ctx context.Context) bool {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return false
	}
	_, ok = p.AuthInfo.(local)
	return ok
}

// presented returns by what a call wants to be known: the certificate of its
// connection, a token, or neither.
func presented(ctx context.Context) (conn connection, raw string, err error) {
	if conn, err = connectionOf(ctx); err != nil {
		return connection{}, "", err
	}
	if raw, err = bearerToken(ctx); err != nil {
		return connection{}, "", err
	}
	if conn.presented && raw != "" {
		return connection{}, "", refusals.ambiguousCaller
	}
	return conn, raw, nil
}

func connectionOf(ctx context.Context) (connection, error) {
	if p, ok := peer.FromContext(ctx); ok {
		if conn, ok := p.AuthInfo.(connection); ok {
			return conn, nil
		}
	}
	return connection{}, errors.New("server: a call on a connection that was not authenticated")
}

// agentStream is what every stream of an agent looks at for as long as it is open.
type agentStream struct {
	server  *Server
	caller  identity.Caller
	conn    connection
	pods    *latest.Value[[]policy.Assignment] // of the agent's node, the agent among them
	expired *time.Timer                        // fires when the agent's SVID ends
	release func()
}

// openAgentStream waits until all pods are known. Whoever gets an agentStream closes it.
func (s *Server) openAgentStream(ctx context.Context) (*agentStream, error) {
	conn, err := connectionOf(ctx)
	if err != nil {
		return nil, err
	}
	select {
	case <-s.Pods.Synced():
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-s.draining:
		return nil, refusals.shuttingDown
	}
	a := &agentStream{server: s, caller: identity.FromContext(ctx), conn: conn}
	a.pods, a.release = s.Pods.OnNode(a.caller.Agent.Node.Name)
	a.expired = time.NewTimer(time.Until(a.caller.Until))
	return a, nil
}

// stands returns why the agent may have no more, or nil.
func (a *agentStream) stands(ctx context.Context) error {
	if err := a.server.svidHolds(a.conn); err != nil {
		return err
	}
	_, err := a.server.agentPod(ctx, a.caller.Agent)
	return err
}

func (a *agentStream) close() {
	a.release()
	a.expired.Stop()
}

// bearerToken returns the token in the call's metadata, or the empty string.
func bearerToken(ctx context.Context) (string, error) {
	values := metadata.ValueFromIncomingContext(ctx, "authorization")
	switch len(values) {
	case 0:
		return "", nil
	case 1:
		scheme, raw, ok := strings.Cut(values[0], " ")
		if !ok || !strings.EqualFold(scheme, "bearer") || raw == "" {
			return "", refusals.malformedAuthorization
		}
		return raw, nil
	default:
		return "", refusals.malformedAuthorization
	}
}
