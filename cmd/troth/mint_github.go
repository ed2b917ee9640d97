package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
)

// githubToken asks the runner's token service for the OIDC token of the job, as
// GitHub documents it for those who write actions: a GET of the address in one
// variable, with the secret in another.
func githubToken(ctx context.Context, audience string) (string, error) {
	const limit = 64 << 10
	address, secret := os.Getenv("ACTIONS_ID_TOKEN_REQUEST_URL"), os.Getenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN")
	if address == "" || secret == "" {
		return "", inputErrorf("--github: ACTIONS_ID_TOKEN_REQUEST_URL and ACTIONS_ID_TOKEN_REQUEST_TOKEN are not set: does the job have the permission id-token: write?")
	}
	where, err := url.Parse(address)
	if err != nil {
		return "", inputErrorf("--github: ACTIONS_ID_TOKEN_REQUEST_URL is no address")
	}
	query := where.Query()
	query.Set("audience", audience)
	where.RawQuery = query.Encode()

	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, where.String(), nil)
	if err != nil {
		return "", fmt.Errorf("ask GitHub for a token: %w", err)
	}
	request.Header.Set("Authorization", "bearer "+secret)
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", fmt.Errorf("ask GitHub for a token: %w", err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return "", fmt.Errorf("ask GitHub for a token: %s", response.Status)
	}
	var answer struct {
		Value string `json:"value"`
	}
	if err := json.NewDecoder(io.LimitReader(response.Body, limit)).Decode(&answer); err != nil {
		return "", fmt.Errorf("ask GitHub for a token: read the answer: %w", err)
	}
	// What would not fit into a header is no token.
	if answer.Value == "" || strings.ContainsFunc(answer.Value, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fmt.Errorf("ask GitHub for a token: the answer has none")
	}
	return answer.Value, nil
}
