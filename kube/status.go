package kube

import (
	"cmp"
	"context"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/time/rate"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"

	"troth.dev/troth/policy"
)

const (
	// conditionType is the condition that says whether a policy is in force as
	// its author wrote it.
	conditionType = "troth.dev/InForce"
	// fieldManager is the name under which Troth owns it.
	fieldManager = "troth"

	// reportDelay is how long what changes is collected before it is written.
	reportDelay = time.Second
	// reportCalm is how long a policy that nobody edits is left alone after it was
	// written: replicas that disagree, as those of two releases may, must not keep
	// each other busy.
	reportCalm = 5 * time.Second
	// reportRetry is the longest pause after an error.
	reportRetry = time.Minute
	// reportRate is how many policies are written in a second, and at once.
	reportRate = 20
)

// reports is which policies the API server has, in so far as their statuses depend
// on it, and of which something else may have to be said. Its methods run inside
// [records.change]. The nil reports does nothing: nobody asked for statuses.
type reports struct {
	policies map[string]map[string]stored // by namespace and name
	due      map[string]bool              // namespaces whose statuses may have to change
	wake     chan struct{}                // has room for one: that something is due is no news twice
}

// stored is what the API server has of a policy.
type stored struct {
	apiVersion      string
	uid             types.UID
	resourceVersion string
	generation      int64
	conditions      []any
}

func newReports() *reports {
	return &reports{
		policies: make(map[string]map[string]stored),
		due:      make(map[string]bool),
		wake:     make(chan struct{}, 1),
	}
}

func (r *reports) set(o *unstructured.Unstructured) {
	if r == nil {
		return
	}
	namespace := o.GetNamespace()
	if r.policies[namespace] == nil {
		r.policies[namespace] = make(map[string]stored)
	}
	conditions, _, _ := unstructured.NestedSlice(o.Object, "status", "conditions")
	r.policies[namespace][o.GetName()] = stored{
		apiVersion:      o.GetAPIVersion(),
		uid:             o.GetUID(),
		resourceVersion: o.GetResourceVersion(),
		generation:      o.GetGeneration(),
		conditions:      conditions,
	}
	r.touch(namespace)
}

func (r *reports) remove(namespace, name string) {
	if r == nil {
		return
	}
	delete(r.policies[namespace], name)
	if len(r.policies[namespace]) == 0 {
		delete(r.policies, namespace)
	}
	r.touch(namespace)
}

func (r *reports) replace(list []*unstructured.Unstructured) {
	if r == nil {
		return
	}
	clear(r.policies)
	for _, o := range list {
		r.set(o)
	}
}

// touch notes that something in a namespace changed that its policies are judged
// by.
func (r *reports) touch(namespace string) {
	if r == nil || r.policies[namespace] == nil {
		return
	}
	r.due[namespace] = true
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// report is a condition that a policy does not have yet.
type report struct {
	ref       policy.Ref
	stored    stored
	condition map[string]any
}

// reportsDue returns what is to be written. It takes one namespace after the
// other, so that it keeps nobody from writing for long.
func (r *records) reportsDue() []report {
	r.mu.Lock()
	due := r.reports.due
	r.reports.due = make(map[string]bool)
	r.mu.Unlock()

	var found []report
	for namespace := range due {
		r.mu.RLock()
		for ref, findings := range r.policies.Findings(namespace) {
			stored, ok := r.reports.policies[namespace][ref.Name]
			if condition := conditionOf(findings, stored.generation); ok && !stored.has(condition) {
				found = append(found, report{ref: ref, stored: stored, condition: condition})
			}
		}
		r.mu.RUnlock()
	}
	slices.SortFunc(found, func(a, b report) int { return cmp.Compare(a.ref.String(), b.ref.String()) })
	return found
}

// conditionOf puts what is to be said into a condition, without a time. A policy
// is in force if nothing is said against it but that a port is not declared, for
// that is a guess.
func conditionOf(findings []policy.Finding, generation int64) map[string]any {
	condition := map[string]any{
		"type":               conditionType,
		"status":             string(metav1.ConditionTrue),
		"reason":             "InForce",
		"message":            "in force for all that it selects",
		"observedGeneration": generation,
	}
	if len(findings) == 0 {
		return condition
	}
	messages := make([]string, len(findings))
	for i, finding := range findings {
		messages[i] = finding.Message
		if finding.Code != policy.PortNotDeclared {
			condition["status"] = string(metav1.ConditionFalse)
		}
	}
	condition["reason"] = string(findings[0].Code)
	condition["message"] = strings.Join(messages, "\n")
	return condition
}

// has reports whether the policy has the condition already, since whenever.
func (s stored) has(condition map[string]any) bool {
	return slices.ContainsFunc(s.conditions, func(c any) bool {
		has, ok := c.(map[string]any)
		if !ok {
			return false
		}
		for field, value := range condition {
			if has[field] != value {
				return false
			}
		}
		return true
	})
}

// reporter writes what is to be said about each policy into its status.
//
// Every replica does so, and none needs to know of the others: all come to the
// same from the same objects, and who finds it written leaves it. A write names the
// version of the object that it was made for, so that of two at the same time the
// second one fails, and takes nothing from anybody.
type reporter struct {
	client  dynamic.Interface
	log     *slog.Logger
	records *records
	rate    *rate.Limiter
	calm    map[policy.Ref]calm
	denied  bool // the last answer was that Troth may not
}

// calm is until when a policy that nobody edits is left alone.
type calm struct {
	uid        types.UID
	generation int64
	until      time.Time
	refused    bool // it would be in vain
}

func newReporter(config PodsConfig, records *records) *reporter {
	return &reporter{
		client:  config.Dynamic,
		log:     config.Log,
		records: records,
		rate:    rate.NewLimiter(reportRate, reportRate),
		calm:    make(map[policy.Ref]calm),
	}
}

// run writes until ctx ends.
func (r *reporter) run(ctx context.Context) {
	select {
	case <-r.records.synced: // before that, every selector would select nothing
	case <-ctx.Done():
		return
	}
	pause := reportDelay
	for {
		select {
		case <-r.records.reports.wake:
		case <-ctx.Done():
			return
		}
		if sleep(ctx, pause) != nil {
			return
		}
		switch err := r.pass(ctx); {
		case err == nil:
			pause, r.denied = reportDelay, false
		case ctx.Err() != nil:
			return
		case apierrors.IsForbidden(err):
			if !r.denied {
				r.log.ErrorContext(ctx, "the statuses of policies cannot be written: Troth lacks the right to patch this resource",
					"resource", policyResource+"/status."+policyGroup, "err", err)
			}
			pause, r.denied = min(2*pause, reportRetry), true
		default:
			pause, r.denied = min(2*pause, reportRetry), false
			r.log.WarnContext(ctx, "the statuses of policies cannot be written now", "again_in", pause, "err", err)
		}
	}
}

// pass writes what is due. What it cannot write stays due. It gives up at the
// first error that the next policy would meet too.
func (r *reporter) pass(ctx context.Context) error {
	now := time.Now()
	for ref, calm := range r.calm {
		if !now.Before(calm.until) {
			delete(r.calm, ref)
		}
	}
	var left []string
	var failed error
	for _, report := range r.records.reportsDue() {
		known := r.calm[report.ref]
		if known.uid == report.stored.uid && known.generation == report.stored.generation {
			if !known.refused {
				left = append(left, report.ref.Namespace)
			}
			continue
		}
		if failed != nil {
			left = append(left, report.ref.Namespace)
			continue
		}
		if err := r.rate.Wait(ctx); err != nil {
			return err
		}
		err := r.write(ctx, report, now)
		switch {
		case err == nil:
			r.calm[report.ref] = calm{uid: report.stored.uid, generation: report.stored.generation, until: now.Add(reportCalm)}
		case apierrors.IsNotFound(err):
			// It is gone, which the watch is about to say.
		case apierrors.IsConflict(err):
			left = append(left, report.ref.Namespace) // it has changed, which the watch is about to say
		case apierrors.IsInvalid(err), apierrors.IsBadRequest(err):
			r.log.WarnContext(ctx, "the API server refuses the status of a policy", "policy", report.ref, "err", err)
			r.calm[report.ref] = calm{uid: report.stored.uid, generation: report.stored.generation, until: now.Add(reportRetry), refused: true}
		default:
			failed = err
			left = append(left, report.ref.Namespace)
		}
	}
	r.records.change(func() {
		for _, namespace := range left {
			r.records.reports.touch(namespace)
		}
	})
	return failed
}

// write gives a policy its condition.
func (r *reporter) write(ctx context.Context, report report, now time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	condition := maps.Clone(report.condition)
	condition["lastTransitionTime"] = now.UTC().Format(time.RFC3339)
	conditions := []any{condition}
	// To the API server the list of conditions is one value: whoever writes one
	// condition has to repeat those of others.
	for _, c := range report.stored.conditions {
		other, ok := c.(map[string]any)
		switch {
		case !ok || other["type"] != conditionType:
			conditions = append(conditions, c)
		case other["status"] == condition["status"] && other["lastTransitionTime"] != nil:
			condition["lastTransitionTime"] = other["lastTransitionTime"]
		}
	}
	object := &unstructured.Unstructured{Object: map[string]any{"status": map[string]any{"conditions": conditions}}}
	object.SetAPIVersion(report.stored.apiVersion)
	object.SetKind(policyKind)
	object.SetNamespace(report.ref.Namespace)
	object.SetName(report.ref.Name)
	object.SetUID(report.stored.uid)
	object.SetResourceVersion(report.stored.resourceVersion)
	_, version, _ := strings.Cut(report.stored.apiVersion, "/")
	_, err := r.client.Resource(policiesIn(version)).Namespace(report.ref.Namespace).
		ApplyStatus(ctx, report.ref.Name, object, metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
	return err
}
