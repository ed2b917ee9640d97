//go:build unix

package ca_test

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"math/big"
	"net/url"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"troth.dev/troth/ca"
	"troth.dev/troth/storage"
	"troth.dev/troth/storage/sqlite"
)

// BenchmarkIssue compares what an SVID costs with a floor: the same request
// checked, and an equivalent certificate made, by crypto/x509, with no lint, no
// record, no audit and no chain verification.
//
// An operation is a round of 100 certificates of ours followed by 100 of the
// floor, so that noise hits both alike. cpu-us/cert is the CPU time of the whole
// process, user and system; x-floor is its ratio to the floor of the same round.
// Both are medians over the rounds.
func BenchmarkIssue(b *testing.B) {
	const perRound = 100
	request := requestFor(b)
	floor := newFloor(b)
	floorRound := func(b *testing.B) {
		for range perRound {
			floor.issue(b, request.CSR)
		}
	}
	b.Run("floor", func(b *testing.B) { measure(b, perRound, floorRound, floorRound) })

	for _, test := range []struct {
		name  string
		batch int
		store func(b *testing.B) storage.Ledger
	}{
		{"single", 1, memoryLedger},
		{"batch100", 100, memoryLedger},
		{"sqlite/single", 1, sqliteLedger},
		{"sqlite/batch100", 100, sqliteLedger},
	} {
		b.Run(test.name, func(b *testing.B) {
			config := newConfig(b)
			config.Ledger = test.store(b)
			issuer := open(b, config)
			batch := slices.Repeat([]ca.Request{request}, test.batch)
			measure(b, perRound, floorRound, func(b *testing.B) {
				for range perRound / test.batch {
					results, err := issuer.Issue(b.Context(), batch...)
					if err != nil || results[0].Err != nil {
						b.Fatal(err, results)
					}
				}
			})
		})
	}
}

func memoryLedger(*testing.B) storage.Ledger { return storage.NewMemory() }

func sqliteLedger(b *testing.B) storage.Ledger {
	b.Helper()
	store, err := sqlite.Open(b.Context(), sqlite.Config{Path: filepath.Join(b.TempDir(), "troth.db")})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := store.Close(); err != nil {
			b.Error(err)
		}
	})
	return store
}

// measure runs rounds of ours and of the floor by turns and reports ours.
func measure(b *testing.B, perRound int, floor, ours func(*testing.B)) {
	ours(b) // warm up
	var costs, ratios []float64
	var wall time.Duration
	for b.Loop() {
		start, cpu := time.Now(), cpuTime(b)
		ours(b)
		wall += time.Since(start)
		middle := cpuTime(b)
		floor(b)
		cost, floorCost := middle-cpu, cpuTime(b)-middle
		costs = append(costs, float64(cost.Microseconds())/float64(perRound))
		ratios = append(ratios, float64(cost)/float64(floorCost))
	}
	b.ReportMetric(0, "ns/op") // of both together: of use to nobody
	b.ReportMetric(float64(wall.Microseconds())/float64(len(costs)*perRound), "us/cert")
	b.ReportMetric(median(costs), "cpu-us/cert")
	b.ReportMetric(median(ratios), "x-floor")
}

func median(of []float64) float64 {
	slices.Sort(of)
	return of[len(of)/2]
}

func cpuTime(b *testing.B) time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// floor is the shortest way to an SVID that crypto/x509 has.
type floor struct {
	certificate *x509.Certificate
	key         any
}

func newFloor(b *testing.B) floor {
	key := newKey(b, p256)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), SubjectKeyId: []byte("authority"), RawSubject: []byte{0x30, 0},
		NotBefore: time.Now(), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		b.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		b.Fatal(err)
	}
	return floor{certificate, key}
}

func (f floor) issue(b *testing.B, csr []byte) {
	request, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		b.Fatal(err)
	}
	if err := request.CheckSignature(); err != nil {
		b.Fatal(err)
	}
	serial := make([]byte, 16)
	rand.Read(serial)
	sum := sha256.Sum256(request.RawSubjectPublicKeyInfo)
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial), SubjectKeyId: sum[:20],
		NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Hour),
		URIs:                  []*url.URL{web.URL()},
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	if _, err := x509.CreateCertificate(rand.Reader, template, f.certificate, request.PublicKey, f.key); err != nil {
		b.Fatal(err)
	}
}
