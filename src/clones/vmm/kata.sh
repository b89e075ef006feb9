#!/bin/sh
# Runs QEMU for Kata Containers with the memory of the Stencil template @TEMPLATE@.
#
# Kata's Go runtime maps the memory of its VM template read-write. Of a VM that resumes from the template (-incoming) this
# script replaces the guest's RAM by a private map of a file that is opened read-only, so that all VMs share one verified
# copy. Every other call, the one that makes the template included, is handed on as it is.
set -eu
qemu=@QEMU@
memory=@MEMORY@
state=@STATE@
size=@SIZE@

refuse() {
    echo "stencil: $1" >&2
    exit 1
}

# The size of -object in bytes: a number, perhaps with a suffix.
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

# The value of a key in QEMU's key=value,key=value.
property() {
    rest=,$2,
    case $rest in
    *",$1="*)
        rest=${rest##*",$1="}
        echo "${rest%%,*}"
        ;;
    esac
}

# First look: does a VM resume, and which object is its RAM?
incoming='' ram='' option='' against=''
for word in "$@"; do
    case $option:$word in
    -incoming:*) incoming=$word ;;
    -numa:*memdev=*) ram="$ram $(property memdev "$word")" ;;
    -machine:*memory-backend=* | -M:*memory-backend=*) ram="$ram $(property memory-backend "$word")" ;;
    -device:vhost-user*) against="$against; device ${word%%,*}" ;;
    esac
    option=$word
done
[ -n "$incoming" ] || exec "$qemu" "$@"
# shellcheck disable=SC2086
set -- "$(set -- $ram && echo $#)" "$@"
[ "$1" = 1 ] || refuse "this VM has $1 RAM objects, the template has one: leave NUMA nodes out of Kata's configuration"
shift
ram=${ram# }
[ -z "$against" ] || refuse "clones of a template cannot have$against: set shared_fs to virtio-9p or none"

# Second look: the same words, with the RAM replaced.
left=$# option='' found=''
while [ "$left" -gt 0 ]; do
    word=$1
    shift
    left=$((left - 1))
    if [ "$option" = -object ] && [ "$(property id "$word")" = "$ram" ]; then
        case $word in
        memory-backend-file,* | memory-backend-ram,* | memory-backend-memfd,*) ;;
        *) refuse "object ${word%%,*} cannot be replaced by a template" ;;
        esac
        case $(property share "$word") in
        on | yes | true | y) refuse "the RAM of this VM is shared (share=on), and a template's is not: leave file_mem_backend and virtio-fs out" ;;
        esac
        want=$(bytes "$(property size "$word")") || refuse "cannot read the size in $word"
        [ "$want" = "$size" ] || refuse "this VM has $want bytes of RAM, the template $size: set default_memory to match"
        # Device state of another template would meet this memory.
        theirs=$(property mem-path "$word")
        theirs=${theirs%/*}/state
        if [ -n "$state" ] && [ -f "$theirs" ] && ! cmp -s "$theirs" "$state"; then
            refuse "$theirs is not the device state of the template: import Kata's template again"
        fi
        path=$(printf %s "$memory" | sed 's/,/,,/g')
        word="memory-backend-file,id=$ram,size=$size,mem-path=$path,align=2M,share=off,readonly=on,rom=off"
        found=yes
    fi
    option=$word
    set -- "$@" "$word"
done
[ -n "$found" ] || refuse "no -object has the id $ram, which is the RAM of this VM"
exec "$qemu" "$@"
