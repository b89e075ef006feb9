#!/usr/bin/env bash
# Runs a command, then finds, reports and removes what the command left on the host: mounts, processes, swap and
# loop devices, temporary files, changed kernel settings. Any find fails the run.
#
#     tests/support/guard.sh COMMAND [ARGUMENT…]
#
# The command runs with its own TMPDIR and with STENCIL_TEST_RUN, which every descendant inherits: simultaneous
# runs do not see each other's mounts and processes. The exit code is the command's, or 1.
set -uo pipefail

run=$(mktemp -d "${TMPDIR:-/tmp}/stencil-run.XXXXXX") || exit 1
# Scenarios run programs in this directory as other users.
chmod 0755 "$run"
started=$(awk '{print $22}' /proc/self/stat)
top=$(cd "$(dirname "$0")/../.." && pwd)
target=${CARGO_TARGET_DIR:-$top/target}
# The kernel shows absolute paths only.
mkdir -p "$target/tmp" && target=$(cd "$target" && pwd -P) || exit 1
settings=(/sys/kernel/mm/ksm/run /sys/kernel/mm/transparent_hugepage/enabled
    /sys/kernel/mm/transparent_hugepage/shmem_enabled /proc/sys/vm/overcommit_memory)

setting_values() {
    local file
    for file in "${settings[@]}"; do
        [ -r "$file" ] && printf '%s %s\n' "$file" "$(cat "$file")"
    done
}
before=$(setting_values)

# Scenarios keep files that must not be on a tmpfs below the build directory.
scratch=$(cd "$target/tmp" && pwd -P)
# A new entry there at the end belongs to this run: another run in the same build directory waits until this one ends.
exec 9>"$target/guard.lock"
flock -n 9 || {
    printf 'guard: another run uses %s; waiting for it\n' "$target" >&2
    flock 9
}
scratch_before=$(ls -A "$scratch")
mounts_before=$(awk '{print $5}' /proc/self/mountinfo)

# Prints the mounts of this run, innermost first: "DEVICE TYPE PATH".
our_mounts() {
    awk -v run="$run/" -v scratch="$scratch/" '
        index($5, run) == 1 || index($5, scratch) == 1 {
            for (i = 7; i < NF; i++) if ($i == "-") break
            print $3, $(i + 1), $5
        }' /proc/self/mountinfo | tac | while read -r device type path; do
        grep -qxF "$path" <<<"$mounts_before" || printf '%s %s %s\n' "$device" "$type" "$path"
    done
}

# Prints the processes of this run: "PID STATE COMMAND".
our_processes() {
    local pid stat devices
    # The kernel shows the root directory of a process relative to its file system, which may be a mount of this run.
    devices=" $(our_mounts | cut -d' ' -f1 | tr '\n' ' ')"
    {
        grep -slzxF "STENCIL_TEST_RUN=$run" /proc/[0-9]*/environ | cut -d/ -f3
        # A process with an empty environment is recognized by its program and its age; one with another environment
        # belongs to another run.
        stat -c '%n %N' /proc/[0-9]*/exe 2>/dev/null | awk -v top="$target/" '
            { at = index($0, "-> ")
              if (index(substr($0, at), top "release/stencil") || index(substr($0, at), top "debug/stencil")) {
                  split($1, part, "/"); print part[3] " aged" } }'
        # So is a Firecracker in a jail, by its root directory.
        grep -sF ' / ' /proc/[0-9]*/mountinfo | awk -v scratch="$scratch/" -v devices="$devices" '
            $5 == "/" && (index($4, scratch) == 1 || index(devices, " " $3 " ")) {
                split($1, part, "/"); print part[3] " aged" }'
    } | sort -u | while read -r pid aged; do
        { stat=$(</proc/"$pid"/stat); } 2>/dev/null || continue
        stat=${stat##*) }
        # shellcheck disable=SC2086
        set -- $stat
        [ "$1" != Z ] || continue
        [ -z "$aged" ] || [ "${20}" -ge "$started" ] || continue
        [ -z "$aged" ] || [ -z "$(head -c 1 "/proc/$pid/environ" 2>/dev/null | tr '\0' .)" ] || continue
        printf '%s %s %s\n' "$pid" "$1" "$(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | cut -c1-160)"
    done | sort -u
}

# Aborts a FUSE connection whose server is gone or stuck, by the minor number of its device.
abort_connection() {
    unshare --mount --propagation private sh -c '
        [ -e /sys/fs/fuse/connections/'"$1"'/abort ] || mount -t fusectl none /sys/fs/fuse/connections || exit
        echo 1 >/sys/fs/fuse/connections/'"$1"'/abort' 2>/dev/null
}

found=0
report() {
    found=$((found + 1))
    printf 'guard: left behind: %s\n' "$*" >&2
}

# shellcheck disable=SC2317
remove_all() {
    local line pid device path round
    # A process that was just killed may need a moment to exit.
    for round in {1..30}; do
        [ -z "$(our_processes)" ] && break
        sleep 0.1
    done
    while read -r line; do
        [ -n "$line" ] && report "process $line"
    done < <(our_processes)

    # Aborting the connections first wakes processes that wait in state D.
    while read -r device type path; do
        report "$type mount $path"
        case $type in fuse*) abort_connection "${device#*:}" ;; esac
    done < <(our_mounts)

    for round in TERM KILL KILL; do
        while read -r pid _; do
            [ -n "$pid" ] && kill -"$round" "$pid" 2>/dev/null
        done < <(our_processes)
        [ -z "$(our_processes)" ] && break
        sleep 0.5
    done
    while read -r line; do
        [ -n "$line" ] && printf 'guard: cannot be killed: process %s\n' "$line" >&2
    done < <(our_processes)

    while read -r path; do
        report "swap $path"
        swapoff "$path"
    done < <(awk -v run="$run/" -v scratch="$scratch/" 'index($1, run) == 1 || index($1, scratch) == 1 {print $1}' /proc/swaps)
    while read -r _ _ path; do
        umount -l "$path" 2>/dev/null
    done < <(our_mounts)
    while IFS=: read -r device path; do
        report "loop device $device on $path"
        losetup -d "$device"
    done < <(losetup -n -O NAME,BACK-FILE 2>/dev/null | awk -v run="$run/" -v scratch="$scratch/" 'index($2, run) == 1 || index($2, scratch) == 1 {print $1 ":" $2}')

    while read -r path; do
        report "file $path"
    done < <(find "$run" -mindepth 1 -maxdepth 2 2>/dev/null | head -20)
    chattr -R -i "$run" 2>/dev/null
    rm -rf --one-file-system "$run"
    while read -r path; do
        [ -n "$path" ] && ! grep -qxF "$path" <<<"$scratch_before" || continue
        report "file $scratch/$path"
        chattr -R -i "$scratch/$path" 2>/dev/null
        rm -rf --one-file-system "${scratch:?}/$path"
    done < <(ls -A "$scratch")

    # Another run on this kernel, in another container, may have changed a setting temporarily.
    for round in {1..60}; do
        [ "$(setting_values)" = "$before" ] && break
        sleep 1
    done
    while read -r line; do
        # shellcheck disable=SC2086
        set -- $line
        grep -qxF "$line" <<<"$(setting_values)" && continue
        report "$1 was '${line#* }', is now '$(cat "$1")'"
        if [[ $line == *'['* ]]; then
            sed 's/.*\[\(.*\)\].*/\1/' <<<"$line" >"$1"
        else
            printf '%s\n' "$2" >"$1"
        fi
    done <<<"$before"
}

child=
trap '[ -n "$child" ] && kill -TERM "$child" 2>/dev/null' INT TERM
# Only the command gets the variable: the guard's own processes are not part of the run.
env STENCIL_TEST_RUN="$run" TMPDIR="$run" "$@" 9>&- &
child=$!
# A signal ends `wait` early; only the command's own exit code counts.
while :; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break
done

remove_all
if [ "$found" -gt 0 ]; then
    printf 'guard: items left behind by this run: %s; all have been cleared\n' "$found" >&2
    [ "$code" != 0 ] || code=1
fi
exit "$code"
