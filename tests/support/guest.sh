#!/usr/bin/env bash
# Builds the initramfs of the test guest (cached below target/) and prints the path of the kernel, the path of the
# initramfs and the kernel's command line, one per line. The guest fills some memory with numbers, then prints a
# heartbeat about five times a second:
#
#     heartbeat COUNT UPTIME RANDOM
#
# With each fourth heartbeat the guest reads a part of its memory that it has not read recently: in a clone, pages that
# have not been touched. Under TCG each program start takes about 10 ms of CPU time, so the guest starts few programs.
#
# If there is a disk on virtio-blk from `guest.sh --disk FILE SIZE [DIRECTORY]` (an ext4 of that size with the guest's
# system and the contents of DIRECTORY), it is the root, and the guest appends each heartbeat to /srv/beats there and
# syncs. With a network card the guest serves /srv by HTTP at 10.0.2.15:80. On a second serial port it answers each line
# with its last heartbeat, except: "root" with the device and type of its root; "clock" with the seconds since 1970 of
# its RTC and of its system clock; "mac ADDRESS" first sets the address of its network card. On a virtio-serial port it
# acts as a guest agent: it answers guest-sync-delimited, and sets both clocks on guest-set-time.
set -euo pipefail
top=$(cd "$(dirname "$0")/../.." && pwd)
# shellcheck source=tests/support/host.sh
. "$top/tests/support/host.sh"
cache=$(guest_cache "$top")
kernel=$cache/vmlinuz
initramfs=$cache/initramfs.gz

[ -s "$kernel" ] || {
    echo "guest: missing kernel $kernel: run make setup" >&2
    exit 1
}
if ! [ "$initramfs" -nt "$0" ] || ! [ "$initramfs" -nt "$kernel" ]; then
    busybox=$(command -v busybox) || { echo "guest: missing busybox: run make setup" >&2; exit 1; }
    work=$(mktemp -d "$cache/initramfs.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$work"/root/{bin,dev,proc,sys,ram,srv,modules,disk}
    cp "$busybox" "$work/root/bin/busybox"
    [ ! -d "$cache/modules" ] || cp "$cache"/modules/*.ko "$work/root/modules/"
    [ ! -e "$cache/virtio-rng.ko" ] || cp "$cache/virtio-rng.ko" "$work/root/modules/virtio-rng.ko"
    cat >"$work/root/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
exec </dev/ttyS0 >/dev/ttyS0 2>&1
for module in virtio-rng virtio_blk failover net_failover virtio_net; do
    [ ! -e /modules/$module.ko ] || /bin/busybox insmod /modules/$module.ko
done
for device in /dev/vd?; do
    if [ -b "$device" ] && /bin/busybox mount -t ext4 "$device" /disk 2>/dev/null; then
        /bin/busybox mount --move /dev /disk/dev
        exec /bin/busybox switch_root /disk /bin/guest
    fi
done
exec /bin/guest
INIT
    cat >"$work/root/bin/guest" <<'GUEST'
#!/bin/busybox sh
exec </dev/ttyS0 >/dev/ttyS0 2>&1
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t tmpfs -o size=80% ram /ram
root() {
    while read -r device place type rest; do
        [ "$place" != / ] || echo "$device $type"
    done </proc/mounts
}
case $(root) in *\ ext4) disk=yes ;; *) disk= ;; esac
if [ -e /proc/sys/net/ipv4/conf/eth0 ]; then
    /bin/busybox ip address add 10.0.2.15/24 dev eth0
    /bin/busybox ip link set eth0 up
    # Announce a new MAC address to the network.
    echo 1 >/proc/sys/net/ipv4/conf/eth0/arp_notify
    /bin/busybox httpd -h /srv -p 80
fi
# Serve the second serial port: answer each line with the last heartbeat, and execute the commands.
(
    exec 3<>/dev/ttyS1 || exit
    /bin/busybox stty -F /dev/ttyS1 raw -echo
    while read -r line <&3; do
        # While a heartbeat is being written, the file is empty.
        answer=
        until [ -n "$answer" ]; do read -r answer </ram/beat || /bin/busybox usleep 1000; done
        case $line in
        mac\ *) /bin/busybox ip link set dev eth0 address "${line#mac }" ;;
        root) answer=$(root) ;;
        clock)
            read -r rtc </sys/class/rtc/rtc0/since_epoch
            answer="$rtc $(/bin/busybox date +%s) $(/bin/busybox hwclock -u -r)"
            ;;
        esac
        echo "$line: $answer" >&3
    done
) 2>/dev/null &
# While no client is connected a read returns at once.
for port in /dev/vport*; do
    [ -c "$port" ] || continue
    (
        exec 3<>"$port" || exit
        while :; do
            while read -r line <&3; do
                case $line in
                *guest-sync-delimited*)
                    number=${line#*\"id\":}
                    printf '\377{"return": %s}\n' "${number%%[!0-9]*}" >&3
                    ;;
                *guest-set-time*)
                    number=${line#*\"time\":}
                    number=${number%%[!0-9]*}
                    /bin/busybox date -u -s "@${number%?????????}" >/dev/null
                    /bin/busybox hwclock -u -w
                    echo '{"return": {}}' >&3
                    ;;
                esac
            done
            /bin/busybox usleep 200000
        done
    ) 2>/dev/null &
done
# Text with some structure, like the memory of a real guest: neither random nor constant.
numbers=$(/bin/busybox seq 100000 110000)
for ten in 0 1 2; do
    for one in 0 1 2 3 4 5 6 7 8 9; do
        echo "$ten$one $numbers"
    done
done >/ram/numbers
/bin/busybox dd if=/dev/urandom of=/ram/noise bs=1M count=8 2>/dev/null
/bin/busybox mkfifo /ram/silence
exec 4<>/ram/silence
echo "guest ready"
count=0
while :; do
    count=$((count + 1))
    read -r uptime rest </proc/uptime
    read -r random </proc/sys/kernel/random/uuid
    echo "heartbeat $count $uptime $random"
    echo "$count $random" >/ram/beat
    if [ -n "$disk" ]; then
        echo "$count $random" >>/srv/beats
        /bin/busybox sync
    fi
    if [ $((count % 4)) = 0 ]; then
        /bin/busybox dd if=/ram/noise of=/dev/null bs=256k count=1 skip=$((count / 4 % 32)) 2>/dev/null
    fi
    # The pause: nothing is ever written to this pipe.
    read -r -t 0.15 silence <&4
done
GUEST
    chmod +x "$work/root/init" "$work/root/bin/guest"
    (cd "$work/root" && find . | cpio --quiet -o -H newc --owner 0:0) | gzip -1 >"$work/initramfs.gz"
    mv "$work/initramfs.gz" "$initramfs"
fi
if [ "${1-}" = --disk ]; then
    tree=$(mktemp -d)
    trap 'rm -rf "$tree" ${work:+"$work"}' EXIT
    gzip -dc "$initramfs" | cpio --quiet -id -D "$tree"
    [ -z "${4-}" ] || cp -r "$4/." "$tree"
    mkfs.ext4 -q -d "$tree" "$2" "$3" >/dev/null 2>&1
    exit
fi
# Kernel features that start slowly under TCG and that a test guest does not need: certificates, self-tests, BPF tables,
# patched instructions.
skipped=load_system_certificate_list,jent_mod_init,bpf_tcp_ca_kfunc_init,bpf_dummy_struct_ops_init,trace_eval_init
skipped+=,sed_opal_init,init_encrypted,bpf_sk_storage_map_iter_init,crypto_kdf108_init
append="console=ttyS0 quiet panic=-1 mitigations=off nopti nokaslr no_timer_check initcall_blacklist=$skipped"
printf '%s\n%s\n%s\n' "$kernel" "$initramfs" "$append"
