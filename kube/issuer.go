package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"k8s.io/client-go/kubernetes"
)

// maxDocument bounds the two documents that the API server publishes about its
// tokens, in bytes. One of them with three RSA keys is about 1.5 KB.
const maxDocument = 1 << 20

// Keys returns a function that fetches the keys with which the API server signs
// service-account tokens, as a JWK Set (RFC 7517 §5) of at most 1 MiB, within 3
// seconds. It asks the API server itself: the jwks_uri of the discovery document
// is the address that the API server has for strangers, which pods often cannot
// reach and have no reason to trust.
func Keys(client kubernetes.Interface) func(ctx context.Context) ([]byte, error) {
	return func(ctx context.Context) ([]byte, error) {
		document, err := fetch(ctx, client, "/openid/v1/jwks", "application/jwk-set+json")
		if err != nil {
			return nil, fmt.Errorf("fetch the API server's token keys: %w", err)
		}
		return document, nil
	}
}

// Issuer returns the name by which the API server signs service-account tokens,
// their "iss".
func Issuer(ctx context.Context, client kubernetes.Interface) (string, error) {
	document, err := fetch(ctx, client, "/.well-known/openid-configuration", "application/json")
	if err != nil {
		return "", fmt.Errorf("fetch the API server's token issuer: %w", err)
	}
	var configuration struct {
		Issuer string `json:"issuer"`
	}
	if err := json.Unmarshal(document, &configuration); err != nil {
		return "", fmt.Errorf("read the API server's token issuer: %w", err)
	}
	if configuration.Issuer == "" {
		return "", errors.New("the API server names no token issuer")
	}
	return configuration.Issuer, nil
}

func fetch(ctx context.Context, client kubernetes.Interface, path, mediaType string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	body, err := client.Discovery().RESTClient().Get().AbsPath(path).SetHeader("Accept", mediaType).Stream(ctx)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	document, err := io.ReadAll(io.LimitReader(body, maxDocument+1))
	if err != nil {
		return nil, err
	}
	if len(document) > maxDocument {
		return nil, fmt.Errorf("more than %d bytes", maxDocument)
	}
	return document, nil
}
