// Command workload is an application that takes its identity from the SPIFFE Workload
// API by itself. It prints how long its first SVID took from its own start, and then
// each SVID that it is given, as lines of JSON.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

func main() {
	begin := time.Now()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, begin); err != nil {
		fmt.Fprintln(os.Stderr, "workload:", err)
		os.Exit(1)
	}
}

// SVID is a line of the output.
type SVID struct {
	ID       string
	Serial   string
	NotAfter time.Time
	After    time.Duration // since the program began, in nanoseconds
}

type watcher struct{ begin time.Time }

// OnX509ContextUpdate prints the SVID.
func (w watcher) OnX509ContextUpdate(x *workloadapi.X509Context) {
	svid := x.DefaultSVID()
	_ = json.NewEncoder(os.Stdout).Encode(SVID{
		ID:       svid.ID.String(),
		Serial:   svid.Certificates[0].SerialNumber.String(),
		NotAfter: svid.Certificates[0].NotAfter,
		After:    time.Since(w.begin),
	})
}

// OnX509ContextWatchError prints what went wrong; the library tries again.
func (watcher) OnX509ContextWatchError(err error) { fmt.Fprintln(os.Stderr, err) }

// run watches the socket that SPIFFE_ENDPOINT_SOCKET names until ctx ends.
func run(ctx context.Context, begin time.Time) error {
	client, err := workloadapi.New(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	if err := client.WatchX509Context(ctx, watcher{begin}); ctx.Err() == nil {
		return err
	}
	return nil
}
