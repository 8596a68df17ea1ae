#!/bin/sh
# After a removal. The user stays: files may be its own.
set -e
[ -z "$DPKG_ROOT" ] && [ -d /run/systemd/system ] || exit 0
systemctl daemon-reload
