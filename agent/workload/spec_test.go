package workload_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"troth.dev/troth/agent/workload"
)

// The rules of the SPIFFE Workload Endpoint.
func TestWorkloadEndpoint(t *testing.T) {
	ca := newAuthority(t, "example.org")
	source := &pods{}
	source.set(webPod, ready(t, ca, 1))
	_, path := start(t, workload.Config{Source: source})
	conn := dial(t, path)

	t.Run("E-1 not over TCP", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		err = newServer(t, workload.Config{Source: source}).Serve(ctx, l)
		want := `workload: callers on "tcp" are not known by the kernel: only a Unix socket will do`
		if err == nil || err.Error() != want {
			t.Errorf("Serve(TCP listener) = %v, want %q", err, want)
		}
	})
	t.Run("E-1 not over TCP that passes for a Unix socket", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		log, logged := newLog()
		serveOn(t, newServer(t, workload.Config{Source: source, Log: log}), disguised{l})
		tcp, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer tcp.Close()
		tcp.SetReadDeadline(time.Now().Add(20 * time.Second))
		if n, err := tcp.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Errorf("Read() = %d, %v, want a closed connection", n, err)
		}
		if line := logged.next(t); !strings.Contains(line, "no peer that the kernel knows") {
			t.Errorf("log = %q, want the reason", line)
		}
	})

	methods := []struct {
		name   string
		stream bool
	}{
		{workloadpb.SpiffeWorkloadAPI_FetchX509SVID_FullMethodName, true},
		{workloadpb.SpiffeWorkloadAPI_FetchX509Bundles_FullMethodName, true},
		{workloadpb.SpiffeWorkloadAPI_FetchJWTSVID_FullMethodName, false},
		{workloadpb.SpiffeWorkloadAPI_FetchJWTBundles_FullMethodName, true},
		{workloadpb.SpiffeWorkloadAPI_ValidateJWTSVID_FullMethodName, false},
		{workloadpb.SpiffeWorkloadAPI_FetchWITSVID_FullMethodName, true},
		{workloadpb.SpiffeWorkloadAPI_FetchWITBundles_FullMethodName, true},
		{"/SpiffeWorkloadAPI/NoSuchMethod", false},
		{"/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets", true},
		{"/grpc.health.v1.Health/Check", false},
	}
	invoke := func(t *testing.T, method string, stream bool, header ...string) error {
		ctx := metadata.NewOutgoingContext(t.Context(), metadata.Pairs(header...))
		if !stream {
			return conn.Invoke(ctx, method, &emptypb.Empty{}, &emptypb.Empty{})
		}
		s, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, method)
		if err != nil {
			return err
		}
		if err := errors.Join(s.SendMsg(&emptypb.Empty{}), s.CloseSend()); err != nil {
			return err
		}
		return s.RecvMsg(&workloadpb.X509SVIDResponse{})
	}
	for _, test := range []struct {
		name   string
		header []string
	}{
		{"E-2 missing header", nil},
		{"E-2 header in another case", []string{"workload.spiffe.io", "True"}},
		{"E-2 header empty", []string{"workload.spiffe.io", ""}},
		{"E-2 header twice", []string{"workload.spiffe.io", "true", "workload.spiffe.io", "true"}},
		{"E-2 header twice in one", []string{"workload.spiffe.io", "true,true"}},
		{"E-2 header false after true", []string{"workload.spiffe.io", "true", "workload.spiffe.io", "false"}},
		{"E-2 another header", []string{"broker.spiffe.io", "true"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, method := range methods {
				err := invoke(t, method.name, method.stream, test.header...)
				want := `the request must carry the header "workload.spiffe.io: true", once`
				if s := status.Convert(err); s.Code() != codes.InvalidArgument || s.Message() != want {
					t.Errorf("%s = %v, want InvalidArgument %q", method.name, err, want)
				}
			}
		})
	}
	t.Run("E-2 with the header", func(t *testing.T) {
		for i, method := range methods {
			want := codes.Unimplemented
			if i < 2 {
				want = codes.OK
			}
			if err := invoke(t, method.name, method.stream, "workload.spiffe.io", "true"); status.Code(err) != want {
				t.Errorf("%s = %v, want %v", method.name, err, want)
			}
		}
	})

	t.Run("E-3 and E-5 neither TLS nor credentials", func(t *testing.T) {
		recv(t, fetchSVID(t, dial(t, path))) // dial has insecure credentials, and no others
	})
	t.Run("E-4 found by the environment", func(t *testing.T) {
		t.Setenv("SPIFFE_ENDPOINT_SOCKET", "unix://"+path)
		if _, err := workloadapi.FetchX509SVID(t.Context()); err != nil {
			t.Errorf("FetchX509SVID() = %v", err)
		}
	})
	t.Run("E-6 Unavailable while starting", func(t *testing.T) {
		source := &pods{}
		source.set(webPod, workload.State{})
		_, path := start(t, workload.Config{Source: source, Patience: time.Millisecond})
		_, err := fetchSVID(t, dial(t, path)).Recv()
		if s := status.Convert(err); s.Code() != codes.Unavailable || s.Message() != "the agent is not in sync yet" {
			t.Errorf("Recv() = %v, want Unavailable", err)
		}
	})
	t.Run("E-6 Unavailable when it stops", func(t *testing.T) {
		s, path := newServer(t, workload.Config{Source: source}), socketPath(t)
		stop := serve(t, s, path)
		stream := fetchSVID(t, dial(t, path))
		recv(t, stream)
		stop()
		_, err := stream.Recv()
		if s := status.Convert(err); s.Code() != codes.Unavailable || s.Message() != "the agent is shutting down" {
			t.Errorf("Recv() = %v, want Unavailable", err)
		}
	})
	t.Run("E-6 PermissionDenied without an identity", func(t *testing.T) {
		_, path := start(t, workload.Config{Source: &pods{}, Patience: time.Millisecond})
		wantDenied(t, fetchSVID(t, dial(t, path)))
		wantDenied(t, fetchBundles(t, dial(t, path)))
	})
	t.Run("E-6 PermissionDenied outside of pods, and nothing is told of why", func(t *testing.T) {
		log, logged := newLog()
		_, path := start(t, workload.Config{Source: source, Log: log, PodOf: func(workload.Peer) (string, error) {
			return "", errors.New("secret reason")
		}})
		wantDenied(t, fetchSVID(t, dial(t, path)))
		if line := logged.next(t); !strings.Contains(line, "secret reason") {
			t.Errorf("log = %q, want the reason", line)
		}
	})
	t.Run("E-6 PermissionDenied with no pod and no error", func(t *testing.T) {
		source := &pods{}
		source.set("", ready(t, ca, 1))
		_, path := start(t, workload.Config{Source: source, PodOf: inPod("")})
		wantDenied(t, fetchSVID(t, dial(t, path)))
	})
	// E-7, no extension of the service: the generated interface has no room for one,
	// and NoSuchMethod above finds none.
}

// The rules of the SPIFFE Workload API's X.509 profile.
func TestWorkloadAPI(t *testing.T) {
	ca, next, partner := newAuthority(t, "example.org"), newAuthority(t, "example.org"), newAuthority(t, "partner.example")
	first := ca.issue(t, "/ns/shop/sa/web", time.Hour)
	second := ca.issue(t, "/ns/shop/sa/admin", time.Hour)

	// begin serves one state, which the test may change.
	begin := func(t *testing.T, s workload.State) (set func(workload.State), server *workload.Server, conn *grpc.ClientConn) {
		t.Helper()
		source := &pods{}
		source.set(webPod, s)
		server, path := start(t, workload.Config{Source: source, Patience: time.Millisecond})
		return func(s workload.State) { source.set(webPod, s) }, server, dial(t, path)
	}
	state := func(identities []workload.Identity, bundles ...workload.Bundle) workload.State {
		return workload.State{Status: workload.StatusReady, Identities: identities, Bundles: bundles}
	}
	identities := []workload.Identity{{SVID: first, Hint: "internal"}, {SVID: second, Hint: "internal"}}

	t.Run("W-1 and W-8 other profiles are Unimplemented", func(t *testing.T) {
		_, _, conn := begin(t, state(identities, ca.bundle(1)))
		client := workloadpb.NewSpiffeWorkloadAPIClient(conn)
		_, err := client.FetchJWTSVID(withHeader(t), &workloadpb.JWTSVIDRequest{Audience: []string{"a"}})
		if status.Code(err) != codes.Unimplemented {
			t.Errorf("FetchJWTSVID() = %v, want Unimplemented", err)
		}
		wit, err := client.FetchWITSVID(withHeader(t), &workloadpb.WITSVIDRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := wit.Recv(); status.Code(err) != codes.Unimplemented {
			t.Errorf("FetchWITSVID() = %v, want Unimplemented", err)
		}
	})
	t.Run("W-2 complete states, on real change, the newest only", func(t *testing.T) {
		set, server, conn := begin(t, state(identities, ca.bundle(1, next)))
		svids, bundles := fetchSVID(t, conn), fetchBundles(t, conn)
		recv(t, svids)
		recv(t, bundles)

		// The same authorities in another order and under another revision are no
		// change, but count as delivered. Were they sent, they would be what the
		// next Recv returns.
		set(state(identities, next.bundle(2, ca)))
		await(t, server.Delivered(), func(d workload.Delivered) bool { return d.Streams == 2 && d.Revisions[ca.td] == 2 })
		set(state(identities, ca.bundle(3)))
		if got, want := recv(t, svids).Svids[0].Bundle, ca.cert.Raw; !bytes.Equal(got, want) {
			t.Errorf("FetchX509SVID: the bundle after the change has %d bytes, want the %d of the one authority left", len(got), len(want))
		}
		if got := recv(t, bundles).Bundles; !cmp.Equal(got, map[string][]byte{"spiffe://example.org": ca.cert.Raw}) {
			t.Errorf("FetchX509Bundles: not the bundle of the one authority left: %v", got)
		}

		// A new SVID is no news to whoever asked for bundles.
		renewed := []workload.Identity{{SVID: ca.issue(t, "/ns/shop/sa/web", time.Hour)}}
		set(state(renewed, ca.bundle(3)))
		if got := len(recv(t, svids).Svids); got != 1 {
			t.Errorf("%d SVIDs, want the complete state, which has 1", got)
		}
		set(state(renewed, ca.bundle(4, next)))
		if got := recv(t, bundles).Bundles["spiffe://example.org"]; len(got) == len(ca.cert.Raw) {
			t.Error("FetchX509Bundles: a message for a new SVID")
		}
	})
	t.Run("W-3 what is absent is withdrawn", func(t *testing.T) {
		set, _, conn := begin(t, state(identities, ca.bundle(1), partner.bundle(1)))
		svids, bundles := fetchSVID(t, conn), fetchBundles(t, conn)
		if got := recv(t, svids).FederatedBundles; len(got) != 1 {
			t.Errorf("federated bundles %v, want the partner's", got)
		}
		recv(t, bundles)
		revoked := partner.bundle(2)
		revoked.RemoveX509Authority(partner.cert)
		for _, without := range []workload.State{
			state(identities, ca.bundle(1)),
			state(identities, ca.bundle(1), revoked),
		} {
			set(without)
			if got := recv(t, svids).FederatedBundles; len(got) != 0 {
				t.Errorf("federated bundles %v, want none", got)
			}
			if got := recv(t, bundles).Bundles; len(got) != 1 {
				t.Errorf("bundles %v, want only its own", got)
			}
			set(state(identities, ca.bundle(1), partner.bundle(1)))
			recv(t, svids)
			recv(t, bundles)
		}
	})
	t.Run("W-4 and W-6 bundles by trust domain", func(t *testing.T) {
		_, _, conn := begin(t, state(identities, ca.bundle(1, next), partner.bundle(1)))
		both := ca.cert.Raw
		if bytes.Compare(next.cert.Raw, both) < 0 {
			both = append(bytes.Clone(next.cert.Raw), both...)
		} else {
			both = append(bytes.Clone(both), next.cert.Raw...)
		}
		response := recv(t, fetchSVID(t, conn))
		if !bytes.Equal(response.Svids[0].Bundle, both) {
			t.Error("the SVID's bundle is not that of its trust domain, both authorities in order")
		}
		if want := map[string][]byte{"spiffe://partner.example": partner.cert.Raw}; !cmp.Equal(response.FederatedBundles, want) {
			t.Error("the federated bundles are not the partner's alone")
		}
		want := map[string][]byte{"spiffe://example.org": both, "spiffe://partner.example": partner.cert.Raw}
		if got := recv(t, fetchBundles(t, conn)).Bundles; !cmp.Equal(got, want) {
			t.Error("FetchX509Bundles: not the own bundle and the partner's")
		}
	})
	t.Run("W-5 SVIDs with chain, key and bundle, hints unique", func(t *testing.T) {
		_, _, conn := begin(t, state(identities, ca.bundle(1)))
		svids := recv(t, fetchSVID(t, conn)).Svids
		if len(svids) != 2 {
			t.Fatalf("%d SVIDs, want 2", len(svids))
		}
		for i, want := range identities {
			got := svids[i]
			if got.SpiffeId != want.SVID.ID.String() {
				t.Errorf("SVID %d is that of %q, want %q", i, got.SpiffeId, want.SVID.ID)
			}
			chain, err := x509.ParseCertificates(got.X509Svid)
			if err != nil || len(chain) != 2 || !chain[0].Equal(want.SVID.Certificates[0]) || !chain[1].Equal(want.SVID.Certificates[1]) {
				t.Errorf("SVID %d: chain of %d certificates, %v, want the leaf and then the intermediate", i, len(chain), err)
			}
			key, err := x509.ParsePKCS8PrivateKey(got.X509SvidKey)
			if err != nil || !want.SVID.PrivateKey.(*ecdsa.PrivateKey).Equal(key) {
				t.Errorf("SVID %d: key %T, %v, want the SVID's", i, key, err)
			}
		}
		if svids[0].Hint != "internal" || svids[1].Hint != "" {
			t.Errorf("hints %q and %q, want the second one's dropped as not unique", svids[0].Hint, svids[1].Hint)
		}
	})
	t.Run("W-5 an identity taken away ends the stream", func(t *testing.T) {
		for name, gone := range map[string]workload.State{
			"pod gone":        {Status: workload.StatusDenied},
			"no identities":   state(nil, ca.bundle(1)),
			"denied with one": {Status: workload.StatusDenied, Identities: identities, Bundles: []workload.Bundle{ca.bundle(1)}},
		} {
			set, server, conn := begin(t, state(identities, ca.bundle(1)))
			svids, bundles := fetchSVID(t, conn), fetchBundles(t, conn)
			recv(t, svids)
			recv(t, bundles)
			set(gone)
			t.Log(name)
			wantDenied(t, svids)
			wantDenied(t, bundles)
			await(t, server.Delivered(), func(d workload.Delivered) bool { return d.Streams == 0 })
			// and so does every stream after it
			wantDenied(t, fetchSVID(t, conn))
		}
	})
	t.Run("W-5 what a response must have", func(t *testing.T) {
		revoked := ca.bundle(2)
		revoked.RemoveX509Authority(ca.cert)
		expired := ca.issue(t, "/ns/shop/sa/web", -time.Minute)
		for _, test := range []struct {
			name  string
			state workload.State
			want  string
		}{
			{"no bundles", state(identities), "there is no bundle of the pod's own trust domain"},
			{"own bundle empty", state(identities, revoked), "there is no bundle of the pod's own trust domain"},
			{"bundle missing", state(identities, ca.bundle(1), workload.Bundle{}), "bundle 1 is missing"},
			{"bundle twice", state(identities, ca.bundle(1), ca.bundle(2)), `there are two bundles of trust domain "example.org"`},
			{"SVID missing", state([]workload.Identity{{}}, ca.bundle(1)), "identity 0 has no SVID"},
			{"SVID of a trust domain without a bundle", state(identities, partner.bundle(1)), `there is no bundle of trust domain "example.org"`},
			{"SVID expired", state([]workload.Identity{{SVID: first}, {SVID: expired}}, ca.bundle(1)),
				`the SVID of "spiffe://example.org/ns/shop/sa/web" expired at ` + expired.Certificates[0].NotAfter.UTC().Format(time.RFC3339) + " and there is no new one"},
			{"status not known", workload.State{Status: 99, Identities: identities, Bundles: []workload.Bundle{ca.bundle(1)}}, "the agent is not in sync yet"},
			{"pending", workload.State{Status: workload.StatusPending}, "the SVID of this pod is on its way"},
		} {
			_, _, conn := begin(t, test.state)
			_, err := fetchSVID(t, conn).Recv()
			if s := status.Convert(err); s.Code() != codes.Unavailable || s.Message() != test.want {
				t.Errorf("%s: Recv() = %v, want Unavailable %q", test.name, err, test.want)
			}
		}
	})
	t.Run("W-5 bundles do not depend on an expiry", func(t *testing.T) {
		expired := []workload.Identity{{SVID: ca.issue(t, "/ns/shop/sa/web", -time.Minute)}}
		_, _, conn := begin(t, state(expired, ca.bundle(1)))
		recv(t, fetchBundles(t, conn))
	})
	t.Run("W-9 the first identity is the default", func(t *testing.T) {
		set, _, conn := begin(t, state(identities, ca.bundle(1)))
		stream := fetchSVID(t, conn)
		for range 2 {
			if got := recv(t, stream).Svids[0].SpiffeId; got != identities[0].SVID.ID.String() {
				t.Errorf("the default identity is %q, want %q", got, identities[0].SVID.ID)
			}
			identities[0], identities[1] = identities[1], identities[0]
			set(state([]workload.Identity{identities[0], identities[1]}, ca.bundle(1)))
		}
	})
	t.Run("W-9 hints are short and readable", func(t *testing.T) {
		_, _, conn := begin(t, state([]workload.Identity{
			{SVID: first, Hint: strings.Repeat("x", 1024)},
			{SVID: second, Hint: strings.Repeat("x", 1025)},
			{SVID: second, Hint: "\xff"},
		}, ca.bundle(1)))
		var got []int
		for _, svid := range recv(t, fetchSVID(t, conn)).Svids {
			got = append(got, len(svid.Hint))
		}
		if want := []int{1024, 0, 0}; !cmp.Equal(got, want) {
			t.Errorf("hints of %v bytes, want %v", got, want)
		}
	})
	t.Run("W-10 the pod is asked for before every message", func(t *testing.T) {
		source := &pods{}
		source.set(webPod, state(identities, ca.bundle(1)))
		moved := make(chan struct{})
		_, path := start(t, workload.Config{Source: source, PodOf: func(workload.Peer) (string, error) {
			select {
			case <-moved:
				return "another", nil
			default:
				return webPod, nil
			}
		}})
		stream := fetchSVID(t, dial(t, path))
		recv(t, stream)
		close(moved)
		source.set(webPod, state(identities, ca.bundle(2, next)))
		wantDenied(t, stream)
	})
}

func wantDenied[T any](tb testing.TB, stream grpc.ServerStreamingClient[T]) {
	tb.Helper()
	_, err := stream.Recv()
	if s := status.Convert(err); s.Code() != codes.PermissionDenied || s.Message() != "no identity issued" {
		tb.Errorf(`Recv() = %v, want PermissionDenied "no identity issued"`, err)
	}
}

// disguised is a TCP listener that says it is a Unix socket's.
type disguised struct{ net.Listener }

func (disguised) Addr() net.Addr { return &net.UnixAddr{Name: os.DevNull, Net: "unix"} }
