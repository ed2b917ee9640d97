package mint

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4/json"
)

// MaxClaims is the largest set of claims that is looked at, in bytes of JSON.
const MaxClaims = 32 << 10

// The bounds of claims. What a condition may cost is reckoned with them, so that they
// have to hold for every token.
const (
	maxDepth   = 8    // of objects and arrays in each other
	maxMembers = 256  // of one object or array; GitLab names up to 200 groups
	maxString  = 2048 // bytes
)

// maxTime is the end of the year 9999 in Unix seconds.
const maxTime = 253402300799

// Claims is what a token says. The zero Claims match no rule.
type Claims struct {
	Issuer   string
	Subject  string
	Audience []string
	ID       string // "jti"; may be empty

	// IssuedAt, NotBefore and Expiry are in whole seconds. NotBefore is IssuedAt if
	// the token has none; then the others are zero if the token lacks them.
	IssuedAt, NotBefore, Expiry time.Time

	values map[string]any // all of them, as conditions see them
}

// ParseClaims reads a JSON object of claims. It refuses one that is larger or deeper
// than the bounds, that names a member twice, or whose text is not UTF-8. What a token
// has to have, it does not ask for.
func ParseClaims(data []byte) (Claims, error) {
	if len(data) > MaxClaims {
		return Claims{}, fmt.Errorf("mint: claims of %d bytes, more than %d", len(data), MaxClaims)
	}
	if !utf8.Valid(data) {
		return Claims{}, errors.New("mint: claims that are not UTF-8")
	}
	// Before the decoder, which calls itself for each level.
	if depth(data) > maxDepth {
		return Claims{}, fmt.Errorf("mint: claims with more than %d levels", maxDepth)
	}
	// go-jose's decoder refuses a member given twice: no two readers of one token may
	// see two things.
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.SetNumberType(json.UnmarshalJSONNumber)
	var values map[string]any
	if err := decoder.Decode(&values); err != nil {
		return Claims{}, fmt.Errorf("mint: claims: %w", err)
	}
	var more any
	if err := decoder.Decode(&more); !errors.Is(err, io.EOF) {
		return Claims{}, errors.New("mint: claims: something follows the object")
	}
	if values == nil {
		return Claims{}, errors.New("mint: claims: not an object")
	}
	if _, err := withinBounds(values); err != nil {
		return Claims{}, fmt.Errorf("mint: claims: %w", err)
	}
	return newClaims(values)
}

// depth returns how deep the brackets of a JSON text go. Of what is no JSON it may say
// too much.
func depth(data []byte) int {
	deepest, now, quoted := 0, 0, false
	for n := 0; n < len(data); n++ {
		switch c := data[n]; {
		case quoted && c == '\\':
			n++
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '{' || c == '[':
			now++
			deepest = max(deepest, now)
		case c == '}' || c == ']':
			now--
		}
	}
	return deepest
}

// withinBounds checks a value and returns it with its numbers as conditions see them: it
// changes the containers that it is given.
func withinBounds(value any) (any, error) {
	switch value := value.(type) {
	case nil, bool:
		return value, nil
	case string:
		return value, checkText(value)
	case json.Number:
		if n, err := value.Int64(); err == nil {
			return n, nil
		}
		f, err := value.Float64()
		if err != nil || math.IsInf(f, 0) {
			return nil, fmt.Errorf("number %.40q is out of range", value)
		}
		return f, nil
	case []any:
		if len(value) > maxMembers {
			return nil, fmt.Errorf("an array of more than %d", maxMembers)
		}
		for n, member := range value {
			var err error
			if value[n], err = withinBounds(member); err != nil {
				return nil, err
			}
		}
		return value, nil
	case map[string]any:
		if len(value) > maxMembers {
			return nil, fmt.Errorf("an object of more than %d members", maxMembers)
		}
		for name, member := range value {
			if err := checkText(name); err != nil {
				return nil, err
			}
			var err error
			if value[name], err = withinBounds(member); err != nil {
				return nil, fmt.Errorf("%.40q: %w", name, err)
			}
		}
		return value, nil
	default:
		return nil, fmt.Errorf("a %T", value)
	}
}

func checkText(s string) error {
	if len(s) > maxString {
		return fmt.Errorf("a text of more than %d bytes", maxString)
	}
	// The decoder writes this rune in the place of half a surrogate pair: two texts
	// would become one.
	if strings.ContainsRune(s, utf8.RuneError) {
		return errors.New("a text with U+FFFD")
	}
	return nil
}

// newClaims takes out what every rule looks at.
func newClaims(values map[string]any) (Claims, error) {
	c := Claims{values: values}
	for name, into := range map[string]*string{"iss": &c.Issuer, "sub": &c.Subject, "jti": &c.ID} {
		value, there := values[name]
		text, ok := value.(string)
		if there && !ok {
			return Claims{}, fmt.Errorf("mint: claims: %q is no text", name)
		}
		*into = text
	}
	switch audience := values["aud"].(type) {
	case nil:
	case string:
		c.Audience = []string{audience}
	case []any:
		for _, one := range audience {
			text, ok := one.(string)
			if !ok {
				return Claims{}, errors.New(`mint: claims: "aud" has what is no text`)
			}
			c.Audience = append(c.Audience, text)
		}
	default:
		return Claims{}, errors.New(`mint: claims: "aud" is no text and no array`)
	}
	for name, into := range map[string]*time.Time{"iat": &c.IssuedAt, "nbf": &c.NotBefore, "exp": &c.Expiry} {
		switch value := values[name].(type) {
		case nil:
		case int64:
			if value <= 0 || value > maxTime {
				return Claims{}, fmt.Errorf("mint: claims: %q is no time", name)
			}
			*into = time.Unix(value, 0)
		default:
			return Claims{}, fmt.Errorf("mint: claims: %q is no whole number of seconds", name)
		}
	}
	if c.NotBefore.IsZero() {
		c.NotBefore = c.IssuedAt
	}
	return c, nil
}
