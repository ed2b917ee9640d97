package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"syscall"
	"testing"

	"troth.dev/troth/agent/workload"
)

// An agent that is started while the one before it still ends waits for what that one
// has, a port or a socket, and takes it.
func TestWhenFree(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	port := "127.0.0.1:0"
	for name, listen := range map[string]func() (net.Listener, error){
		"port":   func() (net.Listener, error) { return net.Listen("tcp", port) },
		"socket": func() (net.Listener, error) { return workload.Listen(path) },
	} {
		t.Run(name, func(t *testing.T) {
			before, err := listen()
			if err != nil {
				t.Fatal(err)
			}
			if name == "port" {
				port = before.Addr().String()
			}
			waiting := make(chan struct{})
			said := slog.New(slog.NewTextHandler(first(waiting), nil))
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			go func() {
				<-waiting
				before.Close()
			}()
			after, err := whenFree(ctx, said, listen)
			if err != nil {
				t.Fatalf("whenFree() = %v", err)
			}
			defer after.Close()

			// Whoever is told to end meanwhile ends.
			again := make(chan struct{})
			go func() {
				<-again
				cancel()
			}()
			if _, err := whenFree(ctx, slog.New(slog.NewTextHandler(first(again), nil)), listen); !errors.Is(err, context.Canceled) || !errors.Is(err, syscall.EADDRINUSE) {
				t.Errorf("whenFree() = %v, want that it was ended, and why it waited", err)
			}
		})
	}
}

// first is closed when the first line is written to it.
type first chan struct{}

func (f first) Write(p []byte) (int, error) {
	close(f)
	return len(p), nil
}
