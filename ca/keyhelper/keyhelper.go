// Package keyhelper keeps authority keys in another process, the key helper, which
// keeps them in a token: a hardware security module behind PKCS#11, for instance.
// So C libraries, and their crashes, stay out of the process that issues.
//
// [New] is the issuing side: the [Keys] that package ca asks, which start a command
// and talk to it over its standard input and output. [Serve] is the side of the
// helper: it answers out of a [KeyStore]. cmd/troth-pkcs11 is one.
//
// A helper gets digests to sign, and nothing of what they are of. Each request has
// a deadline, and each message a bound. A helper that dies is started again; one
// that does not answer in time, or answers nonsense, is killed first. It ends by
// itself when its standard input does, and so with the process that started it.
package keyhelper

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"
)

// Config is what Keys need.
type Config struct {
	// Command is the helper's program and its arguments. It gets the environment
	// of this process. Required.
	Command []string
	// Log receives what the helper writes to its standard error, line by line, and
	// when it ends. Required.
	Log *slog.Logger
	// Timeout is how long a request may take once it is sent; 0 means 10 seconds.
	// Waiting for a turn, and for the helper to start, may take as long again.
	Timeout time.Duration
}

// Keys are the keys of a helper. They have the methods of ca.Keys, and may be used
// from many goroutines. What a helper or its token has to say against a request is
// an [*Error].
type Keys struct {
	config Config
	// slots are held by requests from before they are sent until they are answered
	// or their helper is gone.
	slots chan struct{}

	// starting is held, by its one token, by who looks at what follows.
	starting  chan struct{}
	child     *child // nil before the first request
	closed    bool
	failures  int // helpers in a row that did not live long
	notBefore time.Time
	last      error // why the last helper is gone
}

const (
	defaultTimeout = 10 * time.Second
	// A helper that lived this long is forgiven all before.
	longLife = time.Minute
	// Between two starts, unless the first one served and died for the first time.
	firstDelay, longestDelay = time.Second, 30 * time.Second
)

// New returns the Keys of a helper. It starts nothing: the first request does.
// Whoever calls New calls Close.
func New(config Config) (*Keys, error) {
	switch {
	case len(config.Command) == 0 || config.Command[0] == "":
		return nil, errors.New("keyhelper: no command")
	case config.Log == nil:
		return nil, errors.New("keyhelper: Log is required")
	case config.Timeout < 0:
		return nil, fmt.Errorf("keyhelper: a timeout of %v", config.Timeout)
	}
	if config.Timeout == 0 {
		config.Timeout = defaultTimeout
	}
	return &Keys{config: config, slots: make(chan struct{}, InFlight), starting: make(chan struct{}, 1)}, nil
}

// Create has the helper make a key. If the answer is lost, a key that nobody has
// seen stays in the token.
func (k *Keys) Create(ctx context.Context) (crypto.Signer, []byte, error) {
	answer, err := k.call(ctx, request{Method: methodCreate})
	if err != nil {
		return nil, nil, fmt.Errorf("keyhelper: create a key: %w", err)
	}
	if len(answer.Handle) == 0 {
		return nil, nil, errors.New("keyhelper: create a key: the helper answers without a handle")
	}
	public, err := parsePublicKey(answer.PublicKey)
	if err != nil {
		return nil, nil, fmt.Errorf("keyhelper: create a key: %w", err)
	}
	return &signer{keys: k, handle: answer.Handle, public: public}, answer.Handle, nil
}

// Open finds the key of an authority again. The Signer stays good when the helper
// is started anew; it blocks for no longer than Config.Timeout says.
func (k *Keys) Open(ctx context.Context, authorityID string, handle []byte) (crypto.Signer, error) {
	answer, err := k.call(ctx, request{Method: methodOpen, AuthorityID: authorityID, Handle: handle})
	if err != nil {
		return nil, fmt.Errorf("keyhelper: open a key: %w", err)
	}
	public, err := parsePublicKey(answer.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("keyhelper: open a key: %w", err)
	}
	return &signer{keys: k, handle: handle, public: public}, nil
}

// Close ends the helper, and returns when it has ended. Requests fail from then on.
func (k *Keys) Close() error {
	k.starting <- struct{}{}
	defer func() { <-k.starting }()
	k.closed = true
	if k.child != nil {
		k.child.stop()
	}
	return nil
}

// signer is a key that the helper signs with.
type signer struct {
	keys   *Keys
	handle []byte
	public *ecdsa.PublicKey
}

// Public implements [crypto.Signer].
func (s *signer) Public() crypto.PublicKey { return s.public }

// Sign implements [crypto.Signer], for digests of SHA-256 alone. The chance is the
// token's.
func (s *signer) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts == nil || opts.HashFunc() != crypto.SHA256 || len(digest) != crypto.SHA256.Size() {
		return nil, errors.New("keyhelper: sign: it is no digest of SHA-256")
	}
	answer, err := s.keys.call(context.Background(), request{Method: methodSign, Handle: s.handle, Hash: hashSHA256, Digest: digest})
	if err != nil {
		return nil, fmt.Errorf("keyhelper: sign: %w", err)
	}
	if len(answer.Signature) == 0 {
		return nil, errors.New("keyhelper: sign: the helper answers without a signature")
	}
	return answer.Signature, nil
}

// call sends a request to the helper, and starts one if there is none.
func (k *Keys) call(ctx context.Context, r request) (response, error) {
	if err := r.check(); err != nil {
		return response{}, err
	}
	ready, cancel := context.WithTimeout(ctx, k.config.Timeout)
	defer cancel()
	select {
	case k.slots <- struct{}{}:
	case <-ready.Done():
		return response{}, k.late(ctx, "no turn")
	}
	c, err := k.running(ready)
	if err != nil {
		<-k.slots
		if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
			return response{}, k.late(ctx, "not started")
		}
		return response{}, err
	}
	return c.call(ctx, r, func() { <-k.slots })
}

// late is why a request was not sent in time.
func (k *Keys) late(ctx context.Context, what string) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return &Error{TimedOut, fmt.Sprintf("%s within %v", what, k.config.Timeout)}
}

// running returns the helper, and starts it if it is not running and it is time.
func (k *Keys) running(ctx context.Context) (*child, error) {
	select {
	case k.starting <- struct{}{}:
		defer func() { <-k.starting }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if k.closed {
		return nil, &Error{HelperGone, "it was closed"}
	}
	if k.child != nil {
		if !k.child.isGone() {
			return k.child, nil
		}
		k.account(k.child)
		k.child = nil
	}
	// At once, so that a batch of a hundred does not wait a hundred times.
	if wait := time.Until(k.notBefore); wait > 0 {
		return nil, &Error{HelperGone, fmt.Sprintf("started again in %v; it ended because: %v", wait.Round(time.Millisecond), k.last)}
	}
	c, err := start(k.config)
	if err != nil {
		k.failed(err, false)
		return nil, &Error{HelperGone, err.Error()}
	}
	// Whoever waits for it no more is not why it should not start.
	answer, err := c.call(context.WithoutCancel(ctx), request{Method: methodHello, Version: version}, func() {})
	if err == nil && answer.Version != version {
		err = &Error{Failed, fmt.Sprintf("the helper speaks version %d of the protocol, not %d", answer.Version, version)}
	}
	if err != nil {
		c.fail(err)
		c.ended.Wait()
		k.failed(err, false)
		return nil, fmt.Errorf("start %q: %w", k.config.Command[0], err)
	}
	k.child = c
	return c, nil
}

// account draws the conclusions from the end of a helper.
func (k *Keys) account(c *child) {
	c.ended.Wait()
	lived, served, err := c.life()
	if served && lived >= longLife {
		k.failures = 0
	}
	var e *Error
	timedOut := errors.As(err, &e) && e.Code == TimedOut
	k.failed(err, served && !timedOut)
}

// failed sets when the next helper may be started: at once, if the one before was
// good and it is the first to die for a while.
func (k *Keys) failed(err error, good bool) {
	k.last = err
	k.failures++
	if good && k.failures == 1 {
		k.notBefore = time.Time{}
		return
	}
	k.notBefore = time.Now().Add(min(firstDelay<<min(k.failures-1, 10), longestDelay))
}

// parsePublicKey refuses what no authority has.
func parsePublicKey(der []byte) (*ecdsa.PublicKey, error) {
	key, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return nil, fmt.Errorf("the helper's public key: %w", err)
	}
	public, ok := key.(*ecdsa.PublicKey)
	if !ok || public.Curve != elliptic.P256() {
		return nil, errors.New("the helper's public key is not ECDSA P-256")
	}
	return public, nil
}
