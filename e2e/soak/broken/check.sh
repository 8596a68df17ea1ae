#!/bin/sh
# Shows that the soak fails for broken gateways: for each patch here, builds a collector whose
# gateway is broken so, without touching the tree, and wants the soak to fail on it, with the finding that
# the patch names, if it names one.
#
#   make soak-broken [BROKEN='drops doubles'] [DURATION=60s]
set -u
cd "$(dirname "$0")/../../.." || exit
duration=$1
shift
missed=''
for name in "$@"; do
	dir="$PWD/build/broken/$name"
	rm -rf "$dir" && mkdir -p "$dir" || exit
	patch=e2e/soak/broken/$name.patch
	file=$(sed -n 's|^+++ b/||p' "$patch")
	mkdir -p "$(dirname "$dir/$file")" || exit
	patch -s -o "$dir/$file.broken" "$file" <"$patch" || exit
	echo "{\"Replace\": {\"$PWD/$file\": \"$dir/$file.broken\"}}" >"$dir/overlay.json"
	(cd build/collector && go build -overlay "$dir/overlay.json" -o "$dir/collector" .) || exit
	build/soak -collector "$dir/collector" -duration "$duration" >"$dir/soak.log" 2>&1
	echo "==> $name: $(sed -n 1p "$patch")"
	found=$(sed -n '/^found in/,$p' "$dir/soak.log" | grep '^ *[1-9][0-9]*  ')
	echo "$found"
	echo "$found" | grep -q "  $(sed -n 's/^The soak has to find: //p' "$patch")" || missed="$missed $name"
	rm "$dir/collector"
done
[ -z "$missed" ] || { echo "the soak did not notice:$missed"; exit 1; }
