# Offshoot. `make` tells what there is to make.
.POSIX:
.SUFFIXES:

CACHE = $${OFFSHOOT_CACHE:-$$HOME/.cache/offshoot}

help:
	@echo 'make demo         the main job, live: a good release kept, a broken one rolled back'
	@echo 'make test         all tests, the machines in QEMU included'
	@echo 'make test-all     the same, and every story on arm64 under U-Boot, in both ways of counting, and slow and broken links'
	@echo 'make bench        what the daemon and each way to a release take, beside libostree'
	@echo 'make conformance SUITE=DIR  the official TUF suite, from a checkout of theupdateframework/tuf-conformance'
	@echo 'make fuzz         each parser for ten minutes (FUZZ_SECONDS); fuzz/README.md'
	@echo 'make shell        a root shell on such a machine'
	@echo 'make arm64        the programs of a device with an arm64 processor, in target/aarch64-unknown-linux-gnu/release'
	@echo 'make setup        install what the others need (Debian bookworm or trixie, as root; they call it)'
	@echo 'make clean-cache  forget the OS images built so far'

setup:
	@qemu-tests/setup.sh

# What runs in the machines is built for release, as on a device; what drives them is not.
binaries: setup
	cargo build --locked --release --package offshoot --package bootloader-glue --package offshoot-fleet
	agent/cross-arm64

demo: setup
	@cargo build --locked --release --package offshoot --package bootloader-glue --package offshoot-fleet --package qemu-tests
	@cargo run --locked --release --quiet --package qemu-tests -- demo

test: binaries
	cargo test --locked --workspace

# Stories that differ from those of `test` by the board, by who counts or by the link: more than an hour.
test-all: binaries
	cargo test --locked --workspace --features qemu-tests/all

bench: binaries
	@cargo run --locked --quiet --package qemu-tests -- footprint
	@cargo run --locked --quiet --package qemu-tests -- routes

conformance: setup
	agent/tests/tuf/conformance.sh "$(SUITE)"

fuzz: setup
	fuzz/run.sh

shell: binaries
	cargo run --locked --quiet --package qemu-tests -- shell

arm64: setup
	agent/cross-arm64

clean-cache:
	rm -rf "$(CACHE)"

.PHONY: help setup binaries demo test test-all bench conformance fuzz shell arm64 clean-cache
