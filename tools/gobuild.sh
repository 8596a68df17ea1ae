#!/bin/sh
# Builds a program and shows that it gets on: on a first run, go fetches hundreds
# of modules and compiles as many packages, in silence.
#
#   gobuild.sh WHAT ARGUMENTS OF GO BUILD...
set -u
what=$1
shift

# One line that changes on a terminal; elsewhere a line now and then.
if [ -t 1 ]; then
	start='\r\033[K' end='' every=1
else
	start='' end='\n' every=100
fi
modules='' # none yet
packages=0

say() {
	printf "$start  %s: %s$end" "$what" "$1"
}

progress() {
	if [ $(((${modules:-0} + packages) % every)) -eq 0 ]; then
		say "${modules:+$modules modules fetched, }$packages packages compiled"
	fi
}

say 'building'

# With -v, go names each package that it compiles. Anything else it says is for
# the reader. The last line brings its exit status out of the pipe. The program
# knows nothing of the machine's directories, and carries no symbols.
{
	go build -v -trimpath -ldflags='-s -w' "$@"
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
		modules=$((${modules:-0} + 1))
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
