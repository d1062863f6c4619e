#!/bin/sh
# Some 30 photographs for `w2s bench data`, out of Debian packages (no root needed): tools/photographs.sh FOLDER
set -eu
folder=${1:?usage: tools/photographs.sh FOLDER}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$folder"
(cd "$work" && apt-get download -qq budgie-backgrounds mate-backgrounds)
for package in "$work"/*.deb; do dpkg-deb -x "$package" "$work/root"; done
cp "$work"/root/usr/share/backgrounds/budgie/*.jpg "$work"/root/usr/share/backgrounds/mate/nature/*.jpg "$folder"
rm -f "$folder"/abstract*
