#!/bin/sh
# Runs QEMU for Kata Containers with the memory of the Stencil template @TEMPLATE@.
#
# Kata's Go runtime maps the memory of its VM template read-write. For a VM that resumes from the template (-incoming),
# this script replaces the guest's RAM with a private mapping of a read-only file, so that all VMs share one verified copy.
# All other calls, including the one that creates Kata's template, run QEMU with unchanged arguments.
set -eu
qemu=@QEMU@
memory=@MEMORY@
state=@STATE@
size=@SIZE@

refuse() {
    echo "error: $1" >&2
    exit 1
}

# Prints a size in bytes, given as a number with an optional suffix.
bytes() {
    case $1 in
    *[!0-9]*[!a-zA-Z] | '' | [!0-9]*) return 1 ;;
    *[kK]) echo $((${1%?} * 1024)) ;;
    *[mM]) echo $((${1%?} * 1048576)) ;;
    *[gG]) echo $((${1%?} * 1073741824)) ;;
    *[!0-9]*) return 1 ;;
    *) echo "$1" ;;
    esac
}

# Prints the value of a key in QEMU's key=value,key=value.
property() {
    rest=,$2,
    case $rest in
    *",$1="*)
        rest=${rest##*",$1="}
        echo "${rest%%,*}"
        ;;
    esac
}

# First pass: is this a resume, and which object is the RAM?
incoming='' ram='' option='' unsupported=''
for word in "$@"; do
    case $option:$word in
    -incoming:*) incoming=$word ;;
    -numa:*memdev=*) ram="$ram $(property memdev "$word")" ;;
    -machine:*memory-backend=* | -M:*memory-backend=*) ram="$ram $(property memory-backend "$word")" ;;
    -device:vhost-user*) unsupported="$unsupported; device ${word%%,*}" ;;
    esac
    option=$word
done
[ -n "$incoming" ] || exec "$qemu" "$@"
# shellcheck disable=SC2086
set -- "$(set -- $ram && echo $#)" "$@"
[ "$1" != 0 ] || refuse "found no RAM object (-numa node,memdev= or -machine memory-backend=)"
[ "$1" = 1 ] || refuse "expected 1 RAM object, found $1: remove NUMA nodes from Kata's configuration"
shift
ram=${ram# }
# runtime-rs gives its VMs anonymous RAM, which QEMU saves in the device state.
[ "$ram" != entire-guest-memory ] || refuse "runtime-rs keeps the RAM of QEMU's template in its file 'state', which every VM copies: use runtime-rs with Cloud Hypervisor or Dragonball, or the Go runtime"
[ -z "$unsupported" ] || refuse "unsupported for clones of a template: ${unsupported#; }; set shared_fs to virtio-9p or none"

# Second pass: the same arguments, with the RAM object replaced.
left=$# option='' found=''
while [ "$left" -gt 0 ]; do
    word=$1
    shift
    left=$((left - 1))
    if [ "$option" = -object ] && [ "$(property id "$word")" = "$ram" ]; then
        case $word in
        memory-backend-file,* | memory-backend-ram,* | memory-backend-memfd,*) ;;
        *) refuse "cannot replace object ${word%%,*} with a template" ;;
        esac
        case $(property share "$word") in
        on | yes | true | y) refuse "the RAM of this VM is shared (share=on), but template memory must be private: disable file_mem_backend and virtio-fs" ;;
        esac
        want=$(bytes "$(property size "$word")") || refuse "cannot read the size in $word"
        [ "$want" = "$size" ] || refuse "expected $size bytes of RAM, found $want: set default_memory to match the template"
        # Guards against resuming the device state of another template with this memory.
        theirs=$(property mem-path "$word")
        theirs=${theirs%/*}/state
        if [ -n "$state" ] && [ -f "$theirs" ] && ! cmp -s "$theirs" "$state"; then
            refuse "$theirs differs from the device state of the template: import Kata's template again"
        fi
        path=$(printf %s "$memory" | sed 's/,/,,/g')
        word="memory-backend-file,id=$ram,size=$size,mem-path=$path,align=2M,share=off,readonly=on,rom=off"
        # Without reserve=off, each VM is charged the whole size of its RAM. QEMU rejects the option in mode 2.
        [ "$(cat /proc/sys/vm/overcommit_memory)" = 2 ] || word=$word,reserve=off
        found=yes
    fi
    option=$word
    set -- "$@" "$word"
done
[ -n "$found" ] || refuse "missing -object with id $ram, which is the RAM of this VM"
exec "$qemu" "$@"
