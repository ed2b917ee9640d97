// Package trustbundle publishes the trust bundle in a cluster, for those who get it
// from Kubernetes and not from an agent: as a ClusterTrustBundle, which pods project
// into a volume, and as ConfigMaps. Start with [ParsePlaces], [New] and [Publisher.Run].
//
// Of several replicas one writes, under a Lease, and all look. What somebody else
// changes or deletes is written again. What is published never goes back: whoever is
// about to write asks the store first for the bundle of that moment, and the write
// fails if the object is not the one any more that was looked at. So a replica that was
// stopped for an hour, and believes that it holds the Lease, replaces nothing newer.
// The revision stands in an annotation.
//
// The bundle loses an authority only when package ca lets it be revoked: when all that
// it signed has expired, or nobody holds any of it. It gains one long before that signs:
// package ca is told what is published, as each replica sees it, and waits for [Lag].
// A place whose kind the API server does not serve is left out, and the others are
// kept.
package trustbundle

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/kubernetes"
	"k8s.io/klog/v2"

	"troth.dev/troth/ca"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/kube/lease"
)

// Lag is how long whoever reads a published bundle may take to use it: the kubelet
// brings a volume up to date within two minutes, and programs look at their files now
// and then.
const Lag = 5 * time.Minute

// LeaseName is the name of the Lease under which one replica writes.
const LeaseName = "troth-publisher"

// Key is where a ConfigMap has the bundle, as PEM.
const Key = "bundle.pem"

// RevisionAnnotation has the revision of the bundle that is published.
const RevisionAnnotation = "troth.dev/bundle-revision"

// Config is what a Publisher needs. Every field is required unless it says otherwise.
type Config struct {
	Client      kubernetes.Interface
	TrustDomain spiffeid.TrustDomain
	// SignerName is that of the ClusterTrustBundle: the signer of the SVIDs that it
	// verifies.
	SignerName string
	Places     []Place
	// Bundle is what is published, and Current asks the store for it, as
	// [ca.Issuer.CurrentBundle] does.
	Bundle  *latest.Value[ca.Bundle]
	Current func(context.Context) (ca.Bundle, error)
	// Published is told what is published everywhere, as [ca.Issuer.Published] is.
	Published func(everywhere func(anchor *x509.Certificate) bool)
	// Namespace is where the Lease is, and Replica this replica's name in it.
	Namespace, Replica string
	// LeaseDuration is that of [lease.Config]; 0 means its default.
	LeaseDuration time.Duration
	Log           *slog.Logger
	Metrics       prometheus.Registerer
}

// Publisher keeps the bundle at some places.
type Publisher struct {
	config  Config // immutable after New
	places  []*keeper
	news    latest.Value[struct{}] // set when something was seen at a place
	metrics *metrics
}

// Place is where the bundle is published. The zero Place is none.
type Place struct {
	namespace, configMap string // empty for the ClusterTrustBundle
	cluster              bool
}

// String returns the place as ParsePlaces takes it.
func (p Place) String() string {
	if p.cluster {
		return "clustertrustbundle"
	}
	return "configmap=" + p.namespace + "/" + p.configMap
}

// ParsePlaces reads places with commas between them: "clustertrustbundle", and
// "configmap=NAMESPACE/NAME" as often as wanted. The empty list has none.
func ParsePlaces(list string) ([]Place, error) {
	var places []Place
	seen := make(map[Place]bool)
	for text := range strings.SplitSeq(list, ",") {
		if text == "" {
			continue
		}
		var p Place
		kind, value, _ := strings.Cut(text, "=")
		switch {
		case text == "clustertrustbundle":
			p.cluster = true
		case kind == "configmap":
			p.namespace, p.configMap, _ = strings.Cut(value, "/")
			if len(validation.IsDNS1123Label(p.namespace)) > 0 || len(validation.IsDNS1123Subdomain(p.configMap)) > 0 {
				return nil, fmt.Errorf("%q is not of the form configmap=NAMESPACE/NAME", text)
			}
		default:
			return nil, fmt.Errorf("%q is neither clustertrustbundle nor configmap=NAMESPACE/NAME", text)
		}
		if seen[p] {
			return nil, fmt.Errorf("%q is there twice", text)
		}
		seen[p] = true
		places = append(places, p)
	}
	return places, nil
}

// Name returns the name of the ClusterTrustBundle of a signer and a trust domain, as
// Kubernetes prescribes its beginning. It fails if the trust domain cannot stand in it.
func Name(signer string, td spiffeid.TrustDomain) (string, error) {
	if len(validation.IsDNS1123Subdomain(td.Name())) > 0 {
		return "", fmt.Errorf("trust domain %q cannot be in the name of a ClusterTrustBundle, which takes no '_': publish a ConfigMap", td.Name())
	}
	return strings.ReplaceAll(signer, "/", ":") + ":" + td.Name(), nil
}

// New checks the config. It starts nothing.
func New(c Config) (*Publisher, error) {
	switch {
	case c.Client == nil, c.Bundle == nil, c.Current == nil, c.Published == nil, c.Log == nil, c.Metrics == nil:
		return nil, errors.New("trustbundle: Client, Bundle, Current, Published, Log and Metrics are required")
	case c.TrustDomain.IsZero(), c.SignerName == "", c.Namespace == "", c.Replica == "":
		return nil, errors.New("trustbundle: TrustDomain, SignerName, Namespace and Replica are required")
	case len(c.Places) == 0:
		return nil, errors.New("trustbundle: no place to publish at")
	}
	p := &Publisher{config: c}
	for _, place := range c.Places {
		k := &keeper{place: place, publisher: p}
		switch {
		case place == Place{}:
			return nil, errors.New("trustbundle: a place that is none")
		case place.cluster:
			name, err := Name(c.SignerName, c.TrustDomain)
			if err != nil {
				return nil, fmt.Errorf("trustbundle: %w", err)
			}
			k.object = clusterTrustBundle{client: c.Client, name: name, signer: c.SignerName}
		default:
			k.object = configMap{client: c.Client, namespace: place.namespace, name: place.configMap}
		}
		p.places = append(p.places, k)
	}
	var err error
	if p.metrics, err = newMetrics(c.Metrics, p); err != nil {
		return nil, fmt.Errorf("trustbundle: %w", err)
	}
	return p, nil
}

// Run looks at the places, tells what is published there, and keeps the bundle there
// whenever this replica holds the Lease, until ctx ends. It returns nil then. It rides
// out outages of the API server and of the store: what is published stays.
func (p *Publisher) Run(ctx context.Context) error {
	ctx = klog.NewContext(ctx, logr.FromSlogHandler(p.config.Log.Handler()))
	group, ctx := errgroup.WithContext(ctx)
	for _, k := range p.places {
		group.Go(func() error {
			k.watch(ctx)
			return nil
		})
	}
	group.Go(func() error {
		p.tell(ctx)
		return nil
	})
	group.Go(func() error {
		return lease.Hold(ctx, lease.Config{
			Client: p.config.Client, Namespace: p.config.Namespace, Name: LeaseName,
			Holder: p.config.Replica, Duration: p.config.LeaseDuration,
		}, p.lead)
	})
	return group.Wait()
}

// lead keeps all places until ctx ends.
func (p *Publisher) lead(ctx context.Context) {
	var group errgroup.Group
	for _, k := range p.places {
		group.Go(func() error {
			k.keep(ctx)
			return nil
		})
	}
	_ = group.Wait() // none of them fails
}

// tell says what is published everywhere, whenever that may have changed.
func (p *Publisher) tell(ctx context.Context) {
	for {
		_, news := p.news.Load()
		_, changed := p.config.Bundle.Load()
		p.config.Published(func(anchor *x509.Certificate) bool {
			for _, k := range p.places {
				if !k.has(anchor) {
					return false
				}
			}
			return true
		})
		select {
		case <-news:
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// render returns the trust anchors of a bundle as PEM, each once.
func render(b ca.Bundle) string {
	text, _ := b.X509Bundle().Marshal() // what is a certificate already can be spelled
	return string(text)
}

// anchorsIn returns the certificates of a published text, by their DER. Of whoever else
// may write there it is anything: what is no certificate is nobody's anchor.
func anchorsIn(text string) map[string]bool {
	anchors := make(map[string]bool)
	for rest := []byte(text); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return anchors
		}
		if block.Type == "CERTIFICATE" {
			anchors[string(block.Bytes)] = true
		}
	}
}
