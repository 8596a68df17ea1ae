#!/bin/sh
# Builds the extension with a newer collector than that of go.mod, and runs its unit tests, in a
# copy, so that go.mod stays as it is.
#
#   newest.sh DIRECTORY VERSION...
#
# DIRECTORY is where the copy goes; what is there is removed. A module of the collector has a version of 1.x or
# of 0.x, so both are named, for example v1.71.0 v0.165.0; `latest` takes whatever is out today.
set -eu
copy=$1
shift

rm -rf "$copy"
mkdir -p "$copy"
# What the tests of the extension read is here, too.
cp -R go.mod go.sum metadata.yaml config.schema.yaml Makefile LICENSE internal testdata docs ./*.go ./*.md "$copy"
# Of the rest, pages link to files, and name tests.
for dir in bench collector demo deploy e2e; do
	[ ! -d "$dir" ] || cp -R "$dir" "$copy"
done
cd "$copy"

# Of the collector's modules that go.mod names itself, each gets the first of these versions that there is of it.
wanted=''
for module in $(sed -n 's,^	\(go\.opentelemetry\.io/collector/[^ ]*\) v[^/]*$,\1,p' go.mod); do
	for version in "$@"; do
		if go list -m "$module@$version" >/dev/null 2>&1; then
			wanted="$wanted $module@$version"
			continue 2
		fi
	done
	echo "$module has no version $*"
	exit 1
done
# shellcheck disable=SC2086 # several modules
go get $wanted
go mod tidy
go list -m go.opentelemetry.io/collector/component go.opentelemetry.io/collector/config/confighttp
go vet ./...
go test -timeout 5m ./...
