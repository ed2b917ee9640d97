package proxy_test

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"troth.dev/troth/agent/proxy"
)

// serviceOf is a Service with n endpoints.
func serviceOf(n int, affinity time.Duration) *proxy.Destination {
	d := &proxy.Destination{Service: "shop/stock", Affinity: affinity}
	for i := range n {
		d.Endpoints = append(d.Endpoints, endpointAt(fmt.Sprintf("10.0.%d.%d:80", i/256, i%256), proxy.Troth))
	}
	return d
}

// Of connections that stay open, no endpoint gets far more than its share, whichever
// pod they are of: two choices leave a difference of a few, where one would leave
// dozens.
func TestTwoChoices(t *testing.T) {
	const endpoints, connections = 20, 2000
	b := proxy.NewBalancer(1)
	d := serviceOf(endpoints, 0)
	var releases []func()
	for i := range connections {
		_, release, ok := b.Choose(fmt.Sprint("pod", i%7), d, 80)
		if !ok {
			t.Fatal("there is no endpoint")
		}
		releases = append(releases, release)
	}
	busy := b.Busy()
	if len(busy) != endpoints {
		t.Fatalf("%d endpoints have connections, want %d", len(busy), endpoints)
	}
	for address, n := range busy {
		if share := connections / endpoints; n < share-8 || n > share+8 {
			t.Errorf("%v has %d connections, want about %d", address, n, share)
		}
	}
	for _, release := range releases {
		release()
		release() // counts once
	}
	if len(b.Busy()) != 0 {
		t.Errorf("after the end of all there are %v", b.Busy())
	}
}

// Both choices are random: without connections each endpoint comes up as often.
func TestChoicesAreRandom(t *testing.T) {
	b := proxy.NewBalancer(1)
	d := serviceOf(3, 0)
	seen := make(map[netip.AddrPort]int)
	for range 3000 {
		e, release, _ := b.Choose("pod", d, 80)
		release()
		seen[e.Address]++
	}
	for _, e := range d.Endpoints {
		if n := seen[e.Address]; n < 800 || n > 1200 {
			t.Errorf("%v was chosen %d times of 3000", e.Address, n)
		}
	}
}

func TestChoices(t *testing.T) {
	b := proxy.NewBalancer(1)
	plain, first, second := endpointAt("10.0.0.1:80", proxy.Plaintext), endpointAt("10.0.0.2:80", proxy.Troth), endpointAt("10.0.0.3:80", proxy.HBONE)
	newer, nobody := endpointAt("10.0.0.4:80", 9), endpointAt("10.0.0.5:80", proxy.Troth)
	nobody.ID = proxy.Endpoint{}.ID
	all := []proxy.Endpoint{plain, first, second, newer, nobody}
	for _, tt := range []struct {
		name  string
		tried []proxy.Endpoint
		want  []proxy.Endpoint
	}{
		{"at first", nil, []proxy.Endpoint{plain, first, second}},
		{"after plaintext", []proxy.Endpoint{plain}, []proxy.Endpoint{first, second}},
		{"after a tunnel", []proxy.Endpoint{first}, []proxy.Endpoint{second}},
		{"after both", []proxy.Endpoint{plain, second}, []proxy.Endpoint{first}},
		{"after all", []proxy.Endpoint{first, second}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got []proxy.Endpoint
			for range 200 {
				e, release, ok := b.Choose("pod", &proxy.Destination{Endpoints: all}, 80, tt.tried...)
				if !ok {
					continue
				}
				release()
				if !slices.Contains(got, e) {
					got = append(got, e)
				}
			}
			slices.SortFunc(got, func(a, b proxy.Endpoint) int { return a.Address.Compare(b.Address) })
			if !slices.Equal(got, tt.want) {
				t.Errorf("chosen are %v, want %v", got, tt.want)
			}
		})
	}
}

func TestAffinity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := proxy.NewBalancer(2)
		d := serviceOf(50, time.Hour)
		choose := func(pod string, port uint16, tried ...proxy.Endpoint) proxy.Endpoint {
			e, release, ok := b.Choose(pod, d, port, tried...)
			if !ok {
				t.Fatal("there is no endpoint")
			}
			release()
			return e
		}
		first := choose("a", 80)
		for range 20 { // each connection makes it last longer
			time.Sleep(time.Hour - time.Second)
			if got := choose("a", 80); got != first {
				t.Fatalf("the client is sent to %v, and had %v", got.Address, first.Address)
			}
		}
		others := 0
		for range 20 {
			time.Sleep(time.Hour)
			if choose("a", 80) != first {
				others++
			}
		}
		if others == 0 {
			t.Error("a client stays for longer than its affinity")
		}
		// One that cannot be reached is left, for good.
		first = choose("a", 80)
		second := choose("a", 80, first)
		if second == first || choose("a", 80) != second {
			t.Error("a client goes back to an endpoint that it could not reach")
		}
		// One that is gone is, too.
		d = serviceOf(50, time.Hour)
		d.Endpoints = slices.DeleteFunc(d.Endpoints, func(e proxy.Endpoint) bool { return e == second })
		third := choose("a", 80)
		if third == second || choose("a", 80) != third {
			t.Error("a client is sent to an endpoint that is gone")
		}
		// What is remembered has a bound, and the port matters.
		differ := 0
		for i := range 20 {
			first := choose("a", 80)
			choose(fmt.Sprint("b", i), 80)
			choose(fmt.Sprint("c", i), 81)
			if choose("a", 80) != first {
				differ++
			}
		}
		if differ == 0 {
			t.Error("more clients are remembered than the size")
		}
	})
}
