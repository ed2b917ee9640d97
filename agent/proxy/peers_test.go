package proxy_test

import (
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"troth.dev/troth/agent/proxy"
)

func TestPeers(t *testing.T) {
	noon := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	peer := func(pod string, port uint16, source string, minutes int) proxy.Peer {
		return proxy.Peer{
			Pod: pod, Port: port, Source: netip.MustParseAddr(source),
			Last: noon.Add(time.Duration(minutes) * time.Minute),
		}
	}
	for _, tt := range []struct {
		name string
		size int
		seen []proxy.Peer
		want []proxy.Peer // since noon
	}{
		{"nobody", 3, nil, nil},
		{
			"newest first", 3,
			[]proxy.Peer{peer("a", 80, "10.0.0.1", 2), peer("a", 80, "10.0.0.2", 3), peer("a", 80, "10.0.0.3", 1)},
			[]proxy.Peer{peer("a", 80, "10.0.0.2", 3), peer("a", 80, "10.0.0.1", 2), peer("a", 80, "10.0.0.3", 1)},
		},
		{
			"of one time, by name", 4,
			[]proxy.Peer{peer("b", 80, "10.0.0.1", 0), peer("a", 81, "10.0.0.1", 0), peer("a", 80, "10.0.0.2", 0), peer("a", 80, "10.0.0.1", 0)},
			[]proxy.Peer{peer("a", 80, "10.0.0.1", 0), peer("a", 80, "10.0.0.2", 0), peer("a", 81, "10.0.0.1", 0), peer("b", 80, "10.0.0.1", 0)},
		},
		{
			"one for each pod, port and source", 9,
			[]proxy.Peer{peer("a", 80, "10.0.0.1", 1), peer("a", 80, "::ffff:10.0.0.1", 2), peer("a", 80, "10.0.0.1", 3)},
			[]proxy.Peer{peer("a", 80, "10.0.0.1", 3)},
		},
		{
			"the newest time counts", 9,
			[]proxy.Peer{peer("a", 80, "10.0.0.1", 5), peer("a", 80, "10.0.0.1", 4)},
			[]proxy.Peer{peer("a", 80, "10.0.0.1", 5)},
		},
		{
			"since", 9,
			[]proxy.Peer{peer("a", 80, "10.0.0.1", -1), peer("a", 80, "10.0.0.2", 0)},
			[]proxy.Peer{peer("a", 80, "10.0.0.2", 0)},
		},
		{
			"the one not seen for longest goes", 2,
			[]proxy.Peer{peer("a", 80, "10.0.0.1", 1), peer("a", 80, "10.0.0.2", 2), peer("a", 80, "10.0.0.1", 3), peer("a", 80, "10.0.0.3", 4)},
			[]proxy.Peer{peer("a", 80, "10.0.0.3", 4), peer("a", 80, "10.0.0.1", 3)},
		},
		{
			"at least one", -7,
			[]proxy.Peer{peer("a", 80, "10.0.0.1", 1), peer("a", 80, "10.0.0.2", 2)},
			[]proxy.Peer{peer("a", 80, "10.0.0.2", 2)},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := proxy.NewPeers(tt.size)
			for _, peer := range tt.seen {
				p.Seen(peer)
			}
			if got := p.Recent(noon); !slices.Equal(got, tt.want) {
				t.Errorf("Recent() = %v, want %v", got, tt.want)
			}
		})
	}
}

func TestPeersAtOnce(t *testing.T) {
	const size = 50
	p := proxy.NewPeers(size)
	begun := time.Now()
	var all sync.WaitGroup
	for g := range 8 {
		all.Go(func() {
			for n := range 1000 {
				p.Seen(proxy.Peer{Pod: "a", Port: uint16(n), Source: netip.AddrFrom4([4]byte{10, 0, 0, byte(g)}), Last: time.Now()})
				if got := len(p.Recent(begun)); got < 1 || got > size {
					t.Errorf("Recent() has %d peers, want 1 to %d", got, size)
				}
			}
		})
	}
	all.Wait()
	got := p.Recent(begun)
	if len(got) != size || !slices.IsSortedFunc(got, func(a, b proxy.Peer) int { return b.Last.Compare(a.Last) }) {
		t.Errorf("Recent() has %d peers, sorted or not: %v, want %d, newest first", len(got), got, size)
	}
}
