// Package cni is what the CNI plugin and the agent of a node say to each other, over
// a Unix socket: a pod's network is being set up, capture its traffic before its
// containers start; it is being checked; it is gone.
//
// Start with [Client], which is the plugin's end, and [Serve], which is the agent's,
// with a [Handler] behind it. The wire is in wire.go.
//
// One connection carries one request and one answer. The pod's network namespace
// travels as a descriptor, not as a path: what the agent works on is what the plugin
// was given, whoever has mounted what in the meantime. Both ends have deadlines, and a
// plugin that ends takes its request with it.
//
// It guarantees that an Add which returns nil was answered so by a handler that has
// seen this namespace: no answer, half an answer and one that is not understood are
// errors. It refuses callers and agents that are not root, requests that are too
// large, malformed or of another version, a descriptor where none belongs or none
// where one does, and one that is not a network namespace or is the agent's own.
// The descriptors of what it refuses are closed.
package cni

import (
	"context"
	"fmt"
	"os"
)

// Socket is where the agent listens unless it is told otherwise.
const Socket = "/run/troth/cni.sock"

// Pod is a pod at the moment its network is set up, as the container runtime tells
// the plugin of it.
type Pod struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	// UID is the pod's UID in the API server; of a static pod it is the hash that
	// the kubelet knows it by. It is never empty but in a Delete.
	UID string `json:"uid"`
	// Sandbox is the runtime's ID of this network, CNI_CONTAINERID. A pod whose
	// sandbox died has another one under the same UID.
	Sandbox   string `json:"sandbox"`
	Interface string `json:"interface"` // CNI_IFNAME
	// Netns is the path of the network namespace, as the runtime's host sees it;
	// empty in a Delete if it is gone.
	Netns string `json:"netns"`
}

// Attachment is one network of one sandbox, as a runtime names it when it says which
// are still there.
type Attachment struct {
	Sandbox   string `json:"sandbox"`
	Interface string `json:"interface"`
}

// Handler does what the plugin asks for. [Serve] calls it from many goroutines at
// once, for the same pod too. ctx ends when the plugin has hung up, whose deadline it
// carries in that way, or when Serve is to end.
//
// A *[Error] goes to the plugin as it is. Any other error goes as one with the reason
// INTERNAL that can be tried again.
type Handler interface {
	// Add returns nil when capture of the pod's traffic stands, or the pod is not to
	// be captured. netns is the pod's namespace, and is closed after Add returns.
	Add(ctx context.Context, pod Pod, netns *os.File) error
	// Check returns nil if what Add did still stands.
	Check(ctx context.Context, pod Pod, netns *os.File) error
	// Delete forgets a sandbox. One that is not known is no error.
	Delete(ctx context.Context, pod Pod) error
	// Collect forgets what is not in keep and is gone.
	Collect(ctx context.Context, keep []Attachment) error
	// Status returns nil if an Add would be served now.
	Status(ctx context.Context) error
}

// Error is why the agent did not do what was asked for.
type Error struct {
	Reason  string // upper case
	Message string
	Retry   bool // whether the same request may succeed later
}

// The reasons that this package gives. A [Handler] has its own.
const (
	ReasonInvalid   = "INVALID_REQUEST"   // malformed, too large, or of another version
	ReasonNamespace = "INVALID_NAMESPACE" // not a network namespace, or the agent's own
	ReasonInternal  = "INTERNAL"          // the handler failed without a reason of its own
	ReasonEnding    = "AGENT_ENDING"      // the agent is shutting down
)

// Error returns the reason and the message.
func (e *Error) Error() string { return fmt.Sprintf("%s: %s", e.Reason, e.Message) }

func invalid(format string, args ...any) *Error {
	return &Error{Reason: ReasonInvalid, Message: fmt.Sprintf(format, args...)}
}
