#!/bin/bash
# Fuzzes each parser for FUZZ_SECONDS (600 by default), or those that are named: `fuzz/run.sh [target…]`.
#
# What is found is in fuzz/artifacts, and the script fails; new inputs that reach more code are kept in the cache, beside
# which fuzz/corpus stays small. Needs a C++ compiler, and cargo-fuzz, which it installs into the cache.
set -euo pipefail

cd "$(dirname "$0")"
cache=${OFFSHOOT_CACHE:-$HOME/.cache/offshoot}
command -v c++ > /dev/null || { echo "no C++ compiler for libFuzzer: run \`apt-get install g++\`" >&2; exit 2; }
version=0.13.2
cargo install --quiet --locked --version "=$version" --root "$cache/cargo-fuzz" cargo-fuzz
export PATH=$cache/cargo-fuzz/bin:$PATH
# cargo-fuzz asks the compiler for what only a nightly one grants without being told. No sanitizer: there is no unsafe code to watch.
export RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR=$cache/fuzz/target

targets=("$@")
[[ ${#targets[@]} != 0 ]] || mapfile -t targets < <(cargo fuzz list)
cargo fuzz build --sanitizer none
programs=$CARGO_TARGET_DIR/$(rustc --version --verbose | sed -n 's/^host: //p')/release
for target in "${targets[@]}"; do
    grown=$cache/fuzz/corpus/$target
    mkdir --parents "$grown" "artifacts/$target"
    echo "== $target: ${FUZZ_SECONDS:-600} s"
    # The first directory is where new inputs go.
    "$programs/$target" -artifact_prefix="artifacts/$target/" -max_total_time="${FUZZ_SECONDS:-600}" \
        -timeout=10 -rss_limit_mb=1024 -max_len=8192 -print_final_stats=1 -verbosity=0 "$grown" "corpus/$target"
done
