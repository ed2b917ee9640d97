package agent

import "github.com/prometheus/client_golang/prometheus"

// metrics are the questions that an operator asks of a node.
type metrics struct {
	attestations *prometheus.CounterVec // does the server accept this agent?
	issued       *prometheus.CounterVec // does it issue SVIDs, and why not?
	streamBreaks *prometheus.CounterVec // why did the stream end?
	connected    prometheus.Gauge       // is the stream open now?
	replaced     *prometheus.CounterVec // why are SVIDs replaced?
}

func newMetrics(r prometheus.Registerer, a *Agent) (*metrics, error) {
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
		replaced: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "troth_agent_replacements_total",
			Help: "SVIDs that were due to be replaced, the agent's own too, by cause: refresh, reissue, authority_gone.",
		}, []string{"cause"}),
	}
	// From the start, so that the first of a cause is seen to be one more.
	for _, why := range []cause{refresh, reissue, authorityGone} {
		m.replaced.WithLabelValues(string(why))
	}
	expiry := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "troth_agent_earliest_expiry_timestamp_seconds",
		Help: "When the first of the SVIDs held expires, in seconds since 1970; 0 if none is held.",
	}, func() float64 {
		if end := a.identities.summary().earliestExpiry; !end.IsZero() {
			return float64(end.Unix())
		}
		return 0
	})
	applied := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "troth_agent_bundle_applied_revision",
		Help: "The newest bundle revision that all of the node uses; 0 before the first.",
	}, func() float64 { return float64(a.standing().applied) })
	proved := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "troth_agent_bundle_proved_revision",
		Help: "The bundle revision by which the node proved that it trusts the prepared authority; 0 if it did not.",
	}, func() float64 {
		if s := a.standing(); s.outcome.proves() {
			return float64(s.outcome.revision)
		}
		return 0
	})
	for _, c := range []prometheus.Collector{
		m.attestations, m.issued, m.streamBreaks, m.connected, m.replaced, expiry, applied, proved,
	} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// capturedMetrics registers what is asked of a node that captures.
func (a *Agent) capturedMetrics(r prometheus.Registerer) error {
	gauge := func(name, help string, value func() int) error {
		return r.Register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help},
			func() float64 { return float64(value()) }))
	}
	if err := gauge("troth_agent_captured_pods", "Pods of the node whose traffic is captured.", a.pods.Captured); err != nil {
		return err
	}
	return gauge("troth_agent_uncaptured_pods", "Pods of the node whose traffic should be captured and is not.",
		func() int { return len(a.pods.Uncaptured()) })
}
