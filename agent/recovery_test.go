package agent_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"troth.dev/troth/identity"
)

// The agent is away while every authority that it knows is replaced and revoked. Its
// bundle no longer verifies the server, its SVID is refused, and its workloads'
// SVIDs are nobody's. It comes back by the bundle that is mounted for it, and until
// then the last good state is served.
func TestOfflineForAWholeRotation(t *testing.T) {
	c := newControl(t, time.Hour)
	pod := c.cluster.AddPod(web, "web-1")
	if err := c.cluster.Bind(int32(os.Getpid()), pod.UID); err != nil {
		t.Fatal(err)
	}
	n := startNode(t, c.address, bundleOf(c.issuer),
		func() (string, error) { return c.cluster.Token(c.agent.UID, audience, time.Hour) }, c.cluster.PodOf)
	client := source(t, n.socket)
	before := svidOf(t, client)

	c.stop()
	replaceAuthorities(t, c.issuer)
	replaceAuthorities(t, c.issuer)
	c.start(t)
	// The mounted bundle is as old as the agent's.
	eventually(t, "attempts to attest", func() bool {
		return n.count(t, "troth_agent_attestations_total")-n.count(t, "troth_agent_attestations_total", "OK") >= 2
	})
	if svid := svidOf(t, source(t, n.socket)); svid.Certificates[0].SerialNumber.Cmp(before.Certificates[0].SerialNumber) != 0 {
		t.Error("another SVID is served while the server cannot be verified")
	}

	n.anchor.Store(bundleOf(c.issuer))
	eventually(t, "an SVID by the authority in use", func() bool {
		_, _, err := x509svid.Verify(svidOf(t, client).Certificates, bundleOf(c.issuer))
		return err == nil
	})
	bundle, err := client.GetX509BundleForTrustDomain(trustDomain)
	if err != nil || !bundle.Equal(bundleOf(c.issuer)) {
		t.Errorf("the workload's bundle is %v (%v), want that of the issuer", bundle, err)
	}
	if got := n.count(t, "troth_agent_replacements_total", "authority_gone"); got < 1 {
		t.Errorf("%v SVIDs were replaced because their authority was gone, want at least the workload's", got)
	}
}

// The machine is suspended for longer than any SVID lives. When it is back, every
// workload has a new SVID in seconds if the server is there; if it is not, nobody
// who comes is given what has expired, until the server is back.
func TestSuspended(t *testing.T) {
	for name, away := range map[string]bool{"the server is there": false, "the server is away": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newControl(t, 10*time.Second)
			child, socket := startChild(t, c, c.cluster.AddPod(web, "web-1"))
			client := source(t, socket)
			if err := child.Process.Signal(syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the expiry of all", func() bool {
				return time.Now().After(svidOf(t, client).Certificates[0].NotAfter)
			})
			if away {
				c.stop()
			}
			if err := child.Process.Signal(syscall.SIGCONT); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if away {
				svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr("unix://"+socket))
				if status.Code(err) != codes.Unavailable {
					t.Errorf("a new stream is given %v, %v, want Unavailable", svid, err)
				}
				c.start(t)
			}
			began := time.Now()
			eventually(t, "a new SVID", func() bool {
				return time.Now().Before(svidOf(t, client).Certificates[0].NotAfter)
			})
			t.Logf("a new SVID after %v", time.Since(began))
			svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr("unix://"+socket))
			if err != nil || time.Now().After(svid.Certificates[0].NotAfter) {
				t.Errorf("a new stream is given %v, %v, want an SVID that is valid", svid, err)
			}
		})
	}
}

// startChild starts an agent in a process of its own, for which all are in the pod.
func startChild(t *testing.T, c *control, pod identity.Pod) (child *exec.Cmd, socket string) {
	t.Helper()
	dir := shortDir(t)
	socket = filepath.Join(dir, "s")
	bundle, tokenFile := filepath.Join(dir, "bundle"), filepath.Join(dir, "token")
	pem, err := bundleOf(c.issuer).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	tok, err := c.cluster.Token(c.agent.UID, audience, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{bundle: pem, tokenFile: []byte(tok)} {
		if err := os.WriteFile(name, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	child = helper(t, "agent", c.address, socket, bundle, tokenFile, pod.UID)
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		child.Process.Kill()
		child.Wait()
	})
	eventually(t, "the socket", func() bool {
		_, err := os.Stat(socket)
		return err == nil
	})
	return child, socket
}
