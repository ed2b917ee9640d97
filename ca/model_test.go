package ca_test

import (
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
	agents  []*modelAgent
	held    []modelHeld

	before   ca.Set
	wasSince map[string]time.Time // until when an authority was active by the document
	forced   map[string]bool      // revoked by force
	evidence []ca.Propagation     // what was true once
}

// modelAgent trusts a bundle and has proved its successor.
type modelAgent struct {
	bundle ca.Set
}

// modelHeld is an SVID that somebody holds: an agent, or nil for who asked itself.
type modelHeld struct {
	agent *modelAgent
	svid  ca.SVID
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
	}
	for _, h := range m.held {
		if h.agent != nil && time.Now().Before(h.svid.NotAfter) {
			use := p.Uses[h.svid.AuthorityID]
			use.SVIDs++
			p.Uses[h.svid.AuthorityID] = use
		}
	}
	return p
}

func (m *model) issuer(rt *rapid.T) *ca.Issuer {
	n := rapid.IntRange(0, len(m.issuers)-1).Draw(rt, "replica")
	if m.issuers[n] == nil {
		m.issuers[n] = open(m.t, m.config)
	}
	return m.issuers[n]
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
	svid := results[0].SVID
	// Signed by the active one, or by one that was until a lease ago.
	now := time.Now()
	if active, _ := m.set(rt).Active(); svid.AuthorityID != active.ID && now.Sub(m.wasSince[svid.AuthorityID]) > ca.Lease {
		rt.Fatalf("signed by %s, which was active until %v", svid.AuthorityID, m.wasSince[svid.AuthorityID])
	}
	m.held = append(m.held, modelHeld{agent, svid})
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
	issuer := m.issuer(rt)
	if err := issuer.Refresh(m.t.Context()); err != nil {
		rt.Fatal(err)
	}
	for _, a := range m.agents {
		if set := currentSet(issuer); set.Revision > a.bundle.Revision && rapid.Bool().Draw(rt, "hears") {
			a.bundle = set
		}
	}
}

func (m *model) advance(rt *rapid.T) {
	time.Sleep(rapid.SampledFrom([]time.Duration{
		time.Second, 20 * time.Second, ca.Lease, ca.Settle, 10 * time.Minute, time.Hour, 3 * time.Hour,
	}).Draw(rt, "time"))
}

func (m *model) crash(rt *rapid.T) {
	m.issuers[rapid.IntRange(0, len(m.issuers)-1).Draw(rt, "replica")] = nil
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
					if now.Before(h.svid.NotAfter) {
						rt.Fatalf("activated by %+v with no agent expected, and an SVID lives until %v", c, h.svid.NotAfter)
					}
				}
			}
		}
		if left := active.Certificate.NotAfter.Sub(now); left < 2*time.Hour {
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

// Whatever is ordered, by however many replicas, however late they are and
// wherever they die, what must never be is not.
func TestModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		// A failed check is a panic, and belongs to rapid's goroutine.
		var failed any
		synctest.Test(t, func(t *testing.T) {
			defer func() { failed = recover() }()
			m := &model{
				t: t, config: newConfig(t), issuers: make([]*ca.Issuer, 3),
				wasSince: make(map[string]time.Time), forced: make(map[string]bool),
			}
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
			})
		})
		if failed != nil {
			panic(failed)
		}
	})
}
