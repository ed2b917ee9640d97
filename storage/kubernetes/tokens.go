package kubernetes

import (
	"context"
	"encoding/hex"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"troth.dev/troth/storage"
)

const (
	tokenPrefix = "troth-spent-"
	// spentUntil is the label that says when the token of a ConfigMap has expired.
	spentUntil = "troth.dev/spent-until"
	// tokenPage is how many of them are read at a time: some 200 KiB.
	tokenPage = 500
)

// Spend implements [storage.TokenStore]. The name of the object is the token's, and
// etcd takes a name once: a crash before the API server has written leaves the token
// unspent, a crash after it spent.
func (s *Store) Spend(ctx context.Context, issuer, id string, until time.Time) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	ctx, leave, err := s.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	key := storage.TokenKey(issuer, id)
	err = s.configMaps.create(ctx, &corev1.ConfigMap{
		ObjectMeta: s.objectMeta(tokenPrefix+hex.EncodeToString(key[:]), labels.Set{
			storeLabel: tokenStore, spentUntil: number(until.UnixMilli()),
		}),
	}, nil)
	if apierrors.IsAlreadyExists(err) {
		return storage.ErrSpent
	}
	if err != nil {
		return ended(ctx, fmt.Errorf("kubernetes: spend a token: %w", err))
	}
	return nil
}

// PruneSpent implements [storage.TokenStore]. What another replica removes at the same
// time, one of both counts.
func (s *Store) PruneSpent(ctx context.Context, before time.Time) (int, error) {
	ctx, leave, err := s.enter(ctx)
	if err != nil {
		return 0, err
	}
	defer leave()
	pruned := 0
	only := storeLabel + "=" + tokenStore + "," + spentUntil + "<" + number(before.UnixMilli())
	// The metadata is all there is, and is of this moment: no write of another's can
	// be lost, for nobody changes such an object.
	_, err = s.list(ctx, only, tokenPage, func() {}, func(o *corev1.ConfigMap) error {
		err := s.configMaps.delete(ctx, metav1.ObjectMeta{Name: o.Name, UID: o.UID, ResourceVersion: o.ResourceVersion})
		switch {
		case err == nil:
			pruned++
		case !apierrors.IsNotFound(err) && !apierrors.IsConflict(err):
			return err
		}
		return nil
	})
	if err != nil {
		return pruned, ended(ctx, fmt.Errorf("kubernetes: prune spent tokens: %w", err))
	}
	return pruned, nil
}
