package mint

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// pattern is a set of SPIFFE IDs:
//
//	spiffe://TRUST_DOMAIN/SEGMENT/SEGMENT...
//
// A segment is the letters that a SPIFFE ID's may have; or a * alone, which stands for
// any one segment; or letters with one claim among them, {claims.NAME}. Everything is
// anchored: a pattern has as many segments as what it matches.
type pattern struct {
	text        string
	trustDomain spiffeid.TrustDomain
	segments    []segment
}

// segment is one of a pattern's.
type segment struct {
	any            bool
	before, behind string // the letters around claim; all of them if there is none
	claim          claimPath
}

const maxSegments = 16

// parsePattern reads a pattern.
func parsePattern(text string) (pattern, error) {
	p := pattern{text: text}
	rest, ok := strings.CutPrefix(text, "spiffe://")
	if !ok {
		return pattern{}, errors.New("it does not begin with spiffe://")
	}
	if len(text) > maxString {
		return pattern{}, fmt.Errorf("it is longer than %d bytes", maxString)
	}
	name, path, ok := strings.Cut(rest, "/")
	if !ok {
		return pattern{}, errors.New("it has no path: every workload has one")
	}
	var err error
	// Not TrustDomainFromString, which takes a whole ID too.
	if p.trustDomain, err = spiffeid.TrustDomainFromString(name); err != nil || p.trustDomain.Name() != name {
		return pattern{}, fmt.Errorf("%q is no trust domain", name)
	}
	segments, err := splitSegments(path)
	if err != nil {
		return pattern{}, err
	}
	if len(segments) > maxSegments {
		return pattern{}, fmt.Errorf("it has more than %d segments", maxSegments)
	}
	for _, one := range segments {
		s, err := parseSegment(one)
		if err != nil {
			return pattern{}, fmt.Errorf("segment %q: %w", one, err)
		}
		p.segments = append(p.segments, s)
	}
	if first := p.segments[0]; !first.any && first.claim == nil && first.before == reserved {
		return pattern{}, fmt.Errorf("/%s/ is Troth's own", reserved)
	}
	return p, nil
}

// reserved is the first segment of the SPIFFE IDs of servers and agents. Whatever a
// pattern says, it is nobody else's.
const reserved = "troth"

// splitSegments splits a path at the slashes that are not in braces.
func splitSegments(path string) ([]string, error) {
	var segments []string
	begin, inside, quoted := 0, false, false
	for n := range len(path) {
		switch c := path[n]; {
		case inside && c == '"':
			quoted = !quoted
		case quoted:
		case c == '{':
			if inside {
				return nil, errors.New("a { in braces")
			}
			inside = true
		case c == '}':
			if !inside {
				return nil, errors.New("a } without a {")
			}
			inside = false
		case c == '/' && !inside:
			segments = append(segments, path[begin:n])
			begin = n + 1
		}
	}
	if inside {
		return nil, errors.New("a { without a }")
	}
	return append(segments, path[begin:]), nil
}

func parseSegment(text string) (segment, error) {
	if text == "*" {
		return segment{any: true}, nil
	}
	before, rest, found := strings.Cut(text, "{")
	if !found {
		if err := spiffeid.ValidatePathSegment(text); err != nil {
			if strings.Contains(text, "*") {
				return segment{}, errors.New("a * stands for a whole segment, and alone")
			}
			return segment{}, err
		}
		return segment{before: text}, nil
	}
	end := strings.LastIndex(rest, "}")
	path, behind := rest[:end], rest[end+1:]
	s := segment{before: before, behind: behind}
	var err error
	if s.claim, err = parseClaimPath(path); err != nil {
		// Two claims in one segment come to this too: their values could trade letters,
		// so that two jobs would get one ID.
		return segment{}, fmt.Errorf("one {claims.NAME}, and no more: %w", err)
	}
	for _, letters := range []string{before, behind} {
		if letters != "" && strings.Trim(letters, segmentLetters) != "" {
			return segment{}, fmt.Errorf("%q has other letters than those of a SPIFFE ID", letters)
		}
	}
	return s, nil
}

// segmentLetters are those of a SPIFFE ID's path segment (SPIFFE-ID §2.2).
const segmentLetters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._"

// expanded is a pattern in which the claims are in their places: segments, or * for any.
// No segment of a SPIFFE ID is a *.
type expanded struct {
	trustDomain spiffeid.TrustDomain
	segments    []string
}

const wildcard = "*"

// expand puts the claims into their places, or says which cannot be.
func (p pattern) expand(values map[string]any) (expanded, error) {
	e := expanded{trustDomain: p.trustDomain}
	for _, s := range p.segments {
		text := s.before
		switch {
		case s.any:
			text = wildcard
		case s.claim != nil:
			value, err := s.claim.text(values)
			if err != nil {
				return expanded{}, err
			}
			text = s.before + escape(value) + s.behind
			if err := spiffeid.ValidatePathSegment(text); err != nil || len(text) > maxEscaped {
				return expanded{}, fmt.Errorf("the value of %s makes no segment of a SPIFFE ID", s.claim)
			}
		}
		e.segments = append(e.segments, text)
	}
	return e, nil
}

// maxEscaped bounds a segment with a claim in it, in bytes.
const maxEscaped = 512

// escape spells a claim's value with letters of a path segment, so that no two values
// are spelled alike and none is more than one segment, is empty while the value is not,
// or is one that means something: letters, digits and hyphens stand for themselves, and
// so does a dot that is not the first; every other byte is an underscore and two
// hexadecimal digits. Thus "o/r" is "o_2Fr", ".." is "_2E." and "*" is "_2A".
func escape(value string) string {
	const digits = "0123456789ABCDEF"
	var b strings.Builder
	for n := range len(value) {
		switch c := value[n]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '.' && n > 0:
			b.WriteByte(c)
		default:
			b.WriteByte('_')
			b.WriteByte(digits[c>>4])
			b.WriteByte(digits[c&15])
		}
	}
	return b.String()
}

// matches reports whether the ID is one of the set.
func (e expanded) matches(id spiffeid.ID) bool {
	if id.TrustDomain() != e.trustDomain {
		return false
	}
	segments := strings.Split(strings.TrimPrefix(id.Path(), "/"), "/")
	if len(segments) != len(e.segments) || segments[0] == reserved {
		return false
	}
	for n, want := range e.segments {
		if want != wildcard && segments[n] != want {
			return false
		}
	}
	return true
}

// String returns the set as a pattern without claims.
func (e expanded) String() string {
	return e.trustDomain.IDString() + "/" + strings.Join(e.segments, "/")
}

// claimPath names a claim: the names of objects in each other. It is spelled
// claims.NAME, or claims["NAME"] where the name has other characters than letters,
// digits and underscores.
type claimPath []string

func parseClaimPath(text string) (claimPath, error) {
	rest, ok := strings.CutPrefix(text, "claims")
	if !ok || rest == "" {
		return nil, fmt.Errorf("%q is not claims.NAME", text)
	}
	var path claimPath
	for rest != "" {
		var name string
		if quoted, ok := strings.CutPrefix(rest, `["`); ok {
			if name, rest, ok = strings.Cut(quoted, `"]`); !ok || name == "" || strings.ContainsAny(name, "\"\\") {
				return nil, fmt.Errorf("%q is not claims[\"NAME\"]", text)
			}
		} else if dotted, ok := strings.CutPrefix(rest, "."); ok {
			end := strings.IndexAny(dotted, ".[")
			if end < 0 {
				end = len(dotted)
			}
			name, rest = dotted[:end], dotted[end:]
			if !isName(name) {
				return nil, fmt.Errorf("%q is not claims.NAME", text)
			}
		} else {
			return nil, fmt.Errorf("%q is not claims.NAME", text)
		}
		if path = append(path, name); len(path) > maxDepth {
			return nil, fmt.Errorf("%q has more than %d names", text, maxDepth)
		}
	}
	return path, nil
}

func isName(s string) bool {
	for n, c := range []byte(s) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c == '_':
		case c >= '0' && c <= '9' && n > 0:
		default:
			return false
		}
	}
	return s != ""
}

// text returns the claim's value: a text that is not empty, or a whole number.
func (p claimPath) text(values map[string]any) (string, error) {
	var value any = values
	for _, name := range p {
		object, ok := value.(map[string]any)
		if !ok {
			return "", fmt.Errorf("the token has no %s", p)
		}
		if value, ok = object[name]; !ok {
			return "", fmt.Errorf("the token has no %s", p)
		}
	}
	switch value := value.(type) {
	case string:
		if value == "" {
			return "", fmt.Errorf("%s is empty", p)
		}
		return value, nil
	case int64:
		return strconv.FormatInt(value, 10), nil
	default:
		return "", fmt.Errorf("%s is neither a text nor a whole number", p)
	}
}

// String returns the path as it is spelled.
func (p claimPath) String() string {
	var b strings.Builder
	b.WriteString("claims")
	for _, name := range p {
		if isName(name) {
			b.WriteString("." + name)
		} else {
			b.WriteString(`["` + name + `"]`)
		}
	}
	return b.String()
}
