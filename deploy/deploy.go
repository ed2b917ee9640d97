// Package deploy holds what a cluster has to have for Troth to run in it, as the
// files that are applied to it.
package deploy

import "embed"

// CRDs has the CustomResourceDefinitions that Troth reads, one in each file of the
// folder crds. Istio installs its own of the same names, which accept the same
// objects: one of the two is enough.
//
//go:embed crds/*.yaml
var CRDs embed.FS
