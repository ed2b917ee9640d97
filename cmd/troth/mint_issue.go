package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	"troth.dev/troth/api"
	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/ca"
	"troth.dev/troth/handshake"
	"troth.dev/troth/storage"
)

// mintKey is the key of an identity: ECDSA P-256, which costs the least of those
// that everybody reads.
type mintKey = *ecdsa.PrivateKey

// newMintKey makes a key and the request that proves it.
func newMintKey() (mintKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	return key, csr, err
}

// ephemeral is an authority for tests that lives as long as the process. Its key is
// in memory and its ledger is forgotten, which is as good as durable: nothing that
// it signed is of use to anybody who was not told by this very process.
type ephemeral struct {
	issuer *ca.Issuer
	keys   *memoryKeys
}

func openEphemeral(ctx context.Context, td spiffeid.TrustDomain, ttl time.Duration) (*ephemeral, error) {
	profile, err := ca.NewProfile(ca.ProfileConfig{Life: ttl})
	if err != nil {
		return nil, inputErrorf("--ttl: %w", err)
	}
	store := storage.NewMemory()
	keys := &memoryKeys{}
	issuer, err := ca.Open(ctx, ca.Config{
		TrustDomain: td, Keys: keys, Authorities: store, Ledger: store, Audit: slog.New(slog.DiscardHandler),
		Profile: profile, AuthorityLife: 4 * ttl, Test: true,
	})
	if err != nil {
		return nil, err
	}
	return &ephemeral{issuer: issuer, keys: keys}, nil
}

func (*ephemeral) close() {}

// issue splits the batch among the processors: an Issue signs one certificate after
// the other, and there is no disk whose flush they would share.
func (e *ephemeral) issue(ctx context.Context, ids []spiffeid.ID, csrs [][]byte) ([]chain, *x509bundle.Bundle, error) {
	chains := make([]chain, len(ids))
	var group errgroup.Group
	size := (len(ids)-1)/runtime.GOMAXPROCS(0) + 1
	for from := 0; from < len(ids); from += size {
		to := min(from+size, len(ids))
		group.Go(func() error {
			requests := make([]ca.Request, 0, to-from)
			for n := from; n < to; n++ {
				requests = append(requests, ca.Request{ID: ids[n], CSR: csrs[n], Caller: "mint"})
			}
			results, err := e.issuer.Issue(ctx, requests...)
			if err != nil {
				return err
			}
			for n, result := range results {
				if result.Err != nil {
					return fmt.Errorf("%q: %w", ids[from+n], result.Err)
				}
				chains[from+n] = chain{certificates: result.SVID.Certificates, until: result.SVID.NotAfter}
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, nil, err
	}
	bundle, _ := e.issuer.Bundle().Load()
	return chains, bundle.X509Bundle(), nil
}

// memoryKeys implements [ca.Keys] for authorities that die with the process. A
// handle is the number of the key.
type memoryKeys struct {
	mu   sync.Mutex
	made []crypto.Signer
}

// Create implements [ca.Keys].
func (k *memoryKeys) Create(context.Context) (crypto.Signer, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.made = append(k.made, key)
	return key, []byte(strconv.Itoa(len(k.made) - 1)), nil
}

// Open implements [ca.Keys].
func (k *memoryKeys) Open(_ context.Context, _ string, handle []byte) (crypto.Signer, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	n, err := strconv.Atoi(string(handle))
	if err != nil || n < 0 || n >= len(k.made) {
		return nil, errors.New("the key of another process")
	}
	return k.made[n], nil
}

// tokenVariable is where GitLab, and whoever else has the token in a variable, puts
// it.
const tokenVariable = "TROTH_TOKEN"

// mintPatience bounds the call: it signs 500 certificates at most.
const mintPatience = 30 * time.Second

// mintServer is the MintService of a server.
type mintServer struct {
	conn *grpc.ClientConn
	ttl  time.Duration
}

// dial checks the flags and returns the service that they describe. The token is
// fetched now, so that a job without one is told before keys are made.
func (f *mintFlags) dial(ctx context.Context) (*mintServer, error) {
	serverDomain, err := spiffeid.TrustDomainFromString(f.trustDomain)
	if err != nil {
		return nil, inputErrorf("--trust-domain: %w", err)
	}
	bundle, err := x509bundle.Load(serverDomain, f.bundle)
	if err != nil {
		return nil, err
	}
	token, err := f.fetchToken(ctx)
	if err != nil {
		return nil, err
	}
	conn, err := api.Dial(api.Config{
		Address: f.server, TrustDomain: serverDomain, Bundles: bundle,
		Token: func() (string, error) { return token, nil },
	})
	if err != nil {
		return nil, err
	}
	return &mintServer{conn: conn, ttl: f.ttl}, nil
}

func (f *mintFlags) fetchToken(ctx context.Context) (string, error) {
	switch {
	case f.github != "":
		return githubToken(ctx, f.github)
	case f.token != "":
		return api.TokenFile(f.token)()
	}
	token := strings.TrimSpace(os.Getenv(tokenVariable))
	if token == "" {
		return "", inputErrorf("no token: --token FILE, --github AUDIENCE, or the variable %s", tokenVariable)
	}
	return token, nil
}

func (s *mintServer) close() { s.conn.Close() }

// issue asks once. A token is good for one call, so that there is no second try.
func (s *mintServer) issue(ctx context.Context, ids []spiffeid.ID, csrs [][]byte) ([]chain, *x509bundle.Bundle, error) {
	request := &trothv1.MintX509SVIDsRequest{}
	for n, id := range ids {
		request.Items = append(request.Items, &trothv1.MintX509SVIDRequest{
			SpiffeId: id.String(), Csr: csrs[n], Ttl: durationpb.New(s.ttl),
		})
	}
	ctx, cancel := context.WithTimeout(ctx, mintPatience)
	defer cancel()
	response, err := trothv1.NewMintServiceClient(s.conn).MintX509SVIDs(ctx, request)
	if err != nil {
		return nil, nil, callError("mint", err)
	}
	if len(response.GetResults()) != len(ids) {
		return nil, nil, fmt.Errorf("the server has %d results for %d identities", len(response.GetResults()), len(ids))
	}
	if err := refusedItems(ids, response.GetResults()); err != nil {
		return nil, nil, err
	}
	bundle, err := bundleOf(response.GetBundle(), ids[0].TrustDomain())
	if err != nil {
		return nil, nil, err
	}
	chains := make([]chain, len(ids))
	err = inParallel(len(ids), func(n int) error {
		chains[n].certificates = response.GetResults()[n].GetSvid().GetCertificates()
		until, err := checkMinted(ids[n], csrs[n], chains[n].certificates, bundle)
		if err != nil {
			return fmt.Errorf("what the server sent for %q is of no use: %w", ids[n], err)
		}
		chains[n].until = until
		return nil
	})
	return chains, bundle, err
}

// refusedItems returns what the server says of those that it refused, of ten at most.
func refusedItems(ids []spiffeid.ID, results []*trothv1.X509SVIDResult) error {
	const most = 10
	var refused []string
	for n, result := range results {
		switch {
		case result.GetRefusal() != nil:
			refused = append(refused, fmt.Sprintf("  %s: %s: %s", ids[n], printable(result.GetRefusal().GetReason()), printable(result.GetRefusal().GetMessage())))
		case result.GetSvid() == nil:
			refused = append(refused, fmt.Sprintf("  %s: an answer that this program does not know", ids[n]))
		}
	}
	if len(refused) == 0 {
		return nil
	}
	text := fmt.Sprintf("the server refuses %d of %d identities, and nothing is written:\n", len(refused), len(ids))
	if more := len(refused) - most; more > 0 {
		refused = append(refused[:most], fmt.Sprintf("  and %d more", more))
	}
	return errors.New(text + strings.Join(refused, "\n"))
}

func bundleOf(sent *trothv1.Bundle, td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	if sent.GetTrustDomain() != td.Name() {
		return nil, fmt.Errorf("the server sent the bundle of %q, not of %q", sent.GetTrustDomain(), td)
	}
	bundle := x509bundle.New(td)
	for _, authority := range sent.GetX509Authorities() {
		certificate, err := x509.ParseCertificate(authority.GetCertificate())
		if err != nil {
			return nil, fmt.Errorf("the server's bundle: %w", err)
		}
		bundle.AddX509Authority(certificate)
	}
	return bundle, nil
}

// checkMinted verifies a chain as a peer would, and that it is for the identity and
// the key that were asked for. It returns its end.
func checkMinted(id spiffeid.ID, csr []byte, der [][]byte, bundle *x509bundle.Bundle) (time.Time, error) {
	certificates := make([]*x509.Certificate, len(der))
	for n, each := range der {
		var err error
		if certificates[n], err = x509.ParseCertificate(each); err != nil {
			return time.Time{}, err
		}
	}
	peer, err := handshake.VerifyAcceptingTests(certificates, bundle, time.Now())
	if err != nil {
		return time.Time{}, err
	}
	if peer.ID != id {
		return time.Time{}, fmt.Errorf("it is for %q", peer.ID)
	}
	request, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return time.Time{}, err
	}
	if !bytes.Equal(request.RawSubjectPublicKeyInfo, certificates[0].RawSubjectPublicKeyInfo) {
		return time.Time{}, errors.New("it is for another key")
	}
	return certificates[0].NotAfter, nil
}
