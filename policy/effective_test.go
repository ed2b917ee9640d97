package policy_test

import (
	"encoding/json"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/policy"
)

var (
	web     = spiffeid.RequireFromString("spiffe://example.org/ns/shop/sa/web")
	client  = netip.MustParseAddr("10.0.0.7")
	probe4  = netip.MustParseAddr("169.254.7.127")
	probe6  = netip.MustParseAddr("fd16:9254:7127:1337:ffff:ffff:ffff:ffff")
	byMesh  = policy.Ref{Namespace: root, Name: "mesh"}
	byCart  = policy.Ref{Namespace: "shop", Name: "cart"}
	kubelet = []netip.Addr{probe4, probe6}
)

func TestDecide(t *testing.T) {
	plain := policy.Connection{Port: 8080, Source: client}
	proved := policy.Connection{Peer: web, Port: 8080, Source: client}
	from := func(source string) policy.Connection {
		return policy.Connection{Port: 8080, Source: netip.MustParseAddr(source)}
	}
	only := func(mode policy.Mode) *policy.Effective {
		return &policy.Effective{Mode: mode, DecidedBy: byMesh}
	}
	port := func(mode, at policy.Mode) *policy.Effective {
		return &policy.Effective{Mode: mode, DecidedBy: byMesh, Ports: []policy.PortMode{{Port: 80, Mode: mode}, {Port: 8080, Mode: at}, {Port: 9090, Mode: mode}}, PortsBy: byCart}
	}
	for _, test := range []struct {
		name       string
		effective  *policy.Effective
		connection policy.Connection
		kubelet    []netip.Addr
		want       policy.Verdict
	}{
		{"mTLS, STRICT", only(policy.Strict), proved, nil, policy.Verdict{Allowed: true, Reason: policy.MTLSAccepted, Policy: byMesh}},
		{"mTLS, PERMISSIVE", only(policy.Permissive), proved, nil, policy.Verdict{Allowed: true, Reason: policy.MTLSAccepted, Policy: byMesh}},
		{"mTLS, DISABLE", only(policy.Disable), proved, nil, policy.Verdict{Allowed: true, Reason: policy.MTLSAccepted, Policy: byMesh}},
		{"plaintext, STRICT", only(policy.Strict), plain, kubelet, policy.Verdict{Reason: policy.PlaintextRefused, Policy: byMesh}},
		{"plaintext, PERMISSIVE", only(policy.Permissive), plain, nil, policy.Verdict{Allowed: true, Reason: policy.PlaintextAccepted, Policy: byMesh}},
		{"plaintext, DISABLE", only(policy.Disable), plain, nil, policy.Verdict{Allowed: true, Reason: policy.PlaintextAccepted, Policy: byMesh}},
		{"plaintext, by default", &policy.Effective{Mode: policy.Permissive}, plain, nil, policy.Verdict{Allowed: true, Reason: policy.PlaintextAccepted}},

		{"plaintext, STRICT at the port", port(policy.Permissive, policy.Strict), plain, nil, policy.Verdict{Reason: policy.PlaintextRefused, Policy: byCart}},
		{"plaintext, DISABLE at the port", port(policy.Strict, policy.Disable), plain, nil, policy.Verdict{Allowed: true, Reason: policy.PlaintextAccepted, Policy: byCart}},
		{"mTLS, STRICT at the port", port(policy.Disable, policy.Strict), proved, nil, policy.Verdict{Allowed: true, Reason: policy.MTLSAccepted, Policy: byCart}},
		{"plaintext, DISABLE at another port", port(policy.Strict, policy.Disable), policy.Connection{Port: 8081, Source: client}, nil, policy.Verdict{Reason: policy.PlaintextRefused, Policy: byMesh}},

		{"probe over IPv4", only(policy.Strict), from("169.254.7.127"), kubelet, policy.Verdict{Allowed: true, Reason: policy.ProbeExempt, Policy: byMesh}},
		{"probe over IPv6", only(policy.Strict), from(probe6.String()), kubelet, policy.Verdict{Allowed: true, Reason: policy.ProbeExempt, Policy: byMesh}},
		{"probe over mapped IPv4", only(policy.Strict), from("::ffff:169.254.7.127"), kubelet, policy.Verdict{Allowed: true, Reason: policy.ProbeExempt, Policy: byMesh}},
		{"probe, address given mapped", only(policy.Strict), from("169.254.7.127"), []netip.Addr{netip.MustParseAddr("::ffff:169.254.7.127")}, policy.Verdict{Allowed: true, Reason: policy.ProbeExempt, Policy: byMesh}},
		{"probe of a STRICT port", port(policy.Permissive, policy.Strict), from("169.254.7.127"), kubelet, policy.Verdict{Allowed: true, Reason: policy.ProbeExempt, Policy: byCart}},
		{"probe, not STRICT", only(policy.Permissive), from("169.254.7.127"), kubelet, policy.Verdict{Allowed: true, Reason: policy.PlaintextAccepted, Policy: byMesh}},
		{"no addresses of a kubelet", only(policy.Strict), from("169.254.7.127"), nil, policy.Verdict{Reason: policy.PlaintextRefused, Policy: byMesh}},
		{"an invalid address of a kubelet", only(policy.Strict), plain, []netip.Addr{{}}, policy.Verdict{Reason: policy.PlaintextRefused, Policy: byMesh}},
		{"next to the probe", only(policy.Strict), from("169.254.7.128"), kubelet, policy.Verdict{Reason: policy.PlaintextRefused, Policy: byMesh}},
		{"the probe's address on a link", only(policy.Strict), from(probe6.String() + "%eth0"), kubelet, policy.Verdict{Reason: policy.PlaintextRefused, Policy: byMesh}},
		{"compatible is not mapped", only(policy.Strict), from("::169.254.7.127"), kubelet, policy.Verdict{Reason: policy.PlaintextRefused, Policy: byMesh}},

		{"nil", nil, proved, kubelet, policy.Verdict{Reason: policy.PolicyUnknown}},
		{"zero", &policy.Effective{}, proved, kubelet, policy.Verdict{Reason: policy.PolicyUnknown}},
		{"nil, of nothing", nil, policy.Connection{}, kubelet, policy.Verdict{Reason: policy.PolicyUnknown}},
		{"zero, a probe", &policy.Effective{}, from("169.254.7.127"), kubelet, policy.Verdict{Reason: policy.PolicyUnknown}},
		{"unknown mode", only(4), proved, nil, policy.Verdict{Reason: policy.PolicyUnknown}},
		{"unknown mode at the port", port(policy.Permissive, 4), proved, nil, policy.Verdict{Reason: policy.PolicyUnknown, Policy: byCart}},
		{"no mode at the port", port(policy.Permissive, policy.Unset), proved, nil, policy.Verdict{Reason: policy.PolicyUnknown, Policy: byCart}},
		{"zero connection", only(policy.Permissive), policy.Connection{}, nil, policy.Verdict{Reason: policy.ConnectionUnknown}},
		{"no port", only(policy.Permissive), policy.Connection{Peer: web, Source: client}, nil, policy.Verdict{Reason: policy.ConnectionUnknown}},
		{"no source", only(policy.Permissive), policy.Connection{Peer: web, Port: 8080}, nil, policy.Verdict{Reason: policy.ConnectionUnknown}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := test.effective.Decide(test.connection, test.kubelet...); got != test.want {
				t.Errorf("Decide() = %+v, want %+v", got, test.want)
			}
		})
	}
	if (policy.Verdict{}).Allowed {
		t.Error("the zero Verdict allows")
	}
}

func TestEffectiveEqual(t *testing.T) {
	base := func() *policy.Effective {
		return &policy.Effective{Mode: policy.Strict, DecidedBy: byMesh, Ports: []policy.PortMode{{Port: 80, Mode: policy.Disable}}, PortsBy: byCart}
	}
	if !base().Equal(base()) {
		t.Error("an Effective does not equal another of the same content")
	}
	for name, change := range map[string]func(*policy.Effective){
		"mode":       func(e *policy.Effective) { e.Mode = policy.Permissive },
		"decided by": func(e *policy.Effective) { e.DecidedBy = byCart },
		"port":       func(e *policy.Effective) { e.Ports[0].Port = 81 },
		"port mode":  func(e *policy.Effective) { e.Ports[0].Mode = policy.Permissive },
		"no port":    func(e *policy.Effective) { e.Ports = nil },
		"ports by":   func(e *policy.Effective) { e.PortsBy = byMesh },
	} {
		other := base()
		change(other)
		if base().Equal(other) || other.Equal(base()) {
			t.Errorf("an Effective equals one of another %s", name)
		}
	}
	var none *policy.Effective
	if !none.Equal(nil) || none.Equal(base()) || base().Equal(nil) || none.Equal(&policy.Effective{}) {
		t.Error("nil equals something else, or not itself")
	}
	if mode, by := none.At(80); mode != policy.Unset || !by.IsZero() {
		t.Errorf("At() of nil = %v, %v", mode, by)
	}
}

func TestEffectiveJSON(t *testing.T) {
	for want, e := range map[string]*policy.Effective{
		`{"mode":"PERMISSIVE"}`: {Mode: policy.Permissive},
		`{"mode":"STRICT","decidedBy":{"namespace":"istio-system","name":"mesh"},"ports":[{"port":80,"mode":"DISABLE"}],"portsBy":{"namespace":"shop","name":"cart"}}`: {
			Mode: policy.Strict, DecidedBy: byMesh, Ports: []policy.PortMode{{Port: 80, Mode: policy.Disable}}, PortsBy: byCart,
		},
	} {
		text, err := json.Marshal(e)
		if err != nil || string(text) != want {
			t.Errorf("Marshal() = %s, %v, want %s", text, err, want)
		}
		var back policy.Effective
		if err := json.Unmarshal(text, &back); err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff(e, &back); diff != "" {
			t.Errorf("read back (-want +got):\n%s", diff)
		}
	}
}
