package podcert

import (
	"context"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	certificatesv1 "k8s.io/api/certificates/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	certificatesac "k8s.io/client-go/applyconfigurations/certificates/v1"
	metaac "k8s.io/client-go/applyconfigurations/meta/v1"
	"k8s.io/client-go/util/workqueue"

	"troth.dev/troth/ca"
	"troth.dev/troth/identity"
)

// fieldManager is the name under which Troth owns what it writes.
const fieldManager = "troth"

const (
	// requestTimeout bounds each request to the API server.
	requestTimeout = 10 * time.Second
	// maxWrites is how many statuses of a batch are written at the same time.
	maxWrites = 16
)

// work decides on batches until the queue is shut down.
func (s *Signer) work(ctx context.Context, queue workqueue.TypedRateLimitingInterface[types.UID]) {
	for {
		batch := s.pending.take(queue)
		if len(batch) == 0 {
			return
		}
		items := make([]*item, 0, len(batch))
		for _, uid := range batch {
			if r := s.pending.find(uid); r != nil {
				items = append(items, &item{request: r})
			} else {
				queue.Forget(uid)
			}
		}
		if ctx.Err() == nil {
			s.decide(ctx, items)
		}
		for _, i := range items {
			if uid := i.object.UID; i.settled {
				s.pending.settle(uid)
				queue.Forget(uid)
			} else if ctx.Err() == nil {
				s.waits(ctx, i)
				queue.AddRateLimited(uid)
			}
		}
		for _, uid := range batch {
			queue.Done(uid)
		}
	}
}

// item is a request in a batch.
type item struct {
	*request
	pod     identity.Pod
	verdict verdict
	svid    ca.SVID // if the verdict is the zero one
	settled bool    // it has its final status, or is gone
}

// decide settles each of the items, or says in its verdict why it waits.
func (s *Signer) decide(ctx context.Context, items []*item) {
	var group errgroup.Group
	for _, i := range items {
		// Side by side, because a pod that is not known yet is waited for.
		group.Go(func() error {
			i.pod, i.verdict = s.judge(ctx, i.object)
			return nil
		})
	}
	_ = group.Wait() // none of them fails
	s.issue(ctx, items)
	// If the process dies here, the ledger lists certificates that nobody gets: the
	// requests are pending still, and whoever signs next issues others.
	group.SetLimit(maxWrites)
	for _, i := range items {
		group.Go(func() error {
			s.write(ctx, i)
			return nil
		})
	}
	_ = group.Wait()
}

// issue has the certificates made of all that may have one, in one call.
func (s *Signer) issue(ctx context.Context, items []*item) {
	var asking []*item
	var asked []ca.Request
	for _, i := range items {
		if i.verdict != (verdict{}) {
			continue
		}
		id, err := i.pod.Account().ID(s.config.TrustDomain)
		if err != nil {
			i.verdict = putOff(NotIssued, "%v", err)
			continue
		}
		life := s.config.Life
		if most := i.object.Spec.MaxExpirationSeconds; most != nil {
			life = min(life, time.Duration(*most)*time.Second)
		}
		asking = append(asking, i)
		asked = append(asked, ca.Request{
			ID: id, CSR: i.object.Spec.StubPKCS10Request, Life: life, FromNotBefore: true,
			Caller: ca.KubeletCaller, Node: i.pod.Node.Name, PodUID: i.pod.UID,
		})
	}
	if len(asked) == 0 {
		return
	}
	issued, err := s.config.Issuer.Issue(ctx, asked...)
	for n, i := range asking {
		switch {
		case err != nil:
			i.verdict = putOff(NotIssued, "%v", err)
		case issued[n].Err != nil:
			i.verdict = refused(issued[n].Err)
		default:
			i.svid = issued[n].SVID
		}
	}
}

// write gives the request its final status, unless it waits.
func (s *Signer) write(ctx context.Context, i *item) {
	if i.verdict != (verdict{}) && !i.verdict.deny {
		return
	}
	status := s.issuedStatus(i.svid)
	if i.verdict.deny {
		status = certificatesac.PodCertificateRequestStatus().WithConditions(condition(
			certificatesv1.PodCertificateRequestConditionTypeDenied, string(i.verdict.reason), i.verdict.message))
	}
	asking, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	// With the UID, this fails if the request was replaced by another of its name.
	_, err := s.config.Client.CertificatesV1().PodCertificateRequests(i.object.Namespace).ApplyStatus(asking,
		certificatesac.PodCertificateRequest(i.object.Name, i.object.Namespace).WithUID(i.object.UID).WithStatus(status),
		metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
	if err == nil {
		i.settled = true
		s.metrics.decided(i)
		if i.verdict.deny {
			s.config.Log.LogAttrs(ctx, slog.LevelWarn, "pod certificate denied", i.attrs()...)
		}
		return
	}
	if i.settled = s.over(ctx, i.object, err); !i.settled {
		i.verdict = putOff(NotWritten, "%v", err)
	}
}

// over says whether a request whose status could not be written needs none any more:
// somebody else wrote it first, or it is gone. What the API server answers does not
// tell: a status that is final, one that is wrong and a right that is missing are all
// "invalid" to it.
func (s *Signer) over(ctx context.Context, o *certificatesv1.PodCertificateRequest, err error) bool {
	if apierrors.IsNotFound(err) {
		return true
	}
	if !apierrors.IsConflict(err) && !apierrors.IsInvalid(err) {
		return false
	}
	asking, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	now, err := s.config.Client.CertificatesV1().PodCertificateRequests(o.Namespace).Get(asking, o.Name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return true
	case err != nil:
		return false
	}
	return now.UID != o.UID || decided(now)
}

// issuedStatus is the status of a request that has its certificate.
func (s *Signer) issuedStatus(svid ca.SVID) *certificatesac.PodCertificateRequestStatusApplyConfiguration {
	if len(svid.Certificates) == 0 {
		return nil
	}
	var chain strings.Builder
	for _, der := range svid.Certificates {
		_ = pem.Encode(&chain, &pem.Block{Type: "CERTIFICATE", Bytes: der}) // a Builder takes all
	}
	return certificatesac.PodCertificateRequestStatus().
		WithCertificateChain(chain.String()).
		WithNotBefore(metav1.NewTime(svid.NotBefore)).
		WithBeginRefreshAt(metav1.NewTime(s.refreshAt(svid))).
		WithNotAfter(metav1.NewTime(svid.NotAfter)).
		WithConditions(condition(certificatesv1.PodCertificateRequestConditionTypeIssued, "Issued",
			fmt.Sprintf("%s, under authority %s", svid.ID, svid.AuthorityID)))
}

// refreshAt is when the kubelet is to ask for the next certificate: from two fifths to
// half of this one's life, each at its own place in between. A node's pods all get
// theirs at the same moment when its kubelet was restarted, and that must not come back
// with each renewal. To this the kubelet adds up to seven minutes. Of an hour that
// leaves 23 minutes in which nobody need be able to sign.
//
// An authority that is replaced stays in the bundle until the last certificate under it
// has expired: the kubelet cannot be told to ask earlier.
func (s *Signer) refreshAt(svid ca.SVID) time.Time {
	life := svid.NotAfter.Sub(svid.NotBefore)
	within := time.Duration(float64(life/10) * float64(s.places.Next()) / (math.MaxUint32 + 1))
	return svid.NotBefore.Add(life*2/5 + within).Truncate(time.Second)
}

func condition(kind, reason, message string) *metaac.ConditionApplyConfiguration {
	const longest = 1024 // of 32768 that the API server takes: it goes into events too
	if len(message) > longest {
		message = strings.ToValidUTF8(message[:longest], "") + "..."
	}
	return metaac.Condition().WithType(kind).WithStatus(metav1.ConditionTrue).
		WithReason(reason).WithMessage(message).WithLastTransitionTime(metav1.Now())
}

// waits notes that a request is tried again, and says so once for each reason.
func (s *Signer) waits(ctx context.Context, i *item) {
	s.metrics.retries.WithLabelValues(string(i.verdict.reason)).Inc()
	if i.told != i.verdict.reason {
		i.told = i.verdict.reason
		s.config.Log.LogAttrs(ctx, slog.LevelWarn, "pod certificate request waits", i.attrs()...)
	}
}

func (i *item) attrs() []slog.Attr {
	return []slog.Attr{
		slog.String("request", i.object.Namespace+"/"+i.object.Name),
		slog.String("pod", i.object.Spec.PodName),
		slog.String("node", string(i.object.Spec.NodeName)),
		slog.String("reason", string(i.verdict.reason)),
		slog.String("detail", i.verdict.message),
	}
}
