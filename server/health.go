package server

import (
	"errors"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"

	"troth.dev/troth/internal/health"
)

// Health returns the handler of the plain HTTP port: /livez says that the process
// runs, /readyz whether it should be given calls, and /metrics what it did.
func (s *Server) Health(metrics prometheus.Gatherer) http.Handler {
	return health.Handler(s.Ready, metrics)
}

// Ready returns nil if the server can answer calls: it serves, the pods are
// known, and an authority can sign. That the API server answers at this moment
// is not asked for: what is known keeps serving.
func (s *Server) Ready() error {
	if s.drained.Load() {
		return errors.New("server: shutting down")
	}
	if s.own.certificate.Load() == nil {
		return errors.New("server: not serving yet")
	}
	select {
	case <-s.Pods.Synced():
	default:
		return errors.New("server: the pods are not known yet")
	}
	return s.Issuer.Ready()
}
