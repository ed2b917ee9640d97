package agent

import "github.com/prometheus/client_golang/prometheus"

// metrics are the questions that an operator asks of a node.
type metrics struct {
	attestations *prometheus.CounterVec // does the server accept this agent?
	issued       *prometheus.CounterVec // does it issue SVIDs, and why not?
	streamBreaks *prometheus.CounterVec // why did the stream end?
	connected    prometheus.Gauge       // is the stream open now?
}

func newMetrics(r prometheus.Registerer, i *identities) (*metrics, error) {
	m := &metrics{
		attestations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "troth_agent_attestations_total", Help: "Attempts to attest, by reason of failure (OK if none).",
		}, []string{"reason"}),
		issued: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "troth_agent_svids_total", Help: "SVIDs asked for, by reason of failure (OK if none).",
		}, []string{"reason"}),
		streamBreaks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "troth_agent_stream_breaks_total", Help: "Ends of the node's stream, by reason.",
		}, []string{"reason"}),
		connected: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "troth_agent_connected", Help: "Whether the node's stream is open.",
		}),
	}
	expiry := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "troth_agent_earliest_expiry_timestamp_seconds",
		Help: "When the first of the SVIDs held expires, in seconds since 1970; 0 if none is held.",
	}, func() float64 {
		if end := i.summary().earliestExpiry; !end.IsZero() {
			return float64(end.Unix())
		}
		return 0
	})
	for _, c := range []prometheus.Collector{m.attestations, m.issued, m.streamBreaks, m.connected, expiry} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}
