// Package kube holds every conversation with the Kubernetes API about
// workloads. Start with [Pods], which knows every pod of the cluster and says of
// one whether it is there, where, as whom it runs, and which policy is in force for
// it, and of an address who is behind it (package kube/directory). [Keys], [Issuer] and [TokenReviewer] are for verifying service-account tokens.
// [Connect] makes the client that all of them take. [Read] is for people who look
// at a cluster once.
//
// A pod is known by its UID: a pod deleted and created again under the same name
// is another pod. What is answered comes from the API server, by a watch or asked
// just now, and nothing that it refused is remembered. When the API server is
// away, what was last seen keeps being answered, and what was never seen is
// [ErrUnavailable], never "no such pod".
//
// Policies are PeerAuthentications, of whichever version the cluster serves. That
// there are none is believed only of an API server that says so: a cluster whose
// policies cannot be read keeps those that were known, and one in which they never
// could be read has no pods to show.
package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/go-logr/logr"
	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/klog/v2"

	"troth.dev/troth/identity"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/kube/directory"
	"troth.dev/troth/policy"
)

// ErrUnavailable says that the API server could not be asked, or must not be
// asked at this rate. It is no answer: ask again later.
var ErrUnavailable = errors.New("the API server cannot be asked now")

// PodsConfig is what [NewPods] needs.
type PodsConfig struct {
	// Client is required. It is best made by Connect or NewClient.
	Client kubernetes.Interface
	// Dynamic is required. It is best the Dynamic of what Connect or NewClient
	// made.
	Dynamic dynamic.Interface
	// Agents is required: the service account that node agents run as. Pods on a node
	// without one of them are called in plaintext.
	Agents identity.ServiceAccount
	// Uncaptured is the namespaces whose pods are not captured; optional. Whoever
	// tells agents what to capture has to use the same.
	Uncaptured map[string]bool
	// Log is told when a watch fails, and what becomes of policies. Nil discards.
	Log *slog.Logger
	// RootNamespace is the namespace whose policies are for the whole mesh. ""
	// means istio-system.
	RootNamespace string
	// PolicyStatus is whether each policy's status is to say if it is in force, and
	// why not. That needs the right to patch them.
	PolicyStatus bool
	// Patience is how long Pod waits for the watches to bring a pod before it
	// asks the API server. 0 means 200 ms.
	Patience time.Duration
	// LookupLimit is how many look-ups of pods that the watches have not brought
	// may run at the same time. 0 means 16.
	LookupLimit int
	// LookupRate is how many of these look-ups may begin in a second, on
	// average. 0 means 50. Each is at most three requests.
	LookupRate float64
}

// Pods knows the pods of the cluster. It watches pods, service accounts, nodes,
// Services, EndpointSlices and policies, and keeps of each only what an identity, a
// policy or the way to a pod depends on. All methods may be called from many
// goroutines.
type Pods struct {
	client     kubernetes.Interface
	dynamic    dynamic.Interface
	log        *slog.Logger
	patience   time.Duration
	definition latest.Value[definition]
	records    *records
	lookups    *lookups
	reporter   *reporter // nil if nobody asked for statuses
}

// NewPods checks config. The Pods know nothing before [Pods.Run].
func NewPods(config PodsConfig) (*Pods, error) {
	switch {
	case config.Client == nil:
		return nil, errors.New("kube: no client")
	case config.Dynamic == nil:
		return nil, errors.New("kube: no dynamic client")
	case config.Agents == identity.ServiceAccount{}:
		return nil, errors.New("kube: no service account of the agents")
	case config.RootNamespace != "" && len(validation.IsDNS1123Label(config.RootNamespace)) > 0:
		return nil, fmt.Errorf("kube: root namespace %q is not a DNS label (RFC 1123)", config.RootNamespace)
	case config.Patience < 0:
		return nil, fmt.Errorf("kube: patience of %s", config.Patience)
	case config.LookupLimit < 0:
		return nil, fmt.Errorf("kube: look-up limit of %d", config.LookupLimit)
	case config.LookupRate < 0:
		return nil, fmt.Errorf("kube: look-up rate of %v", config.LookupRate)
	}
	if config.Log == nil {
		config.Log = slog.New(slog.DiscardHandler)
	}
	if config.Patience == 0 {
		config.Patience = 200 * time.Millisecond
	}
	if config.LookupLimit == 0 {
		config.LookupLimit = 16
	}
	if config.LookupRate == 0 {
		config.LookupRate = 50
	}
	if config.RootNamespace == "" {
		config.RootNamespace = "istio-system"
	}
	records := newRecords(config.RootNamespace, directory.Config{Agents: config.Agents, Uncaptured: config.Uncaptured})
	p := &Pods{
		client:   config.Client,
		dynamic:  config.Dynamic,
		log:      config.Log,
		patience: config.Patience,
		records:  records,
		lookups:  newLookups(config, records),
	}
	if config.PolicyStatus {
		records.reports = newReports()
		p.reporter = newReporter(config, records)
	}
	return p, nil
}

// Run watches until ctx ends, and then returns nil once every watch has ended.
// It rides out every outage of the API server. It must be called once.
func (p *Pods) Run(ctx context.Context) error {
	ctx = klog.NewContext(ctx, logr.FromSlogHandler(p.log.Handler()))
	var group errgroup.Group
	for _, reflector := range p.reflectors() {
		group.Go(func() error {
			reflector.RunWithContext(ctx)
			return nil
		})
	}
	loops := []func(context.Context){p.watchDefinition, p.watchPolicies, p.expire}
	if p.reporter != nil {
		loops = append(loops, p.reporter.run)
	}
	for _, loop := range loops {
		group.Go(func() error {
			loop(ctx)
			return nil
		})
	}
	return group.Wait()
}

// expire drops pods whose grace has ended from the values of [Pods.OnNode] and from
// the directory: of a node that no longer answers, no event says so.
func (p *Pods) expire(ctx context.Context) {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		select {
		case now := <-ticker.C:
			p.records.expire(now)
			p.records.directory.Expire(now)
		case <-ctx.Done():
			return
		}
	}
}

// Synced returns a channel that is closed once every pod, service account, node,
// Service, EndpointSlice and policy that was there when Run began is known. That waits for as long as Troth
// may not read them; a cluster that has no definition of policies has none.
func (p *Pods) Synced() <-chan struct{} { return p.records.synced }

// Pod returns the API server's record of the pod whose UID is in ref. If the
// watches have it, that is at once, and without regard to ref's namespace and
// name, which may be wrong: the caller compares what it was told with what it
// gets. It does not judge either whether the pod is live: [identity.Pod.Live]
// does.
//
// If the watches do not have it, or not yet its service account or node, Pod
// waits for Config.Patience, and then asks the API server, by ref's namespace and
// name and within 3 seconds, in one look-up that it shares with all who wait for
// the same ref.
//
// The errors are [identity.ErrPodNotFound], [identity.ErrPodReplaced],
// [ErrUnavailable] when there was no answer, too many look-ups run, or Run has
// not seen the first lists yet, and ctx's. None of them is remembered.
func (p *Pods) Pod(ctx context.Context, ref identity.PodReference) (identity.Pod, error) {
	if pod, ok := p.records.complete(ref.UID); ok {
		return pod, nil
	}
	if !plausible(ref) {
		return identity.Pod{}, fmt.Errorf("pod %q in namespace %q with UID %q: %w",
			ref.Name, ref.Namespace, ref.UID, identity.ErrPodNotFound)
	}

	news, done := p.records.follow(ref.UID)
	defer done()
	patience := time.NewTimer(p.patience)
	defer patience.Stop()
	for waiting := true; waiting; {
		_, changed := news.Load()
		if pod, ok := p.records.complete(ref.UID); ok {
			return pod, nil
		}
		select {
		case <-changed:
		case <-patience.C:
			waiting = false
		case <-ctx.Done():
			return identity.Pod{}, fmt.Errorf("wait for pod %q: %w", ref.Namespace+"/"+ref.Name, ctx.Err())
		}
	}

	select {
	case <-p.records.synced:
	default:
		// Asking for pods one by one now, for every agent that reconnects, would
		// hit an API server that is sending all of them anyway.
		return identity.Pod{}, fmt.Errorf("pod %q: the first lists have not arrived: %w",
			ref.Namespace+"/"+ref.Name, ErrUnavailable)
	}
	pod, err := p.lookups.pod(ctx, ref)
	if err != nil {
		return identity.Pod{}, err
	}
	if gone, _ := news.Load(); gone {
		// The answer was on its way while the pod was deleted.
		return identity.Pod{}, fmt.Errorf("pod %q: %w", ref.Namespace+"/"+ref.Name, identity.ErrPodNotFound)
	}
	return pod, nil
}

// OnNode returns the pods of a node that may hold an identity, sorted by UID, each
// with the policy in force for it, as a value that is replaced whenever one of them
// changes in what [identity.Pod] has, or gets another policy. It is nil until
// [Pods.Synced], and never nil afterwards: a node without pods, or that nobody
// knows, has none. A pod is dropped at the latest a second after its grace has
// ended.
//
// The caller does not change what it is given, and calls release when it needs
// the value no more: then the value stops being kept current.
func (p *Pods) OnNode(node string) (pods *latest.Value[[]policy.Assignment], release func()) {
	return p.records.onNode(node)
}

// Directory returns a reader of who is behind addresses, for the pods of a node. It
// is current like the values of [Pods.OnNode]; before [Pods.Synced], whoever it says
// is nobody may be somebody. The caller closes it.
func (p *Pods) Directory(node string) *directory.Reader { return p.records.directory.Reader(node) }

// Of calls yield with each pod that may hold an identity and runs as the service
// account, in no order, as the watches last saw them. A pod that is not scheduled
// yet is among them. Before [Pods.Synced] it may lack some. yield must not call the
// Pods.
func (p *Pods) Of(account identity.ServiceAccount, yield func(identity.Pod)) {
	p.records.of(account, time.Now(), yield)
}

// Occupied says whether a pod that may hold an identity is on the node, as the
// watches last saw it.
func (p *Pods) Occupied(node string) bool { return p.records.occupied(node, time.Now()) }

// plausible says whether a pod could have that reference. What could not is not
// worth a request, and must not get into a request's path.
func plausible(ref identity.PodReference) bool {
	return ref.UID != "" &&
		len(validation.IsDNS1123Label(ref.Namespace)) == 0 &&
		len(validation.IsDNS1123Subdomain(ref.Name)) == 0
}
