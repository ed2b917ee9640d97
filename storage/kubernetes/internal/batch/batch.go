// Package batch is how a batch of issuances is written: lines of JSON under gzip. It
// is a package of its own for its fuzz target, which would spend all its time on the
// counters of client-go.
package batch

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/storage"
)

// Max bounds a batch before compression, in bytes. Compression adds next to nothing
// to what it cannot make smaller. The longest line has 60 KiB.
const Max = 256 << 10

// line is an issuance in a batch.
type line struct {
	Serial      string `json:"serial"`
	ID          string `json:"id"`
	AuthorityID string `json:"authority"`
	NotBefore   int64  `json:"notBefore"` // seconds since 1970
	NotAfter    int64  `json:"notAfter"`  // seconds since 1970
	IssuedAt    int64  `json:"issuedAt"`  // milliseconds since 1970
	Caller      string `json:"caller"`
	Node        string `json:"node,omitempty"`
	PodUID      string `json:"podUID,omitempty"`
}

// Encode returns the issuance as a line, with its end. It refuses what would not be
// read back: lest one line makes its batch unreadable.
func Encode(i storage.Issuance) ([]byte, error) {
	l := line{
		Serial: i.Serial, ID: i.ID.String(), AuthorityID: i.AuthorityID,
		NotBefore: i.NotBefore.Unix(), NotAfter: i.NotAfter.Unix(), IssuedAt: i.IssuedAt.UnixMilli(),
		Caller: i.Caller, Node: i.Node, PodUID: i.PodUID,
	}
	if _, err := l.issuance(); err != nil {
		return nil, err
	}
	text, err := json.Marshal(l)
	if err != nil {
		return nil, fmt.Errorf("encode an issuance: %w", err)
	}
	return append(text, '\n'), nil
}

func (l line) issuance() (storage.Issuance, error) {
	id, err := spiffeid.FromString(l.ID)
	if err != nil {
		return storage.Issuance{}, err
	}
	i := storage.Issuance{
		Serial: l.Serial, ID: id, AuthorityID: l.AuthorityID,
		NotBefore: time.Unix(l.NotBefore, 0).UTC(), NotAfter: time.Unix(l.NotAfter, 0).UTC(), IssuedAt: time.UnixMilli(l.IssuedAt).UTC(),
		Caller: l.Caller, Node: l.Node, PodUID: l.PodUID,
	}
	// The end lost up to a second when it was cut to whole ones, and may lie before
	// the time of issue now.
	whole := i
	whole.NotAfter = whole.NotAfter.Add(time.Second)
	return i, whole.Check()
}

// Compressor compresses batches. The zero Compressor is ready to use, by many
// goroutines.
type Compressor struct {
	pool sync.Pool // of *gzip.Writer, whose tables take a millisecond to make
}

// Compress returns lines as they are stored.
func (c *Compressor) Compress(lines []byte) ([]byte, error) {
	var data bytes.Buffer
	z, ok := c.pool.Get().(*gzip.Writer)
	if !ok {
		// For a tenth more bytes than by default, half the time.
		z, _ = gzip.NewWriterLevel(nil, gzip.BestSpeed)
	}
	defer c.pool.Put(z)
	z.Reset(&data)
	if _, err := z.Write(lines); err != nil {
		return nil, fmt.Errorf("compress a batch: %w", err)
	}
	if err := z.Close(); err != nil {
		return nil, fmt.Errorf("compress a batch: %w", err)
	}
	return data.Bytes(), nil
}

// Decode returns what lines under gzip say. It takes no more than a small multiple of
// Max of memory, whatever data is, and returns an error unless Compress could have
// returned it for lines of Encode.
func Decode(data []byte) ([]storage.Issuance, error) {
	z, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	lines, err := io.ReadAll(io.LimitReader(z, Max+1))
	switch {
	case err != nil:
		return nil, err
	case len(lines) > Max:
		return nil, fmt.Errorf("it has more than %d bytes", Max)
	}
	var all []storage.Issuance
	decoder := json.NewDecoder(bytes.NewReader(lines))
	decoder.DisallowUnknownFields()
	for {
		var l line
		if err := decoder.Decode(&l); errors.Is(err, io.EOF) {
			return all, nil
		} else if err != nil {
			return nil, fmt.Errorf("issuance %d: %w", len(all), err)
		}
		i, err := l.issuance()
		if err != nil {
			return nil, fmt.Errorf("issuance %d: %w", len(all), err)
		}
		all = append(all, i)
	}
}
