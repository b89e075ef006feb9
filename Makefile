# make help lists the targets. Everything below is one command; none needs another run first.

CARGO ?= $(or $(shell command -v cargo),$(HOME)/.cargo/bin/cargo)
PREFIX ?= /usr/local
DESTDIR ?=
target := $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),target)
guard := tests/support/guard.sh

# One after the other: they share the host.
.NOTPARALLEL:
.PHONY: help setup build demo test soak check bench install clean

help:
	@echo 'make setup    install what building and testing need (Debian 12), print the versions'
	@echo 'make build    release binaries: $(target)/release/stencil and stencil-mountd'
	@echo 'make demo     a real guest becomes a template, many clones share it, what they cost (does its own set-up)'
	@echo 'make test     all tests, then a guard that nothing was left behind (does its own set-up)'
	@echo 'make soak     the same scenarios with longer counts'
	@echo 'make check    format, lints, documentation: warnings are errors'
	@echo 'make bench    import and cold-read throughput, with ratios to the raw file'
	@echo 'make install  into $$DESTDIR$$PREFIX (PREFIX=$(PREFIX))'
	@echo 'make clean    remove the build directory'

setup:
	@tests/support/setup.sh

build:
	$(CARGO) build --release --workspace

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

share := $(DESTDIR)$(PREFIX)/share
install: build
	install -d '$(DESTDIR)$(PREFIX)/bin' '$(share)/man/man1' '$(share)/bash-completion/completions' \
	    '$(share)/zsh/site-functions' '$(share)/fish/vendor_completions.d' '$(DESTDIR)$(PREFIX)/lib/systemd/system'
	install -m 0755 $(target)/release/stencil $(target)/release/stencil-mountd '$(DESTDIR)$(PREFIX)/bin/'
	sed 's|/usr/local/bin/|$(PREFIX)/bin/|' 'mountd/systemd/stencil@.service' \
	    >'$(DESTDIR)$(PREFIX)/lib/systemd/system/stencil@.service'
	$(target)/release/stencil generate man '$(share)/man/man1'
	$(target)/release/stencil generate completions bash >'$(share)/bash-completion/completions/stencil'
	$(target)/release/stencil generate completions zsh >'$(share)/zsh/site-functions/_stencil'
	$(target)/release/stencil generate completions fish >'$(share)/fish/vendor_completions.d/stencil.fish'

clean:
	$(CARGO) clean
