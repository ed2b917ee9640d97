package kube

import (
	"fmt"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// Connect returns a client as the kubeconfig file describes, with its current
// context, or, if kubeconfig is empty, as a pod's service account. It reads
// files and the environment, and sends nothing.
func Connect(kubeconfig string) (kubernetes.Interface, error) {
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

// NewClient returns a client that speaks protobuf and is not limited on this
// side. config is not changed.
func NewClient(config *rest.Config) (kubernetes.Interface, error) {
	config = rest.CopyConfig(config)
	config.ContentType = runtime.ContentTypeProtobuf
	config.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	// client-go's default of 5 requests in a second makes a start take minutes.
	// The API server has limits of its own, which know what others ask for.
	config.QPS = -1
	config.UserAgent = "troth"
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("kube: make a client: %w", err)
	}
	return client, nil
}
