# `make help` lists the targets. Each target runs its prerequisites itself.

CARGO ?= $(or $(shell command -v cargo),$(HOME)/.cargo/bin/cargo)
PREFIX ?= /usr/local
DESTDIR ?=
# The only directory where mount(8) looks for helpers.
SBINDIR ?= /usr/sbin
target := $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),target)
# The directory of the programs to install or to package.
bin ?= $(target)/release
guard := tests/support/guard.sh
# The library as other programs use it, and how many crates it may need.
library := -p stencilfs --no-default-features
all_features := --features stencilfs/rust-vmm
max_crates := 40
# Scenarios mostly wait, so more threads than CPUs are useful.
export RUST_TEST_THREADS ?= $(shell echo $$((2 * $$(nproc))))

# The profile of the unit tests.
profile ?= release
# make setup installs missing subcommands of cargo there.
tools := PATH="$(abspath $(target))/tools/bin:$$PATH"
# Unit tests run as user nobody, without /dev/fuse and /dev/kvm.
unprivileged := CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER='$(CURDIR)/tests/support/unprivileged.sh'

# Targets must not run in parallel: they share the host.
.NOTPARALLEL:
.PHONY: help setup build demo test test-unit coverage soak check bench bench-quick bench-check docs-record install install-files install-symbols uninstall deb deb-files clean

help:
	@echo 'make setup    install the packages for building and testing (Debian 12) and print their versions'
	@echo 'make build    build the release binaries $(target)/release/stencil and stencil-mountd'
	@echo 'make demo     capture a real guest as a template, launch many clones, measure their memory (runs setup and build)'
	@echo 'make test     run all tests, then check that nothing was left on the host (runs setup and build)'
	@echo 'make test-unit  run the unit tests and documentation examples as user nobody, without FUSE and KVM'
	@echo 'make coverage  report the lines of supervisor and server that the unit tests run; fails below 85 %'
	@echo 'make soak     run the soak, kill, crash and fuzz tests with higher repeat counts, bench-quick and coverage (runs setup and build)'
	@echo 'make check    check format, lints, API documentation, licences and sources of crates; warnings are errors'
	@echo 'make bench    measure every operation beside its floor and peers, write tests/bench/bench.json and the tables in docs'
	@echo 'make bench-quick  the same in short; fails if a ratio is worse than half its goal'
	@echo 'make bench-check  compare tests/bench/bench.json with the goals, and the tables in docs with it'
	@echo 'make docs-record  run the commands in the documentation, record their output there, draw docs/tutorial.svg'
	@echo 'make install  build, then install into $$DESTDIR$$PREFIX (PREFIX=$(PREFIX)); the mount(8) helper into $$DESTDIR$$SBINDIR ($(SBINDIR))'
	@echo 'make install-files  install the programs in $$(bin) ($(bin)) without building, for a root user without cargo'
	@echo 'make install-symbols  install the debug symbols of the programs in $$(bin) into $$DESTDIR/usr/lib/debug'
	@echo 'make uninstall  remove the files that make install has installed with the same variables'
	@echo 'make deb      build the Debian packages $(target)/debian/stencil_*.deb and stencil-dbgsym_*.deb (runs setup and build)'
	@echo 'make clean    remove the build directory'

setup:
	@tests/support/setup.sh

build:
	$(CARGO) build --release --workspace
	@CARGO='$(CARGO)' mountd/debian/crates.sh '$(target)/release' || \
	    echo 'The programs are built, but cannot be installed or packaged without the list of their crates.' >&2

demo: setup build
	@$(guard) tests/demo.sh

test: setup build test-unit
	$(CARGO) build --release --workspace --example vmm $(all_features)
	$(guard) $(CARGO) test --release --workspace --test suite
	$(if $(STENCIL_CLOUD_HYPERVISOR),RUSTFLAGS='--cfg cloud_hypervisor' $(guard) $(CARGO) test --release --workspace --test suite -- cloud_hypervisor::launch)

test-unit:
	@$(tools) $(CARGO) nextest --version >/dev/null || { echo 'cargo-nextest is missing: run make setup' >&2; exit 1; }
	$(unprivileged) $(tools) $(CARGO) nextest run --workspace --lib --bins $(all_features) --cargo-profile $(profile)
	$(unprivileged) $(CARGO) test --doc $(all_features) --profile $(profile)

coverage:
	@CARGO='$(CARGO)' tests/coverage.sh

soak: setup build
	STENCIL_SOAK=1 $(guard) $(CARGO) test --release --workspace --test suite -- soak kill crash
	STENCIL_SOAK=1 $(unprivileged) $(tools) $(CARGO) nextest run --workspace --lib --bins $(all_features) --cargo-profile release fuzz::
	$(guard) $(bench_program) quick $(bench_options)
	@CARGO='$(CARGO)' tests/coverage.sh

check: bench-check
	$(CARGO) fmt --all -- --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	$(CARGO) clippy $(library) -- -D warnings
	$(CARGO) clippy $(library) --features internals -- -D warnings
	$(CARGO) clippy $(library) --features rust-vmm --all-targets -- -D warnings
	@crates=$$($(CARGO) tree $(library) -e normal --prefix none | sort -u | wc -l) && \
	    [ "$$crates" -gt 1 ] && [ "$$crates" -le $(max_crates) ] || \
	    { echo "the library needs $$crates crates, expected at most $(max_crates): cargo tree $(library)" >&2; exit 1; }
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc $(library) --features rust-vmm --no-deps
	RUSTDOCFLAGS='-D warnings --cfg document_internals' $(CARGO) doc --workspace --no-deps --document-private-items
	$(tools) $(CARGO) deny --offline check licenses bans sources

bench_program := $(target)/release/stencil-bench
bench_options := --programs '$(target)/release' --guests '$(target)/guest' --dir '$(target)/tmp'
rounds ?= 5

bench: setup build
	$(guard) $(bench_program) run $(bench_options) --rounds $(rounds) --out tests/bench/bench.json
	$(bench_program) report tests/bench/bench.json --docs docs

bench-quick: setup build
	$(guard) $(bench_program) quick $(bench_options)

bench-check:
	$(CARGO) run -q --release -p stencil-bench -- check tests/bench/bench.json --docs docs

docs-record: setup build
	STENCIL_UPDATE_DOCS=1 $(guard) $(CARGO) test --release --workspace --test suite -- documented_commands::

deb: setup build deb-files

# Packages the programs in $(bin) without building. deb_options are options of cargo-deb.
deb-files:
	@CARGO='$(CARGO)' mountd/debian/crates.sh '$(bin)'
	@CARGO='$(CARGO)' mountd/debian/build.sh '$(bin)' $(deb_options)

install: build install-files

share := $(DESTDIR)$(PREFIX)/share
doc := $(share)/doc/stencil
# The directories with documentation pages. Only the files directly in each are installed from it.
page_dirs := $(sort $(patsubst %/,%,$(dir $(shell find docs -name '*.md'))))
unit := $(DESTDIR)$(PREFIX)/lib/systemd/system/stencil@.service
clones_unit := $(DESTDIR)$(PREFIX)/lib/systemd/system/stencil-clones@.service
exporter_unit := $(DESTDIR)$(PREFIX)/lib/systemd/system/stencil-exporter.service
completions := $(share)/bash-completion/completions/stencil $(share)/zsh/site-functions/_stencil \
    $(share)/fish/vendor_completions.d/stencil.fish

programs := stencil stencil-mountd
# gdb, perf and the programs' own backtraces find symbols by the build id of a program.
symbols := $(DESTDIR)/usr/lib/debug/.build-id
build_id = $$(readelf -n '$(1)' | sed -n 's|^ *Build ID: \(..\)\(.*\)$$|\1/\2|p')

helper := $(DESTDIR)$(SBINDIR)/mount.fuse.stencil
# A host has one mount(8) helper: the helper of another installation is not replaced.
helper_is_ours = [ "$$(readlink -m '$(helper)')" = "$$(readlink -m '$(DESTDIR)$(PREFIX)/bin/stencil')" ]
helper_is_packaged = dpkg-query --admindir='$(DESTDIR)/var/lib/dpkg' -S '$(SBINDIR)/mount.fuse.stencil' >/dev/null 2>&1

# True if systemd searches the unit directory by default.
unit_is_found = [ -n '$(DESTDIR)' ] || case '$(PREFIX)' in /usr | /usr/local) ;; *) false ;; esac

# Installs the programs in $(bin) without building and without cargo. Checks for missing files before it writes any.
install-files:
	@for file in stencil stencil-mountd crates.gz; do [ -f '$(bin)'/$$file ] || { \
	    echo "$(bin)/$$file is missing: run make build first, or set bin= to the directory of the build" >&2; exit 1; }; done
	@! $(helper_is_packaged) || { echo '$(helper) is of a Debian package: remove it first (apt remove stencil)' >&2; exit 1; }
	@[ ! -L '$(helper)' -a ! -e '$(helper)' ] || $(helper_is_ours) || { \
	    echo "$(helper) belongs to another installation, $$(readlink -m '$(helper)'): make uninstall there first" >&2; exit 1; }
	install -d '$(DESTDIR)$(PREFIX)/bin' '$(DESTDIR)$(SBINDIR)' '$(share)/man/man1' '$(share)/man/man8' \
	    $(foreach file,$(completions) $(unit),'$(dir $(file))') '$(doc)/examples' \
	    $(foreach dir,$(page_dirs),'$(doc)/$(dir)')
	install -s -m 0755 $(foreach program,$(programs),'$(bin)/$(program)') '$(DESTDIR)$(PREFIX)/bin/'
	ln -srf '$(DESTDIR)$(PREFIX)/bin/stencil' '$(helper)'
	sed 's|/usr/local/bin/|$(PREFIX)/bin/|' 'mountd/systemd/stencil@.service' >'$(unit)'
	sed 's|/usr/local/bin/|$(PREFIX)/bin/|' 'mountd/systemd/stencil-clones@.service' >'$(clones_unit)'
	sed 's|/usr/local/bin/|$(PREFIX)/bin/|' mountd/systemd/stencil-exporter.service >'$(exporter_unit)'
	$(bin)/stencil generate man '$(share)/man/man1'
	mv '$(share)/man/man1/'*stencil*.8 '$(share)/man/man8/'
	$(foreach file,$(completions),$(bin)/stencil generate completions \
	    $(if $(findstring /bash,$(file)),bash,$(if $(findstring /zsh,$(file)),zsh,fish)) >'$(file)' &&) :
	install -m 0644 README.md CHANGELOG.md LICENSE-APACHE LICENSE-MIT mountd/debian/copyright '$(doc)/'
	$(foreach dir,$(page_dirs),install -m 0644 $(wildcard $(dir)/*.md $(dir)/*.svg) '$(doc)/$(dir)/' &&) :
	install -m 0644 mountd/debian/fstab '$(doc)/examples/fstab'
	install -m 0644 docs/reference/monitoring/alerts.yml docs/reference/monitoring/dashboard.json '$(doc)/examples/'
	install -m 0644 '$(bin)/crates.gz' '$(doc)/'
	chmod 0644 '$(unit)' '$(clones_unit)' '$(exporter_unit)' $(foreach file,$(completions),'$(file)') \
	    '$(share)/man/man1/stencil'*.1 '$(share)/man/man8/'*stencil*.8
	@$(unit_is_found) || printf '%s\n' 'systemd, man and the shells do not search $(PREFIX). Remaining steps:' \
	    '    systemctl link $(unit)' '    systemctl link $(clones_unit)' '    systemctl link $(exporter_unit)' \
	    '    add $(PREFIX)/bin to PATH and $(PREFIX)/share/man to MANPATH; completions: $(completions)'

install-symbols:
	$(foreach program,$(programs),file="$(symbols)/$(call build_id,$(bin)/$(program)).debug" && install -d "$${file%/*}" && \
	    objcopy --only-keep-debug --compress-debug-sections '$(bin)/$(program)' "$$file" && chmod 0644 "$$file" &&) :

uninstall:
	@! $(helper_is_packaged) || ! $(helper_is_ours) || { \
	    echo '$(helper) is of a Debian package: apt remove stencil' >&2; exit 1; }
	! $(helper_is_ours) || rm -f '$(helper)'
	$(foreach program,$(programs),! [ -f '$(DESTDIR)$(PREFIX)/bin/$(program)' ] || \
	    rm -f "$(symbols)/$(call build_id,$(DESTDIR)$(PREFIX)/bin/$(program)).debug" &&) :
	rm -f '$(DESTDIR)$(PREFIX)/bin/stencil' '$(DESTDIR)$(PREFIX)/bin/stencil-mountd' \
	    '$(unit)' '$(clones_unit)' '$(exporter_unit)' $(foreach file,$(completions),'$(file)') \
	    '$(share)/man/man1/stencil.1' '$(share)/man/man1/stencil-'*.1 \
	    '$(share)/man/man8/stencil-mountd.8' '$(share)/man/man8/mount.fuse.stencil.8'
	rm -rf '$(doc)'

clean:
	$(CARGO) clean
