package proxy

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"

	"troth.dev/troth/handshake"
	"troth.dev/troth/policy"
)

// Direction is which way a connection goes, seen from the pod.
type Direction string

// The directions.
const (
	DirectionInbound  Direction = "inbound"
	DirectionOutbound Direction = "outbound"
)

// Metrics are the questions that an operator asks of a node's data path. All of a
// node's pods share them.
type Metrics struct {
	connections *prometheus.CounterVec // how did they end, and by which reason were they turned away?
	open        *prometheus.GaugeVec   // how many are there now?
	bytes       *prometheus.CounterVec // how many do they carry?
	handshakes  *prometheus.CounterVec // how many succeed, and at which step do the others stop?
	tunnels     *prometheus.GaugeVec   // how many are there now?
	in, out     prometheus.Counter     // of bytes
}

// NewMetrics registers the metrics. It fails if r has metrics of their names.
func NewMetrics(r prometheus.Registerer) (*Metrics, error) {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "troth_agent_proxy_" + name, Help: help}, labels)
	}
	gauge := func(name, help string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "troth_agent_proxy_" + name, Help: help}, []string{"direction"})
	}
	m := &Metrics{
		connections: counter("connections_total", "Connections that have ended, by reason.", "direction", "protocol", "reason"),
		open:        gauge("connections_open", "Connections that are open now."),
		bytes:       counter("bytes_total", "Bytes carried, into the node's pods and out of them.", "direction"),
		handshakes: counter("handshakes_total", "Handshakes of tunnels, by the step in which they stopped and why.",
			"direction", "order", "step", "code"),
		tunnels: gauge("tunnels_open", "Tunnels that are open now."),
	}
	m.in, m.out = m.bytes.WithLabelValues("in"), m.bytes.WithLabelValues("out")
	for _, c := range []prometheus.Collector{m.connections, m.open, m.bytes, m.handshakes, m.tunnels} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// began counts a connection that is open from now on, until ended.
func (m *Metrics) began(d Direction) { m.open.WithLabelValues(string(d)).Inc() }

// ended counts the end of a connection that began.
func (m *Metrics) ended(d Direction, p Protocol, reason policy.Reason) {
	m.open.WithLabelValues(string(d)).Dec()
	m.turnedAway(d, p, reason)
}

// turnedAway counts a connection that never began.
func (m *Metrics) turnedAway(d Direction, p Protocol, reason policy.Reason) {
	m.connections.WithLabelValues(string(d), p.String(), string(reason)).Inc()
}

// shook counts a handshake.
func (m *Metrics) shook(d Direction, o handshake.Order, err error) {
	step, code := handshake.StepComplete.String(), "OK"
	var stopped *handshake.Error
	switch {
	case errors.As(err, &stopped):
		step, code = stopped.Step.String(), string(stopped.Code)
	case err != nil:
		step, code = "none", "LOCAL"
	}
	m.handshakes.WithLabelValues(string(d), o.String(), step, code).Inc()
}
