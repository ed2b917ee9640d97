package kubernetes

import (
	"cmp"
	"context"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
)

// resource writes objects of one kind so that each request is sent once.
//
// The typed clients send a write again when the API server answers that it had
// trouble and names a time to retry after, although it may have done what it was
// asked. The second request then finds its own work and fails with a conflict,
// which must mean that nothing was changed.
type resource struct {
	rest            rest.Interface
	namespace, name string
}

func (r resource) create(ctx context.Context, object, result runtime.Object) error {
	return r.send(ctx, r.rest.Post, "", object, result)
}

// update replaces the object of that name, UID and resource version.
func (r resource) update(ctx context.Context, name string, object, result runtime.Object) error {
	return r.send(ctx, r.rest.Put, name, object, result)
}

// delete deletes the object that has metadata's name, UID and resource version.
func (r resource) delete(ctx context.Context, meta metav1.ObjectMeta) error {
	return r.send(ctx, r.rest.Delete, meta.Name, &metav1.DeleteOptions{
		Preconditions: &metav1.Preconditions{UID: new(meta.UID), ResourceVersion: new(meta.ResourceVersion)},
	}, nil)
}

// send sends one request, and again only while the API server says that there are
// too many, which it does before it looks at any.
func (r resource) send(ctx context.Context, verb func() *rest.Request, name string, body, result runtime.Object) error {
	for {
		request := verb().Namespace(r.namespace).Resource(r.name).MaxRetries(0).Body(body)
		if name != "" {
			request.Name(name)
		}
		answer := request.Do(ctx)
		err := answer.Error()
		switch {
		case err == nil && result != nil:
			return answer.Into(result)
		case !apierrors.IsTooManyRequests(err):
			return err
		}
		seconds, _ := apierrors.SuggestsClientDelay(err)
		if !pause(ctx, time.Duration(cmp.Or(seconds, 1))*time.Second) {
			return ctx.Err()
		}
	}
}
