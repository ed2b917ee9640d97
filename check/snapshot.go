package check

import (
	"crypto/x509"
	"errors"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/kube"
)

// Fact is something that was to be read: a value, or why there is none. The zero Fact
// was not read.
type Fact[T any] struct {
	value T
	err   error
	known bool
}

// Known returns the fact that something is value.
func Known[T any](value T) Fact[T] { return Fact[T]{value: value, known: true} }

// Unread returns the fact that something could not be read, because of err.
func Unread[T any](err error) Fact[T] { return Fact[T]{err: err} }

// Get returns what is known, or why it is not.
func (f Fact[T]) Get() (T, error) {
	switch {
	case f.known:
		return f.value, nil
	case f.err != nil:
		return f.value, f.err
	default:
		return f.value, errors.New("it was not read")
	}
}

// Snapshot is what is known of a cluster and of Troth in it, read once. [Collect] makes
// it. Of an object by its name, nil says that there is none.
type Snapshot struct {
	At      time.Time // by this machine's clock
	Before  bool      // an installation; what follows it is not read
	OnNode  bool      // whether the files of a node were read
	Version string    // of this program

	ServerNamespace, NodeNamespace string
	RootNamespace                  string // whose PeerAuthentications are for the whole mesh

	// TrustDomain is its name, as the caller or else the server's own flags say.
	TrustDomain Fact[string]

	// Kubernetes.
	APIServer       Fact[APIServer]
	Resources       Fact[map[string]bool] // that are served: GROUP/VERSION/RESOURCE
	TokenIssuer     Fact[string]          // "iss" of the API server's tokens, whose keys can be fetched
	NodeRestriction Fact[bool]            // whether a kubelet is kept from giving its node such a label
	Nodes           Fact[[]corev1.Node]
	NodeLeases      Fact[[]coordinationv1.Lease]
	Namespaces      Fact[[]corev1.Namespace]
	Mine            Fact[map[Right]bool] // what whoever asks may do

	// Troth's objects.
	Deployment      Fact[*appsv1.Deployment]
	DaemonSet       Fact[*appsv1.DaemonSet]
	Keepers         Fact[*appsv1.DaemonSet]
	Pods            Fact[[]corev1.Pod] // of Troth's two namespaces
	Budgets         Fact[[]policyv1.PodDisruptionBudget]
	Service         Fact[*corev1.Service]
	Endpoints       Fact[[]discoveryv1.EndpointSlice] // of the Service
	NetworkPolicies Fact[[]networkingv1.NetworkPolicy]
	KeySize         Fact[int]            // of the key-encryption key, in bytes; -1 if there is none
	ServerRights    Fact[map[Right]bool] // what the server's account may do, of what it has to
	AgentRights     Fact[map[Right]bool] // what the agents' account may do, of what it must not
	Admission       Fact[Admission]
	Published       Fact[[]Bundle]
	Publisher       Fact[*coordinationv1.Lease]
	Ledger          Fact[int] // how many ConfigMaps the store keeps
	Requests        Fact[[]certificatesv1.PodCertificateRequest]

	// Policies and whom they are for.
	Definition Fact[*Definition]
	Cluster    Fact[kube.Snapshot]

	// The control plane, as it says itself.
	Served Fact[Served]
	Status Fact[*trothv1.AuthorityStatus]
	Peers  Fact[*trothv1.ListPlaintextPeersResponse]

	// This node.
	Node Fact[Node]
}

// APIServer is what an API server says of itself.
type APIServer struct {
	Version string        // v1.37.2
	Ahead   time.Duration // its clock of ours, within a second or so
}

// Right is a verb on a resource, "list pods" or "sign signers.certificates.k8s.io".
type Right struct {
	Verb, Group, Resource, Subresource, Namespace, Name string
}

// String spells the right as people do.
func (r Right) String() string {
	text := r.Verb + " " + r.Resource
	if r.Subresource != "" {
		text += "/" + r.Subresource
	}
	if r.Group != "" {
		text += "." + r.Group
	}
	if r.Name != "" {
		text += " " + r.Name
	}
	if r.Namespace != "" {
		text += " in " + r.Namespace
	}
	return text
}

// Admission is the policies that the API server admits objects by.
type Admission struct {
	Policies []admissionv1.ValidatingAdmissionPolicy
	Bindings []admissionv1.ValidatingAdmissionPolicyBinding
}

// Bundle is a trust bundle that the server has published.
type Bundle struct {
	Where       string // the object
	Authorities []*x509.Certificate
}

// Definition is the CustomResourceDefinition of PeerAuthentication.
type Definition struct {
	Versions    []string // that are served
	Established bool
	Istio       bool // whether it is Istio's
}

// Served is what the control plane serves to anybody.
type Served struct {
	Authorities []*x509.Certificate
	Revision    uint64
	Certificate *x509.Certificate // the server's own
}

// Node is what lies on the node that this program runs on.
type Node struct {
	Conflist string   // the file that the container runtime uses; empty if there is none
	Plugins  []string // in its order
	Binary   bool     // whether the plugin's program is there
	Sockets  map[string]bool
}
