package check

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	k8sversion "k8s.io/apimachinery/pkg/version"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/pager"

	"troth.dev/troth/api"
	"troth.dev/troth/kube"
)

// Config says what to look at, and as whom.
type Config struct {
	// Kubeconfig is the file that says how to reach the cluster, and Context one of its
	// contexts: kubectl's choice if they are empty.
	Kubeconfig, Context string
	// Server says how an operator reaches the control plane. If it is nil, what only
	// the control plane knows is not known.
	Server *api.Config
	// TrustDomain is the name of the trust domain; the server's own flags say it if it
	// is empty.
	TrustDomain string
	// ServerNamespace, NodeNamespace and RootNamespace are where the server and the
	// agents are, and the policies for the whole mesh. Required.
	ServerNamespace, NodeNamespace, RootNamespace string
	// Before is whether Troth is not installed yet.
	Before bool
	// NodeRoot is where the files of the node are that this program runs on: "/" on the
	// node itself. They are not read if it is empty.
	NodeRoot string
	// CNIFolder and CNIPrograms are where the node's container runtime has its
	// configurations and plugins, below NodeRoot. Required with NodeRoot.
	CNIFolder, CNIPrograms string
	// Version is this program's.
	Version string
	// Patience bounds each read; 15 seconds if it is zero.
	Patience time.Duration
	// Progress, if it is there, is told of each read that has ended, one at a time: how
	// many have, of how many, and what was read last.
	Progress func(done, of int, what string)
}

// parallel is how many reads are under way at once.
const parallel = 8

// maxPEM bounds a published bundle, in bytes. ClusterTrustBundles have a limit of their
// own, 1 MiB.
const maxPEM = 1 << 20

// collector reads into a snapshot.
type collector struct {
	config  Config
	s       *Snapshot
	cluster *kube.Client
	rest    *rest.Config
}

// read is one thing to read. do writes fields of the snapshot that no other read writes.
type read struct {
	what string
	do   func(context.Context)
}

// Collect reads the cluster, with at most 8 requests under way and a deadline for each
// read, and returns when all reads have ended. That something cannot be read is no
// error, but a Fact; an error says that the configuration is not usable, or is ctx's.
func Collect(ctx context.Context, config Config) (*Snapshot, error) {
	if config.ServerNamespace == "" || config.NodeNamespace == "" || config.RootNamespace == "" {
		return nil, errors.New("check: ServerNamespace, NodeNamespace and RootNamespace are required")
	}
	if config.NodeRoot != "" && (config.CNIFolder == "" || config.CNIPrograms == "") {
		return nil, errors.New("check: CNIFolder and CNIPrograms are required with NodeRoot")
	}
	if config.Patience == 0 {
		config.Patience = 15 * time.Second
	}
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = config.Kubeconfig
	way, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules,
		&clientcmd.ConfigOverrides{CurrentContext: config.Context}).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("check: load the client's configuration: %w", err)
	}
	client, err := kube.NewClient(way)
	if err != nil {
		return nil, err
	}
	c := &collector{config: config, cluster: client, rest: way, s: &Snapshot{
		At: time.Now(), Before: config.Before, OnNode: config.NodeRoot != "", Version: config.Version,
		ServerNamespace: config.ServerNamespace, NodeNamespace: config.NodeNamespace, RootNamespace: config.RootNamespace,
	}}

	reads := c.platform()
	if !config.Before {
		reads = slices.Concat(reads, c.installation(), c.control())
	}
	if config.NodeRoot != "" {
		reads = append(reads, read{"this node", func(context.Context) { c.s.Node = c.node() }})
	}
	// What is there decides over what else is looked for.
	first := []read{
		{"the Deployment", func(ctx context.Context) {
			c.s.Deployment = byName(c.cluster.AppsV1().Deployments(config.ServerNamespace).Get(ctx, serverName, metav1.GetOptions{}))
		}},
		{"the DaemonSet", func(ctx context.Context) {
			c.s.DaemonSet = byName(c.cluster.AppsV1().DaemonSets(config.NodeNamespace).Get(ctx, agentName, metav1.GetOptions{}))
		}},
		{"the keepers", func(ctx context.Context) {
			c.s.Keepers = byName(c.cluster.AppsV1().DaemonSets(config.NodeNamespace).Get(ctx, keeperName, metav1.GetOptions{}))
		}},
	}
	c.run(ctx, first, 0, len(first)+len(reads))
	c.s.TrustDomain = c.trustDomain()
	c.run(ctx, reads, len(first), len(first)+len(reads))
	return c.s, ctx.Err()
}

// run does reads, a few at a time, and returns when all have ended. done is how many
// have been done before, of how many there are.
func (c *collector) run(ctx context.Context, reads []read, done, of int) {
	var group errgroup.Group
	group.SetLimit(parallel)
	var mu sync.Mutex
	for _, r := range reads {
		group.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, c.config.Patience)
			defer cancel()
			r.do(ctx)
			if c.config.Progress != nil {
				mu.Lock()
				defer mu.Unlock()
				done++
				c.config.Progress(done, of, r.what)
			}
			return nil
		})
	}
	_ = group.Wait() // no read returns an error
}

// fact is what a call returned.
func fact[T any](value T, err error) Fact[T] {
	if err != nil {
		return Unread[T](err)
	}
	return Known(value)
}

// byName is what a call returned that asked for an object by its name. That there is
// none is known then.
func byName[T any](object *T, err error) Fact[*T] {
	if apierrors.IsNotFound(err) {
		return Known[*T](nil)
	}
	return fact(object, err)
}

// list reads all objects, in pages.
func list[T any, P interface {
	*T
	runtime.Object
}](ctx context.Context, options metav1.ListOptions, page pager.ListPageFunc) Fact[[]T] {
	all := []T{}
	err := pager.New(page).EachListItem(ctx, options, func(o runtime.Object) error {
		object, ok := o.(P)
		if !ok {
			return fmt.Errorf("a list brought a %T", o)
		}
		all = append(all, *object)
		return nil
	})
	return fact(all, err)
}

func (c *collector) trustDomain() Fact[string] {
	if c.config.TrustDomain != "" {
		return Known(c.config.TrustDomain)
	}
	d, err := c.s.Deployment.Get()
	if err != nil {
		return Unread[string](err)
	}
	if d != nil {
		if name, _ := flagOf(container(d.Spec.Template.Spec.Containers, "server"), "trust-domain"); name != "" {
			return Known(name)
		}
	}
	return Unread[string](errors.New("neither --trust-domain nor the server's flags say what the trust domain is"))
}

// platform is what is read of the cluster, before an installation too.
func (c *collector) platform() []read {
	core := c.cluster.CoreV1()
	return []read{
		{"the API server", func(ctx context.Context) { c.s.APIServer = fact(c.apiServer(ctx)) }},
		{"the APIs", func(ctx context.Context) { c.s.Resources = fact(c.resources(ctx)) }},
		{"the issuer of tokens", func(ctx context.Context) { c.s.TokenIssuer = fact(c.tokenIssuer(ctx)) }},
		{"nodes", func(ctx context.Context) {
			c.s.Nodes = list[corev1.Node](ctx, metav1.ListOptions{}, func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				return core.Nodes().List(ctx, o)
			})
			c.s.NodeRestriction = fact(c.nodeRestriction(ctx))
		}},
		{"leases of nodes", func(ctx context.Context) {
			c.s.NodeLeases = list[coordinationv1.Lease](ctx, metav1.ListOptions{}, func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				return c.cluster.CoordinationV1().Leases(corev1.NamespaceNodeLease).List(ctx, o)
			})
		}},
		{"namespaces", func(ctx context.Context) {
			c.s.Namespaces = list[corev1.Namespace](ctx, metav1.ListOptions{}, func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				return core.Namespaces().List(ctx, o)
			})
		}},
		{"your rights", func(ctx context.Context) { c.s.Mine = fact(c.may(ctx, "", c.myRights())) }},
		{"the definition of policies", func(ctx context.Context) { c.s.Definition = fact(c.definition(ctx)) }},
		{"pods and policies", func(ctx context.Context) {
			c.s.Cluster = fact(kube.Read(ctx, c.config.Kubeconfig, c.config.Context))
		}},
	}
}

// installation is what is read of Troth's objects.
func (c *collector) installation() []read {
	namespace := c.config.ServerNamespace
	return []read{
		{"Troth's pods", func(ctx context.Context) { c.s.Pods = c.pods(ctx) }},
		{"disruption budgets", func(ctx context.Context) {
			c.s.Budgets = list[policyv1.PodDisruptionBudget](ctx, metav1.ListOptions{}, func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				return c.cluster.PolicyV1().PodDisruptionBudgets(namespace).List(ctx, o)
			})
		}},
		{"the Service", func(ctx context.Context) {
			c.s.Service = byName(c.cluster.CoreV1().Services(namespace).Get(ctx, serverName, metav1.GetOptions{}))
		}},
		{"endpoints", func(ctx context.Context) {
			of := metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=" + serverName}
			c.s.Endpoints = list[discoveryv1.EndpointSlice](ctx, of, func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				return c.cluster.DiscoveryV1().EndpointSlices(namespace).List(ctx, o)
			})
		}},
		{"network policies", func(ctx context.Context) {
			c.s.NetworkPolicies = list[networkingv1.NetworkPolicy](ctx, metav1.ListOptions{}, func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				return c.cluster.NetworkingV1().NetworkPolicies(namespace).List(ctx, o)
			})
		}},
		{"the key-encryption key", func(ctx context.Context) { c.s.KeySize = fact(c.keySize(ctx)) }},
		{"the server's rights", func(ctx context.Context) {
			c.s.ServerRights = fact(c.may(ctx, "system:serviceaccount:"+namespace+":"+serverName, c.serverRights()))
		}},
		{"the agents' rights", func(ctx context.Context) {
			c.s.AgentRights = fact(c.may(ctx, "system:serviceaccount:"+c.config.NodeNamespace+":"+agentName, agentRights()))
		}},
		{"admission policies", func(ctx context.Context) { c.s.Admission = fact(c.admission(ctx)) }},
		{"the published bundle", func(ctx context.Context) { c.s.Published = fact(c.published(ctx)) }},
		{"the publisher", func(ctx context.Context) {
			c.s.Publisher = byName(c.cluster.CoordinationV1().Leases(namespace).Get(ctx, publisher, metav1.GetOptions{}))
		}},
		{"the ledger", func(ctx context.Context) { c.s.Ledger = fact(c.ledger(ctx)) }},
		{"certificate requests of pods", func(ctx context.Context) {
			c.s.Requests = list[certificatesv1.PodCertificateRequest](ctx, metav1.ListOptions{}, func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				return c.cluster.CertificatesV1().PodCertificateRequests(metav1.NamespaceAll).List(ctx, o)
			})
		}},
	}
}

func (c *collector) pods(ctx context.Context) Fact[[]corev1.Pod] {
	var all []corev1.Pod
	for _, namespace := range slices.Compact([]string{c.config.ServerNamespace, c.config.NodeNamespace}) {
		f := list[corev1.Pod](ctx, metav1.ListOptions{}, func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			return c.cluster.CoreV1().Pods(namespace).List(ctx, o)
		})
		pods, err := f.Get()
		if err != nil {
			return f
		}
		all = append(all, pods...)
	}
	return Known(all)
}

// apiServer asks for the version, and reads off the answer what time the API server
// has: the middle of the request is when it was said, within the second that the header
// is cut to.
func (c *collector) apiServer(ctx context.Context) (APIServer, error) {
	client, err := rest.HTTPClientFor(c.rest)
	if err != nil {
		return APIServer{}, err
	}
	address := c.cluster.Discovery().RESTClient().Get().AbsPath("/version").URL().String()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return APIServer{}, err
	}
	began := time.Now()
	response, err := client.Do(request)
	if err != nil {
		return APIServer{}, err
	}
	defer response.Body.Close()
	middle := began.Add(time.Since(began) / 2)
	content, err := io.ReadAll(io.LimitReader(response.Body, 1<<16))
	if err != nil {
		return APIServer{}, err
	}
	if response.StatusCode != http.StatusOK {
		return APIServer{}, fmt.Errorf("/version: %s", response.Status)
	}
	var info k8sversion.Info
	if err := json.Unmarshal(content, &info); err != nil {
		return APIServer{}, fmt.Errorf("/version: %w", err)
	}
	date, err := http.ParseTime(response.Header.Get("Date"))
	if err != nil {
		return APIServer{}, fmt.Errorf("the API server's clock: %w", err)
	}
	return APIServer{Version: info.GitVersion, Ahead: date.Sub(middle.Truncate(time.Second))}, nil
}

// resources asks what is served of the groups that Troth needs. A group that is not
// there serves nothing.
func (c *collector) resources(ctx context.Context) (map[string]bool, error) {
	all := make(map[string]bool)
	for _, group := range []string{"certificates.k8s.io/v1", "admissionregistration.k8s.io/v1", "discovery.k8s.io/v1"} {
		content, err := c.cluster.Discovery().RESTClient().Get().AbsPath("/apis/"+group).SetHeader("Accept", "application/json").Do(ctx).Raw()
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		var served metav1.APIResourceList
		if err := json.Unmarshal(content, &served); err != nil {
			return nil, fmt.Errorf("read what %s serves: %w", group, err)
		}
		for _, resource := range served.APIResources {
			all[group+"/"+resource.Name] = true
		}
	}
	return all, nil
}

func (c *collector) tokenIssuer(ctx context.Context) (string, error) {
	issuer, err := kube.Issuer(ctx, c.cluster)
	if err != nil {
		return "", err
	}
	_, err = kube.Keys(c.cluster)(ctx)
	return issuer, err
}

// nodeRestriction tries, as a kubelet and as a dry run, to give the kubelet's own node a
// label that only NodeRestriction keeps it from: the authorizer lets it change its node.
func (c *collector) nodeRestriction(ctx context.Context) (bool, error) {
	nodes, err := c.s.Nodes.Get()
	if err != nil {
		return false, err
	}
	if len(nodes) == 0 {
		return false, errors.New("there is no node to try it with")
	}
	kubelet := rest.CopyConfig(c.rest)
	kubelet.Impersonate = rest.ImpersonationConfig{UserName: "system:node:" + nodes[0].Name, Groups: []string{"system:nodes"}}
	client, err := kube.NewClient(kubelet)
	if err != nil {
		return false, err
	}
	const patch = `{"metadata":{"labels":{"node-restriction.kubernetes.io/troth-check":"tried"}}}`
	_, err = client.CoreV1().Nodes().Patch(ctx, nodes[0].Name, types.StrategicMergePatchType, []byte(patch),
		metav1.PatchOptions{DryRun: []string{metav1.DryRunAll}, FieldManager: "troth-check"})
	switch {
	case err == nil:
		return false, nil
	case apierrors.IsForbidden(err) && strings.Contains(err.Error(), "node-restriction.kubernetes.io/troth-check"):
		return true, nil // as the plugin says it, naming the label
	}
	return false, err
}

// may asks what user may do; an empty one is whoever asks.
func (c *collector) may(ctx context.Context, user string, rights []Right) (map[Right]bool, error) {
	all := make(map[Right]bool)
	for _, r := range rights {
		attributes := &authorizationv1.ResourceAttributes{
			Verb: r.Verb, Group: r.Group, Resource: r.Resource, Subresource: r.Subresource, Namespace: r.Namespace, Name: r.Name,
		}
		var status authorizationv1.SubjectAccessReviewStatus
		if user == "" {
			answer, err := c.cluster.AuthorizationV1().SelfSubjectAccessReviews().Create(ctx, &authorizationv1.SelfSubjectAccessReview{
				Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: attributes},
			}, metav1.CreateOptions{})
			if err != nil {
				return nil, err
			}
			status = answer.Status
		} else {
			namespace, _, _ := strings.Cut(strings.TrimPrefix(user, "system:serviceaccount:"), ":")
			answer, err := c.cluster.AuthorizationV1().SubjectAccessReviews().Create(ctx, &authorizationv1.SubjectAccessReview{
				Spec: authorizationv1.SubjectAccessReviewSpec{
					User: user, ResourceAttributes: attributes,
					Groups: []string{"system:serviceaccounts", "system:serviceaccounts:" + namespace, "system:authenticated"},
				},
			}, metav1.CreateOptions{})
			if err != nil {
				return nil, err
			}
			status = answer.Status
		}
		all[r] = status.Allowed && !status.Denied
	}
	return all, nil
}

func (c *collector) myRights() []Right {
	if !c.config.Before {
		var all []Right
		for _, verb := range []string{"list", "prepare", "activate", "taint", "revoke", "abort"} {
			all = append(all, Right{Verb: verb, Group: operators, Resource: "authorities"})
		}
		return append(all, Right{Verb: "list", Group: operators, Resource: "plaintextpeers"})
	}
	const rbac = "rbac.authorization.k8s.io"
	return []Right{
		{Verb: "create", Resource: "namespaces"},
		{Verb: "create", Group: rbac, Resource: "clusterroles"},
		{Verb: "create", Group: rbac, Resource: "clusterrolebindings"},
		{Verb: "create", Group: "apps", Resource: "deployments", Namespace: c.config.ServerNamespace},
		{Verb: "create", Group: "apps", Resource: "daemonsets", Namespace: c.config.NodeNamespace},
		{Verb: "create", Resource: "secrets", Namespace: c.config.ServerNamespace},
		{Verb: "create", Group: "apiextensions.k8s.io", Resource: "customresourcedefinitions"},
		{Verb: "create", Group: "admissionregistration.k8s.io", Resource: "validatingadmissionpolicies"},
	}
}

// serverRights are those that the server needs with the flags that it has.
func (c *collector) serverRights() []Right {
	const certificates = "certificates.k8s.io"
	var all []Right
	for _, resource := range []string{"pods", "serviceaccounts", "nodes", "services"} {
		all = append(all, Right{Verb: "list", Resource: resource}, Right{Verb: "watch", Resource: resource})
	}
	all = append(all,
		Right{Verb: "list", Group: "discovery.k8s.io", Resource: "endpointslices"},
		Right{Verb: "watch", Group: "discovery.k8s.io", Resource: "endpointslices"},
		Right{Verb: "list", Group: "apiextensions.k8s.io", Resource: "customresourcedefinitions", Name: definitionName},
		Right{Verb: "watch", Group: "apiextensions.k8s.io", Resource: "customresourcedefinitions", Name: definitionName},
		Right{Verb: "list", Group: policyGroup, Resource: "peerauthentications"},
		Right{Verb: "watch", Group: policyGroup, Resource: "peerauthentications"},
		Right{Verb: "create", Group: "authentication.k8s.io", Resource: "tokenreviews"},
		Right{Verb: "create", Group: "authorization.k8s.io", Resource: "subjectaccessreviews"})
	d, err := c.s.Deployment.Get()
	if err != nil || d == nil {
		return all
	}
	server := container(d.Spec.Template.Spec.Containers, "server")
	if status, ok := flagOf(server, "policy-status"); !ok || status != "false" {
		all = append(all, Right{Verb: "patch", Group: policyGroup, Resource: "peerauthentications", Subresource: "status"})
	}
	if signer, _ := flagOf(server, "signer"); signer != "" {
		all = append(all,
			Right{Verb: "list", Group: certificates, Resource: "podcertificaterequests"},
			Right{Verb: "watch", Group: certificates, Resource: "podcertificaterequests"},
			Right{Verb: "update", Group: certificates, Resource: "podcertificaterequests", Subresource: "status"},
			Right{Verb: "sign", Group: certificates, Resource: "signers", Name: signer})
	}
	published, _ := flagOf(server, "trust-bundle")
	for where := range strings.SplitSeq(published, ",") {
		if where == "clustertrustbundle" {
			all = append(all, Right{Verb: "attest", Group: certificates, Resource: "signers", Name: signerName})
		}
		if namespace, name, ok := strings.Cut(strings.TrimPrefix(where, "configmap="), "/"); ok {
			all = append(all, Right{Verb: "update", Resource: "configmaps", Namespace: namespace, Name: name})
		}
	}
	if namespace, _ := flagOf(server, "kubernetes-store"); namespace != "" {
		for _, verb := range []string{"get", "list", "watch", "create", "update", "delete"} {
			all = append(all, Right{Verb: verb, Resource: "configmaps", Namespace: namespace})
		}
		for _, verb := range []string{"get", "watch", "update"} {
			all = append(all, Right{Verb: verb, Resource: "secrets", Namespace: namespace, Name: "troth-authorities"})
		}
	}
	return all
}

// agentRights are what an account must not have that runs on every node.
func agentRights() []Right {
	return []Right{
		{Verb: "list", Resource: "pods"},
		{Verb: "list", Resource: "secrets"},
		{Verb: "get", Resource: "nodes"},
		{Verb: "create", Resource: "pods"},
		{Verb: "create", Resource: "serviceaccounts", Subresource: "token"},
		{Verb: "impersonate", Resource: "users"},
		{Verb: "create", Group: "certificates.k8s.io", Resource: "podcertificaterequests"},
	}
}

const (
	policyGroup    = "security.istio.io"
	definitionName = "peerauthentications." + policyGroup
)

func (c *collector) definition(ctx context.Context) (*Definition, error) {
	crd, err := c.cluster.Dynamic.Resource(schema.GroupVersionResource{
		Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions",
	}).Get(ctx, definitionName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	d := &Definition{Istio: crd.GetLabels()["app"] == "istio-pilot" || crd.GetLabels()["release"] == "istio"}
	versions, _, _ := unstructured.NestedSlice(crd.Object, "spec", "versions")
	for _, each := range versions {
		if version, ok := each.(map[string]any); ok && version["served"] == true {
			name, _ := version["name"].(string)
			d.Versions = append(d.Versions, name)
		}
	}
	conditions, _, _ := unstructured.NestedSlice(crd.Object, "status", "conditions")
	for _, each := range conditions {
		if condition, ok := each.(map[string]any); ok && condition["type"] == "Established" {
			d.Established = condition["status"] == "True"
		}
	}
	return d, nil
}

// keySize reads the key and keeps its size alone.
func (c *collector) keySize(ctx context.Context) (int, error) {
	secret, err := c.cluster.CoreV1().Secrets(c.config.ServerNamespace).Get(ctx, keySecret, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return -1, nil
	}
	if err != nil {
		return 0, err
	}
	key, ok := secret.Data[keyName]
	if !ok {
		return -1, nil
	}
	return len(key), nil
}

func (c *collector) admission(ctx context.Context) (Admission, error) {
	var a Admission
	client := c.cluster.AdmissionregistrationV1()
	policies, err := list[admissionv1.ValidatingAdmissionPolicy](ctx, metav1.ListOptions{}, func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
		return client.ValidatingAdmissionPolicies().List(ctx, o)
	}).Get()
	if err != nil {
		return a, err
	}
	a.Policies = policies
	a.Bindings, err = list[admissionv1.ValidatingAdmissionPolicyBinding](ctx, metav1.ListOptions{}, func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
		return client.ValidatingAdmissionPolicyBindings().List(ctx, o)
	}).Get()
	return a, err
}

// published reads the bundle from the ClusterTrustBundle and from the ConfigMap in the
// agents' namespace, where there is one.
func (c *collector) published(ctx context.Context) ([]Bundle, error) {
	td, err := c.s.TrustDomain.Get()
	if err != nil {
		return nil, err
	}
	var all []Bundle
	add := func(where, content string) error {
		b := Bundle{Where: where}
		var err error
		if b.Authorities, err = parsePEM(content); err != nil {
			return fmt.Errorf("%s: %w", where, err)
		}
		all = append(all, b)
		return nil
	}
	name := strings.ReplaceAll(signerName, "/", ":") + ":" + td
	bundle, err := c.cluster.CertificatesV1().ClusterTrustBundles().Get(ctx, name, metav1.GetOptions{})
	if err == nil {
		err = add("ClusterTrustBundle "+name, bundle.Spec.TrustBundle)
	}
	if err != nil && !apierrors.IsNotFound(err) {
		return nil, err
	}
	configMap, err := c.cluster.CoreV1().ConfigMaps(c.config.NodeNamespace).Get(ctx, bundleName, metav1.GetOptions{})
	if err == nil {
		err = add("ConfigMap "+c.config.NodeNamespace+"/"+bundleName, configMap.Data["bundle.pem"])
	}
	if err != nil && !apierrors.IsNotFound(err) {
		return nil, err
	}
	return all, nil
}

// parsePEM reads the certificates of a bundle, and nothing else.
func parsePEM(content string) ([]*x509.Certificate, error) {
	if len(content) > maxPEM {
		return nil, fmt.Errorf("the bundle has more than %d bytes", maxPEM)
	}
	var all []*x509.Certificate
	rest := []byte(content)
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("the bundle has a %q among its certificates", block.Type)
		}
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d of the bundle: %w", len(all)+1, err)
		}
		all = append(all, certificate)
	}
	if strings.TrimSpace(string(rest)) != "" {
		return nil, errors.New("the bundle ends with what is no certificate")
	}
	return all, nil
}

// ledger counts the store's ConfigMaps without reading what is in them.
func (c *collector) ledger(ctx context.Context) (int, error) {
	client, err := metadata.NewForConfig(c.rest)
	if err != nil {
		return 0, err
	}
	n := 0
	of := metav1.ListOptions{LabelSelector: storeLabel + "=ledger"}
	err = pager.New(func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
		return client.Resource(corev1.SchemeGroupVersion.WithResource("configmaps")).Namespace(c.config.ServerNamespace).List(ctx, o)
	}).EachListItem(ctx, of, func(runtime.Object) error {
		n++
		return nil
	})
	return n, err
}

// node reads what lies on this node.
func (c *collector) node() Fact[Node] {
	below := func(path string) string { return filepath.Join(c.config.NodeRoot, path) }
	n := Node{Sockets: make(map[string]bool)}
	var err error
	if n.Conflist, n.Plugins, err = readConflist(below(c.config.CNIFolder)); err != nil {
		return Unread[Node](err)
	}
	info, err := os.Stat(below(filepath.Join(c.config.CNIPrograms, pluginName)))
	n.Binary = err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
	for _, path := range c.sockets() {
		info, err := os.Stat(below(path))
		n.Sockets[path] = err == nil && info.Mode().Type() == fs.ModeSocket
	}
	return Known(n)
}

// sockets are those that the agents listen on, by their flags.
func (c *collector) sockets() []string {
	workload, plugin := "/run/troth/workload.sock", "/run/troth/cni.sock"
	if d, err := c.s.DaemonSet.Get(); err == nil && d != nil {
		agent := container(d.Spec.Template.Spec.Containers, "agent")
		if path, _ := flagOf(agent, "socket"); path != "" {
			workload = path
		}
		if path, _ := flagOf(agent, "cni-socket"); path != "" {
			plugin = path
		}
		if _, capture := flagOf(agent, "capture"); !capture {
			return []string{workload}
		}
	}
	return []string{workload, plugin}
}
