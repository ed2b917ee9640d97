// Istio's own definition of PeerAuthentication, which the tests compare ours with.
// This module is apart from the product's so that nobody downloads Istio's API who
// builds Troth.
module troth.dev/troth/deploy/testdata/istio

go 1.26.0

require istio.io/api v1.31.1
