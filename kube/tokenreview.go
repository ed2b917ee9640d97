package kube

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/time/rate"
	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"troth.dev/troth/identity"
)

const (
	// reviewLife is how long an accepted token stays accepted. The API server
	// itself remembers for as long.
	reviewLife = 10 * time.Second
	// maxToken is the longest token that is sent to the API server, in bytes.
	maxToken = 16 << 10
)

// TokenReviewerConfig is what [NewTokenReviewer] needs.
type TokenReviewerConfig struct {
	// Client is required.
	Client kubernetes.Interface
	// Rate is how many reviews may be asked for in a second, on average, with
	// bursts of as many. 0 means 100: a core of an API server does about 600.
	Rate float64
	// CacheSize is how many accepted tokens are remembered. 0 means 4,096.
	CacheSize int
}

// TokenReviewer asks the API server whether it accepts a token. That is for
// those who want its word each time: everything that it looks at, package token
// and [Pods] look at too, sooner and without a request.
type TokenReviewer struct {
	client   kubernetes.Interface
	rate     *rate.Limiter
	accepted *lru.Cache[reviewKey, acceptance]
	shared   shared[reviewKey, Review]
}

// Review is whose token the API server says that it is.
type Review struct {
	ServiceAccount    identity.ServiceAccount
	ServiceAccountUID string
	Pod               identity.PodReference
	Node              identity.Node // zero if the pod was not scheduled when it got the token
}

// reviewKey stands for a token and an audience: no token is kept.
type reviewKey [sha256.Size]byte

type acceptance struct {
	review Review
	until  time.Time
}

// NewTokenReviewer checks config.
func NewTokenReviewer(config TokenReviewerConfig) (*TokenReviewer, error) {
	switch {
	case config.Client == nil:
		return nil, errors.New("kube: no client")
	case config.Rate < 0:
		return nil, fmt.Errorf("kube: review rate of %v", config.Rate)
	case config.CacheSize < 0:
		return nil, fmt.Errorf("kube: review cache size of %d", config.CacheSize)
	}
	if config.Rate == 0 {
		config.Rate = 100
	}
	if config.CacheSize == 0 {
		config.CacheSize = 4096
	}
	// Not golang-lru's expirable cache: it starts a goroutine that nothing ends.
	accepted, err := lru.New[reviewKey, acceptance](config.CacheSize)
	if err != nil {
		return nil, fmt.Errorf("kube: make the review cache: %w", err)
	}
	return &TokenReviewer{
		client:   config.Client,
		rate:     rate.NewLimiter(rate.Limit(config.Rate), max(1, int(config.Rate))),
		accepted: accepted,
	}, nil
}

// Review returns whose token raw is, if the API server accepts it for audience.
// One request is shared by all who ask for the same at the same time, and an
// acceptance holds for 10 seconds. It blocks for 3 seconds at most.
//
// The errors are [identity.ErrTokenRefused], [ErrUnavailable] and ctx's. None of them is
// remembered: the API server may refuse a token only because it has not seen the
// pod yet.
func (r *TokenReviewer) Review(ctx context.Context, raw, audience string) (Review, error) {
	if err := reviewable(raw, audience); err != nil {
		return Review{}, err
	}
	key := reviewKey(sha256.Sum256(fmt.Appendf(nil, "%d %s%s", len(audience), audience, raw)))
	if known, ok := r.accepted.Get(key); ok && time.Now().Before(known.until) {
		return known.review, nil
	}
	review, err := r.shared.do(ctx, key, func(ctx context.Context) (Review, error) {
		review, err := r.ask(ctx, raw, audience)
		if err == nil {
			r.accepted.Add(key, acceptance{review: review, until: time.Now().Add(reviewLife)})
		}
		return review, err
	})
	if err != nil {
		return Review{}, fmt.Errorf("review a token: %w", err)
	}
	return review, nil
}

func (r *TokenReviewer) ask(ctx context.Context, raw, audience string) (Review, error) {
	if !r.rate.Allow() {
		return Review{}, fmt.Errorf("more than %v reviews in a second: %w", r.rate.Limit(), ErrUnavailable)
	}
	status, err := reviewToken(ctx, r.client, raw, audience)
	if err != nil {
		return Review{}, err
	}
	return readReview(status, audience)
}

// reviewable refuses what is not sent to the API server.
func reviewable(raw, audience string) error {
	if raw == "" || len(raw) > maxToken {
		return fmt.Errorf("review a token of %d bytes: %w", len(raw), identity.ErrTokenRefused)
	}
	if audience == "" {
		// To the API server, no audience is its own.
		return fmt.Errorf("review a token for no audience: %w", identity.ErrTokenRefused)
	}
	return nil
}

// reviewToken asks the API server about a token. What it answers by an error is
// about us and our request, such as our own rights: about the token it says
// nothing.
func reviewToken(ctx context.Context, client kubernetes.Interface, raw, audience string) (authenticationv1.TokenReviewStatus, error) {
	reviewed, err := client.AuthenticationV1().TokenReviews().Create(ctx, &authenticationv1.TokenReview{
		Spec: authenticationv1.TokenReviewSpec{Token: raw, Audiences: []string{audience}},
	}, metav1.CreateOptions{})
	if err != nil {
		return authenticationv1.TokenReviewStatus{}, unavailable(err)
	}
	return reviewed.Status, nil
}

// acceptedUser returns whose token was reviewed. The API server may have accepted
// it by any of its authenticators, and one that knows no audiences accepts it for
// all and names none, or those of the API server.
func acceptedUser(status authenticationv1.TokenReviewStatus, audience string) (authenticationv1.UserInfo, error) {
	if !status.Authenticated {
		return authenticationv1.UserInfo{}, fmt.Errorf("%w: %s", identity.ErrTokenRefused, status.Error)
	}
	if !slices.Contains(status.Audiences, audience) {
		return authenticationv1.UserInfo{}, fmt.Errorf("%w: it is for %q", identity.ErrTokenRefused, status.Audiences)
	}
	return status.User, nil
}

// readReview reads the API server's answer about the token of a pod.
func readReview(status authenticationv1.TokenReviewStatus, audience string) (Review, error) {
	user, err := acceptedUser(status, audience)
	if err != nil {
		return Review{}, err
	}
	name, ok := strings.CutPrefix(user.Username, "system:serviceaccount:")
	namespace, name, both := strings.Cut(name, ":")
	if !ok || !both || user.UID == "" {
		return Review{}, fmt.Errorf("%w: %q is not a service account", identity.ErrTokenRefused, user.Username)
	}
	extra := func(key string) string {
		if values := user.Extra["authentication.kubernetes.io/"+key]; len(values) == 1 {
			return values[0]
		}
		return ""
	}
	review := Review{
		ServiceAccount:    identity.ServiceAccount{Namespace: namespace, Name: name},
		ServiceAccountUID: user.UID,
		Pod:               identity.PodReference{Namespace: namespace, Name: extra("pod-name"), UID: extra("pod-uid")},
		Node:              identity.Node{Name: extra("node-name"), UID: extra("node-uid")},
	}
	// The API server's own tokens have these. An authenticator that reads claims
	// of other issuers may yield any user name, but no key of kubernetes.io.
	if review.Pod.Name == "" || review.Pod.UID == "" || extra("credential-id") == "" {
		return Review{}, fmt.Errorf("%w: it is not bound to a pod", identity.ErrTokenRefused)
	}
	return review, nil
}
