package trustbundle

import (
	"context"
	"fmt"
	"strconv"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	certificatesac "k8s.io/client-go/applyconfigurations/certificates/v1"
	coreac "k8s.io/client-go/applyconfigurations/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"troth.dev/troth/ca"
)

// fieldManager is the name under which Troth owns what it writes.
const fieldManager = "troth"

// example is a zero object, by which a reflector knows its kind.
type example = runtime.Object

// An object that is not there is created, and not applied: to apply knows no way to say
// that there must be none, and would replace one that somebody made meanwhile.

type clusterTrustBundle struct {
	client       kubernetes.Interface
	name, signer string
}

func (c clusterTrustBundle) resource() (group, resource string) {
	return certificatesv1.SchemeGroupVersion.String(), "clustertrustbundles"
}

func (c clusterTrustBundle) source() (cache.ListerWatcher, example) {
	return cache.NewFilteredListWatchFromClient(c.client.CertificatesV1().RESTClient(), "clustertrustbundles", metav1.NamespaceAll,
		named(c.name)), &certificatesv1.ClusterTrustBundle{}
}

func (c clusterTrustBundle) read(o any) (string, metav1.Object, error) {
	object, ok := o.(*certificatesv1.ClusterTrustBundle)
	if !ok || object.Name != c.name {
		return "", nil, fmt.Errorf("trustbundle: a watch brought a %T", o)
	}
	return object.Spec.TrustBundle, object, nil
}

func (c clusterTrustBundle) write(ctx context.Context, before seen, bundle ca.Bundle, text string) error {
	if !before.exists {
		_, err := c.client.CertificatesV1().ClusterTrustBundles().Create(ctx, &certificatesv1.ClusterTrustBundle{
			ObjectMeta: metav1.ObjectMeta{Name: c.name, Annotations: annotations(bundle)},
			Spec:       certificatesv1.ClusterTrustBundleSpec{SignerName: c.signer, TrustBundle: text},
		}, metav1.CreateOptions{FieldManager: fieldManager})
		return err
	}
	_, err := c.client.CertificatesV1().ClusterTrustBundles().Apply(ctx,
		certificatesac.ClusterTrustBundle(c.name).WithResourceVersion(before.version).WithAnnotations(annotations(bundle)).
			WithSpec(certificatesac.ClusterTrustBundleSpec().WithSignerName(c.signer).WithTrustBundle(text)),
		metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
	return err
}

type configMap struct {
	client          kubernetes.Interface
	namespace, name string
}

func (c configMap) resource() (group, resource string) { return "v1", "configmaps" }

func (c configMap) source() (cache.ListerWatcher, example) {
	return cache.NewFilteredListWatchFromClient(c.client.CoreV1().RESTClient(), "configmaps", c.namespace, named(c.name)), &corev1.ConfigMap{}
}

func (c configMap) read(o any) (string, metav1.Object, error) {
	object, ok := o.(*corev1.ConfigMap)
	if !ok || object.Name != c.name {
		return "", nil, fmt.Errorf("trustbundle: a watch brought a %T", o)
	}
	return object.Data[Key], object, nil
}

func (c configMap) write(ctx context.Context, before seen, bundle ca.Bundle, text string) error {
	if !before.exists {
		_, err := c.client.CoreV1().ConfigMaps(c.namespace).Create(ctx, &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: c.name, Annotations: annotations(bundle)},
			Data:       map[string]string{Key: text},
		}, metav1.CreateOptions{FieldManager: fieldManager})
		return err
	}
	_, err := c.client.CoreV1().ConfigMaps(c.namespace).Apply(ctx,
		coreac.ConfigMap(c.name, c.namespace).WithResourceVersion(before.version).WithAnnotations(annotations(bundle)).
			WithData(map[string]string{Key: text}),
		metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
	return err
}

// named selects the one object of that name: whoever may read no others may watch it so.
func named(name string) func(*metav1.ListOptions) {
	return func(options *metav1.ListOptions) { options.FieldSelector = "metadata.name=" + name }
}

func annotations(b ca.Bundle) map[string]string {
	return map[string]string{RevisionAnnotation: strconv.FormatUint(b.Revision, 10)}
}

// revisionOf returns the revision that an object claims, or 0.
func revisionOf(o metav1.Object) uint64 {
	revision, err := strconv.ParseUint(o.GetAnnotations()[RevisionAnnotation], 10, 64)
	if err != nil {
		return 0
	}
	return revision
}
