package kube

import (
	"fmt"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// Client is both ways to talk to the API server, over the same connections.
type Client struct {
	kubernetes.Interface // of Kubernetes' own kinds, in protobuf
	// Dynamic is of kinds that a CustomResourceDefinition describes, in JSON.
	Dynamic dynamic.Interface
}

// Connect returns a client as the kubeconfig file describes, with its current
// context, or, if kubeconfig is empty, as a pod's service account. It reads
// files and the environment, and sends nothing.
func Connect(kubeconfig string) (*Client, error) {
	var config *rest.Config
	var err error
	if kubeconfig == "" {
		config, err = rest.InClusterConfig()
	} else {
		config, err = clientcmd.BuildConfigFromFlags("", kubeconfig)
	}
	if err != nil {
		return nil, fmt.Errorf("kube: load the client's configuration: %w", err)
	}
	return NewClient(config)
}

// NewClient returns a client that speaks protobuf where it can and is not limited
// on this side. config is not changed.
func NewClient(config *rest.Config) (*Client, error) {
	config = rest.CopyConfig(config)
	config.ContentType = runtime.ContentTypeProtobuf
	config.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	// client-go's default of 5 requests in a second makes a start take minutes.
	// The API server has limits of its own, which know what others ask for.
	config.QPS = -1
	config.UserAgent = "troth"
	connections, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("kube: make a client: %w", err)
	}
	typed, err := kubernetes.NewForConfigAndClient(config, connections)
	if err != nil {
		return nil, fmt.Errorf("kube: make a client: %w", err)
	}
	untyped, err := dynamic.NewForConfigAndClient(config, connections)
	if err != nil {
		return nil, fmt.Errorf("kube: make a client: %w", err)
	}
	return &Client{Interface: typed, Dynamic: untyped}, nil
}
