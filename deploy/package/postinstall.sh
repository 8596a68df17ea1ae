#!/bin/sh
# After an installation (deb: configure, rpm: 1) or an upgrade (deb: configure with the old version, rpm: 2).
set -e
command -v systemd-sysusers >/dev/null && systemd-sysusers ${DPKG_ROOT:+--root="$DPKG_ROOT"} otelcol-opampgateway.conf
[ -z "$DPKG_ROOT" ] && [ -d /run/systemd/system ] || exit 0
systemctl daemon-reload
if [ "$1" = configure ] && [ -n "$2" ] || [ "$1" = 2 ]; then
	systemctl try-restart otelcol-opampgateway.service
else
	echo 'Set the server and the key in /etc/otelcol-opampgateway/environment, then: systemctl enable --now otelcol-opampgateway'
fi
