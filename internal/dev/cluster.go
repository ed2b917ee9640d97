package dev

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/uuid"

	"troth.dev/troth/agent/workload"
	"troth.dev/troth/identity"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/internal/proc"
	"troth.dev/troth/kube/directory"
	"troth.dev/troth/policy"
)

// Issuer is the "iss" of a Cluster's tokens. It is never looked up.
const Issuer = "https://cluster.dev.troth.invalid"

// RootNamespace is where policies for the whole mesh are, as in a cluster.
const RootNamespace = "istio-system"

// Agents returns the service account that node agents run as.
func Agents() identity.ServiceAccount {
	return identity.ServiceAccount{Namespace: "troth-system", Name: "troth-agent"}
}

// Cluster takes the place of Kubernetes on a laptop: it keeps a record of pods,
// all on one node, and of policies, signs service-account tokens for pods as an API
// server does, and knows which process stands for which pod. It is lost with the
// process.
type Cluster struct {
	node     identity.Node
	key      *ecdsa.PrivateKey
	keyID    string
	signer   jose.Signer
	synced   chan struct{} // closed from the start
	fallback identity.ServiceAccount
	// directory has the pods that have addresses. There are no Services.
	directory *directory.Index

	mu        sync.Mutex
	accounts  map[identity.ServiceAccount]string // their UIDs; guarded by mu, as is all below
	pods      map[string]identity.Pod            // by UID
	processes map[process]string                 // to pod UIDs
	policies  *policy.Assignments[string]        // by pod UID
	onNode    latest.Value[[]policy.Assignment]
}

// process is one life of a process: a PID alone comes again.
type process struct {
	pid     int32
	started uint64
}

// NewCluster returns a cluster without pods. Processes that stand for no pod get
// one of the fallback account when they ask for the first time, unless it is the
// zero ServiceAccount.
func NewCluster(fallback identity.ServiceAccount) (*Cluster, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	c := &Cluster{
		node:      identity.Node{Name: "localhost", UID: uuid.NewString()},
		key:       key,
		keyID:     uuid.NewString(),
		synced:    make(chan struct{}),
		fallback:  fallback,
		directory: directory.New(directory.Config{Agents: Agents()}),
		accounts:  make(map[identity.ServiceAccount]string),
		pods:      make(map[string]identity.Pod),
		processes: make(map[process]string),
		policies:  policy.NewAssignments[string](RootNamespace, nil),
	}
	close(c.synced)
	c.signer, err = jose.NewSigner(
		jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: c.keyID}},
		(&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return nil, err
	}
	return c, nil
}

// AddPod records a new running pod of the account and returns it. It has the label
// app, which is the account's name, and an agent's says that it captures.
func (c *Cluster) AddPod(account identity.ServiceAccount, name string) identity.Pod {
	c.mu.Lock()
	defer c.mu.Unlock()
	uid, ok := c.accounts[account]
	if !ok {
		uid = uuid.NewString()
		c.accounts[account] = uid
	}
	pod := identity.Pod{
		PodReference:      identity.PodReference{Namespace: account.Namespace, Name: name, UID: uuid.NewString()},
		ServiceAccount:    account.Name,
		ServiceAccountUID: uid,
		Node:              c.node,
		Phase:             identity.PodRunning,
		Labels:            map[string]string{"app": account.Name},
	}
	if account == Agents() {
		pod.Labels[identity.CaptureLabel] = "enabled"
	}
	c.setPod(pod)
	return pod
}

// SetAddresses gives a pod, if it is there, these addresses in the place of those that
// it had. A new pod has none.
func (c *Cluster) SetAddresses(uid string, addresses ...netip.Addr) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if pod, ok := c.pods[uid]; ok {
		pod.Addresses = addresses
		c.setPod(pod)
	}
}

// setPod records a pod. The caller holds mu.
func (c *Cluster) setPod(pod identity.Pod) {
	c.pods[pod.UID] = pod
	c.policies.SetWorkload(pod.UID, policy.Workload{Namespace: pod.Namespace, Labels: pod.Labels})
	c.publish()
}

// RemovePod forgets a pod. Its tokens and identities end with it.
func (c *Cluster) RemovePod(uid string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.removePod(uid)
	c.publish()
}

// removePod forgets a pod. The caller holds mu, and publishes.
func (c *Cluster) removePod(uid string) {
	delete(c.pods, uid)
	c.directory.RemovePod(time.Now(), uid)
	c.policies.RemoveWorkload(uid)
}

// SetPolicies makes these all the policies that there are.
func (c *Cluster) SetPolicies(policies []policy.PeerAuthentication) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.policies.ReplacePolicies(policies)
	c.publish()
}

// publish makes the pods known. The caller holds mu.
func (c *Cluster) publish() {
	pods := make([]policy.Assignment, 0, len(c.pods))
	for uid, p := range c.pods {
		effective := c.policies.Effective(uid)
		pods = append(pods, policy.Assignment{Pod: p, Policy: effective})
		c.directory.SetPod(time.Now(), p, effective)
	}
	slices.SortFunc(pods, func(a, b policy.Assignment) int { return cmp.Compare(a.Pod.UID, b.Pod.UID) })
	c.onNode.Set(pods)
}

// Pod returns the record of a pod, as server.Pods asks for it.
func (c *Cluster) Pod(_ context.Context, ref identity.PodReference) (identity.Pod, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if pod, ok := c.pods[ref.UID]; ok {
		return pod, nil
	}
	for _, pod := range c.pods {
		if pod.Namespace == ref.Namespace && pod.Name == ref.Name {
			return identity.Pod{}, identity.ErrPodReplaced
		}
	}
	return identity.Pod{}, identity.ErrPodNotFound
}

// OnNode returns the pods of a node; all are on the cluster's only one.
func (c *Cluster) OnNode(node string) (*latest.Value[[]policy.Assignment], func()) {
	if node != c.node.Name {
		return latest.New[[]policy.Assignment](nil), func() {}
	}
	return &c.onNode, func() {}
}

// Directory returns a reader of who is behind addresses. The caller closes it.
func (c *Cluster) Directory(node string) *directory.Reader { return c.directory.Reader(node) }

// Of calls yield with each pod that runs as the service account.
func (c *Cluster) Of(account identity.ServiceAccount, yield func(identity.Pod)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range c.pods {
		if p.Account() == account {
			yield(p)
		}
	}
}

// Occupied says whether the node has a pod.
func (c *Cluster) Occupied(node string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return node == c.node.Name && len(c.pods) > 0
}

// Synced returns a closed channel: there is nothing to wait for.
func (c *Cluster) Synced() <-chan struct{} { return c.synced }

// Token signs a token for a pod, with the claims of a projected one.
func (c *Cluster) Token(podUID, audience string, life time.Duration) (string, error) {
	c.mu.Lock()
	pod, ok := c.pods[podUID]
	c.mu.Unlock()
	if !ok {
		return "", identity.ErrPodNotFound
	}
	now := time.Now()
	type named struct {
		Name string `json:"name"`
		UID  string `json:"uid"`
	}
	payload, err := json.Marshal(map[string]any{
		"iss": Issuer,
		"sub": "system:serviceaccount:" + pod.Namespace + ":" + pod.ServiceAccount,
		"aud": []string{audience},
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(life).Unix(),
		"jti": uuid.NewString(),
		"kubernetes.io": map[string]any{
			"namespace":      pod.Namespace,
			"serviceaccount": named{pod.ServiceAccount, pod.ServiceAccountUID},
			"pod":            named{pod.Name, pod.UID},
			"node":           named{pod.Node.Name, pod.Node.UID},
		},
	})
	if err != nil {
		return "", err
	}
	signed, err := c.signer.Sign(payload)
	if err != nil {
		return "", err
	}
	return signed.CompactSerialize()
}

// Keys returns the JWKS by which the tokens are verified.
func (c *Cluster) Keys(context.Context) ([]byte, error) {
	return json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{
		{Key: c.key.Public(), KeyID: c.keyID, Algorithm: string(jose.ES256), Use: "sig"},
	}})
}

// Bind makes a process, and all that descend from it, stand for a pod. It fails
// if there is no such process.
func (c *Cluster) Bind(pid int32, podUID string) error {
	started, err := proc.Started(pid)
	if err != nil {
		return fmt.Errorf("dev: process %d: %w", pid, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.pods[podUID]; !ok {
		return identity.ErrPodNotFound
	}
	for p, uid := range c.processes { // those that have ended
		if now, err := proc.Started(p.pid); err != nil || now != p.started {
			delete(c.processes, p)
			c.removePod(uid)
		}
	}
	c.processes[process{pid, started}] = podUID
	c.publish()
	return nil
}

// PodOf returns the pod that a process stands for, itself or by the nearest of
// its ancestors that does.
func (c *Cluster) PodOf(peer workload.Peer) (string, error) {
	const generations = 64
	pid := peer.PID
	for range generations {
		stat, err := proc.StatOf(pid)
		if err != nil {
			return "", fmt.Errorf("dev: process %d: %w", pid, err)
		}
		c.mu.Lock()
		uid, ok := c.processes[process{pid, stat.Started}]
		c.mu.Unlock()
		if ok {
			return uid, nil
		}
		if pid = stat.Parent; pid <= 1 {
			break
		}
	}
	if c.fallback == (identity.ServiceAccount{}) {
		return "", fmt.Errorf("dev: process %d stands for no pod", peer.PID)
	}
	return c.fallbackPod(), nil
}

func (c *Cluster) fallbackPod() string {
	const name = "any-process"
	c.mu.Lock()
	for uid, pod := range c.pods {
		if pod.Name == name && pod.Account() == c.fallback {
			c.mu.Unlock()
			return uid
		}
	}
	c.mu.Unlock()
	return c.AddPod(c.fallback, name).UID
}
