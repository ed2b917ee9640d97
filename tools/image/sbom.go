package main

import (
	"bytes"
	"crypto/sha1" // SPDX 2.3 demands it of every file, next to whatever else
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"net/url"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// The parts of SPDX 2.3 that a bill of ours has.
type (
	document struct {
		SPDXVersion       string         `json:"spdxVersion"`
		DataLicense       string         `json:"dataLicense"`
		SPDXID            string         `json:"SPDXID"`
		Name              string         `json:"name"`
		DocumentNamespace string         `json:"documentNamespace"`
		CreationInfo      creationInfo   `json:"creationInfo"`
		Packages          []spdxPackage  `json:"packages"`
		Files             []spdxFile     `json:"files"`
		Relationships     []relationship `json:"relationships"`
	}
	creationInfo struct {
		Created  string   `json:"created"`
		Creators []string `json:"creators"`
	}
	spdxPackage struct {
		Name                  string        `json:"name"`
		SPDXID                string        `json:"SPDXID"`
		VersionInfo           string        `json:"versionInfo,omitempty"`
		DownloadLocation      string        `json:"downloadLocation"`
		FilesAnalyzed         bool          `json:"filesAnalyzed"`
		PrimaryPackagePurpose string        `json:"primaryPackagePurpose,omitempty"`
		Checksums             []checksum    `json:"checksums,omitempty"`
		ExternalRefs          []externalRef `json:"externalRefs,omitempty"`
		LicenseConcluded      string        `json:"licenseConcluded"`
		LicenseDeclared       string        `json:"licenseDeclared"`
		CopyrightText         string        `json:"copyrightText"`
		Comment               string        `json:"comment,omitempty"`
	}
	spdxFile struct {
		FileName         string     `json:"fileName"`
		SPDXID           string     `json:"SPDXID"`
		FileTypes        []string   `json:"fileTypes"`
		Checksums        []checksum `json:"checksums"`
		LicenseConcluded string     `json:"licenseConcluded"`
		CopyrightText    string     `json:"copyrightText"`
	}
	checksum struct {
		Algorithm     string `json:"algorithm"`
		ChecksumValue string `json:"checksumValue"`
	}
	externalRef struct {
		ReferenceCategory string `json:"referenceCategory"`
		ReferenceType     string `json:"referenceType"`
		ReferenceLocator  string `json:"referenceLocator"`
	}
	relationship struct {
		SPDXElementID      string `json:"spdxElementId"`
		RelationshipType   string `json:"relationshipType"`
		RelatedSPDXElement string `json:"relatedSpdxElement"`
	}
)

const (
	unknown  = "NOASSERTION"
	imageID  = "SPDXRef-Image"
	troth    = "troth.dev/troth"
	licensed = "Apache-2.0"
)

// bill returns what is in the image as an SPDX 2.3 document, and how many modules that
// are. It is read from the programs themselves: what the linker put in is there, and
// what go.mod names besides is not. A program that Go did not make is listed as a file.
func (s spec) bill(digest v1.Hash) ([]byte, int, error) {
	d := document{
		SPDXVersion: "SPDX-2.3", DataLicense: "CC0-1.0", SPDXID: "SPDXRef-DOCUMENT",
		Name:              s.name + ":" + s.tag,
		DocumentNamespace: "https://troth.dev/spdx/" + s.name + "-" + digest.Hex,
		// No clock: the same image has the same bill.
		CreationInfo: creationInfo{Created: "1970-01-01T00:00:00Z", Creators: []string{"Tool: " + troth + "/tools/image"}},
		Packages: []spdxPackage{{
			Name: s.name, SPDXID: imageID, VersionInfo: s.tag, DownloadLocation: unknown, PrimaryPackagePurpose: "CONTAINER",
			Checksums:        []checksum{{"SHA256", digest.Hex}},
			LicenseConcluded: unknown, LicenseDeclared: unknown, CopyrightText: unknown,
		}},
		Relationships: []relationship{{"SPDXRef-DOCUMENT", "DESCRIBES", imageID}},
	}
	packages := make(map[string]spdxPackage)
	for i, f := range s.files {
		sum1, sum256 := sha1.Sum(f.content), sha256.Sum256(f.content)
		one := spdxFile{
			FileName: "." + f.path, SPDXID: fmt.Sprintf("SPDXRef-File-%d", i), FileTypes: []string{"TEXT"},
			Checksums:        []checksum{{"SHA1", hex.EncodeToString(sum1[:])}, {"SHA256", hex.EncodeToString(sum256[:])}},
			LicenseConcluded: unknown, CopyrightText: unknown,
		}
		d.Relationships = append(d.Relationships, relationship{imageID, "CONTAINS", one.SPDXID})
		if f.mode&0o111 != 0 {
			one.FileTypes = []string{"BINARY"}
			info, err := buildinfo.Read(bytes.NewReader(f.content))
			if err == nil {
				for _, p := range s.modules(info) {
					packages[p.SPDXID] = p
					d.Relationships = append(d.Relationships, relationship{one.SPDXID, "DEPENDS_ON", p.SPDXID})
				}
			}
		}
		d.Files = append(d.Files, one)
	}
	for _, id := range slices.Sorted(maps.Keys(packages)) {
		d.Packages = append(d.Packages, packages[id])
	}
	content, err := json.MarshalIndent(d, "", "  ")
	return append(content, '\n'), len(packages), err
}

// modules returns the modules of a program, and the standard library as one.
func (s spec) modules(info *buildinfo.BuildInfo) []spdxPackage {
	goVersion := strings.TrimPrefix(strings.Fields(info.GoVersion + " ")[0], "go")
	list := []spdxPackage{module(debug.Module{Path: "stdlib", Version: "v" + goVersion})}
	main := info.Main
	if main.Path == troth {
		main.Version = s.tag
	}
	if main.Path != "" {
		p := module(main)
		if main.Path == troth {
			p.LicenseDeclared = licensed
		}
		list = append(list, p)
	}
	for _, m := range info.Deps {
		for m.Replace != nil {
			m = m.Replace
		}
		list = append(list, module(*m))
	}
	return list
}

func module(m debug.Module) spdxPackage {
	p := spdxPackage{
		Name: m.Path, VersionInfo: m.Version, SPDXID: "SPDXRef-Module-" + notOfAnID().ReplaceAllString(m.Path+"-"+m.Version, "-"),
		DownloadLocation: unknown, LicenseConcluded: unknown, LicenseDeclared: unknown, CopyrightText: unknown,
		ExternalRefs: []externalRef{{"PACKAGE-MANAGER", "purl", purl(m)}},
	}
	if m.Sum != "" {
		// The hash of a list of hashes, which SPDX has no name for: no checksum of a
		// file that anybody could download.
		p.Comment = "go.sum: " + m.Sum
	}
	return p
}

func notOfAnID() *regexp.Regexp { return regexp.MustCompile(`[^A-Za-z0-9.-]`) }

// purl returns the package URL of a module.
func purl(m debug.Module) string {
	var parts []string
	for part := range strings.SplitSeq(m.Path, "/") {
		parts = append(parts, url.PathEscape(part))
	}
	return "pkg:golang/" + strings.Join(parts, "/") + "@" + url.QueryEscape(m.Version)
}
