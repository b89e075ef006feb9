#!/usr/bin/env bash
# Measures import and cold-read throughput on this machine (`make bench`). The machine's speed varies, so quote the
# ratios to the raw file of the same run.
set -euo pipefail
top=$(cd "$(dirname "$0")/../.." && pwd)
bin=${STENCIL_BIN_DIR:-${CARGO_TARGET_DIR:-$top/target}/release}
mib=${STENCIL_BENCH_MIB:-512}
dir=$(mktemp -d "${CARGO_TARGET_DIR:-$top/target}/bench.XXXXXX")
export STENCIL_RUNTIME_DIR=$dir/run
PATH=$bin:$PATH

# shellcheck disable=SC2317
clean() {
    trap - EXIT INT TERM
    for mnt in "$dir"/mnt-*; do
        [ -d "$mnt" ] && grep -q " $mnt " /proc/self/mountinfo && stencil -q umount "$mnt"
    done
    # Kernel decode has made packs immutable.
    [ -d "$dir/store-guest-lz4" ] && stencil -q store unseal "$dir/store-guest-lz4" >/dev/null
    rm -rf "$dir"
}
trap clean EXIT INT TERM
mkdir "$dir/run"

# Programs and libraries, each followed by zero pages, similar to a guest's memory.
find /usr/lib /usr/bin -type f -size +64k -size -8M -print0 2>/dev/null | sort -z |
    while IFS= read -r -d '' file; do cat "$file"; head -c $((1 << 20)) /dev/zero; done 2>/dev/null |
    head -c $((mib << 20)) >"$dir/guest" || true
truncate -s "${mib}M" "$dir/guest"
head -c "${mib}M" /dev/urandom >"$dir/random"

seconds() { local t0=$EPOCHREALTIME; "$@" >/dev/null; awk -v a="$t0" -v b="$EPOCHREALTIME" 'BEGIN { print b - a }'; }

printf 'import of %s MiB, source in the page cache\n%-22s%10s%12s\n' "$mib" "" "MiB/s" "stored MiB"
for data in guest random; do
    for codec in lz4 zstd none; do
        store=$dir/store-$data-$codec
        took=$(seconds stencil -q --store "$store" import "$dir/$data" bench:1 --format raw --compression "$codec")
        stored=$(du -sm "$store" | cut -f1)
        printf '%-22s%10.0f%12s\n' "$data $codec" "$(awk -v m="$mib" -v t="$took" 'BEGIN { print m / t }')" "$stored"
        [ "$data-$codec" = guest-lz4 ] || rm -rf "$store"
    done
done

mount_as() {
    local options=(--serve "${1%-4M}" --cache-dir "$dir")
    [ "$1" = decode-4M ] && options+=(--read-ahead 4M)
    mkdir -p "$dir/mnt-$1"
    stencil -q --store "$dir/store-guest-lz4" mount "$dir/mnt-$1" "${options[@]}" >/dev/null
}
file_of() {
    case $1 in raw) echo "$dir/guest" ;; *) echo "$dir/mnt-$1/templates/bench/1/memory" ;; esac
}
first_byte() { head -c 4096 "$(file_of "$1")"; }
verified() {
    until stencil --json status | tr '{' '\n' | grep -q '"serving":"kernel"'; do sleep 0.01; done
}

# Dirty pages of the import must not be written during the measurements.
sync
echo 3 >/proc/sys/vm/drop_caches
copy=$(seconds cp --sparse=never "$dir/guest" "$dir/copy")
rm "$dir/copy"
printf '\nfirst byte of a template\n%-38s%10s%12s\n' "" seconds "to cp raw"
row() { awk -v n="$1" -v t="$2" -v c="$copy" 'BEGIN { printf "%-38s%10.3f%12.2f\n", n, t, t / c }'; }
row "cp of the raw file" "$copy"
for serve in decode passthrough decode-4M kernel; do mount_as "$serve"; done
row "decode" "$(seconds first_byte decode)"
row "kernel, until all is verified" "$(seconds verified)"
row "passthrough, until the copy is made" "$(seconds first_byte passthrough)"
first_byte decode-4M >/dev/null
stencil -q umount "$dir/mnt-kernel"
mount_as kernel
row "kernel, verified by an earlier mount" "$(seconds first_byte kernel)"
verified

# cold NAME FIO-OPTION…: drops the page cache, then prints bandwidth in MiB/s and median latency in µs.
cold() {
    local name=$1
    shift
    sync
    echo 1 >/proc/sys/vm/drop_caches
    fio --name=cold --filename="$(file_of "$name")" --readonly --ioengine=mmap --size="${mib}M" --invalidate=0 \
        --output-format=terse --terse-version=3 "$@" | awk -F';' '
            { for (i = 18; i <= 37; i++) if (sub(/^50\.0+%=/, "", $i)) median = $i
              print $7 / 1024, median }'
}

# Random pages: all with MADV_RANDOM, and 200 in the whole file with default advice, around which the kernel reads ahead.
printf '\ncold reads through a mapping\n%-14s%18s%10s%16s%10s%20s%10s\n' "" "sequential MiB/s" "to raw" \
    "random 4k p50 µs" "to raw" "200 pages p50 µs" "to raw"
for name in raw decode decode-4M passthrough kernel; do
    # In larger blocks memcpy(3) may access pages in descending order, which no read-ahead helps.
    read -r bw _ < <(cold "$name" --rw=read --bs=128k)
    read -r _ p50 < <(cold "$name" --rw=randread --bs=4k --fadvise_hint=random --number_ios=4000 --randseed=7)
    read -r _ few < <(cold "$name" --rw=randread --bs=4k --fadvise_hint=0 --number_ios=200 --randseed=7)
    [ "$name" = raw ] && raw_bw=$bw raw_p50=$p50 raw_few=$few
    awk -v n="$name" -v b="$bw" -v p="$p50" -v f="$few" -v rb="$raw_bw" -v rp="$raw_p50" -v rf="$raw_few" 'BEGIN {
        printf "%-14s%18.0f%10.2f%16.0f%10.2f%20.0f%10.2f\n", n, b, b / rb, p, p / rp, f, f / rf }'
done
