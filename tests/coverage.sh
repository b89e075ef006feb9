#!/usr/bin/env bash
# Reports how many lines of the daemon's supervisor and server the unit tests execute; `make coverage` calls it. Fails
# below MIN_PERCENT. Lines of test modules do not count, nor lines of the adapters.
set -euo pipefail
# Cargo runs this script instead of rustc for the crates of the workspace.
case ${1-} in rustc | */rustc) exec "$@" -C instrument-coverage ;; esac

MIN_PERCENT=85
# Files that only carry out the decisions of other files: by the kernel, or by processes that they start. Scenarios with
# real mounts test them. All adapters together have at most MAX_ADAPTERS_PERCENT of the lines.
MAX_ADAPTERS_PERCENT=15
ADAPTERS='
supervisor/run.rs
supervisor/become_program.rs
supervisor/server_process.rs
supervisor/jobs/mod.rs
supervisor/jobs/unmount.rs
supervisor/jobs/users.rs
'

top=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=tests/support/host.sh
. "$top/tests/support/host.sh"
cargo=${CARGO:-cargo}
cd "$top"

fail() {
    printf 'coverage: %s\n' "$@" >&2
    exit 1
}

# The newest LLVM of Debian 12 reads the profiles of rustc, whose own tools rustup has.
for dir in "$(rustc --print target-libdir)/../bin" "/usr/lib/llvm-$STENCIL_LLVM/bin"; do
    [ -z "${bin-}" ] && [ -x "$dir/llvm-cov" ] && [ -x "$dir/llvm-profdata" ] && bin=$dir || true
done
[ -n "${bin-}" ] || fail 'llvm-cov and llvm-profdata are missing: run make setup, or rustup component add llvm-tools'

# The tests run as user nobody, see unprivileged.sh.
# Not in /dev/shm, which the runner of the tests hides.
profiles=$(TMPDIR=/tmp mktemp -d)
trap 'rm -rf "$profiles"' EXIT
chmod 1777 "$profiles"
export RUSTC_WORKSPACE_WRAPPER=$top/tests/coverage.sh LLVM_PROFILE_FILE="$profiles/%p-%m.profraw"
export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER=$top/tests/support/unprivileged.sh
program=$("$cargo" test -q -p stencil-mountd --bins --no-run --message-format json |
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -1)
PATH="${CARGO_TARGET_DIR:-target}/tools/bin:$PATH" "$cargo" nextest run -p stencil-mountd --bins >"$profiles/log" 2>&1 || {
    cat "$profiles/log" >&2
    fail 'the unit tests fail'
}
"$bin/llvm-profdata" merge -sparse "$profiles"/*.profraw -o "$profiles/merged"
"$bin/llvm-cov" export -format=lcov -instr-profile "$profiles/merged" "$program" >"$profiles/lcov"

awk -v min=$MIN_PERCENT -v max_adapters=$MAX_ADAPTERS_PERCENT -v adapters="$ADAPTERS" '
    function percent(part, all) { return all ? 100 * part / all : 100 }
    function row(name, lines, covered) { return sprintf("%-42s %6d %6d %5.1f %%", name, lines, covered, percent(covered, lines)) }
    BEGIN { n = split(adapters, list); for (i = 1; i <= n; i++) is_adapter[list[i]] = 1 }
    /^SF:/ {
        path = substr($0, 4); name = ""
        if (path !~ /\/mountd\/src\/(supervisor|server)\// || path ~ /\/(tests|testing)(\/|\.rs$)/) next
        name = path; sub(/.*\/mountd\/src\//, "", name)
        # A test module is the end of its file.
        last = 1e9; at = 0
        while ((getline line < path) > 0) { at++; if (line == "mod tests {" && last == 1e9) last = at }
        close(path); names[++files] = name
    }
    /^DA:/ && name != "" {
        split(substr($0, 4), field, ",")
        if (field[1] < last) { lines[name]++; covered[name] += field[2] > 0 }
    }
    END {
        printf "%-42s %6s %6s\n", "file below mountd/src", "lines", "run"
        for (i = 1; i <= files; i++) {
            name = names[i]; all += lines[name]
            if (name in is_adapter) { adapter_lines += lines[name]; adapter_covered += covered[name]; seen[name] = 1; continue }
            total += lines[name]; run += covered[name]
            print row(name, lines[name], covered[name]) | "sort"
        }
        close("sort")
        print row("all of these", total, run)
        print row("adapters, not counted", adapter_lines, adapter_covered)
        for (name in is_adapter) if (!(name in seen)) { printf "coverage: no lines of adapter %s\n", name; failed = 1 }
        if (percent(run, total) < min) { printf "coverage: %.1f %% of the lines run, expected %d %%\n", percent(run, total), min; failed = 1 }
        if (percent(adapter_lines, all) > max_adapters) {
            printf "coverage: the adapters have %.1f %% of all lines, expected at most %d %%\n", percent(adapter_lines, all), max_adapters
            failed = 1
        }
        exit failed
    }' "$profiles/lcov"
