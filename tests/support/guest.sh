#!/usr/bin/env bash
# Builds the initramfs of the test guest (cached below target/) and prints where kernel and initramfs are,
# one a line. The guest fills some memory with numbers, then prints a heartbeat some five times a second:
#
#     heartbeat COUNT UPTIME RANDOM
#
# and with each reads a part of its memory that it has not read for long: in a clone, pages that nobody has touched.
set -euo pipefail
top=$(cd "$(dirname "$0")/../.." && pwd)
# shellcheck source=tests/support/host.sh
. "$top/tests/support/host.sh"
cache=$(guest_cache "$top")
kernel=$cache/vmlinuz
initramfs=$cache/initramfs.gz

[ -s "$kernel" ] || {
    echo "guest: no kernel at $kernel: run make setup" >&2
    exit 1
}
if ! [ "$initramfs" -nt "$0" ] || ! [ "$initramfs" -nt "$kernel" ]; then
    busybox=$(command -v busybox) || { echo "guest: no busybox: run make setup" >&2; exit 1; }
    work=$(mktemp -d "$cache/initramfs.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$work"/root/{bin,dev,proc,sys,ram}
    cp "$busybox" "$work/root/bin/busybox"
    [ ! -e "$cache/virtio-rng.ko" ] || cp "$cache/virtio-rng.ko" "$work/root/"
    cat >"$work/root/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t tmpfs -o size=80% ram /ram
[ ! -e /virtio-rng.ko ] || /bin/busybox insmod /virtio-rng.ko
exec </dev/ttyS0 >/dev/ttyS0 2>&1
# Text with some structure, as the memory of a real guest is: not all random, not all one byte.
/bin/busybox seq 1 1000000 >/ram/numbers
/bin/busybox dd if=/dev/urandom of=/ram/noise bs=1M count=8 2>/dev/null
echo "guest ready"
count=0
while :; do
    count=$((count + 1))
    read -r uptime rest </proc/uptime
    read -r random </proc/sys/kernel/random/uuid
    echo "heartbeat $count $uptime $random"
    /bin/busybox dd if=/ram/noise of=/dev/null bs=64k count=1 skip=$((count % 128)) 2>/dev/null
    /bin/busybox usleep 150000
done
INIT
    chmod +x "$work/root/init"
    (cd "$work/root" && find . | cpio --quiet -o -H newc --owner 0:0) | gzip -1 >"$work/initramfs.gz"
    mv "$work/initramfs.gz" "$initramfs"
fi
printf '%s\n%s\n' "$kernel" "$initramfs"
