# Two targets set everything up on a fresh machine with Go: make demo, make test.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help all image generate lint test rehearse soak cluster e2e demo bench fuzz deps

# What the tests run beyond Go modules: OpenSSL is a peer that is not ours, SoftHSM
# a token that is not, PostgreSQL is a store, iproute2 makes network namespaces,
# nftables and iptables capture connections in them, containernetworking-plugins
# gives pods their network, nginx, curl and nc are applications that know nothing of
# Troth, and the race detector links C.
DEBIAN_PACKAGES := openssl softhsm2 postgresql iproute2 nftables iptables containernetworking-plugins \
	util-linux nginx libnginx-mod-stream curl netcat-openbsd gcc libc6-dev

# The tag of images, and what the programs in them tell as their version.
VERSION   ?= $(or $(shell git describe --tags --always --dirty 2>/dev/null),dev)

# What a whole cluster needs beyond that: runc is linked with libseccomp.
CLUSTER_PACKAGES := libseccomp-dev pkg-config

FUZZTIME  ?= 30s
BENCHTIME ?= 1s

# The folders of the modules that have Go code. The others only pin programs, and so do
# those called parts, one of which has to say what is linked.
MODULES := $(shell find . -name go.mod -not -path '*/parts/*' -not -path ./tools/go.mod -exec dirname {} \; | while read -r m; do \
	[ -z "$$(find "$$m" -name '*.go' -print -quit)" ] || echo "$$m"; done)

# Pinned in tools/go.mod, and apart from the product's dependencies.
BUF := go tool -modfile=tools/go.mod buf

# 3 minutes to build on two cores, so it is built once, outside the checkout. A
# linter must be built by a Go no older than the one whose code it reads.
GOLANGCI_VERSION := v2.15.0
TOOLS    := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/troth/tools
GOLANGCI := $(TOOLS)/golangci-lint-$(GOLANGCI_VERSION)-$(shell go env GOVERSION)/golangci-lint

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

all: lint test ## lint, test, and build the programs into bin/
	CGO_ENABLED=0 go build -tags=grpcnotrace -o bin/ ./cmd/...

image: ## container images and what is in them, into bin/images/
	go run -C tools/image . -source "$(CURDIR)" -o "$(CURDIR)/bin/images" -tag "$(VERSION)"

generate: ## write anew api/troth/v1 from proto/troth/v1, and deploy/manifests from deploy/chart
	rm -rf api/troth
	$(BUF) generate
	cd tools/chart
	go run .

lint: $(GOLANGCI) ## formatting, vet, linters, protos, generated code, go.mod
	@unformatted=$$(gofmt -l .)
	[ -z "$$unformatted" ] || { echo "run gofmt -w on:" $$unformatted >&2; exit 1; }
	for module in $(MODULES); do (
		cd "$$module"
		echo "lint $$module"
		go vet ./...
		$(GOLANGCI) run ./...
		go mod tidy -diff || { echo "run go mod tidy in $$module" >&2; exit 1; }
	) done
	$(BUF) lint
	fresh=$$(mktemp -d)
	trap 'rm -rf "$$fresh"' EXIT
	$(BUF) generate -o "$$fresh"
	diff -r "$$fresh/api/troth" api/troth || { echo "run make generate" >&2; exit 1; }

# Two packages at a time, because most of them wait for most of their time, and the
# whole path alone: it has some ten clusters of Troth under way at once, with lives of
# seconds. The limit leaves room for the package that is first to need a Kubernetes API
# server: it builds one, in 4 to 8 minutes, and the others wait for it.
test: deps ## everything that must pass
	@CGO_ENABLED=0 go build ./cmd/...
	TROTH_FIGURES=$$(mktemp)
	export TROTH_FIGURES
	trap 'cat "$$TROTH_FIGURES"; rm "$$TROTH_FIGURES"' EXIT
	for module in $(MODULES); do (
		cd "$$module"
		go build -race ./...
		go test -race -shuffle=on -p 2 -timeout 30m $$(go list ./... | grep -vE '/test/(e2e|cluster)$$')
		if [ -d test/e2e ]; then go test -race -shuffle=on -timeout 30m ./test/e2e; fi
	) done

rehearse: deps ## 20 rotations under 100,000 handshakes, with what can go wrong; 15 minutes
	go test ./test/e2e -run '^TestRehearsal$$' -v -rotations=20 -agents=200 -handshakes=100000 -rate=250 -chaos -timeout 60m

soak: deps ## two agents at full load for 10 minutes: nothing they take grows
	go test ./test/e2e -run '^TestMeshSoak$$' -v -soak=10m -timeout 30m

cluster: PACKAGES := $(CLUSTER_PACKAGES)
cluster: deps ## a Kubernetes of two nodes on this machine, until interrupted; root
	go run ./test/cluster/up

e2e: PACKAGES := $(CLUSTER_PACKAGES)
e2e: deps ## Troth's whole life in such a cluster; root
	go test -count=1 -v -timeout 60m ./test/cluster

demo: ## the main job, from nothing, on this machine
	go run ./cmd/troth demo

bench: ## every benchmark, BENCHTIME=1s each
	go test -run '^$$' -bench . -benchmem -benchtime $(BENCHTIME) ./...

fuzz: ## every fuzz target, FUZZTIME=30s each
	@targets=$$(go test -list '^Fuzz' ./... | awk '
		/^Fuzz/ { names[n++] = $$1 }
		/^ok/   { for (i = 0; i < n; i++) print $$2, names[i]; n = 0 }')
	while read -r package target; do
		echo "fuzz $$package $$target"
		go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x "$$package" </dev/null
	done <<<"$$targets"

deps: ## install what the tests need beyond Go modules
	@if ! command -v dpkg-query >/dev/null; then
		command -v openssl >/dev/null && command -v softhsm2-util >/dev/null && command -v cc >/dev/null || { echo "the tests need openssl, SoftHSM 2 and a C compiler: install them" >&2; exit 1; }
		exit
	fi
	missing=()
	for package in $(DEBIAN_PACKAGES) $(PACKAGES); do
		dpkg-query -W -f '$${Status}' "$$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$$package")
	done
	[ "$${#missing[@]}" -gt 0 ] || exit 0
	if [ "$$(id -u)" -ne 0 ]; then
		echo "the tests need more packages: sudo apt-get update && sudo apt-get install -y $${missing[*]}" >&2
		exit 1
	fi
	case " $${missing[*]} " in *" postgresql "*)
		# Or Debian would start a server. The tests start their own.
		mkdir -p /etc/postgresql-common/createcluster.d
		echo 'create_main_cluster = off' >/etc/postgresql-common/createcluster.d/troth.conf
	esac
	case " $${missing[*]} " in *" nginx "*)
		# Nor its web server: not now, and not at the next boot.
		mkdir -p /etc/systemd/system
		[ -e /etc/systemd/system/nginx.service ] || ln -s /dev/null /etc/systemd/system/nginx.service
		if [ ! -e /usr/sbin/policy-rc.d ]; then
			trap 'rm /usr/sbin/policy-rc.d' EXIT
			printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
			chmod +x /usr/sbin/policy-rc.d
		fi
	esac
	apt-get update
	DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$${missing[@]}"

$(GOLANGCI):
	@echo "building golangci-lint $(GOLANGCI_VERSION), this once; 3 minutes on two cores"
	GOBIN=$(@D).unfinished go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_VERSION)
	mkdir -p $(@D)
	mv $(@D).unfinished/golangci-lint $@
	rmdir $(@D).unfinished
