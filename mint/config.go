package mint

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/cost"
	"go.yaml.in/yaml/v3"
)

// The bounds of a configuration.
const (
	maxConfig    = 1 << 20 // bytes
	maxIssuers   = 16
	maxRules     = 256
	maxPatterns  = 32   // of a rule
	maxCondition = 4096 // bytes
	// maxCost is what a condition may cost at most, in CEL's units, for the most
	// expensive token that there can be: some 5 ms, and a thousandth of that for what
	// conditions are.
	maxCost = 100_000
	maxRate = 1_000_000
)

// document is the configuration as it is spelled; docs/mint-rules.md explains it.
type document struct {
	Issuers []issuerText `yaml:"issuers"`
	Rules   []ruleText   `yaml:"rules"`
}

type issuerText struct {
	Name         string        `yaml:"name"`
	Issuer       string        `yaml:"issuer"`
	Audience     string        `yaml:"audience"`
	JWKSURL      string        `yaml:"jwksURL"`
	JWKSFile     string        `yaml:"jwksFile"`
	Kubernetes   bool          `yaml:"kubernetes"`
	CAFile       string        `yaml:"caFile"`
	LoopbackHTTP bool          `yaml:"loopbackHTTP"`
	Algorithms   []string      `yaml:"algorithms"`
	MaxTokenLife time.Duration `yaml:"maxTokenLife"`
	Leeway       time.Duration `yaml:"leeway"`
	RequireJTI   *bool         `yaml:"requireJTI"`
}

type ruleText struct {
	Name      string        `yaml:"name"`
	Issuer    string        `yaml:"issuer"`
	Condition string        `yaml:"condition"`
	IDs       []string      `yaml:"ids"`
	MaxTTL    time.Duration `yaml:"maxTTL"`
	Rate      rateText      `yaml:"rate"`
}

type rateText struct {
	PerMinute  int    `yaml:"perMinute"`
	PerSubject int    `yaml:"perSubjectPerMinute"`
	Subject    string `yaml:"subject"`
}

// issuer is one whose tokens count.
type issuer struct {
	name, url, audience       string
	jwksURL, jwksFile, caFile string // at most one of the first two
	kubernetes, loopbackHTTP  bool
	algorithms                []string
	maxLife, leeway           time.Duration
	requireJTI                bool
}

// ConfigError is what is wrong with a configuration, and where.
type ConfigError struct {
	Line, Column int // from 1; 0 if it is nowhere in particular
	Err          error
}

// Error returns the position and what is wrong there.
func (e *ConfigError) Error() string {
	if e.Line == 0 {
		return "mint: " + e.Err.Error()
	}
	return fmt.Sprintf("mint: line %d, column %d: %v", e.Line, e.Column, e.Err)
}

// Unwrap returns e.Err.
func (e *ConfigError) Unwrap() error { return e.Err }

// Parse reads a configuration of issuers and rules, YAML as docs/mint-rules.md
// describes it. It refuses what it does not know, and every condition that might not
// end soon, with a [*ConfigError]. It reads no other file and no network.
func Parse(data []byte) (*Rules, error) {
	if len(data) > maxConfig {
		return nil, &ConfigError{Err: fmt.Errorf("a configuration of %d bytes, more than %d", len(data), maxConfig)}
	}
	var root yaml.Node
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	if err := decoder.Decode(&root); err != nil {
		if errors.Is(err, io.EOF) {
			err = errors.New("the configuration is empty")
		}
		return nil, &ConfigError{Err: err}
	}
	if err := decoder.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, &ConfigError{Err: errors.New("more than one document")}
	}
	if alias := findAlias(&root); alias != nil {
		return nil, at(alias, errors.New("anchors and aliases are not taken: what a rule says stands in it"))
	}
	var text document
	strict := yaml.NewDecoder(bytes.NewReader(data))
	strict.KnownFields(true)
	if err := strict.Decode(&text); err != nil {
		return nil, &ConfigError{Err: err} // which has the line
	}
	return compile(text, root.Content[0])
}

// findAlias returns an alias or an anchor, or nil.
func findAlias(node *yaml.Node) *yaml.Node {
	if node.Kind == yaml.AliasNode || node.Anchor != "" {
		return node
	}
	for _, child := range node.Content {
		if found := findAlias(child); found != nil {
			return found
		}
	}
	return nil
}

func at(node *yaml.Node, err error) *ConfigError {
	return &ConfigError{Line: node.Line, Column: node.Column, Err: err}
}

// find returns the node that a path of names and indices leads to, or the last one on
// the way that there is.
func find(node *yaml.Node, path ...any) *yaml.Node {
	for _, step := range path {
		next := (*yaml.Node)(nil)
		switch step := step.(type) {
		case string:
			for n := 0; node.Kind == yaml.MappingNode && n+1 < len(node.Content); n += 2 {
				if node.Content[n].Value == step {
					next = node.Content[n+1]
				}
			}
		case int:
			if node.Kind == yaml.SequenceNode && step < len(node.Content) {
				next = node.Content[step]
			}
		}
		if next == nil {
			return node
		}
		node = next
	}
	return node
}

func compile(text document, root *yaml.Node) (*Rules, error) {
	switch {
	case len(text.Issuers) == 0 || len(text.Issuers) > maxIssuers:
		return nil, at(find(root, "issuers"), fmt.Errorf("issuers: from 1 to %d, not %d", maxIssuers, len(text.Issuers)))
	case len(text.Rules) == 0 || len(text.Rules) > maxRules:
		return nil, at(find(root, "rules"), fmt.Errorf("rules: from 1 to %d, not %d", maxRules, len(text.Rules)))
	}
	env, err := newEnv()
	if err != nil {
		return nil, &ConfigError{Err: err}
	}
	r := &Rules{}
	byName := make(map[string]*issuer)
	for n, t := range text.Issuers {
		i, field, err := newIssuer(t)
		if err == nil && byName[t.Name] != nil {
			field, err = "name", fmt.Errorf("two issuers %q", t.Name)
		}
		if err == nil && slices.ContainsFunc(r.issuers, func(other *issuer) bool { return other.url == i.url }) {
			field, err = "issuer", fmt.Errorf("two issuers %q: one token would be two", i.url)
		}
		if err != nil {
			return nil, at(find(root, "issuers", n, field), fmt.Errorf("issuer %q: %s: %w", t.Name, field, err))
		}
		byName[t.Name] = i
		r.issuers = append(r.issuers, i)
	}
	named := make(map[string]bool)
	for n, t := range text.Rules {
		rule, path, err := newRule(env, t, byName)
		if err == nil && named[t.Name] {
			path, err = []any{"name"}, fmt.Errorf("two rules %q", t.Name)
		}
		for p := 0; err == nil && p < len(rule.ids); p++ {
			if td := rule.ids[p].trustDomain; r.trustDomain.IsZero() {
				r.trustDomain = td
			} else if td != r.trustDomain {
				path, err = []any{"ids", p}, fmt.Errorf("%q is not of trust domain %q, as others are", rule.ids[p].text, r.trustDomain)
			}
		}
		if err != nil {
			return nil, at(find(root, append([]any{"rules", n}, path...)...), fmt.Errorf("rule %q: %s: %w", t.Name, path[0], err))
		}
		named[t.Name] = true
		r.rules = append(r.rules, rule)
	}
	return r, nil
}

// newIssuer returns the field that an error is about.
func newIssuer(t issuerText) (i *issuer, field string, err error) {
	i = &issuer{
		name: t.Name, url: t.Issuer, audience: t.Audience, jwksURL: t.JWKSURL, jwksFile: t.JWKSFile, caFile: t.CAFile,
		kubernetes: t.Kubernetes, loopbackHTTP: t.LoopbackHTTP, algorithms: t.Algorithms,
		maxLife: t.MaxTokenLife, leeway: t.Leeway, requireJTI: t.RequireJTI == nil || *t.RequireJTI,
	}
	if i.maxLife == 0 {
		i.maxLife = time.Hour
	}
	if i.leeway == 0 {
		i.leeway = 30 * time.Second
	}
	if len(i.algorithms) == 0 {
		i.algorithms = []string{"RS256", "ES256"}
	}
	sources := 0
	for _, given := range []bool{t.JWKSURL != "", t.JWKSFile != "", t.Kubernetes} {
		if given {
			sources++
		}
	}
	switch {
	case !isConfigName(t.Name):
		return nil, "name", errors.New("1 to 63 lower-case letters, digits and hyphens")
	case i.url == "" || len(i.url) > maxString:
		return nil, "issuer", errors.New("the token's iss, compared exactly; required")
	case i.audience == "" || len(i.audience) > maxString:
		return nil, "audience", errors.New("the token's aud, compared exactly; required")
	case i.audience == i.url:
		return nil, "audience", fmt.Errorf("%q is the issuer's own: whoever gets a token for nothing in particular has it; choose one that only Troth has", i.audience)
	case sources > 1:
		return nil, "issuer", errors.New("jwksURL, jwksFile and kubernetes are three sources of keys: choose one, or none for discovery")
	case i.caFile != "" && (i.jwksFile != "" || i.kubernetes):
		return nil, "caFile", errors.New("nothing is fetched by HTTPS")
	case i.maxLife < time.Second || i.maxLife > 24*time.Hour:
		return nil, "maxTokenLife", errors.New("from 1s to 24h")
	case i.leeway < 0 || i.leeway > time.Minute:
		return nil, "leeway", errors.New("at most 1m")
	}
	for _, algorithm := range i.algorithms {
		if !slices.Contains([]string{"RS256", "ES256", "ES384", "ES512"}, algorithm) {
			return nil, "algorithms", fmt.Errorf("%q is not one of RS256, ES256, ES384 and ES512", algorithm)
		}
	}
	if t.JWKSURL != "" {
		if err := checkURL(t.JWKSURL, i.loopbackHTTP); err != nil {
			return nil, "jwksURL", err
		}
	}
	if sources == 0 {
		if err := checkURL(i.url, i.loopbackHTTP); err != nil {
			return nil, "issuer", err
		}
	}
	return i, "", nil
}

// checkURL returns nil if keys may be fetched from there: by HTTPS, or from this
// machine.
func checkURL(text string, loopbackHTTP bool) error {
	u, err := url.Parse(text)
	switch {
	case err != nil || u.Host == "" || u.User != nil || u.Fragment != "":
		return fmt.Errorf("%.200q is no URL of keys", text)
	case u.Scheme == "https":
		return nil
	case u.Scheme == "http" && isLoopback(u.Hostname()) && loopbackHTTP:
		return nil
	case u.Scheme == "http" && isLoopback(u.Hostname()):
		return fmt.Errorf("%.200q is not HTTPS; loopbackHTTP permits that on this machine", text)
	default:
		return fmt.Errorf("%.200q is not HTTPS", text)
	}
}

// isLoopback takes addresses and no names: a name is what somebody's resolver says.
func isLoopback(host string) bool {
	address, err := netip.ParseAddr(host)
	return err == nil && address.IsLoopback()
}

// newRule returns the path in the rule that an error is about.
func newRule(env *cel.Env, t ruleText, issuers map[string]*issuer) (r *Rule, path []any, err error) {
	r = &Rule{Name: t.Name, MaxTTL: t.MaxTTL, PerMinute: t.Rate.PerMinute, PerSubject: t.Rate.PerSubject, issuer: issuers[t.Issuer]}
	if r.PerMinute == 0 {
		r.PerMinute = 3000
	}
	if r.PerSubject == 0 {
		r.PerSubject = min(600, r.PerMinute)
	}
	if t.Rate.Subject == "" {
		t.Rate.Subject = "claims.sub"
	}
	switch {
	case !isConfigName(t.Name):
		return nil, []any{"name"}, errors.New("1 to 63 lower-case letters, digits and hyphens")
	case r.issuer == nil:
		return nil, []any{"issuer"}, fmt.Errorf("there is no issuer %q", t.Issuer)
	case r.MaxTTL < MinTTL || r.MaxTTL > 24*time.Hour:
		return nil, []any{"maxTTL"}, fmt.Errorf("from %v to 24h, and required", MinTTL)
	case r.PerMinute < 1 || r.PerMinute > maxRate:
		return nil, []any{"rate", "perMinute"}, fmt.Errorf("from 1 to %d", maxRate)
	case r.PerSubject < 1 || r.PerSubject > r.PerMinute:
		return nil, []any{"rate", "perSubjectPerMinute"}, errors.New("from 1 to perMinute")
	case len(t.IDs) == 0 || len(t.IDs) > maxPatterns:
		return nil, []any{"ids"}, fmt.Errorf("from 1 to %d patterns", maxPatterns)
	}
	if r.subject, err = parseClaimPath(t.Rate.Subject); err != nil {
		return nil, []any{"rate", "subject"}, err
	}
	for n, text := range t.IDs {
		p, err := parsePattern(text)
		if err != nil {
			return nil, []any{"ids", n}, fmt.Errorf("%q: %w", text, err)
		}
		r.ids = append(r.ids, p)
	}
	if r.condition, err = compileCondition(env, t.Condition); err != nil {
		return nil, []any{"condition"}, err
	}
	return r, nil, nil
}

func isConfigName(s string) bool {
	return s != "" && len(s) <= 63 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

// newEnv returns what conditions are compiled in: the standard library, and claims.
func newEnv() (*cel.Env, error) {
	return cel.NewEnv(
		cel.Variable("claims", cel.MapType(cel.StringType, cel.DynType)),
		cel.ParserRecursionLimit(64),
		cel.ParserExpressionSizeLimit(maxCondition),
	)
}

func compileCondition(env *cel.Env, text string) (cel.Program, error) {
	if strings.TrimSpace(text) == "" {
		return nil, errors.New("required: a CEL expression over claims, true for the tokens that the rule is for")
	}
	if len(text) > maxCondition {
		return nil, fmt.Errorf("longer than %d bytes", maxCondition)
	}
	compiled, issues := env.Compile(text)
	if err := issues.Err(); err != nil {
		return nil, err
	}
	if !compiled.OutputType().IsExactType(cel.BoolType) {
		return nil, fmt.Errorf("it is a %s: compare, so that it is true or false", compiled.OutputType())
	}
	estimate, err := env.EstimateCost(compiled, largestClaims{})
	if err != nil {
		return nil, err
	}
	if estimate.Max > maxCost {
		return nil, fmt.Errorf("it may cost %d for a large token, and at most %d: a list in a list, or one looked through many times", estimate.Max, maxCost)
	}
	// The limit holds whatever the estimate overlooked.
	return env.Program(compiled, cel.CostLimit(maxCost), cel.EvalOptions(cel.OptOptimize))
}

// largestClaims estimates the size of what a condition reads: the bounds of
// ParseClaims.
type largestClaims struct{}

// EstimateSize implements cost.Estimator.
func (largestClaims) EstimateSize(node cost.AstNode) *cost.SizeEstimate {
	switch len(node.Path()) {
	case 0:
		return nil // no part of the claims
	case 1: // claims itself
		return &cost.SizeEstimate{Max: maxMembers}
	default: // a text, or a list of less
		return &cost.SizeEstimate{Max: maxString}
	}
}

// EstimateCallCost implements cost.Estimator; nil means the standard library's own.
func (largestClaims) EstimateCallCost(string, string, *cost.AstNode, []cost.AstNode) *cost.CallEstimate {
	return nil
}
