package main

import (
	"bufio"
	"context"
	_ "embed" // the manifest
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"troth.dev/troth/identity"
	"troth.dev/troth/internal/latest"
	"troth.dev/troth/policy"
)

// strictManifest is what every tutorial of this field begins with.
//
//go:embed strict.yaml
var strictManifest []byte

// playPolicy shows service C, which knows nothing of TLS, before and after a
// manifest. What decides is its agent, by the policy that the control plane
// streams. It returns what was not as it has to be.
func playPolicy(ctx context.Context, group *errgroup.Group, h *home, out *printer, stderr io.Writer) (problem, err error) {
	c := identity.ServiceAccount{Namespace: demoNamespace, Name: "reports"}
	service, err := startService(ctx, h, c, "application", callerConfig{}, stderr)
	if err != nil {
		return nil, err
	}
	defer service.end()
	started, err := service.next()
	if err != nil {
		return nil, fmt.Errorf("service C: %w", err)
	}
	application, err := netip.ParseAddrPort(started.Address)
	if err != nil {
		return nil, err
	}
	// In a cluster the agent captures what arrives in the pod's network namespace.
	captured, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	group.Go(func() error { return h.plane.ServePlaintext(ctx, service.pod, captured, application) })
	inForce, release := h.plane.Policy(service.pod)
	defer release()
	if err := untilMode(ctx, inForce, policy.Permissive); err != nil {
		return nil, err
	}

	out.line("service C      process of its own, service account %s, without TLS, behind its agent", c)
	before := dialPlaintext(ctx, captured.Addr().String())
	defer before.close()
	answered := before.say(greeting)
	out.decision("no policy", inForce, "A, in plaintext", out.became(answered, "was answered", "was refused"))

	manifest := filepath.Join(h.policies(), "strict.yaml")
	if err := os.WriteFile(manifest, strictManifest, 0o644); err != nil {
		return nil, err
	}
	out.line("")
	for line := range strings.Lines(string(strictManifest)) {
		out.line("    %s", strings.TrimRight(line, "\n"))
	}
	out.line("")
	if err := untilMode(ctx, inForce, policy.Strict); err != nil {
		return nil, err
	}
	cut := before.silence()
	out.decision("this manifest in a file", inForce, "A's open connection", out.became(cut, "goes on", "was cut"))
	after := dialPlaintext(ctx, captured.Addr().String())
	defer after.close()
	refused := after.say(greeting)
	out.decision("", inForce, "A, in plaintext", out.became(refused, "was answered", "was refused"))

	switch {
	case answered != nil:
		return fmt.Errorf("without a policy plaintext was refused: %w", answered), nil
	case cut == nil:
		return errors.New("an open plaintext connection outlived STRICT"), nil
	case refused == nil:
		return errors.New("plaintext was answered under STRICT"), nil
	}
	return nil, nil
}

// untilMode waits for the agent to hold a policy with that mode.
func untilMode(ctx context.Context, inForce *latest.Value[*policy.Effective], want policy.Mode) error {
	for {
		current, changed := inForce.Load()
		if current != nil && current.Mode == want {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("wait for the agent to hold %s: %w", want, ctx.Err())
		}
	}
}

// plaintextClient is service A without TLS: nothing more than a connection.
type plaintextClient struct {
	conn net.Conn
	in   *bufio.Reader
	err  error // why there is no connection
}

// plaintextPatience is how long an answer, or a cut, is waited for.
const plaintextPatience = 5 * time.Second

func dialPlaintext(ctx context.Context, address string) *plaintextClient {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return &plaintextClient{err: err}
	}
	return &plaintextClient{conn: conn, in: bufio.NewReader(conn)}
}

// say sends a line and waits for the answer. It returns nil if there was one.
func (c *plaintextClient) say(line string) error {
	if c.err != nil {
		return c.err
	}
	if err := c.conn.SetDeadline(time.Now().Add(plaintextPatience)); err != nil {
		return err
	}
	if _, err := io.WriteString(c.conn, line+"\n"); err != nil {
		return err
	}
	back, err := c.in.ReadString('\n')
	if err == nil && back != line+"\n" {
		err = fmt.Errorf("%q came back", back)
	}
	return err
}

// silence returns the error with which a connection on which nothing is said ends,
// and nil if it does not.
func (c *plaintextClient) silence() error {
	if c.err != nil {
		return c.err
	}
	if err := c.conn.SetDeadline(time.Now().Add(plaintextPatience)); err != nil {
		return err
	}
	_, err := c.in.ReadByte()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return err
}

func (c *plaintextClient) close() {
	if c.conn != nil {
		c.conn.Close() // it may have been cut
	}
}

// decision prints what became of somebody under the policy that the agent holds.
func (p *printer) decision(cause string, inForce *latest.Value[*policy.Effective], who, became string) {
	current, _ := inForce.Load()
	by := "by default"
	if !current.DecidedBy.IsZero() {
		by = "by " + current.DecidedBy.String()
	}
	p.line("%-23s  %-10s  %-16s  %-21s  %s", cause, current.Mode, by, who, became)
}

// became returns the words for whether something went on.
func (p *printer) became(err error, goesOn, stops string) string {
	if err != nil {
		return p.paint(red, stops)
	}
	return p.paint(green, goesOn)
}
