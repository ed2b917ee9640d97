// Package mint decides which identities CI jobs get: whose tokens count, which claims
// a token has to have, and which SPIFFE IDs it is then worth, for how long and how
// often. It issues nothing and spends nothing; package server does.
//
// Start with [Parse], which reads the configuration, [Verifier.Verify], which says what
// the issuer of a token vouches for, and [Rules.Match], which says what that is worth.
// [Rules.Explain] is the same decision for people, without a signature.
//
// It guarantees that a configuration that was read can be used: every condition is
// compiled, and its cost is bounded for every token that may come. A decision depends
// on the claims and the configuration alone. It refuses what is ambiguous: a token with
// a member given twice, a claim whose value would be more than one segment of a SPIFFE
// ID, a pattern in which two claims could trade letters.
package mint

import (
	"fmt"
	"strings"
	"time"

	"cel.dev/cel-go/cel"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Rules is a configuration. It is immutable, and may be used from many goroutines.
type Rules struct {
	trustDomain spiffeid.TrustDomain
	issuers     []*issuer
	rules       []*Rule
}

// TrustDomain is that of all SPIFFE IDs that the rules give.
func (r *Rules) TrustDomain() spiffeid.TrustDomain { return r.trustDomain }

// MaxTTL is the longest life that a rule gives.
func (r *Rules) MaxTTL() time.Duration {
	var longest time.Duration
	for _, rule := range r.rules {
		longest = max(longest, rule.MaxTTL)
	}
	return longest
}

// Audiences returns the audience of each issuer, in the order of the configuration.
func (r *Rules) Audiences() []string {
	var all []string
	for _, i := range r.issuers {
		all = append(all, i.audience)
	}
	return all
}

// Rule is one rule of a configuration. It is immutable.
type Rule struct {
	Name string
	// MaxTTL is the longest life of an SVID, and what one gets that asks for none.
	MaxTTL time.Duration
	// PerMinute and PerSubject are how many SVIDs the rule gives in a minute, to all
	// and to each subject, by each replica.
	PerMinute, PerSubject int

	issuer    *issuer
	condition cel.Program
	ids       []pattern
	subject   claimPath
}

// Reason is what a rule says, as it stands in an answer. Reasons never change meaning.
type Reason string

// The reasons of rules, in the order in which they are looked for.
const (
	Issuer         Reason = "ISSUER"           // the token is another issuer's
	Audience       Reason = "AUDIENCE"         // another audience than the issuer's, none, or others beside it
	NoID           Reason = "NO_JTI"           // the token does not name itself, and has to
	Lifetime       Reason = "TOKEN_LIFETIME"   // the token lives for longer than the issuer's may
	Condition      Reason = "CONDITION"        // the condition is false
	ConditionError Reason = "CONDITION_ERROR"  // the condition has no value: it reads a claim that is not there
	Subject        Reason = "SUBJECT"          // the claim that tells subjects apart is missing or no text
	IDMalformed    Reason = "ID_MALFORMED"     // what is asked for is no SPIFFE ID
	IDNotPermitted Reason = "ID_NOT_PERMITTED" // none of the rule's patterns has it
	TTLInvalid     Reason = "TTL_INVALID"      // less than 10 s
	TTLTooLong     Reason = "TTL_TOO_LONG"     // longer than the rule's limit
	Matched        Reason = "MATCHED"
)

// MinTTL is the shortest life that can be asked for.
const MinTTL = 10 * time.Second

// Verdict is what one rule says.
type Verdict struct {
	Rule   string
	Reason Reason
	// Message is a sentence for people. It quotes claims.
	Message string
}

// Explain says of each rule, in the order of the configuration, whether it gives the
// SPIFFE ID to a token with these claims, for as long as ttl, and why or why not. The
// empty id asks about the claims alone, and a ttl of 0 about what the rule gives.
// Whether the token is in force, or was ever signed, is not looked at.
func (r *Rules) Explain(c Claims, id string, ttl time.Duration) []Verdict {
	verdicts := make([]Verdict, 0, len(r.rules))
	for _, rule := range r.rules {
		m, refused := rule.match(c)
		if refused == nil && id != "" {
			_, refused = m.decide(id, ttl)
		} else if refused == nil {
			if refused = m.lives(ttl); refused == nil {
				refused = &Refusal{Matched, "gives " + strings.Join(m.gives(), ", ")}
			}
		}
		if refused == nil {
			refused = &Refusal{Matched, "gives it for at most " + rule.MaxTTL.String()}
		}
		verdicts = append(verdicts, Verdict{Rule: rule.Name, Reason: refused.Reason, Message: refused.Message})
	}
	return verdicts
}

// Refusal is why something is not given.
type Refusal struct {
	Reason  Reason
	Message string // for people; it quotes claims
}

// Error returns the reason and the message.
func (r *Refusal) Error() string { return fmt.Sprintf("mint: %s: %s", r.Reason, r.Message) }

func refuse(reason Reason, format string, a ...any) *Refusal {
	return &Refusal{Reason: reason, Message: fmt.Sprintf(format, a...)}
}

// Match is all that the rules give to one token.
type Match struct{ matches []*match }

// Match evaluates every condition for the claims, once. It returns nil if no rule
// gives them anything.
func (r *Rules) Match(c Claims) *Match {
	var all Match
	for _, rule := range r.rules {
		if m, refused := rule.match(c); refused == nil {
			all.matches = append(all.matches, m)
		}
	}
	if len(all.matches) == 0 {
		return nil
	}
	return &all
}

// Grant is what a rule gives.
type Grant struct {
	Rule *Rule
	ID   spiffeid.ID
	TTL  time.Duration
	// Subject is what tells those apart who share the rule's rate.
	Subject string
}

// Decide returns what the first rule gives that gives the SPIFFE ID for as long as ttl;
// 0 is as long as the rule permits. It fails with a [*Refusal]: that of the rule which
// came nearest.
func (m *Match) Decide(id string, ttl time.Duration) (Grant, error) {
	var nearest *Refusal
	for _, one := range m.matches {
		grant, refused := one.decide(id, ttl)
		if refused == nil {
			return grant, nil
		}
		if nearest == nil || refused.Reason == TTLTooLong {
			nearest = refused
		}
	}
	return Grant{}, nearest
}

// match is a rule whose condition holds, and its patterns with the claims in their
// places.
type match struct {
	rule     *Rule
	subject  string
	expanded []expanded
	unusable []string // why patterns give nothing
}

func (r *Rule) match(c Claims) (*match, *Refusal) {
	if c.Issuer != r.issuer.url {
		return nil, refuse(Issuer, "the token is of %q, and the rule is for %q", c.Issuer, r.issuer.url)
	}
	if refused := r.issuer.admits(c); refused != nil {
		return nil, refused
	}
	value, _, err := r.condition.Eval(map[string]any{"claims": c.values})
	if err != nil {
		return nil, refuse(ConditionError, "the condition has no value: %.200s", err.Error())
	}
	if holds, ok := value.Value().(bool); !ok || !holds {
		return nil, refuse(Condition, "the condition is false")
	}
	m := &match{rule: r}
	if m.subject, err = r.subject.text(c.values); err != nil {
		return nil, refuse(Subject, "%s", err.Error())
	}
	for _, p := range r.ids {
		e, err := p.expand(c.values)
		if err != nil {
			m.unusable = append(m.unusable, err.Error())
			continue
		}
		m.expanded = append(m.expanded, e)
	}
	return m, nil
}

func (m *match) decide(asked string, ttl time.Duration) (Grant, *Refusal) {
	id, err := spiffeid.FromString(asked)
	if err != nil || id.Path() == "" {
		return Grant{}, refuse(IDMalformed, "%.200q is no SPIFFE ID of a workload", asked)
	}
	permitted := false
	for _, e := range m.expanded {
		permitted = permitted || e.matches(id)
	}
	if !permitted {
		return Grant{}, refuse(IDNotPermitted, "it gives %s", strings.Join(m.gives(), ", "))
	}
	if refused := m.lives(ttl); refused != nil {
		return Grant{}, refused
	}
	if ttl == 0 {
		ttl = m.rule.MaxTTL
	}
	return Grant{Rule: m.rule, ID: id, TTL: ttl, Subject: m.subject}, nil
}

func (m *match) lives(ttl time.Duration) *Refusal {
	switch {
	case ttl != 0 && ttl < MinTTL:
		return refuse(TTLInvalid, "an SVID lives for %v at least", MinTTL)
	case ttl > m.rule.MaxTTL:
		return refuse(TTLTooLong, "it gives SVIDs that live for %v at most", m.rule.MaxTTL)
	}
	return nil
}

// gives says in words what the match gives.
func (m *match) gives() []string {
	var all []string
	for _, e := range m.expanded {
		all = append(all, e.String())
	}
	for _, why := range m.unusable {
		all = append(all, "nothing, because "+why)
	}
	return all
}
