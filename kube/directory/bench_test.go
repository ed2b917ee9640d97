package directory

import (
	"fmt"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"troth.dev/troth/identity"
	"troth.dev/troth/policy"
)

// The cluster of the benchmarks.
const (
	manyServices        = 10_000
	endpointsPerService = 10
	manyNodes           = 1000
)

func podAddress(n int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)})
}

func clusterIP(n int) netip.Addr {
	return netip.AddrFrom4([4]byte{172, 16, byte(n >> 8), byte(n)})
}

func uidOf(n int) string { return fmt.Sprintf("7f9d3c52-4f2b-4b8e-9a55-%012d", n) }

func manyPods(i *Index) {
	for n := range manyServices * endpointsPerService {
		i.SetPod(time.Now(), identity.Pod{
			PodReference:   identity.PodReference{Namespace: "shop", Name: fmt.Sprint("a-deployment-of-the-usual-length-", n), UID: uidOf(n)},
			ServiceAccount: "cart", Node: identity.Node{Name: fmt.Sprint("node-", n%manyNodes)},
			Phase: identity.PodRunning, Addresses: []netip.Addr{podAddress(n)},
		}, &policy.Effective{Mode: policy.Permissive})
	}
	for n := range manyNodes {
		i.SetPod(time.Now(), identity.Pod{
			PodReference:   identity.PodReference{Namespace: agents.Namespace, Name: fmt.Sprint("agent-", n), UID: fmt.Sprint("agent-", n)},
			ServiceAccount: agents.Name, Node: identity.Node{Name: fmt.Sprint("node-", n)}, Phase: identity.PodRunning, HostNetwork: true, Labels: capturing,
		}, nil)
	}
}

func manySlice(n, port int) Slice {
	name := Name{"shop", fmt.Sprint("service-", n)}
	s := Slice{Name: Name{"shop", name.Name + "-x7k2p"}, Service: name, Ports: []NamedPort{{"http", uint16(port)}}}
	for e := range endpointsPerService {
		pod := n*endpointsPerService + e
		s.Endpoints = append(s.Endpoints, SliceEndpoint{
			Address: podAddress(pod), IsPod: true, PodUID: uidOf(pod), Node: fmt.Sprint("node-", pod%manyNodes), Ready: true, Serving: true,
		})
	}
	return s
}

func setManyServices(i *Index) {
	for n := range manyServices {
		i.SetService(ServiceObject{
			Name: Name{"shop", fmt.Sprint("service-", n)}, Addresses: []netip.Addr{clusterIP(n)}, Ports: []NamedPort{{"http", 80}},
		})
		i.SetSlice(manySlice(n, 8080))
	}
}

func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// What an index of 100,000 pods, 10,000 Services and as many slices of 10 endpoints
// each weighs.
func BenchmarkMemory(b *testing.B) {
	for b.Loop() {
		begin := heap()
		i := New(Config{Agents: agents})
		manyPods(i)
		pods := heap()
		setManyServices(i)
		services := heap()
		runtime.KeepAlive(i)
		b.ReportMetric(float64(pods-begin)/(manyServices*endpointsPerService), "B/pod")
		b.ReportMetric(float64(services-pods)/manyServices, "B/service")
		b.ReportMetric(float64(services-pods)/(1<<20), "MiB-services")
	}
}

// One Service's endpoints change, while 1,000 readers hold 100 addresses each, and
// all hold that of the Service: what that costs for each reader.
func BenchmarkChange(b *testing.B) {
	const each = 100
	i := New(Config{Agents: agents})
	manyPods(i)
	setManyServices(i)
	before := heap()
	var readers []*Reader
	for n := range manyNodes {
		r := i.Reader(fmt.Sprint("node-", n))
		for a := range each {
			address := clusterIP(a * (1 + n%7))
			r.Hold(address, address.String())
		}
		readers = append(readers, r)
	}
	read := func() (answers int) {
		for _, r := range readers {
			for {
				if _, ok := r.Next(); !ok {
					break
				}
				answers++
			}
		}
		return answers
	}
	read()
	perHeld := float64(heap()-before) / (manyNodes * each)
	n := 0
	for b.Loop() {
		n++
		i.SetSlice(manySlice(0, 1+n%60_000))
		if got := read(); got != manyNodes {
			b.Fatalf("%d readers were told, want all", got)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*manyNodes), "ns/reader")
	b.ReportMetric(perHeld, "B/held")
}
