package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"troth.dev/troth/api"
	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/internal/dev"
)

// What `troth authority status --exit-code` says by its exit code alone. The
// output has said the rest.
var (
	errStepBlocked = errors.New("the next step is blocked")
	errOverdue     = errors.New("a change is overdue")
)

func authorityCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "authority",
		Short: "Replace the authorities that sign SVIDs",
		Long: `Replace the authorities that sign the SVIDs of a trust domain. An authority is
prepared (trusted, signs nothing), then active (the one that signs), then old or
tainted (trusted until nothing depends on it), then revoked. The server makes no
step too early, and says what is in the way.

An ID may be cut short, to four digits or more that no other authority begins with.

Without --server it is about the "troth dev" that runs in the folder --dir.

The exit code is 0 if all went well, 2 if a flag or an argument is wrong, 3 if
something is in the way of the change, and 1 if something else failed. Of status
--exit-code it is 3 if the next step is blocked, and 4 if a change is overdue.`,
		Args: inputArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	// The commands below inherit it.
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return inputError{err} })
	cmd.AddCommand(authorityListCommand(), authorityStatusCommand(), authorityHistoryCommand(),
		authorityPrepareCommand(),
		authorityChangeCommand(authorityChange{
			operation: "activate", short: "Let a prepared authority sign, once every agent trusts it",
			waits: true, forcible: true,
		}),
		authorityChangeCommand(authorityChange{
			operation: "taint", short: "Have what an authority signed replaced soon, the active one's after its successor signs",
			forcible: true,
		}),
		authorityChangeCommand(authorityChange{
			operation: "revoke", short: "Drop an old or tainted authority, once nothing depends on it",
			waits: true, forcible: true,
		}),
		authorityChangeCommand(authorityChange{
			operation: "abort", short: "Drop a prepared authority, which has signed nothing",
		}),
		authorityRotateCommand())
	return cmd
}

// authorityFlags say how the authorities are reached, and how the answer is
// printed.
type authorityFlags struct {
	operatorFlags
	dir    string
	output string
}

func (f *authorityFlags) flags(cmd *cobra.Command) {
	f.operatorFlags.flags(cmd)
	cmd.Flags().StringVar(&f.dir, "dir", defaultDir(), "folder of a running troth dev, in the place of --server")
	cmd.Flags().StringVarP(&f.output, "output", "o", "text", "text or json")
}

// check returns an error unless the flags go together.
func (f *authorityFlags) check(cmd *cobra.Command) error {
	if f.given() && cmd.Flags().Changed("dir") {
		return inputErrorf("--dir takes the place of a cluster: leave --server out")
	}
	return checkOutput(f.output, "text", "json")
}

// authorities is the AuthorityService of a trust domain. The caller closes it.
type authorities struct {
	client trothv1.AuthorityServiceClient
	conn   *grpc.ClientConn
}

func (a *authorities) close() { a.conn.Close() }

// dial checks the flags and returns the service that they describe.
func (f *authorityFlags) dial(cmd *cobra.Command) (*authorities, error) {
	if err := f.check(cmd); err != nil {
		return nil, err
	}
	var conn *grpc.ClientConn
	var err error
	if f.given() {
		var config api.Config
		if config, err = f.config(); err == nil {
			conn, err = api.Dial(config)
		}
	} else {
		conn, err = dev.DialOperator(cmd.Context(), f.dir)
	}
	if err != nil {
		return nil, err
	}
	return &authorities{client: trothv1.NewAuthorityServiceClient(conn), conn: conn}, nil
}

// callPatience bounds each call.
const callPatience = 15 * time.Second

// status asks for all there is to know about the authorities.
func (a *authorities) status(ctx context.Context) (*trothv1.AuthorityStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, callPatience)
	defer cancel()
	response, err := a.client.GetAuthorityStatus(ctx, &trothv1.GetAuthorityStatusRequest{})
	if err != nil {
		return nil, callError("ask for the authorities", err)
	}
	return response.GetStatus(), nil
}

// order is what a change is asked for with.
type order struct {
	id     string
	reason string
	force  bool
}

// change asks for a change of an authority and returns what became of it. What
// was begun is waited for, whatever ends ctx: whether it was made decides over
// what to say.
func (a *authorities) change(ctx context.Context, operation string, o order) (*trothv1.AuthorityRecord, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callPatience)
	defer cancel()
	var response interface {
		GetAuthority() *trothv1.AuthorityRecord
	}
	var err error
	switch operation {
	case "prepare":
		response, err = a.client.PrepareAuthority(ctx, &trothv1.PrepareAuthorityRequest{Reason: o.reason})
	case "activate":
		response, err = a.client.ActivateAuthority(ctx, &trothv1.ActivateAuthorityRequest{Id: o.id, Reason: o.reason, Force: o.force})
	case "taint":
		response, err = a.client.TaintAuthority(ctx, &trothv1.TaintAuthorityRequest{Id: o.id, Reason: o.reason, Force: o.force})
	case "revoke":
		response, err = a.client.RevokeAuthority(ctx, &trothv1.RevokeAuthorityRequest{Id: o.id, Reason: o.reason, Force: o.force})
	case "abort":
		response, err = a.client.AbortAuthority(ctx, &trothv1.AbortAuthorityRequest{Id: o.id, Reason: o.reason})
	default:
		return nil, fmt.Errorf("there is no operation %q on authorities", operation)
	}
	if err != nil {
		return nil, callError(strings.TrimSpace(operation+" "+short(o.id)), err)
	}
	return response.GetAuthority(), nil
}

// callFailure is why a call failed, as its status tells it.
type callFailure struct {
	doing  string
	reason string // of google.rpc.ErrorInfo; may be empty
	err    error  // the status
}

func (f *callFailure) Error() string {
	text := f.doing + ": "
	if f.reason != "" {
		text += printable(f.reason) + ": "
	}
	return text + printable(status.Convert(f.err).Message())
}

func (f *callFailure) Unwrap() error { return f.err }

// refusedError says that something is in the way of a change.
type refusedError struct {
	err     error
	blocked *trothv1.Blocked // nil if the server did not say more
	known   time.Time        // the moment that ages are as of, if it is known
	waited  time.Duration    // for it to go away
}

func (e *refusedError) Error() string {
	if e.blocked == nil {
		return e.err.Error()
	}
	var text strings.Builder
	operation, id := printable(e.blocked.GetOperation()), short(e.blocked.GetAuthorityId())
	if e.waited >= time.Second {
		fmt.Fprintf(&text, "%s %s: still blocked after %s\n", operation, id, ageText(e.waited))
	} else {
		fmt.Fprintf(&text, "%s %s: something is in the way\n", operation, id)
	}
	out := &printer{w: &text}
	out.obstacles(e.blocked, e.known)
	if breaks := forceBreaks(operation); e.blocked.GetForcible() && breaks != "" {
		out.line("  troth authority %s %s --force --reason WHY does it all the same: %s", operation, id, breaks)
	}
	return strings.TrimSuffix(text.String(), "\n")
}

func (e *refusedError) Unwrap() error { return e.err }

// callError says what a call was for, and how it failed: a refusedError if
// something is in the way, an inputError if what was asked for is wrong.
func callError(doing string, err error) error {
	failure := &callFailure{doing: doing, err: err}
	var blocked *trothv1.Blocked
	for _, detail := range status.Convert(err).Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			failure.reason = detail.GetReason()
		case *trothv1.Blocked:
			blocked = detail
		}
	}
	switch {
	case status.Code(err) == codes.FailedPrecondition:
		return &refusedError{err: failure, blocked: blocked}
	case failure.reason == "ORDER_INVALID", failure.reason == "UNKNOWN_AUTHORITY":
		return inputError{failure}
	default:
		return failure
	}
}

// wholeID and partOfID are what an operator may give for an authority.
var (
	wholeID  = regexp.MustCompile(`^[0-9a-f]{40}$`)
	partOfID = regexp.MustCompile(`^[0-9a-f]{4,39}$`)
)

// find returns the ID of the authority that begins with the text, if it is the
// only one. A whole ID is left for the server to know.
func find(s *trothv1.AuthorityStatus, text string) (string, error) {
	prefix := strings.ToLower(text)
	if wholeID.MatchString(prefix) {
		return prefix, nil
	}
	if !partOfID.MatchString(prefix) {
		return "", inputErrorf("%q is not the ID of an authority: 40 hexadecimal digits, or at least the first 4", text)
	}
	var found []string
	for _, a := range s.GetAuthorities() {
		if strings.HasPrefix(a.GetId(), prefix) {
			found = append(found, a.GetId())
		}
	}
	switch len(found) {
	case 0:
		return "", inputErrorf("there is no authority %q", text)
	case 1:
		return found[0], nil
	default:
		return "", inputErrorf("%q may be one of several authorities: %s", text, strings.Join(found, ", "))
	}
}

func authorityListCommand() *cobra.Command {
	var f authorityFlags
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the authorities, in the order in which they were made",
		Long: `List the authorities, in the order in which they were made. AGE is how long an
authority has been in its state; of the first one, for how long it has been valid.
SVIDS and CONNECTIONS are what agents report under it. The JSON is the
AuthorityStatus of the protocol.`,
		Args: inputArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return f.show(cmd, (*printer).authorities)
		},
	}
	f.flags(cmd)
	return cmd
}

func authorityStatusCommand() *cobra.Command {
	var f authorityFlags
	var exitCode bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the authorities, what agents have proved, and what is in the way of the next step",
		Long: `Show the authorities, how many agents have proved that they trust the one that is
prepared, what is in the way of the next step of each, and what to do about it. The
JSON is the AuthorityStatus of the protocol.

The exit code is 0. With --exit-code it is 4 if a change is overdue that the server
should have made, and otherwise 3 if the next step of an authority is blocked. An
old authority is blocked for as long as something depends on it.`,
		Args: inputArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			var shown *trothv1.AuthorityStatus
			err := f.show(cmd, func(p *printer, s *trothv1.AuthorityStatus) { p.status(s) }, &shown)
			switch {
			case err != nil || !exitCode:
				return err
			case shown.GetOverdue() != nil:
				return errOverdue
			}
			for _, a := range shown.GetAuthorities() {
				if a.GetBlocked() != nil {
					return errStepBlocked
				}
			}
			return nil
		},
	}
	f.flags(cmd)
	cmd.Flags().BoolVar(&exitCode, "exit-code", false, "exit with 3 if the next step is blocked, 4 if a change is overdue")
	return cmd
}

// show asks for the status, prints it, and leaves it where it is wanted.
func (f *authorityFlags) show(cmd *cobra.Command, text func(*printer, *trothv1.AuthorityStatus), keep ...**trothv1.AuthorityStatus) error {
	a, err := f.dial(cmd)
	if err != nil {
		return err
	}
	defer a.close()
	s, err := a.status(cmd.Context())
	if err != nil {
		return err
	}
	for _, k := range keep {
		*k = s
	}
	if f.output == "json" {
		return printProto(cmd.OutOrStdout(), s)
	}
	text(newPrinter(cmd.OutOrStdout()), s)
	return nil
}

func authorityHistoryCommand() *cobra.Command {
	var f authorityFlags
	cmd := &cobra.Command{
		Use:   "history",
		Short: "Show what became of authorities, who wanted it and why, the newest first",
		Long: `Show what became of authorities, who wanted it and why: the last 200 changes, the
newest first. The JSON is the ListAuthorityChangesResponse of the protocol, which
also has the evidence that each was decided by.`,
		Args: inputArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			a, err := f.dial(cmd)
			if err != nil {
				return err
			}
			defer a.close()
			ctx, cancel := context.WithTimeout(cmd.Context(), callPatience)
			defer cancel()
			response, err := a.client.ListAuthorityChanges(ctx, &trothv1.ListAuthorityChangesRequest{})
			if err != nil {
				return callError("ask what became of the authorities", err)
			}
			if f.output == "json" {
				return printProto(cmd.OutOrStdout(), response)
			}
			newPrinter(cmd.OutOrStdout()).history(response.GetChanges())
			return nil
		},
	}
	f.flags(cmd)
	return cmd
}

func authorityPrepareCommand() *cobra.Command {
	var f authorityFlags
	var o order
	cmd := &cobra.Command{
		Use:   "prepare",
		Short: "Add an authority that signs nothing yet, so that agents come to trust it",
		Args:  inputArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			a, err := f.dial(cmd)
			if err != nil {
				return err
			}
			defer a.close()
			record, err := a.change(cmd.Context(), "prepare", o)
			if err != nil {
				return err
			}
			return f.became(cmd, "prepare", record)
		},
	}
	f.flags(cmd)
	reasonFlag(cmd, &o)
	return cmd
}

func reasonFlag(cmd *cobra.Command, o *order) {
	cmd.Flags().StringVar(&o.reason, "reason", "", "why, in one line, for the record")
}

// authorityChange is a command that changes one authority.
type authorityChange struct {
	operation, short string
	waits, forcible  bool // whether it has --wait, and --force
}

func authorityChangeCommand(c authorityChange) *cobra.Command {
	var f authorityFlags
	var o order
	var wait bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   c.operation + " ID",
		Short: c.short,
		Args:  inputArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case o.force && strings.TrimSpace(o.reason) == "":
				return inputErrorf("--force demands a --reason, for the record")
			case o.force && wait:
				return inputErrorf("--force does not wait: leave --wait out")
			case cmd.Flags().Changed("timeout") && !wait:
				return inputErrorf("--timeout is of use only with --wait")
			}
			if err := checkTimeout(cmd, timeout); err != nil {
				return err
			}
			a, err := f.dial(cmd)
			if err != nil {
				return err
			}
			defer a.close()
			s, err := a.status(cmd.Context())
			if err != nil {
				return err
			}
			if o.id, err = find(s, args[0]); err != nil {
				return err
			}
			if wait {
				d := drive{order: o, timeout: timeout, report: f.reporter(cmd.ErrOrStderr()), next: func(s *trothv1.AuthorityStatus) (rotateStep, error) {
					return only(s, c.operation, o.id), nil
				}}
				if f.output == "json" {
					d.report.mode = silent
				}
				if _, err := a.drive(cmd.Context(), s, d); err != nil {
					return f.refused(cmd, err)
				}
			}
			// Repeated, it returns what is so already.
			record, err := a.change(cmd.Context(), c.operation, o)
			if refused := (*refusedError)(nil); errors.As(err, &refused) {
				refused.known = s.GetPropagation().GetKnownAt().AsTime()
			}
			if err != nil {
				return f.refused(cmd, err)
			}
			return f.became(cmd, c.operation, record)
		},
	}
	f.flags(cmd)
	reasonFlag(cmd, &o)
	if c.forcible {
		cmd.Flags().BoolVar(&o.force, "force", false, "do it against the evidence: "+forceBreaks(c.operation))
	}
	if c.waits {
		cmd.Flags().BoolVar(&wait, "wait", false, "wait until nothing is in the way")
		timeoutFlag(cmd, &timeout)
	}
	return cmd
}

func timeoutFlag(cmd *cobra.Command, timeout *time.Duration) {
	cmd.Flags().DurationVar(timeout, "timeout", 0, "how long a step may be blocked; without it, for a life of an SVID and 15 minutes")
}

func checkTimeout(cmd *cobra.Command, timeout time.Duration) error {
	if cmd.Flags().Changed("timeout") && timeout <= 0 {
		return inputErrorf("--timeout %v: it must be more than 0", timeout)
	}
	return nil
}

// became prints what became of an authority.
func (f *authorityFlags) became(cmd *cobra.Command, operation string, record *trothv1.AuthorityRecord) error {
	if f.output == "json" {
		return printProto(cmd.OutOrStdout(), record)
	}
	_, err := fmt.Fprintln(cmd.OutOrStdout(), became(operation, record))
	return err
}

// refused prints for programs what is in the way, if it is that, and returns err.
func (f *authorityFlags) refused(cmd *cobra.Command, err error) error {
	if refused := (*refusedError)(nil); f.output == "json" && errors.As(err, &refused) && refused.blocked != nil {
		if err := printProto(cmd.OutOrStdout(), refused.blocked); err != nil {
			return err
		}
	}
	return err
}

// printProto prints a message as protobuf spells it in JSON, with the fields that
// are zero, and indented as all our JSON is.
func printProto(w io.Writer, message proto.Message) error {
	raw, err := rawJSON(message)
	if err != nil {
		return err
	}
	return printJSON(w, raw)
}

func rawJSON(message proto.Message) (json.RawMessage, error) {
	spelled, err := protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(message)
	if err != nil {
		return nil, err
	}
	// protojson puts spaces here and there, lest somebody compares its bytes.
	var plain bytes.Buffer
	err = json.Compact(&plain, spelled)
	return plain.Bytes(), err
}
