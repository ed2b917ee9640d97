package main

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"troth.dev/troth/trothtest/bad"
)

// runBad writes bad certificates, and why each is bad.
func (f *mintFlags) runBad(cmd *cobra.Command, folder *mintFolder, td spiffeid.TrustDomain) error {
	authority, err := bad.NewAuthority(td)
	if err != nil {
		return err
	}
	client, err := spiffeid.FromPath(td, "/ns/test/sa/client")
	if err != nil {
		return err
	}
	gallery, err := bad.Certificates(authority, client)
	if err != nil {
		return err
	}
	chosen, err := chooseBad(gallery, f.bad)
	if err != nil {
		return err
	}
	authorities, err := x509bundle.FromX509Authorities(td, []*x509.Certificate{authority.Certificate}).Marshal()
	if err != nil {
		return err
	}
	var index bytes.Buffer
	for _, c := range chosen {
		var chain bytes.Buffer
		for _, der := range c.Chain {
			if err := pem.Encode(&chain, &pem.Block{Type: "CERTIFICATE", Bytes: der}); err != nil {
				return err
			}
		}
		pkcs8, err := x509.MarshalPKCS8PrivateKey(c.Key)
		if err != nil {
			return err
		}
		err = folder.folder(c.Name, []mintFile{
			{"svid.pem", chain.Bytes()},
			{"key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})},
		})
		if err != nil {
			return err
		}
		fmt.Fprintf(&index, "%s\t%s\t%s\n", client, c.Name, authority.Certificate.NotAfter.UTC().Format(time.RFC3339))
	}
	err = folder.folder(".", []mintFile{
		{"bundle.pem", authorities}, {"README.md", badReadme(client, chosen)}, {mintIndex, index.Bytes()},
	})
	if err != nil {
		return err
	}
	if err := folder.publish(); err != nil {
		return err
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%d bad certificates of %s in %s, and why in %s/README.md\n", len(chosen), td, f.out, f.out)
	return err
}

// chooseBad returns those of the gallery that are named, or all.
func chooseBad(gallery []bad.Certificate, names []string) ([]bad.Certificate, error) {
	if slices.Equal(names, []string{"all"}) {
		return gallery, nil
	}
	var known []string
	byName := make(map[string]bad.Certificate, len(gallery))
	for _, c := range gallery {
		known = append(known, c.Name)
		byName[c.Name] = c
	}
	var chosen []bad.Certificate
	for n, name := range names {
		c, ok := byName[name]
		switch {
		case !ok:
			return nil, inputErrorf("--bad: there is no %q; there are all, or %s", name, strings.Join(known, ", "))
		case slices.Contains(names[:n], name):
			return nil, inputErrorf("--bad: %q is given twice", name)
		}
		chosen = append(chosen, c)
	}
	return chosen, nil
}

// badReadme says why each certificate is bad.
func badReadme(client spiffeid.ID, chosen []bad.Certificate) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "# Bad certificates\n\nA verifier that trusts `bundle.pem` has to refuse each of them. They claim to be `%s`, where what is wrong with them permits it.\n\n", client)
	fmt.Fprintln(&b, "| folder | reason | why |")
	fmt.Fprintln(&b, "|---|---|---|")
	for _, c := range chosen {
		fmt.Fprintf(&b, "| `%s` | `%s` | %s |\n", c.Name, c.Code, c.Reason)
	}
	return b.Bytes()
}
