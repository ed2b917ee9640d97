package e2e_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/netip"
	"net/url"
	"os"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"troth.dev/troth/agent/hbone"
	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/handshake"
)

// The ports of the agent in each pod.
var agentPorts = []uint16{15001, 15006, 15008, 15009}

// Whoever calls the agent's own ports, with a certificate or without, gets nothing
// that others do not get: no way around the policy, no way to another pod, no loop,
// and no name.
func TestMeshEnemies(t *testing.T) {
	t.Parallel()
	m := newMesh(t, meshConfig{})
	m.policy(t, "all", strict)
	a, b := m.two(t)
	near := m.sandbox(t, m.hosts[1], sandboxConfig{account: m.account(t, "near")})
	near.echoing(t, echoPort)
	mallory := m.uncaptured(t, m.hosts[0], m.account(t, "mallory"))
	seen := newTap(t, m.hub, "port0")

	// 1. Without a certificate.
	for _, port := range agentPorts {
		for n := range 2 {
			to := b.at(port)[n]
			refusedOrClosed(t, fmt.Sprintf("port %d, from another pod", port), mallory.ns, to)
			refusedOrClosed(t, fmt.Sprintf("port %d, from outside", port), m.hub, to)
			refusedOrClosed(t, fmt.Sprintf("port %d, from the pod's own node", port), m.hosts[1].ns, to)
			refusedOrClosed(t, fmt.Sprintf("port %d, from a pod that is captured", port), a.ns, to)
			refusedOrClosed(t, fmt.Sprintf("port %d, from the pod itself", port), b.ns, to)
		}
		refusedOrClosed(t, fmt.Sprintf("port %d, from the pod itself by loopback", port), b.ns, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port))
		refusedOrClosed(t, fmt.Sprintf("port %d, from the pod itself by loopback", port), b.ns, netip.AddrPortFrom(netip.IPv6Loopback(), port))
	}

	// 2. With certificates that nobody here has signed.
	for name, svid := range map[string]*x509svid.SVID{
		"of another trust domain":      selfSigned(t, "spiffe://elsewhere.test/ns/shop/sa/cart"),
		"of a's, by another authority": selfSigned(t, a.id()),
	} {
		for _, order := range []handshake.Order{handshake.CallerFirst, handshake.Standard} {
			for n := range 2 {
				tunnel, err := m.tunnel(t, mallory, svid, order, b, n)
				if err == nil {
					// In the standard order the callee's refusal comes with the first read.
					_, _, err = tunnel.Connect(bounded(t), b.at(echoPort)[n].String(), nil)
					tunnel.Close()
				}
				if err == nil {
					t.Errorf("a certificate %s, %v: accepted", name, order)
				}
			}
		}
	}

	// 3. With a certificate of its own it reaches b, as everybody with one does, and
	// from there nobody else.
	svid := m.ownSVID(t, mallory)
	for _, order := range []handshake.Order{handshake.CallerFirst, handshake.Standard} {
		for n, loopback := range []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()} {
			tunnel, err := m.tunnel(t, mallory, svid, order, b, n)
			if err != nil {
				t.Errorf("a tunnel, %v: %v", order, err)
				continue
			}
			t.Cleanup(func() { tunnel.Close() })
			stream, _, err := tunnel.Connect(bounded(t), b.at(echoPort)[n].String(), nil)
			if err != nil {
				t.Errorf("the pod that the tunnel is to, %v: %v", order, err)
			} else {
				if _, err := io.WriteString(stream, greeting); err != nil {
					t.Error(err)
				}
				got := make([]byte, len(greeting))
				if _, err := io.ReadFull(stream, got); err != nil || string(got) != greeting {
					t.Errorf("through the tunnel: %q, %v", got, err)
				}
				stream.Close()
			}
			authorities := []string{
				near.at(echoPort)[n].String(), a.at(echoPort)[n].String(), near.at(echoPort)[1-n].String(), b.at(echoPort)[1-n].String(),
				netip.AddrPortFrom(loopback, echoPort).String(), netip.AddrPortFrom(m.hosts[1].addresses.v4, 15000).String(),
				netip.AddrPortFrom(m.hosts[1].kubelet().each()[n], echoPort).String(),
				fmt.Sprintf("localhost:%d", echoPort), "web:80", b.each()[n].String(), "[::]:9000", "0.0.0.0:9000", ":9000",
			}
			for _, port := range agentPorts {
				authorities = append(authorities, b.at(port)[n].String())
			}
			for _, authority := range authorities {
				stream, _, err := tunnel.Connect(bounded(t), authority, nil)
				if err == nil {
					stream.Close()
				}
				if _, ok := errors.AsType[*hbone.StatusError](err); !ok {
					t.Errorf("%v, CONNECT %s: %v, want a refusal", order, authority, err)
				}
			}
			// And the way of the honest is as it was.
			if _, err := a.ns.greeted(t, b.at(echoPort)[n]); err != nil {
				t.Errorf("afterwards: %v", err)
			}
		}
	}

	seen.await(t, m.hosts[0].ns, m.hosts[1].addresses.v4)
	seen.check(t)
	for _, c := range seen.to(15009) {
		if c.caller.Addr() == a.v4 || c.caller.Addr() == a.v6 {
			continue
		}
		// Nobody was told a name who had not shown one that is trusted: what is not
		// the callee's hello comes after the caller's flight.
		checkSilence(t, c)
	}
}

// checkSilence checks that the callee has sent nothing but its hello before the caller
// has sent something encrypted.
func checkSilence(t *testing.T, c conversation) {
	t.Helper()
	for n, r := range c.records {
		if r.Caller && r.Type == encryptedRecord {
			return
		}
		if !r.Caller && (r.Type != handshakeRecord || r.Handshake != clientHello) && r.Type != changeCipherSpec && r.Type != alertRecord {
			t.Errorf("from %v to %v: record %d is the callee's, of type %d, before the caller has shown anything", c.caller, c.callee, n, r.Type)
		}
	}
}

// refusedOrClosed checks that nothing of an application comes back, and that the
// connection ends.
func refusedOrClosed(t *testing.T, what string, from netns, to netip.AddrPort) {
	t.Helper()
	conn, err := from.dial(t.Context(), to)
	if err != nil {
		return
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience / 2))
	_, _ = io.WriteString(conn, greeting)
	if err := conn.CloseWrite(); err != nil {
		return // reset already
	}
	got, err := io.ReadAll(conn)
	if string(got) == greeting || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s, to %v: got %q, %v; want to be turned away", what, to, got, err)
	}
}

// tunnel opens a tunnel to a pod at its n-th address with an SVID of the caller's.
func (m *mesh) tunnel(t *testing.T, from *sandbox, svid *x509svid.SVID, order handshake.Order, to *sandbox, n int) (*hbone.Tunnel, error) {
	t.Helper()
	port := uint16(15008)
	if order == handshake.CallerFirst {
		port = 15009
	}
	raw, err := from.ns.dial(bounded(t), to.at(port)[n])
	if err != nil {
		return nil, err
	}
	conn, err := handshake.Initiate(bounded(t), raw, &handshake.Config{Order: order, SVID: svid, Bundles: m.trusted(t)}, spiffeid.RequireFromString(to.id()))
	if err != nil {
		return nil, err
	}
	return hbone.Open(conn, hbone.Config{})
}

// ownSVID gets the pod's SVID from the server, as the pod itself may.
func (m *mesh) ownSVID(t *testing.T, s *sandbox) *x509svid.SVID {
	t.Helper()
	c := m.client(t)
	conn := closing(t)(c.withToken(cluster.Token(t, s.Pod, trustDomain.IDString(), 10*time.Minute)))
	var svid *x509svid.SVID
	eventually(t, "the pod's own SVID", func() bool {
		results, err := c.issue(bounded(t), conn, (*trothv1.PodReference)(nil))
		if err != nil || results[0].GetSvid() == nil {
			return false
		}
		chain, err := parse(results[0].GetSvid())
		if err != nil {
			t.Fatal(err)
		}
		svid = &x509svid.SVID{ID: spiffeid.RequireFromString(s.id()), Certificates: chain, PrivateKey: c.key}
		return true
	})
	return svid
}

// selfSigned is an SVID by an authority that nobody trusts.
func selfSigned(t *testing.T, id string) *x509svid.SVID {
	t.Helper()
	key := func() *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	authorityKey, leafKey := key(), key()
	uri, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	authority := &x509.Certificate{
		SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), SubjectKeyId: []byte("somebody"),
		URIs: []*url.URL{{Scheme: "spiffe", Host: uri.Host}},
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), URIs: []*url.URL{uri}, NotBefore: authority.NotBefore, NotAfter: authority.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}, authority, leafKey.Public(), authorityKey)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &x509svid.SVID{ID: spiffeid.RequireFromString(id), Certificates: []*x509.Certificate{leaf}, PrivateKey: leafKey}
}

// Garbage at the ports of the agent costs it nothing: it goes on.
func TestMeshGarbage(t *testing.T) {
	t.Parallel()
	m := newMesh(t, meshConfig{})
	a, b := m.two(t)
	mallory := m.uncaptured(t, m.hosts[0], m.account(t, "mallory"))
	for _, port := range agentPorts {
		for _, garbage := range []string{"", "\x16\x03\x01\xff\xff", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "GET / HTTP/1.1\r\n\r\n", string(make([]byte, 64<<10))} {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			conn, err := mallory.ns.dial(ctx, b.at(port)[0])
			cancel()
			if err != nil {
				continue
			}
			conn.SetDeadline(time.Now().Add(patience / 2))
			_, _ = io.WriteString(conn, garbage)
			_ = conn.CloseWrite()
			if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("port %d, %.10q: the connection is not ended", port, garbage)
			}
			conn.Close()
		}
	}
	must(t)(a.ns.greeted(t, b.at(echoPort)[0]))
}
