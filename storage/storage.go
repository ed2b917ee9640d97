// Package storage is the certificate authority's durable memory: the contracts
// that every store keeps, and [Memory], the reference that says in the fewest
// lines what they mean.
//
// There are four contracts because there are four needs. [AuthorityStore] holds
// one small document that replicas agree on by compare-and-swap. [Ledger] holds
// what was issued, grows with every certificate, and is never contended.
// [FleetStore] holds what each replica has heard of the agents, is replaced all
// the time, and can be lost. [TokenStore] holds which tokens were spent, for as long
// as they could be presented again. A store that implements all need not make them
// consistent with each other.
//
// The stores keep a second document too, of the trust domain for tests: their method
// Tests returns it. Nothing else is apart: a ledger tells trust domains by the SPIFFE
// ID, and what was spent is spent whoever asks.
//
// Package storagetest has the conformance suite that all stores pass.
package storage

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// ErrConflict says that somebody else replaced the document first. Load, decide
// again, and swap again.
var ErrConflict = errors.New("storage: the document was changed meanwhile")

// ErrDuplicateSerial says that a serial number is in the ledger already. With
// 120 random bits that is a broken random source, not chance.
var ErrDuplicateSerial = errors.New("storage: the serial number was issued before")

// ErrClosed says that the store was closed.
var ErrClosed = errors.New("storage: closed")

// MaxDocument is the largest document a store has to take, in bytes: what fits
// into a Kubernetes Secret with room to spare.
const MaxDocument = 512 << 10

// Document is one version of a stored document.
type Document struct {
	// Version names this version to Swap and Watch. It is opaque and empty for
	// the document that was never stored.
	Version string
	// Data belongs to the caller.
	Data []byte
}

// AuthorityStore holds one document.
//
// Consistency: Swaps are totally ordered, and a Load that begins after a Swap
// has returned sees that Swap's document or a later one, from every replica.
//
// Durability: when Swap returns nil, the document survives a crash of process
// and machine. When Swap returns any error but ErrConflict or ErrDocumentSize,
// the document may or may not have been replaced: Load tells.
//
// Concurrency: every method may be called from many goroutines.
type AuthorityStore interface {
	// Load returns the current document, or the zero Document if there is none. One
	// that begins after another has returned never returns an earlier document.
	Load(ctx context.Context) (Document, error)

	// Swap replaces the document whose version is old by data and returns the
	// new document. The empty version stands for the document that was never
	// stored. Swap returns ErrConflict, and changes nothing, if the current
	// version is another one, and ErrDocumentSize if data is larger than
	// MaxDocument. No version is ever used twice.
	Swap(ctx context.Context, old string, data []byte) (Document, error)

	// Watch blocks until the current version is another than seen, and returns
	// that document, or until ctx ends, and returns its error. It may skip
	// versions.
	Watch(ctx context.Context, seen string) (Document, error)
}

// ErrDocumentSize says that a document is larger than MaxDocument.
var ErrDocumentSize = errors.New("storage: the document is too large")

// Issuance is the record of one issued certificate. Times come back in UTC, with
// what is finer than their resolution cut off.
type Issuance struct {
	Serial      string      // lower-case hexadecimal, without leading zeros; unique
	ID          spiffeid.ID // the SPIFFE ID in the certificate
	AuthorityID string      // who signed it
	NotBefore   time.Time   // in whole seconds
	NotAfter    time.Time   // in whole seconds
	IssuedAt    time.Time   // in whole milliseconds
	Caller      string      // who asked: a SPIFFE ID, or the kind of caller
	Node        string      // the node that the identity is for; may be empty
	PodUID      string      // the pod that the identity is for; may be empty
}

// maxText bounds each text of an Issuance, in bytes: the length that every
// SPIFFE implementation has to take for an ID (SPIFFE-ID §2.3).
const maxText = 2048

// Check returns nil if a ledger may record i, and what is wrong with it if not:
// only Node and PodUID may be empty, and a serial number is positive and has at
// most 20 octets (RFC 5280 §4.1.2.2). Every Ledger refuses what Check refuses, so
// that a row, once there, means the same in each of them.
func (i Issuance) Check() error {
	switch {
	case !isSerial(i.Serial):
		return fmt.Errorf("storage: serial number %q is not lower-case hexadecimal without leading zeros, of 1 to 40 digits", i.Serial)
	case i.ID.IsZero():
		return errors.New("storage: the issuance has no SPIFFE ID")
	case i.AuthorityID == "":
		return errors.New("storage: the issuance names no authority")
	case i.Caller == "":
		return errors.New("storage: the issuance names no caller")
	case i.NotBefore.IsZero(), i.NotAfter.IsZero(), i.IssuedAt.IsZero():
		return errors.New("storage: the issuance lacks a time")
	case i.NotAfter.Before(i.NotBefore):
		return fmt.Errorf("storage: the issuance ends at %s, before it begins at %s", i.NotAfter, i.NotBefore)
	case i.NotAfter.Before(i.IssuedAt):
		return fmt.Errorf("storage: the issuance ends at %s, before it was made at %s", i.NotAfter, i.IssuedAt)
	}
	for _, text := range []string{i.ID.String(), i.AuthorityID, i.Caller, i.Node, i.PodUID} {
		// PostgreSQL takes neither NUL nor what is not UTF-8: then no store does.
		if len(text) > maxText || !utf8.ValidString(text) || strings.ContainsRune(text, 0) {
			return fmt.Errorf("storage: %.64q is longer than %d bytes, or is not UTF-8 without NUL", text, maxText)
		}
	}
	return nil
}

func isSerial(s string) bool {
	if len(s) < 1 || len(s) > 40 || s[0] == '0' {
		return false
	}
	for _, c := range []byte(s) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// Ledger records what was issued.
//
// Durability: when Record returns nil, every issuance given to it survives a
// crash of process and machine. When it returns an error, none, some or all of
// them may have been recorded: the caller must not release the certificates, and
// the ledger may then list certificates that nobody ever got. It never lacks one
// that somebody got.
//
// Concurrency: every method may be called from many goroutines, and concurrent
// Records share the cost of making them durable.
type Ledger interface {
	// Record adds issuances. It returns ErrDuplicateSerial, and records none of
	// this call's, if one of the serials is there already or is given twice; so
	// it does, with the error of Issuance.Check, if that refuses one of them.
	// Other calls are not affected. To record nothing succeeds. When ctx ends
	// first, Record returns its error; if ctx had ended before the call, nothing
	// is recorded.
	Record(ctx context.Context, issuances ...Issuance) error

	// Query returns the issuances that match, the newest first, at most
	// q.Max of them. Those issued in the same millisecond come in the order of
	// their serial numbers, the smallest number first.
	Query(ctx context.Context, q Query) ([]Issuance, error)

	// Prune removes what expired before the given time, and says how many that
	// were. What is valid up to that very time stays. Prune works in small steps,
	// so that Record does not wait for it; when it fails, it says how many it
	// had removed by then.
	Prune(ctx context.Context, expiredBefore time.Time) (int, error)
}

// Query selects issuances. Each field that is not zero narrows the selection.
type Query struct {
	Serial      string
	ID          spiffeid.ID
	AuthorityID string
	ValidAt     time.Time // NotBefore <= ValidAt <= NotAfter
	IssuedFrom  time.Time // at or after
	IssuedUntil time.Time // before
	// Limit is how many to return at most; anything but 1 to MaxQuery means
	// MaxQuery.
	Limit int
}

// Max returns how many issuances a ledger returns for q at most.
func (q Query) Max() int {
	if q.Limit < 1 || q.Limit > MaxQuery {
		return MaxQuery
	}
	return q.Limit
}

// MaxQuery is the largest number of issuances that one Query returns.
const MaxQuery = 1000

// FleetStore lets replicas share what each of them has heard of the agents: one
// summary for each replica, replaced whole.
//
// Consistency: a Summaries that begins after a Publish or a Withdraw has returned
// sees what it did, or what a later one did, from every replica.
//
// Durability: none is demanded beyond the life of the processes that use the
// store. What was lost, agents report again.
//
// Concurrency: every method may be called from many goroutines.
type FleetStore interface {
	// Publish replaces the summary of a replica. It returns ErrDocumentSize if
	// data is larger than MaxDocument, and ErrReplicaName if no replica can have
	// that name; then, and when ctx had ended before the call, nothing is changed.
	Publish(ctx context.Context, replica string, data []byte) error

	// Summaries returns the newest summary of each replica that has one, ordered by
	// replica.
	Summaries(ctx context.Context) ([]Summary, error)

	// Withdraw removes the summary of a replica. That there is none is no error.
	Withdraw(ctx context.Context, replica string) error
}

// Summary is what one replica has published.
type Summary struct {
	Replica string
	// Data belongs to the caller.
	Data []byte
}

// ErrReplicaName says that no replica can have that name.
var ErrReplicaName = errors.New("storage: a replica's name has 1 to 200 lower-case letters, digits, '-' and '.', and begins and ends with a letter or digit")

// CheckReplica returns nil if a replica can have that name, and ErrReplicaName if
// not: it has to fit into the name of a Kubernetes object, with room for a prefix.
func CheckReplica(name string) error {
	if len(name) < 1 || len(name) > 200 {
		return ErrReplicaName
	}
	for n, c := range []byte(name) {
		switch {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9':
		case c == '-' && n > 0 && n < len(name)-1:
		case c == '.' && n > 0 && n < len(name)-1 && name[n-1] != '.' && name[n-1] != '-' && name[n+1] != '-':
		default:
			return ErrReplicaName
		}
	}
	return nil
}

// TokenStore remembers which tokens were spent.
//
// Consistency: of all Spends of one token, by all replicas together, one returns nil.
//
// Durability: when Spend returns nil or ErrSpent, the token stays spent, until it is
// pruned, after a crash of process and machine. When it returns another error, the
// token may or may not be spent: whoever presents it again learns that, and needs a
// new one if it is.
//
// Concurrency: every method may be called from many goroutines.
type TokenStore interface {
	// Spend spends the token that its issuer named id, which must not be accepted
	// any more from until on, by whatever clock. It returns ErrSpent if the token
	// was spent before. If ctx had ended before the call, nothing is spent.
	Spend(ctx context.Context, issuer, id string, until time.Time) error

	// PruneSpent forgets the tokens whose until was before the given time, and says
	// how many that were: when it fails, by then. It works in small steps, so that
	// Spend does not wait for it.
	PruneSpent(ctx context.Context, before time.Time) (int, error)
}

// ErrSpent says that a token was spent before.
var ErrSpent = errors.New("storage: the token was spent before")

// TokenKey returns by what stores know a token: a hash, so that whatever an issuer
// may call a token has one size and needs no quoting, and the store has no names that
// are of use to anybody.
func TokenKey(issuer, id string) [sha256.Size]byte {
	// The length parts the two: no issuer and id are spelled like another pair.
	text := binary.BigEndian.AppendUint64(nil, uint64(len(issuer)))
	return sha256.Sum256(append(append(text, issuer...), id...))
}
