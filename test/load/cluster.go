package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"math/big"
	"net/url"
	"time"

	"github.com/google/uuid"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"

	"troth.dev/troth/api"
	"troth.dev/troth/identity"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/kube/directory"
	"troth.dev/troth/policy"
)

var (
	trustDomain   = spiffeid.RequireTrustDomainFromString("load.troth.test")
	agentsAccount = identity.ServiceAccount{Namespace: "troth-system", Name: "troth-agent"}
)

// cluster holds the pods of a simulated cluster, which never change. It is what
// server.Pods asks for.
type cluster struct {
	byUID     map[string]identity.Pod
	onNode    map[string]*latest.Value[[]policy.Assignment]
	synced    chan struct{} // closed from the start
	agents    []agent       // without SVIDs
	agentPods []identity.Pod
	directory *directory.Index
}

// agent is one agent, and what it needs to call a server.
type agent struct {
	Identity identity.Agent
	Pods     []identity.Pod // those of its node that it asks for
	Key      []byte         // PKCS #8
	Chain    [][]byte       // DER
}

func newCluster(nodes, podsPerNode int) *cluster {
	c := &cluster{
		byUID:  make(map[string]identity.Pod),
		onNode: make(map[string]*latest.Value[[]policy.Assignment]),
		synced: make(chan struct{}),

		directory: directory.New(directory.Config{Agents: agentsAccount}),
	}
	close(c.synced)
	for n := range nodes {
		node := identity.Node{Name: fmt.Sprintf("node-%d.load.troth.test", n), UID: uuid.NewString()}
		own := newPod(agentsAccount, fmt.Sprintf("troth-agent-%d", n), node)
		pods := []identity.Pod{own}
		for p := range podsPerNode {
			account := identity.ServiceAccount{Namespace: "shop", Name: fmt.Sprintf("service-%d", p)}
			pods = append(pods, newPod(account, fmt.Sprintf("service-%d-%d", p, n), node))
		}
		for _, pod := range pods {
			c.byUID[pod.UID] = pod
		}
		var onNode []policy.Assignment
		for _, pod := range pods {
			onNode = append(onNode, policy.Assignment{Pod: pod, Policy: &policy.Effective{Mode: policy.Permissive}})
		}
		c.onNode[node.Name] = latest.New(onNode)
		c.agentPods = append(c.agentPods, own)
		c.agents = append(c.agents, agent{
			Identity: identity.Agent{Node: node, PodName: own.Name, PodUID: own.UID},
			Pods:     pods[1:],
		})
	}
	return c
}

func newPod(account identity.ServiceAccount, name string, node identity.Node) identity.Pod {
	return identity.Pod{
		PodReference:      identity.PodReference{Namespace: account.Namespace, Name: name, UID: uuid.NewString()},
		ServiceAccount:    account.Name,
		ServiceAccountUID: uuid.NewString(),
		Node:              node,
		Phase:             identity.PodRunning,
	}
}

func (c *cluster) Pod(_ context.Context, ref identity.PodReference) (identity.Pod, error) {
	pod, ok := c.byUID[ref.UID]
	if !ok {
		return identity.Pod{}, identity.ErrPodNotFound
	}
	return pod, nil
}

func (c *cluster) OnNode(node string) (*latest.Value[[]policy.Assignment], func()) {
	return c.onNode[node], func() {}
}

// Directory has nobody: the pods have no addresses.
func (c *cluster) Directory(node string) *directory.Reader { return c.directory.Reader(node) }

func (c *cluster) Of(_ identity.ServiceAccount, yield func(identity.Pod)) {
	for _, p := range c.agentPods {
		yield(p)
	}
}

func (c *cluster) Occupied(node string) bool { return c.onNode[node] != nil }

func (c *cluster) Synced() <-chan struct{} { return c.synced }

// withSVIDs returns the cluster's agents, each with a key and the chain that
// issue returns for it.
func (c *cluster) withSVIDs(issue func(id spiffeid.ID, key *ecdsa.PrivateKey) ([][]byte, error)) ([]agent, error) {
	var agents []agent
	for _, a := range c.agents {
		id, err := a.Identity.ID(trustDomain)
		if err != nil {
			return nil, err
		}
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		if a.Chain, err = issue(id, key); err != nil {
			return nil, err
		}
		if a.Key, err = x509.MarshalPKCS8PrivateKey(key); err != nil {
			return nil, err
		}
		agents = append(agents, a)
	}
	return agents, nil
}

// dial returns a connection of an agent of the server's, by mutual TLS.
func (p *process) dial(a agent) (*grpc.ClientConn, error) {
	bundle, err := p.bundle()
	if err != nil {
		return nil, err
	}
	svid, err := x509svid.ParseRaw(a.Chain[0], a.Key)
	if err != nil {
		return nil, err
	}
	return api.Dial(api.Config{Address: p.Address, TrustDomain: trustDomain, Bundles: bundle, SVID: svid})
}

func (p *process) bundle() (*x509bundle.Bundle, error) {
	bundle := x509bundle.New(trustDomain)
	for _, der := range p.Authorities {
		certificate, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		bundle.AddX509Authority(certificate)
	}
	return bundle, nil
}

// authority is a bare X.509 authority.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

func newAuthority() (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	keyID := sha256.Sum256(spki)
	template := &x509.Certificate{
		SerialNumber: randomSerial(),
		SubjectKeyId: keyID[:20],
		NotBefore:    time.Now().Add(-time.Minute),
		NotAfter:     time.Now().Add(24 * time.Hour),
		URIs:         []*url.URL{trustDomain.ID().URL()},
		KeyUsage:     x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		IsCA:         true, BasicConstraintsValid: true,
	}
	template.Subject.CommonName, template.Subject.SerialNumber = "Authority", hex.EncodeToString(keyID[:20])
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	certificate, err := x509.ParseCertificate(der)
	return &authority{certificate, key}, err
}

// issue returns an SVID, in DER, with nothing but x509.CreateCertificate.
func (a *authority) issue(id *url.URL, public any) ([]byte, error) {
	now := time.Now()
	return x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: randomSerial(),
		NotBefore:    now.Add(-time.Minute),
		NotAfter:     now.Add(time.Hour),
		URIs:         []*url.URL{id},
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},

		BasicConstraintsValid: true,
	}, a.certificate, public, a.key)
}

func randomSerial() *big.Int {
	serial := make([]byte, 16)
	rand.Read(serial)
	return new(big.Int).SetBytes(serial)
}
