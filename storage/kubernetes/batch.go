package kubernetes

import (
	"errors"
	"fmt"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"

	"troth.dev/troth/storage"
	"troth.dev/troth/storage/kubernetes/internal/batch"
)

// A batch is a ConfigMap. Its data has one key, which names the form: lines of
// JSON under gzip, so that kubectl, base64 and gunzip show it. Its labels say
// between which times its issuances lie. The API server compares them, as whole
// numbers, and sends only the batches that a query can concern.
//
// ConfigMaps, because whoever may list Secrets reads all of the namespace, Events
// are forgotten after an hour, and a kind of our own would have to be installed
// first, into etcd all the same.
const (
	batchKey = "issuances.v1.jsonl.gz"

	issuedFirst  = "troth.dev/issued-first"    // milliseconds since 1970, as the next
	issuedLast   = "troth.dev/issued-last"     //
	expiresFirst = "troth.dev/not-after-first" // seconds since 1970, as the next
	expiresLast  = "troth.dev/not-after-last"  //
)

const (
	// maxBatch bounds a batch before compression, in bytes: no ConfigMap of ours is
	// larger than 257 KiB, a sixth of what etcd takes.
	maxBatch = batch.Max
	// maxOpen is when a batch is not added to any more, in bytes before
	// compression: 150 issuances, and a ConfigMap of 10 KiB. Adding to a batch
	// writes all of it again, 5 KiB on average: larger batches would mean fewer
	// objects, and more bytes written for each issuance.
	maxOpen = 64 << 10
)

// span is between which times the issuances of a batch lie.
type span struct {
	issuedFirst, issuedLast   int64 // milliseconds since 1970
	expiresFirst, expiresLast int64 // seconds since 1970
}

func spanOf(i storage.Issuance) span {
	issued, expires := i.IssuedAt.UnixMilli(), i.NotAfter.Unix()
	return span{issued, issued, expires, expires}
}

func (s span) join(other span) span {
	return span{
		min(s.issuedFirst, other.issuedFirst), max(s.issuedLast, other.issuedLast),
		min(s.expiresFirst, other.expiresFirst), max(s.expiresLast, other.expiresLast),
	}
}

func (s span) labels() labels.Set {
	return labels.Set{
		storeLabel:   ledgerStore,
		issuedFirst:  number(s.issuedFirst),
		issuedLast:   number(s.issuedLast),
		expiresFirst: number(s.expiresFirst),
		expiresLast:  number(s.expiresLast),
	}
}

// number returns n as a label's value, which cannot be negative: all before 1970
// is 1970. A selector that is made with it still finds at least what it has to.
func number(n int64) string { return strconv.FormatInt(max(n, 0), 10) }

// batchOf returns the lines as a batch. Its name, and what else identifies it, is
// the caller's.
func (s *Store) batchOf(name string, lines []byte, times span) (*corev1.ConfigMap, error) {
	data, err := s.compressor.Compress(lines)
	if err != nil {
		return nil, err
	}
	return &corev1.ConfigMap{
		ObjectMeta: s.objectMeta(name, times.labels()),
		BinaryData: map[string][]byte{batchKey: data},
	}, nil
}

// issuancesOf returns what a batch holds. The bytes are whoever's who may write
// ConfigMaps in the namespace: what is not what this package writes is an error.
func issuancesOf(o *corev1.ConfigMap) ([]storage.Issuance, error) {
	data, ok := o.BinaryData[batchKey]
	if !ok {
		return nil, fmt.Errorf("%w: ConfigMap %q has no %q: it is of another version of this program, or of another program", errUnreadable, o.Name, batchKey)
	}
	all, err := batch.Decode(data)
	if err != nil {
		return nil, fmt.Errorf("%w: ConfigMap %q: %w", errUnreadable, o.Name, err)
	}
	return all, nil
}

// errUnreadable says that a batch is not what this package writes.
var errUnreadable = errors.New("part of the ledger cannot be read")
