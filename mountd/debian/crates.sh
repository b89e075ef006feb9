#!/bin/sh
# Lists the crates that the programs are linked with: name, version, licence, and their licence texts, each text once.
#
#     mountd/debian/crates.sh BIN     writes BIN/crates.gz atomically; BIN is the directory of the programs
set -eu
# A missing list is better than that of another build.
rm -f "$1/crates.gz"
cargo=${CARGO:-cargo}
# cargo looks up rustc in PATH.
[ "$cargo" = "${cargo#*/}" ] || PATH=${cargo%/*}:$PATH
sources=${CARGO_HOME:-${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}/.cargo}/registry/src
list=$("$cargo" tree --workspace --locked --offline -e normal --prefix none --format '{p} | {l}' |
    sed 's/ (\*)$//; /(\//d; /^$/d' | sort -u)
[ "$(printf '%s\n' "$list" | wc -l)" -gt 20 ] || {
    echo "crates.sh: cargo tree names only: $list" >&2
    exit 1
}
ls -d "$sources"/*/ >/dev/null || {
    echo "crates.sh: missing sources of crates, which hold the licence texts: run 'cargo fetch' or set CARGO_HOME" >&2
    exit 1
}
new=$1/crates.new
trap 'rm -f "$new" "$new.gz"' EXIT
exec >"$new"
echo 'Crates in stencil and stencil-mountd:'
echo
printf '%s\n' "$list"
printf '%s\n' "$list" | sed 's/^\([^ ]*\) v\([^ ]*\).*/\1-\2/' | while read -r crate; do
    find "$sources"/*/"$crate" -maxdepth 2 -type f \( -iname 'licen[sc]e*' -o -iname 'copying*' -o -iname 'notice*' \)
done | sort | xargs -d '\n' sha256sum | awk '
    { hash = $1; path = substr($0, 67); n = split(path, part, "/"); name = part[n - 1] "/" part[n]
      if (!(hash in first)) { first[hash] = path; order[++count] = hash }
      of[hash] = of[hash] " " name }
    END { for (i = 1; i <= count; i++) {
        print "\n\n=== " substr(of[order[i]], 2) "\n"
        while ((getline line < first[order[i]]) > 0) print line } }'
gzip -9nf "$new"
mv "$new.gz" "$1/crates.gz"
