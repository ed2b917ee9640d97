package server

import (
	"errors"
	"fmt"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Health returns the handler of the plain HTTP port: /livez says that the process
// runs, /readyz whether it should be given calls, and /metrics what it did.
func (s *Server) Health(metrics prometheus.Gatherer) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := s.Ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{}))
	return mux
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
