package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"time"

	"golang.org/x/term"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	trothv1 "troth.dev/troth/api/troth/v1"
	"troth.dev/troth/internal/latest"
)

// errInterrupted says that the command was ended before it was done.
var errInterrupted = errors.New("interrupted: what was done stays")

// drive is a way through steps, each of which may have to be waited for.
type drive struct {
	order   order         // whose reason goes with each step
	timeout time.Duration // of each step; 0 for the default
	report  *reporter
	// next returns what comes next by what there is.
	next func(*trothv1.AuthorityStatus) (rotateStep, error)
}

// drive takes the steps from where s is to the end, and returns the last that it
// has seen. It returns errInterrupted when ctx ends, a refusedError if a step is
// blocked for too long or by what no waiting removes, and the server's error if
// that is final.
func (a *authorities) drive(ctx context.Context, s *trothv1.AuthorityStatus, d drive) (last *trothv1.AuthorityStatus, err error) {
	defer d.report.clear()
	watching, stop := context.WithCancel(ctx)
	var seen latest.Value[view]
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		a.watch(watching, &seen)
	}()
	defer func() {
		stop()
		<-ended
	}()

	timeout := d.timeout
	if timeout == 0 {
		timeout = s.GetSvidLife().AsDuration() + 15*time.Minute
	}
	news := func(told *trothv1.AuthorityStatus) {
		if isNewer(s, told) {
			d.report.changes(s, told)
			s = told
		}
	}
	const soon = time.Second
	var streamed *trothv1.AuthorityStatus // what the stream told last
	var before rotateStep
	began, ask := time.Now(), time.Now().Add(untilGone(s))
	for {
		v, changed := seen.Load()
		if v.final {
			return s, v.lost
		}
		d.report.connection(v.lost)
		if v.status != streamed {
			streamed = v.status
			news(streamed)
			ask = time.Now().Add(untilGone(s))
		}
		if !time.Now().Before(ask) {
			// What no stream tells: that time has passed.
			if asked, err := a.status(ctx); err == nil { // a failure is the stream's to tell
				news(asked)
			}
			ask = time.Now().Add(untilGone(s))
		}

		now, err := d.next(s)
		if err != nil || now.done() {
			return s, err
		}
		if now.do != before.do || now.id != before.id {
			before, began = now, time.Now()
		}
		left := time.Until(began.Add(timeout))
		shown := progressOf(s, now)
		if now.waits == nil {
			now.waits, err = a.take(ctx, now, d.order)
			switch {
			case isFinal(err) || err != nil && left <= 0:
				return s, err
			case err != nil:
				shown = progress{text: err.Error() + ": trying again", key: err.Error()}
			case now.waits != nil:
				shown = progressOf(s, now)
			default:
				// A replica that does not know it yet may be the one that answers.
				if asked, err := a.status(ctx); err == nil && asked.GetRevision() > s.GetRevision() {
					news(asked)
					continue
				}
			}
			ask = time.Now().Add(soon)
			changed = nil // not faster, whatever the stream tells meanwhile
		}
		if now.waits != nil && (left <= 0 || !passes(now.waits)) {
			return s, &refusedError{blocked: now.waits, known: asOf(s), waited: time.Since(began), err: errors.New("blocked")}
		}
		wake := time.Until(ask)
		if left > 0 {
			wake = min(wake, left)
		}
		if again := d.report.progress(shown, s); again > 0 {
			wake = min(wake, again)
		}
		timer := time.NewTimer(max(0, wake))
		select {
		case <-ctx.Done():
			timer.Stop()
			return s, errInterrupted
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// take takes a step, and returns what is in the way if the server knows of
// something by now.
func (a *authorities) take(ctx context.Context, now rotateStep, o order) (*trothv1.Blocked, error) {
	_, err := a.change(ctx, now.do, order{id: now.id, reason: o.reason})
	if refused := (*refusedError)(nil); errors.As(err, &refused) && refused.blocked != nil {
		return refused.blocked, nil
	}
	return nil, err
}

// pause waits and reports whether ctx goes on.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// isNewer reports whether b tells more than a. Replicas learn of changes one after
// the other, and which of them answers is chance.
func isNewer(a, b *trothv1.AuthorityStatus) bool {
	switch {
	case b == nil:
		return false
	case a.GetRevision() != b.GetRevision():
		return b.GetRevision() > a.GetRevision()
	default:
		return a != b && !b.GetPropagation().GetKnownAt().AsTime().Before(a.GetPropagation().GetKnownAt().AsTime())
	}
}

// untilGone returns when to ask again although nothing was told: when the next
// obstacle is gone that waiting removes, by the server's clock.
func untilGone(s *trothv1.AuthorityStatus) time.Duration {
	const longest = 30 * time.Second
	wait := longest
	for _, a := range s.GetAuthorities() {
		for _, blocker := range a.GetBlocked().GetBlockers() {
			if until := blocker.GetUntil(); until != nil {
				if left := until.AsTime().Sub(asOf(s)); left > 0 {
					wait = min(wait, left+time.Second)
				}
			}
		}
	}
	return wait
}

// view is what a stream has told last, and how it is now.
type view struct {
	status *trothv1.AuthorityStatus
	lost   error // why there is no stream now; nil while there is
	final  bool  // whether there will be none
}

// watch keeps seen current until ctx ends or the server refuses for good. A stream
// that breaks is opened again, later after each failure.
func (a *authorities) watch(ctx context.Context, seen *latest.Value[view]) {
	const shortest, longest = 250 * time.Millisecond, 10 * time.Second
	delay := shortest
	var now view
	for {
		err := a.receive(ctx, func(s *trothv1.AuthorityStatus) {
			delay = shortest
			now = view{status: s}
			seen.Set(now)
		})
		if ctx.Err() != nil {
			return
		}
		now.lost, now.final = err, isFinal(err)
		seen.Set(now)
		if now.final || !pause(ctx, delay/2+rand.N(delay/2)) {
			return
		}
		delay = min(2*delay, longest)
	}
}

// receive hands over what one stream tells, and returns why it ended.
func (a *authorities) receive(ctx context.Context, tell func(*trothv1.AuthorityStatus)) error {
	const doing = "watch the authorities"
	stream, err := a.client.WatchAuthorityStatus(ctx, &trothv1.WatchAuthorityStatusRequest{})
	if err != nil {
		return callError(doing, err)
	}
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return errors.New(doing + ": the server ended the stream")
		}
		if err != nil {
			return callError(doing, err)
		}
		tell(response.GetStatus())
	}
}

// isFinal reports whether the same call fails again however often it is made.
func isFinal(err error) bool {
	switch status.Code(err) {
	case codes.FailedPrecondition, codes.InvalidArgument, codes.NotFound, codes.PermissionDenied, codes.Unauthenticated, codes.Unimplemented:
		return true
	default:
		return false
	}
}

// reporter shows how far something is: on a terminal in a line that is written
// over, elsewhere in lines, or as JSON.
type reporter struct {
	w     io.Writer
	mode  reportMode
	width func() int // of the terminal

	shown string    // key of the progress that was shown last
	at    time.Time // when that was
	live  bool      // whether the cursor is at the end of a line to be written over
	lost  bool      // whether it was told that there is no connection
}

type reportMode int

const (
	silent reportMode = iota
	lines
	terminal
	objects
)

// reporter returns one for what the flags ask for.
func (f *authorityFlags) reporter(w io.Writer) *reporter {
	r := &reporter{w: w, mode: lines}
	if f.output == "json" {
		r.mode = objects
	} else if file, ok := w.(*os.File); ok && term.IsTerminal(int(file.Fd())) {
		r.mode = terminal
		r.width = func() int {
			if width, _, err := term.GetSize(int(file.Fd())); err == nil && width > 0 {
				return width
			}
			return 80
		}
	}
	return r
}

// reportedEvent is a line of JSON.
type reportedEvent struct {
	At      time.Time       `json:"at"`
	Event   string          `json:"event"`
	Message string          `json:"message"`
	Status  json.RawMessage `json:"status,omitempty"`
}

// event shows what stays to be read.
func (r *reporter) event(name, text string, s *trothv1.AuthorityStatus) {
	switch r.mode {
	case silent:
	case objects:
		r.object(name, text, s)
	case lines, terminal:
		r.clear()
		fmt.Fprintln(r.w, text)
	}
}

// changes shows what became of authorities between two moments.
func (r *reporter) changes(before, after *trothv1.AuthorityStatus) {
	for _, line := range changesBetween(before, after) {
		r.event("change", line, after)
	}
}

// connection shows that the connection was lost, or is there again, if that is news.
func (r *reporter) connection(lost error) {
	switch {
	case lost != nil && !r.lost:
		r.event("disconnected", lost.Error()+": trying again", nil)
	case lost == nil && r.lost:
		r.event("connected", "connected again", nil)
	}
	r.lost = lost != nil
}

// progress shows how far it is, if that is news, and returns when it wants to be
// called again although it is not: 0 for not at all. It prints no more than a line
// a second.
func (r *reporter) progress(p progress, s *trothv1.AuthorityStatus) (again time.Duration) {
	const every = time.Second
	if r.mode == terminal {
		r.draw(p.text)
		return 0
	}
	if r.mode == silent || p.key == r.shown {
		return 0
	}
	if left := every - time.Since(r.at); left > 0 {
		return left
	}
	r.shown, r.at = p.key, time.Now()
	if r.mode == objects {
		r.object("progress", p.text, s)
	} else {
		fmt.Fprintln(r.w, p.text)
	}
	return 0
}

func (r *reporter) object(name, text string, s *trothv1.AuthorityStatus) {
	e := reportedEvent{At: time.Now().UTC(), Event: name, Message: text}
	if s != nil {
		var err error
		if e.Status, err = rawJSON(s); err != nil {
			e.Status = nil // the message says it
		}
	}
	encoder := json.NewEncoder(r.w)
	encoder.SetEscapeHTML(false)
	_ = encoder.Encode(e) // as with lines, nobody reads it then
}

// draw writes over the line that is there, and no further than the terminal is
// wide: what wraps cannot be written over.
func (r *reporter) draw(text string) {
	if runes := []rune(text); len(runes) >= r.width() {
		text = string(runes[:max(0, r.width()-2)]) + "…"
	}
	if r.live && text == r.shown {
		return
	}
	fmt.Fprint(r.w, "\r\x1b[K"+text)
	r.live, r.shown = true, text
}

// clear takes away the line that is written over.
func (r *reporter) clear() {
	if r.live {
		fmt.Fprint(r.w, "\r\x1b[K")
		r.live = false
	}
}
