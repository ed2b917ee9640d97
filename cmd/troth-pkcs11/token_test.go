package main

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/pkcs11"

	"troth.dev/troth/ca/keyhelper"
)

func (t *token) mustUse(tb testing.TB, do func(s pkcs11.SessionHandle) error) {
	tb.Helper()
	if err := t.use(tb.Context(), "test", do); err != nil {
		tb.Fatal(err)
	}
}

func destroy(t testing.TB, hsm *token, id []byte) {
	t.Helper()
	hsm.mustUse(t, func(s pkcs11.SessionHandle) error {
		objects, err := hsm.objects(s, 10, pkcs11.NewAttribute(pkcs11.CKA_ID, id))
		if err != nil {
			return err
		}
		for _, o := range objects {
			if err := hsm.module.DestroyObject(s, o); err != nil {
				return err
			}
		}
		return nil
	})
}

var digest = sha256.Sum256([]byte("what is signed"))

func checkSigns(t *testing.T, hsm *token, public *ecdsa.PublicKey, handle []byte) {
	t.Helper()
	signature, err := hsm.Sign(t.Context(), handle, digest[:])
	if err != nil {
		t.Error(err)
	} else if !ecdsa.VerifyASN1(public, digest[:], signature) {
		t.Error("the signature does not verify")
	}
}

// What is made stays in the token.
func TestCreate(t *testing.T) {
	c, _ := softHSM(t)
	hsm := inProcess(t, c)
	public, made, err := hsm.Create(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	checkSigns(t, hsm, public, made)
	h, err := parseHandle(made)
	if err != nil {
		t.Fatal(err)
	}
	hsm.mustUse(t, func(s pkcs11.SessionHandle) error {
		key, err := hsm.find(s, pkcs11.CKO_PRIVATE_KEY, h.id)
		if err != nil {
			return err
		}
		for _, want := range []struct {
			name  string
			kind  uint
			value byte
		}{
			{"token", pkcs11.CKA_TOKEN, 1}, {"private", pkcs11.CKA_PRIVATE, 1},
			{"sensitive", pkcs11.CKA_SENSITIVE, 1}, {"always sensitive", pkcs11.CKA_ALWAYS_SENSITIVE, 1},
			{"extractable", pkcs11.CKA_EXTRACTABLE, 0}, {"never extractable", pkcs11.CKA_NEVER_EXTRACTABLE, 1},
			{"local", pkcs11.CKA_LOCAL, 1}, {"sign", pkcs11.CKA_SIGN, 1},
		} {
			a, err := hsm.module.GetAttributeValue(s, key, []*pkcs11.Attribute{pkcs11.NewAttribute(want.kind, nil)})
			if err != nil || a[0].Value[0] != want.value {
				t.Errorf("%s is %v, %v; want %d", want.name, a, err, want.value)
			}
		}
		if a, err := hsm.module.GetAttributeValue(s, key, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_VALUE, nil)}); err == nil {
			t.Errorf("the token tells the private key: %d bytes", len(a[0].Value))
		}
		return nil
	})
}

func TestOpen(t *testing.T) {
	c, _ := softHSM(t)
	hsm := inProcess(t, c)
	public, made, err := hsm.Create(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, other, err := hsm.Create(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	id := authorityOf(public)
	if again, err := hsm.Open(t.Context(), id, made); err != nil || !again.Equal(public) {
		t.Errorf("Open = %v, want the key that was made", err)
	}
	_, err = hsm.Open(t.Context(), id, other)
	check(t, err, keyhelper.NoSuchKey, "is that of authority ")
	_, err = hsm.Open(t.Context(), id, []byte{2, 0, 0, 0})
	check(t, err, keyhelper.Invalid, "is not of a key in a token: was the key made by other means?")
	_, err = hsm.Sign(t.Context(), []byte{2, 0, 0, 0}, digest[:])
	check(t, err, keyhelper.Invalid)

	// A key that we would not have made is not opened: it may have been copied.
	generate := func(s pkcs11.SessionHandle, id []byte, sensitive, extractable bool) error {
		_, _, err := hsm.module.GenerateKeyPair(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)},
			[]*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, oidP256()), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_ID, id)},
			[]*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, sensitive),
				pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, extractable), pkcs11.NewAttribute(pkcs11.CKA_SIGN, true), pkcs11.NewAttribute(pkcs11.CKA_ID, id)})
		return err
	}
	h, err := parseHandle(made)
	if err != nil {
		t.Fatal(err)
	}
	for n, loose := range []struct{ sensitive, extractable bool }{{true, true}, {false, false}} {
		other := []byte{byte(n + 1)}
		hsm.mustUse(t, func(s pkcs11.SessionHandle) error { return generate(s, other, loose.sensitive, loose.extractable) })
		_, err = hsm.Open(t.Context(), id, []byte(handle{serial: h.serial, id: other}.String()))
		check(t, err, keyhelper.NoSuchKey, "can be taken out of the token")
	}

	// A second key of the same ID, and a public key of another private one.
	hsm.mustUse(t, func(s pkcs11.SessionHandle) error { return generate(s, h.id, true, false) })
	_, err = hsm.Open(t.Context(), id, made)
	check(t, err, keyhelper.NoSuchKey, "several private keys with CKA_ID")
	hsm.mustUse(t, func(s pkcs11.SessionHandle) error {
		privates, err := hsm.objects(s, 2, pkcs11.NewAttribute(pkcs11.CKA_ID, h.id), pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY))
		if err != nil {
			return err
		}
		publics, err := hsm.objects(s, 2, pkcs11.NewAttribute(pkcs11.CKA_ID, h.id), pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY))
		if err != nil {
			return err
		}
		a, err := hsm.module.GetAttributeValue(s, publics[0], []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, nil)})
		if err != nil {
			return err
		}
		// Of the one private key and the other public key.
		ours := strings.HasPrefix(string(a[0].Value), "troth-")
		for _, p := range privates {
			a, err := hsm.module.GetAttributeValue(s, p, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, nil)})
			if err != nil {
				return err
			}
			if strings.HasPrefix(string(a[0].Value), "troth-") != ours {
				if err := hsm.module.DestroyObject(s, p); err != nil {
					return err
				}
			}
		}
		return hsm.module.DestroyObject(s, publics[0])
	})
	_, err = hsm.Open(t.Context(), id, made)
	check(t, err, keyhelper.NoSuchKey, "do not match")
}

// Sessions are lost in several ways, to many at once, and nobody who signs notices.
func TestSessionsLost(t *testing.T) {
	c, _ := softHSM(t)
	hsm := inProcess(t, c)
	public, made, err := hsm.Create(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	slot := func() uint {
		slot, _, err := hsm.slot()
		if err != nil {
			t.Fatal(err)
		}
		return slot
	}
	for _, test := range []struct {
		name string
		do   func() error
	}{
		{"closed", func() error { return hsm.module.CloseAllSessions(slot()) }},
		{"logged out", func() error {
			s := <-hsm.sessions
			defer func() { hsm.sessions <- s }()
			return hsm.module.Logout(s)
		}},
		{"finalized", func() error { return hsm.module.Finalize() }},
	} {
		t.Run(test.name, func(t *testing.T) {
			if err := test.do(); err != nil {
				t.Fatal(err)
			}
			before := hsm.made
			var all sync.WaitGroup
			for range 2 * sessions {
				all.Go(func() { checkSigns(t, hsm, public, made) })
			}
			all.Wait()
			if hsm.made != before+1 {
				t.Errorf("connected %d times, want once", hsm.made-before)
			}
		})
	}
}

func TestMayLogin(t *testing.T) {
	for _, test := range []struct {
		name    string
		flags   uint
		refused bool
		want    string
	}{
		{"first time", 0, false, ""},
		{"after some wrong ones", pkcs11.CKF_USER_PIN_COUNT_LOW, false, ""},
		{"the same again", 0, true, "it is not tried again, lest the token be locked"},
		{"final try", pkcs11.CKF_USER_PIN_FINAL_TRY, false, `one more wrong PIN would lock the token "troth"`},
		{"locked", pkcs11.CKF_USER_PIN_LOCKED, false, `the PIN of the token "troth" is locked`},
	} {
		err := mayLogin(pkcs11.TokenInfo{Label: "troth", Flags: test.flags}, test.refused)
		if test.want == "" && err != nil {
			t.Errorf("%s: %v", test.name, err)
		} else if test.want != "" {
			check(t, err, keyhelper.PINRefused, test.want)
		}
	}
}

func TestRunRefuses(t *testing.T) {
	good := []string{"-module", "/nowhere/p11.so", "-token", "troth", "-pin-file", "/nowhere/pin"}
	for _, test := range []struct {
		args []string
		want string
	}{
		{nil, "-module, -token and -pin-file are required"},
		{good[:4], "-module, -token and -pin-file are required"},
		{append(good[:6:6], "1234"), `unexpected argument "1234": list is the only one`},
		{append(good[:6:6], "-key-label", ""), "-key-label has to have 1 to 64 bytes"},
		{good, "/nowhere/p11.so is not a PKCS#11 library that can be loaded"},
	} {
		if err := run(test.args); err == nil || err.Error() != test.want {
			t.Errorf("%q: %v, want %q", test.args, err, test.want)
		}
	}
}

func TestParseHandle(t *testing.T) {
	good := "pkcs11:serial=6f3e9a40c1d2b7f8;id=%01%9c%00;type=private"
	if h, err := parseHandle([]byte(good)); err != nil || h.serial != "6f3e9a40c1d2b7f8" || string(h.id) != "\x01\x9c\x00" || h.String() != good {
		t.Errorf("parseHandle = %+v, %v", h, err)
	}
	odd := handle{serial: "a;id=%/ ;?", id: []byte(";type=private")}
	if h, err := parseHandle([]byte(odd.String())); err != nil || fmt.Sprint(h) != fmt.Sprint(odd) {
		t.Errorf("%s is read as %+v, %v", odd, h, err)
	}
	for _, text := range []string{
		"", "\x02", "pkcs11:", "pkcs11:serial=;id=%01;type=private", "pkcs11:serial=a;id=;type=private", "pkcs11:serial=a;id=%01",
		"pkcs11:serial=a;id=%1;type=private", "pkcs11:serial=%;id=%01;type=private", "pkcs11:serial=a;id=a;type=private",
		"pkcs11:serial=a;id=%0A;type=private", good + " ", " " + good, "pkcs11:serial=a;id=%01;type=private;type=private",
		"pkcs11:serial=" + strings.Repeat("a", 17) + ";id=%01;type=private", "pkcs11:serial=a;id=" + strings.Repeat("%01", 65) + ";type=private",
	} {
		if h, err := parseHandle([]byte(text)); err == nil {
			t.Errorf("%q is read as %+v", text, h)
		}
	}
}

func FuzzHandle(f *testing.F) {
	f.Add([]byte("pkcs11:serial=6f3e9a40c1d2b7f8;id=%01%9c%00;type=private"))
	f.Add([]byte{2, 1})
	f.Fuzz(func(t *testing.T, text []byte) {
		if h, err := parseHandle(text); err == nil && h.String() != string(text) {
			t.Errorf("%q is read as %q", text, h)
		}
	})
}
