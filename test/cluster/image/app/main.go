// Command app is an application that knows nothing of mutual TLS: an HTTP server, and
// clients of it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "app:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	switch {
	case len(args) == 2 && args[0] == "serve":
		return serve(ctx, args[1])
	case len(args) == 2 && args[0] == "get":
		answer, err := get(ctx, newClient(), args[1])
		fmt.Println(answer)
		return err
	case len(args) == 3 && args[0] == "load":
		interval, err := time.ParseDuration(args[2])
		if err != nil {
			return err
		}
		return load(ctx, args[1], interval)
	case len(args) == 1 && args[0] == "wait":
		<-ctx.Done()
		return nil
	default:
		return fmt.Errorf("want serve ADDRESS, get URL, load URL INTERVAL or wait, have %q", args)
	}
}

// serve answers every request with the host's name and the caller's address.
func serve(ctx context.Context, address string) error {
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	server := &http.Server{
		Addr:              address,
		ReadHeaderTimeout: 10 * time.Second,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			host, _, err := net.SplitHostPort(r.RemoteAddr)
			if err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
			fmt.Fprintf(w, "%s answers %s", name, host)
		}),
	}
	context.AfterFunc(ctx, func() { _ = server.Shutdown(context.Background()) })
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// newClient returns a client that makes a connection for each request: it sees whoever
// cannot be connected to.
func newClient() *http.Client {
	return &http.Client{
		Timeout:   5 * time.Second,
		Transport: &http.Transport{DisableKeepAlives: true},
	}
}

func get(ctx context.Context, client *http.Client, url string) (string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	response, err := client.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, 1<<16))
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d: %s", response.StatusCode, body)
	}
	return string(body), err
}

// Count is what load prints once a second, as a line of JSON.
type Count struct {
	OK, Failed int
	Error      string // the last one
	At         time.Time
}

// load sends a request every interval, half of them over a new connection and half
// over one that it keeps.
func load(ctx context.Context, url string, interval time.Duration) error {
	kept := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{}}
	clients := []*http.Client{newClient(), kept}
	requests, lines := time.NewTicker(interval), time.NewTicker(time.Second)
	var count Count
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			return nil
		case <-lines.C:
			count.At = time.Now()
			if err := json.NewEncoder(os.Stdout).Encode(count); err != nil {
				return err
			}
			continue
		case <-requests.C:
		}
		if _, err := get(ctx, clients[i%2], url); err != nil {
			count.Failed++
			count.Error = time.Now().Format(time.RFC3339Nano) + " " + err.Error()
			continue
		}
		count.OK++
	}
}
