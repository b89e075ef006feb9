#!/usr/bin/env bash
# Builds the Debian packages from compiled programs: stencil, and stencil-dbgsym with the debug symbols.
#
#     mountd/debian/build.sh BIN [OPTION…]   BIN is target/release or target/debug; the packages go to BIN/../debian/.
#                                            Options are passed to cargo-deb, for example --fast for a quick build of a
#                                            larger package
#
# The first package has the files of `make install`: they are installed into BIN/package, which cargo-deb packs.
set -euo pipefail
top=$(cd "$(dirname "$0")/../.." && pwd)
# shellcheck source=tests/support/host.sh
. "$top/tests/support/host.sh"
bin=$(cd "$1" && pwd -P)
cargo=${CARGO:-cargo}
tool=$(tools "$top")/bin/cargo-deb

fail() {
    printf 'deb: %s\n' "$@" >&2
    exit 1
}

[ "$("$tool" --version 2>/dev/null)" = "cargo-deb $STENCIL_CARGO_DEB" ] ||
    fail "cargo-deb $STENCIL_CARGO_DEB is not at $tool: run make setup"

# A program that needs a newer C library does not start on Debian 12.
needs=$(objdump -T "$bin/stencil" "$bin/stencil-mountd" | grep -o 'GLIBC_[0-9.]*' | sort -Vu | tail -1)
[ -n "$needs" ] || fail "no version of the C library found in $bin/stencil"
[ "$(printf 'GLIBC_%s\n%s\n' "$STENCIL_GLIBC_MAX" "$needs" | sort -V | tail -1)" = "GLIBC_$STENCIL_GLIBC_MAX" ] ||
    fail "the programs need $needs, Debian 12 has GLIBC_$STENCIL_GLIBC_MAX: build them on Debian 12"

stage=$bin/package
rm -rf "$stage"
mkdir -p "$stage"
make --no-print-directory -C "$top" install-files bin="$bin" DESTDIR="$stage" PREFIX=/usr SBINDIR=/usr/sbin >/dev/null
doc=$stage/usr/share/doc/stencil
# Debian ships the text of Apache-2.0; the copyright file holds the other licence.
rm "$doc/LICENSE-APACHE" "$doc/LICENSE-MIT"
version=$("$bin/stencil" --version | cut -d' ' -f2)
maintainer=$(sed -n 's/^maintainer = "\(.*\)"$/\1/p' "$top/Cargo.toml")
printf 'stencil (%s-1) unstable; urgency=medium\n\n  * What changed is in changelog.gz.\n\n -- %s  %s\n' \
    "$version" "$maintainer" "$(LC_ALL=C date -R -u -r "$top/CHANGELOG.md")" >"$doc/changelog.Debian"
mv "$doc/CHANGELOG.md" "$doc/changelog"
gzip -9n "$doc"/changelog* "$stage"/usr/share/man/man*/*

# As debhelper names and describes it. The sections are compressed already.
symbols=$bin/package-symbols
rm -rf "$symbols"
make --no-print-directory -C "$top" install-symbols bin="$bin" DESTDIR="$symbols" >/dev/null
ids=$(find "$symbols" -name '*.debug' | sed 's|.*/\(..\)/\(.*\)\.debug|\1\2|' | sort | tr '\n' ' ')
mkdir "$symbols/DEBIAN"
printf '%s\n' 'Package: stencil-dbgsym' 'Source: stencil' "Version: $version-1" 'Auto-Built-Package: debug-symbols' \
    'Architecture: amd64' "Maintainer: $maintainer" "Depends: stencil (= $version-1)" 'Section: debug' 'Priority: optional' \
    'Description: debug symbols for stencil' "Build-Ids: ${ids% }" >"$symbols/DEBIAN/control"
mkdir -p "${bin%/*}/debian"
dpkg-deb -Znone --root-owner-group -b "$symbols" "${bin%/*}/debian/stencil-dbgsym_$version-1_amd64.deb" >/dev/null

profile=release
[ "${bin##*/}" != debug ] || profile=dev
cd "$top"
CARGO_TARGET_DIR=${bin%/*} CARGO=$cargo "$tool" --no-build --offline --locked --no-strip --quiet --compress-system \
    --profile "$profile" --output "${bin%/*}/debian/" "${@:2}"
