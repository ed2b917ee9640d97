package server

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"troth.dev/troth/ca"
	"troth.dev/troth/token"
)

// metrics are the questions that an operator asks of a replica.
type metrics struct {
	calls   *prometheus.CounterVec   // what is asked, and what is refused and why?
	latency *prometheus.HistogramVec // how long do unary calls take?
	issued  prometheus.Counter       // how many SVIDs were issued to agents and workloads?
	minted  prometheus.Counter       // how many to CI jobs?
	items   *prometheus.CounterVec   // which items of batches were refused, and why?
	tokens  *prometheus.CounterVec   // what became of the tokens presented?
	streams *prometheus.GaugeVec     // how many streams are open?
}

func newMetrics(r prometheus.Registerer, s *Server) (*metrics, error) {
	m := &metrics{
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "troth_server_calls_total", Help: "Calls that ended, by method and reason of refusal (OK if none).",
		}, []string{"method", "reason"}),
		latency: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "troth_server_call_seconds", Help: "Duration of unary calls.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 14),
		}, []string{"method"}),
		issued: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "troth_server_issued_total", Help: "X509-SVIDs issued to agents and workloads.",
		}),
		minted: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "troth_server_minted_total", Help: "X509-SVIDs of the trust domain for tests issued to CI jobs.",
		}),
		items: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "troth_server_refused_items_total", Help: "Items of batches that were refused, by reason.",
		}, []string{"reason"}),
		tokens: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "troth_server_tokens_total", Help: "Tokens presented, by reason of refusal (OK if none).",
		}, []string{"reason"}),
		streams: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "troth_server_streams", Help: "Open streams.",
		}, []string{"method"}),
	}
	collectors := []prometheus.Collector{m.calls, m.latency, m.issued, m.minted, m.items, m.tokens, m.streams,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "troth_server_authority_expiry_timestamp_seconds",
			Help: "When the active authority expires, in seconds since 1970; 0 if none is active.",
		}, s.activeExpiry),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "troth_server_rotation_overdue",
			Help: "1 while a change of an authority is overdue that the schedule should have made.",
		}, s.overdue),
	}
	for level, count := range map[string]func(ca.Propagation) int{
		"expected": func(p ca.Propagation) int { return p.Expected },
		"received": func(p ca.Propagation) int { return p.Received },
		"applied":  func(p ca.Propagation) int { return p.Applied },
		"proved":   func(p ca.Propagation) int { return p.Proved },
	} {
		collectors = append(collectors, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name:        "troth_server_agents",
			Help:        "Agents that should be running, and how many of them have the bundle that matters, use it, and have proved the prepared authority.",
			ConstLabels: prometheus.Labels{"level": level},
		}, func() float64 {
			known, _ := s.fleet.Propagation().Load()
			return float64(count(known))
		}))
	}
	for _, c := range collectors {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *metrics) called(method string, err error, took time.Duration) {
	m.calls.WithLabelValues(method, reasonOf(err)).Inc()
	if took > 0 {
		m.latency.WithLabelValues(method).Observe(took.Seconds())
	}
}

func (m *metrics) refusedItem(r *refusal) { m.items.WithLabelValues(r.reason).Inc() }

func (m *metrics) verified(err error) {
	reason := "OK"
	if e, ok := errors.AsType[*token.Error](err); ok {
		reason = string(e.Reason)
	}
	m.tokens.WithLabelValues(reason).Inc()
}

// reasonOf is bounded: every reason is a constant of ours.
func reasonOf(err error) string {
	if err == nil {
		return "OK"
	}
	if r := refusalOf(err); r != nil {
		return r.reason
	}
	return "INTERNAL"
}

func (s *Server) activeExpiry() float64 {
	set, _ := s.Issuer.Authorities().Load()
	active, ok := set.Active()
	if !ok {
		return 0
	}
	return float64(active.NotAfter().Unix())
}

func (s *Server) overdue() float64 {
	if blocked, _ := s.Issuer.Overdue().Load(); blocked != nil {
		return 1
	}
	return 0
}
