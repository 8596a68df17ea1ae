#!/bin/sh
# Runs `go build` with the given arguments and shows that it gets on: on a first
# run it fetches hundreds of modules and compiles as many packages, in silence.
#
#   gobuild.sh WHAT ARGUMENTS...
set -u
what=$1
shift

# One line that changes on a terminal; elsewhere a line now and then.
if [ -t 1 ]; then
	start='\r\033[K' end='' every=1
else
	start='' end='\n' every=100
fi
modules=0
packages=0

say() {
	printf "$start  %s: %s$end" "$what" "$1"
}

progress() {
	if [ $(((modules + packages) % every)) -eq 0 ]; then
		say "$modules modules fetched, $packages packages compiled"
	fi
}

say 'building'

# With -v, go names each package that it compiles. Anything else it says is for
# the reader. The last line brings its exit status out of the pipe.
{
	go build -v "$@"
	echo "exit status of go build: $?"
} 2>&1 | while IFS= read -r line; do
	case $line in
	'exit status of go build: 0')
		say 'built'
		[ -n "$end" ] || echo
		exit 0
		;;
	'exit status of go build: '*)
		exit "${line##* }"
		;;
	'go: downloading '*)
		modules=$((modules + 1))
		progress
		;;
	*[[:space:]]*)
		[ -n "$end" ] || printf '%b' "$start"
		printf '%s\n' "$line"
		;;
	*)
		packages=$((packages + 1))
		progress
		;;
	esac
done
