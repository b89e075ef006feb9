#!/usr/bin/env bash
# Builds the initramfs of the test guest (cached below target/) and prints where kernel and initramfs are,
# one a line. The guest fills some memory with numbers, then prints a heartbeat some five times a second:
#
#     heartbeat COUNT UPTIME RANDOM
#
# and with each reads a part of its memory that it has not read for long: in a clone, pages that nobody has touched.
# With a disk (an ext4 on virtio-blk) it appends each heartbeat to its file `beats`, synced; with a network card it
# serves the disk by HTTP at 10.0.2.15:80; on a second serial port it answers each line with its last heartbeat, and
# a line "mac ADDRESS" gives its network card that address first.
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
    mkdir -p "$work/root/modules" "$work/root/disk"
    [ ! -d "$cache/modules" ] || cp "$cache"/modules/*.ko "$work/root/modules/"
    [ ! -e "$cache/virtio-rng.ko" ] || cp "$cache/virtio-rng.ko" "$work/root/modules/virtio-rng.ko"
    cat >"$work/root/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t tmpfs -o size=80% ram /ram
for module in virtio-rng virtio_blk failover net_failover virtio_net; do
    [ ! -e /modules/$module.ko ] || /bin/busybox insmod /modules/$module.ko
done
exec </dev/ttyS0 >/dev/ttyS0 2>&1
disk=
for device in /dev/vd?; do
    if [ -b "$device" ] && /bin/busybox mount -t ext4 "$device" /disk; then
        disk=yes
        break
    fi
done
if [ -e /proc/sys/net/ipv4/conf/eth0 ]; then
    /bin/busybox ip address add 10.0.2.15/24 dev eth0
    /bin/busybox ip link set eth0 up
    # A new MAC is told to the network.
    echo 1 >/proc/sys/net/ipv4/conf/eth0/arp_notify
    /bin/busybox httpd -h /disk -p 80
fi
# Whoever connects to the second serial port is told the last heartbeat for each line, and may change the MAC.
(
    exec 3<>/dev/ttyS1 || exit
    /bin/busybox stty -F /dev/ttyS1 raw -echo
    while read -r line <&3; do
        read -r beat </ram/beat
        case $line in mac\ *) /bin/busybox ip link set dev eth0 address "${line#mac }" ;; esac
        echo "$line: $beat" >&3
    done
) 2>/dev/null &
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
    echo "$count $random" >/ram/beat
    if [ -n "$disk" ]; then
        echo "$count $random" >>/disk/beats
        /bin/busybox sync
    fi
    /bin/busybox dd if=/ram/noise of=/dev/null bs=64k count=1 skip=$((count % 128)) 2>/dev/null
    /bin/busybox usleep 150000
done
INIT
    chmod +x "$work/root/init"
    (cd "$work/root" && find . | cpio --quiet -o -H newc --owner 0:0) | gzip -1 >"$work/initramfs.gz"
    mv "$work/initramfs.gz" "$initramfs"
fi
printf '%s\n%s\n' "$kernel" "$initramfs"
