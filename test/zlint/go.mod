// A module of its own, because zlint is needed by nothing else and brings along
// what nobody should have to download who builds Troth.
module troth.dev/troth/test/zlint

go 1.26.0

require (
	github.com/spiffe/go-spiffe/v2 v2.9.0
	github.com/zmap/zcrypto v0.0.0-20260906180147-3ed30b1e9340
	github.com/zmap/zlint/v3 v3.7.3
	troth.dev/troth v0.0.0
)

require (
	github.com/pelletier/go-toml v1.9.5 // indirect
	github.com/weppos/publicsuffix-go v0.50.3 // indirect
	golang.org/x/crypto v0.58.0 // indirect
	golang.org/x/net v0.61.0 // indirect
	golang.org/x/text v0.43.0 // indirect
)

// zcrypto asks for this version, which no module proxy serves.
exclude github.com/weppos/publicsuffix-go v0.50.4-0.20260821095816-b0fdb5c2d345

replace troth.dev/troth => ../..
