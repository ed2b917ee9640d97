package server_test

import (
	"fmt"
	"testing"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/server"
)

// BenchmarkIssueX509SVIDs is one agent that asks for one SVID after the other, or
// for 100 at once, over mutual TLS on loopback, with a ledger in memory. Client and
// server share the process: it is for finding out what a change to this package
// does, to its allocations above all. What a certificate costs the server alone,
// beside its floor, is measured by test/load.
func BenchmarkIssueX509SVIDs(b *testing.B) {
	p, cluster, self := startDev(b, func(c *server.Config) { c.Limits.PerCaller = 1e6 })
	pod := cluster.AddPod(web, "web")
	client := trothv1.NewSVIDServiceClient(p.dial(b, p.attest(b, tokenFor(b, cluster, self)), ""))
	_, csr := newCSR(b)
	for _, items := range []int{1, 100} {
		b.Run(fmt.Sprintf("items=%d", items), func(b *testing.B) {
			in := &trothv1.IssueX509SVIDsRequest{}
			for range items {
				in.Items = append(in.Items, &trothv1.X509SVIDRequest{Csr: csr, Pod: reference(pod)})
			}
			b.ReportAllocs()
			for b.Loop() {
				out, err := client.IssueX509SVIDs(b.Context(), in)
				if err != nil {
					b.Fatal(err)
				}
				for _, result := range out.GetResults() {
					if result.GetSvid() == nil {
						b.Fatalf("refused: %v", result.GetRefusal())
					}
				}
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N*items), "us/certificate")
		})
	}
}
