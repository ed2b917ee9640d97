package hbone_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"

	"troth.dev/troth/agent/hbone"
)

func TestEcho(t *testing.T) {
	for name, buffer := range map[string]func(net.Conn) net.Conn{"buffered": hbone.Buffer, "as it comes": unbuffered} {
		t.Run(name, func(t *testing.T) {
			caller, callee := securePair(t, buffer)
			tunnel := tunnelOn(t, caller, callee, hbone.Config{}, echo)
			var all sync.WaitGroup
			for n := range 8 {
				all.Go(func() {
					s := connect(t, tunnel, fmt.Sprintf("10.0.0.1:%d", 8000+n))
					defer s.Close()
					assertEcho(t, s, 1<<20+n)
				})
			}
			all.Wait()
			if n := tunnel.Streams(); n != 0 {
				t.Errorf("%d streams are left", n)
			}
		})
	}
}

func assertEcho(t *testing.T, s *hbone.Stream, size int) {
	t.Helper()
	want := make([]byte, size)
	rand.Read(want)
	var sending sync.WaitGroup
	sending.Go(func() {
		if _, err := s.Write(want); err != nil {
			t.Errorf("write: %v", err)
		}
		s.CloseWrite()
	})
	got, err := io.ReadAll(s)
	sending.Wait()
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %d bytes and then %v, want the %d that were sent, and the end", len(got), err, len(want))
	}
}

func TestRefusal(t *testing.T) {
	tunnel := tunnel(t, hbone.Config{}, func(r *hbone.Request) { r.Refuse(401) })
	_, _, err := tunnel.Connect(context.Background(), "10.0.0.1:80", nil)
	var refused *hbone.StatusError
	if !errors.As(err, &refused) || refused.Status != 401 {
		t.Errorf("the error is %v, want the status 401", err)
	}
}

func TestHeaders(t *testing.T) {
	got := make(chan *hbone.Request, 1)
	tunnel := tunnel(t, hbone.Config{}, func(r *hbone.Request) {
		got <- r
		r.Accept(hbone.Header{"troth-renewed": "yes"})
	})
	s, answer, err := tunnel.Connect(context.Background(), "renew", hbone.Header{"troth-renew": "abc"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if r := <-got; r.Authority != "renew" || r.Header["troth-renew"] != "abc" || len(r.Header) != 1 {
		t.Errorf("the request is %+v", r)
	}
	if answer["troth-renewed"] != "yes" || len(answer) != 1 {
		t.Errorf("the answer is %v", answer)
	}
}
