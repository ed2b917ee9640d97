package token

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4/json"
	"github.com/go-jose/go-jose/v4/jwt"

	"troth.dev/troth/identity"
)

// Claims is what a verified token says. The zero Claims match no pod.
type Claims struct {
	Issuer   string
	Subject  string // system:serviceaccount:NAMESPACE:NAME
	Audience string // the only one
	ID       string // "jti"; may be empty

	IssuedAt  time.Time // in whole seconds, as are the others
	NotBefore time.Time
	Expiry    time.Time

	ServiceAccount    identity.ServiceAccount
	ServiceAccountUID string
	Pod               identity.PodReference
	// Node is where the pod was when the token was made. It is zero if the pod
	// was not scheduled yet, and without a UID if the node had no record.
	Node identity.Node
}

// Matches returns nil if the API server's record of the pod bears the claims
// out at the time now, and an [*Error] if it does not. The record changes under
// a token that stays good: ask on every use, whether Verify has seen the token
// before or not.
//
// A service account or node that the token names by UID and that has no record
// now was replaced, as far as anybody can tell, and is refused.
func (c Claims) Matches(p identity.Pod, now time.Time) error {
	if c.Pod.UID == "" || p.PodReference != c.Pod {
		return &Error{Reason: PodReplaced, Err: fmt.Errorf("%w: the token is for %q", identity.ErrPodReplaced, c.Pod)}
	}
	if err := p.Live(now); err != nil {
		reason := PodFinished
		if errors.Is(err, identity.ErrPodDeleted) {
			reason = PodDeleted
		}
		return &Error{Reason: reason, Err: err}
	}
	if p.Account() != c.ServiceAccount {
		return refuse(ServiceAccountMismatch, "the token is for service account %q, and the pod runs as %q", c.ServiceAccount, p.Account())
	}
	if c.ServiceAccountUID == "" || p.ServiceAccountUID != c.ServiceAccountUID {
		return refuse(ServiceAccountReplaced, "service account %q has UID %q now, and the token is for %q", c.ServiceAccount, p.ServiceAccountUID, c.ServiceAccountUID)
	}
	if c.Node == (identity.Node{}) {
		return nil
	}
	if p.Node.Name != c.Node.Name {
		return refuse(NodeMismatch, "the token is for node %q, and the pod is on %q", c.Node.Name, p.Node.Name)
	}
	if c.Node.UID != "" && p.Node.UID != c.Node.UID {
		return refuse(NodeReplaced, "node %q has UID %q now, and the token is for %q", c.Node.Name, p.Node.UID, c.Node.UID)
	}
	return nil
}

// payload is a token's claims set as it is spelled. Times are whole numbers of
// seconds, as API servers write them: RFC 7519 §2 would allow fractions and
// exponents too, and the decoder refuses them.
type payload struct {
	Issuer     string       `json:"iss"`
	Subject    string       `json:"sub"`
	Audience   jwt.Audience `json:"aud"`
	ID         string       `json:"jti"`
	IssuedAt   int64        `json:"iat"`
	NotBefore  int64        `json:"nbf"`
	Expiry     int64        `json:"exp"`
	Kubernetes struct {
		Namespace      string `json:"namespace"`
		ServiceAccount object `json:"serviceaccount"`
		Pod            object `json:"pod"`
		Node           object `json:"node"`
	} `json:"kubernetes.io"`
}

type object struct {
	Name string `json:"name"`
	UID  string `json:"uid"`
}

// check reads the payload of a token whose signature holds.
func (v *Verifier) check(encoded string, now time.Time) (Claims, error) {
	decoded, err := decodePart(encoded)
	if err != nil {
		return Claims{}, refuse(Malformed, "payload: %w", err)
	}
	var p payload
	if err := json.Unmarshal(decoded, &p); err != nil {
		return Claims{}, refuse(Malformed, "payload: %w", err)
	}
	k := p.Kubernetes

	if !slices.Contains(v.issuers, p.Issuer) {
		return Claims{}, refuse(WrongIssuer, "issuer %q is not one of %q", p.Issuer, v.issuers)
	}
	// Whoever else a token is made for could present it here: the API server
	// and every service that got it from the pod.
	if len(p.Audience) != 1 || p.Audience[0] != v.audience {
		return Claims{}, refuse(WrongAudience, "audiences %q are not %q alone", []string(p.Audience), v.audience)
	}
	for _, seconds := range []int64{p.IssuedAt, p.NotBefore, p.Expiry} {
		if seconds <= 0 || seconds > maxTime {
			return Claims{}, refuse(Malformed, "iat, nbf or exp is missing or no time")
		}
	}
	c := Claims{
		Issuer:            p.Issuer,
		Subject:           p.Subject,
		Audience:          p.Audience[0],
		ID:                p.ID,
		IssuedAt:          time.Unix(p.IssuedAt, 0),
		NotBefore:         time.Unix(p.NotBefore, 0),
		Expiry:            time.Unix(p.Expiry, 0),
		ServiceAccount:    identity.ServiceAccount{Namespace: k.Namespace, Name: k.ServiceAccount.Name},
		ServiceAccountUID: k.ServiceAccount.UID,
		Pod:               identity.PodReference{Namespace: k.Namespace, Name: k.Pod.Name, UID: k.Pod.UID},
		Node:              identity.Node{Name: k.Node.Name, UID: k.Node.UID},
	}
	if err := v.inForce(c, now); err != nil {
		return Claims{}, err
	}
	if life := c.Expiry.Sub(c.IssuedAt); life <= 0 || life > v.maxLifetime {
		return Claims{}, refuse(LifetimeTooLong, "a life of %v is not within %v; project a token for this audience instead of the automounted one", life, v.maxLifetime)
	}
	if c.Pod.Name == "" || c.Pod.UID == "" {
		return Claims{}, refuse(NoPod, "not bound to a pod")
	}
	if parsed, err := identity.ParseServiceAccountName(c.ServiceAccount.String()); err != nil || parsed != c.ServiceAccount {
		return Claims{}, refuse(WrongSubject, "%q is no service account", c.ServiceAccount)
	}
	if c.ServiceAccountUID == "" {
		return Claims{}, refuse(WrongSubject, "service account %q without a UID", c.ServiceAccount)
	}
	if want := "system:serviceaccount:" + c.ServiceAccount.Namespace + ":" + c.ServiceAccount.Name; c.Subject != want {
		return Claims{}, refuse(WrongSubject, "subject %q is not %q", c.Subject, want)
	}
	return c, nil
}

// inForce holds the claims against the clock.
func (v *Verifier) inForce(c Claims, now time.Time) error {
	if !now.Before(c.Expiry.Add(v.leeway)) {
		return refuse(Expired, "expired at %v", c.Expiry.UTC())
	}
	start := c.NotBefore
	if c.IssuedAt.After(start) {
		start = c.IssuedAt
	}
	if wait := start.Add(-v.leeway).Sub(now); wait > 0 {
		return &Error{Reason: NotYetValid, RetryAfter: wait, Err: fmt.Errorf("not valid before %v", start.UTC())}
	}
	return nil
}

// maxTime is the end of the year 9999 in Unix seconds: the last that RFC 3339,
// and so a Kubernetes object, can name.
const maxTime = 253402300799
