# Needs Go and make, and a C compiler for the race detector of `make unit`. All
# other tools are pinned in tools/ and built into build/. Written for a plain
# shell and the old make of macOS, too.

# For `make run`: the OpAMP server to relay to, instead of the demo's own, and the
# key for it. The key may as well come in the environment, as OPAMP_SECRET_KEY.
SERVER :=
SECRET_KEY :=

# For `make fuzz`: how long to run each target.
FUZZTIME := 5s

# For `make soak`: how long things go wrong, for how many agents, and the seed of
# their order, drawn if empty; POLLERS=1: a tenth of the agents over plain HTTP. For `make soak-broken`: which broken gateways.
DURATION := 60s
AGENTS := 500
SEED :=
POLLERS :=
BROKEN := $(patsubst e2e/soak/broken/%.patch,%,$(wildcard e2e/soak/broken/*.patch))

# For `make newest`: a release of the collector, its modules of 1.x and of 0.x; or latest.
NEWEST := v1.71.0 v0.165.0

# For `make bench`: flags for it; and, to size a gateway of your own, where AGENTS
# agents connect, where the bench's server listens, and the gateway's process, if that
# is on this machine. See bench/README.md.
BENCHFLAGS :=
TARGET :=
SERVER_LISTEN :=
PID :=
BENCH_TARGET = $(if $(TARGET),-target '$(TARGET)' -agents $(AGENTS) \
	$(if $(SERVER_LISTEN),-server-listen '$(SERVER_LISTEN)') $(if $(PID),-pid $(PID)))

# The modules with Go code of our own, and those whose go.mod `go mod tidy` keeps:
# not e2e/supervisor, where it would ask for all that the supervisor's own tests
# import, the whole test bed of collector-contrib.
CODE_MODULES := . $(patsubst %/go.mod,%,$(wildcard bench/go.mod demo/go.mod deploy/go.mod e2e/go.mod))
TIDY_MODULES := $(CODE_MODULES) tools tools/lint tools/nfpm tools/sbom

# Those of 32 bits are for lengths that are too long for an int there.
PLATFORMS := linux/amd64 linux/arm64 linux/386 linux/arm windows/amd64 darwin/arm64

# Everything but the race detector builds without cgo, so that linters, tests and
# programs share what the compiler did for one of them.
export CGO_ENABLED := 0
# Where git does not trust a clone's owner, asking it for the version would fail.
export GOFLAGS := $(strip $(shell go env GOFLAGS) -buildvcs=false)
# A workspace around the clone must not decide which versions we build.
export GOWORK := off

BIN := $(CURDIR)/build/tools
LINT := "$(BIN)/golangci-lint"
GOBUILD := "$(CURDIR)/tools/gobuild.sh"

.DEFAULT_GOAL := help
# One thing after the other, in the order written; go itself keeps all cores busy.
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: FORCE

##@ Run it
.PHONY: run collector

run: collector ## watch a fleet through the gateway; AGENTS=500: a larger one; SERVER=wss://… SECRET_KEY=…: relay to that server
	@cd demo && $(GOBUILD) demo -o ../build/demo .
	@cd demo && exec ../build/demo -collector ../build/otelcol-opampgateway $(if $(SERVER),-server '$(SERVER)') \
		$(if $(filter command environment,$(origin AGENTS)),-agents $(AGENTS))
# The key goes to the demo in its environment: the command line of a process is
# for all to read.
ifneq ($(value SECRET_KEY),)
export OPAMP_SECRET_KEY := $(value SECRET_KEY)
endif

collector: build/otelcol-opampgateway ## build the collector with the gateway in it: build/otelcol-opampgateway

# For `make packages`: the processors, and the module that the collector has from this directory, which is what its
# bill of materials would be told of it.
MODULE := github.com/opampgateway/opampgateway
ARCHES := $(shell go env GOARCH)
PACKAGES := build/packages

.PHONY: packages
packages: build/collector/go.sum build/tools/nfpm build/tools/cyclonedx-gomod ## .deb and .rpm of the collector, and what it is made of: build/packages; ARCHES='amd64 arm64'
	@rm -rf $(PACKAGES) && mkdir -p $(PACKAGES)
	@v="$$(sed -n 's/^  version: //p' collector/manifest.yaml)"; for a in $(ARCHES); do \
		(cd build/collector && GOOS=linux GOARCH=$$a $(GOBUILD) "collector for $$a" -o ../packages/$$a/otelcol-opampgateway .) || exit; \
		for p in deb rpm; do \
			PACKAGE_ARCH=$$a PACKAGE_VERSION=$$v \
				build/tools/nfpm package --config deploy/package/nfpm.yaml --packager $$p --target $(PACKAGES)/ >/dev/null || exit; done; \
		build/tools/cyclonedx-gomod bin -json -std -noserial -notimestamp -version $$v \
			-output $(PACKAGES)/$$a/bom $(PACKAGES)/$$a/otelcol-opampgateway 2>$(PACKAGES)/$$a/log || { cat $(PACKAGES)/$$a/log; exit 1; }; \
		sed "s,\.\./\.\.@(devel),$(MODULE)@v$$v,; s,\"\.\./\.\.\",\"$(MODULE)\",; s,\"(devel)\",\"v$$v\"," \
			$(PACKAGES)/$$a/bom >$(PACKAGES)/otelcol-opampgateway_$${v}_$$a.cdx.json; \
		rm -r $(PACKAGES)/$$a; done
	@cd $(PACKAGES) && sha256sum *.deb *.rpm *.json >SHA256SUMS && cat SHA256SUMS

##@ Change it
.PHONY: generate fmt tidy

generate: build/tools/mdatagen ## regenerate what comes from metadata.yaml, the tables of docs/ that come from the code, and config.schema.yaml
	@# mdatagen takes the package's name from that of its directory.
	@ln -sfn .. build/opampgateway
	@cd build/opampgateway && PATH="$(BIN):$$PATH" go generate ./...
	@go test -count=1 -run '^(TestTablesOfDocs|TestConfigSchema)$$' . -update >/dev/null

fmt: build/tools/golangci-lint ## format the code
	@for m in $(CODE_MODULES); do (cd $$m && $(LINT) fmt) || exit; done

tidy: ## tidy every go.mod
	@for m in $(TIDY_MODULES); do (cd $$m && go mod tidy) || exit; done

##@ Check it
.PHONY: test generate-check tidy-check versions-check lint cross unit newest fuzz e2e attack soak soak-race soak-broken screenshots opampsupervisor

test: c-compiler tidy-check generate-check lint cross unit newest fuzz versions-check e2e soak ## what CI runs: the checks below, but for attack, soak-race and soak-broken
	@echo '==> all is well'

tidy-check: ## every go.mod is tidy
	@echo '==> tidy-check'
	@for m in $(TIDY_MODULES); do (cd $$m && go mod tidy -diff) || { echo "$$m/go.mod is not tidy: run \"make tidy\""; exit 1; }; done

versions-check: collector ## the collector has the versions of our dependencies that go.mod names
	@echo '==> versions-check'
	@tools/versions-check.sh build/otelcol-opampgateway || { \
		echo 'what ships is not what the tests ran with: name the version of the collector in go.mod, and run "make tidy"'; exit 1; }

# Compares in a copy, so that the check leaves the tree as it is and work in
# progress counts. The copies bear the name that mdatagen gives to the package.
CHECK := build/generate-check
generate-check: build/tools/mdatagen ## generated files are up to date with metadata.yaml
	@echo '==> generate-check'
	@rm -rf $(CHECK) && mkdir -p $(CHECK)/tree/opampgateway $(CHECK)/generated
	@cp -R go.mod go.sum metadata.yaml internal $(wildcard *.go *.md) $(CHECK)/tree/opampgateway
	@cp -R $(CHECK)/tree/opampgateway $(CHECK)/generated
	@cd $(CHECK)/generated/opampgateway && find . -name 'generated_*' -exec rm {} + && rm -f documentation.md && \
		PATH="$(BIN):$$PATH" go generate ./...
	@cd $(CHECK) && diff -ru tree generated || { echo 'generated files are out of date: run "make generate"'; exit 1; }
	@rm -rf $(CHECK)

lint: build/tools/golangci-lint ## lint the code and check its format
	@for m in $(CODE_MODULES); do echo "==> lint $$m"; \
		(cd $$m && $(LINT) run ./...) || exit; done

# A module with nothing but a program would leave that behind, without -o.
cross: ## build and vet for Linux, Windows and macOS
	@for p in $(PLATFORMS); do echo "==> cross $$p"; \
		export GOOS=$${p%/*} GOARCH=$${p#*/}; \
		for m in $(filter-out e2e,$(CODE_MODULES)); do (cd $$m && go build -o /dev/null ./... && go vet ./...) || exit; done; done

unit: c-compiler ## unit tests, with the race detector
	@for m in $(filter-out e2e,$(CODE_MODULES)); do echo "==> unit $$m"; \
		(cd $$m && CGO_ENABLED=1 go test -race -timeout 5m ./...) || exit; done

# The oldest collector that it takes is that of go.mod, with which everything else here is tested: Go builds
# nothing with an older one.
newest: ## build and unit-test with the newest collector that is known to do; NEWEST=latest: with today's
	@echo '==> newest $(NEWEST)'
	@tools/newest.sh build/newest $(NEWEST)
	@rm -rf build/newest

fuzz: ## run each fuzz target for FUZZTIME (5s)
	@grep -rEo --include='*_test.go' --exclude-dir=build '^func Fuzz[A-Za-z0-9_]*' . | while IFS=: read -r file func; do \
		name=$${func#func }; echo "==> fuzz $$name"; \
		(cd "$$(dirname "$$file")" && go test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x . </dev/null) || exit; done

e2e: collector opampsupervisor prometheus haproxy proxies packages rpm chromium ## the built collector between real agents, supervisors and servers
	@echo '==> e2e'
	@cd e2e && go test -count=1 -timeout 15m ./...

# The tests of these files at full length: a minute or more for what e2e does not wait for.
ATTACKS := strangers_test.go gateways_test.go budget_test.go identity_test.go operator_test.go
attack: collector ## strangers, gateways and servers attack the built collector for minutes
	@echo '==> attack'
	@cd e2e && LONG=1 go test -count=1 -timeout 20m \
		-run "^($$(sed -n 's/^func \(Test[A-Za-z0-9]*\)(.*/\1/p' $(ATTACKS) | paste -s -d '|' -))$$" .

soak: collector ## everything goes wrong for DURATION (60s), and nothing may get lost; AGENTS=500, SEED=…, POLLERS=1
	@echo '==> soak'
	@cd e2e && go build -o ../build/soak ./soak
	@build/soak -collector build/otelcol-opampgateway -duration $(DURATION) -agents $(AGENTS) $(if $(SEED),-seed $(SEED)) $(if $(POLLERS),-pollers)

# Not among the tests of `make test`: the detector makes a collector several times slower.
soak-race: build/otelcol-opampgateway-race ## the soak of a collector with the race detector in it; a data race fails it
	@echo '==> soak-race'
	@cd e2e && go build -o ../build/soak ./soak
	@build/soak -collector build/otelcol-opampgateway-race -duration $(DURATION) -agents $(AGENTS) $(if $(SEED),-seed $(SEED)) $(if $(POLLERS),-pollers)

soak-broken: collector ## the soak fails for gateways that are broken; BROKEN='drops doubles': those only
	@echo '==> soak-broken'
	@cd e2e && go build -o ../build/soak ./soak
	@e2e/soak/broken/check.sh $(DURATION) $(BROKEN)

screenshots: collector chromium ## the pictures of the status page in docs/images
	@cd e2e && SCREENSHOTS="$(CURDIR)/docs/images" go test -count=1 -timeout 10m -v -run '^TestScreenshots$$' .

opampsupervisor: build/opampsupervisor ## build the OpAMP supervisor that e2e tests the gateway with

##@ Measure it
.PHONY: bench growth

bench: collector $(if $(TARGET),,haproxy) ## the gateway next to HAProxy and others; TARGET=ws://…: size that gateway
	@cd bench && $(GOBUILD) bench -o ../build/opampbench .
	@cd bench && exec ../build/opampbench $(BENCH_TARGET) $(BENCHFLAGS)

# On one processor, the time is that of all the work, whoever does it.
growth: ## what a message, an agent that comes or leaves, and an idle one cost, of 2,000 to 100,000 agents
	@go test -c -o build/growth.test .
	@for b in Message:300000x 'Disconnect|Admit:20000x' Memory:1x; do \
		build/growth.test -test.run '^$$' -test.cpu 1 -test.bench "^Benchmark($${b%:*})\$$" -test.benchtime "$${b#*:}" || exit; done

##@ Other
.PHONY: help clean

help: ## this list
	@awk 'BEGIN { FS = ":.*## " } \
		/^##@ / { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z0-9-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo

clean: ## remove build/, with everything built
	rm -rf build

# What follows is made for the targets above.

# Programs are built anew with another version of Go, too: a linter refuses code
# for a Go newer than its own.
build/tools/.go-version: FORCE
	@mkdir -p $(@D) && go version | cmp -s - $@ || go version >$@

build/tools/mdatagen: tools/go.mod tools/go.sum build/tools/.go-version
	@cd tools && $(GOBUILD) mdatagen -o ../$@ go.opentelemetry.io/collector/cmd/mdatagen

build/tools/ocb: tools/go.mod tools/go.sum build/tools/.go-version
	@cd tools && $(GOBUILD) 'ocb, the collector builder' -o ../$@ go.opentelemetry.io/collector/cmd/builder

build/tools/golangci-lint: tools/lint/go.mod tools/lint/go.sum build/tools/.go-version
	@cd tools/lint && $(GOBUILD) golangci-lint -o ../../$@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

build/tools/nfpm: tools/nfpm/go.mod tools/nfpm/go.sum build/tools/.go-version
	@cd tools/nfpm && $(GOBUILD) nfpm -o ../../$@ github.com/goreleaser/nfpm/v2/cmd/nfpm

build/tools/cyclonedx-gomod: tools/sbom/go.mod tools/sbom/go.sum build/tools/.go-version
	@cd tools/sbom && $(GOBUILD) cyclonedx-gomod -o ../../$@ github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod

build/opampsupervisor: e2e/supervisor/go.mod e2e/supervisor/go.sum build/tools/.go-version
	@cd e2e/supervisor && $(GOBUILD) opampsupervisor -o ../../$@ github.com/open-telemetry/opentelemetry-collector-contrib/cmd/opampsupervisor

# The collector's sources follow the manifest and the versions that the gateway
# needs. Whether they have to be compiled again, go knows best.
build/collector/go.sum: collector/manifest.yaml go.mod go.sum build/tools/ocb
	@echo '  collector: resolving modules and writing sources; a first run fetches them, which takes a while'
	@rm -rf build/collector
	@build/tools/ocb --config collector/manifest.yaml --skip-compilation >build/ocb.log 2>&1 || { cat build/ocb.log; exit 1; }

build/otelcol-opampgateway: build/collector/go.sum FORCE
	@cd build/collector && $(GOBUILD) collector -o ../../$@ .

build/otelcol-opampgateway-race: build/collector/go.sum c-compiler FORCE
	@cd build/collector && CGO_ENABLED=1 $(GOBUILD) 'collector with the race detector' -race -o ../../$@ .

# The race detector is the one thing that needs more than Go: cgo, so a C compiler.
# Root on a machine with apt-get and no compiler is a fresh container; anybody
# else is told what is missing.
.PHONY: c-compiler
c-compiler:
	@command -v $(firstword $(shell go env CC)) >/dev/null || { \
		echo 'The race detector needs a C compiler: gcc and libc6-dev on Debian.'; \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo 'Installing them.' && \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends gcc libc6-dev; }

# What the e2e tests have the alerts and the dashboard tried by. Its package would start it as a
# service, so just its programs are taken out of it.
.PHONY: prometheus
prometheus: build/prometheus/prometheus build/prometheus/promtool

build/prometheus/%:
	@mkdir -p $(@D) && if command -v $* >/dev/null; then ln -sf "$$(command -v $*)" $@; else \
		command -v apt-get >/dev/null || { \
			echo 'The tests need Prometheus: put prometheus and promtool on the PATH, or name them in E2E_PROMETHEUS and E2E_PROMTOOL.'; exit 1; }; \
		echo 'The tests need Prometheus: fetching the package of Debian.'; \
		cd $(@D) && { apt-get download -qq prometheus 2>/dev/null || { apt-get update -qq && apt-get download -qq prometheus; }; } && \
		dpkg -x prometheus_*.deb . && mv usr/bin/prometheus usr/bin/promtool . && rm -rf etc lib usr var prometheus_*.deb; fi

# A peer that the bench measures, and before two gateways in a test. Debian has it on the PATH of root only.
.PHONY: haproxy
haproxy:
	@PATH="$$PATH:/usr/sbin"; command -v haproxy >/dev/null || { \
		echo 'Bench and tests need HAProxy: haproxy on Debian.'; \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo 'Installing it.' && \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends haproxy; }

# Proxies through which a gateway reaches its server in the tests.
.PHONY: proxies
proxies:
	@command -v tinyproxy >/dev/null && command -v microsocks >/dev/null || { \
		echo 'Tests need two proxies: tinyproxy and microsocks on Debian.'; \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo 'Installing them.' && \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends tinyproxy microsocks; }

# The browser in which the status page is tested. Without it, these tests are skipped.
.PHONY: chromium
chromium:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
		echo 'The status page is tested in Chromium: chromium on Debian.'; \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo 'Installing it.' && \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } || \
		echo 'There is none; those tests are skipped.'

# Where there is none, and who runs the tests is not root, the package for Fedora is built and not tried.
.PHONY: rpm
rpm:
	@command -v rpm >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null || exit 0; \
		echo 'The tests of packages need rpm. Installing it.'; \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends rpm; }
