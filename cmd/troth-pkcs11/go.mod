// A module of its own, because it needs cgo and a PKCS#11 binding, which nothing
// else in Troth does.
module troth.dev/troth/cmd/troth-pkcs11

go 1.26.0

require (
	github.com/miekg/pkcs11 v1.1.2
	github.com/spiffe/go-spiffe/v2 v2.9.0
	golang.org/x/sys v0.49.0
	troth.dev/troth v0.0.0
)

require golang.org/x/crypto v0.58.0 // indirect

replace troth.dev/troth => ../..
