// Package identity says who is who: how a Kubernetes service account and a node
// agent are spelled as SPIFFE IDs, what is recorded about a pod, and who a
// caller of the control plane was proved to be.
//
// Start with [ServiceAccount.ID], [Agent.ID] and [Caller]. The two spellings
// cannot collide: a workload's path begins with "/ns/", an agent's with
// "/troth/". All of it is data: nothing here reads a network, a clock or a file.
package identity

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// ServiceAccount names a Kubernetes service account.
type ServiceAccount struct {
	Namespace, Name string
}

// ID returns the SPIFFE ID of the workloads that run as the service account,
// spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/NAME. It fails if a name is none that
// Kubernetes would give.
func (sa ServiceAccount) ID(td spiffeid.TrustDomain) (spiffeid.ID, error) {
	if err := sa.check(); err != nil {
		return spiffeid.ID{}, err
	}
	return spiffeid.FromSegments(td, "ns", sa.Namespace, "sa", sa.Name)
}

// ParseServiceAccount returns the service account that id stands for. It is the
// inverse of [ServiceAccount.ID] and refuses every other ID.
func ParseServiceAccount(id spiffeid.ID) (ServiceAccount, error) {
	segments := strings.Split(strings.TrimPrefix(id.Path(), "/"), "/")
	if len(segments) != 4 || segments[0] != "ns" || segments[2] != "sa" {
		return ServiceAccount{}, fmt.Errorf("identity: %q is not the ID of a service account", id)
	}
	sa := ServiceAccount{Namespace: segments[1], Name: segments[3]}
	if err := sa.check(); err != nil {
		return ServiceAccount{}, err
	}
	return sa, nil
}

// ParseServiceAccountName reads NAMESPACE/NAME, the way in which flags name a
// service account.
func ParseServiceAccountName(s string) (ServiceAccount, error) {
	namespace, name, _ := strings.Cut(s, "/")
	sa := ServiceAccount{Namespace: namespace, Name: name}
	if err := sa.check(); err != nil {
		return ServiceAccount{}, err
	}
	return sa, nil
}

// String returns NAMESPACE/NAME.
func (sa ServiceAccount) String() string { return sa.Namespace + "/" + sa.Name }

func (sa ServiceAccount) check() error {
	if !isLabel(sa.Namespace) {
		return fmt.Errorf("identity: namespace %q is not a DNS label (RFC 1123)", sa.Namespace)
	}
	if !isSubdomain(sa.Name) {
		return fmt.Errorf("identity: service account %q is not a DNS subdomain (RFC 1123)", sa.Name)
	}
	return nil
}

// Node is a Kubernetes node, for one life of that node.
type Node struct {
	Name, UID string
}

// Agent is the node agent that runs as one pod on one node. All of it is in the
// agent's SPIFFE ID, so that any replica of the server can check, with nothing
// but the certificate and the API server's record, that the agent still lives.
type Agent struct {
	Node    Node
	PodName string
	PodUID  string
}

// ID returns the agent's SPIFFE ID,
// spiffe://TRUST_DOMAIN/troth/agent/NODE/NODE_UID/POD/POD_UID.
func (a Agent) ID(td spiffeid.TrustDomain) (spiffeid.ID, error) {
	if err := a.check(); err != nil {
		return spiffeid.ID{}, err
	}
	return spiffeid.FromSegments(td, "troth", "agent", a.Node.Name, a.Node.UID, a.PodName, a.PodUID)
}

// ParseAgent returns the agent that id stands for. It is the inverse of
// [Agent.ID] and refuses every other ID.
func ParseAgent(id spiffeid.ID) (Agent, error) {
	segments := strings.Split(strings.TrimPrefix(id.Path(), "/"), "/")
	if len(segments) != 6 || segments[0] != "troth" || segments[1] != "agent" {
		return Agent{}, fmt.Errorf("identity: %q is not the ID of an agent", id)
	}
	a := Agent{
		Node:    Node{Name: segments[2], UID: segments[3]},
		PodName: segments[4],
		PodUID:  segments[5],
	}
	if err := a.check(); err != nil {
		return Agent{}, err
	}
	return a, nil
}

func (a Agent) check() error {
	switch {
	case !isSubdomain(a.Node.Name):
		return fmt.Errorf("identity: node %q is not a DNS subdomain (RFC 1123)", a.Node.Name)
	case !isSubdomain(a.PodName):
		return fmt.Errorf("identity: pod %q is not a DNS subdomain (RFC 1123)", a.PodName)
	case !isUID(a.Node.UID):
		return fmt.Errorf("identity: node UID %q is not a UID", a.Node.UID)
	case !isUID(a.PodUID):
		return fmt.Errorf("identity: pod UID %q is not a UID", a.PodUID)
	}
	return nil
}

// ServerID returns the SPIFFE ID of the control plane of a trust domain, which
// its clients demand: spiffe://TRUST_DOMAIN/troth/server.
func ServerID(td spiffeid.TrustDomain) (spiffeid.ID, error) {
	if td.IsZero() {
		return spiffeid.ID{}, errors.New("identity: no trust domain")
	}
	return spiffeid.FromSegments(td, "troth", "server")
}

// Kubernetes names namespaces by DNS labels, and service accounts, nodes and
// pods by DNS subdomains (apimachinery's validation of the same names). Both
// are valid SPIFFE path segments as they are (SPIFFE-ID §2.2), so that no
// escaping, and no collision, is possible.
var (
	labelPattern     = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	subdomainPattern = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	uidPattern       = regexp.MustCompile(`^[a-zA-Z0-9][-a-zA-Z0-9]{0,63}$`)
)

func isLabel(s string) bool     { return labelPattern.MatchString(s) }
func isSubdomain(s string) bool { return len(s) <= 253 && subdomainPattern.MatchString(s) }
func isUID(s string) bool       { return uidPattern.MatchString(s) }
