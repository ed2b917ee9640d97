package podcert

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
	certificatesv1 "k8s.io/api/certificates/v1"

	"troth.dev/troth/ca"
	"troth.dev/troth/identity"
)

// Reason is why a request is denied, or why it waits, in the spelling of conditions.
type Reason string

// Why a request is denied: what no time, and no other request for the same pod, makes
// right.
const (
	// UnsupportedKeyType and UnknownAnnotation have the names that Kubernetes gives them.
	UnsupportedKeyType = Reason(certificatesv1.PodCertificateRequestConditionUnsupportedKeyType)
	UnknownAnnotation  = Reason(certificatesv1.PodCertificateRequestConditionInvalidUserConfig)

	InvalidCertificateRequest Reason = "InvalidCertificateRequest" // it carries more than a key, or proves nothing
	NoCertificateSource       Reason = "NoCertificateSource"       // the pod projects no certificate of this signer
	PodReplaced               Reason = "PodReplaced"               // the pod of that name has another UID
	PodMismatch               Reason = "PodMismatch"               // the pod with that UID has another name
	PodOnOtherNode            Reason = "PodOnOtherNode"
	PodFinished               Reason = "PodFinished"
	PodDeleted                Reason = "PodDeleted"             // and its grace has ended
	ServiceAccountMismatch    Reason = "ServiceAccountMismatch" // the pod runs as another
)

// Why a request waits. The two about UIDs are not denied, because the kubelet would
// never ask for the pod again: of a service account or a node that was just made anew,
// the watches of the kubelet or ours may know the one before. Such a request is cleaned
// up after a quarter of an hour, and the kubelet then makes another.
const (
	PodNotFound               Reason = "PodNotFound"
	PodUnknown                Reason = "PodUnknown" // nobody could tell
	PodNotScheduled           Reason = "PodNotScheduled"
	PodPhaseUnknown           Reason = "PodPhaseUnknown"
	NodeUIDMismatch           Reason = "NodeUIDMismatch"
	ServiceAccountUIDMismatch Reason = "ServiceAccountUIDMismatch"
	NotIssued                 Reason = "NotIssued"  // there is no authority, or nothing could be recorded
	NotWritten                Reason = "NotWritten" // the API server did not take the status
)

// verdict is what becomes of a request. The zero verdict is that it may have its
// certificate.
type verdict struct {
	reason  Reason
	message string
	deny    bool // or it waits
}

func deny(reason Reason, format string, args ...any) verdict {
	return verdict{reason: reason, message: fmt.Sprintf(format, args...), deny: true}
}

func putOff(reason Reason, format string, args ...any) verdict {
	return verdict{reason: reason, message: fmt.Sprintf(format, args...)}
}

// judge decides whether a request may have a certificate, and returns the pod that it
// is for. What depends on the request alone comes first: it costs nobody anything.
func (s *Signer) judge(ctx context.Context, o *certificatesv1.PodCertificateRequest) (identity.Pod, verdict) {
	spec := &o.Spec
	if n := len(spec.UnverifiedUserAnnotations); n > 0 {
		return identity.Pod{}, deny(UnknownAnnotation, "%d user annotations: this signer knows none, because an identity is not asked for", n)
	}
	if err := checkStub(spec.StubPKCS10Request); err != nil {
		return identity.Pod{}, deny(InvalidCertificateRequest, "%v", err)
	}
	ref := identity.PodReference{Namespace: o.Namespace, Name: spec.PodName, UID: string(spec.PodUID)}
	pod, err := s.config.Pods.Pod(ctx, ref)
	switch {
	case errors.Is(err, identity.ErrPodReplaced):
		return pod, deny(PodReplaced, "the pod %q has another UID than %q", spec.PodName, spec.PodUID)
	case errors.Is(err, identity.ErrPodNotFound):
		return pod, putOff(PodNotFound, "the API server has no pod %q with the UID %q", spec.PodName, spec.PodUID)
	case err != nil:
		return pod, putOff(PodUnknown, "%v", err)
	}
	return pod, match(o, ref, pod, s.config.SignerName, time.Now())
}

// match compares what a request says with the API server's record of the pod.
func match(o *certificatesv1.PodCertificateRequest, ref identity.PodReference, pod identity.Pod, signer string, now time.Time) verdict {
	spec := &o.Spec
	switch {
	case pod.PodReference != ref:
		return deny(PodMismatch, "the UID %q is of another pod than %q in this namespace", spec.PodUID, spec.PodName)
	case pod.ServiceAccount != spec.ServiceAccountName:
		return deny(ServiceAccountMismatch, "the pod does not run as the service account %q", spec.ServiceAccountName)
	case !slices.Contains(pod.CertificateSigners, signer):
		return deny(NoCertificateSource, "the pod has no volume that projects a certificate of %q", signer)
	case pod.Node.Name == "":
		return putOff(PodNotScheduled, "the pod is on no node yet")
	case pod.Node.Name != string(spec.NodeName):
		return deny(PodOnOtherNode, "the pod is not on the node %q", spec.NodeName)
	}
	switch err := pod.Live(now); {
	case errors.Is(err, identity.ErrPodDeleted):
		return deny(PodDeleted, "%v", err)
	case err != nil && pod.Phase != identity.PodFinished:
		return putOff(PodPhaseUnknown, "the pod is in no phase that is known")
	case err != nil:
		return deny(PodFinished, "%v", err)
	case pod.Node.UID != string(spec.NodeUID) || pod.Node.UID == "":
		return putOff(NodeUIDMismatch, "the node %q does not have the UID %q", spec.NodeName, spec.NodeUID)
	case pod.ServiceAccountUID != string(spec.ServiceAccountUID) || pod.ServiceAccountUID == "":
		return putOff(ServiceAccountUIDMismatch, "the service account %q does not have the UID %q", spec.ServiceAccountName, spec.ServiceAccountUID)
	}
	return verdict{}
}

// refused says what becomes of a request whose certificate request package ca refuses,
// or that no certificate could be made for.
func refused(err error) verdict {
	var bad *ca.Error
	switch {
	case !errors.As(err, &bad):
		return putOff(NotIssued, "%v", err)
	case bad.Reason == ca.CSRKeyType:
		return deny(UnsupportedKeyType, "%v; ECDSAP256 is best, and ECDSAP384, ED25519, RSA3072 and RSA4096 will do", bad.Err)
	default:
		return deny(InvalidCertificateRequest, "%v", err)
	}
}

// checkStub returns an error unless a PKCS #10 request (RFC 2986 §4) has a key and a
// signature, and nothing that asks for more: the kubelet's have no subject and no
// attributes. It leaves it to package ca whether key and signature are good.
func checkStub(der []byte) error {
	if len(der) > ca.MaxCSR {
		return fmt.Errorf("a certificate request of %d bytes; the limit is %d", len(der), ca.MaxCSR)
	}
	var request, info, subject, attributes cryptobyte.String
	var version int64
	var hasAttributes bool
	input := cryptobyte.String(der)
	if !input.ReadASN1(&request, cbasn1.SEQUENCE) || !input.Empty() ||
		!request.ReadASN1(&info, cbasn1.SEQUENCE) ||
		!info.ReadASN1Integer(&version) ||
		!info.ReadASN1(&subject, cbasn1.SEQUENCE) ||
		!info.SkipASN1(cbasn1.SEQUENCE) || // the public key
		!info.ReadOptionalASN1(&attributes, &hasAttributes, cbasn1.Tag(0).ContextSpecific().Constructed()) || !info.Empty() ||
		!request.SkipASN1(cbasn1.SEQUENCE) || // the algorithm
		!request.SkipASN1(cbasn1.BIT_STRING) || !request.Empty() {
		return errors.New("the certificate request is not PKCS #10")
	}
	switch {
	case version != 0:
		return fmt.Errorf("the certificate request is of version %d, not 0", version)
	case !subject.Empty():
		return errors.New("the certificate request names a subject: an identity is not asked for")
	case !attributes.Empty():
		return errors.New("the certificate request has attributes: an identity is not asked for")
	}
	return nil
}
