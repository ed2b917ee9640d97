package e2e_test

import (
	"crypto/rand"
	"fmt"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	corev1 "k8s.io/api/core/v1"

	"troth.dev/troth/test/apiserver"
)

// plane is the control plane of one test: troth-server, with a database of its
// own, and nodes with agents.
type plane struct {
	server   *process
	address  string // of the server, the same after a restart
	args     []string
	database string
	bundle   string // the file in which the server keeps the trust bundle
	shop     string // a namespace for the test's workloads
	agents   string // the agents' service account
}

// newPlane starts a server whose SVIDs have the given life, with more flags.
func newPlane(t *testing.T, life time.Duration, flags ...string) *plane {
	t.Helper()
	dir := t.TempDir()
	p := &plane{
		database: filepath.Join(dir, "troth.db"),
		bundle:   filepath.Join(dir, "bundle.pem"),
		shop:     cluster.CreateNamespace(t, "shop-"),
		agents:   agentAccount,
		// An address that nobody else uses, so that the port stays free while a
		// server that was killed has yet to be started again: connections to
		// other servers leave from 127.0.0.1.
		address: fmt.Sprintf("127.%d.%d.%d:0", 1+mathrand.N(254), mathrand.N(256), 1+mathrand.N(254)),
	}
	key := make([]byte, 32)
	rand.Read(key)
	keyFile := filepath.Join(dir, "key-encryption-key")
	if err := os.WriteFile(keyFile, key, 0o600); err != nil {
		t.Fatal(err)
	}
	pod := cluster.CreatePod(t, apiserver.Pod{
		Namespace: system, Name: "troth-server-", ServiceAccount: serverAccount, Node: cluster.CreateNode(t, "control-").Name,
	})
	p.args = append([]string{
		"-trust-domain=" + trustDomain.Name(),
		"-health=127.0.0.1:0",
		"-database=" + p.database,
		"-key-encryption-key=" + keyFile,
		"-bundle=" + p.bundle,
		"-kubeconfig=" + cluster.Kubeconfig(t, cluster.Bearer(cluster.AutomountToken(t, pod))),
		"-svid-life=" + life.String(),
	}, flags...)
	p.serve(t)
	eventually(t, "the trust bundle", func() bool {
		_, err := os.Stat(p.bundle)
		return err == nil
	})
	return p
}

// serve starts the server, at first or again.
func (p *plane) serve(t *testing.T) {
	t.Helper()
	p.server = startProgram(t, "troth-server", append(p.args, "-listen="+p.address)...)
	serving := await(t, p.server, "the server to serve", func(l logLine) bool { return l.Message == "serving" })
	p.address = serving.Address
}

// logLine is a line of a program's log.
type logLine struct {
	Message  string `json:"msg"`
	Address  string `json:"address"`
	SPIFFEID string `json:"spiffe_id"`
	Serial   string `json:"serial"`
	Node     string `json:"node"`
}

// issued returns what the server has issued for an identity on a node since it
// was started, by its audit log.
func (p *plane) issued(id, node string) []logLine {
	return written(p.server, func(l logLine) bool {
		return l.Message == "issued" && l.SPIFFEID == id && l.Node == node
	})
}

// trusted returns the trust bundle as the server publishes it.
func (p *plane) trusted(t *testing.T) *x509bundle.Bundle {
	t.Helper()
	bundle, err := x509bundle.Load(trustDomain, p.bundle)
	if err != nil {
		t.Fatal(err)
	}
	return bundle
}

// account creates a service account for workloads and returns its name.
func (p *plane) account(t *testing.T, name string) string {
	t.Helper()
	return cluster.CreateServiceAccount(t, p.shop, name).Name
}

// id returns the SPIFFE ID that a service account of the test's workloads is to
// have.
func (p *plane) id(account string) string {
	return fmt.Sprintf("spiffe://%s/ns/%s/sa/%s", trustDomain.Name(), p.shop, account)
}

// pod creates a running pod on a node.
func (p *plane) pod(t *testing.T, n *node, account string) *corev1.Pod {
	t.Helper()
	return cluster.CreatePod(t, apiserver.Pod{Namespace: p.shop, Name: account + "-", ServiceAccount: account, Node: n.name})
}

// node is one node, with the pod of its agent, whether that runs or not.
type node struct {
	name   string
	agent  *corev1.Pod
	token  string // the agent's
	socket string
	args   []string
	daemon *process // the agent, once started
}

// newNode creates a node and the pod of its agent.
func (p *plane) newNode(t *testing.T) *node {
	t.Helper()
	n := &node{name: cluster.CreateNode(t, "node-").Name}
	n.agent = cluster.CreatePod(t, apiserver.Pod{Namespace: system, Name: "troth-agent-", ServiceAccount: p.agents, Node: n.name, Labels: map[string]string{"troth.dev/capture": "enabled"}})
	n.token = cluster.Token(t, n.agent, trustDomain.IDString(), 10*time.Minute)
	dir := t.TempDir()
	n.socket = filepath.Join(dir, "run", "workload.sock")
	token := filepath.Join(dir, "token")
	if err := os.WriteFile(token, []byte(n.token), 0o600); err != nil {
		t.Fatal(err)
	}
	n.args = []string{
		"-trust-domain=" + trustDomain.Name(),
		"-server=" + p.address,
		"-bundle=" + p.bundle,
		"-token=" + token,
		"-socket=" + n.socket,
		"-health=127.0.0.1:0",
		"-admin=",
	}
	return n
}

// start starts the node's agent, at first or again.
func (n *node) start(t *testing.T) *node {
	t.Helper()
	n.daemon = startProgram(t, "troth-agent", n.args...)
	return n
}
