package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"troth.dev/troth/policy"
)

// TestSteps compares, for every two policies over two ports, what the steps say
// of a port with what the policies say of it.
func TestSteps(t *testing.T) {
	var all []*policy.Effective
	modes := []policy.Mode{policy.Disable, policy.Permissive, policy.Strict}
	for _, mode := range modes {
		for _, at80 := range modes {
			for _, at90 := range modes {
				e := &policy.Effective{Mode: mode, DecidedBy: policy.Ref{Namespace: "shop", Name: "default"}}
				for _, p := range []policy.PortMode{{Port: 80, Mode: at80}, {Port: 90, Mode: at90}} {
					if p.Mode != mode {
						e.Ports, e.PortsBy = append(e.Ports, p), policy.Ref{Namespace: "shop", Name: "web"}
					}
				}
				all = append(all, e)
			}
		}
	}
	for _, before := range all {
		for _, after := range all {
			steps := stepsBetween(before, after)
			for port, name := range map[uint16]string{80: "80", 90: "90", 7070: "7070"} {
				from, _ := before.At(port)
				to, by := after.At(port)
				told := 0
				for _, s := range steps {
					if !covers(s.ports, name) {
						continue
					}
					told++
					if s.before != from || s.after != to || s.by != by {
						t.Errorf("%+v to %+v: the step %+v is wrong about port %s", before, after, s, name)
					}
				}
				if want := map[bool]int{true: 1, false: 0}[from != to]; told != want {
					t.Errorf("%+v to %+v: %d steps are about port %s, want %d", before, after, told, name, want)
				}
			}
		}
	}
}

// covers reads the words of a step: "all", "all but 80, 90", "80".
func covers(ports, port string) bool {
	but, all := strings.CutPrefix(ports, "all")
	named := false
	for _, name := range strings.Split(strings.TrimPrefix(but, " but "), ", ") {
		named = named || name == port
	}
	return all != named
}

func TestParsePeersRefuses(t *testing.T) {
	for name, test := range map[string]struct{ data, want string }{
		"nothing":  {"", "EOF"},
		"object":   {"{}", "json: cannot unmarshal object into Go value of type []main.peer"},
		"two":      {"[] []", "there is more than one JSON value"},
		"unknown":  {`[{"form": "a"}]`, `json: unknown field "form"`},
		"no from":  {`[{"to": {"namespace": "a", "name": "b"}, "port": 1}]`, "[0].from is missing"},
		"no to":    {`[{"from": "a", "to": {"namespace": "a"}, "port": 1}]`, "[0].to has to be namespace and name"},
		"no port":  {`[{"from": "a", "to": {"namespace": "a", "name": "b"}}]`, "[0].port has to be from 1 to 65535"},
		"bad time": {`[{"last": "today"}]`, `parsing time "today" as "2006-01-02T15:04:05Z07:00": cannot parse "today" as "2006"`},
	} {
		t.Run(name, func(t *testing.T) {
			peers, err := parsePeers([]byte(test.data))
			if err == nil || err.Error() != test.want {
				t.Errorf("parsePeers() = %v, %v; want the error %q", peers, err, test.want)
			}
		})
	}
}

// FuzzParsePeers: what is read is whole, and is read again from what is printed.
func FuzzParsePeers(f *testing.F) {
	f.Add([]byte(`[]`))
	f.Add([]byte(`[{"from":"10.0.0.1","to":{"namespace":"a","name":"b"},"port":80,"last":"2026-10-01T10:00:00Z"}]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		peers, err := parsePeers(data)
		if err != nil {
			return
		}
		for _, p := range peers {
			if p.From == "" || p.To.Namespace == "" || p.To.Name == "" || p.Port == 0 {
				t.Errorf("%+v is not whole", p)
			}
		}
		printed, err := json.Marshal(peers)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := parsePeers(printed); err != nil || len(again) != len(peers) {
			t.Errorf("%s is read as %v, %v", printed, again, err)
		}
	})
}

// TestGrid shows that names out of files can neither command a terminal nor break
// out of their row.
func TestGrid(t *testing.T) {
	var b bytes.Buffer
	out := newPrinter(&b)
	out.grid([][]string{{"A", "B", "C"}, {"x\x1b[2Jy", "", "STRICT"}, {"", "größer\nz", ""}, {"a"}})
	const want = `A            B            C
"x\x1b[2Jy"               STRICT
             "größer\nz"
a
`
	if got := b.String(); got != want {
		t.Errorf("the grid is\n%s\nand not\n%s", got, want)
	}
}
