package keyhelper

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"sync"
)

// KeyStore is where a helper has its keys: ECDSA P-256. Its methods are called from
// up to InFlight goroutines. An error that is an [*Error] keeps its code.
type KeyStore interface {
	// Create makes a key, and returns a handle of at most MaxHandle bytes by which
	// it is found again.
	Create(ctx context.Context) (public *ecdsa.PublicKey, handle []byte, err error)

	// Open finds the key of an authority, makes sure that it can sign, and returns
	// its public half.
	Open(ctx context.Context, authorityID string, handle []byte) (*ecdsa.PublicKey, error)

	// Sign returns the ECDSA signature, in DER, of a digest of SHA-256.
	Sign(ctx context.Context, handle, digest []byte) ([]byte, error)
}

// Serve answers requests out of keys, until in ends; then it returns nil. It returns
// an error if what comes in is not the protocol. It waits for no call of keys: one
// may hang in a driver for ever, and the program is to exit all the same.
func Serve(ctx context.Context, in io.Reader, out io.Writer, keys KeyStore) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var writing sync.Mutex
	answer := func(r response) {
		frame, err := encode(r)
		if err != nil {
			frame, err = encode(response{ID: r.ID, Error: asError(err)})
		}
		writing.Lock()
		defer writing.Unlock()
		if err == nil && ctx.Err() == nil {
			_, err = out.Write(frame)
		}
		if err != nil {
			cancel(fmt.Errorf("keyhelper: answer: %w", err))
		}
	}
	slots := make(chan struct{}, InFlight)
	greeted := false
	for {
		message, err := readFrame(in)
		if errors.Is(err, io.EOF) {
			return context.Cause(ctx)
		}
		if err != nil {
			return fmt.Errorf("keyhelper: read a request: %w", err)
		}
		r, err := parseRequest(message)
		var refused *Error
		switch {
		case errors.As(err, &refused):
			answer(response{ID: r.ID, Error: refused})
			continue
		case err != nil:
			return fmt.Errorf("keyhelper: read a request: %w", err)
		case r.Method == methodHello:
			greeted = r.Version == version
			answer(response{ID: r.ID, Version: version})
			continue
		case !greeted:
			return fmt.Errorf("keyhelper: %s comes before a hello of version %d", r.Method, version)
		}
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		go func() {
			defer func() { <-slots }()
			answer(r.carryOut(ctx, keys))
		}()
	}
}

// carryOut has keys do what the request asks for.
func (r request) carryOut(ctx context.Context, keys KeyStore) response {
	answer := response{ID: r.ID}
	var public *ecdsa.PublicKey
	var err error
	switch r.Method {
	case methodCreate:
		public, answer.Handle, err = keys.Create(ctx)
	case methodOpen:
		public, err = keys.Open(ctx, r.AuthorityID, r.Handle)
	case methodSign:
		answer.Signature, err = keys.Sign(ctx, r.Handle, r.Digest)
	}
	if len(answer.Handle) > MaxHandle {
		err = fmt.Errorf("a handle of %d bytes", len(answer.Handle))
	}
	if err == nil && public != nil {
		answer.PublicKey, err = x509.MarshalPKIXPublicKey(public)
	}
	if err != nil {
		return response{ID: r.ID, Error: asError(err)}
	}
	return answer
}
