package payments_test

import (
	"context"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"

	payments "troth.dev/troth/examples/grpc"
	"troth.dev/troth/trothtest"
)

// In a bubble of testing/synctest an hour passes at once, and nothing is waited for.
func TestPayments(t *testing.T) {
	begun := time.Now() // outside of the bubble: this clock is real
	synctest.Test(t, func(t *testing.T) {
		a := trothtest.New(t)
		frontend, server := a.Identity("/ns/shop/sa/frontend"), a.Identity("/ns/shop/sa/payments")
		dial := serve(t, server, frontend.ID())

		// pay dials anew: it is the handshake that is tested.
		pay := func(as *trothtest.Identity) error {
			client := newClient(t, as, server.ID(), dial)
			defer client.Close()
			_, err := client.Pay(t.Context(), "invoice 17")
			return err
		}
		must := func(when string) {
			t.Helper()
			if err := pay(frontend); err != nil {
				t.Fatalf("%s: %v", when, err)
			}
		}
		mustFail := func(when string, as *trothtest.Identity, why string) {
			t.Helper()
			if err := pay(as); err == nil || !strings.Contains(err.Error(), why) {
				t.Errorf("%s: %v, want %q", when, err, why)
			}
		}

		must("at first")
		mustFail("somebody else", a.Identity("/ns/shop/sa/reports"), "Unavailable")

		// Hours later, with SVIDs of an hour that are renewed.
		open := newClient(t, frontend, server.ID(), dial)
		defer open.Close()
		if receipt, err := open.Pay(t.Context(), "invoice 18"); err != nil || receipt != "invoice 18 paid by /ns/shop/sa/frontend" {
			t.Fatalf("%q, %v", receipt, err)
		}
		time.Sleep(5 * time.Hour)
		must("after five hours")

		// The root is replaced, step by step.
		a.Prepare()
		must("the next root is in the bundle")
		a.Activate()
		must("the next root signs")
		a.Revoke()
		must("the old root is gone")

		// The service's SVID runs out: callers notice, and all is well once it has a new one.
		server.Expire()
		mustFail("expired", frontend, "expired")
		server.Renew()
		must("renewed")

		// What is open stays open: TLS looks at certificates in the handshake alone.
		if _, err := open.Pay(t.Context(), "invoice 19"); err != nil {
			t.Errorf("over the connection from before all that: %v", err)
		}
	})
	t.Logf("took %v", time.Since(begun))
}

// The same over the Workload API's socket, as in production.
func TestPaymentsFromTheWorkloadAPI(t *testing.T) {
	a := trothtest.New(t)
	frontend, server := a.Identity("/ns/shop/sa/frontend"), a.Identity("/ns/shop/sa/payments")
	source := func(i *trothtest.Identity) *workloadapi.X509Source {
		source, err := workloadapi.NewX509Source(t.Context(), workloadapi.WithClientOptions(workloadapi.WithAddr(i.Socket())))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { source.Close() })
		return source
	}
	client := newClient(t, source(frontend), server.ID(), serve(t, source(server), frontend.ID()))
	defer client.Close()
	if _, err := client.Pay(t.Context(), "invoice 20"); err != nil {
		t.Error(err)
	}
}

// serve serves in memory until the test ends, and returns how to get there.
func serve(t *testing.T, source payments.Source, caller spiffeid.ID) grpc.DialOption {
	t.Helper()
	l := bufconn.Listen(64 << 10)
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- payments.Serve(ctx, l, source, caller) }()
	t.Cleanup(func() {
		stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) })
}

func newClient(t *testing.T, source payments.Source, server spiffeid.ID, dial grpc.DialOption) *payments.Client {
	t.Helper()
	client, err := payments.NewClient("passthrough:///payments", source, server, dial)
	if err != nil {
		t.Fatal(err)
	}
	return client
}
