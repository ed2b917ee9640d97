package kube

import (
	"context"
	"errors"
	"fmt"
	"slices"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// ErrForbidden says that the cluster's RBAC does not give a user a right.
var ErrForbidden = errors.New("the API server does not allow it")

// operatorsGroup is the API group of the resources that operators have rights on.
// No such API is served: the names stand in roles only.
const operatorsGroup = "troth.dev"

// Authorize returns the name of the user whose token raw is, if the API server
// accepts it for audience and its authorizers, ordinarily RBAC, let the user do verb
// to resource, of the API group troth.dev. It asks at each call: operators are few,
// and a right that was taken away is gone at once. It blocks for 6 seconds at most.
//
// The errors are [ErrTokenRefused], [ErrForbidden], [ErrUnavailable] and ctx's.
func Authorize(ctx context.Context, client kubernetes.Interface, raw, audience, verb, resource string) (user string, err error) {
	if raw == "" || len(raw) > maxToken || audience == "" {
		return "", fmt.Errorf("review a token of %d bytes for audience %q: %w", len(raw), audience, ErrTokenRefused)
	}
	asking, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	reviewed, err := client.AuthenticationV1().TokenReviews().Create(asking, &authenticationv1.TokenReview{
		Spec: authenticationv1.TokenReviewSpec{Token: raw, Audiences: []string{audience}},
	}, metav1.CreateOptions{})
	if err != nil {
		return "", fmt.Errorf("review an operator's token: %w", unavailable(err))
	}
	status := reviewed.Status
	if !status.Authenticated || !slices.Contains(status.Audiences, audience) || status.User.Username == "" {
		return "", fmt.Errorf("review an operator's token: %w: %s", ErrTokenRefused, status.Error)
	}

	extra := make(map[string]authorizationv1.ExtraValue, len(status.User.Extra))
	for key, values := range status.User.Extra {
		extra[key] = authorizationv1.ExtraValue(values)
	}
	asking, cancel = context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	answer, err := client.AuthorizationV1().SubjectAccessReviews().Create(asking, &authorizationv1.SubjectAccessReview{
		Spec: authorizationv1.SubjectAccessReviewSpec{
			User: status.User.Username, UID: status.User.UID, Groups: status.User.Groups, Extra: extra,
			ResourceAttributes: &authorizationv1.ResourceAttributes{Group: operatorsGroup, Resource: resource, Verb: verb},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return "", fmt.Errorf("ask what %q may do: %w", status.User.Username, unavailable(err))
	}
	if !answer.Status.Allowed || answer.Status.Denied {
		return "", fmt.Errorf("%w: %q may not %s %s.%s", ErrForbidden, status.User.Username, verb, resource, operatorsGroup)
	}
	return status.User.Username, nil
}
