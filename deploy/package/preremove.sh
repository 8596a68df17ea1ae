#!/bin/sh
# Before a removal (deb: remove, rpm: 0), and not before an upgrade.
set -e
[ -z "$DPKG_ROOT" ] && [ -d /run/systemd/system ] || exit 0
if [ "$1" = remove ] || [ "$1" = 0 ]; then
	systemctl --no-reload disable --now otelcol-opampgateway.service
fi
