package proxy

import "github.com/prometheus/client_golang/prometheus"

// Metrics are the questions that an operator asks of a node's data path. All of a
// node's pods share them.
type Metrics struct {
	connections *prometheus.CounterVec // how did they end, and by which reason were they turned away?
	open        prometheus.Gauge       // how many are there now?
	in, out     prometheus.Counter     // how many bytes do they carry?
}

// NewMetrics registers the metrics. It fails if r has metrics of their names.
func NewMetrics(r prometheus.Registerer) (*Metrics, error) {
	bytes := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "troth_agent_proxy_bytes_total", Help: "Bytes carried, into the node's pods and out of them.",
	}, []string{"direction"})
	m := &Metrics{
		connections: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "troth_agent_proxy_connections_total", Help: "Connections that have ended, by reason.",
		}, []string{"reason"}),
		open: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "troth_agent_proxy_connections_open", Help: "Connections that are open now.",
		}),
		in:  bytes.WithLabelValues("in"),
		out: bytes.WithLabelValues("out"),
	}
	for _, c := range []prometheus.Collector{m.connections, m.open, bytes} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}
