package ca_test

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"troth.dev/troth/ca"
	"troth.dev/troth/storage"
)

// model is a trust domain with a few replicas and agents, of which all is known:
// what the replicas know is compared with it.
type model struct {
	t       *testing.T
	config  ca.Config
	sound   *storage.Memory
	issuers []*ca.Issuer // nil are down
	links   []*link      // of each to the store
	frozen  []*frozen    // what each was stopped in; nil if it runs
	agents  []*modelAgent
	held    []modelHeld

	before   ca.Set
	wasSince map[string]time.Time // until when an authority was active by the document
	forced   map[string]bool      // revoked by force
	evidence []ca.Propagation     // what was true once
}

// link is the way of one replica to the store. Where it is cut, nothing gets
// through to the document; the ledger may be another matter. Where it is held, the
// replica stands still before it stores a document and after it recorded an issuance.
type link struct {
	store
	cut, cutLedger bool
	hold           chan struct{} // nil if it runs; closed when it goes on
}

func (l *link) Load(ctx context.Context) (storage.Document, error) {
	if l.cut {
		return storage.Document{}, errFault
	}
	return l.store.Load(ctx)
}

func (l *link) Swap(ctx context.Context, old string, data []byte) (storage.Document, error) {
	if hold := l.hold; hold != nil {
		<-hold
	}
	if l.cut {
		return storage.Document{}, errFault
	}
	return l.store.Swap(ctx, old, data)
}

func (l *link) Record(ctx context.Context, issuances ...storage.Issuance) error {
	if l.cutLedger {
		return errFault
	}
	err := l.store.Record(ctx, issuances...)
	if hold := l.hold; hold != nil {
		<-hold
	}
	return err
}

func (l *link) Query(ctx context.Context, q storage.Query) ([]storage.Issuance, error) {
	if l.cutLedger {
		return nil, errFault
	}
	return l.store.Query(ctx, q)
}

// frozen is a call of a replica that stands still, with all of its process.
type frozen struct {
	agent *modelAgent
	done  chan []ca.Result // what was released, if anything
}

// modelAgent trusts a bundle and has proved its successor.
type modelAgent struct {
	bundle ca.Set
	silent bool // it does not say what it holds
}

// modelHeld is an SVID that somebody holds: an agent, or nil for who asked itself.
type modelHeld struct {
	agent *modelAgent
	svid  ca.SVID
	at    time.Time // it was released
}

func (m *model) set(rt *rapid.T) ca.Set {
	doc, err := m.sound.Load(m.t.Context())
	if err != nil {
		rt.Fatal(err)
	}
	set, err := ca.DecodeSet(doc.Data)
	if err != nil {
		rt.Fatal(err)
	}
	return set
}

// truth is the evidence of this moment.
func (m *model) truth(set ca.Set) ca.Propagation {
	p := proved(set, len(m.agents))
	p.Received, p.Applied, p.Proved, p.Uses = 0, 0, 0, make(map[string]ca.Use)
	for _, a := range m.agents {
		if a.bundle.Revision >= set.Revision {
			p.Received, p.Applied, p.Proved = p.Received+1, p.Applied+1, p.Proved+1
		}
		if a.silent {
			p.Reporting--
		}
	}
	for _, h := range m.held {
		if h.agent != nil && !h.agent.silent && time.Now().Before(h.svid.NotAfter) {
			use := p.Uses[h.svid.AuthorityID]
			use.SVIDs++
			p.Uses[h.svid.AuthorityID] = use
		}
	}
	return p
}

func (m *model) issuer(rt *rapid.T) *ca.Issuer {
	return m.issuers[m.replica(rt)]
}

// replica returns one that runs. One that starts has a way to the store.
func (m *model) replica(rt *rapid.T) int {
	n := rapid.IntRange(0, len(m.issuers)-1).Draw(rt, "replica")
	if m.frozen[n] != nil {
		m.goOn(rt, n)
	}
	if m.issuers[n] == nil {
		m.links[n] = &link{store: m.sound}
		config := m.config
		config.Authorities, config.Ledger = m.links[n], m.links[n]
		m.issuers[n] = open(m.t, config)
	}
	return n
}

// partition cuts a replica off, or lets it back in.
func (m *model) partition(rt *rapid.T) {
	l := m.links[m.replica(rt)]
	l.cut = !l.cut
	l.cutLedger = l.cut && rapid.Bool().Draw(rt, "ledger too")
}

// freeze stops a replica in the middle of an operation or of an issuance.
func (m *model) freeze(rt *rapid.T) {
	n := m.replica(rt)
	issuer, l := m.issuers[n], m.links[n]
	f := &frozen{done: make(chan []ca.Result, 1)}
	ctx := m.t.Context()
	l.hold = make(chan struct{})
	if rapid.Bool().Draw(rt, "issues") {
		request := requestFor(m.t)
		if len(m.agents) > 0 && rapid.Bool().Draw(rt, "for an agent") {
			f.agent, request.Caller = rapid.SampledFrom(m.agents).Draw(rt, "agent"), agentID
		}
		go func() { results, _ := issuer.Issue(ctx, request); f.done <- results }()
	} else {
		known := m.truth(m.set(rt))
		go func() { issuer.StepOnce(ctx, known); f.done <- nil }()
	}
	synctest.Wait()
	m.frozen[n] = f
}

func (m *model) thaw(rt *rapid.T) {
	m.goOn(rt, rapid.IntRange(0, len(m.issuers)-1).Draw(rt, "replica"))
}

// goOn lets a replica finish what it was stopped in.
func (m *model) goOn(rt *rapid.T, n int) {
	f := m.frozen[n]
	if f == nil {
		return
	}
	for _, r := range m.release(n) {
		if r.Err != nil {
			rt.Fatal(r.Err)
		}
		m.released(rt, f.agent, r.SVID)
	}
}

func (m *model) release(n int) []ca.Result {
	f := m.frozen[n]
	hold := m.links[n].hold
	m.links[n].hold, m.frozen[n] = nil, nil
	close(hold)
	return <-f.done
}

func (m *model) end() {
	for n := range m.frozen {
		if m.frozen[n] != nil {
			m.release(n)
		}
	}
}

// operate has a replica, which may die on the way, change an authority by evidence
// that may be of a while ago.
func (m *model) operate(rt *rapid.T) {
	set := m.set(rt)
	m.evidence = append(m.evidence, m.truth(set))
	if len(m.evidence) > 4 {
		m.evidence = m.evidence[1:]
	}
	order := by(rapid.SampledFrom(m.evidence).Draw(rt, "evidence"))
	order.Force = rapid.IntRange(0, 19).Draw(rt, "force") == 19
	id := rapid.SampledFrom(set.Authorities).Draw(rt, "authority").ID
	issuer := m.issuer(rt)
	if rapid.IntRange(0, 5).Draw(rt, "dies") == 5 {
		f := &faulty{store: m.sound, dies: true}
		config := m.config
		config.Authorities, config.Ledger = f, f
		issuer = open(m.t, config)
		f.count, f.at = 0, rapid.IntRange(1, 8).Draw(rt, "point")
	}
	ctx := m.t.Context()
	// Refusals are half of what is tested here; what must not be is seen in check.
	switch rapid.SampledFrom([]string{"prepare", "activate", "taint", "revoke", "abort", "step", "step", "step"}).Draw(rt, "operation") {
	case "prepare":
		issuer.Prepare(ctx, order)
	case "activate":
		issuer.Activate(ctx, id, order)
	case "taint":
		issuer.Taint(ctx, id, order)
	case "revoke":
		issuer.Revoke(ctx, id, order)
	case "abort":
		issuer.Abort(ctx, id, order)
	case "step":
		issuer.StepOnce(ctx, order.Evidence)
	}
}

// issue has a replica, however little it knows, issue for an agent or for who
// asked itself.
func (m *model) issue(rt *rapid.T) {
	request := requestFor(m.t)
	var agent *modelAgent
	if n := rapid.IntRange(0, len(m.agents)).Draw(rt, "agent"); n < len(m.agents) {
		agent, request.Caller = m.agents[n], agentID
	}
	results, err := m.issuer(rt).Issue(m.t.Context(), request)
	if err != nil {
		return
	}
	if results[0].Err != nil {
		rt.Fatal(results[0].Err)
	}
	m.released(rt, agent, results[0].SVID)
}

func (m *model) released(rt *rapid.T, agent *modelAgent, svid ca.SVID) {
	// Signed by the active one, or by one that was until a lease ago.
	now := time.Now()
	if active, _ := m.set(rt).Active(); svid.AuthorityID != active.ID && now.Sub(m.wasSince[svid.AuthorityID]) > ca.Lease {
		rt.Fatalf("signed by %s, which was active until %v", svid.AuthorityID, m.wasSince[svid.AuthorityID])
	}
	m.held = append(m.held, modelHeld{agent, svid, now})
}

// renew has an agent drop what is replaced, as it does some time after.
func (m *model) renew(rt *rapid.T) {
	if len(m.agents) == 0 {
		return
	}
	agent := rapid.SampledFrom(m.agents).Draw(rt, "agent")
	active, _ := m.set(rt).Active()
	m.held = slices.DeleteFunc(m.held, func(h modelHeld) bool { return h.agent == agent && h.svid.AuthorityID != active.ID })
}

func (m *model) follow(rt *rapid.T) {
	n := m.replica(rt)
	issuer := m.issuers[n]
	if err := issuer.Refresh(m.t.Context()); (err != nil) != m.links[n].cut {
		rt.Fatalf("Refresh = %v, cut off %t", err, m.links[n].cut)
	}
	for _, a := range m.agents {
		if set := currentSet(issuer); set.Revision > a.bundle.Revision && rapid.Bool().Draw(rt, "hears") {
			a.bundle = set
		}
	}
}

// turn replaces the active authority as fast as that may be: what comes after it is
// where it can go wrong.
func (m *model) turn(rt *rapid.T) {
	ctx, issuer := m.t.Context(), m.issuer(rt)
	next, err := issuer.Prepare(ctx, operator)
	if err != nil {
		return // it is cut off
	}
	for _, a := range m.agents {
		a.bundle = currentSet(issuer)
	}
	issuer.Activate(ctx, next.ID, by(m.truth(m.set(rt))))
}

// fallSilent has an agent say no more what it holds, or say it again.
func (m *model) fallSilent(rt *rapid.T) {
	if len(m.agents) > 0 {
		agent := rapid.SampledFrom(m.agents).Draw(rt, "agent")
		agent.silent = !agent.silent
	}
}

func (m *model) advance(rt *rapid.T) {
	time.Sleep(rapid.SampledFrom([]time.Duration{
		time.Second, 20 * time.Second, 40 * time.Second, ca.Lease, ca.Settle, 10 * time.Minute, time.Hour, 3 * time.Hour,
	}).Draw(rt, "time"))
}

func (m *model) crash(rt *rapid.T) {
	n := rapid.IntRange(0, len(m.issuers)-1).Draw(rt, "replica")
	if m.frozen[n] != nil {
		m.links[n].cut = true
		m.release(n) // nobody gets it
	}
	m.issuers[n] = nil
}

func (m *model) join(rt *rapid.T) {
	switch n := len(m.agents); {
	case n < 4:
		m.agents = append(m.agents, &modelAgent{bundle: m.set(rt)})
	default: // its node is gone, and all that ran there
		gone := m.agents[0]
		m.agents = m.agents[1:]
		m.held = slices.DeleteFunc(m.held, func(h modelHeld) bool { return h.agent == gone })
	}
}

// check compares the document with the one before and with what is true.
func (m *model) check(rt *rapid.T) {
	set := m.set(rt) // which DecodeSet has found to have one active authority at most
	now := time.Now()
	changed := set.Revision != m.before.Revision
	if set.Revision < m.before.Revision {
		rt.Fatalf("revision %d after %d", set.Revision, m.before.Revision)
	}
	was, _ := m.before.Active()
	active, ok := set.Active()
	if !ok {
		rt.Fatal("none is active")
	}
	m.wasSince[active.ID] = now
	if active.ID != was.ID {
		m.wasSince[was.ID] = now
		if c := active.Changed; !c.Forced {
			for _, a := range m.agents {
				if in, ok := a.bundle.Authority(active.ID); !ok || in.State != ca.Prepared && in.State != ca.Active {
					rt.Fatalf("activated by %+v, and an agent at revision %d does not trust it", c, a.bundle.Revision)
				}
			}
			if len(m.agents) == 0 {
				for _, h := range m.held {
					// What was released since it was decided, it cannot have known.
					if now.Before(h.svid.NotAfter) && h.at.Before(c.At) {
						rt.Fatalf("activated by %+v with no agent expected, and an SVID lives until %v", c, h.svid.NotAfter)
					}
				}
			}
		}
		if left := active.NotAfter().Sub(active.Changed.At); left < 2*time.Hour {
			rt.Fatalf("activated with %v left", left)
		}
	}
	for _, a := range set.Authorities {
		if a.State == ca.Revoked && a.Changed.Forced {
			m.forced[a.ID] = true
		}
		if b, ok := m.before.Authority(a.ID); ok && b.State > a.State {
			rt.Fatalf("%v became %v", b.State, a.State)
		}
		if b, ok := m.before.Authority(a.ID); (!ok || b.State != a.State) && m.before.Revision != 0 {
			// Recorded in the same write, whoever died after it.
			if n := len(set.History); n == 0 || !slices.Contains(set.History, a.Changed) || a.Changed.State != a.State {
				rt.Fatalf("%v by %+v, which is not in the history of %d", a.State, a.Changed, n)
			}
		}
		if changed && a.Changed.Revision == set.Revision && a.Changed.Actor == "" {
			rt.Fatalf("%v, and nobody did it", a.State)
		}
	}
	trusted := make(map[string]bool)
	for _, a := range set.Bundle().Authorities {
		trusted[a.ID] = true
	}
	m.held = slices.DeleteFunc(m.held, func(h modelHeld) bool { return now.After(h.svid.NotAfter) })
	for _, h := range m.held {
		if id := h.svid.AuthorityID; !trusted[id] && !m.forced[id] {
			rt.Fatalf("%s is revoked, and an SVID under it is held until %v", id, h.svid.NotAfter)
		}
	}
	m.before = set
}

// Whatever is ordered, by however many replicas, however late they are, whatever they
// are cut off from, and wherever they stand still or die, what must never be is not.
func TestModel(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		// A failed check is a panic, and belongs to rapid's goroutine.
		var failed any
		synctest.Test(t, func(t *testing.T) {
			defer func() { failed = recover() }()
			m := &model{
				t: t, config: newConfig(t), issuers: make([]*ca.Issuer, 3), links: make([]*link, 3), frozen: make([]*frozen, 3),
				wasSince: make(map[string]time.Time), forced: make(map[string]bool),
			}
			defer m.end()
			m.config.AuthorityLife = 12 * time.Hour
			m.sound = m.config.Ledger.(*storage.Memory)
			open(t, m.config)
			m.before = m.set(rt)
			m.agents = append(m.agents, &modelAgent{bundle: m.before}, &modelAgent{bundle: m.before})
			rt.Repeat(map[string]func(*rapid.T){
				"":        m.check,
				"operate": m.operate,
				"issue":   m.issue,
				"renew":   m.renew,
				"follow":  m.follow,
				"advance": m.advance,
				"crash":   m.crash,
				"join":    m.join,

				"turn":        m.turn,
				"fall silent": m.fallSilent,

				"partition": m.partition,
				"freeze":    m.freeze,
				"thaw":      m.thaw,
			})
		})
		if failed != nil {
			panic(failed)
		}
	})
}
