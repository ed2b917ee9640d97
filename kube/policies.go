package kube

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/go-logr/logr"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"troth.dev/troth/policy"
)

// The kind that policies are of. Whoever runs the cluster installs its
// definition, before Troth or later, and may remove it again.
const (
	policyGroup      = "security.istio.io"
	policyKind       = "PeerAuthentication"
	policyDefinition = policyResource + "." + policyGroup
)

// policyVersions returns the versions that policies can be read in, the best
// first. They differ in their names alone.
func policyVersions() []string { return []string{"v1", "v1beta1"} }

func policiesIn(version string) schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: policyGroup, Version: version, Resource: policyResource}
}

// definition is what the API server says of the policies' kind. The zero
// definition is that it has not said anything.
type definition struct {
	said    bool
	exists  bool
	version string // the best that is served; empty if there is none
}

func definitionOf(o *unstructured.Unstructured) definition {
	served := make(map[string]bool)
	versions, _, _ := unstructured.NestedSlice(o.Object, "spec", "versions")
	for _, version := range versions {
		if v, ok := version.(map[string]any); ok && v["served"] == true {
			name, _ := v["name"].(string)
			served[name] = true
		}
	}
	for _, version := range policyVersions() {
		if served[version] {
			return definition{said: true, exists: true, version: version}
		}
	}
	return definition{said: true, exists: true}
}

// watchDefinition keeps p.definition current until ctx ends.
//
// That policies are not found when they are asked for would not tell that there are
// none: a load balancer without API servers says the same, and whoever believed it
// would open every port. The list of definitions tells.
func (p *Pods) watchDefinition(ctx context.Context) {
	absent := definition{said: true}
	set := func(d definition) {
		if current, _ := p.definition.Load(); current != d {
			p.definition.Set(d)
		}
	}
	source := &source{
		client: p.dynamic.Resource(schema.GroupVersionResource{
			Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions",
		}),
		fieldSelector: "metadata.name=" + policyDefinition,
		log:           p.log.With("resource", "customresourcedefinitions.apiextensions.k8s.io", "name", policyDefinition),
	}
	source.follow(ctx, "apiextensions.k8s.io/v1", "CustomResourceDefinition", mirror[*unstructured.Unstructured]{
		records:  p.records,
		resource: "customresourcedefinitions",
		trim:     trimUnstructured,
		set:      func(o *unstructured.Unstructured) { set(definitionOf(o)) },
		remove:   func(*unstructured.Unstructured) { set(absent) },
		replace: func(list []*unstructured.Unstructured) {
			if len(list) == 0 {
				set(absent)
				return
			}
			set(definitionOf(list[0]))
		},
	})
}

// watchPolicies watches policies until ctx ends, in the version that is served.
// While none is, what was last known stays in force. When there is no such kind
// any more, there are no policies.
func (p *Pods) watchPolicies(ctx context.Context) {
	for ctx.Err() == nil {
		now, changed := p.definition.Load()
		during, end := context.WithCancel(ctx)
		var following sync.WaitGroup
		switch {
		case now.version != "":
			p.log.InfoContext(ctx, "policies are watched", "version", now.version)
			following.Go(func() { p.followPolicies(during, now.version) })
		case now.exists:
			p.log.ErrorContext(ctx, "policies cannot be read: their definition serves no version that Troth knows; those known before stay in force",
				"name", policyDefinition, "known", policyVersions())
		case now.said:
			p.log.InfoContext(ctx, "there are no policies: the cluster has no definition of them", "name", policyDefinition)
			p.records.change(func() {
				p.records.replacePolicies(nil)
				p.records.listed(policyResource)
			})
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
		end()
		following.Wait()
	}
}

func (p *Pods) followPolicies(ctx context.Context, version string) {
	source := &source{
		client: p.dynamic.Resource(policiesIn(version)),
		log:    p.log.With("resource", policyDefinition),
	}
	source.follow(ctx, policyGroup+"/"+version, policyKind, mirror[*unstructured.Unstructured]{
		records:  p.records,
		resource: policyResource,
		trim:     trimUnstructured,
		set:      p.records.setPolicy,
		remove:   p.records.removePolicy,
		replace:  p.records.replacePolicies,
	})
}

func (r *records) setPolicy(o *unstructured.Unstructured) {
	r.policies.SetPolicy(policy.Decode(o.Object))
	r.reports.set(o)
}

func (r *records) removePolicy(o *unstructured.Unstructured) {
	r.policies.RemovePolicy(policy.Ref{Namespace: o.GetNamespace(), Name: o.GetName()})
	r.reports.remove(o.GetNamespace(), o.GetName())
}

func (r *records) replacePolicies(list []*unstructured.Unstructured) {
	policies := make([]policy.PeerAuthentication, len(list))
	for i, o := range list {
		policies[i] = policy.Decode(o.Object)
	}
	r.policies.ReplacePolicies(policies)
	r.reports.replace(list)
}

func trimUnstructured(o *unstructured.Unstructured) { o.SetManagedFields(nil) }

// source is a kind that is listed and watched in JSON. It logs once what keeps it
// from being read, and again only when that becomes something else.
type source struct {
	client        dynamic.ResourceInterface
	fieldSelector string
	log           *slog.Logger

	mu      sync.Mutex
	trouble string // guarded by mu; why it cannot be read; empty while it can
}

// follow mirrors it until ctx ends.
func (s *source) follow(ctx context.Context, apiVersion, kind string, m mirror[*unstructured.Unstructured]) {
	example := new(unstructured.Unstructured)
	example.SetAPIVersion(apiVersion)
	example.SetKind(kind)
	// The reflector would log every attempt that fails.
	ctx = klog.NewContext(ctx, logr.Discard())
	reflector(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
			options.FieldSelector = s.fieldSelector
			list, err := s.client.List(ctx, options)
			if err != nil {
				s.heed(ctx, err) // all is well only when the watch that follows begins
			}
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
			options.FieldSelector = s.fieldSelector
			watching, err := s.client.Watch(ctx, options)
			s.heed(ctx, err)
			return watching, err
		},
	}, example, m).RunWithContext(ctx)
}

// heed logs an error that is news.
func (s *source) heed(ctx context.Context, err error) {
	if ctx.Err() != nil || apierrors.IsResourceExpired(err) || apierrors.IsGone(err) {
		return // nobody is interested any more, or the reflector knows a way on
	}
	var trouble string
	if err != nil {
		trouble = "unavailable"
		if reason := apierrors.ReasonForError(err); reason != metav1.StatusReasonUnknown {
			trouble = string(reason)
		}
	}
	s.mu.Lock()
	news := trouble != s.trouble
	s.trouble = trouble
	s.mu.Unlock()
	switch {
	case !news:
	case err == nil:
		s.log.InfoContext(ctx, "policies can be read again")
	case apierrors.IsForbidden(err):
		s.log.ErrorContext(ctx, "policies cannot be read: Troth lacks the right to list and watch this resource", "err", err)
	default:
		s.log.WarnContext(ctx, "policies cannot be read now; those known before stay in force", "err", err)
	}
}

// sleep waits, and returns ctx's error if that ends first.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
