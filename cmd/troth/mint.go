package main

import (
	"context"
	"fmt"
	"runtime"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
)

func mintCommand() *cobra.Command {
	var f mintFlags
	cmd := &cobra.Command{
		Use:   "mint (--spiffe-id ID... | --file LIST | --bad NAMES) (--ephemeral | --server HOST:PORT) --out DIR",
		Short: "Make identities for tests: one or hundreds, of a server or of an authority of the moment",
		Long: `Make identities for tests, one or hundreds in one call, in the form that the
program under test reads.

With --ephemeral an authority is made that lives in this process and signs nothing
after it. With --server, a server of Troth signs, if one of its rules gives the
identities to the token: of --token, of the environment variable TROTH_TOKEN, or,
with --github, of the GitHub job that this runs in.

Either way the identities are of a trust domain for tests: verifiers in production
refuse them. Keys are made here and sent nowhere.

DIR is made whole or not at all, readable by its owner alone:

  DIR/identities.tsv  SPIFFE ID, folder and end of each
  DIR/bundle.pem      what verifies them
  DIR/NAME/           one folder for each identity; NAME is the ID's path with + for /

and by --format:

  pem         NAME/svid.pem, NAME/key.pem
  pkcs12      NAME/keystore.p12, DIR/truststore.p12; their password is in
              DIR/password, unless --password-file has it
  jks         NAME/keystore.jks, DIR/truststore.jks; the password as with pkcs12
  k8s-secret  NAME/secret.yaml: a Secret of type kubernetes.io/tls
  env         NAME/env.sh: exports for a shell. Without --out, one identity's are printed

With --bad the certificates are such as a verifier must refuse: those named, or all.
DIR/README.md says why each.

The exit code is 0 if all identities are there, 2 if a flag or the list is wrong, and
1 if something else failed. Then DIR is as it was.`,
		Args: inputArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return f.run(cmd) },
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return inputError{err} })
	f.flags(cmd)
	cmd.AddCommand(mintExplainCommand())
	return cmd
}

// mintFlags say what to mint, by whom, and where to put it.
type mintFlags struct {
	ids  []string
	file string
	bad  []string
	ttl  time.Duration

	ephemeral   bool
	server      string
	trustDomain string
	bundle      string
	token       string
	github      string // audience

	out          string
	format       string
	passwordFile string
	force        bool
}

func (f *mintFlags) flags(cmd *cobra.Command) {
	cmd.Flags().StringArrayVar(&f.ids, "spiffe-id", nil, "SPIFFE `ID` to mint; may be repeated")
	cmd.Flags().StringVarP(&f.file, "file", "f", "", "`file` with a SPIFFE ID on each line, # before a comment; - for standard input")
	cmd.Flags().StringSliceVar(&f.bad, "bad", nil, "`names` of bad certificates, with commas between, or all; with --ephemeral")
	cmd.Flags().DurationVar(&f.ttl, "ttl", 10*time.Minute, "how long they live")
	cmd.Flags().BoolVar(&f.ephemeral, "ephemeral", false, "sign with an authority of the moment, in the place of a server's")
	cmd.Flags().StringVar(&f.server, "server", "", "HOST:PORT of the control plane")
	cmd.Flags().StringVar(&f.trustDomain, "trust-domain", "", "trust domain of the control plane; with --ephemeral, the one to make: that of the IDs if empty")
	cmd.Flags().StringVar(&f.bundle, "bundle", "", "`file` of the control plane's trust bundle, PEM")
	cmd.Flags().StringVar(&f.token, "token", "", "`file` of the CI job's token; TROTH_TOKEN of the environment if empty")
	cmd.Flags().StringVar(&f.github, "github", "", "ask GitHub for the job's token, for this `audience`; the job needs the permission id-token: write")
	cmd.Flags().StringVar(&f.out, "out", "", "`folder` to make; it must not be there, or be empty")
	cmd.Flags().StringVar(&f.format, "format", "pem", "pem, pkcs12, jks, k8s-secret or env")
	cmd.Flags().StringVar(&f.passwordFile, "password-file", "", "`file` with the password of key stores; one is made if empty")
	cmd.Flags().BoolVar(&f.force, "force", false, "replace the folder, if mint made it")
}

// run does all of it. What can be found wrong is found before a token is spent.
func (f *mintFlags) run(cmd *cobra.Command) error {
	if err := f.check(cmd); err != nil {
		return err
	}
	ids, td, err := f.identities(cmd)
	if err != nil {
		return err
	}
	format, err := f.formatted()
	if err != nil {
		return err
	}
	var folder *mintFolder
	if f.out != "" {
		if folder, err = newMintFolder(f.out, f.force); err != nil {
			return err
		}
		defer folder.close()
	}
	if len(f.bad) > 0 {
		return f.runBad(cmd, folder, td)
	}

	var by issuance
	if f.ephemeral {
		by, err = openEphemeral(cmd.Context(), td, f.ttl)
	} else {
		by, err = f.dial(cmd.Context())
	}
	if err != nil {
		return err
	}
	defer by.close()
	minted, bundle, err := mintAll(cmd.Context(), by, ids, f.ttl)
	if err != nil {
		return err
	}
	if folder == nil {
		authorities, err := bundle.Marshal()
		if err != nil {
			return err
		}
		script, err := envScript(minted[0], authorities)
		if err != nil {
			return err
		}
		_, err = cmd.OutOrStdout().Write(script)
		return err
	}
	if err := folder.write(minted, bundle, format); err != nil {
		return err
	}
	if err := folder.publish(); err != nil {
		return err
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s of %s in %s, until %s\n",
		identities(len(minted)), td, f.out, earliest(minted).UTC().Format(time.RFC3339))
	return err
}

// check returns an error unless the flags go together.
func (f *mintFlags) check(cmd *cobra.Command) error {
	kinds := 0
	for _, name := range []string{"spiffe-id", "file", "bad"} {
		if cmd.Flags().Changed(name) {
			kinds++
		}
	}
	switch {
	case kinds != 1:
		return inputErrorf("one of --spiffe-id, --file and --bad is required")
	case f.ephemeral == (f.server != ""):
		return inputErrorf("one of --ephemeral and --server is required")
	case f.ephemeral && (f.bundle != "" || f.token != "" || f.github != ""):
		return inputErrorf("--ephemeral asks no server: leave --bundle, --token and --github out")
	case !f.ephemeral && (f.trustDomain == "" || f.bundle == ""):
		return inputErrorf("--server, --trust-domain and --bundle go together")
	case f.github != "" && f.token != "":
		return inputErrorf("--token and --github are two ways to the same: leave one out")
	case len(f.bad) > 0 && (!f.ephemeral || f.trustDomain == ""):
		return inputErrorf("--bad goes with --ephemeral and --trust-domain: no server signs such a thing")
	case len(f.bad) > 0 && (f.format != "pem" || cmd.Flags().Changed("ttl")):
		return inputErrorf("--bad writes PEM, with the life that each certificate has to have: leave --format and --ttl out")
	case f.ttl <= 0 || f.ttl > 24*time.Hour:
		return inputErrorf("--ttl %v: it must be more than 0 and at most 24h", f.ttl)
	case f.ttl != f.ttl.Truncate(time.Second):
		return inputErrorf("--ttl %v: certificates count whole seconds", f.ttl)
	case f.out == "" && f.format != "env":
		return inputErrorf("--out is required")
	case f.passwordFile != "" && f.format != "pkcs12" && f.format != "jks":
		return inputErrorf("--password-file is of use only with --format pkcs12 or jks")
	}
	return nil
}

// maxServerIDs is how many identities MintX509SVIDs takes in one call. A token is
// good for one call.
const maxServerIDs = 500

// identities returns the SPIFFE IDs to mint, and their trust domain.
func (f *mintFlags) identities(cmd *cobra.Command) ([]spiffeid.ID, spiffeid.TrustDomain, error) {
	var td spiffeid.TrustDomain
	if f.ephemeral && f.trustDomain != "" {
		var err error
		if td, err = spiffeid.TrustDomainFromString(f.trustDomain); err != nil {
			return nil, td, inputErrorf("--trust-domain: %w", err)
		}
	}
	if len(f.bad) > 0 {
		return nil, td, nil
	}
	var ids mintList
	if f.file != "" {
		if err := readMintList(f.file, cmd.InOrStdin(), &ids); err != nil {
			return nil, td, err
		}
	}
	for _, text := range f.ids {
		if err := ids.add(text); err != nil {
			return nil, td, inputErrorf("--spiffe-id: %w", err)
		}
	}
	switch {
	case len(ids.ids) == 0:
		return nil, td, inputErrorf("%s has no SPIFFE ID", f.file)
	case !f.ephemeral && len(ids.ids) > maxServerIDs:
		return nil, td, inputErrorf("%d identities: a server mints %d for one token", len(ids.ids), maxServerIDs)
	case f.out == "" && len(ids.ids) > 1:
		return nil, td, inputErrorf("the exports of one identity are printed, and there are %d: --out is required", len(ids.ids))
	}
	if td.IsZero() {
		td = ids.ids[0].TrustDomain()
	}
	for _, id := range ids.ids {
		if !id.MemberOf(td) {
			return nil, td, inputErrorf("%q is not of trust domain %q: one call mints for one", id, td)
		}
	}
	return ids.ids, td, nil
}

// issuance is who signs. The caller closes it.
type issuance interface {
	// issue returns a chain for each ID, leaf first, in their order, or fails for
	// all of them.
	issue(ctx context.Context, ids []spiffeid.ID, csrs [][]byte) ([]chain, *x509bundle.Bundle, error)
	close()
}

// chain is the certificates of an identity, DER, leaf first, and its end.
type chain struct {
	certificates [][]byte
	until        time.Time
}

// minted is an identity with its key.
type minted struct {
	chain
	id  spiffeid.ID
	key mintKey
}

// mintAll makes the keys and has all of them signed, or none.
func mintAll(ctx context.Context, by issuance, ids []spiffeid.ID, ttl time.Duration) ([]minted, *x509bundle.Bundle, error) {
	all := make([]minted, len(ids))
	csrs := make([][]byte, len(ids))
	err := inParallel(len(ids), func(n int) (err error) {
		all[n].id = ids[n]
		all[n].key, csrs[n], err = newMintKey()
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	before := time.Now()
	chains, bundle, err := by.issue(ctx, ids, csrs)
	if err != nil {
		return nil, nil, err
	}
	if len(chains) != len(ids) {
		return nil, nil, fmt.Errorf("%d certificates for %d identities", len(chains), len(ids))
	}
	for n := range all {
		all[n].chain = chains[n]
		// A minute for a clock that is ahead of ours.
		if chains[n].until.After(before.Add(ttl + time.Minute + time.Since(before))) {
			return nil, nil, fmt.Errorf("%q lives until %v, longer than the %v asked for", ids[n], chains[n].until, ttl)
		}
	}
	return all, bundle, nil
}

// inParallel calls do for each number below n, on all processors, and returns the
// first error.
func inParallel(n int, do func(n int) error) error {
	var group errgroup.Group
	workers := min(runtime.GOMAXPROCS(0), n)
	for worker := range workers {
		group.Go(func() error {
			for k := worker; k < n; k += workers {
				if err := do(k); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return group.Wait()
}

func earliest(all []minted) time.Time {
	until := all[0].until
	for _, m := range all {
		if m.until.Before(until) {
			until = m.until
		}
	}
	return until
}

func identities(n int) string {
	if n == 1 {
		return "1 identity"
	}
	return fmt.Sprintf("%d identities", n)
}
