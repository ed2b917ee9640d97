package podcert

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the questions that an operator asks of whoever signs.
type metrics struct {
	issued  prometheus.Counter     // how many certificates were handed out?
	denied  *prometheus.CounterVec // what was denied, and why?
	retries *prometheus.CounterVec // what waits, and why?
	latency prometheus.Histogram   // how long does a pod wait for its certificate?
}

func newMetrics(r prometheus.Registerer, s *Signer) (*metrics, error) {
	m := &metrics{
		issued: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "troth_pod_certificates_issued_total", Help: "X509-SVIDs handed out by PodCertificateRequests.",
		}),
		denied: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "troth_pod_certificates_denied_total", Help: "PodCertificateRequests that were denied, by reason.",
		}, []string{"reason"}),
		retries: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "troth_pod_certificates_retries_total", Help: "Times that a PodCertificateRequest could not be decided on and was put off, by reason.",
		}, []string{"reason"}),
		latency: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "troth_pod_certificates_seconds",
			Help:    "Time from the creation of a PodCertificateRequest, which the API server knows to the second, to its certificate.",
			Buckets: prometheus.ExponentialBuckets(0.25, 2, 13),
		}),
	}
	for _, c := range []prometheus.Collector{m.issued, m.denied, m.retries, m.latency,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "troth_pod_certificates_pending", Help: "PodCertificateRequests that this replica is to decide on.",
		}, func() float64 { return float64(s.pending.count()) }),
	} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// decided counts a request that has its final status.
func (m *metrics) decided(i *item) {
	if i.verdict.deny {
		m.denied.WithLabelValues(string(i.verdict.reason)).Inc()
		return
	}
	m.issued.Inc()
	m.latency.Observe(max(0, time.Since(i.object.CreationTimestamp.Time)).Seconds())
}
