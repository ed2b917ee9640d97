package identity

import (
	"errors"
	"net/netip"
	"time"
)

// PodReference names one pod, for one life of that pod.
type PodReference struct {
	Namespace, Name, UID string
}

// Pod is the API server's record of a pod, in so far as identity depends on it.
// A Pod is a snapshot and is never changed once it is shared.
type Pod struct {
	PodReference

	ServiceAccount    string
	ServiceAccountUID string // of the service account that has this name now; empty if there is none
	Node              Node   // zero before the pod is scheduled; Node.UID empty if the node has no record
	Phase             PodPhase
	DeletedAt         time.Time // when the pod's grace ends; zero while nobody has deleted it
	Addresses         []netip.Addr
	Labels            map[string]string
	ContainerPorts    []uint16 // that its containers declare for TCP, ascending
	HostNetwork       bool     // whether it shares its node's network: Addresses are the node's then
	HBONE             bool     // whether Istio's ambient mode takes HBONE for it
	// CertificateSigners are the signers of the certificates that its volumes project,
	// ascending.
	CertificateSigners []string
}

// Account returns the service account that the pod runs as.
func (p Pod) Account() ServiceAccount {
	return ServiceAccount{Namespace: p.Namespace, Name: p.ServiceAccount}
}

// PodPhase is where a pod is in its life.
type PodPhase int

// The phases of a pod's life that an identity depends on.
const (
	PodPhaseUnknown PodPhase = iota
	PodPending
	PodRunning
	PodFinished // succeeded or failed
)

// Live returns nil if the pod may hold an identity at the time now, and
// [ErrPodFinished] or [ErrPodDeleted] if not. A pod whose deletion was asked for
// is live until its grace ends: it still serves, and has to be able to renew.
func (p Pod) Live(now time.Time) error {
	switch {
	case !p.DeletedAt.IsZero() && !now.Before(p.DeletedAt):
		return ErrPodDeleted
	case p.Phase == PodPending, p.Phase == PodRunning:
		return nil
	default:
		return ErrPodFinished
	}
}

// Why a pod has no identity. Whoever looks pods up returns them, wrapped or not.
var (
	// ErrPodNotFound says that the API server, asked just now, has no pod of
	// that name: either it is gone, or it is not there yet.
	ErrPodNotFound = errors.New("no such pod")
	// ErrPodReplaced says that the pod of that name is another one: its UID
	// differs.
	ErrPodReplaced = errors.New("the pod was replaced by another of the same name")
	// ErrPodFinished says that the pod has succeeded, failed, or is of a phase
	// that nobody knows.
	ErrPodFinished = errors.New("the pod has finished")
	// ErrPodDeleted says that the pod was deleted and its grace has ended.
	ErrPodDeleted = errors.New("the pod was deleted")
)
