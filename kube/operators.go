package kube

import (
	"context"
	"fmt"

	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"troth.dev/troth/identity"
)

// operatorsGroup is the API group of the resources that operators have rights on.
// No such API is served: the names stand in roles only.
const operatorsGroup = "troth.dev"

// Authorize returns the name of the user whose token raw is, if the API server
// accepts it for audience and its authorizers, ordinarily RBAC, let the user do verb
// to resource, of the API group troth.dev. It asks at each call: operators are few,
// and a right that was taken away is gone at once. It blocks for 6 seconds at most.
//
// The errors are [identity.ErrTokenRefused], [identity.ErrForbidden],
// [ErrUnavailable] and ctx's.
func Authorize(ctx context.Context, client kubernetes.Interface, raw, audience, verb, resource string) (user string, err error) {
	if err := reviewable(raw, audience); err != nil {
		return "", err
	}
	asking, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	status, err := reviewToken(asking, client, raw, audience)
	if err != nil {
		return "", fmt.Errorf("review an operator's token: %w", err)
	}
	by, err := acceptedUser(status, audience)
	if err == nil && by.Username == "" {
		err = fmt.Errorf("%w: it is nobody's", identity.ErrTokenRefused)
	}
	if err != nil {
		return "", fmt.Errorf("review an operator's token: %w", err)
	}

	extra := make(map[string]authorizationv1.ExtraValue, len(by.Extra))
	for key, values := range by.Extra {
		extra[key] = authorizationv1.ExtraValue(values)
	}
	asking, cancel = context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	answer, err := client.AuthorizationV1().SubjectAccessReviews().Create(asking, &authorizationv1.SubjectAccessReview{
		Spec: authorizationv1.SubjectAccessReviewSpec{
			User: by.Username, UID: by.UID, Groups: by.Groups, Extra: extra,
			ResourceAttributes: &authorizationv1.ResourceAttributes{Group: operatorsGroup, Resource: resource, Verb: verb},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return "", fmt.Errorf("ask what %q may do: %w", by.Username, unavailable(err))
	}
	if !answer.Status.Allowed || answer.Status.Denied {
		return "", fmt.Errorf("%w: %q may not %s %s.%s", identity.ErrForbidden, by.Username, verb, resource, operatorsGroup)
	}
	return by.Username, nil
}
