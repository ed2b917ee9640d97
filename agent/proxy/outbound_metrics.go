package proxy

import "github.com/prometheus/client_golang/prometheus"

// poolMetrics are the questions that an operator asks of the tunnels that a node's pods
// have opened, beside those that [Metrics] answers.
type poolMetrics struct {
	renewals *prometheus.CounterVec // are their proofs renewed?
	retries  prometheus.Counter     // how often was another endpoint asked?
}

func newPoolMetrics(r prometheus.Registerer) (*poolMetrics, error) {
	m := &poolMetrics{
		renewals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "troth_agent_proxy_renewals_total", Help: "Attempts to renew the proof of a tunnel, by outcome: ok, failed.",
		}, []string{"outcome"}),
		retries: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "troth_agent_proxy_retries_total", Help: "Endpoints that were asked because another had failed.",
		}),
	}
	m.renewals.WithLabelValues("ok")
	m.renewals.WithLabelValues("failed")
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.renewals, m.retries} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *poolMetrics) renewed(err error) {
	if err != nil {
		m.renewals.WithLabelValues("failed").Inc()
		return
	}
	m.renewals.WithLabelValues("ok").Inc()
}
