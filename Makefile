# make help lists the targets. Everything below is one command; none needs another run first.

CARGO ?= $(or $(shell command -v cargo),$(HOME)/.cargo/bin/cargo)
PREFIX ?= /usr/local
DESTDIR ?=
# mount(8) looks for its helpers here and nowhere else.
SBINDIR ?= /usr/sbin
target := $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),target)
# The folder of the programs that are installed or packed.
bin ?= $(target)/release
guard := tests/support/guard.sh
# Most of a scenario's time is waiting.
export RUST_TEST_THREADS ?= $(shell echo $$((2 * $$(nproc))))

# One after the other: they share the host.
.NOTPARALLEL:
.PHONY: help setup build demo test soak check bench docs-record install install-files uninstall deb deb-files clean

help:
	@echo 'make setup    install what building and testing need (Debian 12), print the versions'
	@echo 'make build    release binaries: $(target)/release/stencil and stencil-mountd'
	@echo 'make demo     a real guest becomes a template, many clones share it, what they cost (does its own set-up)'
	@echo 'make test     all tests, then a guard that nothing was left behind (does its own set-up)'
	@echo 'make soak     the same scenarios with longer counts'
	@echo 'make check    format, lints, documentation: warnings are errors'
	@echo 'make bench    import and cold-read throughput, with ratios to the raw file'
	@echo 'make docs-record  run the commands of the pages, write the real output into them, draw docs/tutorial.svg'
	@echo 'make install  into $$DESTDIR$$PREFIX (PREFIX=$(PREFIX)); the helper of mount(8) into $$DESTDIR$$SBINDIR ($(SBINDIR))'
	@echo 'make install-files  the same without building, after make build: what $$(bin) has ($(bin)), for a root without cargo'
	@echo 'make uninstall  takes away what make install has installed with the same variables'
	@echo 'make deb      the Debian package: $(target)/debian/stencil_*.deb (does its own set-up)'
	@echo 'make clean    remove the build directory'

setup:
	@tests/support/setup.sh

build:
	$(CARGO) build --release --workspace
	@CARGO='$(CARGO)' mountd/debian/crates.sh '$(target)/release' || \
	    echo 'The programs are built; without the list of their crates they cannot be installed or packed.' >&2

demo: setup build
	@$(guard) tests/demo.sh

test: setup build
	$(guard) $(CARGO) test --release --workspace

soak: setup build
	STENCIL_SOAK=1 $(guard) $(CARGO) test --release --test suite -- soak kill crash

check:
	$(CARGO) fmt --all -- --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --no-deps --document-private-items

bench: setup build
	$(guard) tests/bench/throughput.sh

docs-record: setup build
	STENCIL_UPDATE_DOCS=1 $(guard) $(CARGO) test --release --test suite -- documented_commands::

deb: setup build deb-files

# Without building: what is in $(bin). deb_options are options of cargo-deb.
deb-files:
	@CARGO='$(CARGO)' mountd/debian/crates.sh '$(bin)'
	@CARGO='$(CARGO)' mountd/debian/build.sh '$(bin)' $(deb_options)

install: build install-files

share := $(DESTDIR)$(PREFIX)/share
doc := $(share)/doc/stencil
# Directories with pages, each with what lies directly in it.
page_dirs := $(sort $(patsubst %/,%,$(dir $(shell find docs -name '*.md'))))
unit := $(DESTDIR)$(PREFIX)/lib/systemd/system/stencil@.service
clones_unit := $(DESTDIR)$(PREFIX)/lib/systemd/system/stencil-clones@.service
completions := $(share)/bash-completion/completions/stencil $(share)/zsh/site-functions/_stencil \
    $(share)/fish/vendor_completions.d/stencil.fish

helper := $(DESTDIR)$(SBINDIR)/mount.fuse.stencil
# A host has one helper of mount(8): another installation's is left alone.
helper_is_ours = [ "$$(readlink -m '$(helper)')" = "$$(readlink -m '$(DESTDIR)$(PREFIX)/bin/stencil')" ]
helper_is_packed = dpkg-query --admindir='$(DESTDIR)/var/lib/dpkg' -S '$(SBINDIR)/mount.fuse.stencil' >/dev/null 2>&1

# Where systemd looks for units without being told.
unit_is_seen = [ -n '$(DESTDIR)' ] || case '$(PREFIX)' in /usr | /usr/local) ;; *) false ;; esac

# Without building and without cargo: what is in $(bin). What is missing there is said before anything is written.
install-files:
	@for file in stencil stencil-mountd crates.gz; do [ -f '$(bin)'/$$file ] || { \
	    echo "$(bin)/$$file is missing: run make build first, or name the folder of the build with bin=" >&2; exit 1; }; done
	@! $(helper_is_packed) || { echo '$(helper) is of a Debian package: remove it first (apt remove stencil)' >&2; exit 1; }
	@[ ! -L '$(helper)' -a ! -e '$(helper)' ] || $(helper_is_ours) || { \
	    echo "$(helper) is of another installation, $$(readlink -m '$(helper)'): make uninstall there first" >&2; exit 1; }
	install -d '$(DESTDIR)$(PREFIX)/bin' '$(DESTDIR)$(SBINDIR)' '$(share)/man/man1' '$(share)/man/man8' \
	    $(foreach file,$(completions) $(unit),'$(dir $(file))') '$(doc)/examples' \
	    $(foreach dir,$(page_dirs),'$(doc)/$(dir)')
	install -m 0755 '$(bin)/stencil' '$(bin)/stencil-mountd' '$(DESTDIR)$(PREFIX)/bin/'
	ln -srf '$(DESTDIR)$(PREFIX)/bin/stencil' '$(helper)'
	sed 's|/usr/local/bin/|$(PREFIX)/bin/|' 'mountd/systemd/stencil@.service' >'$(unit)'
	sed 's|/usr/local/bin/|$(PREFIX)/bin/|' 'mountd/systemd/stencil-clones@.service' >'$(clones_unit)'
	$(bin)/stencil generate man '$(share)/man/man1'
	mv '$(share)/man/man1/'*stencil*.8 '$(share)/man/man8/'
	$(foreach file,$(completions),$(bin)/stencil generate completions \
	    $(if $(findstring /bash,$(file)),bash,$(if $(findstring /zsh,$(file)),zsh,fish)) >'$(file)' &&) :
	install -m 0644 README.md CHANGELOG.md LICENSE-APACHE LICENSE-MIT mountd/debian/copyright '$(doc)/'
	$(foreach dir,$(page_dirs),install -m 0644 $(wildcard $(dir)/*.md $(dir)/*.svg) '$(doc)/$(dir)/' &&) :
	install -m 0644 mountd/debian/fstab '$(doc)/examples/fstab'
	install -m 0644 '$(bin)/crates.gz' '$(doc)/'
	chmod 0644 '$(unit)' '$(clones_unit)' $(foreach file,$(completions),'$(file)') \
	    '$(share)/man/man1/stencil'*.1 '$(share)/man/man8/'*stencil*.8
	@$(unit_is_seen) || printf '%s\n' 'Not where systemd, man and the shells look. What is left to do:' \
	    '    systemctl link $(unit)' '    systemctl link $(clones_unit)' \
	    '    PATH $(PREFIX)/bin, MANPATH $(PREFIX)/share/man; completions: $(completions)'

uninstall:
	@! $(helper_is_packed) || ! $(helper_is_ours) || { \
	    echo '$(helper) is of a Debian package: apt remove stencil' >&2; exit 1; }
	! $(helper_is_ours) || rm -f '$(helper)'
	rm -f '$(DESTDIR)$(PREFIX)/bin/stencil' '$(DESTDIR)$(PREFIX)/bin/stencil-mountd' \
	    '$(unit)' '$(clones_unit)' $(foreach file,$(completions),'$(file)') \
	    '$(share)/man/man1/stencil.1' '$(share)/man/man1/stencil-'*.1 \
	    '$(share)/man/man8/stencil-mountd.8' '$(share)/man/man8/mount.fuse.stencil.8'
	rm -rf '$(doc)'

clean:
	$(CARGO) clean
