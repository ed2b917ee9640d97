package agent

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"troth.dev/troth/api"
	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/identity"
)

const (
	// callPatience bounds every unary call.
	callPatience = 15 * time.Second
	// refusedPause is how long a session lasts at least if the server refuses it.
	refusedPause = 5 * time.Second
)

// session is the time during which the agent holds one SVID of its own. What it
// learns outlives it.
type session struct {
	conn  *grpc.ClientConn // closed by hold
	begun time.Time
	plan  plan      // of the SVID
	pause time.Time // when to renew at the earliest; zero for no pause
	// asked says that a server was there to be verified, and that the stream has not
	// come as far as a connection since.
	asked atomic.Bool
	// refused is closed when the server no longer accepts the SVID, or can no longer
	// be verified.
	refused     chan struct{}
	refusedOnce sync.Once
}

func (s *session) refuse() { s.refusedOnce.Do(func() { close(s.refused) }) }

// converse keeps a session with the control plane until ctx ends.
func (a *Agent) converse(ctx context.Context) error {
	s, err := a.attest(ctx)
	for err == nil {
		s, err = a.hold(ctx, s)
	}
	if ctx.Err() != nil {
		return nil //nolint:nilerr // the end that was asked for is no error
	}
	return err
}

// hold works in a session until it is time for the next, and returns that one.
// The old session goes on while the next is being attested.
func (a *Agent) hold(ctx context.Context, s *session) (*session, error) {
	a.identities.reached()
	work, stop := context.WithCancel(ctx)
	var parts sync.WaitGroup
	parts.Go(func() { a.watch(work, s) })
	parts.Go(func() { a.refresh(work, s) })
	parts.Go(func() { a.report(work, s) })
	if a.directory != nil {
		parts.Go(func() { a.resolve(work, s) })
	}
	defer func() {
		stop()
		parts.Wait()
		if err := s.conn.Close(); err != nil {
			a.config.Log.LogAttrs(ctx, slog.LevelDebug, "connection not closed", slog.Any("err", err))
		}
		a.identities.setOwn(s.plan.leaf, false)
	}()
	if err := a.awaitRenewal(ctx, s); err != nil {
		return nil, err
	}
	return a.attest(ctx)
}

// awaitRenewal returns when the session's SVID is to be replaced, or fails when ctx
// ends.
func (a *Agent) awaitRenewal(ctx context.Context, s *session) error {
	for {
		_, changed := a.identities.changed.Load()
		at, why := a.identities.newestTrust().due(s.plan)
		if s.pause.After(at) {
			at = s.pause
		}
		if !at.After(time.Now()) {
			a.metrics.replaced.WithLabelValues(string(why)).Inc()
			return nil
		}
		again := time.NewTimer(napUntil(at))
		select {
		case <-ctx.Done():
			again.Stop()
			return ctx.Err()
		case <-s.refused:
			again.Stop()
			// A replica that lags behind hands out what the others refuse. The next
			// SVID may be such a one too: no more than one every few seconds.
			return sleep(ctx, time.Until(s.begun.Add(refusedPause)))
		case <-changed:
		case <-again.C:
		}
		again.Stop()
	}
}

// attest proves the agent to the control plane by its token, as often as it
// takes, and returns a session. It fails only when ctx ends.
func (a *Agent) attest(ctx context.Context) (*session, error) {
	for failures := 0; ; {
		s, err := a.attestOnce(ctx, failures)
		if err == nil {
			a.metrics.attestations.WithLabelValues("OK").Inc()
			return s, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		failures++
		reason, retryAfter := explain(err)
		a.metrics.attestations.WithLabelValues(reason).Inc()
		wait := max(retryAfter, backoff(failures, a.identities.left(time.Now())))
		a.config.Log.LogAttrs(ctx, slog.LevelWarn, "not attested; what is here keeps serving",
			slog.String("reason", reason), slog.Duration("retry_in", wait), slog.Any("err", err))
		if err := sleep(ctx, wait); err != nil {
			return nil, err
		}
	}
}

func (a *Agent) attestOnce(ctx context.Context, failures int) (*session, error) {
	trusted, err := a.trusted(failures)
	if err != nil {
		return nil, err
	}
	key, csr, err := newKey()
	if err != nil {
		return nil, err
	}
	conn, err := api.Dial(api.Config{
		Address: a.config.Server, TrustDomain: a.config.TrustDomain, Bundles: trusted, Token: a.config.Token,
	})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	call, cancel := context.WithTimeout(ctx, callPatience)
	defer cancel()
	response, err := trothv1.NewAttestationServiceClient(conn).AttestAgent(call, &trothv1.AttestAgentRequest{Csr: csr})
	if err != nil {
		return nil, err
	}
	now := time.Now()
	trust, err := parseTrust(a.config.TrustDomain, response.GetBundle(), now)
	if err != nil {
		return nil, err
	}
	own, err := newSVID(key, func(id spiffeid.ID) error {
		_, err := identity.ParseAgent(id)
		return err
	}, response.GetSvid().GetCertificates(), trust.bundle)
	if err != nil {
		return nil, err
	}
	if err := a.identities.setTrust(trust); err != nil {
		return nil, err
	}
	s := &session{begun: now, plan: newPlan(own, response.GetSvid().Place, now), refused: make(chan struct{})}
	s.pause = a.identities.newestTrust().lag(s.plan, now)
	s.conn, err = api.Dial(api.Config{
		Address: a.config.Server, TrustDomain: a.config.TrustDomain, Bundles: newestBundle{a, s}, SVID: own,
	})
	if err == nil {
		a.identities.setOwn(s.plan.leaf, true)
	}
	return s, err
}

// trusted is what the server is verified by: the newest bundle that it sent, and
// the mounted one before there is any and at every other attempt, in case that
// the agent was away for a whole rotation.
func (a *Agent) trusted(failures int) (*x509bundle.Bundle, error) {
	if t := a.identities.newestTrust(); t != nil && failures%2 == 0 {
		return t.bundle, nil
	}
	bundle, err := a.config.Anchor()
	if err != nil {
		return nil, fmt.Errorf("agent: the mounted trust bundle: %w", err)
	}
	return bundle, nil
}

// newestBundle is the bundle that was sent last, whenever a session asks for it.
type newestBundle struct {
	a *Agent
	s *session
}

func (n newestBundle) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	n.s.asked.Store(true)
	t := n.a.identities.newestTrust()
	if t == nil || t.bundle.TrustDomain() != td {
		return nil, fmt.Errorf("agent: no bundle of trust domain %q", td)
	}
	return t.bundle, nil
}

// watch follows the node's stream until ctx ends, and opens it again when it
// breaks, with what it holds.
func (a *Agent) watch(ctx context.Context, s *session) {
	for failures := 0; ctx.Err() == nil; {
		received, err := a.watchOnce(ctx, s, failures)
		if received {
			failures = 0
		}
		if ctx.Err() != nil {
			return
		}
		failures++
		reason, retryAfter := explain(err)
		a.metrics.streamBreaks.WithLabelValues(reason).Inc()
		a.config.Log.LogAttrs(ctx, slog.LevelWarn, "the node's stream broke; what is here keeps serving",
			slog.String("reason", reason), slog.Any("err", err))
		// No connection came of it, and a server was there to be verified: the bundle
		// may be older than the server's authority. That is for the attestation to
		// find out, which has another bundle to try.
		unverified := reason == codes.Unavailable.String() && s.asked.Load()
		if status.Code(err) == codes.Unauthenticated || unverified {
			s.refuse()
		}
		if sleep(ctx, max(retryAfter, backoff(failures, a.identities.left(time.Now())))) != nil {
			return
		}
	}
}

func (a *Agent) watchOnce(ctx context.Context, s *session, failures int) (received bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	held := a.identities.summary()
	var server peer.Peer // known when the stream has ended, if it had a connection
	defer func() {
		if server.Addr != nil {
			s.asked.Store(false)
		}
	}()
	stream, err := trothv1.NewNodeServiceClient(s.conn).Watch(ctx, &trothv1.WatchRequest{
		HaveBundleRevisions:   map[string]uint64{a.config.TrustDomain.Name(): held.bundleRevision},
		HaveWorkloadsRevision: held.workloadsRevision,
	}, grpc.Peer(&server))
	if err != nil {
		return false, err
	}
	a.metrics.connected.Set(1)
	defer a.metrics.connected.Set(0)
	for {
		message, err := stream.Recv()
		if err != nil {
			return received, err
		}
		// After one failure it may be a server that breaks every stream.
		if !received && failures > 1 {
			a.identities.reached()
		}
		received = true
		switch part := message.GetPart().(type) {
		case *trothv1.WatchResponse_Bundles:
			err = a.takeBundles(part.Bundles)
		case *trothv1.WatchResponse_Workloads:
			err = a.takeWorkloads(part.Workloads)
		case *trothv1.WatchResponse_Probe:
			a.identities.setProbe(newProbe(part.Probe))
		default:
			// A newer server sends what this agent does not know.
		}
		if err != nil {
			return received, err
		}
	}
}

// resolve keeps the directory current until ctx ends.
func (a *Agent) resolve(ctx context.Context, s *session) {
	for failures := 0; ctx.Err() == nil; {
		began := time.Now()
		err := a.directory.Run(ctx, s.conn)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > time.Minute {
			failures = 0
		}
		failures++
		reason, retryAfter := explain(err)
		a.config.Log.LogAttrs(ctx, slog.LevelWarn, "the directory's stream broke; what is known keeps serving",
			slog.String("reason", reason), slog.Any("err", err))
		if sleep(ctx, max(retryAfter, backoff(failures, math.MaxInt64))) != nil {
			return
		}
	}
}

func (a *Agent) takeBundles(in *trothv1.Bundles) error {
	for _, b := range in.GetBundles() {
		if b.GetTrustDomain() != a.config.TrustDomain.Name() {
			continue
		}
		t, err := parseTrust(a.config.TrustDomain, b, time.Now())
		if err != nil {
			return err
		}
		return a.identities.setTrust(t)
	}
	return fmt.Errorf("agent: bundles without that of %q", a.config.TrustDomain)
}

func (a *Agent) takeWorkloads(in *trothv1.Workloads) error {
	pods := make([]pod, 0, len(in.GetWorkloads()))
	for _, w := range in.GetWorkloads() {
		id, err := spiffeid.FromString(w.GetSpiffeId())
		if err != nil {
			return fmt.Errorf("agent: workload %q: %w", w.GetPodUid(), err)
		}
		pods = append(pods, pod{
			PodReference:   identity.PodReference{Namespace: w.GetNamespace(), Name: w.GetName(), UID: w.GetPodUid()},
			serviceAccount: w.GetServiceAccount(),
			id:             id,
			policy:         parsePolicy(w.GetPolicy()),
			capture:        w.GetCapture(),
		})
	}
	a.identities.setPods(in.GetRevision(), pods)
	return nil
}

// maxBatch is the most that IssueX509SVIDs takes.
const maxBatch = 100

// refresh asks for SVIDs when they are due, until ctx ends.
func (a *Agent) refresh(ctx context.Context, s *session) {
	for ctx.Err() == nil {
		_, changed := a.identities.changed.Load()
		pods, next := a.identities.due(time.Now())
		if len(pods) > 0 {
			a.request(ctx, s, pods)
			continue
		}
		wake := time.NewTimer(napUntil(next))
		select {
		case <-ctx.Done():
		case <-changed:
		case <-wake.C:
		}
		wake.Stop()
	}
}

// request asks for one SVID for each pod's identity, in one call. What fails is
// asked for again later.
func (a *Agent) request(ctx context.Context, s *session, pods []pod) {
	keys := make([]crypto.Signer, len(pods))
	in := &trothv1.IssueX509SVIDsRequest{}
	for n, p := range pods {
		var csr []byte
		var err error
		if keys[n], csr, err = newKey(); err != nil {
			a.issueFailed(ctx, pods, err)
			return
		}
		in.Items = append(in.Items, &trothv1.X509SVIDRequest{
			Pod: &trothv1.PodReference{Uid: p.UID, Namespace: p.Namespace, Name: p.Name, ServiceAccount: p.serviceAccount},
			Csr: csr,
		})
	}
	call, cancel := context.WithTimeout(ctx, callPatience)
	defer cancel()
	out, err := trothv1.NewSVIDServiceClient(s.conn).IssueX509SVIDs(call, in)
	if err == nil && len(out.GetResults()) != len(pods) {
		err = fmt.Errorf("agent: %d results for %d requests", len(out.GetResults()), len(pods))
	}
	if err != nil {
		a.issueFailed(ctx, pods, err)
		return
	}
	for n, result := range out.GetResults() {
		if refused := result.GetRefusal(); refused != nil {
			a.metrics.issued.WithLabelValues(refused.GetReason()).Inc()
			a.config.Log.LogAttrs(ctx, slog.LevelWarn, "no SVID", slog.String("spiffe_id", pods[n].id.String()),
				slog.String("pod", pods[n].Namespace+"/"+pods[n].Name), slog.String("reason", refused.GetReason()))
			a.identities.failed(pods[n].id, time.Now(), refused.GetRetryAfter().AsDuration())
			continue
		}
		if err := a.take(keys[n], pods[n], result.GetSvid()); err != nil {
			a.issueFailed(ctx, pods[n:n+1], err)
			continue
		}
		a.metrics.issued.WithLabelValues("OK").Inc()
	}
}

func (a *Agent) take(key crypto.Signer, p pod, issued *trothv1.X509SVID) error {
	t := a.identities.newestTrust()
	if t == nil {
		return errors.New("agent: an SVID before the bundle")
	}
	svid, err := newSVID(key, func(id spiffeid.ID) error {
		if id != p.id {
			return fmt.Errorf("agent: asked for the SVID of %q and got one of %q", p.id, id)
		}
		return nil
	}, issued.GetCertificates(), t.bundle)
	if err != nil {
		return err
	}
	if why := a.identities.put(svid, issued.Place, time.Now()); why != "" {
		a.metrics.replaced.WithLabelValues(string(why)).Inc()
	}
	return nil
}

func (a *Agent) issueFailed(ctx context.Context, pods []pod, err error) {
	if ctx.Err() != nil {
		return // the session that follows asks at once for what this one was asking for
	}
	reason, retryAfter := explain(err)
	a.metrics.issued.WithLabelValues(reason).Add(float64(len(pods)))
	for _, p := range pods {
		a.identities.failed(p.id, time.Now(), retryAfter)
	}
	a.config.Log.LogAttrs(ctx, slog.LevelWarn, "no SVIDs; those that are here keep serving",
		slog.Int("identities", len(pods)), slog.String("reason", reason), slog.Any("err", err))
}

// newKey makes a key and the request that proves its possession.
func newKey() (crypto.Signer, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	return key, csr, err
}

// explain returns the reason that the server gave, or the status code's name, and
// how long it asked to wait.
func explain(err error) (reason string, retryAfter time.Duration) {
	st, ok := status.FromError(err)
	if !ok {
		return "LOCAL", 0
	}
	reason = st.Code().String()
	for _, detail := range st.Details() {
		switch d := detail.(type) {
		case *errdetails.ErrorInfo:
			if d.GetDomain() == "troth.dev" {
				reason = d.GetReason()
			}
		case *errdetails.RetryInfo:
			retryAfter = d.GetRetryDelay().AsDuration()
		}
	}
	return reason, min(retryAfter, time.Minute)
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
