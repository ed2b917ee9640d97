package trustbundle

import "github.com/prometheus/client_golang/prometheus"

// metrics are the questions that an operator asks about what is published.
type metrics struct {
	writes *prometheus.CounterVec // what was written where, and did it work?
}

func newMetrics(r prometheus.Registerer, p *Publisher) (*metrics, error) {
	m := &metrics{
		writes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "troth_trust_bundle_writes_total", Help: "Writes of the trust bundle to where it is published, by place and whether they succeeded.",
		}, []string{"place", "result"}),
	}
	collectors := []prometheus.Collector{m.writes}
	for _, k := range p.places {
		collectors = append(collectors, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name:        "troth_trust_bundle_published_revision",
			Help:        "Revision of the trust bundle that this replica sees published, by place; 0 if there is none.",
			ConstLabels: prometheus.Labels{"place": k.place.String()},
		}, func() float64 {
			now, _ := k.seen.Load()
			return float64(now.revision)
		}))
	}
	for _, c := range collectors {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *metrics) written(p Place, err error) {
	result := "ok"
	if err != nil {
		result = "error"
	}
	m.writes.WithLabelValues(p.String(), result).Inc()
}
