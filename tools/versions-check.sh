#!/bin/sh
# Fails when a program was linked with another version of a direct dependency than the
# one in go.mod: what our tests ran with would not be what ships.
#
#   versions-check.sh PROGRAM [GO.MOD]
#
# Among the modules of a program Go chooses the highest version that any of them asks
# for, so one that ships next to the gateway can raise what the gateway is built with.
# What is for tests only is not in the program, and not compared.
set -u
program=$1
mod=${2:-go.mod}

linked=$(go version -m "$program") || exit
printf '%s\n' "$linked" | awk -v mod="$mod" -v program="$program" '
	BEGIN {
		while ((got = (getline line <mod)) > 0) {
			if (line ~ /^require \(/) { block = 1; continue }
			if (line ~ /^\)/) block = 0
			if (line ~ /\/\/ indirect/) continue
			if (!block && line !~ /^require [^(]/) continue
			sub(/^require /, "", line)
			if (split(line, word, " ") >= 2) wanted[word[1]] = word[2]
		}
		if (got < 0) { print "cannot read " mod; failed = 2; exit }
	}
	# A replacement stands on the line behind that of the module it replaces.
	$1 == "dep" { module = $2; if (module in wanted) have[module] = $3 }
	$1 == "=>" && module in wanted { have[module] = "replaced by " $2 " " $3 }
	END {
		if (failed) exit failed
		for (module in have) {
			compared++
			if (have[module] == wanted[module]) continue
			printf "%s: %s has %s, %s has %s\n", module, mod, wanted[module], program, have[module]
			failed = 1
		}
		if (!compared) { print program " has no direct dependency of " mod " in it"; failed = 1 }
		exit failed
	}'
