package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"troth.dev/troth/api"
	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/mint"
)

func mintExplainCommand() *cobra.Command {
	var f mintExplainFlags
	cmd := &cobra.Command{
		Use:   "explain --token FILE {--rules FILE | --server HOST:PORT ...} [--id SPIFFE_ID] [--ttl TIME]",
		Short: "Say of each rule whether it gives a CI token an identity, and why not",
		Long: `Say of each rule whether it gives a CI token a SPIFFE ID, and why or why not. Nothing
is issued, and the token is not spent.

--token names a file with a token, or with the claims of one as a JSON object; - is
standard input. The signature is not looked at, and may be missing; nor is whether
the token has expired. A token does not leave this machine: to the server go its
claims, without the signature.

The rules are those of a file, as troth-server has them, or those of a server. The
server asks for an operator with the right to explain mintrules: --operator-token.

With --id, the exit code is 1 if no rule gives that SPIFFE ID, and 2 if the token or
the rules cannot be read.`,
		Args: inputArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return f.run(cmd) },
	}
	cmd.Flags().StringVar(&f.rules, "rules", "", "`file` of rules, or - for standard input")
	cmd.Flags().StringVar(&f.ciToken, "token", "", "`file` of a CI token or its claims, or - for standard input; required")
	cmd.Flags().StringVar(&f.id, "id", "", "SPIFFE ID that is asked about (default: what the rules give)")
	cmd.Flags().DurationVar(&f.ttl, "ttl", 0, "life that is asked for (default: as long as the rule permits)")
	cmd.Flags().StringVarP(&f.output, "output", "o", "table", "table or json")
	cmd.Flags().StringVar(&f.operator.server, "server", "", "HOST:PORT of the control plane")
	cmd.Flags().StringVar(&f.operator.trustDomain, "trust-domain", "", "trust domain of the control plane, not that for tests")
	cmd.Flags().StringVar(&f.operator.bundle, "bundle", "", "`file` of the control plane's trust bundle, PEM")
	cmd.Flags().StringVar(&f.operator.token, "operator-token", "", "`file` of the operator's token, for the audience spiffe://TRUST_DOMAIN")
	return cmd
}

type mintExplainFlags struct {
	rules, ciToken, id, output string
	ttl                        time.Duration
	operator                   operatorFlags
}

func (f *mintExplainFlags) run(cmd *cobra.Command) error {
	if err := checkOutput(f.output, "table", "json"); err != nil {
		return err
	}
	switch {
	case f.ciToken == "":
		return inputErrorf("--token names a file, or - for standard input")
	case (f.rules != "") == f.operator.given():
		return inputErrorf("rules are those of a file, --rules, or of a server, --server and what goes with it")
	case f.rules == "-" && f.ciToken == "-":
		return inputErrorf("--rules and --token cannot both be standard input")
	case f.ttl != 0 && f.ttl < mint.MinTTL:
		return inputErrorf("--ttl %v: an SVID lives for %v at least", f.ttl, mint.MinTTL)
	}
	content, err := readBounded(cmd, f.ciToken, 2*mint.MaxClaims)
	if err != nil {
		return inputErrorf("--token: %w", err)
	}
	payload, err := claimsOf(content)
	if err != nil {
		return inputErrorf("--token: %w", err)
	}
	claims, err := mint.ParseClaims(payload)
	if err != nil {
		return inputErrorf("--token: %w", err)
	}
	var verdicts []mintVerdict
	if f.rules != "" {
		verdicts, err = f.explainHere(cmd, claims)
	} else {
		verdicts, err = f.explainThere(cmd.Context(), payload)
	}
	if err != nil {
		return err
	}
	if f.output == "json" {
		if err := printJSON(cmd.OutOrStdout(), verdicts); err != nil {
			return err
		}
	} else {
		rows := [][]string{{"RULE", "SAYS", "BECAUSE"}}
		for _, v := range verdicts {
			rows = append(rows, []string{v.Rule, v.Reason, v.Message})
		}
		newPrinter(cmd.OutOrStdout()).grid(rows)
	}
	for _, v := range verdicts {
		if v.Matched {
			return nil
		}
	}
	if f.id == "" {
		return nil
	}
	return fmt.Errorf("no rule gives this token %s", printable(f.id))
}

// mintVerdict is what one rule says, as it is printed.
type mintVerdict struct {
	Rule    string `json:"rule"`
	Matched bool   `json:"matched"`
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

func (f *mintExplainFlags) explainHere(cmd *cobra.Command, claims mint.Claims) ([]mintVerdict, error) {
	const maxRules = 1 << 20
	content, err := readBounded(cmd, f.rules, maxRules)
	if err != nil {
		return nil, inputErrorf("--rules: %w", err)
	}
	rules, err := mint.Parse(content)
	if err != nil {
		return nil, inputErrorf("--rules %s: %w", f.rules, err)
	}
	var verdicts []mintVerdict
	for _, v := range rules.Explain(claims, f.id, f.ttl) {
		verdicts = append(verdicts, mintVerdict{v.Rule, v.Reason == mint.Matched, string(v.Reason), v.Message})
	}
	return verdicts, nil
}

func (f *mintExplainFlags) explainThere(ctx context.Context, payload []byte) ([]mintVerdict, error) {
	config, err := f.operator.config()
	if err != nil {
		return nil, err
	}
	conn, err := api.Dial(config)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	in := &trothv1.ExplainMintRequest{Claims: payload, SpiffeId: f.id}
	if f.ttl != 0 {
		in.Ttl = durationpb.New(f.ttl)
	}
	out, err := trothv1.NewMintServiceClient(conn).ExplainMint(ctx, in)
	if err != nil {
		return nil, err
	}
	var verdicts []mintVerdict
	for _, v := range out.GetVerdicts() {
		verdicts = append(verdicts, mintVerdict{v.GetRule(), v.GetMatched(), v.GetReason(), v.GetMessage()})
	}
	return verdicts, nil
}

// claimsOf returns the claims of a token, or what already are claims.
func claimsOf(content []byte) ([]byte, error) {
	content = bytes.TrimSpace(content)
	if bytes.HasPrefix(content, []byte("{")) {
		return content, nil
	}
	parts := strings.Split(string(content), ".")
	if len(parts) != 2 && len(parts) != 3 {
		return nil, errors.New("neither a JSON object nor a token of three parts")
	}
	payload, err := base64.RawURLEncoding.Strict().DecodeString(strings.TrimRight(parts[1], "="))
	if err != nil {
		return nil, fmt.Errorf("the token's second part: %w", err)
	}
	return payload, nil
}

// readBounded reads a file, or standard input, of at most limit bytes.
func readBounded(cmd *cobra.Command, path string, limit int64) ([]byte, error) {
	in := cmd.InOrStdin()
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	content, err := io.ReadAll(io.LimitReader(in, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(content)) > limit {
		return nil, fmt.Errorf("%s has more than %d bytes", path, limit)
	}
	return content, nil
}
