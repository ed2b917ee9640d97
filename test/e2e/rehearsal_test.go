package e2e_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/big"
	mathrand "math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"troth.dev/troth/agent"
	agentsocket "troth.dev/troth/agent/workload"
	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/ca"
	"troth.dev/troth/storage"
)

// How long the rehearsal is: a short one for every day, in which a replica is killed
// in the first rotation and a node cut off in the second.
var (
	rotations  = flag.Int("rotations", 2, "how often TestRehearsal replaces the authority")
	handshakes = flag.Int64("handshakes", 5000, "how many handshakes TestRehearsal demands")
	simulated  = flag.Int("agents", 100, "how many agents TestRehearsal has, beside three that are processes")
	rate       = flag.Int("rate", 60, "how many handshakes a second TestRehearsal begins")
	chaos      = flag.Bool("chaos", false, "whether agents are killed too: a proof of an agent that was restarted counts after 40 s")
)

// TestRehearsal replaces authorities, one after the other, under a fleet of agents
// whose workloads shake hands all the time, while replicas of the server are killed
// and a node is cut off. No handshake fails. And whoever has stolen the key of an
// authority is accepted by nobody from the moment on at which its removal is
// reported; before that everybody accepts them, which shows that they try well.
//
//	go test ./test/e2e -run TestRehearsal -v -rotations=20 -agents=200 -handshakes=100000 -rate=250 -chaos -timeout 60m
func TestRehearsal(t *testing.T) {
	const life = 45 * time.Second
	store := newPostgresStore(t)
	flags := []string{"-agent-return=5s"}
	if *chaos {
		flags = nil // as in production, because workloads do come back
	}
	p := newReplicas(t, 3, life, store, flags...)
	r := &rehearsal{t: t, p: p, operator: p.operator(t, p.address), thief: &thief{store: store.open(t), keyFile: p.keyFile, loot: make(map[string]loot)}}
	r.startFleet(t)

	began := time.Now()
	r.drive(t)
	r.await(t, "all agents to have settled", 2*patience, func(s *trothv1.AuthorityStatus) bool {
		known := s.GetPropagation()
		return int(known.GetExpected()) == *simulated+len(r.real) && known.GetApplied() == known.GetExpected()
	})
	for n := range *rotations {
		r.rotate(t, n)
	}
	r.await(t, "every replaced authority to be revoked", 3*life, func(s *trothv1.AuthorityStatus) bool {
		return !slices.ContainsFunc(s.GetAuthorities(), func(a *trothv1.AuthorityRecord) bool {
			return a.GetState() == trothv1.AuthorityState_AUTHORITY_STATE_OLD || a.GetState() == trothv1.AuthorityState_AUTHORITY_STATE_TAINTED
		})
	})
	r.reportRemovals(t)
	for total := r.total(t).Handshakes; total < *handshakes; total = r.total(t).Handshakes {
		select {
		case <-time.After(time.Second):
		case <-t.Context().Done():
			t.Fatal("the test ends before it has seen enough handshakes")
		}
	}
	r.stop()
	all := r.total(t)
	for _, failure := range all.Failures {
		t.Errorf("a handshake failed: %s", failure)
	}
	if all.Failed > 0 {
		t.Errorf("%d failed", all.Failed)
	}
	if r.attempts == 0 || r.admitted == 0 || r.accepted > 0 {
		t.Errorf("with stolen keys: %d accepted while the authority was trusted (want some), %d of %d after its removal was reported (want none of some)",
			r.admitted, r.accepted, r.attempts)
	}
	slices.Sort(r.proved)
	took := time.Since(began)
	r.print(t, "%d rotations in %v, %d replicas killed, %d agents killed, %d times cut off; %d agents",
		*rotations, took.Round(time.Second), r.killed, r.killedAgents, r.cut, *simulated+len(r.real))
	r.print(t, "%d handshakes (%.0f/s), %d greetings on held connections, %d failed",
		all.Handshakes, float64(all.Handshakes)/took.Seconds(), all.Held, all.Failed)
	r.print(t, "stolen keys: %d accepted while trusted, %d of %d after the removal was reported", r.admitted, r.accepted, r.attempts)
	r.print(t, "from prepare to all proved: median %v, longest %v",
		r.proved[len(r.proved)/2].Round(time.Millisecond), r.proved[len(r.proved)-1].Round(time.Millisecond))
}

func (r *rehearsal) print(t *testing.T, format string, args ...any) {
	t.Helper()
	figure(t, "rehearsal: "+format, args...)
}

// figure tells a figure, and keeps it in the file that TROTH_FIGURES names, if any: go
// test shows nothing of a package that passes.
func figure(t *testing.T, format string, args ...any) {
	t.Helper()
	line := fmt.Sprintf(format+"\n", args...)
	fmt.Print(line)
	if path := os.Getenv("TROTH_FIGURES"); path != "" {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.WriteString(line)
		check(t, errors.Join(err, f.Close()))
	}
}

// rehearsal is a fleet under way.
type rehearsal struct {
	t        *testing.T
	p        *replicas
	operator trothv1.AuthorityServiceClient
	thief    *thief
	cable    *cable

	real    []*node     // with agents that are processes
	guests  []*workload // of the real agents, one each
	targets []target
	drivers []*driver // of the simulated agents' workloads
	stop    func()    // ends the drivers

	killed, killedAgents, cut    int
	proved                       []time.Duration
	attempts, accepted, admitted int
	judged                       map[string]bool // authorities whose removal was reported and tested
}

// startFleet starts all agents and a workload with each.
func (r *rehearsal) startFleet(t *testing.T) {
	t.Helper()
	r.cable = newCable(t)
	root := newCgroup(t)
	for n := range 3 {
		account := r.p.account(t, fmt.Sprintf("guest-%d", n))
		node := r.p.newNode(t)
		if n == 2 { // behind the cable
			node.args = append(node.args, "-server="+r.p.balancer.listen(t, r.cable.address))
			node.daemon = startCommand(t, "troth-agent", r.cable.command("troth-agent", node.args...))
		} else {
			node.start(t)
		}
		r.real = append(r.real, node)
		w := startWorkload(t).enter(t, root, r.p.pod(t, node, account)).watch(t, node)
		w.tell(t, command{Do: "serve"})
		r.targets = append(r.targets, w.next(t, "serving").Target)
		r.guests = append(r.guests, w)
	}

	// The others are in this process: in all but that they are what runs in a pod.
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var running sync.WaitGroup
	t.Cleanup(func() { cancel(); running.Wait() })
	account := r.p.account(t, "host")
	dir, err := os.MkdirTemp("", "te") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	sources := make([]*workloadapi.X509Source, *simulated)
	var starting sync.WaitGroup
	limit := make(chan struct{}, 8)
	for n := range *simulated {
		limit <- struct{}{}
		starting.Go(func() {
			defer func() { <-limit }()
			sources[n] = r.simulate(t, ctx, &running, filepath.Join(dir, fmt.Sprint(n)), account)
		})
	}
	starting.Wait()
	if t.Failed() {
		t.FailNow()
	}
	for _, source := range sources {
		t.Cleanup(func() { source.Close() })
		addresses, err := listen(ctx, source)
		if err != nil {
			t.Fatal(err)
		}
		r.targets = append(r.targets, target{Peer: r.p.id(account), Addresses: addresses})
		r.drivers = append(r.drivers, &driver{own: source, self: r.p.id(account)})
	}
	for _, d := range r.drivers {
		d.targets = r.targets
	}
}

// simulate runs an agent in this process until ctx ends, and returns what its one
// workload holds.
func (r *rehearsal) simulate(t *testing.T, ctx context.Context, running *sync.WaitGroup, socket, account string) *workloadapi.X509Source {
	node := r.p.newNode(t)
	token := cluster.Token(t, node.agent, trustDomain.IDString(), 100*time.Minute)
	pod := r.p.pod(t, node, account)
	l, err := agentsocket.Listen(socket)
	if err != nil {
		t.Error(err)
		return nil
	}
	a, err := agent.New(agent.Config{
		Server: r.p.address, TrustDomain: trustDomain,
		Anchor:   func() (*x509bundle.Bundle, error) { return x509bundle.Load(trustDomain, r.p.bundle) },
		Token:    func() (string, error) { return token, nil },
		Listener: l, PodOf: func(agentsocket.Peer) (string, error) { return string(pod.UID), nil },
		Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Error(errors.Join(err, l.Close()))
		return nil
	}
	running.Go(func() {
		if err := a.Run(ctx); err != nil {
			t.Errorf("an agent ended: %v", err)
		}
	})
	starting, cancel := context.WithTimeout(ctx, 2*patience)
	defer cancel()
	source, err := workloadapi.NewX509Source(starting, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+socket)))
	if err != nil {
		t.Errorf("the workload of an agent: %v", err)
	}
	return source
}

// drive has all workloads shake hands.
func (r *rehearsal) drive(t *testing.T) {
	t.Helper()
	every := time.Second * time.Duration(len(r.targets)) / time.Duration(*rate)
	for n, w := range r.guests {
		w.tell(t, command{Do: "drive", Peer: r.targets[n].Peer, Targets: r.targets, Every: every})
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var driving sync.WaitGroup
	for _, d := range r.drivers {
		driving.Go(func() {
			time.Sleep(mathrand.N(every)) // apart from each other
			d.drive(ctx, every)
		})
	}
	r.stop = sync.OnceFunc(func() { cancel(); driving.Wait() })
	t.Cleanup(r.stop)
}

// total is what became of all handshakes so far.
func (r *rehearsal) total(t *testing.T) tally {
	t.Helper()
	var sum tally
	add := func(one tally) {
		sum.Handshakes += one.Handshakes
		sum.Held += one.Held
		sum.Failed += one.Failed
		sum.Failures = append(sum.Failures, one.Failures...)
	}
	for _, d := range r.drivers {
		add(d.tally())
	}
	for _, w := range r.guests {
		w.tell(t, command{Do: "tally"})
		add(w.next(t, "tally").Tally)
	}
	slices.Sort(sum.Failures)
	sum.Failures = sum.Failures[:min(len(sum.Failures), 20)]
	return sum
}

// rotate replaces the active authority, and has something go wrong on the way.
func (r *rehearsal) rotate(t *testing.T, n int) {
	t.Helper()
	before := r.status(t)
	active := inState(before, trothv1.AuthorityState_AUTHORITY_STATE_ACTIVE)
	r.thief.steal(t, active.GetId())
	if n%3 == 1 {
		r.cable.pull(t)
		r.cut++
	}
	if n%3 == 0 {
		defer r.kill(t, n%len(r.p.each))() // at some moment of what follows
	}
	// Not while a node is cut off: the proof of an agent that was restarted takes 40 s
	// to count, and a node is not cut off for as long as its SVIDs live.
	if *chaos && n%4 == 2 && n%3 != 1 {
		r.real[0].daemon.kill()
		r.killedAgents++
		r.real[0].start(t)
	}

	prepared := time.Now()
	next := ""
	r.repeat(t, "prepare", func(ctx context.Context) error {
		out, err := r.operator.PrepareAuthority(ctx, &trothv1.PrepareAuthorityRequest{Reason: fmt.Sprint("rehearsal ", n)})
		next = out.GetAuthority().GetId()
		return err
	})
	if n%3 == 1 {
		// Who is cut off is named, and nothing is activated without them.
		blocked := r.await(t, "only the node that is cut off to be waited for", patience, func(s *trothv1.AuthorityStatus) bool {
			waiting := s.GetPropagation().GetWaiting()
			return s.GetPropagation().GetAuthorityId() == next && len(waiting) == 1 && waiting[0].GetNode() == r.real[2].name
		})
		if inState(blocked, trothv1.AuthorityState_AUTHORITY_STATE_ACTIVE).GetId() != active.GetId() {
			t.Errorf("an authority was activated while %s was cut off", r.real[2].name)
		}
		_, err := r.operator.ActivateAuthority(t.Context(), &trothv1.ActivateAuthorityRequest{Id: next})
		if status.Code(err) != codes.FailedPrecondition {
			t.Errorf("activate while %s is cut off: %v, want FailedPrecondition", r.real[2].name, err)
		}
		r.cable.plug(t)
	}
	r.await(t, "all agents to prove it", 2*patience, func(s *trothv1.AuthorityStatus) bool {
		known := s.GetPropagation()
		return known.GetAuthorityId() == next && known.GetExpected() > 0 && known.GetProved() == known.GetExpected()
	})
	if n%3 != 1 && (!*chaos || n%4 != 2) { // no agent was away or new
		r.proved = append(r.proved, time.Since(prepared))
	}
	r.repeat(t, "replace", func(ctx context.Context) error {
		if n%5 == 4 {
			_, err := r.operator.TaintAuthority(ctx, &trothv1.TaintAuthorityRequest{Id: active.GetId(), Reason: "rehearsal"})
			return err
		}
		_, err := r.operator.ActivateAuthority(ctx, &trothv1.ActivateAuthorityRequest{Id: next})
		return err
	})
	// While the old one is trusted, so is whoever has its key.
	r.admitted += r.attack(t, active.GetId(), r.targets[:5])
	r.await(t, "the new one to sign", patience, func(s *trothv1.AuthorityStatus) bool {
		return inState(s, trothv1.AuthorityState_AUTHORITY_STATE_ACTIVE).GetId() == next
	})
	r.reportRemovals(t)
}

// kill kills a replica after a moment and starts it again. The function that it
// returns waits for that.
func (r *rehearsal) kill(t *testing.T, n int) (done func()) {
	t.Helper()
	killed := make(chan struct{})
	go func() {
		defer close(killed)
		time.Sleep(mathrand.N(1500 * time.Millisecond))
		r.p.each[n].kill()
	}()
	return func() {
		t.Helper()
		<-killed
		r.killed++
		r.p.each[n].serve(t)
	}
}

// reportRemovals waits until every agent has reported a bundle without the
// authorities that are revoked, and then has the thief try all workloads.
func (r *rehearsal) reportRemovals(t *testing.T) {
	t.Helper()
	s := r.status(t)
	var gone []string
	for _, a := range s.GetAuthorities() {
		if a.GetState() == trothv1.AuthorityState_AUTHORITY_STATE_REVOKED && r.thief.has(a.GetId()) && !r.judged[a.GetId()] {
			gone = append(gone, a.GetId())
		}
	}
	if len(gone) == 0 {
		return
	}
	r.await(t, "the removal to be reported", patience, func(now *trothv1.AuthorityStatus) bool {
		known := now.GetPropagation()
		return known.GetRevision() >= s.GetRevision() && known.GetExpected() > 0 && known.GetApplied() == known.GetExpected()
	})
	// A workload that was sent a bundle has yet to read it.
	time.Sleep(250 * time.Millisecond)
	for _, id := range gone {
		r.accepted += r.attack(t, id, r.targets)
		r.attempts += len(r.targets)
		if r.judged == nil {
			r.judged = make(map[string]bool)
		}
		r.judged[id] = true
	}
}

// attack calls the targets with an SVID that the thief made, and returns how many
// accepted it.
func (r *rehearsal) attack(t *testing.T, authority string, targets []target) (accepted int) {
	t.Helper()
	forged := r.thief.forge(t, authority, r.p.id("host"))
	own := stolen{SVID: forged, Source: published{r.p.bundle}}
	for n, to := range targets {
		conn, err := call(t.Context(), manners[n%len(manners)], to, own)
		if err == nil {
			conn.Close()
			accepted++
		}
	}
	return accepted
}

// stolen is what a thief shows, and by what they verify others.
type stolen struct {
	*x509svid.SVID
	x509bundle.Source
}

func (s stolen) GetX509SVID() (*x509svid.SVID, error) { return s.SVID, nil }

func (r *rehearsal) status(t *testing.T) (s *trothv1.AuthorityStatus) {
	t.Helper()
	r.repeat(t, "read the status", func(ctx context.Context) error {
		out, err := r.operator.GetAuthorityStatus(ctx, &trothv1.GetAuthorityStatusRequest{})
		s = out.GetStatus()
		return err
	})
	return s
}

// await polls, because a replica that is killed takes a stream with it.
func (r *rehearsal) await(t *testing.T, what string, patience time.Duration, holds func(*trothv1.AuthorityStatus) bool) *trothv1.AuthorityStatus {
	t.Helper()
	for late := time.Now().Add(patience); ; {
		s := r.status(t)
		if holds(s) {
			return s
		}
		if time.Now().After(late) {
			t.Fatalf("wait for %s: not within %v; the status is %v, the handshakes %+v", what, patience, s, r.total(t))
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// repeat does what may be repeated until it succeeds. What a gate refuses is
// refused for a moment only: the evidence of another replica is older.
func (r *rehearsal) repeat(t *testing.T, what string, do func(context.Context) error) {
	t.Helper()
	for late := time.Now().Add(patience); ; {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		err := do(ctx)
		cancel()
		switch status.Code(err) {
		case codes.OK:
			return
		case codes.Unavailable, codes.DeadlineExceeded, codes.FailedPrecondition, codes.Canceled, codes.ResourceExhausted:
		default:
			t.Fatalf("%s: %v", what, err)
		}
		if time.Now().After(late) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func inState(s *trothv1.AuthorityStatus, state trothv1.AuthorityState) *trothv1.AuthorityRecord {
	for _, a := range s.GetAuthorities() {
		if a.GetState() == state {
			return a
		}
	}
	return nil
}

// thief has read the database and has the key-encryption key.
type thief struct {
	store   storage.AuthorityStore
	keyFile string
	loot    map[string]loot
}

type loot struct {
	certificate *x509.Certificate
	key         crypto.Signer
}

func (th *thief) has(id string) bool { return th.loot[id].key != nil }

// steal takes the key of an authority.
func (th *thief) steal(t *testing.T, id string) {
	t.Helper()
	kek, err := os.ReadFile(th.keyFile)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := ca.NewSealedKeys(kek)
	if err != nil {
		t.Fatal(err)
	}
	doc, err := th.store.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var stored struct {
		Authorities []struct {
			ID               string
			Certificate, Key []byte
		}
	}
	if err := json.Unmarshal(doc.Data, &stored); err != nil {
		t.Fatal(err)
	}
	for _, a := range stored.Authorities {
		if a.ID != id {
			continue
		}
		key, err := keys.Open(t.Context(), id, a.Key)
		if err != nil {
			t.Fatal(err)
		}
		certificate, err := x509.ParseCertificate(a.Certificate)
		if err != nil {
			t.Fatal(err)
		}
		th.loot[id] = loot{certificate, key}
		return
	}
	t.Fatalf("the database has no authority %s", id)
}

// forge makes an SVID of the identity that nobody has recorded.
func (th *thief) forge(t *testing.T, authority, id string) *x509svid.SVID {
	t.Helper()
	by := th.loot[authority]
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	uri, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	serial := make([]byte, 16)
	rand.Read(serial)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial), URIs: []*url.URL{uri},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}, by.certificate, key.Public(), by.key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	svid, err := x509svid.ParseRaw(der, pkcs8)
	if err != nil {
		t.Fatal(err)
	}
	if got := hex.EncodeToString(svid.Certificates[0].AuthorityKeyId); got != authority || !bytes.Equal(svid.Certificates[0].AuthorityKeyId, by.certificate.SubjectKeyId) {
		t.Fatalf("forged under %s, not %s", got, authority)
	}
	return svid
}
