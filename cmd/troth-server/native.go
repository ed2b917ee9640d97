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
	"troth.dev/troth/kube/trustbundle"
)

// defaultSigner names the ClusterTrustBundle where nothing is signed.
const defaultSigner = "troth.dev/svid"

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
	if o.signer == "" && len(o.bundlePlaces) == 0 {
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
	var runs []func(context.Context) error
	signerName := defaultSigner
	if o.signer != "" {
		signerName = o.signer
		signer, err := podcert.New(podcert.Config{
			Client: p.client, TrustDomain: p.trustDomain, SignerName: o.signer, Issuer: p.issuer, Life: o.podCertificateLife(),
			Pods: p.pods, Namespace: namespace, Replica: o.replica, Log: p.log, Metrics: p.metrics,
		})
		if err != nil {
			return nil, err
		}
		runs = append(runs, signer.Run)
	}
	if len(o.bundlePlaces) > 0 {
		publisher, err := trustbundle.New(trustbundle.Config{
			Client: p.client, TrustDomain: p.trustDomain, SignerName: signerName, Places: o.bundlePlaces,
			Bundle: p.issuer.Bundle(), Current: p.issuer.CurrentBundle, Published: p.issuer.Published,
			Namespace: namespace, Replica: o.replica, Log: p.log, Metrics: p.metrics,
		})
		if err != nil {
			return nil, err
		}
		runs = append(runs, publisher.Run)
	}
	return runs, nil
}
