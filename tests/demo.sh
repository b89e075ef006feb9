#!/usr/bin/env bash
# The main use case, from a booting guest to the memory of its clones: `make demo` builds and runs it.
# All files are in one temporary directory, which is removed at the end, also after an interrupt.
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=tests/support/host.sh
. "$top/tests/support/host.sh"

qemus=${STENCIL_DEMO_QEMUS:-6}
simulated=${STENCIL_DEMO_SIMULATED:-200}
bin=${STENCIL_BIN_DIR:-${CARGO_TARGET_DIR:-$top/target}/release}

unmet=$(unmet_requirements)
if [ -n "$unmet" ]; then
    printf 'demo: this host does not meet these requirements:\n' >&2
    sed 's/^/  /' <<<"$unmet" >&2
    exit 1
fi
for need in "$bin/stencil" "$bin/stencil-mountd"; do
    [ -x "$need" ] || { echo "demo: missing $need: run make build" >&2; exit 1; }
done
at_least "$(qemu_version)" "$STENCIL_QEMU_MIN" || { echo "demo: missing QEMU >= $STENCIL_QEMU_MIN: run make setup" >&2; exit 1; }
mapfile -t guest < <("$top/tests/support/guest.sh")
[ "${#guest[@]}" = 3 ] || exit 1

dir=$(mktemp -d "${TMPDIR:-/tmp}/stencil-demo.XXXXXX")
export STENCIL_STORE=$dir/store STENCIL_RUNTIME_DIR=$dir/run
PATH=$bin:$PATH
mkdir "$dir/mnt" "$dir/run"
source_pid=
began=$SECONDS

say() { printf '\n\033[1m%3d s  %s\033[0m\n' $((SECONDS - began)) "$*"; }
[ -t 1 ] || say() { printf '\n%3d s  %s\n' $((SECONDS - began)) "$*"; }

# shellcheck disable=SC2317
clean() {
    local code=$?
    trap - EXIT INT TERM HUP
    set +e
    stencil -q stop --all >/dev/null 2>&1
    [ -z "$source_pid" ] || { kill "$source_pid" && wait "$source_pid"; } 2>/dev/null
    if grep -q " $dir/mnt " /proc/self/mountinfo; then
        stencil -q umount "$dir/mnt" 2>/dev/null || stencil -q umount --force "$dir/mnt"
    fi
    # The watchdog of a launch may still write how its clones ended.
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        rm -rf "$dir" 2>/dev/null
        [ -e "$dir" ] || break
        sleep 1
    done
    [ "$code" = 0 ] || echo "demo: failed with exit code $code; all its files, mounts and processes have been removed" >&2
    exit "$code"
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# wait_for SECONDS FILE PATTERN
wait_for() {
    local end=$((SECONDS + $1))
    until grep -q "$3" "$2" 2>/dev/null; do
        if [ $SECONDS -ge $end ]; then
            echo "demo: timed out after $1 s waiting for '$3' in $2" >&2
            tail -5 "$2" >&2 || true
            exit 1
        fi
        sleep 0.1
    done
}

# beats PORT: prints the heartbeats that the guest behind this port of the host has written to its disk.
beats() {
    perl -MIO::Socket::INET -e '
        my $guest = IO::Socket::INET->new(PeerAddr => "127.0.0.1", PeerPort => $ARGV[0], Timeout => 20) or die "port $ARGV[0]: $!\n";
        $SIG{ALRM} = sub { die "port $ARGV[0]: no answer\n" };
        alarm 60;
        print $guest "GET /beats HTTP/1.0\r\n\r\n";
        $guest->flush;
        my ($head, $body) = split /\r\n\r\n/, join("", <$guest>), 2;
        $head =~ / 200 / or die "port $ARGV[0]: $head\n";
        print $body;' "$1"
}

# ask QMP SERIAL: prints what a VM reports over QMP (name, UUID, generation ID, MAC address) and on its second serial
# port (its root).
ask() {
    perl -MIO::Socket::UNIX -e '
        my ($qmp_path, $serial_path) = @ARGV;
        $SIG{ALRM} = sub { die "$qmp_path: no answer\n" };
        alarm 60;
        my $qmp = IO::Socket::UNIX->new(Peer => $qmp_path) or die "$qmp_path: $!\n";
        sub run {
            my ($words, $field) = @_;
            print $qmp "$words\n";
            $qmp->flush;
            while (my $line = <$qmp>) {
                next unless $line =~ /^\{"return"/;
                return $line =~ /"$field": "([^"]*)"/ ? $1 : "?";
            }
            die "$qmp_path: closed\n";
        }
        run(q({"execute": "qmp_capabilities"}), "return");
        my @all = (run(q({"execute": "query-name"}), "name"), run(q({"execute": "query-uuid"}), "UUID"),
            run(q({"execute": "query-vm-generation-id"}), "guid"),
            run(q({"execute": "qom-get", "arguments": {"path": "/machine/peripheral/eth", "property": "mac"}}), "return"));
        my $serial = IO::Socket::UNIX->new(Peer => $serial_path) or die "$serial_path: $!\n";
        print $serial "root\n";
        $serial->flush;
        my $line = <$serial> // "";
        $line =~ /^root: (.*)/ or die "$serial_path: unexpected reply $line\n";
        print join(" ", @all, $1), "\n";' "$1" "$2"
}

# is_on_disk NAME ROOT
is_on_disk() {
    [ "$2" = "/dev/vda ext4" ] || { echo "demo: the root of $1 is '$2', expected '/dev/vda ext4'" >&2; exit 1; }
}

say "Create a disk: a small ext4 with the guest's system, in a qcow2"
"$top/tests/support/guest.sh" --disk "$dir/disk.raw" 32M
qemu-img convert -f raw -O qcow2 "$dir/disk.raw" "$dir/disk.qcow2"
rm "$dir/disk.raw"

say "A Linux guest boots in QEMU $(qemu_version) (TCG, 256 MiB in a shared file, its root on the disk, a network card, two serial ports)"
qemu-system-x86_64 -M q35,memory-backend=ram0 -accel tcg -cpu max -m 256M -nodefaults -no-user-config -display none \
    -object "memory-backend-file,id=ram0,size=256M,mem-path=$dir/ram,share=on" \
    -name source -uuid "$(</proc/sys/kernel/random/uuid)" -device vmgenid,guid=auto -object rng-random,id=rng0,filename=/dev/urandom -device virtio-rng-pci,rng=rng0 \
    -kernel "${guest[0]}" -initrd "${guest[1]}" -append "${guest[2]}" \
    -drive "file=$dir/disk.qcow2,if=virtio,format=qcow2,id=root" \
    -netdev user,id=n0,hostfwd=tcp:127.0.0.1:0-:80 -device virtio-net-pci,netdev=n0,id=eth \
    -serial "file:$dir/serial" -serial "unix:$dir/second.sock,server=on,wait=off" -qmp "unix:$dir/qmp,server=on,wait=off" </dev/null 2>"$dir/qemu.log" &
source_pid=$!
wait_for 300 "$dir/serial" "heartbeat 3 "
tail -1 "$dir/serial"
read -r name uuid generation mac root < <(ask "$dir/qmp" "$dir/second.sock")
printf '%s\n' "$name" "$uuid" "$generation" "$mac" >"$dir/identities"
is_on_disk source "$root"

say "The running VM becomes a template, and continues"
stencil capture "$dir/qmp" demo:v1
beats=$(grep -c heartbeat "$dir/serial")
sleep 1
[ "$(grep -c heartbeat "$dir/serial")" -gt "$beats" ] || { echo "demo: the captured guest does not run any more" >&2; exit 1; }
for left in "$dir"/*.stencil-*; do
    [ ! -e "$left" ] || { echo "demo: the capture has left $left" >&2; exit 1; }
done
kill "$source_pid"
wait "$source_pid" 2>/dev/null || true
source_pid=
qemu-img check -q "$dir/disk.qcow2" || { echo "demo: the captured guest's disk is damaged" >&2; exit 1; }

say "Mount the store"
stencil mount "$dir/mnt"
memory=$dir/mnt/$(readlink "$dir/mnt/templates/demo/v1" | sed 's|^\(\.\./\)*||')/memory
disk=${memory%/*}/disk-root
base=$(sha256sum <"$disk")
[ "$base" = "$(stencil export demo:v1/disk-root - | sha256sum)" ] || { echo "demo: the disk in the mount differs from the disk in the store" >&2; exit 1; }

say "$qemus QEMU clones resume from the template"
# A process substitution would continue after a signal has ended the demo.
mapfile -t ids <<<"$(stencil clone demo:v1 -n "$qemus" | cut -f1)"
[ "${#ids[@]}" = "$qemus" ] || exit 1

say "$simulated simulated clones map it, read 2 % and write 1 % of its pages"
[ "$(stencil clone demo:v1 -n "$simulated" --simulate read=2%,write=1% | wc -l)" = "$simulated" ] || exit 1

say "Each guest continues from the state of the template"
for id in "${ids[@]}"; do
    wait_for 60 "$STENCIL_RUNTIME_DIR/clones/$id/serial.log" heartbeat
    printf '%s  %s\n' "$id" "$(stencil logs "$id" | grep heartbeat | tail -1)"
done

say "Each guest serves the contents of its own disk on its own port, all at the same time"
declare -A port wrote
while read -r id _ _ _ _ ports _; do port[$id]=${ports%%->*}; done < <(stencil ps | grep ' qemu ')
mkdir "$dir/answers"
asking=()
for id in "${ids[@]}"; do
    { beats "${port[$id]}" | tail -1 && ask "$STENCIL_RUNTIME_DIR/clones/$id/qmp.sock" "$STENCIL_RUNTIME_DIR/clones/$id/serial-1.sock"; } >"$dir/answers/$id" &
    asking+=($!)
done
for one in "${asking[@]}"; do wait "$one" || { echo "demo: a clone does not reply" >&2; exit 1; }; done
for id in "${ids[@]}"; do
    { read -r beat && read -r name uuid generation mac root; } <"$dir/answers/$id"
    is_on_disk "$id" "$root"
    wrote[$id]=${beat%% *}
    printf '%s  port %s  MAC %s  on its disk: %s\n' "$id" "${port[$id]}" "$mac" "$beat"
    printf '%s\n' "${port[$id]}" "$name" "$uuid" "$generation" "$mac" "$beat" >>"$dir/identities"
done
[ "$(sort -u "$dir/identities" | wc -l)" = $((qemus * 6 + 4)) ] || { echo "demo: two of the clones and the captured VM have the same identity" >&2; cat "$dir/identities" >&2; exit 1; }

say "What they cost"
stencil density --wide --audit | awk '
    $3 == "simulated" { if (++seen > 3) { more++; next } }
    more && !/simulated/ { printf "… and %d more simulated clones\n", more; more = 0 }
    { print }'

say "The template has not changed"
served=$(sha256sum <"$memory")
[ "$served" = "$(stencil export demo:v1 - | sha256sum)" ] || { echo "demo: the template has changed" >&2; exit 1; }
echo "sha256 ${served%% *} through the mount, and in the store"
while_writing=$(sha256sum <"$disk")
for id in "${ids[@]}"; do
    beat=$(beats "${port[$id]}" | tail -1)
    [ "${beat%% *}" -gt "${wrote[$id]}" ] || { echo "demo: $id has not written since" >&2; exit 1; }
done

say "Stop all clones, unmount"
stencil stop --all
[ "$base" = "$while_writing" ] && [ "$base" = "$(sha256sum <"$disk")" ] || { echo "demo: the base image has changed" >&2; exit 1; }
echo "sha256 ${base%% *} the base image of their disks: before, while all wrote, and after"
stencil umount "$dir/mnt"
[ -z "$(stencil ps --ids)" ] || { echo "demo: there are still clones" >&2; exit 1; }
if grep -q "$dir" /proc/self/mountinfo; then
    echo "demo: there is still a mount" >&2
    exit 1
fi
say "Done"
