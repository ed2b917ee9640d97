package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/ca"
	"troth.dev/troth/identity"
	"troth.dev/troth/kube"
	"troth.dev/troth/kube/podcert"
)

// podCertificateLife is how long the certificates live that pods get by
// PodCertificateRequests: as long as SVIDs, and not less than the API server takes.
func (o options) podCertificateLife() time.Duration { return max(o.svidLife, podcert.MinLife) }

// nativeParts is what serves pods without an agent is made of.
type nativeParts struct {
	client      *kube.Client
	trustDomain spiffeid.TrustDomain
	issuer      *ca.Issuer
	pods        *kube.Pods
	agents      identity.ServiceAccount
	log         *slog.Logger
	metrics     prometheus.Registerer
}

// native returns what has to run so that pods get certificates and bundles by
// Kubernetes' own means, as the flags say.
func (o options) native(p nativeParts) ([]func(context.Context) error, error) {
	if o.signer == "" {
		return nil, nil
	}
	namespace := o.storeNamespace
	if namespace == "" {
		own, err := o.ownNamespace(p.agents)
		if err != nil {
			return nil, err
		}
		namespace = own
	}
	signer, err := podcert.New(podcert.Config{
		Client: p.client, TrustDomain: p.trustDomain, SignerName: o.signer, Issuer: p.issuer, Life: o.podCertificateLife(),
		Pods: p.pods, Namespace: namespace, Replica: o.replica, Log: p.log, Metrics: p.metrics,
	})
	if err != nil {
		return nil, err
	}
	return []func(context.Context) error{signer.Run}, nil
}
