package kubernetes

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"troth.dev/troth/storage"
)

const (
	fleetPrefix = "troth-fleet-"
	summaryKey  = "summary"
	// fleetPage is how many summaries are read at a time: 8 MiB at most.
	fleetPage = 16
)

// Publish implements [storage.FleetStore].
func (s *Store) Publish(ctx context.Context, replica string, data []byte) error {
	if len(data) > storage.MaxDocument {
		return storage.ErrDocumentSize
	}
	return s.changeSummary(ctx, replica, func(ctx context.Context, current *corev1.ConfigMap) error {
		next := &corev1.ConfigMap{
			ObjectMeta: s.objectMeta(fleetPrefix+replica, labels.Set{storeLabel: fleetStore}),
			BinaryData: map[string][]byte{summaryKey: append([]byte{}, data...)},
		}
		if current == nil {
			return s.configMaps.create(ctx, next, nil)
		}
		next.UID, next.ResourceVersion = current.UID, current.ResourceVersion
		return s.configMaps.update(ctx, next.Name, next, nil)
	})
}

// Withdraw implements [storage.FleetStore].
func (s *Store) Withdraw(ctx context.Context, replica string) error {
	return s.changeSummary(ctx, replica, func(ctx context.Context, current *corev1.ConfigMap) error {
		if current == nil {
			return nil
		}
		return s.configMaps.delete(ctx, current.ObjectMeta)
	})
}

// changeSummary lets change change the ConfigMap of a replica, nil if there is
// none. It compares and swaps, although a replica is the only one to write its
// summary: a request that was given up and arrives late must not replace what was
// published since.
func (s *Store) changeSummary(ctx context.Context, replica string, change func(context.Context, *corev1.ConfigMap) error) error {
	if err := cmp.Or(storage.CheckReplica(replica), ctx.Err()); err != nil {
		return err
	}
	ctx, leave, err := s.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	for {
		current, err := s.core.ConfigMaps(s.namespace).Get(ctx, fleetPrefix+replica, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			current, err = nil, nil
		case err == nil && current.Labels[storeLabel] != fleetStore:
			err = fmt.Errorf("it has no label %s=%s: it is another program's", storeLabel, fleetStore)
		}
		if err == nil {
			err = change(ctx, current)
			if apierrors.IsAlreadyExists(err) || apierrors.IsConflict(err) || apierrors.IsNotFound(err) && current != nil {
				if ctx.Err() == nil {
					continue
				}
			}
		}
		if err != nil {
			return ended(ctx, fmt.Errorf("kubernetes: the summary of replica %q: %w", replica, err))
		}
		return nil
	}
}

// Summaries implements [storage.FleetStore].
func (s *Store) Summaries(ctx context.Context) ([]storage.Summary, error) {
	ctx, leave, err := s.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer leave()
	var all []storage.Summary
	_, err = s.list(ctx, storeLabel+"="+fleetStore, fleetPage, func() { all = nil }, func(o *corev1.ConfigMap) error {
		replica, ok := strings.CutPrefix(o.Name, fleetPrefix)
		data, has := o.BinaryData[summaryKey]
		if !ok || !has || storage.CheckReplica(replica) != nil {
			return fmt.Errorf("ConfigMap %q is labelled as a replica's summary and is none: delete it", o.Name)
		}
		all = append(all, storage.Summary{Replica: replica, Data: bytes.Clone(data)})
		return nil
	})
	if err != nil {
		return nil, ended(ctx, fmt.Errorf("kubernetes: read the summaries: %w", err))
	}
	slices.SortFunc(all, func(a, b storage.Summary) int { return strings.Compare(a.Replica, b.Replica) })
	return all, nil
}
