#!/usr/bin/env bash
# Runs a program as user nobody, without capabilities, where /dev/fuse and /dev/kvm cannot be opened and where temporary
# files disappear with the program. Unit tests need nothing else: `make test-unit` names this script to cargo as the
# runner of test programs. An ordinary user runs the program as it is.
#
#     tests/support/unprivileged.sh PROGRAM [ARGUMENT…]
set -euo pipefail
[ "$(id -u)" = 0 ] || exec "$@"

# shellcheck disable=SC2016
exec unshare --mount --propagation private bash -euc '
    for device in /dev/fuse /dev/kvm; do
        [ ! -e "$device" ] || mount -o bind,nodev "$device" "$device"
    done
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    export TMPDIR=/dev/shm HOME=/dev/shm
    drop=(setpriv --reuid=nobody --regid=nogroup --clear-groups --inh-caps=-all --bounding-set=-all --no-new-privs)
    # Nobody cannot reach a program below a private directory by its path, but can run it by a descriptor.
    [[ $1 != */* ]] || "${drop[@]}" test -x "$1" || { exec 9<"$1"; shift; set -- /proc/self/fd/9 "$@"; }
    exec "${drop[@]}" "$@"' "$0" "$@"
