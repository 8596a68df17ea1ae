#!/bin/sh
# Shows that the soak fails for broken gateways: for each patch here, builds a collector whose
# gateway is broken so, without touching the tree, and wants the soak to fail on it.
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
	patch -s -o "$dir/$file.broken" "$file" <"$patch" || exit
	echo "{\"Replace\": {\"$PWD/$file\": \"$dir/$file.broken\"}}" >"$dir/overlay.json"
	(cd build/collector && go build -overlay "$dir/overlay.json" -o "$dir/collector" .) || exit
	if build/soak -collector "$dir/collector" -duration "$duration" >"$dir/soak.log" 2>&1; then
		missed="$missed $name"
	fi
	echo "==> $name: $(sed -n 1p "$patch")"
	sed -n '/^found in/,$p' "$dir/soak.log" | grep '^ *[1-9]'
	rm "$dir/collector"
done
[ -z "$missed" ] || { echo "the soak did not notice:$missed"; exit 1; }
