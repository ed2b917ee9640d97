package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/miekg/pkcs11"

	"troth.dev/troth/ca/keyhelper"
)

type tokenConfig struct {
	module, label, pinFile, keyLabel string
}

// token is a [keyhelper.KeyStore] in a PKCS#11 token. It connects with the first
// request, and again when a session is lost.
type token struct {
	config tokenConfig
	module *pkcs11.Ctx

	// mu is held for reading while sessions are in use, for writing by who makes
	// them.
	mu       sync.RWMutex
	serial   string                    // guarded by mu; "" if not connected
	sessions chan pkcs11.SessionHandle // guarded by mu; those that are idle
	made     int                       // guarded by mu; how often we connected
	refused  [32]byte                  // guarded by mu; SHA-256 of the PIN that the token did not take
}

// sessions is how many requests the token has at a time, if it permits as many.
const sessions = 8

func newToken(c tokenConfig) (*token, error) {
	module := pkcs11.New(c.module)
	if module == nil {
		return nil, fmt.Errorf("%s is not a PKCS#11 library that can be loaded", c.module)
	}
	return &token{config: c, module: module}, nil
}

// oidP256 is 1.2.840.10045.3.1.7, in DER, as CKA_EC_PARAMS.
func oidP256() []byte { return []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07} }

// Create implements [keyhelper.KeyStore].
func (t *token) Create(ctx context.Context) (public *ecdsa.PublicKey, made []byte, err error) {
	id := make([]byte, 16)
	rand.Read(id)
	label := t.config.keyLabel + "-" + time.Now().UTC().Format("20060102T150405Z")
	err = t.use(ctx, "create a key", func(s pkcs11.SessionHandle) error {
		of, private, err := t.module.GenerateKeyPair(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)},
			[]*pkcs11.Attribute{
				pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, oidP256()),
				pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
				pkcs11.NewAttribute(pkcs11.CKA_VERIFY, true),
				pkcs11.NewAttribute(pkcs11.CKA_ID, id),
				pkcs11.NewAttribute(pkcs11.CKA_LABEL, label),
			},
			[]*pkcs11.Attribute{
				pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
				pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
				pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
				pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
				pkcs11.NewAttribute(pkcs11.CKA_SIGN, true),
				pkcs11.NewAttribute(pkcs11.CKA_ID, id),
				pkcs11.NewAttribute(pkcs11.CKA_LABEL, label),
			})
		if err != nil {
			return err
		}
		if public, err = t.check(s, id); err != nil {
			// Nobody has seen it. If it cannot be removed it is in the list.
			return errors.Join(err, t.module.DestroyObject(s, private), t.module.DestroyObject(s, of))
		}
		made = []byte(handle{serial: t.serial, id: id}.String())
		return nil
	})
	return public, made, err
}

// Open implements [keyhelper.KeyStore].
func (t *token) Open(ctx context.Context, authorityID string, name []byte) (public *ecdsa.PublicKey, err error) {
	h, err := parseHandle(name)
	if err != nil {
		return nil, &keyhelper.Error{Code: keyhelper.Invalid, Message: err.Error()}
	}
	err = t.use(ctx, "open a key", func(s pkcs11.SessionHandle) error {
		if err := t.has(h); err != nil {
			return err
		}
		if public, err = t.check(s, h.id); err != nil {
			return err
		}
		if got := authorityOf(public); authorityID != got {
			return &keyhelper.Error{Code: keyhelper.NoSuchKey, Message: fmt.Sprintf("the key with CKA_ID %x is that of authority %s", h.id, got)}
		}
		return nil
	})
	return public, err
}

// Sign implements [keyhelper.KeyStore].
func (t *token) Sign(ctx context.Context, name, digest []byte) (signature []byte, err error) {
	h, err := parseHandle(name)
	if err != nil {
		return nil, &keyhelper.Error{Code: keyhelper.Invalid, Message: err.Error()}
	}
	err = t.use(ctx, "sign", func(s pkcs11.SessionHandle) error {
		if err := t.has(h); err != nil {
			return err
		}
		key, err := t.find(s, pkcs11.CKO_PRIVATE_KEY, h.id)
		if err != nil {
			return err
		}
		signature, err = t.sign(s, key, digest)
		return err
	})
	return signature, err
}

// listed is a key in the token.
type listed struct {
	authorityID, label string
	id                 []byte
}

// list returns the keys whose labels begin as ours do.
func (t *token) list(ctx context.Context) (keys []listed, err error) {
	err = t.use(ctx, "list keys", func(s pkcs11.SessionHandle) error {
		keys = nil
		objects, err := t.objects(s, 1<<10, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY))
		if err != nil {
			return err
		}
		for _, object := range objects {
			a, err := t.module.GetAttributeValue(s, object, []*pkcs11.Attribute{
				pkcs11.NewAttribute(pkcs11.CKA_LABEL, nil), pkcs11.NewAttribute(pkcs11.CKA_ID, nil),
			})
			if err != nil {
				return err
			}
			k := listed{label: string(a[0].Value), id: a[1].Value, authorityID: "-"}
			if !strings.HasPrefix(k.label, t.config.keyLabel+"-") {
				continue
			}
			if public, err := t.public(s, k.id); err == nil {
				k.authorityID = authorityOf(public)
			}
			keys = append(keys, k)
		}
		return nil
	})
	return keys, err
}

// authorityOf returns the ID of the authority with this key, as package ca does.
func authorityOf(public *ecdsa.PublicKey) string {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return "-" // not for P-256
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:20])
}

// has says whether the token is the one that the handle names. Its caller is in use.
func (t *token) has(h handle) error {
	if h.serial != t.serial {
		return &keyhelper.Error{Code: keyhelper.NoSuchKey, Message: fmt.Sprintf("the key is in the token with the serial number %q, and the one labelled %q has %q",
			h.serial, t.config.label, t.serial)}
	}
	return nil
}

// check makes sure that a key is what we make, that it does not leave the token,
// and that its public half is its own, and returns that.
func (t *token) check(s pkcs11.SessionHandle, id []byte) (*ecdsa.PublicKey, error) {
	private, err := t.find(s, pkcs11.CKO_PRIVATE_KEY, id)
	if err != nil {
		return nil, err
	}
	a, err := t.module.GetAttributeValue(s, private, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, nil), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, nil),
	})
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(a[0].Value, []byte{1}) || !bytes.Equal(a[1].Value, []byte{0}) {
		return nil, &keyhelper.Error{Code: keyhelper.NoSuchKey, Message: fmt.Sprintf("the key with CKA_ID %x can be taken out of the token", id)}
	}
	public, err := t.public(s, id)
	if err != nil {
		return nil, err
	}
	digest := sha256.Sum256([]byte("troth: does this key match?"))
	signature, err := t.sign(s, private, digest[:])
	if err != nil {
		return nil, err
	}
	if !ecdsa.VerifyASN1(public, digest[:], signature) {
		return nil, &keyhelper.Error{Code: keyhelper.NoSuchKey, Message: fmt.Sprintf("the private and the public key with CKA_ID %x do not match", id)}
	}
	return public, nil
}

// public reads the public key with an ID.
func (t *token) public(s pkcs11.SessionHandle, id []byte) (*ecdsa.PublicKey, error) {
	object, err := t.find(s, pkcs11.CKO_PUBLIC_KEY, id)
	if err != nil {
		return nil, err
	}
	a, err := t.module.GetAttributeValue(s, object, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, nil), pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, nil),
	})
	if err != nil {
		return nil, err
	}
	// PKCS #11 §6.3.3: an octet string in DER. Some tokens leave the DER out.
	point := a[1].Value
	var octets []byte
	if rest, err := asn1.Unmarshal(point, &octets); err == nil && len(rest) == 0 {
		point = octets
	}
	public, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
	if err != nil || !bytes.Equal(a[0].Value, oidP256()) {
		return nil, &keyhelper.Error{Code: keyhelper.NoSuchKey, Message: fmt.Sprintf("the public key with CKA_ID %x is not ECDSA P-256", id)}
	}
	return public, nil
}

// find returns the one key of a class with an ID.
func (t *token) find(s pkcs11.SessionHandle, class uint, id []byte) (pkcs11.ObjectHandle, error) {
	objects, err := t.objects(s, 2, pkcs11.NewAttribute(pkcs11.CKA_CLASS, class), pkcs11.NewAttribute(pkcs11.CKA_ID, id))
	if err != nil {
		return 0, err
	}
	what := "private"
	if class == pkcs11.CKO_PUBLIC_KEY {
		what = "public"
	}
	switch len(objects) {
	case 0:
		// A session that is not logged in sees no private keys, and that is no error.
		if info, err := t.module.GetSessionInfo(s); err != nil {
			return 0, err
		} else if info.State != pkcs11.CKS_RW_USER_FUNCTIONS {
			return 0, pkcs11.Error(pkcs11.CKR_USER_NOT_LOGGED_IN)
		}
		return 0, &keyhelper.Error{Code: keyhelper.NoSuchKey, Message: fmt.Sprintf("the token %q has no %s key with CKA_ID %x: was it deleted?", t.config.label, what, id)}
	case 1:
		return objects[0], nil
	default:
		return 0, &keyhelper.Error{Code: keyhelper.NoSuchKey, Message: fmt.Sprintf("the token %q has several %s keys with CKA_ID %x", t.config.label, what, id)}
	}
}

func (t *token) objects(s pkcs11.SessionHandle, limit int, template ...*pkcs11.Attribute) ([]pkcs11.ObjectHandle, error) {
	if err := t.module.FindObjectsInit(s, template); err != nil {
		return nil, err
	}
	found, _, err := t.module.FindObjects(s, limit)
	return found, errors.Join(err, t.module.FindObjectsFinal(s))
}

// sign returns the signature in DER. Tokens give the two numbers one after the
// other.
func (t *token) sign(s pkcs11.SessionHandle, key pkcs11.ObjectHandle, digest []byte) ([]byte, error) {
	if err := t.module.SignInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)}, key); err != nil {
		return nil, err
	}
	raw, err := t.module.Sign(s, digest)
	if err != nil {
		return nil, err
	}
	if len(raw) != 64 {
		return nil, fmt.Errorf("the token signs with %d bytes, not 64", len(raw))
	}
	return asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(raw[:32]), new(big.Int).SetBytes(raw[32:])})
}

// use calls do with a session that is logged in, connects before if need be, and
// once more if the session turns out to be lost.
func (t *token) use(ctx context.Context, what string, do func(pkcs11.SessionHandle) error) error {
	var err error
	for range 2 {
		var made int
		made, err = t.withSession(ctx, do)
		if !lost(err) {
			break
		}
		if err := t.connect(made); err != nil {
			return spelled(what, err)
		}
	}
	return spelled(what, err)
}

// errNotConnected is what withSession returns before the first connect.
var errNotConnected = errors.New("not connected")

func (t *token) withSession(ctx context.Context, do func(pkcs11.SessionHandle) error) (made int, err error) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.serial == "" {
		return t.made, errNotConnected
	}
	select {
	case s := <-t.sessions:
		defer func() { t.sessions <- s }()
		return t.made, do(s)
	case <-ctx.Done():
		return t.made, ctx.Err()
	}
}

// connect finds the token, opens sessions and logs in, unless somebody else has
// done so since the connection that was found lost.
func (t *token) connect(made int) (err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.serial != "" && t.made != made {
		return nil
	}
	t.serial = ""
	t.made++
	// From the start: only then do some libraries look which tokens there are.
	_ = t.module.Finalize()
	if err := t.module.Initialize(); err != nil && !errors.Is(err, pkcs11.Error(pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED)) {
		return err
	}
	slot, info, err := t.slot()
	if err != nil {
		return err
	}
	pin, err := readPIN(t.config.pinFile)
	if err != nil {
		return &keyhelper.Error{Code: keyhelper.PINRefused, Message: err.Error()}
	}
	defer clear(pin)
	sum := sha256.Sum256(pin)
	if err := mayLogin(info, sum == t.refused); err != nil {
		return err
	}
	t.sessions = make(chan pkcs11.SessionHandle, sessions)
	for n := range sessions {
		s, err := t.module.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
		if err != nil && n > 0 {
			break // it permits no more
		}
		if err != nil {
			return err
		}
		if n == 0 {
			err = t.module.Login(s, pkcs11.CKU_USER, string(pin))
		}
		if errors.Is(err, pkcs11.Error(pkcs11.CKR_PIN_INCORRECT)) {
			t.refused = sum
		}
		if err != nil && !errors.Is(err, pkcs11.Error(pkcs11.CKR_USER_ALREADY_LOGGED_IN)) {
			return err
		}
		t.sessions <- s
	}
	t.serial = info.SerialNumber
	return nil
}

// slot finds the token by its label.
func (t *token) slot() (uint, pkcs11.TokenInfo, error) {
	slots, err := t.module.GetSlotList(true)
	if err != nil {
		return 0, pkcs11.TokenInfo{}, err
	}
	var slot uint
	var found pkcs11.TokenInfo
	var labels []string
	n := 0
	for _, s := range slots {
		info, err := t.module.GetTokenInfo(s)
		if err != nil || info.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			continue // another token's trouble
		}
		info.Label, info.SerialNumber = strings.TrimRight(info.Label, " \x00"), strings.TrimRight(info.SerialNumber, " \x00")
		labels = append(labels, fmt.Sprintf("%q", info.Label))
		if info.Label == t.config.label {
			slot, found = s, info
			n++
		}
	}
	switch {
	case n == 0:
		return 0, found, &keyhelper.Error{Code: keyhelper.TokenGone, Message: fmt.Sprintf("there is no token labelled %q; there are [%s]",
			t.config.label, strings.Join(labels, " "))}
	case n > 1:
		return 0, found, &keyhelper.Error{Code: keyhelper.TokenGone, Message: fmt.Sprintf("%d tokens are labelled %q", n, t.config.label)}
	case found.SerialNumber == "":
		return 0, found, &keyhelper.Error{Code: keyhelper.TokenGone, Message: fmt.Sprintf("the token %q has no serial number", t.config.label)}
	}
	return slot, found, nil
}

// mayLogin keeps a wrong PIN, tried again and again by whoever restarts us, from
// locking the token.
func mayLogin(info pkcs11.TokenInfo, refusedBefore bool) error {
	refuse := func(format string, args ...any) error {
		return &keyhelper.Error{Code: keyhelper.PINRefused, Message: fmt.Sprintf(format, args...)}
	}
	switch {
	case info.Flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		return refuse("the PIN of the token %q is locked: its security officer has to set it anew", info.Label)
	case info.Flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0:
		return refuse("one more wrong PIN would lock the token %q: log in once by other means, so that the count starts anew", info.Label)
	case refusedBefore:
		return refuse("the token %q did not take the PIN in the file, and it is still the same: it is not tried again, lest the token be locked", info.Label)
	}
	return nil
}

// readPIN reads the first line of a file.
func readPIN(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("PIN: %w", err)
	}
	defer f.Close()
	const longest = 256
	pin, err := io.ReadAll(io.LimitReader(f, longest+1))
	if err != nil {
		return nil, fmt.Errorf("PIN: %w", err)
	}
	pin = bytes.TrimRight(pin, "\r\n")
	if len(pin) == 0 || len(pin) > longest || bytes.ContainsAny(pin, "\r\n\x00") {
		return nil, fmt.Errorf("PIN: %s has no PIN of up to %d bytes in one line", path, longest)
	}
	return pin, nil
}

// lost says whether an error is cured by connecting anew.
func lost(err error) bool {
	if errors.Is(err, errNotConnected) {
		return true
	}
	var code pkcs11.Error
	if !errors.As(err, &code) {
		return false
	}
	switch uint(code) {
	case pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_USER_NOT_LOGGED_IN,
		pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_TOKEN_NOT_PRESENT, pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED,
		pkcs11.CKR_SLOT_ID_INVALID, pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED,
		// What one session deleted another may still find.
		pkcs11.CKR_OBJECT_HANDLE_INVALID, pkcs11.CKR_KEY_HANDLE_INVALID:
		return true
	}
	return false
}

// spelled returns an error with its code.
func spelled(what string, err error) error {
	var known *keyhelper.Error
	if err == nil || errors.As(err, &known) {
		return err
	}
	e := &keyhelper.Error{Code: keyhelper.Failed, Message: what + ": " + err.Error()}
	var code pkcs11.Error
	if errors.As(err, &code) {
		switch uint(code) {
		case pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE, pkcs11.CKR_PIN_EXPIRED, pkcs11.CKR_PIN_LOCKED,
			pkcs11.CKR_USER_PIN_NOT_INITIALIZED:
			e.Code = keyhelper.PINRefused
		case pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_TOKEN_NOT_PRESENT, pkcs11.CKR_TOKEN_NOT_RECOGNIZED,
			pkcs11.CKR_SLOT_ID_INVALID, pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED:
			e.Code = keyhelper.TokenGone
		}
	}
	return e
}
