package e2e_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"

	"troth.dev/troth/api"
	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/storage/sqlite"
)

// client speaks to the server as package api lets it: with a token, an SVID, or
// nothing. It may be used from many goroutines.
type client struct {
	address string
	trusted *x509bundle.Bundle
	bundles x509bundle.Source // in its place, if it is there
	key     *ecdsa.PrivateKey
	csr     []byte // proves key
}

func (p *plane) client(t *testing.T) *client {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return &client{address: p.address, trusted: p.trusted(t), key: key, csr: csr}
}

// withToken returns a connection whose calls present a token. The caller closes
// it.
func (c *client) withToken(token string) (*grpc.ClientConn, error) {
	bundles := c.bundles
	if bundles == nil {
		bundles = c.trusted
	}
	return api.Dial(api.Config{
		Address: c.address, TrustDomain: trustDomain, Bundles: bundles,
		Token: func() (string, error) { return token, nil },
	})
}

// withSVID returns a connection that presents an SVID. The caller closes it.
func (c *client) withSVID(svid *x509svid.SVID) (*grpc.ClientConn, error) {
	return api.Dial(api.Config{Address: c.address, TrustDomain: trustDomain, Bundles: c.trusted, SVID: svid})
}

// attest returns the SVID that the server gives to the agent whose token this is.
func (c *client) attest(ctx context.Context, token string) (*x509svid.SVID, error) {
	conn, err := c.withToken(token)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	response, err := trothv1.NewAttestationServiceClient(conn).AttestAgent(ctx,
		&trothv1.AttestAgentRequest{Csr: c.csr}, grpc.WaitForReady(true))
	if err != nil {
		return nil, err
	}
	chain, err := parse(response.GetSvid())
	if err != nil {
		return nil, err
	}
	id, _, err := x509svid.Verify(chain, c.trusted)
	return &x509svid.SVID{ID: id, Certificates: chain, PrivateKey: c.key}, err
}

// issue asks for the SVIDs of pods; nil stands for whoever asks.
func (c *client) issue(ctx context.Context, conn *grpc.ClientConn, pods ...*trothv1.PodReference) ([]*trothv1.X509SVIDResult, error) {
	request := &trothv1.IssueX509SVIDsRequest{}
	for _, pod := range pods {
		request.Items = append(request.Items, &trothv1.X509SVIDRequest{Pod: pod, Csr: c.csr})
	}
	response, err := trothv1.NewSVIDServiceClient(conn).IssueX509SVIDs(ctx, request, grpc.WaitForReady(true))
	if err == nil && len(response.GetResults()) != len(pods) {
		err = fmt.Errorf("%d results for %d requests", len(response.GetResults()), len(pods))
	}
	return response.GetResults(), err
}

func reference(pod *corev1.Pod) *trothv1.PodReference {
	return &trothv1.PodReference{
		Uid: string(pod.UID), Namespace: pod.Namespace, Name: pod.Name, ServiceAccount: pod.Spec.ServiceAccountName,
	}
}

// parse returns the certificates of an SVID, of which there is at least one.
func parse(svid *trothv1.X509SVID) ([]*x509.Certificate, error) {
	var chain []*x509.Certificate
	for _, der := range svid.GetCertificates() {
		certificate, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		chain = append(chain, certificate)
	}
	if len(chain) == 0 {
		return nil, fmt.Errorf("an SVID of %q without a certificate", svid.GetSpiffeId())
	}
	return chain, nil
}

// serial spells a serial number as the ledger does.
func serial(certificate *x509.Certificate) string { return certificate.SerialNumber.Text(16) }

// answer is what became of a call, or of one item of a batch.
type answer struct {
	ID     string     // of the SVID; empty if refused
	Code   codes.Code // OK if not refused
	Reason string
	Retry  bool // whether it was said when to try again
}

// answerTo returns the answer in the only result of a call, or in its error.
func answerTo(results []*trothv1.X509SVIDResult, err error) answer {
	if err != nil || len(results) == 0 {
		return refusal(err)
	}
	return result(results[0])
}

func result(r *trothv1.X509SVIDResult) answer {
	if refused := r.GetRefusal(); refused != nil {
		return answer{
			Code: codes.Code(refused.GetCode()), Reason: refused.GetReason(),
			Retry: refused.GetRetryAfter().AsDuration() > 0,
		}
	}
	// The certificate says who it is for, not what is written beside it.
	chain, err := parse(r.GetSvid())
	if err != nil || len(chain[0].URIs) != 1 {
		return answer{Code: codes.Unknown, Reason: fmt.Sprintf("not an SVID: %v", err)}
	}
	return answer{ID: chain[0].URIs[0].String()}
}

func refusal(err error) answer {
	st := status.Convert(err)
	a := answer{Code: st.Code(), Reason: st.Message()}
	for _, detail := range st.Details() {
		switch d := detail.(type) {
		case *errdetails.ErrorInfo:
			a.Reason = d.GetReason()
		case *errdetails.RetryInfo:
			a.Retry = d.GetRetryDelay().AsDuration() > 0
		}
	}
	return a
}

// ledger ends the server and opens what it has recorded.
func (p *plane) ledger(t *testing.T) *sqlite.Store {
	t.Helper()
	p.server.stop(t)
	store, err := sqlite.Open(t.Context(), sqlite.Config{Path: p.database})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	return store
}

// bounded returns a context that ends before a test that hangs would.
func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}
